"""Runs of like layers: the optimal segmentation of the ordered layers of a layer x layer table.

Fisher, "On Grouping for Maximum Homogeneity", JASA 1958; used on layers by SGLP, arXiv 2410.14720.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np
import pandas as pd

Kind = Literal["similarity", "distance"]

_TIE = 2.0**-40  # of the largest entry (squared, of distances): cuts whose costs are closer are ties
_SYMMETRIC = 1e-5  # of the largest entry: what float32 arithmetic may leave between (i, j) and (j, i)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """Layers in order, cut into runs."""

    runs: tuple[tuple[str, ...], ...]
    """Names of the layers of each run."""
    cost: float
    """Sum of the diameters of the runs."""
    kind: Kind
    """How the table was read."""

    @property
    def m(self) -> int:
        """Number of runs."""
        return len(self.runs)

    @property
    def membership(self) -> pd.Series:
        """Number of each layer's run, from 0."""
        numbers = {name: number for number, run in enumerate(self.runs) for name in run}
        return pd.Series(numbers, name="segment", dtype=int)


def segment_layers(similarity: pd.DataFrame | np.ndarray, m: int, *, kind: Kind | None = None) -> Segmentation:
    r"""The m runs of consecutive layers with the least sum of diameters: where a network changes what it does.

    The diameter of a run R is its sum of squared deviations, (1 / (2 \|R\|)) sum_ij D_ij^2 over i, j in R, for a
    distance D; a similarity K is read as a kernel matrix, D_ij^2 = K_ii + K_jj - 2 K_ij, which gives
    sum_i K_ii - (1 / \|R\|) sum_ij K_ij. 0 for a run of layers that are all alike or of one layer.

    Parameters
    ----------
    similarity
        A table of `repgraph.between_layers` of one model's layers with themselves, or any symmetric (L, L) table or
        array over layers in their order. The layers of an array are called "0", "1", ...
    m
        Number of runs, 1 to L.
    kind
        How to read the entries: "similarity", which grows with likeness, or "distance", which falls to 0. By default
        as the table's ``attrs["distance"]`` says, and a similarity without them.

    Returns
    -------
    Segmentation
        The runs, their cost, and ``membership`` for ``plot.heatmap(table, segments=...)``. The cost is at least 0
        unless similarities exceed what a kernel matrix can have.

    Raises
    ------
    ValueError
        If the table is not square, of two different sets of layers or models, asymmetric, not finite, or of
        distances below 0; if it holds what looks like the other kind; if m is not an integer from 1 to L, or kind is
        unknown.

    Notes
    -----
    Exact, by dynamic programming: O(m L^2) time, O(L^2) memory. Of segmentations whose costs agree to about 1e-12 of
    the largest entry, the one whose first cut comes earliest is taken, then the second, and so on. The cost falls as
    m grows and says nothing about which m is right.

    Linear CKA, GBS and mutual kNN are kernels of the layers, so their diameters are sums of squared deviations of
    points, one for each layer. Only entries within a run count. A distance is squared: of the measure "ding" of
    `procrustes`, which is a square already, pass ``table ** 0.5``. Of the numbers \|Q_i - Q_j\| the segmentation is
    that of the curve Q in the plain sense.

    References
    ----------
    Fisher, JASA 1958. Li, Lu et al., "SGLP: A Similarity Guided Fast Layer Partition Pruning for Compressing Large
    Deep Models", arXiv 2410.14720: of it only the abstract was read, which names neither diameter nor points; that
    the diameter is the classical sum of squared deviations is a reconstruction. Where Fisher's method is run on the
    rows of the similarity matrix as feature vectors, as it may be there, a layer's likeness to layers outside its run
    counts too: that is ``segment_layers(table @ table.T, m, kind="similarity")``.

    Examples
    --------
    >>> table = pd.DataFrame(np.eye(5), index=list("abcde"), columns=list("abcde"))
    >>> table.loc["a":"b", "a":"b"] = table.loc["c":"e", "c":"e"] = 1
    >>> found = segment_layers(table, 2)
    >>> found.runs, found.cost
    ((('a', 'b'), ('c', 'd', 'e')), 0.0)
    >>> round(segment_layers(table, 1).cost, 6)  # 5 - (4 + 9) / 5
    2.4
    >>> found.membership.to_dict()
    {'a': 0, 'b': 0, 'c': 1, 'd': 1, 'e': 1}
    """
    if kind not in (None, "similarity", "distance"):
        raise ValueError(f"kind must be 'similarity', 'distance' or None, got {kind!r}")
    values, names = _checked(similarity)
    size = len(names)
    if isinstance(m, bool) or not isinstance(m, Integral) or not 1 <= m <= size:
        raise ValueError(f"m must be an integer with 1 <= m <= L, got m = {m!r} with L = {size} layers")
    if kind is None:
        falls = isinstance(similarity, pd.DataFrame) and similarity.attrs.get("distance", False)
        kind = "distance" if falls else "similarity"
    squares = _squares(values, kind)
    diameter = _diameters(squares)
    tie = _TIE * float(np.abs(values).max()) ** (2 if kind == "distance" else 1)
    ends = _ends(diameter, int(m), tie)
    starts = [0, *(end + 1 for end in ends[:-1])]
    pairs = list(zip(starts, ends, strict=True))
    return Segmentation(
        runs=tuple(tuple(names[start : end + 1]) for start, end in pairs),
        cost=float(sum(diameter[pair] for pair in pairs)),
        kind=kind,
    )


