"""Births of feature maps: when the first hole appears, beside gudhi.

    python -m benchmarks.births [--full]

512 units x 100 maps of 14 x 14, Gaussian noise after a ReLU, one class: what a VGG16's last block gives per class;
fewer in small, and fewer of larger maps. The peers see the same maps: one gudhi simplex tree per map, and gudhi's
scikit-learn interface over the whole batch with all threads. The difference is the largest of births.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from gudhi.sklearn import RipsPersistence
from torch import Tensor

from benchmarks.rows import Row, Target, main, measure
from repgraph.metrics.feature_entropy import feature_birth

SMALL = {(512, 2, 14): Target(difference=0), (100, 1, 28): Target(difference=0)}
FULL = {
    (512, 100, 14): Target(peer=1 / 199, difference=0),
    **{size: Target(difference=0) for size in ((400, 1, 28), (100, 1, 56), (16, 1, 112))},
}
"""Units, images, side."""


def ranks(x: np.ndarray) -> np.ndarray:
    """Distance matrices whose entries are the ranks of the weights, (..., m, m): dense ranks, largest first."""
    m = x.shape[-1]
    weight = np.maximum(x, x.swapaxes(-1, -2)).reshape(-1, m, m)
    i, j = np.triu_indices(m, 1)
    values = -weight[:, i, j]
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    steps = np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) > 0, axis=1) + 1
    rank = np.empty_like(steps)
    np.put_along_axis(rank, order, steps, 1)
    distance = np.zeros(weight.shape)
    distance[:, i, j] = distance[:, j, i] = rank
    return distance


def by_rips(x: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rips = RipsPersistence(homology_dimensions=1, input_type="full distance matrix", n_jobs=-1)
        diagrams = rips.fit_transform(list(ranks(x)))
    m = x.shape[-1]
    first = np.array([d[:, 0].min() if len(d) else 0 for d in diagrams])
    first[first > np.ceil(0.8 * m * (m - 1) / 2)] = 0
    return torch.from_numpy(first).reshape(x.shape[:-2])


def row(units: int, images: int, side: int, target: Target) -> Row:
    noise = np.random.default_rng(0).standard_normal((images, units, side, side), np.float32)
    x = np.maximum(noise, 0)
    peers = {"gudhi's simplex trees": lambda: feature_birth(x, backend="gudhi")}
    if side == 14:  # larger maps take it minutes
        peers["gudhi's RipsPersistence"] = lambda: by_rips(x)
    return measure(
        "births of feature maps",
        f"{units * images:,} maps of {side} x {side}",
        lambda: feature_birth(x),
        peers=peers,
        difference=lambda found, others: max(float((found - others[name]).abs().max()) for name in peers),
        target=target,
    )


def rows(full: bool) -> Iterator[Row]:
    feature_birth(np.zeros((2, 14, 14), np.float32))  # compiles
    for size, target in (FULL if full else SMALL).items():
        yield row(*size, target)


if __name__ == "__main__":
    main(rows)
