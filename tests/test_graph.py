"""The graph container, its builders and its communities."""

import random
from dataclasses import FrozenInstanceError
from itertools import pairwise

import igraph
import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.spatial.distance import cdist
from torch._subclasses import FakeTensorMode

from repgraph import Graph, Partition, communities, knn_graph, modularity, threshold_graph
from repgraph.graph import _linked
from repgraph.neighbors import largest

ROWS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-5 / 13, 12 / 13]], dtype=torch.float64)


def triangles():
    return Graph.from_edges(6, [0, 0, 1, 3, 3, 4, 2], [1, 2, 2, 4, 5, 5, 3])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def graphs(draw, directed=None):
    """Up to 8 nodes, weights of both signs, stored zeros, self loops, isolated nodes."""
    n = draw(st.integers(1, 8))
    directed = draw(st.booleans()) if directed is None else directed
    pairs = [(i, j) for i in range(n) for j in range(n) if directed or i <= j]
    weights = st.floats(-10, 10, width=16) | st.just(0.0)
    edges = draw(st.lists(st.tuples(st.sampled_from(pairs), weights), unique_by=lambda edge: edge[0]))
    row, col = [pair[0] for pair, _ in edges], [pair[1] for pair, _ in edges]
    return Graph.from_edges(n, row, col, [weight for _, weight in edges], directed=directed)


def assert_same(one, other):
    """The same numbers in the same slots."""
    assert one.directed == other.directed
    assert one.adjacency.shape == other.adjacency.shape
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(one.adjacency, part), getattr(other.adjacency, part))


# The container


@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_arrays_are_read_only(part):
    graph = triangles()
    with pytest.raises(ValueError, match="read-only"):
        getattr(graph.adjacency, part)[0] = 5
    assert_same(graph, triangles())


@pytest.mark.filterwarnings("ignore:Changing the sparsity structure")
@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 5)])
def test_entries_cannot_be_assigned(i, j):
    graph = triangles()
    with pytest.raises(ValueError, match="read-only"):
        graph.adjacency[i, j] = 5
    assert_same(graph, triangles())


def test_fields_cannot_be_assigned():
    graph = triangles()
    for name in ("adjacency", "directed", "settings"):
        with pytest.raises(FrozenInstanceError):
            setattr(graph, name, None)


def test_settings_cannot_be_changed():
    given_settings = {"k": 3}
    graph = Graph.from_edges(2, [0], [1], settings=given_settings)
    given_settings["k"] = 4
    assert graph.settings["k"] == 3
    with pytest.raises(TypeError):
        graph.settings["k"] = 5


def test_the_given_array_is_copied_and_left_alone():
    a = sp.csr_array(np.array([[0.0, 2.0], [2.0, 0.0]]))
    graph = Graph(a)
    a.data[:] = 9
    assert graph.adjacency.data.tolist() == [2, 2]


def test_to_scipy_gives_a_copy():
    graph = triangles()
    graph.to_scipy().data[:] = 9
    assert_same(graph, triangles())


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csc_array, sp.coo_array, sp.csr_matrix, sp.lil_array])
def test_any_sparse_kind_and_number_type_is_accepted(kind):
    dense = np.array([[0, 3, 1], [3, 0, 0], [1, 0, 2]])
    graph = Graph(kind(dense))
    assert isinstance(graph.adjacency, sp.csr_array)
    assert graph.adjacency.dtype == np.float64
    np.testing.assert_array_equal(graph.adjacency.toarray(), dense)


def test_unsorted_and_repeated_entries_are_put_in_order():
    a = sp.csr_array((np.array([1.0, 2.0, 3.0]), np.array([2, 1, 2]), np.array([0, 3, 3, 3])), (3, 3))
    graph = Graph(a, directed=True)
    assert graph.adjacency.indices.tolist() == [1, 2]
    assert graph.adjacency.data.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("adjacency", "message"),
    [
        (sp.csr_array(np.ones((2, 3))), r"adjacency must be a square SciPy sparse array, got shape \(2, 3\)"),
        (np.eye(2), r"adjacency must be a square SciPy sparse array, got shape \(2, 2\)"),
        ([[0, 1], [1, 0]], "adjacency must be a square SciPy sparse array, got list"),
        (sp.csr_array(np.array([[0, np.nan], [np.nan, 0]])), "adjacency must be finite"),
        (sp.csr_array(np.array([[0, np.inf], [np.inf, 0]])), "adjacency must be finite"),
        (sp.csr_array(np.array([[0, 1], [0, 0]])), "adjacency must be symmetric.* pass directed=True"),
        (sp.csr_array(np.array([[0, 1.0], [1.0 + 1e-15, 0]])), "adjacency must be symmetric"),
        (sp.csr_array(np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])), "adjacency must be symmetric"),
    ],
)
def test_bad_adjacency(adjacency, message):
    with pytest.raises(ValueError, match=message):
        Graph(adjacency)


