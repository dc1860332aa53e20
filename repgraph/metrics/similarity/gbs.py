"""Graph-based similarity (GBS) of two layers: how far every sample has the same neighbours and weights.

Chen, Lu, Hu, Yang, Xuan, Wang, Yang, "Graph-Based Similarity of Neural Network Representations", arXiv 2111.11165,
2021; "Revisit Similarity of Neural Network Representations From Graph Perspective" in its second version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from repgraph.graph import Graph, Symmetrize, knn_graph
from repgraph.messages import tell
from repgraph.metrics.similarity.measure import as_number, both, measure
from repgraph.metrics.similarity.places import located, reordered
from repgraph.neighbors import as_samples
from repgraph.precision import full_precision

Empty = Literal["zero", "skip"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of an adjacency, each scaled to norm 1."""

    n: int
    place: Tensor | None
    """i n + j of each entry, rising; None where all n x n entries are there."""
    weight: Tensor
    """Entry at each place, (m,), or all of them, (n, n)."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What made the graph."""

    def permuted(self, order: Tensor) -> Rows:
        """The same over the samples in another order."""
        order = order.to(self.weight.device)
        if self.place is None:
            return Rows(self.n, None, self.weight[order][:, order], self.settings)
        place, entry = reordered(self.place, order, self.n)
        return Rows(self.n, place, self.weight[entry], self.settings)


def row_cosines(a: Rows, b: Rows) -> Tensor:
    """Cosine of each row of a with the same row of b, (n,); 0 for an empty row."""
    if a.place is None or b.place is None:
        return (a.weight * b.weight).sum(1)
    return _row_cosines(a.place, a.weight, b.place, b.weight, a.n)


