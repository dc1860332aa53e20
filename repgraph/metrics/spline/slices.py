"""The cells of a network in a plane, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.graph import Graph
from repgraph.metrics.spline.affine import AffineNetwork, Call
from repgraph.metrics.spline.codes import RegionCodes
from repgraph.metrics.spline.polygons import areas, cut_by_largest, cut_by_signs, neighbours


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class SlicePartition:
    """The cells of a network in the polygon `domain` of the plane x(u) = origin + u_1 basis_1 + u_2 basis_2."""

    polygons: list[np.ndarray]
    """Vertices of each cell in u, (v, 2) float64, counterclockwise."""
    region: RegionCodes
    """Region codes of the cells, packed; a max pooling has one gate for each entry of each window: the largest."""
    areas: np.ndarray
    """Area of each cell in u, (R,); they add up to the domain's."""
    forms: np.ndarray | None
    """Outputs of each cell at u = (0, 0), (1, 0) and (0, 1), (R, 3, outputs), which tell its affine map; None for the
    partition by some of the layers."""
    origin: Tensor
    basis: Tensor
    domain: np.ndarray
    points: np.ndarray
    """Coordinates of the samples that the plane was laid through, (s, 2); none for a plane that was given."""
    pairs: np.ndarray
    """Cells that share an edge of positive length, (edges, 2)."""
    borders: np.ndarray
    """The two ends of that edge in u, (edges, 2, 2)."""

    @property
    def count(self) -> int:
        """Number of cells R."""
        return len(self.polygons)

    @property
    def codes(self) -> Tensor:
        """Region code of each cell, (R, D) uint8."""
        return self.region.unpacked

    @property
    def lengths(self) -> np.ndarray:
        """Length of the edge of each pair in u, (edges,)."""
        found: np.ndarray = np.linalg.norm(self.borders[:, 1] - self.borders[:, 0], axis=1)
        return found

    def border_layers(self) -> np.ndarray:
        """The gate layer that draws the border of each pair: the first in which the codes differ, (edges,) of str."""
        names, layer = list(self.region.layers), np.full(len(self.pairs), -1)
        for number, name in enumerate(names):
            bits = self.region.layer(name).numpy()
            differs = (bits[self.pairs[:, 0]] != bits[self.pairs[:, 1]]).any(1)
            layer[differs & (layer < 0)] = number
        found: np.ndarray = np.array(names)[layer]
        return found

    def dual_graph(self) -> Graph:
        """Graph of the cells: an edge where two share an edge of positive length, which is its weight."""
        return Graph.from_edges(self.count, self.pairs[:, 0], self.pairs[:, 1], self.lengths)

    def to_networkx(self) -> nx.Graph[int]:
        """The dual graph with the attribute area of each node and length of each edge."""
        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from((number, {"area": float(area)}) for number, area in enumerate(self.areas))
        graph.add_edges_from(
            (int(a), int(b), {"length": float(length)}) for (a, b), length in zip(self.pairs, self.lengths, strict=True)
        )
        return graph

    def decision_boundary(self, a: int | None = None, b: int | None = None) -> np.ndarray:
        """Where the outputs a and b are equal, or by default where the largest output changes, cell by cell.

        Parameters
        ----------
        a, b
            Two different outputs, or none. For a network with a single output and no arguments: its zero.

        Returns
        -------
        ndarray
            Straight pieces in u, (pieces, 2 ends, 2).

        Raises
        ------
        ValueError
            If only one of the two is given, they are equal or out of range, or the partition is by some layers only.
        """
        if self.forms is None:
            raise ValueError("the partition is by some of the layers: outputs are not affine on its cells")
        forms, outputs = self.forms, self.forms.shape[2]
        # All polygons side by side, (R, v, 2), the shorter ones with their last vertex again.
        lengths = np.array([len(polygon) for polygon in self.polygons])
        places = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1) + (lengths.cumsum() - lengths)[:, None]
        corners = np.concatenate(self.polygons)[places]
        noise = 1e-12 * np.abs(forms).max((1, 2))  # outputs that are equal but for rounding have no border
        if a is None and b is None:
            if outputs == 1:
                return _zeros(corners, forms[..., 0], noise, None)
            pairs = [(i, j) for j in range(outputs) for i in range(j)]
            found = [_zeros(corners, forms[..., i] - forms[..., j], noise, forms - forms[..., [i]]) for i, j in pairs]
            return np.concatenate(found)
        if a is None or b is None or a == b or not (0 <= a < outputs and 0 <= b < outputs):
            raise ValueError(f"a and b must be two different outputs in 0..{outputs - 1}, got {a!r} and {b!r}")
        return _zeros(corners, forms[..., a] - forms[..., b], noise, None)

    def __repr__(self) -> str:
        return (
            f"SlicePartition(cells={self.count}, gates={self.region.gates}, layers={len(self.region.layers)}, "
            f"area={self.areas.sum():.4g})"
        )