def test_stored_zeros_are_kept_and_not_counted():
    graph = Graph.from_edges(4, [0, 1, 3], [1, 2, 3], [0.0, 5.0, 0.0])
    assert graph.adjacency.nnz == 5
    assert graph.num_edges == 1
    assert graph.isolated.tolist() == [0, 3]
    assert [part.tolist() for part in graph.edges()] == [[0, 1, 3], [1, 2, 3], [0, 5, 0]]


@given(graphs())
def test_degree_edges_and_isolated_agree_with_networkx(graph):
    other = graph.to_networkx()
    degrees = dict(other.degree(weight="weight"))
    np.testing.assert_allclose(graph.degree, [degrees[i] for i in range(graph.n)], atol=1e-12)
    other.remove_edges_from([(u, v) for u, v, w in other.edges(data="weight") if w == 0])
    assert graph.num_edges == other.number_of_edges()
    assert graph.isolated.tolist() == list(nx.isolates(other))


@given(graphs(), st.data())
def test_subgraph_is_the_part_of_the_dense_matrix(graph, data):
    nodes = data.draw(st.permutations(range(graph.n)))[: data.draw(st.integers(0, graph.n))]
    part = graph.subgraph(nodes)
    assert part.directed == graph.directed
    np.testing.assert_array_equal(part.adjacency.toarray(), graph.adjacency.toarray()[np.ix_(nodes, nodes)])


def test_subgraph_takes_masks_and_tensors_and_keeps_the_settings():
    graph = knn_graph(ROWS, 2)
    expected = graph.subgraph([1, 3])
    assert_same(graph.subgraph(np.array([False, True, False, True])), expected)
    assert_same(graph.subgraph(torch.tensor([1, 3])), expected)
    assert expected.settings == graph.settings


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([0, 6], r"nodes must lie in 0\.\.5, got 0\.\.6"),
        ([-1], r"nodes must lie in 0\.\.5, got -1\.\.-1"),
        ([1, 2, 1], "nodes must be distinct"),
        ([True, False], "nodes"),
        ([0.5, 1.5], "nodes"),
    ],
)
def test_bad_nodes(nodes, message):
    with pytest.raises(ValueError, match=message):
        triangles().subgraph(nodes)


@pytest.mark.parametrize(
    ("row", "col", "weight", "message"),
    [
        ([0, 1], [1], None, "row, col and weight must have equal length, got 2, 1 and 2"),
        ([0], [1], [1, 2], "row, col and weight must have equal length, got 1, 1 and 2"),
        ([0], [3], None, r"edges must join nodes 0\.\.2"),
        ([-1], [1], None, r"edges must join nodes 0\.\.2"),
        ([0], [1], [np.nan], "adjacency must be finite"),
    ],
)
def test_bad_edges(row, col, weight, message):
    with pytest.raises(ValueError, match=message):
        Graph.from_edges(3, row, col, weight)


def test_repeated_edges_add_up_in_either_direction():
    graph = Graph.from_edges(3, [0, 1, 2], [1, 0, 2], [1, 2, 5])
    assert graph.adjacency.toarray().tolist() == [[0, 3, 0], [3, 0, 0], [0, 0, 5]]
    directed = Graph.from_edges(3, [0, 1], [1, 0], [1, 2], directed=True)
    assert directed.adjacency.toarray().tolist() == [[0, 1, 0], [2, 0, 0], [0, 0, 0]]


def test_repr():
    assert repr(triangles()) == "Graph(n=6, edges=7, undirected)"
    assert repr(knn_graph(ROWS, 1)) == "Graph(n=4, edges=3, undirected, k=1, metric=cosine, symmetrize=mean)"
    assert repr(knn_graph(ROWS, 1, symmetrize="none")).startswith("Graph(n=4, edges=4, directed, k=1")


