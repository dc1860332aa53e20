"""The sparse graph over samples, and the builders that make one from a layer's outputs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import igraph
import networkx as nx
import numpy as np
import scipy.sparse as sp
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from repgraph.approximate import approximate_knn
from repgraph.neighbors import Metric, Screening, as_samples, knn, largest

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Graph", "Partition", "communities", "knn", "knn_graph", "threshold_graph"]

Symmetrize = Literal["mean", "union", "mutual", "none"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Graph:
    """A sparse weighted graph over n nodes (samples or channels), immutable, on the CPU.

    Node i is sample i. A stored zero is an edge slot of weight 0: kept, but not counted in `num_edges`. A
    diagonal entry A_ii = w is one self loop of weight w, as networkx reads it (it adds 2w to the degree); the
    builders here make none.

    Parameters
    ----------
    adjacency
        Square SciPy sparse array or matrix, (n, n), finite. Copied into a read-only `csr_array` of float64.
    directed
        Whether A_ij is the edge i -> j only. If False, A must be symmetric.
    settings
        The choices that made the graph (k, metric, symmetrize, ...), as plain JSON data. They travel into
        captions.

    Raises
    ------
    ValueError
        If the adjacency is not square or not finite, or is asymmetric while `directed` is False.

    Examples
    --------
    >>> triangle = Graph.from_edges(3, [0, 0, 1], [1, 2, 2])
    >>> triangle
    Graph(n=3, edges=3, undirected)
    >>> triangle.degree.tolist()
    [2.0, 2.0, 2.0]
    """

    adjacency: sp.csr_array
    directed: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.adjacency
        if not sp.issparse(given) or given.ndim != 2 or given.shape[0] != given.shape[1]:
            kind = f"shape {given.shape}" if hasattr(given, "shape") else type(given).__name__
            raise ValueError(f"adjacency must be a square SciPy sparse array, got {kind}")
        a = sp.csr_array(given, dtype=np.float64, copy=True)
        a.sum_duplicates()
        if not np.isfinite(a.data).all():
            raise ValueError("adjacency must be finite, got NaN or infinite weights")
        if not self.directed:
            t = a.T.tocsr()
            same = np.array_equal(a.indices, t.indices) and np.array_equal(a.data, t.data)
            if not same and (a - t).count_nonzero():  # stored zeros may lack their mirror image
                raise ValueError("adjacency must be symmetric, got an asymmetric one: pass directed=True")
        self._set(a, self.directed, self.settings)

    def _set(self, a: sp.csr_array, directed: bool, settings: Mapping[str, object]) -> None:
        for array in (a.data, a.indices, a.indptr):
            array.flags.writeable = False
        object.__setattr__(self, "adjacency", a)
        object.__setattr__(self, "directed", directed)
        object.__setattr__(self, "settings", MappingProxyType(dict(settings)))

    @classmethod
    def _undirected(
        cls, n: int, row: np.ndarray, col: np.ndarray, weight: np.ndarray, how: str, settings: Mapping[str, object]
    ) -> Graph:
        """Undirected graph of directed edges, symmetric by construction and so without the checks."""
        graph = object.__new__(cls)
        graph._set(_symmetric(n, row, col, weight, how), False, settings)
        return graph

    def __reduce__(self) -> tuple[type[Graph], tuple[object, ...]]:
        return Graph, (self.adjacency, self.directed, dict(self.settings))

    @property
    def n(self) -> int:
        """Number of nodes."""
        return int(self.adjacency.shape[0])

    @property
    def num_edges(self) -> int:
        """Number of edges of non-zero weight; an undirected pair counts once, a self loop once."""
        return int(np.count_nonzero(self.edges()[2]))

    @property
    def degree(self) -> np.ndarray:
        """Weighted degree of each node, (n,); a self loop counts twice. Directed: the sum of out- and in-weights."""
        a = self.adjacency
        return np.asarray(a.sum(1) + (a.sum(0) if self.directed else a.diagonal()))

    @property
    def isolated(self) -> np.ndarray:
        """Indices of the nodes without any edge of non-zero weight."""
        row, col, weight = self.edges()
        touched = np.concatenate((row[weight != 0], col[weight != 0]))
        return np.flatnonzero(np.bincount(touched, minlength=self.n) == 0)

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, column and weight of every stored edge; an undirected pair once, with row <= column."""
        a = self.adjacency
        row = np.repeat(np.arange(self.n, dtype=a.indices.dtype), np.diff(a.indptr))
        if self.directed:
            return row, a.indices, a.data
        once = row <= a.indices
        return row[once], a.indices[once], a.data[once]

    def symmetrize(self, how: Literal["mean", "union", "mutual"] = "mean") -> Graph:
        """Undirected version of a directed graph.

        mean: (A + A') / 2, so that a one-way edge keeps half its weight (the modularity authors' choice).
        union: every pair linked either way, with its weight, the larger one where the two differ. mutual: only
        pairs linked both ways, the smaller one where they differ. Union and mutual go by the presence of edges:
        a one-way edge of negative weight is kept by union and dropped by mutual.

        Raises
        ------
        ValueError
            If the graph is undirected already or `how` is unknown.
        """
        if how not in ("mean", "union", "mutual"):
            raise ValueError(f"how must be 'mean', 'union' or 'mutual', got {how!r}")
        if not self.directed:
            raise ValueError("symmetrize needs a directed graph, got an undirected one")
        settings = {**self.settings, "symmetrize": how}
        return Graph._undirected(self.n, *self.edges(), how, settings)

    def subgraph(self, nodes: ArrayLike) -> Graph:
        """Graph over the given nodes, in the given order; edges to other nodes are dropped.

        Raises
        ------
        ValueError
            If a node is out of range or named twice.
        """
        index = np.asarray(nodes)
        if index.dtype == bool and index.shape == (self.n,):
            index = np.flatnonzero(index)
        if index.ndim != 1 or (index.dtype.kind not in "iu" and len(index)):
            raise ValueError(
                f"nodes must be indices or a mask of {self.n} bools, got {index.dtype} of shape {index.shape}"
            )
        index = index.astype(np.int64)
        if len(index) and (index.min() < 0 or index.max() >= self.n):
            raise ValueError(f"nodes must lie in 0..{self.n - 1}, got {index.min()}..{index.max()}")
        if len(np.unique(index)) != len(index):
            raise ValueError("nodes must be distinct, got some twice")
        return Graph(self.adjacency[index][:, index], self.directed, self.settings)

    @classmethod
    def from_edges(
        cls,
        n: int,
        row: ArrayLike,
        col: ArrayLike,
        weight: ArrayLike | None = None,
        *,
        directed: bool = False,
        settings: Mapping[str, object] | None = None,
    ) -> Graph:
        """Graph of n nodes from an edge list; weights default to 1, repeated edges add up.

        Undirected edges are given once each, in either direction.
        """
        r, c = np.asarray(row), np.asarray(col)
        if (len(r) and r.dtype.kind not in "iu") or (len(c) and c.dtype.kind not in "iu"):
            raise ValueError(f"row and col must be integers, got {r.dtype} and {c.dtype}")
        r, c = r.astype(np.int64), c.astype(np.int64)
        w = np.ones(len(r)) if weight is None else np.asarray(weight, dtype=np.float64)
        if not len(r) == len(c) == len(w):
            raise ValueError(f"row, col and weight must have equal length, got {len(r)}, {len(c)} and {len(w)}")
        if len(r) and (min(r.min(), c.min()) < 0 or max(r.max(), c.max()) >= n):
            raise ValueError(f"edges must join nodes 0..{n - 1}")
        if not directed:
            two = r != c
            r, c, w = np.concatenate((r, c[two])), np.concatenate((c, r[two])), np.concatenate((w, w[two]))
        return cls(sp.coo_array((w, (r, c)), (n, n)).tocsr(), directed, settings or {})

    def to_scipy(self) -> sp.csr_array:
        """A copy of the adjacency as a SciPy `csr_array`, stored zeros included."""
        return self.adjacency.copy()

    @classmethod
    def from_scipy(cls, adjacency: sp.sparray, *, directed: bool = False) -> Graph:
        """Graph of a square SciPy sparse array."""
        return cls(adjacency, directed)

    def to_networkx(self) -> nx.Graph[int]:
        """A networkx `Graph` (or `DiGraph`) on nodes 0..n-1 with edge attribute "weight", stored zeros included."""
        graph: nx.Graph[int] = nx.DiGraph() if self.directed else nx.Graph()
        graph.add_nodes_from(range(self.n))
        graph.add_weighted_edges_from(zip(*(part.tolist() for part in self.edges()), strict=True))
        return graph

    @classmethod
    def from_networkx(cls, graph: nx.Graph[object], *, weight: str = "weight") -> Graph:
        """Graph of a networkx graph; node i is the i-th of `graph.nodes`, a missing weight is 1."""
        number = {node: i for i, node in enumerate(graph.nodes)}
        edges = [(number[u], number[v], data.get(weight, 1.0)) for u, v, data in graph.edges(data=True)]
        row, col, weights = zip(*edges, strict=True) if edges else ((), (), ())
        return cls.from_edges(len(number), row, col, weights, directed=graph.is_directed())

    def to_igraph(self) -> igraph.Graph:
        """An igraph `Graph` with edge attribute "weight", stored zeros included."""
        row, col, weight = self.edges()
        graph = igraph.Graph(self.n, np.column_stack((row, col)).tolist(), directed=self.directed)
        graph.es["weight"] = weight.tolist()
        return graph

    @classmethod
    def from_igraph(cls, graph: igraph.Graph, *, weight: str = "weight") -> Graph:
        """Graph of an igraph graph; a missing weight attribute counts as 1."""
        ends = np.array(graph.get_edgelist(), dtype=np.int64).reshape(-1, 2)
        weights = graph.es[weight] if weight in graph.es.attributes() else None
        return cls.from_edges(graph.vcount(), ends[:, 0], ends[:, 1], weights, directed=graph.is_directed())

    def layout(self, *, start: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
        """Positions for a drawing by igraph's Fruchterman-Reingold layout, (n, 2), centred, mostly within [-1, 1].

        Parameters
        ----------
        start
            Positions to start from, (n, 2): the nodes then move only as far as the edges pull them.
        seed
            Seed of the layout; Python's global random state, which igraph uses, is restored.

        Raises
        ------
        ValueError
            If start is not (n, 2) or not finite.
        """
        if start is not None and np.shape(start) != (self.n, 2):
            raise ValueError(f"start must have shape ({self.n}, 2), got {np.shape(start)}")
        if start is not None and not np.isfinite(start).all():
            raise ValueError("start must be finite, got NaN or infinite positions")
        if self.n < 2:
            return np.zeros((self.n, 2))
        graph = self.to_igraph()
        graph.delete_edges([edge.index for edge in graph.es if not edge["weight"] > 0])
        scale = self.n**0.5  # the size at which the layout's forces balance
        first = np.random.default_rng(seed).uniform(-1, 1, (self.n, 2)) if start is None else np.asarray(start)
        with _seeded(seed):
            found = graph.layout_fruchterman_reingold(
                seed=(first * scale).tolist(),
                niter=500 if start is None else 60,
                start_temp=scale / 3 if start is None else scale / 40,
                weights="weight" if graph.ecount() else None,
                grid=False,
            )
        places = np.array(found.coords).reshape(-1, 2)
        places -= np.median(places, axis=0)
        if start is not None:  # igraph turns a finished layout
            places = places @ orthogonal_procrustes(places, first)[0]
        spread = np.quantile(np.abs(places), 0.98)
        return np.asarray(np.clip(places / (spread or 1), -1.15, 1.15))

    def save(self, path: str | Path) -> None:
        """Write the graph to one safetensors file."""
        a = self.adjacency
        arrays = {"data": a.data, "indices": a.indices, "indptr": a.indptr}
        meta = {"n": self.n, "directed": self.directed, "settings": dict(self.settings)}
        save_file(
            {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
            str(path),
            metadata={"repgraph.graph": json.dumps(meta)},
        )

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read a graph that `save` wrote.

        Raises
        ------
        ValueError
            If the file is not one.
        """
        try:
            with safe_open(str(path), "np") as file:
                meta = json.loads((file.metadata() or {})["repgraph.graph"])
                n, directed, settings = meta["n"], meta["directed"], meta["settings"]
                data, indices, indptr = (file.get_tensor(name) for name in ("data", "indices", "indptr"))
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a graph saved by repgraph: {error}") from error
        return cls(sp.csr_array((data, indices, indptr), (n, n)), directed, settings)

    def __repr__(self) -> str:
        made = "".join(f", {name}={value}" for name, value in self.settings.items())
        return f"Graph(n={self.n}, edges={self.num_edges}, {'' if self.directed else 'un'}directed{made})"

    def _repr_html_(self) -> str:
        weight = self.edges()[2]
        rows: dict[str, object] = {
            "nodes": self.n,
            "edges": f"{self.num_edges}, {'' if self.directed else 'un'}directed",
            "isolated nodes": len(self.isolated),
            "weights": f"{weight.min():.4g} to {weight.max():.4g}" if len(weight) else "none",
            **self.settings,
        }
        cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
        return f"<table><caption>Graph</caption>{cells}</table>"


def knn_graph(
    x: Tensor,
    k: int = 3,
    *,
    metric: Metric | Literal["precomputed"] = "cosine",
    symmetrize: Symmetrize = "mean",
    screening: Screening = "auto",
    progress: bool = False,
    approximate: bool = False,
) -> Graph:
    r"""The k-nearest-neighbour graph, exact unless asked otherwise, over the samples of one layer.

    Directed: a_ij = s_ij where j is one of the k nearest of i, else no edge. Then U = (A + A') / 2 by default,
    see `Graph.symmetrize`. With metric "cosine" s_ij is the cosine similarity; with "euclidean" every edge
    weighs 1, since a distance is no similarity. With "precomputed" s_ij is x_ij.

    Parameters
    ----------
    x
        Samples, shape (n, ...); trailing axes are flattened. The neighbours are found on the device of x. With metric
        "precomputed" similarities, shape (n, n), such as the cosines of a streamed Gram matrix: rows are taken as they
        are, symmetric or not, the diagonal is not looked at, and ties go to the lowest index.
    k
        Neighbours per sample, 1 <= k < n; 3 is the choice of the modularity authors.
    metric
        "cosine" (default), "euclidean" or "precomputed".
    symmetrize
        "mean" (default), "union", "mutual", or "none" for the directed graph.
    screening
        In what products are computed first, as in `knn`; the graph is the same.
    progress
        Show a bar of the rows.
    approximate
        Take most of the nearest neighbours, by `repgraph.approximate.approximate_knn`. The settings then hold the
        method and the recall, the share of the true neighbours among those found. For 100,000 samples and more.

    Returns
    -------
    Graph
        n nodes. Weights of 0 (neighbours of a zero row) are stored, so that a directed row always has k.

    Raises
    ------
    ValueError
        As `knn` does, or if `symmetrize` is unknown, or precomputed similarities are not square or to be
        approximate.
    ImportError
        If `approximate` and faiss is not installed.

    Notes
    -----
    What the choice moves: on one 500-sample, k = 3 cosine graph of synthetic data with ten classes, modularity
    is 0.273 for the mean of both directions, 0.266 for the union, 0.287 for mutual pairs only.

    The official code of the modularity paper sets the diagonal of the similarities to 0 instead of leaving a
    sample out of its own neighbours; the two differ only where a k-th best cosine is negative.

    References
    ----------
    Lu et al., "Understanding the Dynamics of DNNs Using Graph Modularity", ECCV 2022.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-5 / 13, 12 / 13]], dtype=torch.float64)
    >>> knn_graph(x, 1)
    Graph(n=4, edges=3, undirected, k=1, metric=cosine, symmetrize=mean)
    >>> knn_graph(x, 1).adjacency.toarray().round(3).tolist()[0]
    [0.0, 0.3, 0.0, 0.0]
    """
    if symmetrize not in ("mean", "union", "mutual", "none"):
        raise ValueError(f"symmetrize must be 'mean', 'union', 'mutual' or 'none', got {symmetrize!r}")
    settings: dict[str, object] = {"k": k, "metric": metric, "symmetrize": symmetrize}
    if metric == "precomputed":
        if approximate:
            raise ValueError("approximate needs features, got metric='precomputed'")
        values, indices = largest(x, k)
    elif approximate:
        found = approximate_knn(x, k, metric=metric)
        values, indices = found.values, found.indices
        settings |= {"approximate": "faiss HNSW", "recall": round(found.recall, 4)}
    else:
        values, indices = knn(x, k, metric=metric, screening=screening, progress=progress)
    return _of_neighbors(values, indices, settings)


def _of_neighbors(values: Tensor, indices: Tensor, settings: Mapping[str, object]) -> Graph:
    """Graph of the neighbours of each row and their similarities, (n, k), by the settings it carries."""
    n, k = indices.shape
    weight = np.ones(n * k) if settings["metric"] == "euclidean" else values.double().flatten().cpu().numpy()
    column = indices.flatten().cpu().numpy()
    symmetrize = str(settings["symmetrize"])
    if symmetrize == "none":
        return Graph(sp.csr_array((weight, column, np.arange(0, n * k + 1, k)), (n, n)), True, settings)
    return Graph._undirected(n, np.repeat(np.arange(n), k), column, weight, symmetrize, settings)


def _symmetric(n: int, row: np.ndarray, col: np.ndarray, weight: np.ndarray, how: str) -> sp.csr_array:
    """Symmetric adjacency of directed edges, by "mean", "union" or "mutual"; stored zeros are kept."""
    if how == "mean":
        ends = np.concatenate((row, col)), np.concatenate((col, row))
        return sp.coo_array((np.tile(weight / 2, 2), ends), (n, n)).tocsr()
    pair = np.minimum(row, col).astype(np.int64) * n + np.maximum(row, col)
    order = np.argsort(pair, kind="stable")
    pair, start, count = np.unique(pair[order], return_index=True, return_counts=True)
    if len(pair):
        weight = (np.maximum if how == "union" else np.minimum).reduceat(weight[order], start)
    if how == "mutual":
        two_way = (count == 2) | (pair // n == pair % n)
        pair, weight = pair[two_way], weight[two_way]
    row, col = pair // n, pair % n
    two = row != col
    ends = np.concatenate((row, col[two])), np.concatenate((col, row[two]))
    return sp.coo_array((np.concatenate((weight, weight[two])), ends), (n, n)).tocsr()


def threshold_graph(x: Tensor, threshold: float, *, metric: Metric = "cosine") -> Graph:
    """Graph that links every pair at least as similar, or at most as distant, as a threshold.

    cosine: pairs with s_ij >= threshold, weighing s_ij. euclidean: pairs with d_ij <= threshold, weighing 1.
    Computed in float64, 256 rows at a time; memory grows with the number of edges, which can reach n^2 / 2.

    Raises
    ------
    ValueError
        If x is not a finite (n, ...) tensor, the threshold is NaN, or the metric unknown.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> threshold_graph(x, 0.7)
    Graph(n=3, edges=1, undirected, threshold=0.7, metric=cosine)
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    if np.isnan(threshold):
        raise ValueError("threshold must be a number, got NaN")
    x = as_samples(x).double()
    if metric == "cosine":
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-8)
    row, col, weight = [], [], []
    for start in range(0, len(x), 256):
        s, linked = _linked(x, start, start + 256, threshold, metric)
        i, j = linked.nonzero(as_tuple=True)
        row.append(i + start)
        col.append(j)
        weight.append(s[i, j] if metric == "cosine" else torch.ones_like(s[i, j]))
    return Graph.from_edges(
        len(x),
        *(torch.cat(part).cpu().numpy() for part in (row, col, weight)),
        settings={"threshold": float(threshold), "metric": metric},
    )