def _zeros(corners: np.ndarray, form: np.ndarray, noise: np.ndarray, others: np.ndarray | None) -> np.ndarray:
    """Zeros (pieces, 2, 2) of an affine function per cell (R, 3), kept where no other (R, 3, k) is above it.

    Cells have the given corners (R, v, 2); where the function stays within the noise (R,) there are none.
    """
    c, s = form[:, 0], form[:, 1:] - form[:, :1]
    here = c[:, None] + np.einsum("rvd,rd->rv", corners, s)
    above = here > 0
    cells = np.flatnonzero(above.any(1) & ~above.all(1) & (np.abs(here).max(1) > noise))
    corners, here, above = corners[cells], here[cells], above[cells]
    after, there = np.roll(corners, -1, 1), np.roll(here, -1, 1)
    crosses = above != np.roll(above, -1, 1)  # twice in a convex cell
    share = np.where(crosses, here / np.where(crosses, here - there, 1), 0)
    found: np.ndarray = (corners + share[..., None] * (after - corners))[crosses].reshape(-1, 2, 2)
    if others is None or not len(found):
        return found
    # Along a piece u = start + t (end - start) the others' lead over the two is affine: keep where none is above 0.
    lead = others[cells]
    slopes = lead[:, 1:] - lead[:, :1]
    at = [lead[:, 0] + np.einsum("rd,rdk->rk", found[:, end], slopes) for end in (0, 1)]
    scale = 1e-12 * np.abs(others).max()
    rise = at[1] - at[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = -at[0] / rise
    low = np.where((rise < 0) & (at[0] > scale), t, 0).max(1)
    high = np.where((rise > 0) & (at[1] > scale), t, 1).min(1)
    kept = (low < high) & ~((at[0] > scale) & (at[1] > scale)).any(1)
    ends = np.stack((low, high), 1)[kept][..., None]
    result: np.ndarray = found[kept][:, :1] + ends * (found[kept][:, 1:] - found[kept][:, :1])
    return result


def slice_partition(
    model: nn.Module,
    origin: Tensor,
    basis: Tensor,
    domain: Tensor | np.ndarray | Sequence[Sequence[float]],
    *,
    layers: Sequence[str] | None = None,
    max_regions: int = 100_000,
    points: np.ndarray | None = None,
    progress: bool = True,
) -> SlicePartition:
    """Cut a polygon of a plane in input space into the cells of a network, exactly.

    The plane is x(u) = origin + u_1 basis_1 + u_2 basis_2, u in the domain. Layer by layer, the pre-activations are
    affine on each cell: the three points origin, origin + basis_1 and origin + basis_2, pushed through the network with
    the cell's gates held, give them; units whose sign differs among a cell's vertices cut it.

    Parameters
    ----------
    model
        In eval mode, made of affine layers (convolution, BatchNorm, average pooling, sums, concatenation, ...),
        ReLU-like functions and 2-D max pooling.
    origin
        One input, without batch axis.
    basis
        Two directions, (2, *input shape), independent; lengths and areas are in their units.
    domain
        Vertices of a convex polygon in u, (v, 2), in either sense.
    layers
        Names of gate layers as in `gating_states` ("name" means "name/upper" too; max poolings are "name#pool"), the
        first ones in execution order: the partition by these alone. Borders of later layers bend at those of earlier
        ones, so that none can be left out between.
    max_regions
        Refuse more cells than this.
    points
        Coordinates of samples to carry along, (s, 2).
    progress
        Show a progress bar.

    Returns
    -------
    SlicePartition
        Polygons, codes, areas, neighbours; on the CPU, computed in float64.

    Raises
    ------
    ValueError
        If the model is in train mode or is not piecewise affine (the message names the layer and function, or says that
        the result was checked and does not hold); if origin and basis do not fit or are dependent, or the domain is
        not convex; if there are more than max_regions cells, or layers are unknown or not the first ones.

    Notes
    -----
    A zero counts as off. Values within 1e-12 of the domain's size (and 1e-14 of the largest value met, for rounding)
    are on a line; a unit that vanishes on a cell but for rounding is off. Every cell's code and outputs are compared
    with those of the network itself at its middle, and at up to 4096 vertices just inside: what is neither affine nor
    known is found where it shows at one of these points. Time: one forward pass of three points per cell; memory about
    16 MiB of activations for each part of the cells that waits, and one bit per gate and cell.

    References
    ----------
    Cells as in Balestriero, Baraniuk, "A Spline Theory of Deep Networks", ICML 2018. SplineCam (Humayun et al., CVPR
    2023, arXiv 2302.12828) finds the same cells through graphs and searches faces; it takes sequential models only.

    Examples
    --------
    Two lines and a slanted one make seven cells:

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval()
    >>> net[0].weight.data = torch.tensor([[1.0, 0], [0, 1], [-1, -1]])
    >>> net[0].bias.data = torch.tensor([0.0, 0, 1])
    >>> cells = slice_partition(net, torch.zeros(2), torch.eye(2), [[-10, -10], [10, -10], [10, 10], [-10, 10]])
    >>> cells.count, sorted(cells.areas.round(6).tolist())
    (7, [0.5, 40.5, 40.5, 59.5, 59.5, 99.5, 100.0])
    """
    origin, basis = torch.as_tensor(origin).detach().cpu(), torch.as_tensor(basis).detach().cpu()
    _check_plane(origin, basis)
    corners = _checked_domain(domain)
    net = AffineNetwork(model, origin)
    depth = _depth(list(net.calls.values()), layers)
    # In between the domain is moved to the middle and made of size 1, for its digits: u = centre + reach v.
    centre = corners.mean(0)
    reach = float(np.abs(corners - centre).max())
    b0, b1 = basis.double()
    middle = origin.double() + centre[0] * b0 + centre[1] * b1
    plane = middle + reach * torch.stack((torch.zeros_like(b0), b0, b1))
    domain_v = (corners - centre) / reach
    whole = _Polygons(domain_v, np.full(len(corners), -1), np.array([0, len(corners)]), np.zeros(1), [0])
    parts: list[tuple[_Polygons, RegionCodes, Tensor | None]] = []
    with tqdm(desc="cells", unit="cell", disable=not progress, delay=1, leave=False) as bar:
        parts.extend(net.walk(plane, whole, max_regions, depth, bar.update))
    v = np.concatenate([cells.vertices for cells, *_ in parts])
    labels = np.concatenate([cells.labels for cells, *_ in parts])
    offsets = np.append(0, np.cumsum(np.concatenate([np.diff(cells.offsets) for cells, *_ in parts])))
    region = RegionCodes(torch.cat([codes.bits for _, codes, _ in parts]), parts[0][1].layers, packed=True)
    outputs = [out for *_, out in parts if out is not None]
    forms = torch.cat(outputs, 1).transpose(0, 1) if outputs else None  # (R, 3, outputs)
    at, cell = _probes(v, offsets)
    expected = None
    if forms is not None:
        expected = forms[cell, 0] + torch.einsum("sp,spk->sk", at, forms[cell, 1:] - forms[cell, :1])
    net.check(plane[0] + torch.einsum("sp,p...->s...", at, plane[1:] - plane[0]), region.subset(cell), expected)
    pairs, borders = neighbours(v, labels, offsets)
    if forms is not None:  # from values at v to values at u = (0, 0), (1, 0), (0, 1)
        corners_v = torch.from_numpy((np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]) - centre) / reach)
        forms = forms[:, :1] + torch.einsum("qp,rpk->rqk", corners_v, forms[:, 1:] - forms[:, :1])
    return SlicePartition(
        polygons=np.split(centre + reach * v, offsets[1:-1]),
        region=region,
        areas=reach**2 * areas(v, offsets),
        forms=None if forms is None else forms.numpy(),
        origin=origin,
        basis=basis,
        domain=corners,
        points=np.zeros((0, 2)) if points is None else np.asarray(points, dtype=float),
        pairs=pairs,
        borders=centre + reach * borders,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Polygons:
    """Convex polygons as in `polygons`, and the largest absolute value met on each, for its rounding."""

    vertices: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    size: np.ndarray
    next_label: list[int]
    """One number, shared by all parts of the plane."""

    def __len__(self) -> int:
        return len(self.size)

    def part(self, a: int, b: int) -> _Polygons:
        begin, end = self.offsets[a], self.offsets[b]
        offsets = self.offsets[a : b + 1] - begin
        return replace(
            self,
            vertices=self.vertices[begin:end],
            labels=self.labels[begin:end],
            offsets=offsets,
            size=self.size[a:b],
        )

    def cut(self, call: Call, z: np.ndarray, limit: int) -> tuple[_Polygons, np.ndarray, np.ndarray]:
        finite = np.where(np.isfinite(z), np.abs(z), 0)
        size = np.maximum(self.size, finite.max(tuple({0, *range(2, z.ndim)})))
        kernel = cut_by_signs if call.kinks is not None else cut_by_largest
        vertices, labels, offsets, parents, bits, self.next_label[0] = kernel(
            self.vertices, self.labels, self.offsets, z, size, self.next_label[0], limit
        )
        return _Polygons(vertices, labels, offsets, size[parents], self.next_label), parents, bits


def _probes(vertices: np.ndarray, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Points at which cells are compared with the network, (s, 2), and their cells, (s,).

    The middle of each cell, and of up to 4096 vertices the point just inside.
    """
    counts = np.diff(offsets)
    middles = np.add.reduceat(vertices, offsets[:-1]) / counts[:, None]
    cell = np.repeat(np.arange(len(counts)), counts)
    some = slice(None, None, -(-len(vertices) // 4096))
    inside = 0.999 * vertices[some] + 0.001 * middles[cell[some]]
    points, cells = np.concatenate((middles, inside)), np.concatenate((np.arange(len(counts)), cell[some]))
    return torch.from_numpy(points), torch.from_numpy(cells)


def _check_plane(origin: Tensor, basis: Tensor) -> None:
    if basis.shape != (2, *origin.shape):
        raise ValueError(f"basis must have shape {(2, *origin.shape)}, got {tuple(basis.shape)}")
    if not bool(origin.isfinite().all() and basis.isfinite().all()):
        raise ValueError("origin and basis must be finite, got NaN or infinite values")
    first, second = torch.linalg.svdvals(basis.double().flatten(1))[:2].tolist() if origin.numel() > 1 else (0, 0)
    if not second > 1e-10 * first:
        raise ValueError("basis must be two independent directions, got dependent ones")


def _checked_domain(domain: object) -> np.ndarray:
    corners = np.array(domain, dtype=float)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3 or not np.isfinite(corners).all():
        raise ValueError(f"domain must be the vertices of a convex polygon, (v, 2), got shape {corners.shape}")
    come, go = corners - np.roll(corners, 1, 0), np.roll(corners, -1, 0) - corners
    turn = come[:, 0] * go[:, 1] - come[:, 1] * go[:, 0]
    size = np.ptp(corners, axis=0).max() ** 2
    turns = np.arctan2(turn, (come * go).sum(1)).sum() / (2 * np.pi)
    if abs(abs(turns) - 1) > 1e-6 or not ((turn > 1e-12 * size).all() or (turn < -1e-12 * size).all()):
        raise ValueError(f"domain must be a convex polygon without flat or repeated corners, got {corners.tolist()}")
    return corners if turns > 0 else corners[::-1].copy()


def _depth(calls: Sequence[Call], layers: Sequence[str] | None) -> int:
    """How many calls cut."""
    if layers is None:
        return len(calls)
    wanted = {layers} if isinstance(layers, str) else set(layers)
    names = [set(call.columns()) for call in calls]
    wanted |= {name for own in names for name in own if name.removesuffix("/upper") in wanted}
    known = list(dict.fromkeys(name for own in names for name in sorted(own)))
    missing = sorted(wanted - set(known))
    if missing or not wanted:
        raise ValueError(
            (f"layers: no gate layer {missing[0]!r}; " if missing else "layers is empty; ")
            + f"the gate layers are {', '.join(known)}"
        )
    depth = max(number for number, own in enumerate(names) if own & wanted) + 1
    left_out = [name for own in names[:depth] for name in sorted(own) if name not in wanted]
    if left_out:
        raise ValueError(
            f"layers must be the first ones in execution order: {left_out[0]!r} comes before the last of them, and the "
            "borders of later layers bend at its own"
        )
    return depth