def test_html_shows_the_numbers_and_the_settings_escaped():
    graph = Graph.from_edges(4, [0, 1], [1, 2], [0.25, -2.5], settings={"layer": "<stem>"})
    html = graph._repr_html_()
    for name, value in {
        "nodes": "4",
        "edges": "2, undirected",
        "isolated nodes": "1",
        "weights": "-2.5 to 0.25",
        "layer": "&lt;stem&gt;",
    }.items():
        assert f"<tr><th>{name}</th><td>{value}</td></tr>" in html
    assert "<td>none</td>" in Graph.from_edges(1, [], [])._repr_html_()


# To other libraries and back


@given(graphs())
def test_round_trips(graph):
    assert_same(Graph.from_networkx(graph.to_networkx()), graph)
    assert_same(Graph.from_igraph(graph.to_igraph()), graph)
    assert_same(Graph.from_scipy(graph.to_scipy(), directed=graph.directed), graph)


@given(graphs())
def test_round_trip_through_a_file(tmp_path_factory, graph):
    settings = {"k": 3, "metric": "cosine", "threshold": 0.5, "layers": ["a", "b"], "note": None}
    path = tmp_path_factory.mktemp("graphs") / "graph.safetensors"
    Graph(graph.adjacency, graph.directed, settings).save(path)
    loaded = Graph.load(str(path))
    assert_same(loaded, graph)
    assert loaded.settings == settings
    with pytest.raises(ValueError, match="read-only"):
        loaded.adjacency.indptr[0] = 1


def test_from_networkx_numbers_nodes_in_their_order():
    other = nx.Graph([("b", "a"), ("a", "c")])
    other.add_edge("a", "c", weight=3.0)
    graph = Graph.from_networkx(other)
    assert graph.adjacency.toarray().tolist() == [[0, 1, 0], [1, 0, 3], [0, 3, 0]]


def test_other_weight_attributes_and_missing_ones():
    other = igraph.Graph(3, [(0, 1), (1, 2)])
    assert Graph.from_igraph(other).adjacency.data.tolist() == [1, 1, 1, 1]
    other.es["strength"] = [2.0, 3.0]
    assert Graph.from_igraph(other, weight="strength").degree.tolist() == [2, 5, 3]
    assert Graph.from_networkx(nx.Graph([(0, 1, {"strength": 2})]), weight="strength").degree.tolist() == [2, 2]


TENSORS = {"data": torch.ones(2), "indices": torch.zeros(2).int(), "indptr": torch.zeros(2).int()}


