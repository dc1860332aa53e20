"""Triangle motifs by hand, against every triple of nodes and networkx, and as theorems."""

import math
import warnings
from itertools import combinations, permutations

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from repgraph import Graph, knn_graph
from repgraph.metrics.similarity import TriangleMotifs, motif_ratio, motif_ratio_chance, triangle_motifs

seeds = st.integers(0, 2**32 - 1)
COMPLETE = Graph.from_edges(5, *np.triu_indices(5, 1))


@st.composite
def labelled_graphs(draw):
    """An undirected graph of up to 10 nodes with weights of any sign, self loops too, and labels of up to 4 classes."""
    n = draw(st.integers(3, 10))
    rng = np.random.default_rng(draw(seeds))
    row, col = np.triu_indices(n)
    kept = rng.random(len(row)) < draw(st.sampled_from([0.3, 0.6, 1.0]))
    weight = rng.choice([1.0, 0.5, -2.0, 0.0], kept.sum())
    return Graph.from_edges(n, row[kept], col[kept], weight), rng.integers(4, size=n).tolist()


def by_triples(graph, labels):
    """Triangles with one, two and three distinct labels."""
    linked = graph.adjacency.toarray() != 0
    count = {1: 0, 2: 0, 3: 0}
    for a, b, c in combinations(range(graph.n), 3):
        if linked[a, b] and linked[b, c] and linked[a, c]:
            count[len({labels[a], labels[b], labels[c]})] += 1
    return tuple(count.values())


def features(seed, n=30, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator), generator


# By hand


def test_complete_graph():
    motifs = triangle_motifs(COMPLETE, [0, 0, 0, 1, 2])
    assert motifs == (1, 6, 3)
    assert (motifs.type1, motifs.type2, motifs.type3) == (1, 6, 3)
    assert isinstance(motifs, TriangleMotifs)
    assert all(type(count) is int for count in motifs)
    assert motif_ratio(COMPLETE, [0, 0, 0, 1, 2]) == 0.1


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0] * 5, (10, 0, 0)),
        (range(5), (0, 0, 10)),
        ([0, 0, 0, 0, 1], (4, 6, 0)),
        ([True, True, False, False, False], (1, 9, 0)),
        (["b", "a", "b", "c", "b"], (1, 6, 3)),
        (np.array([7, -1, 7, -1, 7]), (1, 9, 0)),
        (pd.Series([3, 3, 3, 5, 5], index=list("vwxyz")), (1, 9, 0)),
    ],
)
def test_complete_graph_with_other_labels(labels, expected):
    assert triangle_motifs(COMPLETE, labels) == expected
    assert motif_ratio(COMPLETE, labels) == pytest.approx(expected[0] / 10, abs=1e-15)


def test_example_of_the_authors():
    """Their 8 nodes with a self loop at node 5."""
    row = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6]
    col = [1, 5, 7, 2, 3, 4, 6, 7, 3, 5, 4, 6, 5, 6, 7, 5, 7, 7]
    assert triangle_motifs(Graph.from_edges(8, row, col), [1, 2, 1, 1, 2, 1, 2, 1]) == (2, 9, 0)


def test_weights_of_0_and_self_loops_do_not_count():
    graph = Graph.from_edges(4, [0, 0, 1, 1, 2, 0], [1, 2, 2, 3, 3, 0], [1.0, -1.0, 0.5, 0.0, 1.0, 9.0])
    assert triangle_motifs(graph, [0, 0, 0, 0]) == (1, 0, 0)


# Parity


@given(labelled_graphs())
def test_parity_with_every_triple(labelled):
    graph, labels = labelled
    assert triangle_motifs(graph, labels) == by_triples(graph, labels)


@given(seeds, st.integers(2, 12), st.sampled_from(["mean", "union", "mutual"]))
def test_parity_with_networkx_on_nearest_neighbors(seed, k, symmetrize):
    x, labels, _ = features(seed)
    graph = knn_graph(x, k, symmetrize=symmetrize)
    expected = by_triples(graph, labels.tolist())
    assert triangle_motifs(graph, labels) == expected
    plain = graph.to_networkx()
    assert sum(triangle_motifs(graph, labels)) == sum(nx.triangles(plain).values()) // 3
    within = plain.edge_subgraph((a, b) for a, b in plain.edges if labels[a] == labels[b])
    assert triangle_motifs(graph, labels).type1 == sum(nx.triangles(within).values()) // 3