def _row_cosines(place_a: Tensor, weight_a: Tensor, place_b: Tensor, weight_b: Tensor, n: int) -> Tensor:
    cosines = torch.zeros(n, dtype=weight_a.dtype, device=weight_a.device)
    if len(place_b) == 0:
        return cosines
    at, there = located(place_b, place_a)
    shared = weight_a * weight_b[at] * there
    return cosines.index_add_(0, place_a // n, shared)


def check_same_kind(a: Rows, b: Rows) -> None:
    """Refuse graphs that were made with other choices."""
    if (a.place is None) != (b.place is None):
        raise ValueError("graphs must be made in the same way, got all pairs (k=None) against a sparse graph")
    keys = a.settings.keys() & b.settings.keys()
    if "metric" in keys:  # builders made both, and noted all their choices
        keys = a.settings.keys() | b.settings.keys()
    for key in keys:
        if a.settings.get(key) != b.settings.get(key):
            made = [", ".join(f"{name}={value}" for name, value in rows.settings.items()) for rows in (a, b)]
            raise ValueError(f"graphs must be made in the same way, got {made[0]} against {made[1]}")


def _rows(
    x: Tensor | Graph | Rows, k: int | None = 5, symmetrize: Symmetrize | None = "mean", weighted: bool = True
) -> Rows:
    if isinstance(x, Rows):
        return x
    if not isinstance(x, Graph):
        if symmetrize not in ("mean", "union", "mutual", "none", None):
            raise ValueError(f"symmetrize must be 'mean', 'union', 'mutual' or 'none', got {symmetrize!r}")
        x = as_samples(x)
        if torch.equal(x[0], x[-1]) and bool((x == x[0]).all()) and bool((x[0] != 0).any()):
            tell("constant features: every sample is equally near to every other")
        if k is None:
            if bool((x >= 0).all()):
                tell("dense graphs (k=None) of non-negative features are alike whatever the features: choose k")
            return _checked(Rows(len(x), None, _dense(x, weighted), {"k": None, "weighted": weighted}))
        x = knn_graph(x, k, symmetrize=symmetrize or "none")
    a = x.adjacency
    row = np.repeat(np.arange(x.n), np.diff(a.indptr))
    stored = a.data != 0
    place = torch.from_numpy(row[stored] * x.n + a.indices[stored])
    weight = torch.from_numpy(a.data[stored] if weighted else np.ones(int(stored.sum())))
    place, order = place.sort()
    settings = {**x.settings, "directed": x.directed, "weighted": weighted}
    return _checked(Rows(x.n, place, _unit(place // x.n, weight[order], x.n), settings))


def _unit(row: Tensor, weight: Tensor, n: int) -> Tensor:
    if len(weight):
        weight = weight / weight.abs().amax()
    squares = torch.zeros(n, dtype=weight.dtype, device=weight.device).index_add_(0, row, weight.square())
    return weight.div(squares.sqrt()[row])


def _dense(x: Tensor, weighted: bool = True) -> Tensor:
    """All cosines of the rows of x with a zero diagonal, its rows scaled to norm 1: (n, n)."""
    tiny = torch.finfo(x.dtype).tiny
    peak = x.abs().amax(1, keepdim=True).clamp_min(tiny)
    unit = x / peak
    norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min(tiny)
    unit = unit / norm * (norm * (peak / 1e-8)).clamp_max(1)  # norms below 1e-8 count as 1e-8
    with full_precision(x.device):
        weight = (unit @ unit.T).fill_diagonal_(0)
    if not weighted:
        weight = (weight != 0).to(weight.dtype)
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    unit_rows: Tensor = weight / norm.masked_fill(norm == 0, 1)
    return unit_rows


def _isolated(rows: Rows) -> Tensor:
    """Which rows are empty, (n,) bool."""
    if rows.place is None:
        return ~(rows.weight != 0).any(1)
    return torch.ones(rows.n, dtype=torch.bool, device=rows.place.device).index_fill_(0, rows.place // rows.n, False)


def _checked(rows: Rows) -> Rows:
    isolated = int(_isolated(rows).sum())
    if isolated:
        tell(f"{isolated} of {rows.n} samples are isolated: no edge has weight")
    return rows


def _gbs(a: Rows, b: Rows, empty: Empty = "zero") -> Tensor:
    if empty not in ("zero", "skip"):
        raise ValueError(f"empty must be 'zero' or 'skip', got {empty!r}")
    check_same_kind(a, b)
    cosines = row_cosines(a, b)
    if empty == "zero":
        return cosines.mean()
    return cosines.sum() / (~(_isolated(a) | _isolated(b))).sum()


@measure(_rows, _gbs)
def gbs(
    x: Tensor | Graph,
    y: Tensor | Graph,
    k: int | None = 5,
    *,
    symmetrize: Symmetrize | None = "mean",
    weighted: bool = True,
    empty: Empty = "zero",
) -> float:
    r"""Graph-based similarity of two layers, in [-1, 1]; 1 where all samples have the same neighbours and weights.

    (1/n) sum_i cos(A_i, B_i): the mean over the samples of the cosine between their rows in the adjacencies of the two
    layers' graphs. It needs no labels and no equal widths.

    Parameters
    ----------
    x, y
        Features (n, ...), or graphs of `knn_graph` made in the same way, over the same samples.
    k
        Neighbours per sample of the graphs that are built from features. None links all pairs, which says little on
        non-negative features (independent absolute Gaussians: 0.99).
    symmetrize
        As in `knn_graph`, for features: "mean" (default) as the authors' motif code, "none" or None for directed
        graphs.
    weighted
        False sets all non-zero weights to 1.
    empty
        A sample without neighbours in one of the layers counts as 0 ("zero", so that gbs(x, x) is 1 minus the share of
        such samples), or is left out ("skip").

    Returns
    -------
    float
        In [-1, 1], in [0, 1] for weights >= 0. Unrelated layers: about k / (n - 1), up to twice that when symmetrised;
        `similarity_null` gives it for the very layers.

    Raises
    ------
    ValueError
        If x or y are neither graphs nor finite (n, ...) tensors, differ in n, were made with another k or
        symmetrisation, or k is out of range.

    Warns
    -----
    UserWarning
        If samples are isolated, features are constant, or k is None and features are non-negative.

    Notes
    -----
    Invariant to orthogonal maps, isotropic scaling, and a positive scale per sample (down to norms of 1e-8, below which
    cosines shrink); not to translation or other linear maps. Robust to outliers and to width, and sees translation: CKA
    is the reverse, so look at both. O(n k) time and memory for a pair of graphs.

    References
    ----------
    Chen et al. 2021; LSim: Zhang and Ye, J. Informetrics 14(1), 100987 (2020). The released sanity check compares the
    dense graphs whatever its k; this is the sparse measure that the text describes. A sparse k of 5 is the text's. The
    row cosine of a zero row is 0 as in the code.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    >>> round(gbs(x, y, k=1), 6)
    0.624219
    >>> gbs(knn_graph(x, 1), knn_graph(x, 1))
    1.0
    """
    return as_number(_gbs(*both(_rows, x, y, k=k, symmetrize=symmetrize, weighted=weighted), empty))


def gbs_per_sample(
    x: Tensor | Graph,
    y: Tensor | Graph,
    k: int | None = 5,
    *,
    symmetrize: Symmetrize | None = "mean",
    weighted: bool = True,
) -> Tensor:
    """GBS of every sample: how far its neighbours and their weights agree between two layers; the mean is `gbs`.

    Parameters
    ----------
    x, y, k, symmetrize, weighted
        As in `gbs`.

    Returns
    -------
    Tensor
        Row cosines, (n,), in [-1, 1]; 0 for a sample that is isolated in one of the layers.

    Raises
    ------
    ValueError
        As `gbs`.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    >>> gbs_per_sample(x, y, k=1, symmetrize="none").tolist()
    [0.0, 1.0, 1.0]
    """
    a, b = both(_rows, x, y, k=k, symmetrize=symmetrize, weighted=weighted)
    check_same_kind(a, b)
    return row_cosines(a, b)