@pytest.mark.parametrize(
    "metadata",
    [None, {"other": "1"}, {"repgraph.graph": "no JSON"}, {"repgraph.graph": "{}"}],
    ids=["none", "another format", "no JSON", "empty"],
)
def test_load_refuses_other_safetensors_files(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "other.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"other\.safetensors is not a graph saved by repgraph"):
        Graph.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("content", ["", "a text", "x" * 1000])
def test_load_refuses_other_files(tmp_path, content):
    (tmp_path / "notes.txt").write_text(content)
    with pytest.raises(ValueError, match=r"notes\.txt is not a graph saved by repgraph"):
        Graph.load(tmp_path / "notes.txt")


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Graph.load(tmp_path / "missing")


# Symmetrisation and the nearest-neighbour graph


def test_nearest_neighbours_of_four_rows():
    expected = np.zeros((4, 4))
    expected[[0, 1, 2], [1, 2, 3]] = 0.3, 0.4, 12 / 13
    graph = knn_graph(ROWS, 1)
    np.testing.assert_allclose(graph.adjacency.toarray(), expected + expected.T, atol=1e-12)
    union = knn_graph(ROWS, 1, symmetrize="union")
    np.testing.assert_allclose(union.edges()[2], [0.6, 0.8, 12 / 13], atol=1e-12)
    mutual = knn_graph(ROWS, 1, symmetrize="mutual")
    assert [part.tolist() for part in mutual.edges()[:2]] == [[2], [3]]
    directed = knn_graph(ROWS, 1, symmetrize="none")
    assert directed.edges()[1].tolist() == [1, 2, 3, 2]


def test_ways_to_symmetrize_go_by_the_presence_of_edges():
    """0 and 1 differ in their weights, 1 -> 2 and 2 -> 3 are one-way, one of them negative, 3 has a loop."""
    one_way = Graph.from_edges(5, [0, 1, 1, 2, 3], [1, 0, 2, 3, 3], [1.0, 3.0, -0.5, 0.8, 2.0], directed=True)
    expected = {
        "mean": {(0, 1): 2.0, (1, 2): -0.25, (2, 3): 0.4, (3, 3): 2.0},
        "union": {(0, 1): 3.0, (1, 2): -0.5, (2, 3): 0.8, (3, 3): 2.0},
        "mutual": {(0, 1): 1.0, (3, 3): 2.0},
    }
    for how, edges in expected.items():
        row, col, weight = one_way.symmetrize(how).edges()
        assert dict(zip(zip(row, col, strict=True), weight, strict=True)) == edges


@given(graphs(directed=True))
def test_symmetrize_against_dense_matrices(graph):
    a = graph.adjacency.toarray()
    here = np.zeros(a.shape, dtype=bool)
    here[graph.edges()[:2]] = True
    largest = np.maximum(np.where(here, a, -np.inf), np.where(here, a, -np.inf).T)
    union = np.where(here | here.T, largest, 0)
    mutual = np.where(here & here.T, np.minimum(a, a.T), 0)
    for how, dense, nnz in (
        ("mean", (a + a.T) / 2, (here | here.T).sum()),
        ("union", union, (here | here.T).sum()),
        ("mutual", mutual, (here & here.T).sum()),
    ):
        result = graph.symmetrize(how)
        np.testing.assert_array_equal(result.adjacency.toarray(), dense)
        assert result.adjacency.nnz == nnz
        assert result.settings == {"symmetrize": how}


def test_symmetrize_refuses_undirected_graphs_and_unknown_ways():
    with pytest.raises(ValueError, match="symmetrize needs a directed graph"):
        triangles().symmetrize()
    with pytest.raises(ValueError, match="how must be 'mean', 'union' or 'mutual', got 'max'"):
        knn_graph(ROWS, 1, symmetrize="none").symmetrize("max")


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from(["cosine", "euclidean"]))
def test_knn_graph_is_the_symmetrised_directed_graph(seed, k, metric):
    x = normal(10, 4, seed=seed)
    directed = knn_graph(x, k, metric=metric, symmetrize="none")
    assert np.diff(directed.adjacency.indptr).tolist() == [k] * 10
    assert not directed.adjacency.diagonal().any()
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    row, col, weight = directed.edges()
    np.testing.assert_allclose(weight, s.numpy()[row, col] if metric == "cosine" else np.ones(10 * k), atol=1e-12)
    for how in ("mean", "union", "mutual"):
        graph = knn_graph(x, k, metric=metric, symmetrize=how)
        assert_same(graph, directed.symmetrize(how))
        assert graph.settings == {"k": k, "metric": metric, "symmetrize": how}


def test_a_zero_row_keeps_k_slots_of_weight_0():
    x = normal(8, 3)
    x[5] = 0
    graph = knn_graph(x, 3, symmetrize="none")
    assert graph.edges()[1][15:18].tolist() == [0, 1, 2]
    assert graph.edges()[2][15:18].tolist() == [0, 0, 0]
    assert np.diff(graph.adjacency.indptr).tolist() == [3] * 8


def test_precomputed_similarities_by_hand():
    s = torch.tensor([[9.0, 1, 1, 0], [3, 9, 2, 3], [0, 0, 9, 0], [-1, -2, -3, 9]])
    graph = knn_graph(s, 2, metric="precomputed", symmetrize="none")
    assert graph.edges()[1].tolist() == [1, 2, 0, 3, 0, 1, 0, 1]
    assert graph.edges()[2].tolist() == [1, 1, 3, 3, 0, 0, -1, -2]
    assert graph.settings == {"k": 2, "metric": "precomputed", "symmetrize": "none"}
    assert s.diagonal().tolist() == [9] * 4


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 29), st.integers(1, 3))
def test_precomputed_similarities_against_a_stable_sort(seed, n, k, high):
    k = min(k, n - 1)
    s = torch.randint(-high, high + 1, (n, n), generator=torch.Generator().manual_seed(seed)).double()
    values, indices = largest(s, k)
    s.fill_diagonal_(-torch.inf)
    expected = np.argsort(-s.numpy(), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices.numpy(), expected)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(s.numpy(), expected, 1))


