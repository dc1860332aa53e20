"""HRank: how many directions the maps of a filter have (feature_rank)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repgraph.activations.forward import Forward
from repgraph.scores.maps import stream_maps
from repgraph.scores.weight_norm import as_scores

_CHUNK = 2**21  # numbers decomposed at a time


def feature_rank(maps: Tensor, *, tol: float | None = None) -> Tensor:
    """Mean matrix rank of each channel's maps over the samples, in [0, min(H, W)]; high = keep.

    (1/n) sum_i rank(maps[i, j]), where the rank counts the singular values above the tolerance.

    Parameters
    ----------
    maps
        Output of one layer, usually after its activation, (n, C, H, W). Decomposed in their own type, float32 for half
        precision and integers: the tolerance of float64 sees singular values that float32 takes for rounding.
    tol
        Absolute tolerance; max(H, W) eps s_max of each map by default, with eps of the type, as NumPy and torch have
        it. Only with the default is the rank invariant to the scale of a map.

    Returns
    -------
    Tensor
        Shape (C,), float64, on the maps' device; exact multiples of 1/n.

    Raises
    ------
    ValueError
        If maps are not real, finite and of shape (n, C, H, W) with n >= 1, or tol is negative.

    Warns
    -----
    UserWarning
        If min(H, W) <= 2: the rank has at most 3 levels and orders little.

    Notes
    -----
    A zero map has rank 0, a constant one 1. The ReLU may raise the rank, so before and after it the scores differ.
    Ranks compare within a layer only: divide by min(H, W) before any threshold over layers. Many filters tie. One SVD
    per map, 2^21 numbers at a time.

    References
    ----------
    Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020, arXiv 2002.10179. The authors' code
    keeps a running mean in float32, which rounds; here ranks are summed as integers.

    Examples
    --------
    >>> feature_rank(torch.tensor([[[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [[2, 2, 2], [2, 2, 2], [2, 2, 2]]]]))
    tensor([3., 1.], dtype=torch.float64)
    """
    ranks = feature_rank_by_sample(maps, tol=tol)
    side = min(maps.shape[2:])
    if side <= 2:
        shape = " x ".join(map(str, maps.shape[2:]))
        warnings.warn(f"maps of {shape} have a rank of at most {side + 1} levels, which order little", stacklevel=2)
    return ranks.double().mean(0)


def feature_rank_by_sample(maps: Tensor, *, tol: float | None = None) -> Tensor:
    """Matrix rank of every map, (n, C) int64; parameters and errors as in `feature_rank`."""
    if not isinstance(maps, Tensor) or maps.is_complex():
        got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps must be a real torch tensor, got {got}")
    if maps.ndim != 4 or maps.numel() == 0:
        raise ValueError(f"maps must have shape (n, C, H, W), as of a 2-D convolution, got {tuple(maps.shape)}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol!r}")
    if bad := int((~maps.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(f"maps must be finite, got NaN or infinite values in {bad} of {len(maps)} samples")
    return _ranks(maps.detach(), tol)


def hrank_scores(
    model: nn.Module,
    data: object,
    layers: Sequence[str] | None = None,
    *,
    samples: int | Sequence[int] | Tensor | None = 640,
    dtype: torch.dtype | None = None,
    batch_size: int = 64,
    forward: Forward | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """`feature_rank` of the filters of each layer, high = keep, from one pass over the data.

    Parameters
    ----------
    model, data, layers, samples, batch_size, forward, progress
        As in `repgraph.scores.maps.stream_maps`; 640 samples are what the authors' code takes.
    dtype
        Type in which the maps are decomposed, whose eps sets the tolerance: torch.float32 or torch.float64; the maps'
        own by default.

    Returns
    -------
    dict of str to Tensor
        Layer -> (C,), float64 on the CPU; the same for any batch size.

    Raises
    ------
    ValueError
        As `stream_maps` and `feature_rank`, or if dtype is another.

    Warns
    -----
    UserWarning
        If the maps of a layer have a side of 1 or 2.

    Notes
    -----
    The authors credit a residual block's sum to its last convolution, and read maps behind a pooling layer where there
    is one; here maps are taken before either.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> hrank_scores(model, torch.randn(8, 1, 6, 6), progress=False)["0"].shape
    torch.Size([4])
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {dtype!r}")

    def sums(maps: Tensor) -> Tensor:
        ranks = feature_rank_by_sample(maps.to(dtype or maps.dtype))
        return torch.cat([ranks.sum(0), ranks.new_tensor([1, min(maps.shape[2:])]) * len(maps)])

    found = stream_maps(
        model,
        data,
        sums,
        layers,
        combine="sum",
        samples=samples,
        batch_size=batch_size,
        forward=forward,
        progress=progress,
    )
    means = {name: total / total[-2] for name, total in as_scores(found).items()}
    if small := [name for name, mean in means.items() if mean[-1] <= 2]:
        warnings.warn(f"maps with a side of 1 or 2 have ranks that order little: {', '.join(small)}", stacklevel=2)
    return {name: mean[:-2] for name, mean in means.items()}


def _ranks(maps: Tensor, tol: float | None) -> Tensor:
    maps = maps.float() if maps.dtype.itemsize < 4 or not maps.is_floating_point() else maps
    limits = {} if tol is None else {"atol": tol, "rtol": 0.0}
    step = max(1, _CHUNK // maps[0].numel())
    return torch.cat([torch.linalg.matrix_rank(maps[i : i + step], **limits) for i in range(0, len(maps), step)])
