"""Modularity by hand, against networkx, igraph and bctpy, and as theorems."""

import math
import warnings

import bct
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from repgraph import Graph, knn_graph, label_agreement, modularity, modularity_ceiling, modularity_null
from repgraph.metrics.modularity import _chance, _modularity

TRIANGLES = Graph.from_edges(6, [0, 0, 1, 3, 3, 4, 2], [1, 2, 2, 4, 5, 5, 3])
SIGNED_PATH = Graph.from_edges(4, [0, 1, 2], [1, 2, 3], [1, -0.5, 1])
ROWS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-5 / 13, 12 / 13]], dtype=torch.float64)
EMPTY = Graph.from_edges(4, [0], [1], [0.0])

seeds = st.integers(0, 2**32 - 1)


@st.composite
def labelled_graphs(draw, weights, self_loops=True):
    """A graph of up to 9 nodes with some weight, and labels of up to 4 classes."""
    n = draw(st.integers(2, 9))
    pairs = [(i, j) for i in range(n) for j in range(i if self_loops else i + 1, n)]
    edges = draw(st.lists(st.tuples(st.sampled_from(pairs), weights), min_size=1, unique_by=lambda edge: edge[0]))
    row, col = zip(*(pair for pair, _ in edges), strict=True)
    labels = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    return Graph.from_edges(n, row, col, [weight for _, weight in edges]), labels


positive = st.floats(0.01, 10)
resolutions = st.floats(0, 3)
graphs = labelled_graphs(positive)
signed_graphs = labelled_graphs(positive | st.floats(-10, -0.01), self_loops=False)


def networkx_modularity(graph, labels, resolution=1.0):
    sets = [{i for i, y in enumerate(labels) if y == c} for c in set(labels)]
    return nx.community.modularity(graph.to_networkx(), sets, resolution=resolution)


def features(seed, n=24, d=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator), generator


def layer_modularity(x, labels, **choices):
    return modularity(knn_graph(x, 3, **choices), labels, negative="signed")


# By hand


@pytest.mark.parametrize(
    ("labels", "resolution", "expected"),
    [
        ([0, 0, 0, 1, 1, 1], 1.0, 5 / 14),
        ([0, 0, 0, 1, 1, 1], 0.0, 0.857142857),
        ([0, 0, 0, 1, 1, 1], 0.5, 0.607142857),
        ([0, 0, 0, 1, 1, 1], 2.0, -0.142857143),
        ([0] * 6, 1.0, 0.0),
        (range(6), 1.0, -0.173469388),
    ],
)
def test_two_triangles(labels, resolution, expected):
    assert modularity(TRIANGLES, labels, resolution=resolution) == pytest.approx(expected, abs=1e-9)


def test_self_loops():
    graph = Graph.from_edges(3, [0, 0, 1, 2], [0, 1, 2, 2], [2, 1, 3, 0.5])
    assert modularity(graph, [0, 0, 1]) == pytest.approx(-6 / 169, abs=1e-12)
    dense = nx.from_numpy_array(np.array([[2, 1, 0], [1, 0, 3], [0, 3, 0.5]]))
    assert modularity(Graph.from_networkx(dense), [0, 0, 1]) == pytest.approx(-6 / 169, abs=1e-12)


@pytest.mark.parametrize(
    ("k", "how", "expected"),
    [(1, "mean", 8008 / 44521), (1, "union", 0.145958511), (1, "mutual", 0.0), (2, "mean", 0.083185565)],
)
def test_nearest_neighbours_of_four_rows(k, how, expected):
    assert modularity(knn_graph(ROWS, k, symmetrize=how), [0, 0, 1, 1]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("negative", "expected"), [("keep", 0.8333333333), ("signed", 0.5), ("clip", 0.5)])
def test_path_with_a_negative_edge(negative, expected):
    assert modularity(SIGNED_PATH, [0, 0, 1, 1], negative=negative) == pytest.approx(expected, abs=1e-9)


