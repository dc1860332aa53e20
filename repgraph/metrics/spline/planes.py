"""The cells in the plane through three samples, or through the principal directions of many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from repgraph.metrics.spline.slices import SlicePartition, slice_partition


def slice_through_samples(
    model: nn.Module,
    samples: Tensor,
    *,
    margin: float = 0.25,
    layers: Sequence[str] | None = None,
    max_regions: int = 100_000,
    progress: bool = True,
) -> SlicePartition:
    """The cells in the plane through three samples: a rectangle around them, in orthonormal coordinates.

    Parameters
    ----------
    model, layers, max_regions, progress
        As in `slice_partition`.
    samples
        Three samples that are not on one line, (3, *input shape). The first is the origin, the second lies on the first
        axis.
    margin
        Room around them, as a share of the rectangle's sides.

    Returns
    -------
    SlicePartition
        Its `points` are the three.

    Raises
    ------
    ValueError
        As `slice_partition`; if there are not three samples, or margin is negative.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    >>> slice_through_samples(net, torch.eye(3)).points.shape
    (3, 2)
    """
    x = torch.as_tensor(samples).detach().cpu()
    if x.ndim < 2 or len(x) != 3:
        raise ValueError(f"samples must be three, (3, ...), got shape {tuple(x.shape)}")
    differences = (x[1:] - x[0]).double().flatten(1)
    q, r = torch.linalg.qr(differences.T)
    if not r[1, 1].abs() > 1e-10 * r.abs().amax():
        raise ValueError("samples must be three different ones that are not on one line")
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return _slice_around(model, x, x[0], (q * sign).T, margin, layers, max_regions, progress)


def slice_through_pca(
    model: nn.Module,
    samples: Tensor,
    *,
    margin: float = 0.1,
    layers: Sequence[str] | None = None,
    max_regions: int = 100_000,
    progress: bool = True,
) -> SlicePartition:
    """The cells in the plane of the samples' mean and their two principal directions: a rectangle around them.

    Parameters
    ----------
    model, layers, max_regions, progress
        As in `slice_partition`.
    samples
        At least three samples, (s, *input shape).
    margin
        Room around them, as a share of the rectangle's sides.

    Returns
    -------
    SlicePartition
        Its `points` are the samples projected onto the plane.

    Raises
    ------
    ValueError
        As `slice_partition`; if there are fewer than three samples, they vary in fewer than two directions, or margin
        is negative.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    >>> len(slice_through_pca(net, torch.randn(20, 3)).points)
    20
    """
    x = torch.as_tensor(samples).detach().cpu()
    if x.ndim < 2 or len(x) < 3:
        raise ValueError(f"samples must be at least three, (s, ...), got shape {tuple(x.shape)}")
    flat = x.double().flatten(1)
    mean = flat.mean(0)
    values, directions = torch.linalg.svd(flat - mean, full_matrices=False)[1:]
    if len(values) < 2 or not values[1] > 1e-10 * values[0]:
        raise ValueError("samples must vary in at least two directions")
    return _slice_around(model, x, mean.view(x.shape[1:]), directions[:2], margin, layers, max_regions, progress)


def _slice_around(
    model: nn.Module,
    samples: Tensor,
    origin: Tensor,
    directions: Tensor,
    margin: float,
    layers: Sequence[str] | None,
    max_regions: int,
    progress: bool,
) -> SlicePartition:
    """The rectangle around the samples' projections onto orthonormal directions (2, d)."""
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin!r}")
    points = ((samples.double() - origin.double()).flatten(1) @ directions.T).numpy()
    low, high = points.min(0), points.max(0)
    (left, bottom), (right, top) = low - margin * (high - low), high + margin * (high - low)
    domain = np.array([[left, bottom], [right, bottom], [right, top], [left, top]])
    basis = directions.view(2, *origin.shape)
    return slice_partition(
        model, origin.double(), basis, domain, layers=layers, max_regions=max_regions, points=points, progress=progress
    )