# Theorems


@given(labelled_graphs(), seeds)
def test_joint_permutation_and_names_of_classes(labelled, seed):
    graph, labels = labelled
    order = np.random.default_rng(seed).permutation(graph.n)
    expected = triangle_motifs(graph, labels)
    assert triangle_motifs(graph.subgraph(order), [labels[i] for i in order]) == expected
    assert triangle_motifs(graph, [5 - 2 * label for label in labels]) == expected
    assert triangle_motifs(graph, ["wxyz"[label] for label in labels]) == expected


@given(labelled_graphs())
def test_the_ratio_is_the_share_of_type_1(labelled):
    graph, labels = labelled
    motifs = by_triples(graph, labels)
    assume(sum(motifs) > 0)
    assert motif_ratio(graph, labels) == motifs[0] / sum(motifs)
    assert motif_ratio(graph, [0] * graph.n) == 1
    assert motif_ratio(graph, range(graph.n)) == 0


@given(st.lists(st.integers(0, 2), min_size=3, max_size=6), seeds)
def test_chance_is_the_mean_over_all_permutations(labels, seed):
    n = len(labels)
    rng = np.random.default_rng(seed)
    row, col = np.triu_indices(n, 1)
    kept = rng.random(len(row)) < 0.8
    graph = Graph.from_edges(n, row[kept], col[kept])
    assume(sum(by_triples(graph, labels)) > 0)
    motifs = np.mean([by_triples(graph, order) for order in set(permutations(labels))], axis=0)
    assert motif_ratio_chance(labels) == pytest.approx(motifs[0] / motifs.sum(), abs=1e-12)
    complete = Graph.from_edges(n, row, col)
    assert motif_ratio(complete, labels) == pytest.approx(motif_ratio_chance(labels), abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 0, 0, 1, 2], 0.1), ([0] * 7, 1.0), (list("abc"), 0.0), (torch.arange(100) % 10, 10 * 720 / 970200)],
)
def test_chance(labels, expected):
    assert motif_ratio_chance(labels) == pytest.approx(expected, abs=1e-15)


def test_random_labels_are_near_chance():
    x, labels, _ = features(0, 300, 4)
    assert motif_ratio(knn_graph(x, 5), labels) == pytest.approx(motif_ratio_chance(labels), abs=0.03)


# Undefined


def test_no_triangle_is_undefined():
    path = Graph.from_edges(4, [0, 1, 2], [1, 2, 3])
    assert triangle_motifs(path, [0, 0, 0, 0]) == (0, 0, 0)
    with pytest.warns(UserWarning, match=r"has no triangle: its motif ratio is undefined \(nan\)") as caught:
        assert math.isnan(motif_ratio(path, [0, 0, 0, 0]))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert motif_ratio(COMPLETE, [0, 1, 2, 3, 4]) == 0
    assert triangle_motifs(Graph.from_edges(3, [], []), [0, 1, 2]) == (0, 0, 0)


# Bad input


@pytest.mark.parametrize(
    ("f", "arguments", "message"),
    [
        (f, arguments, message)
        for f in (triangle_motifs, motif_ratio)
        for arguments, message in [
            ((knn_graph(features(0)[0], 3, symmetrize="none"), [0] * 30), "needs an undirected graph: call graph.symm"),
            ((COMPLETE, [0, 1, 2]), "labels must have one entry per sample: expected 5, got 3"),
            ((COMPLETE, [0.5, 1, 2, 3, 4]), "labels must be all integers, all bools or all strings"),
            ((COMPLETE, torch.rand(5)), "labels must be integers, bools or strings, got torch.float32"),
            ((COMPLETE, torch.eye(5, dtype=torch.int64)), r"one class per sample, shape \(5,\), got shape \(5, 5\)"),
        ]
    ]
    + [
        (motif_ratio_chance, ([0, 1],), "labels must be those of at least 3 samples, got 2"),
        (motif_ratio_chance, ([],), "labels must be those of at least 3 samples, got 0"),
        (motif_ratio_chance, (torch.rand(5),), "labels must be integers, bools or strings"),
        (motif_ratio_chance, (torch.eye(5, dtype=torch.int64),), "labels must be one class per sample"),
    ],
)
def test_bad_input(f, arguments, message):
    with pytest.raises(ValueError, match=message):
        f(*arguments)
