"""The cells of a network along a segment, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from repgraph.metrics.spline.affine import AffineNetwork, Call
from repgraph.metrics.spline.codes import RegionCodes

_ON = 1e-12


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SegmentPartition:
    """The cells that x(t) = x0 + t (x1 - x0), 0 <= t <= 1, passes through, in order."""

    t: Tensor
    """Borders between the cells, with 0 and 1, (R + 1,) float64, rising."""
    region: RegionCodes
    """Region codes of the cells, packed; a max pooling has one gate for each entry of each window: the largest."""
    values: Tensor
    """Outputs at both ends of each cell, (R, 2, outputs) float64: affine in between."""

    @property
    def codes(self) -> Tensor:
        """Region code of each cell, (R, D) uint8."""
        return self.region.unpacked

    @property
    def count(self) -> int:
        """Number of cells R."""
        return len(self.region)

    def __repr__(self) -> str:
        return f"SegmentPartition(cells={self.count}, gates={self.region.gates}, layers={len(self.region.layers)})"


def segment_regions(model: nn.Module, x0: Tensor, x1: Tensor, *, max_regions: int = 100_000) -> SegmentPartition:
    """Cut the segment from x0 to x1 into the cells of a network, exactly.

    Layer by layer, the pre-activations are affine on each interval: two points pushed through the network with the
    interval's gates held give them, and their zeros cut it.

    Parameters
    ----------
    model
        In eval mode, made of affine layers (convolution, BatchNorm, average pooling, sums, concatenation, ...),
        ReLU-like functions and 2-D max pooling.
    x0, x1
        Ends of the segment, one input each, without batch axis.
    max_regions
        Refuse more cells than this.

    Returns
    -------
    SegmentPartition
        On the CPU, computed in float64.

    Raises
    ------
    ValueError
        If the model is in train mode or is not piecewise affine (the message names the layer and function, or says that
        the result was checked and does not hold); if x0 and x1 are equal or of different shapes; if there are more
        than max_regions cells.

    Notes
    -----
    A zero counts as off. Borders closer than 1e-12 of the segment are one. Every cell's code and outputs are compared
    with those of the network itself at its middle and just inside its ends.

    References
    ----------
    Three points in place of matrices: our own; cells as in Balestriero, Baraniuk, "A Spline Theory of Deep Networks",
    ICML 2018.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    >>> net[0].weight.data, net[0].bias.data = torch.tensor([[2.0], [4.0]]), torch.tensor([-0.5, -3.0])
    >>> segment_regions(net, torch.tensor([0.0]), torch.tensor([1.0])).t.tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    x0, x1 = torch.as_tensor(x0).detach(), torch.as_tensor(x1).detach()
    if x0.shape != x1.shape:
        raise ValueError(f"x0 and x1 must have the same shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
    if not bool(x0.isfinite().all() and x1.isfinite().all()):
        raise ValueError("x0 and x1 must be finite, got NaN or infinite values")
    if torch.equal(x0, x1):
        raise ValueError("x0 and x1 must differ: the segment has no length")
    net = AffineNetwork(model, x0)
    points = torch.stack((x0, x1)).double()
    whole = _Intervals(np.zeros(1), np.ones(1), np.zeros(1))
    ends, codes, values = [], [], []
    for cells, code, out in net.walk(points, whole, max_regions, len(net.calls), lambda count: None):
        assert out is not None
        t = torch.from_numpy(np.stack((cells.low, cells.high), 1))
        ends.append(t)
        codes.append(code)
        values.append(out[0][:, None] + t[..., None] * (out[1] - out[0])[:, None])
    t, order = torch.cat(ends), torch.cat(ends)[:, 0].argsort()
    region = RegionCodes(torch.cat([code.bits for code in codes])[order], codes[0].layers, packed=True)
    outputs = torch.cat(values)[order]
    for share in (0.5, 0.001, 0.999):
        at = (t[order] @ torch.tensor([1 - share, share], dtype=t.dtype)).view(-1, *[1] * x0.ndim)
        expected = (1 - share) * outputs[:, 0] + share * outputs[:, 1]
        net.check(points[0] + at * (points[1] - points[0]), region, expected)
    return SegmentPartition(torch.cat((t[order][:, 0], torch.ones(1, dtype=t.dtype))), region, outputs)


@dataclass(frozen=True, slots=True, eq=False)
class _Intervals:
    """Intervals of t, from low to high, and the largest absolute value met on each, for its rounding."""

    low: np.ndarray
    high: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.low)

    def part(self, a: int, b: int) -> _Intervals:
        return _Intervals(self.low[a:b], self.high[a:b], self.size[a:b])

    def cut(self, call: Call, z: np.ndarray, limit: int) -> tuple[_Intervals, np.ndarray, np.ndarray]:
        finite = np.where(np.isfinite(z), np.abs(z), 0)
        size = np.maximum(self.size, finite.max(tuple({0, *range(2, z.ndim)})))
        parent, low, high = _cut(z, self.low, self.high, size)
        bits = _bits(z[:, parent], (low + high) / 2, size[parent])
        # An interval of the same code as the one before it, in one parent, is no new cell.
        new = np.append(True, (parent[1:] != parent[:-1]) | (bits[1:] != bits[:-1]).any(1))
        last = np.append(new[1:], True)
        parent = parent[new]
        return _Intervals(low[new], high[last], size[parent]), parent, bits[new]


def _cut(
    z: np.ndarray, low: np.ndarray, high: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intervals between the zeros of the values z (2, cells, ...): parents, low, high, in order."""
    with np.errstate(divide="ignore", invalid="ignore"):  # padding is -inf
        if z.ndim == 4:
            first, second = np.triu_indices(z.shape[3], 1)
            z = z[..., first] - z[..., second]
        values = z.reshape(2, len(low), -1)
        t = -values[0] / (values[1] - values[0])
    noise = np.abs(values).max(0) <= _ON * size[:, None]  # vanishes on the interval but for rounding
    inside = (t > low[:, None] + _ON) & (t < high[:, None] - _ON) & ~noise
    cell, unit = np.nonzero(inside)
    owner = np.concatenate((np.arange(len(low)), cell))
    begin = np.concatenate((low, t[cell, unit]))
    order = np.lexsort((begin, owner))
    owner, begin = owner[order], begin[order]
    keep = np.append(True, (owner[1:] != owner[:-1]) | (begin[1:] - begin[:-1] > _ON))
    owner, begin = owner[keep], begin[keep]
    end = np.append(begin[1:], 0.0)
    return owner, begin, np.where(np.append(owner[1:] != owner[:-1], True), high[owner], end)


def _bits(z: np.ndarray, t: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Bits of a call at one t of each interval, (cells, units)."""
    if z.ndim == 3:
        values = z[0] + t[:, None] * (z[1] - z[0])
        on: np.ndarray = (values > 0) & (np.abs(z).max(0) > _ON * size[:, None])
        return on
    with np.errstate(invalid="ignore"):
        entries = np.where(np.isfinite(z[0]), z[0] + t[:, None, None] * (z[1] - z[0]), -np.inf)
    # Entries that rounding alone tells apart are ties: the first of them wins.
    best = (entries >= entries.max(-1, keepdims=True) - _ON * size[:, None, None]).argmax(-1)
    largest: np.ndarray = best[..., None] == np.arange(z.shape[3])
    return largest.reshape(len(t), -1)