def _checked(table: pd.DataFrame | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The entries (L, L) in float64 and the names of the layers."""
    values = table.to_numpy(float) if isinstance(table, pd.DataFrame) else np.asarray(table, dtype=float)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ValueError(f"similarity must be a square table, layer x layer, got shape {values.shape}")
    names = [str(i) for i in range(len(values))]
    if isinstance(table, pd.DataFrame):
        names, others = [str(name) for name in table.index], [str(name) for name in table.columns]
        sides = table.index.name, table.columns.name
        if names != others or (None not in sides and sides[0] != sides[1]):
            raise ValueError(
                "similarity must be of one model's layers with themselves, the same in index and columns, got "
                f"{sides[0] or 'layers'} {_some(names)} and {sides[1] or 'layers'} {_some(others)}"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"layers must have distinct names, got {_some(names)}")
    if not np.isfinite(values).all():
        unknown = ~np.isfinite(values)
        bad = unknown.diagonal() if unknown.diagonal().any() else unknown.any(1)
        raise ValueError(
            f"similarity must be finite, got nan or infinite values for layers "
            f"{_some([names[i] for i in np.flatnonzero(bad)])}: drop them from index and columns"
        )
    apart = np.abs(values - values.T)
    if apart.max() > _SYMMETRIC * np.abs(values).max():
        i, j = np.unravel_index(apart.argmax(), apart.shape)
        raise ValueError(
            f"similarity must be symmetric, got {values[i, j]:g} for ({names[i]}, {names[j]}) and {values[j, i]:g} for "
            f"({names[j]}, {names[i]}): pass (table + table.T) / 2, or a symmetric measure's table"
        )
    return values, names


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _squares(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Squared distances (L, L) of entries of either kind; entries that look like the other kind are refused."""
    own, others = values.diagonal(), values[~np.eye(len(values), dtype=bool)]
    if kind == "similarity":
        if len(others) and np.abs(own).max() <= 1e-3 * others.max():
            raise ValueError(
                "similarities of layers with themselves are all 0: pass kind='distance' if these are distances"
            )
        return np.asarray(own[:, None] + own - 2 * values)
    if values.min() < 0:
        raise ValueError(f"distances must be at least 0, got {values.min():g}")
    if len(others) and own.min() > others.max():
        raise ValueError("distances must fall to 0 on the diagonal, got the largest there: pass kind='similarity'")
    return np.asarray(values * values)


def _diameters(squares: np.ndarray) -> np.ndarray:
    """Diameter of each run i..j, (L, L), infinite where j < i: sums of squared distances alone, nothing cancels."""
    size = len(squares)
    to_earlier = np.triu(squares, 1)[::-1].cumsum(0)[::-1]  # [i, k]: of layer k to the layers i..k-1
    length = np.arange(1, size + 1) - np.arange(size)[:, None]
    diameter = to_earlier.cumsum(1) / np.maximum(length, 1)
    return np.where(length >= 1, diameter, np.inf)


def _ends(diameter: np.ndarray, m: int, tie: float) -> list[int]:
    """Last layer of each run; of ties the earliest."""
    size = len(diameter)
    best = np.full((m + 1, size + 1), np.inf)  # [r, i]: least cost of the layers from i on in r runs
    best[0, size] = 0
    for r in range(1, m + 1):
        best[r, :size] = (diameter + best[r - 1, 1:]).min(1)
    ends, start = [], 0
    for r in range(m, 0, -1):
        cost = diameter[start] + best[r - 1, 1:]
        ends.append(int((cost <= best[r, start] + tie).argmax()))
        start = ends[-1] + 1
    return ends