def test_precomputed_cosines_make_the_graph_of_the_features():
    x = normal(3000, 8)  # more rows than are looked at together
    z = torch.nn.functional.normalize(x)
    for how in ("mean", "mutual"):
        graph = knn_graph(z @ z.T, 4, metric="precomputed", symmetrize=how)
        difference = graph.adjacency - knn_graph(x, 4, symmetrize=how).adjacency
        assert abs(difference).max() < 1e-12


@pytest.mark.parametrize(
    ("x", "choices", "message"),
    [
        (ROWS, {"metric": "precomputed"}, r"precomputed similarities must have shape \(n, n\), got \(4, 2\)"),
        (torch.ones(3, 3) / 0, {"metric": "precomputed", "k": 1}, "x must be finite"),
        (torch.ones(3, 3), {"metric": "precomputed"}, "k must be an integer with 1 <= k < n, got k = 3"),
        (ROWS, {"symmetrize": "max"}, "symmetrize must be 'mean', 'union', 'mutual' or 'none', got 'max'"),
        (ROWS, {"metric": "dot"}, "metric must be"),
        (ROWS, {"k": 4}, "k must be an integer with 1 <= k < n, got k = 4 with n = 4"),
        (ROWS[0], {}, "x must have shape"),
        (ROWS / 0, {}, "x must be finite"),
    ],
)
def test_knn_graph_bad_input(x, choices, message):
    with pytest.raises(ValueError, match=message):
        knn_graph(x, **choices)


@pytest.mark.parametrize(
    ("n", "metric", "threshold"), [(300, "cosine", 0.4), (300, "euclidean", 2.0), (7, "cosine", -1)]
)
def test_threshold_graph_against_all_pairs(n, metric, threshold):
    x = normal(n, 6)
    graph = threshold_graph(x.reshape(n, 2, 3), threshold, metric=metric)
    distance = cdist(x, x, metric)
    dense = np.where(distance <= threshold, 1.0, 0.0) if metric == "euclidean" else 1 - distance
    dense = np.where(dense >= (threshold if metric == "cosine" else 1), dense, 0.0)
    np.fill_diagonal(dense, 0)
    np.testing.assert_allclose(graph.adjacency.toarray(), dense, atol=1e-12)
    assert graph.num_edges > 0
    assert graph.settings == {"threshold": threshold, "metric": metric}


def test_threshold_graph_includes_the_threshold_itself_and_may_be_empty():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    assert threshold_graph(x, 5.0, metric="euclidean").num_edges == 2
    assert threshold_graph(x, 4.9, metric="euclidean").num_edges == 0
    assert threshold_graph(x, 0.0).adjacency.nnz == 6  # the zero row is linked with weight 0


@pytest.mark.parametrize(
    ("x", "threshold", "metric", "message"),
    [
        (ROWS, float("nan"), "cosine", "threshold must be a number, got NaN"),
        (ROWS, 0.5, "dot", "metric must be 'cosine' or 'euclidean', got 'dot'"),
        (ROWS[0], 0.5, "cosine", "x must have shape"),
        (ROWS / 0, 0.5, "cosine", "x must be finite"),
    ],
)
def test_threshold_graph_bad_input(x, threshold, metric, message):
    with pytest.raises(ValueError, match=message):
        threshold_graph(x, threshold, metric=metric)


# Communities


def cliques(*sizes):
    """Cliques of the given sizes, each joined to the next by one edge."""
    start = np.concatenate(([0], np.cumsum(sizes)))
    inside = [(i, j) for a, b in pairwise(start) for i in range(a, b) for j in range(i + 1, b)]
    row, col = zip(*inside, *((a - 1, a) for a in start[1:-1]), strict=True)
    return Graph.from_edges(start[-1], row, col)


def test_communities_of_cliques_are_the_cliques_by_falling_size():
    found = communities(cliques(3, 6, 4, 5))
    assert found.membership.tolist() == [3] * 3 + [0] * 6 + [2] * 4 + [1] * 5
    assert found.membership.dtype == torch.int64
    assert found.num_communities == 4


@given(st.integers(0, 1000), st.floats(0.2, 3))
def test_communities_report_their_own_modularity(seed, resolution):
    graph = knn_graph(normal(30, 4, seed=seed).abs(), 3)
    found = communities(graph, resolution=resolution, seed=seed)
    assert found.modularity == pytest.approx(modularity(graph, found.membership, resolution=resolution), abs=1e-12)
    assert (found.resolution, found.seed) == (resolution, seed)
    sizes = found.membership.bincount()
    assert (sizes[:-1] >= sizes[1:]).all()
    assert found.modularity >= modularity(graph, torch.arange(30), resolution=resolution)
    again = communities(graph, resolution=resolution, seed=seed)
    assert torch.equal(again.membership, found.membership)