def _linked(x: Tensor, start: int, stop: int, threshold: float, metric: Metric) -> tuple[Tensor, Tensor]:
    """Cosines, or distances, of some rows of x with all, and which of them are links to later rows: (r, n) twice.

    For cosines the rows of x have norm 1.
    """
    part = x[start:stop]
    if metric == "cosine":
        s = part @ x.T
        return s, (s >= threshold).triu(start + 1)
    s = torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist")
    return s, (s <= threshold).triu(start + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Communities of a graph: who belongs where, and how good the division is."""

    membership: Tensor
    """Community 0, 1, ... of each node, (n,), int64; the largest community is 0."""
    modularity: float
    """Modularity Q of the division, in [-1/2, 1); nan for a graph without weight."""
    resolution: float
    """The resolution gamma that was asked for."""
    seed: int
    """The seed that was used."""

    @property
    def num_communities(self) -> int:
        """Number of communities."""
        return int(self.membership.max()) + 1 if len(self.membership) else 0

    def __repr__(self) -> str:
        return (
            f"Partition(communities={self.num_communities}, modularity={self.modularity:.4f}, "
            f"resolution={self.resolution}, seed={self.seed})"
        )


def communities(graph: Graph, *, resolution: float = 1.0, seed: int = 0) -> Partition:
    """Communities that maximise modularity, by igraph's Leiden algorithm (10 iterations).

    Parameters
    ----------
    graph
        Undirected, weights >= 0.
    resolution
        gamma of the modularity; larger values give more, smaller communities.
    seed
        Seed of the search; Python's global random state, which igraph uses, is restored afterwards.

    Returns
    -------
    Partition
        Membership, modularity, and the settings. Isolated nodes are communities of their own.

    Raises
    ------
    ValueError
        If the graph is directed or has negative weights, or the resolution is negative or not finite.

    References
    ----------
    Traag, Waltman, van Eck, "From Louvain to Leiden", Scientific Reports 9, 5233 (2019).

    Examples
    --------
    >>> two_triangles = Graph.from_edges(6, [0, 0, 1, 3, 3, 4, 2], [1, 2, 2, 4, 5, 5, 3])
    >>> communities(two_triangles)
    Partition(communities=2, modularity=0.3571, resolution=1.0, seed=0)
    """
    if graph.directed:
        raise ValueError("communities needs an undirected graph: call graph.symmetrize() first")
    if (graph.adjacency.data < 0).any():
        raise ValueError("communities needs weights >= 0, got negative ones")
    if not 0 <= resolution < np.inf:
        raise ValueError(f"resolution must be a finite number >= 0, got {resolution}")
    converted = graph.to_igraph()
    with _seeded(seed):
        found = converted.community_leiden(
            objective_function="modularity", weights="weight", resolution=resolution, n_iterations=10
        )
    _, codes, sizes = np.unique(found.membership, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    quality = converted.modularity(found.membership, weights="weight", resolution=resolution)
    return Partition(
        membership=torch.from_numpy(rank[codes]), modularity=float(quality), resolution=resolution, seed=seed
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
