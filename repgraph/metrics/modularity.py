"""Modularity of a layer's graph with the classes as communities, its null and its ceiling.

Lu, Yang, Zhang, Chen, Chen, Xuan, Wang, Yang, "Understanding the Dynamics of DNNs Using Graph Modularity",
ECCV 2022, pp. 225-242, arXiv 2111.12485.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from repgraph.graph import Graph
from repgraph.labels import Labels, class_codes
from repgraph.messages import tell

Negative = Literal["raise", "clip", "signed", "keep"]


def modularity(graph: Graph, labels: Labels, *, resolution: float = 1.0, negative: Negative = "raise") -> float:
    r"""Modularity Q of a graph with the classes as communities: how far the layer has sorted the samples.

    Over the undirected edges (i, j, w), each once: T = sum w, In = sum of w with y_i = y_j,
    d_c = sum w ([y_i = c] + [y_j = c]); Q = In / T - gamma sum_c (d_c / 2T)^2. A self loop of weight w adds w to
    T and In and 2w to d_c. Unitless; in [-1/2, 1) for weights >= 0 and gamma = 1; 0 for one class; at most
    1 - 1/C for C classes of equal degree. High: samples of a class are neighbours. O(E) time, O(C) memory.

    Parameters
    ----------
    graph
        Undirected graph over n samples.
    labels
        Class of each sample, n ints, bools or strings.
    resolution
        gamma, 1 in the paper. Larger values weigh the chance term more.
    negative
        What to do with negative weights, which features before a ReLU can give. "raise" (default) refuses them.
        "clip" sets them to 0. "signed" is the extension of Gomez et al. 2009: (w+ Q+ - w- Q-) / (w+ + w-) with Q+-
        and w+- of the positive and of the negative part. "keep" uses the formula as it stands, as networkx does;
        its bounds no longer hold.

    Returns
    -------
    float
        Q; nan, with a warning, for a graph without any weight.

    Raises
    ------
    ValueError
        If the graph is directed (symmetrize it first), the labels do not fit (`class_codes`), weights are
        negative under "raise", `negative` is unknown, or the resolution is negative or not finite.

    Notes
    -----
    Q = h - gamma sum_c (d_c / 2T)^2, where h is `label_agreement`. With balanced classes Q is about h - 1/C, and
    about 0 for features unrelated to the labels.

    References
    ----------
    Lu et al., ECCV 2022; Gomez, Jensen, Arenas, "Analysis of community structure in networks of correlated data",
    Phys. Rev. E 80, 016114 (2009), for "signed". The authors' code computes the same Q through networkx on a dense
    adjacency.

    Examples
    --------
    Two triangles joined by one edge, each a class: 6/7 - 1/2 = 5/14.

    >>> graph = Graph.from_edges(6, [0, 0, 1, 3, 3, 4, 2], [1, 2, 2, 4, 5, 5, 3])
    >>> round(modularity(graph, [0, 0, 0, 1, 1, 1]), 9)
    0.357142857
    """
    if negative not in ("raise", "clip", "signed", "keep"):
        raise ValueError(f"negative must be 'raise', 'clip', 'signed' or 'keep', got {negative!r}")
    if not 0 <= resolution < float("inf"):
        raise ValueError(f"resolution must be a finite number >= 0, got {resolution}")
    own, other, weight, classes = _edges(graph, labels)
    below = weight < 0
    if negative == "raise" and bool(below.any()):
        raise ValueError(
            f"graph has {int(below.sum())} edges of negative weight: choose negative='clip', 'signed' or 'keep'"
        )
    if negative == "clip":
        weight = weight.clamp_min(0)
    if negative == "signed":
        plus, minus = weight.clamp_min(0), -weight.clamp_max(0)
        total = plus.sum() + minus.sum()
        parts = [w.sum() * _modularity(own, other, w, classes, resolution) for w in (plus, minus)]
        q = float((parts[0].nan_to_num() - parts[1].nan_to_num()) / total)
    else:
        q = float(_modularity(own, other, weight, classes, resolution))
    return _or_nan(q, graph)


def modularity_null(graph: Graph, labels: Labels, *, permutations: int = 20, seed: int = 0) -> Tensor:
    """Modularity under randomly permuted labels: what chance gives on this very graph.

    Parameters
    ----------
    graph
        Undirected graph over n samples; weights of either sign, taken as by ``negative="signed"``.
    labels
        Class of each sample.
    permutations
        How many permutations.
    seed
        Seed of the permutations.

    Returns
    -------
    Tensor
        Shape (permutations,), float64. Its mean is about -(1 - 1/C) / (n - 1), that is about 0.

    Raises
    ------
    ValueError
        If the graph is directed, the labels do not fit, or permutations < 1.

    Examples
    --------
    >>> graph = Graph.from_edges(6, [0, 0, 1, 3, 3, 4, 2], [1, 2, 2, 4, 5, 5, 3])
    >>> modularity_null(graph, [0, 0, 0, 1, 1, 1], permutations=1000).mean() < 0.1
    tensor(True)
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    codes, _ = class_codes(labels, graph.n)
    generator = torch.Generator("cpu").manual_seed(seed)
    shuffled = [codes[torch.randperm(graph.n, generator=generator, device="cpu")] for _ in range(permutations)]
    return torch.tensor([modularity(graph, y, negative="signed") for y in shuffled], dtype=torch.float64, device="cpu")