def test_clip_and_signed_differ_where_a_class_holds_a_negative_edge():
    labels = [0, 1, 1, 1]
    assert modularity(SIGNED_PATH, labels, negative="clip") == pytest.approx(1 / 2 - 10 / 16, abs=1e-12)
    assert modularity(SIGNED_PATH, labels, negative="signed") == pytest.approx((2 * (1 / 2 - 10 / 16)) / 2.5, abs=1e-12)


# Parity


@given(graphs, resolutions)
def test_parity_with_networkx_and_igraph(labelled, resolution):
    graph, labels = labelled
    q = modularity(graph, labels, resolution=resolution)
    assert q == pytest.approx(networkx_modularity(graph, labels, resolution), abs=1e-12)
    assert q == pytest.approx(graph.to_igraph().modularity(labels, weights="weight", resolution=resolution), abs=1e-12)


@given(signed_graphs)
def test_parity_with_bctpy_for_signed_weights(labelled):
    graph, labels = labelled
    dense = graph.adjacency.toarray()
    assume((dense < 0).any())
    assume((dense > 0).any())  # bctpy divides by the positive weight
    _, expected = bct.modularity_und_sign(dense, np.unique(labels, return_inverse=True)[1] + 1, qtype="gja")
    assert modularity(graph, labels, negative="signed") == pytest.approx(expected, abs=1e-12)


@given(signed_graphs, resolutions)
def test_keep_is_the_formula_of_networkx(labelled, resolution):
    graph, labels = labelled
    assume(abs(graph.degree.sum()) > 0.1)
    expected = networkx_modularity(graph, labels, resolution)
    assert modularity(graph, labels, resolution=resolution, negative="keep") == pytest.approx(
        expected, rel=1e-9, abs=1e-9
    )


@given(seeds)
@settings(max_examples=5)
def test_parity_with_a_dense_loop_on_relu_features_with_dead_rows(seed):
    """Row by row: the 3 most similar others, A, (A + A') / 2, networkx."""
    x, labels, _ = features(seed, n=120, d=10)
    x = (x - 0.5).relu()
    x[::9] = 0
    unit = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-8)
    s = (unit @ unit.T).numpy()
    a = np.zeros((120, 120))
    for i in range(120):
        others = sorted((j for j in range(120) if j != i), key=lambda j, i=i: -s[i, j])
        a[i, others[:3]] = s[i, others[:3]]
    dense = nx.from_numpy_array((a + a.T) / 2)
    expected = nx.community.modularity(dense, [set(np.flatnonzero(labels == c)) for c in range(3)])
    assert modularity(knn_graph(x, 3), labels) == pytest.approx(expected, abs=1e-12)


# Theorems


@given(graphs)
def test_bounds_and_ceiling(labelled):
    graph, labels = labelled
    q, ceiling = modularity(graph, labels), modularity_ceiling(graph, labels)
    assert -0.5 - 1e-12 <= q <= ceiling + 1e-12
    assert ceiling <= 1 - 1 / len(set(labels)) + 1e-12


@given(graphs, resolutions)
def test_agreement_minus_chance(labelled, resolution):
    graph, labels = labelled
    chance = 1 - modularity_ceiling(graph, labels)
    expected = label_agreement(graph, labels) - resolution * chance
    assert modularity(graph, labels, resolution=resolution) == pytest.approx(expected, abs=1e-12)
    assert 0 <= label_agreement(graph, labels) <= 1 + 1e-12


@given(graphs)
def test_all_ways_with_negative_weights_agree_where_there_are_none(labelled):
    graph, labels = labelled
    for negative in ("clip", "signed", "keep"):
        assert modularity(graph, labels, negative=negative) == pytest.approx(modularity(graph, labels), abs=1e-12)


@given(graphs)
def test_one_class_gives_0(labelled):
    graph, _ = labelled
    assert modularity(graph, [7] * graph.n) == pytest.approx(0, abs=1e-12)


@given(graphs, positive)
def test_scaled_weights_stored_zeros_and_isolated_nodes_change_nothing(labelled, factor):
    graph, labels = labelled
    row, col, weight = graph.edges()
    more = Graph.from_edges(
        graph.n + 2, [*row, 0, graph.n], [*col, graph.n, graph.n + 1], [*(factor * weight), 0.0, 0.0]
    )
    assert modularity(more, [*labels, 0, 9]) == pytest.approx(modularity(graph, labels), abs=1e-12)


