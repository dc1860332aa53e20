"""Triangles of a layer's graph by the classes of their corners: how usable the layer is for a classifier.

Chen et al., "Revisit Similarity of Neural Network Representations From Graph Perspective", arXiv 2111.11165v2, 2022.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from repgraph.graph import Graph
from repgraph.labels import Labels, as_labels, class_codes
from repgraph.messages import tell


class TriangleMotifs(NamedTuple):
    """Numbers of triangles by the labels of their corners."""

    type1: int
    """All three equal."""
    type2: int
    """Exactly two equal."""
    type3: int
    """All three different."""


def triangle_motifs(graph: Graph, labels: Labels) -> TriangleMotifs:
    """Count the triangles of a graph with three, exactly two and no equal labels.

    An edge is a non-zero weight; self loops do not count. Of the 0/1 adjacency B and its parts S within and D between
    classes: type1 = sum (SS).S / 6, type3 = sum (DD).D / 6 and all of them sum (BB).B / 6.

    Parameters
    ----------
    graph
        Undirected graph over n samples.
    labels
        Class of each sample.

    Returns
    -------
    TriangleMotifs
        A tuple (type1, type2, type3).

    Raises
    ------
    ValueError
        If the graph is directed or the labels do not fit (`class_codes`).

    References
    ----------
    Chen et al. 2022. The authors search breadth-first in Python and count the same.

    Examples
    --------
    >>> complete = Graph.from_edges(5, *np.triu_indices(5, 1))
    >>> tuple(triangle_motifs(complete, [0, 0, 0, 1, 2]))
    (1, 6, 3)
    """
    if graph.directed:
        raise ValueError("triangle_motifs needs an undirected graph: call graph.symmetrize() first")
    codes = class_codes(labels, graph.n)[0].numpy()
    row, col, weight = graph.edges()
    linked = (weight != 0) & (row != col)
    row, col = row[linked], col[linked]
    same = codes[row] == codes[col]
    every = _triangles(graph.n, row, col)
    type1 = _triangles(graph.n, row[same], col[same])
    type3 = _triangles(graph.n, row[~same], col[~same])  # no two of the three corners agree
    return TriangleMotifs(type1, every - type1 - type3, type3)


def _triangles(n: int, row: np.ndarray, col: np.ndarray) -> int:
    """Triangles among undirected edges: each is found once, from its lowest corner by degree."""
    degree = np.bincount(row, minlength=n) + np.bincount(col, minlength=n)
    swap = (degree[row] > degree[col]) | ((degree[row] == degree[col]) & (row > col))
    low, high = np.where(swap, col, row), np.where(swap, row, col)
    a = sp.csr_array((np.ones(len(low), dtype=np.int64), (low, high)), (n, n))
    return int(((a @ a) * a).sum())


def motif_ratio(graph: Graph, labels: Labels) -> float:
    """Share of the triangles whose corners have one class: type1 / (type1 + type2 + type3), in [0, 1].

    Parameters
    ----------
    graph, labels
        As in `triangle_motifs`.

    Returns
    -------
    float
        The ratio; nan, with a warning, without triangles. `motif_ratio_chance` is its mean over permuted labels.

    Raises
    ------
    ValueError
        As `triangle_motifs`.

    Notes
    -----
    In the paper, with k = 5 and n = 200 or 500, from 0.05-0.1 at the input to 0.84-0.93 at the last layer.

    Examples
    --------
    >>> complete = Graph.from_edges(5, *np.triu_indices(5, 1))
    >>> motif_ratio(complete, [0, 0, 0, 1, 2])
    0.1
    """
    motifs = triangle_motifs(graph, labels)
    if not sum(motifs):
        tell(f"{graph!r} has no triangle: its motif ratio is undefined (nan)")
        return math.nan
    return motifs.type1 / sum(motifs)


def motif_ratio_chance(labels: Labels) -> float:
    """Mean of `motif_ratio` over all permutations of the labels: sum_c n_c (n_c - 1)(n_c - 2) / (n (n - 1)(n - 2)).

    Raises
    ------
    ValueError
        If the labels are no classes, or fewer than three.

    Examples
    --------
    >>> motif_ratio_chance([0, 0, 0, 1, 2])
    0.1
    """
    values = as_labels(labels)
    n = len(values)
    if n < 3:
        raise ValueError(f"labels must be those of at least 3 samples, got {n}")
    sizes = np.bincount(class_codes(values, n)[0].numpy())
    return float((sizes * (sizes - 1) * (sizes - 2)).sum() / (n * (n - 1) * (n - 2)))
