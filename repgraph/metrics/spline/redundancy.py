"""Which units of a layer draw a border that another unit already draws (spline pruning)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


def unit_redundancy(
    module: nn.Module,
    *,
    bn: nn.Module | None = None,
    rho: float = 0.05,
    normalize: bool = True,
    orientation: Literal["ignore", "keep"] = "ignore",
) -> Tensor:
    r"""Distance between the borders of all pairs of units of a layer, small = redundant.

    d(k, l) = 1 - \|<w_k, w_l>\| / (\|w_k\| \|w_l\|) + rho \|b_k - b_l\|, with w the rows (flattened filters). With the
    defaults b is b / \|w\|, and b_l changes sign where the cosine is negative: then d = 0 is equivalent to one border
    {w x + b = 0}, whatever the rows' norm and side.

    Parameters
    ----------
    module
        Linear layer or convolution with c units; without bias b = 0.
    bn
        BatchNorm behind it, folded in: w = gamma w / sqrt(var + eps), b = beta + gamma (b - mean) / sqrt(var + eps).
    rho
        Weight of the biases, >= 0.
    normalize
        Divide b by \|w\|. False is the published formula, which sees a difference between (w, b) and (2 w, 2 b).
    orientation
        "ignore": (w, b) and (-w, -b) are one border. "keep": the published formula.

    Returns
    -------
    Tensor
        Shape (c, c), float64, symmetric, zero diagonal; NaN between a unit whose row is zero (dead, it draws no border)
        and every other.

    Raises
    ------
    ValueError
        If module or bn is of another kind, their channels differ, or rho is negative.

    Notes
    -----
    The same border is not the same function: only positive multiples merge without loss. Beyond the first layer the
    borders are those in the layer's own input. Filters of different groups see different inputs: their cosine is 0.

    References
    ----------
    You et al., "Max-Affine Spline Insights Into Deep Network Pruning", TMLR 2022, arXiv 2101.02338. A reconstruction:
    the formula and rho are from memory of the paper, and its public code holds no pruning criterion to compare with.

    Examples
    --------
    >>> layer = nn.Linear(2, 3)
    >>> layer.weight.data, layer.bias.data = torch.tensor([[3.0, 4], [6, 8], [4, -3]]), torch.tensor([1.0, 2, 1])
    >>> unit_redundancy(layer).tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise ValueError(f"module must be a Linear or Conv layer, got {type(module).__name__}")
    if orientation not in ("ignore", "keep"):
        raise ValueError(f"orientation must be 'ignore' or 'keep', got {orientation!r}")
    if not rho >= 0:
        raise ValueError(f"rho must be at least 0, got {rho!r}")
    w = module.weight.detach().double().flatten(1)
    b = w.new_zeros(len(w)) if module.bias is None else module.bias.detach().double()
    if bn is not None:
        w, b = _folded(w, b, bn)
    groups = getattr(module, "groups", 1)
    group = torch.arange(len(w), device=w.device) // (len(w) // groups)
    return _distances(w, b, group, rho, normalize, orientation == "ignore")


def redundant_units(d: Tensor, ratio: float, norms: Tensor) -> list[int]:
    """Units to drop: the dead ones, then of the closest pair the one of smaller norm, until the ratio is reached.

    Parameters
    ----------
    d
        Distances of `unit_redundancy`, (c, c).
    ratio
        Share of the units to drop, in [0, 1): floor(ratio c + 1e-9) of them.
    norms
        Norm of each unit, (c,); which of a pair goes is our guess.

    Returns
    -------
    list of int
        Units in the order in which they are dropped.

    Raises
    ------
    ValueError
        If d is not square, norms are of another length, or the ratio is out of range.

    References
    ----------
    As for `unit_redundancy`; the greedy rule too is a reconstruction.

    Examples
    --------
    >>> d = torch.tensor([[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 1.0, 0.0]])
    >>> redundant_units(d, 1 / 3, torch.tensor([1.0, 2.0, 3.0]))
    [0]
    """
    d, norms = torch.as_tensor(d), torch.as_tensor(norms)
    if d.ndim != 2 or d.shape[0] != d.shape[1]:
        raise ValueError(f"d must have shape (c, c), got {tuple(d.shape)}")
    if norms.shape != d.shape[:1]:
        raise ValueError(f"norms must have shape ({len(d)},), got {tuple(norms.shape)}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio!r}")
    count = int(ratio * len(d) + 1e-9)
    left = d.double().clone()
    left.fill_diagonal_(torch.inf)
    unknown = left.isnan().sum(1) >= len(d) - 1
    dead = unknown & (norms == 0) if unknown.all() else unknown  # beside dead units alone a live one is unknown too
    dropped: list[int] = dead.nonzero().flatten().tolist()[:count]
    row, col = torch.triu_indices(len(d), len(d), 1)
    order = left.nan_to_num(torch.inf)[row, col].sort(stable=True).indices
    gone, size = set(dropped), norms.tolist()
    for pair in zip(row[order].tolist(), col[order].tolist(), strict=True):
        if len(dropped) >= count:
            break
        if gone.isdisjoint(pair):
            dropped.append(min(pair, key=lambda unit: size[unit]))
            gone.add(dropped[-1])
    return dropped


def _folded(w: Tensor, b: Tensor, bn: nn.Module) -> tuple[Tensor, Tensor]:
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm) or bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"bn must be a BatchNorm layer with running statistics, got {type(bn).__name__}")
    if bn.num_features != len(w):
        raise ValueError(f"bn must have {len(w)} channels as module has units, got {bn.num_features}")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.affine:
        scale = scale * bn.weight.detach().double()
    shift = bn.bias.detach().double() if bn.affine else torch.zeros_like(b)
    return w * scale[:, None], shift + scale * (b - bn.running_mean.double())


def _distances(w: Tensor, b: Tensor, group: Tensor, rho: float, normalize: bool, ignore: bool) -> Tensor:
    """Border distances of the units with rows w (c, d), biases b (c,) and groups (c,)."""
    norm = w.norm(dim=1)
    unit = w / norm[:, None]  # NaN for a zero row
    cosine = torch.where(group[:, None] == group, unit @ unit.T, 0.0).clamp(-1, 1)
    alive = norm > 0
    b = b / norm if normalize else b
    # Rounding keeps a cosine from 0, where the sign would be its own, and from 1 by a few units in the last place.
    rounding = 16 * torch.finfo(cosine.dtype).eps
    sign = torch.where(cosine < -rounding, -1.0, 1.0) if ignore else torch.ones_like(cosine)
    d = (1 - cosine.abs()).clamp_min(0) + rho * (b[:, None] - sign * b).abs()
    d = torch.where(d < rounding, 0.0, d)
    d = torch.where(alive[:, None] & alive, d, torch.nan)
    return d.fill_diagonal_(0)