def label_agreement(graph: Graph, labels: Labels) -> float:
    """Share h of the edge weight that joins samples of one class: In / T, in [0, 1] for weights >= 0.

    Raises
    ------
    ValueError
        If the graph is directed, has negative weights, or the labels do not fit.

    Examples
    --------
    >>> graph = Graph.from_edges(6, [0, 0, 1, 3, 3, 4, 2], [1, 2, 2, 4, 5, 5, 3])
    >>> round(label_agreement(graph, [0, 0, 0, 1, 1, 1]), 6)
    0.857143
    """
    if negative := int((graph.edges()[2] < 0).sum()):
        raise ValueError(f"label_agreement needs weights >= 0, got {negative} edges of negative weight")
    return modularity(graph, labels, resolution=0.0)


def modularity_ceiling(graph: Graph, labels: Labels) -> float:
    """Modularity this graph would have if all its weight stayed inside the classes: 1 - sum_c (d_c / 2T)^2.

    At most 1 - 1/C. It can be reached where every class has more than k members; a smaller class must send
    k - (n_c - 1) of each member's edges elsewhere. Negative weights count by their absolute value.

    Raises
    ------
    ValueError
        If the graph is directed or the labels do not fit.

    Examples
    --------
    >>> graph = Graph.from_edges(6, [0, 0, 1, 3, 3, 4, 2], [1, 2, 2, 4, 5, 5, 3])
    >>> modularity_ceiling(graph, [0, 0, 0, 1, 1, 1])
    0.5
    """
    own, other, weight, classes = _edges(graph, labels)
    return _or_nan(float(1 - _chance(own, other, weight.abs(), classes)), graph)


def _or_nan(value: float, graph: Graph) -> float:
    if math.isfinite(value):
        return value
    tell(f"{graph!r} has no weight: its modularity is undefined (nan)")
    return math.nan


def _edges(graph: Graph, labels: Labels) -> tuple[Tensor, Tensor, Tensor, int]:
    """The classes that each edge joins, (edges,) twice, its weight, and the number of classes."""
    if graph.directed:
        raise ValueError("modularity needs an undirected graph: call graph.symmetrize() first")
    row, col, weight = graph.edges()
    codes, classes = class_codes(labels, graph.n)
    own, other = (codes.index_select(0, torch.from_numpy(ends).long()) for ends in (row, col))
    return own, other, torch.from_numpy(weight), len(classes)


def _modularity(own: Tensor, other: Tensor, weight: Tensor, classes: int, resolution: float) -> Tensor:
    """Q of edges that join these classes, each edge once. A tensor without axes."""
    inside = (weight * (own == other)).sum()
    return inside / weight.sum() - resolution * _chance(own, other, weight, classes)


def _chance(own: Tensor, other: Tensor, weight: Tensor, classes: int) -> Tensor:
    """sum_c (d_c / 2T)^2, the share of weight inside classes that chance would give."""
    degree = torch.zeros(classes, dtype=weight.dtype, device=weight.device)
    degree.index_add_(0, own, weight).index_add_(0, other, weight)
    return (degree / (2 * weight.sum())).square().sum()
