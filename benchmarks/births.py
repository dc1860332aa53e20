"""Births of feature maps against gudhi: ``python -m benchmarks.births`` (about two minutes).

512 units x 100 maps of 14 x 14, Gaussian noise after a ReLU, one class: what a VGG16's last block gives per class. The
peers see the same maps: one gudhi simplex tree per map, and gudhi's scikit-learn interface over the whole batch.
"""

import warnings

import numpy as np
import torch
from gudhi.sklearn import RipsPersistence

from benchmarks.rss import measured
from repgraph.metrics.feature_entropy import feature_birth, feature_entropy

UNITS, IMAGES, SIDE = 512, 100, 14


def maps() -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((IMAGES, UNITS, SIDE, SIDE), np.float32)
    return np.maximum(noise, 0)


def ranks(x: np.ndarray) -> np.ndarray:
    """Distance matrices whose entries are the ranks of the weights, (..., m, m): dense ranks, largest first."""
    weight = np.maximum(x, x.swapaxes(-1, -2)).reshape(-1, SIDE, SIDE)
    i, j = np.triu_indices(SIDE, 1)
    values = -weight[:, i, j]
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    steps = np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) > 0, axis=1) + 1
    rank = np.empty_like(steps)
    np.put_along_axis(rank, order, steps, 1)
    distance = np.zeros(weight.shape)
    distance[:, i, j] = distance[:, j, i] = rank
    return distance


def main() -> None:
    x = maps()
    feature_birth(x[:1])  # compile
    own, grown, births = measured(lambda: feature_birth(x))
    best = min(own, *(measured(lambda: feature_birth(x))[0] for _ in range(4)))
    print(f"{IMAGES * UNITS} maps of {SIDE} x {SIDE}, {torch.get_num_threads()} threads")
    print(f"repgraph                    {best:8.3f} s   {best / births.numel() * 1e6:7.2f} us per map, "
          f"peak growth {grown / 1e6:.0f} MB (maps: {x.nbytes / 1e6:.0f} MB)")  # fmt: skip
    last = int(np.ceil(0.8 * SIDE * (SIDE - 1) / 2))
    some = x[:4]
    seconds, _, reference = measured(lambda: feature_birth(some, backend="gudhi"))
    seconds *= len(x) / len(some)
    assert torch.equal(reference, births[:4])
    print(f"gudhi, one tree per map     {seconds:8.3f} s   {seconds / best:7.1f}x   "
          f"(measured on {some[:, :, 0, 0].size} maps, equal births)")  # fmt: skip

    def batch():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rips = RipsPersistence(homology_dimensions=1, input_type="full distance matrix", n_jobs=-1)
            return rips.fit_transform(list(ranks(x)))

    seconds, _, diagrams = measured(batch)
    first = np.array([d[:, 0].min() if len(d) else 0 for d in diagrams])
    first[first > last] = 0
    assert np.array_equal(first, births.flatten().numpy())
    print(f"RipsPersistence, the batch  {seconds:8.3f} s   {seconds / best:7.1f}x   (equal births, all threads)")
    entropy = feature_entropy(births)
    print(f"mean feature entropy {float(entropy.entropy.mean()):.3f} nats, birth rate "
          f"{float(entropy.birth_rate.mean()):.3f}")  # fmt: skip
    for side, count in ((28, 4000), (56, 1000), (112, 200)):
        larger = np.maximum(np.random.default_rng(1).standard_normal((count, side, side), np.float32), 0)
        own = min(measured(lambda x=larger: feature_birth(x))[0] for _ in range(3))
        peer = measured(lambda x=larger: feature_birth(x[:8], backend="gudhi"))[0] * count / 8
        print(f"{count} maps of {side} x {side}: {own / count * 1e6:.1f} us per map, gudhi {peer / own:.0f}x")


if __name__ == "__main__":
    main()