def test_communities_use_their_seed_and_leave_the_random_states_alone():
    graph = knn_graph(normal(200, 3), 10, symmetrize="union")
    graph = Graph.from_edges(200, *graph.edges()[:2])
    random.seed(5)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    found = [communities(graph, seed=seed).membership for seed in range(8)]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert any(not torch.equal(found[0], other) for other in found[1:])
    random.seed(6)
    assert torch.equal(communities(graph, seed=3).membership, found[3])


def test_isolated_nodes_are_communities_of_their_own():
    graph = Graph.from_edges(5, [0, 1], [1, 2])
    assert communities(graph).membership.tolist() == [0, 0, 0, 1, 2]


def test_communities_without_weight():
    found = communities(Graph.from_edges(3, [0], [1], [0.0]))
    assert np.isnan(found.modularity)
    assert communities(Graph.from_edges(0, [], [])).num_communities == 0


def test_partition_repr():
    assert repr(communities(triangles(), seed=4)) == (
        "Partition(communities=2, modularity=0.3571, resolution=1.0, seed=4)"
    )
    with pytest.raises(FrozenInstanceError):
        communities(triangles()).seed = 1
    with pytest.raises(TypeError):
        Partition(torch.zeros(2), 0.0, 1.0, 0)


def test_communities_refuse_directed_graphs_and_negative_weights():
    state = random.getstate()
    with pytest.raises(ValueError, match="communities needs an undirected graph: call"):
        communities(knn_graph(ROWS, 1, symmetrize="none"))
    with pytest.raises(ValueError, match="communities needs weights >= 0"):
        communities(Graph.from_edges(3, [0, 1], [1, 2], [1, -1]))
    assert random.getstate() == state


def test_random_state_is_restored_after_an_exception():
    state = random.getstate()
    with pytest.raises((ValueError, igraph.InternalError)):
        communities(triangles(), resolution=-1.0)
    assert random.getstate() == state


# Layout


def test_layout_is_seeded_and_leaves_the_random_states_alone():
    graph = cliques(5, 5, 5)
    random.seed(5)
    state = random.getstate()
    places = graph.layout(seed=1)
    assert random.getstate() == state
    assert places.shape == (15, 2)
    assert np.abs(places).max() <= 1.15
    np.testing.assert_array_equal(graph.layout(seed=1), places)
    assert not np.array_equal(graph.layout(seed=2), places)


def test_layout_puts_neighbours_together():
    clique = np.repeat(range(3), 5)
    distance = cdist(*[cliques(5, 5, 5).layout()] * 2)
    same = clique[:, None] == clique
    assert distance[same].mean() < 0.5 * distance[~same].mean()


def test_layout_from_a_start_stays_near_it():
    graph = cliques(5, 5, 5)
    start = graph.layout(seed=3)
    moved = graph.layout(start=start)
    assert np.abs(moved - start).mean() < 0.3
    assert np.corrcoef(moved[:, 0], start[:, 0])[0, 1] > 0.9


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_layout_of_graphs_without_edges(n):
    places = Graph.from_edges(n, [], []).layout()
    assert places.shape == (n, 2)
    assert np.isfinite(places).all()


def test_layout_takes_negative_and_directed_edges():
    for graph in (knn_graph(ROWS, 3), knn_graph(ROWS, 2, symmetrize="none")):
        assert np.isfinite(graph.layout()).all()


def test_layout_refuses_a_start_of_another_shape():
    with pytest.raises(ValueError, match=r"start must have shape \(6, 2\), got \(6, 3\)"):
        triangles().layout(start=np.zeros((6, 3)))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_kernel_of_the_threshold_graph_stays_on_cuda(metric):
    with FakeTensorMode():
        similarities, linked = _linked(torch.empty(40, 6, device="cuda"), 8, 24, 0.5, metric)
        assert (similarities.device.type, similarities.shape) == ("cuda", (16, 40))
        assert (linked.device.type, linked.shape, linked.dtype) == ("cuda", (16, 40), torch.bool)


def test_screening_makes_no_other_graph():
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    one, other = (knn_graph(x, 4, screening=how).adjacency for how in ("float32", "bfloat16"))
    assert (one != other).nnz == 0