@given(seeds)
@settings(max_examples=10)
def test_invariances_of_the_cosine_graph(seed):
    x, labels, generator = features(seed)
    order = torch.randperm(24, generator=generator)
    orthogonal = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    scale = torch.rand(24, 1, generator=generator, dtype=torch.float64) + 0.1
    names = ["z", "a", "m"]
    expected = pytest.approx(layer_modularity(x, labels), abs=1e-9)
    assert layer_modularity(x[order], labels[order]) == expected
    assert layer_modularity(x, [names[c] for c in labels]) == expected
    assert layer_modularity(x @ orthogonal, labels) == expected
    assert layer_modularity(1e4 * x, labels) == expected
    assert layer_modularity(scale * x, labels) == expected


def test_translation_changes_the_cosine_graph():
    x = torch.tensor([[1.0, 0.0], [4.0, 0.1], [0.0, 1.0], [0.1, 4.0]])
    labels = [0, 0, 1, 1]
    assert modularity(knn_graph(x, 1), labels) == pytest.approx(0.5, abs=1e-6)
    # Seen from (-10, -10) the first of each class are nearest: the path 1, 0, 2, 3 with weights 1/2, 1, 1/2.
    assert modularity(knn_graph(x + 10, 1), labels) == pytest.approx(0.0, abs=1e-2)


@given(seeds)
@settings(max_examples=10)
def test_invariances_of_the_euclidean_graph(seed):
    x, labels, generator = features(seed)
    orthogonal = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    expected = pytest.approx(layer_modularity(x, labels, metric="euclidean"), abs=1e-12)
    assert layer_modularity(x + 7, labels, metric="euclidean") == expected
    assert layer_modularity(3 * x @ orthogonal, labels, metric="euclidean") == expected


@given(seeds, st.integers(1, 6))
def test_directed_list_and_mean_of_both_directions_give_the_same(seed, k):
    x, labels, _ = features(seed)
    x = x.abs()
    row, col, weight = (torch.from_numpy(np.array(part)) for part in knn_graph(x, k, symmetrize="none").edges())
    directed = _modularity(labels[row.long()], labels[col.long()], weight, 3, 1.0)
    assert modularity(knn_graph(x, k), labels) == pytest.approx(directed.item(), abs=1e-12)


@given(seeds)
@settings(max_examples=5)
def test_labels_unrelated_to_the_features_give_about_0(seed):
    x, labels, _ = features(seed, n=500, d=30, classes=10)
    assert abs(layer_modularity(x.relu(), labels)) < 0.05


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_perfect_clusters_reach_the_ceiling(classes):
    x = torch.eye(classes).repeat(10, 1) + 1e-3 * features(0, 10 * classes, classes)[0].abs()
    labels = torch.arange(classes).repeat(10)
    graph = knn_graph(x, 3)
    assert modularity_ceiling(graph, labels) == pytest.approx(1 - 1 / classes, abs=1e-5)
    assert modularity(graph, labels) == pytest.approx(1 - 1 / classes, abs=1e-5)


@pytest.mark.parametrize("k", [5, 11])
def test_classes_smaller_than_k_must_link_to_others(k):
    centres = 100 * torch.eye(20, dtype=torch.float64)
    x = (centres[:, None] + features(0, n=100, d=20)[0].reshape(20, 5, 20)).reshape(100, 20)
    graph = knn_graph(x, k, metric="euclidean")
    assert label_agreement(graph, torch.arange(20).repeat_interleave(5)) == pytest.approx(4 / k, abs=1e-12)


# Null


def test_null_of_a_regular_graph():
    """For equal degrees and equal classes the mean over all permutations is -(1 - 1/C) / (n - 1)."""
    n, classes = 40, 4
    node = np.arange(n)
    graph = Graph.from_edges(n, np.tile(node, 2), np.concatenate(((node + 1) % n, (node + 5) % n)))
    null = modularity_null(graph, node % classes, permutations=1000)
    assert (null.shape, null.dtype) == ((1000,), torch.float64)
    error = (null.std() / 1000**0.5).item()
    assert null.mean().item() == pytest.approx(-(1 - 1 / classes) / (n - 1), abs=4 * error)
    assert error < 0.002


