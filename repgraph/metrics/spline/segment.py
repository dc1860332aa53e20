"""The cells of a network along a segment, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from repgraph.metrics.spline.affine import Call, HeldNetwork

_ON = 1e-12


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SegmentPartition:
    """The cells that x(t) = x0 + t (x1 - x0), 0 <= t <= 1, passes through, in order."""

    t: Tensor
    """Borders between the cells, with 0 and 1, (R + 1,) float64, rising."""
    codes: Tensor
    """Region code of each cell, (R, D) uint8."""
    layers: dict[str, slice]
    """Gate layer -> its columns in the codes; of a max pooling, one for each entry of each window: the largest."""
    values: Tensor
    """Outputs at both ends of each cell, (R, 2, outputs) float64: affine in between."""

    @property
    def count(self) -> int:
        """Number of cells R."""
        return len(self.codes)

    def __repr__(self) -> str:
        return f"SegmentPartition(cells={self.count}, gates={self.codes.shape[1]}, layers={len(self.layers)})"


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
    with those of the network itself at its middle.

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
    net = HeldNetwork(model, x0)
    points = torch.stack((x0, x1)).double()
    t = np.array([0.0, 1.0])
    held: list[Tensor] = []
    size = np.zeros(1)  # largest value met on each interval, for its rounding
    for call in net.calls:
        parents, intervals, bits = [], [], []
        for chunk in net.chunks(len(t) - 1, 2):
            forms = net.forms(points, [code[chunk] for code in held]).numpy()
            with np.errstate(invalid="ignore"):
                peak = np.abs(np.where(np.isfinite(forms), forms, 0)).max(tuple({0, *range(2, forms.ndim)}))
            size[chunk] = np.maximum(size[chunk], peak)
            low, high = t[:-1][chunk], t[1:][chunk]
            own, pieces = _cut(call, forms, low, high, size[chunk])
            parents.append(own + chunk.start)
            intervals.append(pieces)
            bits.append(_bits(call, forms[:, own], pieces.mean(1), size[chunk][own]))
        parent, cuts, code = np.concatenate(parents), np.concatenate(intervals), torch.from_numpy(np.concatenate(bits))
        # An interval of the same code as the one before it, in one parent, is no new cell.
        same = (parent[1:] == parent[:-1]) & (code[1:] == code[:-1]).all(1).numpy()
        first = np.concatenate(([True], ~same))
        parent, code, t = parent[first], code[first], np.append(cuts[first, 0], 1.0)
        if len(parent) > max_regions:
            raise ValueError(f"max_regions is {max_regions}, and the segment has more cells after {call.key!r}")
        held = [earlier[parent] for earlier in held] + [code]
        size = size[parent]
    middle = torch.from_numpy((t[:-1] + t[1:]) / 2)
    out = torch.cat([net.forms(points, [code[chunk] for code in held]) for chunk in net.chunks(len(t) - 1, 2)], 1)
    borders = torch.from_numpy(t)
    ends = torch.stack((borders[:-1], borders[1:]), 1)[..., None]
    values = out[0][:, None] + ends * (out[1] - out[0])[:, None]
    inputs = points[0] + middle.view(-1, *[1] * x0.ndim) * (points[1] - points[0])
    check(net, inputs, held, values.mean(1))
    codes, layers = joined(net.calls, held)
    return SegmentPartition(borders, codes, layers, values)


def joined(calls: list[Call], held: list[Tensor]) -> tuple[Tensor, dict[str, slice]]:
    """The codes of all calls side by side, (R, D) uint8, and each gate layer's columns."""
    layers: dict[str, slice] = {}
    start = 0
    for call in calls[: len(held)]:
        for name, width in call.columns().items():
            layers[name] = slice(start, start + width)
            start += width
    return torch.cat(held, 1).to(torch.uint8), layers


def check(net: HeldNetwork, inputs: Tensor, held: list[Tensor], outputs: Tensor | None) -> None:
    """Compare cells with the network itself at one input in each.

    Raises
    ------
    ValueError
        If gates or outputs differ beyond rounding: the network is not affine between the gates that were found.
    """
    for chunk in net.chunks(len(inputs), 2):
        found, out = net.codes(inputs[chunk])
        bad = any(bool(((bits != b[chunk]) & sure).any()) for (bits, sure), b in zip(found, held, strict=False))
        if outputs is not None:
            bad |= bool(((out - outputs[chunk]).abs() > 1e-6 * (out.abs().amax() + outputs[chunk].abs().amax())).any())
        if bad:
            raise ValueError(
                "the model is not affine between its gates: something in it is neither affine nor a ReLU-like "
                "function or 2-D max pooling (a product of activations, a norm, an absolute value, control flow)"
            )


def _cut(
    call: Call, forms: np.ndarray, low: np.ndarray, high: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Intervals after the cuts of a call: number of the parent, (r,), and both ends, (r, 2), in order."""
    with np.errstate(divide="ignore", invalid="ignore"):  # padding is -inf
        if call.entries:
            first, second = np.triu_indices(call.entries, 1)
            forms = forms[..., first] - forms[..., second]
        values = forms.reshape(2, len(low), -1)
        t = -values[0] / (values[1] - values[0])
    noise = np.abs(values).max(0) <= _ON * size[:, None]  # vanishes on the interval but for rounding
    inside = (t > low[:, None] + _ON) & (t < high[:, None] - _ON) & ~noise
    cell, unit = np.nonzero(inside)
    owner = np.concatenate((np.arange(len(low)), cell))
    begin = np.concatenate((low, t[cell, unit]))
    order = np.lexsort((begin, owner))
    owner, begin = owner[order], begin[order]
    keep = np.concatenate(([True], (owner[1:] != owner[:-1]) | (begin[1:] - begin[:-1] > _ON)))
    owner, begin = owner[keep], begin[keep]
    last = np.append(owner[1:] != owner[:-1], True)
    end = np.where(last, high[owner], np.append(begin[1:], 0.0))
    return owner, np.stack((begin, end), 1)


def _bits(call: Call, forms: np.ndarray, t: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Bits of a call at t on each interval, (r, units)."""
    if not call.entries:
        values = forms[0] + t[:, None] * (forms[1] - forms[0])
        on: np.ndarray = (values > 0) & (np.abs(forms).max(0) > _ON * size[:, None])
        return on
    with np.errstate(invalid="ignore"):
        entries = np.where(np.isfinite(forms[0]), forms[0] + t[:, None, None] * (forms[1] - forms[0]), -np.inf)
    # Entries that rounding alone tells apart are ties: the first of them wins.
    best = (entries >= entries.max(-1, keepdims=True) - _ON * size[:, None, None]).argmax(-1)
    largest: np.ndarray = best[..., None] == np.arange(call.entries)
    return largest.reshape(len(t), -1)
