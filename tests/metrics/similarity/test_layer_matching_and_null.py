"""Layer matching and the permutation null by hand and as theorems."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import related_layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repgraph import Graph, knn_graph
from repgraph.metrics.similarity import (
    cknna,
    gbs,
    gram,
    layer_matching_accuracy,
    layer_matching_chance,
    linear_cka,
    minibatch_cka,
    mutual_knn,
    procrustes,
    rbf_cka,
    rsa,
    rtd,
    similarity_null,
    svcca,
)

seeds = st.integers(0, 2**32 - 1)
layers = partial(related_layers.layers, noise=1.0)


def table(values, rows=None, columns=None):
    values = np.array(values, dtype=float)
    return pd.DataFrame(values, rows or list("abcdefgh"[: len(values)]), columns or list("ABCDEFGH"[: values.shape[1]]))


def stage(name):
    return name.split(".")[0]


# Layer matching


def test_accuracy_by_hand():
    assert layer_matching_accuracy(table([[0.9, 0.5], [0.8, 0.7]])) == 0.5
    assert layer_matching_accuracy(table([[0.9, 0.5], [0.8, 0.7]]), best="smallest") == 0.5
    assert layer_matching_accuracy(table([[0.9, 0.5], [0.7, 0.8]]), best="smallest") == 0
    assert layer_matching_accuracy(table([[0.1, 0.5, 0.2], [0.4, 0.3, 0.5], [0, -1, 2]])) == pytest.approx(1 / 3)
    assert layer_matching_accuracy(table(np.eye(4))) == 1
    assert layer_matching_chance(table(np.eye(4))) == 0.25


def test_a_distance_is_best_where_it_is_smallest():
    values = table([[0.1, 0.5], [0.8, 0.7]])
    values.attrs["distance"] = True
    assert layer_matching_accuracy(values) == 1
    assert layer_matching_accuracy(values, best="largest") == 0
    values.attrs["distance"] = False
    assert layer_matching_accuracy(values) == 0


def test_the_first_of_equal_entries_counts():
    assert layer_matching_accuracy(table(np.ones((3, 3)))) == pytest.approx(1 / 3)
    assert layer_matching_accuracy(table(np.ones((3, 3))), best="smallest") == pytest.approx(1 / 3)


def test_groups_by_hand():
    values = table([[1, 3, 2], [0, 1, 2]], ["a.0", "b.0"], ["a.0", "a.1", "b.7"])
    assert layer_matching_accuracy(values, group=stage) == 1
    assert layer_matching_accuracy(values, group=stage, best="smallest") == 0.5
    assert layer_matching_chance(values, group=stage) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert layer_matching_accuracy(values, group=lambda name: 0) == 1
    numbered = pd.DataFrame(np.eye(2), index=[10, 20], columns=[11, 12])
    assert layer_matching_accuracy(numbered, group=lambda name: name[0]) == 0.5


@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_accuracy_and_chance_against_loops(seed, rows, columns):
    rng = np.random.default_rng(seed)
    names = [[f"{rng.integers(3)}.{i}" for i in range(size)] for size in (rows, columns)]
    values = table(rng.random((rows, columns)), *names)
    best = [max(range(columns), key=lambda j: values.iloc[i, j]) for i in range(rows)]
    hits = [stage(names[0][i]) == stage(names[1][j]) for i, j in enumerate(best)]
    assert layer_matching_accuracy(values, group=stage) == pytest.approx(np.mean(hits))
    assert layer_matching_accuracy(-values, group=stage, best="smallest") == pytest.approx(np.mean(hits))
    pairs = [stage(a) == stage(b) for a in names[0] for b in names[1]]
    assert layer_matching_chance(values, group=stage) == pytest.approx(np.mean(pairs))


@given(seeds, st.integers(1, 6))
def test_square_tables(seed, size):
    rng = np.random.default_rng(seed)
    values = table(rng.random((size, size)))
    order = rng.permutation(size)
    accuracy = layer_matching_accuracy(values)
    assert accuracy == pytest.approx(np.mean(np.argmax(values, 1) == np.arange(size)))
    assert layer_matching_accuracy(values.iloc[order, order]) == pytest.approx(accuracy)
    assert layer_matching_accuracy(2 * values - 3) == pytest.approx(accuracy)
    assert layer_matching_chance(values) == pytest.approx(1 / size)


NAN = table([[1.0, 0.0], [math.nan, 1.0]])


@pytest.mark.parametrize(
    ("f", "values", "options", "message"),
    [
        (layer_matching_accuracy, NAN, {}, "table has a nan at 'b', 'A': leave that layer out"),
        (layer_matching_accuracy, NAN, {"best": "highest"}, "best must be 'largest' or 'smallest', got 'highest'"),
        (layer_matching_accuracy, table(np.ones((2, 3))), {}, "square, or group= given, got 2 x 3 layers"),
        (layer_matching_chance, table(np.ones((3, 2))), {}, "square, or group= given, got 3 x 2 layers"),
        (layer_matching_chance, pd.DataFrame(), {}, "table must have at least one layer on each side"),
    ],
)
def test_tables_that_do_not_fit(f, values, options, message):
    with pytest.raises(ValueError, match=message):
        f(values, **options)


# Null


MEASURES = [
    (gbs, {"k": 3}),
    (mutual_knn, {"k": 3}),
    (cknna, {"k": 5}),
    (linear_cka, {"unbiased": True}),
    (rbf_cka, {"bandwidth": 0.5}),
    (minibatch_cka, {"batch_size": 8}),
    (procrustes, {"kind": "ding"}),
    (rsa, {"rdm": "cosine"}),
    (svcca, {"variance": 0.9}),
    (rtd, {"size": 12, "subsamples": 2}),
]


@pytest.mark.parametrize(("f", "options"), MEASURES)
def test_the_null_shuffles_the_samples_of_the_second_layer(f, options):
    x, y, _ = layers(0)
    null = similarity_null(f, x, y, permutations=3, seed=5, **options)
    generator = torch.Generator().manual_seed(5)
    expected = [f(x, y[torch.randperm(24, generator=generator)], **options) for _ in range(3)]
    assert (null.shape, null.dtype, null.device.type) == ((3,), torch.float64, "cpu")
    assert null.tolist() == expected


@given(seeds)
@settings(max_examples=8)
def test_seeds(seed):
    x, y, _ = layers(0)
    null = similarity_null(linear_cka, x, y, permutations=4, seed=seed)
    assert torch.equal(similarity_null(linear_cka, x, y, permutations=4, seed=seed), null)
    assert torch.equal(similarity_null(linear_cka, x, y, permutations=2, seed=seed), null[:2])
    assert not torch.equal(similarity_null(linear_cka, x, y, permutations=4, seed=seed + 1), null)


def test_the_global_random_state_is_left_alone():
    x, y, _ = layers(0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    similarity_null(linear_cka, x, y)
    assert torch.equal(torch.get_rng_state(), before)


@given(seeds)
@settings(max_examples=8)
def test_graphs_and_gram_matrices_in_place_of_features(seed):
    x, y, _ = layers(seed)
    for f in (linear_cka, rsa, procrustes):
        expected = similarity_null(f, x, y, permutations=2, seed=seed)
        torch.testing.assert_close(similarity_null(f, gram(x), gram(y), permutations=2, seed=seed), expected)
    expected = similarity_null(gbs, x, y, k=3, permutations=2, seed=seed)
    a, b = (knn_graph(z, 3) for z in (x, y))
    torch.testing.assert_close(similarity_null(gbs, a, b, permutations=2, seed=seed), expected)
    expected = similarity_null(mutual_knn, x, y, k=3, permutations=2, seed=seed)
    a, b = (knn_graph(z, 3, symmetrize="none") for z in (x, y))
    torch.testing.assert_close(similarity_null(mutual_knn, a, b, permutations=2, seed=seed), expected)


def test_a_function_of_the_user():
    x = torch.arange(6.0)[:, None]
    null = similarity_null(lambda a, b, power: float((a * b).sum() ** power), x, x, permutations=30, power=1)
    assert null.max() <= 55
    assert null.min() >= 20
    edges = similarity_null(lambda a, b: b.num_edges, x, Graph.from_edges(6, [0, 1], [1, 2]), permutations=3)
    assert edges.tolist() == [2, 2, 2]


def test_unrelated_layers_are_within_their_null():
    x, y = torch.randn(2, 100, 6, generator=torch.Generator().manual_seed(0))
    null = similarity_null(mutual_knn, x, y, k=10, permutations=40)
    assert null.mean().item() == pytest.approx(10 / 99, abs=0.01)
    assert null.min() <= mutual_knn(x, y, 10) <= null.max()
    assert mutual_knn(x, x, 10) > null.max()


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.ones(4, 2), torch.ones(4, 2), {"permutations": 0}, "permutations must be at least 1, got 0"),
        (torch.ones(4, 2), [1, 2, 3, 4], {}, "samples of a list cannot be permuted"),
        (torch.ones(4, 2), torch.ones(5, 2), {}, "x and y must be over the same samples, got 4 and 5"),
        (torch.ones(4, 2), torch.full((4, 2), math.nan), {}, "^y must be finite"),
    ],
)
def test_bad_input(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        similarity_null(linear_cka, x, y, **options)
