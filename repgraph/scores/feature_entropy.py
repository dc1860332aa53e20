"""Feature entropy as a score of filters: how consistently one lays out its map over the images of a class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from repgraph.activations.batches import Source
from repgraph.activations.forward import Forward, kept_random_state
from repgraph.labels import Labels, class_codes
from repgraph.metrics.feature_entropy import feature_birth, feature_entropy
from repgraph.metrics.feature_entropy.births import Preset
from repgraph.scores.maps import stream_maps
from repgraph.scores.weight_norm import as_scores

_FEW = 20  # as in repgraph.metrics.feature_entropy


def birth_consistency(births: Tensor, labels: Labels) -> Tensor:
    """What is left of ln n when the feature entropy is taken off, mean over the classes, in [0, ln n]; high = keep.

    (1/K) sum_k (ln n_k - H_k), with n_k samples in class k and H_k the `feature_entropy` of their births: ln n_k for a
    unit whose maps are all born alike, 0 for one whose births all differ. Below a birth rate of 0.1, H_k is
    (1 - rate) ln n_k, so that a unit without births scores 0 and ranks last.

    Parameters
    ----------
    births
        Births from `feature_birth`, (n, C), 0 = none.
    labels
        Class of each sample, at least 2 samples of each.

    Returns
    -------
    Tensor
        Shape (C,), float64.

    Raises
    ------
    ValueError
        If the labels do not fit or a class has one sample only, or as `feature_entropy`.

    Warns
    -----
    UserWarning
        If a class has fewer than 20 samples.

    Notes
    -----
    The order is that of the mean entropy, lowest first, as the authors remove units in their ablations. Their early
    code divides H by the birth rate and puts units with a quotient below 0.1 last, perfectly consistent ones too; not
    so here.

    References
    ----------
    Zhao, Zhang, "Quantitative Performance Assessment of CNN Units via Topological Entropy Calculation", ICLR 2022,
    arXiv 2103.09716.

    Examples
    --------
    >>> births = torch.tensor([[4, 1, 0], [4, 2, 0]] * 10 + [[7, 3, 0], [7, 3, 5]] * 10)
    >>> birth_consistency(births, [0] * 20 + [1] * 20).round(decimals=4)
    tensor([2.9957, 2.6492, 1.4979], dtype=torch.float64)
    """
    return _consistency(births, _codes(labels, len(births)))


def feature_entropy_scores(
    model: nn.Module,
    data: object,
    layers: Sequence[str] | None = None,
    *,
    labels: Labels | None = None,
    samples: int | Sequence[int] | Tensor | None = None,
    max_rank: int | None = None,
    density: float = 0.8,
    preset: Preset | None = None,
    batch_size: int = 64,
    forward: Forward | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """`birth_consistency` of the filters of each layer, high = keep, from one pass of the model over labelled data.

    Parameters
    ----------
    model, data, layers, samples, batch_size, forward, progress
        As in `repgraph.scores.maps.stream_maps`; all samples by default. The authors take 100 images of a class.
    labels
        Class of each sample; by default those of the data.
    max_rank, density, preset
        As in `feature_birth`.

    Returns
    -------
    dict of str to Tensor
        Layer -> (C,), float64 on the CPU.

    Raises
    ------
    ValueError
        As `stream_maps` and `birth_consistency`; if maps are not square and at least 4 x 4; if labels are missing.

    Warns
    -----
    UserWarning
        If a class has fewer than 20 samples.

    Notes
    -----
    The authors judge maps behind a ReLU. A layer without an activation of its own, as before the addition of a residual
    block, is judged by its signed maps, which have an order too. Do not mix in flipped images: flips move births. Only
    births (n, C) are kept. The data are read once more, without the model, to count the samples.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    >>> images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 2
    >>> feature_entropy_scores(model, (images, labels), progress=False)["0"].shape
    torch.Size([3])
    """
    with kept_random_state():
        batches = _Batches(Source(data, batch_size, samples), labels is None)
        given = None if labels is None else batches.source.pick(labels, "labels")
        f = partial(_births, max_rank=max_rank, density=density, preset=preset)
        births = stream_maps(model, batches, f, layers, forward=forward, progress=progress)
    codes = _codes(batches.labels if given is None else given, batches.source.n)
    return as_scores({name: _consistency(rows, codes) for name, rows in births.items()})


class _Batches:
    """Batches of a source, with the labels that came along in the last reading: a loader may shuffle in each."""

    def __init__(self, source: Source, labelled: bool) -> None:
        self.source, self.labelled = source, labelled
        self.labels: list[object] = []

    def __iter__(self) -> Iterator[object]:
        self.labels = []
        for batch in self.source:
            if self.labelled:
                if batch.labels is None:
                    raise ValueError("labels are missing: births are distributed within one class; pass labels=")
                self.labels += batch.labels.tolist()
            yield batch.raw


def _births(maps: Tensor, *, max_rank: int | None, density: float, preset: Preset | None) -> Tensor:
    if maps.ndim != 4:
        raise ValueError(f"maps must be square, (n, C, m, m), as of a 2-D convolution, got {tuple(maps.shape)}")
    return feature_birth(maps, max_rank=max_rank, density=density, preset=preset)


def _codes(labels: Labels, n: int) -> Tensor:
    """Class number of each sample, where every class has enough of them."""
    codes, classes = class_codes(labels, n)
    size, least = torch.bincount(codes).min(0)
    if size < 2:
        raise ValueError(f"labels: class {classes[least]!r} must have at least 2 samples, got {size}")
    if size < _FEW:
        warnings.warn(
            f"class {classes[least]!r} has {size} samples, fewer than {_FEW}: their births say little", stacklevel=3
        )
    return codes


def _consistency(births: Tensor, codes: Tensor) -> Tensor:
    by_class = [births[codes == code] for code in range(int(codes.max()) + 1)]
    return torch.stack([math.log(len(rows)) - feature_entropy(rows).entropy for rows in by_class]).mean(0)
