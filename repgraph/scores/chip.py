"""CHIP: how much a channel adds to what the other channels of its layer span (channel_independence)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from repgraph.activations.forward import Forward
from repgraph.scores.maps import stream_maps
from repgraph.scores.weight_norm import as_scores

Method = Literal["auto", "gram", "qr", "svd"]

_CHUNK = 2**20  # float64 numbers at a time: more leave the cache
_STEP, _REACH = 0.25, 34.0  # of the trapezoidal rule in ln t: errors of exp(-pi^2 / 0.25) and exp(-34)


def channel_independence(maps: Tensor, *, method: Method = "auto", normalize_rows: bool = False) -> Tensor:
    r"""What the nuclear norm of a layer's output loses when one channel is zeroed, mean over samples; high = keep.

    A (C, M) holds the maps of one sample, one row per channel, and P_j zeroes row j:
    CI_j = \|A\|_* - \|P_j A\|_*, in [0, norm of row j]: the norm where the row is orthogonal to all others, 0 where it
    is zero.

    Parameters
    ----------
    maps
        Output of one layer after its activation, (n, C, ...), with at least one axis of positions.
    method
        All give the same number; cost and rounding (relative to the largest singular value of A) differ:
        "auto": one SVD per sample, from which the difference is an integral without cancellation (see Notes); 1e-14.
        "svd": one SVD per channel and sample, as the authors do. "qr": the same of a triangular factor; 1e-14.
        "gram": roots of eigenvalues of the smaller Gram matrix of the other rows; 1e-7.
    normalize_rows
        Scale each row to norm 1 (a zero row stays). The authors do not: the score then follows the amplitude.

    Returns
    -------
    Tensor
        Shape (C,), float64, on the maps' device.

    Raises
    ------
    ValueError
        If maps are not real, finite and of shape (n, C, ...) with n >= 1 and positions, or the method is unknown.

    Notes
    -----
    With singular values s_k (0 beyond the M-th) and left vectors U (C, C) of A, the characteristic polynomials of
    A A^T with and without row j have the ratio 1 / sum_k U_jk^2 / (s_k^2 + t) at -t, so that by Coulson's integral

    CI_j = (2 / pi) \int_0^\infty sum_k U_jk^2 s_k^2 / (s_k^2 + t^2)^2 / sum_k U_jk^2 / (s_k^2 + t^2) dt,

    a weighted mean of s_k^2 / (s_k^2 + t^2), with no cancellation and no case of its own for dead, equal or dependent
    rows. In ln t the trapezoidal rule converges exponentially. Time O(C min(C, M) (max(C, M) + 272)) per sample, in
    chunks of 8 MB of float64 (one sample at least).

    Two equal channels that no other overlaps score sqrt(2) - 1 of their norm each, not 0: without one, the other is
    independent.
    Homogeneous in the maps; unchanged by permuted positions and by signs of channels.

    References
    ----------
    Sui et al., "CHIP: CHannel Independence-based Pruning for Compact Neural Networks", NeurIPS 2021, arXiv 2110.13981.
    The authors' code rounds maps to 4 decimals first. The integral is ours, after Coulson, Proc. Cambridge Phil. Soc.
    36, 1940.

    Examples
    --------
    >>> channel_independence(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])).round(decimals=9)
    tensor([3., 4.], dtype=torch.float64)
    """
    return channel_independence_by_sample(maps, method=method, normalize_rows=normalize_rows).mean(0)


def channel_independence_by_sample(maps: Tensor, *, method: Method = "auto", normalize_rows: bool = False) -> Tensor:
    """Channel independence of every sample, (n, C) float64; parameters and errors as in `channel_independence`."""
    if not isinstance(maps, Tensor) or maps.is_complex():
        got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps must be a real torch tensor, got {got}")
    if maps.ndim < 3 or maps.numel() == 0:
        raise ValueError(f"maps must have shape (n, C, ...) with at least one position, got {tuple(maps.shape)}")
    if method not in ("auto", "gram", "qr", "svd"):
        raise ValueError(f"method must be 'auto', 'gram', 'qr' or 'svd', got {method!r}")
    if bad := int((~maps.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(f"maps must be finite, got NaN or infinite values in {bad} of {len(maps)} samples")
    return _independence(maps.detach(), method, normalize_rows)


def chip_scores(
    model: nn.Module,
    data: object,
    layers: Sequence[str] | None = None,
    *,
    samples: int | Sequence[int] | Tensor | None = 640,
    method: Method = "auto",
    normalize_rows: bool = False,
    batch_size: int = 64,
    forward: Forward | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """`channel_independence` of the filters of each layer, high = keep, from one pass over the data.

    Parameters
    ----------
    model, data, layers, samples, batch_size, forward, progress
        As in `repgraph.scores.maps.stream_maps`; 640 samples are the authors' choice.
    method, normalize_rows
        As in `channel_independence`.

    Returns
    -------
    dict of str to Tensor
        Layer -> (C,), float64 on the CPU.

    Raises
    ------
    ValueError
        As `stream_maps` and `channel_independence`.

    Notes
    -----
    The authors credit a residual block's sum to its last convolution; here maps are taken before the addition.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> chip_scores(model, torch.randn(8, 1, 6, 6), progress=False)["0"].shape
    torch.Size([4])
    """
    f = partial(channel_independence, method=method, normalize_rows=normalize_rows)
    found = stream_maps(
        model,
        data,
        f,
        layers,
        combine="mean",
        samples=samples,
        batch_size=batch_size,
        forward=forward,
        progress=progress,
    )
    return as_scores(found)


def _independence(maps: Tensor, method: Method, normalize_rows: bool) -> Tensor:
    C, M = maps.shape[1], math.prod(maps.shape[2:])
    each = C * (2 * M + 4 * int(2 * _REACH / _STEP)) + min(C, M) * (C + M)
    step = max(1, _CHUNK // each)
    found = []
    for start in range(0, len(maps), step):
        rows = maps[start : start + step].flatten(2).double()
        if normalize_rows:
            rows = nn.functional.normalize(rows, dim=2, eps=torch.finfo(rows.dtype).tiny)
        values = _by_integral(rows) if method == "auto" else _one_by_one(rows, method)
        found.append(values.masked_fill(~rows.any(2), 0))  # where rounding leaves 1e-19
    return torch.cat(found)


def _by_integral(rows: Tensor) -> Tensor:
    """Loss of nuclear norm per row of (n, C, M), from one SVD each."""
    C, M = rows.shape[1:]
    if C < M:
        rows = torch.linalg.qr(rows.mT, mode="r").R.mT
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    top = s[:, :1]
    squares = (s / torch.where(top > 0, top, 1.0)).square()
    weights = u.square()
    if C > M:
        weights, squares = torch.cat([weights, _outside(u)[..., None]], 2), nn.functional.pad(squares, (0, 1))
    t = torch.arange(-_REACH, _REACH, _STEP, dtype=rows.dtype, device=rows.device).exp()
    resolvent = 1 / (squares[..., None] + t.square())  # (n, r, nodes)
    mean = weights @ (squares[..., None] * resolvent.square()) / (weights @ resolvent)  # (n, C, nodes)
    lost: Tensor = top * (mean @ t) * (2 * _STEP / math.pi)
    return lost


def _outside(u: Tensor) -> Tensor:
    """1 - sum_k u_jk^2 of orthonormal columns u (n, C, r), C > r, without cancellation: (n, C).

    The r rows where it is least take the norm of the projection instead; for all others it is at least 1 / (r + 1).
    """
    r = u.shape[2]
    inside = u.square().sum(2)
    rows = inside.topk(r).indices[..., None]
    projected = u.gather(1, rows.expand(-1, -1, r)) @ u.mT  # (n, r, C)
    left = projected.scatter_add(2, rows, projected.new_full(rows.shape, -1.0)).square().sum(2)
    return (1 - inside).scatter(1, rows[..., 0], left)


def _one_by_one(rows: Tensor, method: Method) -> Tensor:
    """The same from one decomposition per row."""
    C, M = rows.shape[1:]
    total = torch.linalg.svdvals(rows).sum(1)
    if method == "qr" and C < M:
        rows = torch.linalg.qr(rows.mT, mode="r").R.mT
    lost = []
    for j in range(C):
        left = torch.cat([rows[:, :j], rows[:, j + 1 :]], 1)
        if method == "gram":
            values = torch.linalg.eigvalsh(left @ left.mT if C <= M else left.mT @ left).clamp_min(0).sqrt()
        else:
            values = torch.linalg.svdvals(left)
        lost.append(total - values.sum(1))
    return torch.stack(lost, 1).clamp_min(0)