def test_null_of_a_layer_is_far_below_its_modularity():
    x, labels, _ = features(0, n=60)
    x += 5 * torch.eye(5, dtype=torch.float64)[labels]
    graph = knn_graph(x, 3)
    null = modularity_null(graph, labels, permutations=50)
    assert modularity(graph, labels) > null.max() + 0.3
    assert null.mean().abs() < 0.05


def test_null_depends_on_the_seed_alone():
    torch.manual_seed(1)
    one = modularity_null(TRIANGLES, [0, 0, 0, 1, 1, 1], seed=3)
    state = torch.get_rng_state()
    assert torch.equal(one, modularity_null(TRIANGLES, [0, 0, 0, 1, 1, 1], seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, modularity_null(TRIANGLES, [0, 0, 0, 1, 1, 1], seed=4))


def test_null_takes_weights_of_either_sign():
    assert modularity_null(SIGNED_PATH, [0, 0, 1, 1]).isfinite().all()


# Degenerate and bad input


def test_a_graph_without_weight_has_no_modularity():
    with pytest.warns(UserWarning, match="has no weight"):
        assert math.isnan(modularity(EMPTY, [0, 0, 1, 1]))
    with pytest.warns(UserWarning, match="has no weight"):
        assert math.isnan(modularity(EMPTY, [0, 0, 1, 1], negative="signed"))


def test_signed_needs_weight_of_only_one_sign():
    only_negative = Graph.from_edges(4, [0, 2], [1, 3], [-1, -1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert modularity(only_negative, [0, 0, 1, 1], negative="signed") == pytest.approx(-0.5, abs=1e-12)


def test_ceiling_counts_negative_weights_by_their_absolute_value():
    absolute = Graph.from_edges(4, [0, 1, 2], [1, 2, 3], [1, 0.5, 1])
    labels = [0, 0, 0, 1]
    assert modularity_ceiling(SIGNED_PATH, labels) == pytest.approx(modularity_ceiling(absolute, labels), abs=1e-12)


DIRECTED = knn_graph(ROWS, 1, symmetrize="none")


@pytest.mark.parametrize("f", [modularity, modularity_null, modularity_ceiling, label_agreement])
@pytest.mark.parametrize(
    ("graph", "labels", "message"),
    [
        (DIRECTED, [0, 0, 1, 1], "modularity needs an undirected graph: call graph.symmetrize"),
        (TRIANGLES, [0, 1], "labels must have one entry per sample: expected 6, got 2"),
        (TRIANGLES, torch.ones(6), "labels must be integers, bools or strings"),
        (TRIANGLES, torch.eye(6), "labels must be one class per sample"),
        (TRIANGLES, [0, 0, 0, 1, 1, None], "labels must be all integers"),
    ],
)
def test_bad_input(f, graph, labels, message):
    with pytest.raises(ValueError, match=message):
        f(graph, labels)


@pytest.mark.parametrize("f", [modularity, label_agreement])
def test_negative_weights_are_refused(f):
    with pytest.raises(ValueError, match="1 edges of negative weight"):
        f(SIGNED_PATH, [0, 0, 1, 1])


def test_unknown_choices():
    with pytest.raises(ValueError, match="negative must be 'raise', 'clip', 'signed' or 'keep', got 'drop'"):
        modularity(TRIANGLES, [0, 0, 0, 1, 1, 1], negative="drop")
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        modularity_null(TRIANGLES, [0, 0, 0, 1, 1, 1], permutations=0)


def test_kernels_stay_on_cuda():
    with FakeTensorMode():
        ends = torch.zeros(30, dtype=torch.int64, device="cuda")
        weight = torch.empty(30, dtype=torch.float64, device="cuda")
        for q in (_modularity(ends, ends, weight, 4, 1.0), _chance(ends, ends, weight, 4)):
            assert (q.device.type, q.shape) == ("cuda", ())
