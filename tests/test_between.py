"""Layer x layer tables: every entry is the measure of its pair, each layer is read once, unpaired samples refused."""

import copy
import math
import warnings
from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from small_networks import Deeper, N, Net, X, by_pairs, take
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader, TensorDataset

from repgraph import Activations, between_layers, between_layers_null, compare_layers, knn_graph
from repgraph.metrics.similarity import cknna, gbs, gram, linear_cka, minibatch_cka, mutual_knn, procrustes


def related(seed=0, n=N):
    """Layers of several shapes; neighbouring ones share a part."""
    generator = torch.Generator().manual_seed(seed)
    stem = torch.randn(n, 3, 2, 2, generator=generator)
    body = stem.flatten(1) @ torch.randn(12, 7, generator=generator) + torch.randn(n, 7, generator=generator)
    return {"stem": stem, "body": body, "a head": body[:, :4] + torch.randn(n, 4, generator=generator)}


A = related()
B = {"z": A["body"] * 2 + related(1)["body"], "b": related(2)["stem"]}


def table(similarity, *layers, **options):
    return between_layers(similarity, *layers, progress=False, **options)


def null(similarity, *layers, **options):
    return between_layers_null(similarity, *layers, progress=False, **options)


def norm_ratio(x, y, *, power=1):
    return float(x.norm() / y.norm()) ** power


MEASURES = {
    "gbs": (gbs, {"k": 4, "symmetrize": "union"}),
    "gbs unweighted": (gbs, {"k": 3, "weighted": False, "empty": "skip"}),
    "unbiased cka": (linear_cka, {"unbiased": True}),
    "mutual_knn": (mutual_knn, {"k": 3}),
    "procrustes": (procrustes, {"kind": "ding"}),
    "minibatch": (minibatch_cka, {"batch_size": 8}),
    "own function": (norm_ratio, {"power": 2}),
}


@pytest.mark.parametrize("name", MEASURES)
def test_every_entry_is_the_measure_of_its_pair(name):
    measure, options = MEASURES[name]
    for found, b in ((table(measure, A, B, **options), B), (table(measure, A, **options), A)):
        np.testing.assert_allclose(found, by_pairs(measure, A, b, **options), atol=1e-6)
    assert np.ptp(found.to_numpy()) > 0.05


@pytest.mark.parametrize("name", MEASURES)
def test_partial_is_the_measure_with_its_options(name):
    measure, options = MEASURES[name]
    found, expected = table(partial(measure, **options), A, B), table(measure, A, B, **options)
    pd.testing.assert_frame_equal(found, expected)
    assert found.attrs == expected.attrs


def test_partial_with_positional_arguments_is_refused():
    with pytest.raises(ValueError, match="options of a partial must go by keyword"):
        table(partial(gbs, X), A)


def test_own_function_is_called_for_every_ordered_pair():
    called = []

    def difference(x, y):
        called.append((tuple(x.shape), tuple(y.shape)))
        return x.mean() - y.mean()

    found = table(difference, A, permutations=0).to_numpy()
    assert called == [(tuple(x.shape), tuple(y.shape)) for x in A.values() for y in A.values()]
    np.testing.assert_allclose(found, -found.T, atol=1e-7)
    assert np.abs(found).max() > 0.01


def test_rows_are_layers_of_a_and_columns_of_b_in_their_order():
    found = table(linear_cka, A, B)
    assert found.index.tolist() == ["stem", "body", "a head"]
    assert found.columns.tolist() == ["z", "b"]
    assert found.loc["body", "z"] == pytest.approx(linear_cka(A["body"], B["z"]))
    assert table(linear_cka, A).columns.tolist() == ["stem", "body", "a head"]


def test_axes_say_which_model_they_are():
    one, other = take(Net()), take(Deeper())
    axes = {
        "one model": (table(gbs, one), ("Net", "Net")),
        "two models": (table(gbs, one, other), ("a: Net", "b: Deeper")),
        "of one class": (table(gbs, one, take(Net(1))), ("a: Net", "b: Net")),
        "mapping": (table(gbs, A), ("layer", "layer")),
        "two mappings": (table(gbs, A, B), ("a", "b")),
        "one mapping": (table(gbs, one, dict(other)), ("a: Net", "b")),
        "names": (table(gbs, one, other, names=("before", "after")), ("before", "after")),
    }
    for what, (found, names) in axes.items():
        assert (found.index.name, found.columns.name) == names, what


def test_settings_travel_with_the_table():
    attrs = dict(table(gbs, take(Net(), reduce="mean"), weighted=False, seed=3).attrs)
    assert 0 < attrs.pop("chance") < 1
    assert 0 < attrs.pop("chance_std") < 1
    assert attrs == {
        "measure": "gbs",
        "k": 5,
        "symmetrize": "mean",
        "weighted": False,
        "empty": "zero",
        "n": N,
        "distance": False,
        "reduce": "mean",
    }
    assert table(procrustes, A, permutations=0).attrs == {
        "measure": "procrustes",
        "kind": "angular",
        "n": N,
        "distance": True,
    }
    assert table(norm_ratio, A, permutations=0, power=2).attrs["power"] == 2


def test_settings_are_those_of_given_graphs():
    graphs = {name: knn_graph(x, 3, symmetrize="union") for name, x in A.items()}
    attrs = table(gbs, graphs, k=7).attrs
    assert (attrs["k"], attrs["symmetrize"]) == (3, "union")
    directed = {name: knn_graph(x, 4, symmetrize="none") for name, x in A.items()}
    assert table(mutual_knn, directed).attrs["k"] == 4


def test_graphs_of_different_kinds_are_refused_with_both_layers():
    graphs = {name: knn_graph(x, k) for k, (name, x) in enumerate(A.items(), 3)}
    with pytest.raises(ValueError, match=r"layers 'stem' and 'body': graphs must be made in the same way.*k=3.*k=4"):
        table(gbs, graphs)


def test_chance_is_what_shuffled_samples_give():
    generator = torch.Generator().manual_seed(0)
    wide = {name: torch.randn(200, width, generator=generator) for name, width in (("a", 5), ("b", 400), ("c", 60))}
    attrs = table(linear_cka, wide, unbiased=True).attrs
    assert abs(attrs["chance"]) < 0.02
    assert 0 < attrs["chance_std"] < 0.02
    assert table(linear_cka, wide).attrs["chance"] > 0.2  # of the biased estimate it is large
    assert table(mutual_knn, wide, k=10).attrs["chance"] == pytest.approx(10 / 199, abs=0.01)
    assert table(procrustes, wide).attrs["chance"] > 0.3


def test_chance_follows_its_seed_and_leaves_the_table_alone():
    one, same, other, none = (table(gbs, A, B, **o) for o in ({}, {}, {"seed": 1}, {"permutations": 0}))
    assert one.attrs == same.attrs
    assert one.attrs["chance"] != other.attrs["chance"]
    assert not {"chance", "chance_std"} & none.attrs.keys()
    assert one.equals(other)
    assert one.equals(none)


def test_features_activations_and_graphs_give_the_same_table():
    acts = take(Net())
    expected = table(gbs, acts, k=4)
    graphs = {name: knn_graph(x, 4) for name, x in acts.items()}
    for a, b in ((dict(acts), None), (graphs, None), (graphs, dict(acts)), (acts, graphs)):
        np.testing.assert_allclose(table(gbs, a, b, k=4), expected, atol=1e-12)
    directed = {name: knn_graph(x, 4, symmetrize="none") for name, x in acts.items()}
    assert np.array_equal(table(mutual_knn, directed), table(mutual_knn, acts, k=4))


@pytest.mark.parametrize("measure", [linear_cka, procrustes])
def test_features_and_gram_matrices_give_the_same_table(measure):
    grams = {name: gram(x.double()) for name, x in A.items()}
    expected = table(measure, {name: x.double() for name, x in A.items()})
    np.testing.assert_allclose(table(measure, grams), expected, atol=1e-6)
    np.testing.assert_allclose(table(measure, grams, A), expected, atol=1e-5)


def test_prepare_is_applied_to_each_layer_once():
    seen = []

    def pooled(x):
        seen.append(x.shape)
        return x.flatten(2).mean(2) if x.ndim > 2 else x

    found = table(linear_cka, A, B, prepare=pooled)
    assert seen == [x.shape for x in (*A.values(), *B.values())]
    a, b = ({name: pooled(x) for name, x in layers.items()} for layers in (A, B))
    pd.testing.assert_frame_equal(found, table(linear_cka, a, b))
    assert not found.equals(table(linear_cka, A, B))


def test_prepare_may_make_graphs_for_a_function_of_graphs():
    def same_edges(one, other):
        edges = [set(zip(*g.edges()[:2], strict=True)) for g in (one, other)]
        return len(edges[0] & edges[1]) / len(edges[0])

    found = table(same_edges, A, prepare=partial(knn_graph, k=3))
    expected = by_pairs(lambda x, y: same_edges(knn_graph(x, 3), knn_graph(y, 3)), A, A)
    assert np.array_equal(found, expected)
    assert found.attrs["n"] == N


class Watched(Mapping):
    """Layers that tell what was read, and how many of those read before were alive then."""

    def __init__(self, layers):
        self.layers, self.read, self.alive, self.storages = layers, [], [], []

    def __getitem__(self, name):
        self.alive.append(sum(not storage.expired() for storage in self.storages))
        x = self.layers[name].clone()
        self.read.append(name)
        self.storages.append(StorageWeakRef(x.untyped_storage()))
        return x

    def __iter__(self):
        return iter(self.layers)

    def __len__(self):
        return len(self.layers)


@pytest.mark.parametrize(
    "measures", [[gbs], [linear_cka, procrustes, minibatch_cka], [mutual_knn, linear_cka, gbs]], ids=len
)
def test_each_layer_is_read_once_and_let_go_before_the_next(measures):
    a, b = Watched(A), Watched(B)
    compare_layers(measures, a, b, progress=False)
    assert a.read == list(A)
    assert b.read == list(B)
    assert a.alive == [0, 0, 0]
    assert b.alive == [0, 0]
    assert all(storage.expired() for storage in a.storages)


def test_null_reads_each_layer_once():
    a = Watched(A)
    null(gbs, a, permutations=3)
    assert a.read == list(A)
    assert max(a.alive) == 0


@pytest.mark.parametrize("measure", [gbs, linear_cka])
def test_several_passes_within_a_budget_give_the_identical_table(measure):
    whole, budget = take(Net()), 8 * N * 4
    lazy = take(Net(), memory=budget)
    assert "passes" in repr(lazy)
    found, expected = table(measure, lazy), table(measure, whole)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert found.attrs == expected.attrs
    assert table(measure, lazy, take(Deeper(), memory=4 * N * 4)).equals(table(measure, whole, take(Deeper())))


def test_model_and_its_copy_have_one_on_the_diagonal():
    model = Net()
    a, b = take(model), take(copy.deepcopy(model))
    tables = compare_layers([gbs, linear_cka, mutual_knn, procrustes], a, b, progress=False)
    for name, found in tables.items():
        assert np.diag(found) == pytest.approx(0 if name == "procrustes" else 1, abs=1e-6), name
        assert abs(found.loc["0", "3"] - found.loc["0", "0"]) > 0.05, name


def test_compare_layers_is_between_layers_for_each_measure():
    measures = {"g": gbs, "k3": partial(mutual_knn, k=3), "cka": partial(linear_cka, unbiased=True), "own": norm_ratio}
    tables = compare_layers(measures, A, B, names=("p", "q"), seed=2, progress=False)
    assert list(tables) == list(measures)
    for name, found in tables.items():
        expected = table(measures[name], A, B, names=("p", "q"), seed=2)
        pd.testing.assert_frame_equal(found, expected)
        assert found.attrs == expected.attrs


def test_measures_in_a_sequence_go_by_their_names():
    tables = compare_layers([partial(linear_cka, unbiased=True), gbs, norm_ratio], A, progress=False)
    assert list(tables) == ["linear_cka", "gbs", "norm_ratio"]
    assert tables["linear_cka"].attrs["unbiased"]


def test_measures_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"measures must have distinct names, got \['gbs', 'gbs'\]: pass a mapping"):
        compare_layers([gbs, partial(gbs, k=3)], A)
    with pytest.raises(ValueError, match="at least one measure"):
        compare_layers({}, A)


def test_captures_through_a_shuffling_loader_are_refused():
    loader = DataLoader(TensorDataset(X), 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    a, b = take(Net(), loader), take(Net(), loader)
    with pytest.raises(ValueError, match=r"a and b were given different inputs for \d+ of 24 samples.*shuffled"):
        table(gbs, a, b)


def test_captures_through_a_loader_that_shuffles_the_same_way_twice_pair():
    model = Net()
    loader = DataLoader(TensorDataset(X), 8, shuffle=True)  # by the global random state, which capture restores
    torch.manual_seed(0)
    a, b = take(model, loader), take(model, loader)
    assert np.diag(table(gbs, a, b)) == pytest.approx(1)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="different inputs"):
        table(gbs, a, take(model, loader))


def acts(ids, n=N):
    return Activations({"one": X[:n], "two": X[:n, :3]}, sample_ids=ids)


UNPAIRED = {
    "other number": (acts(None), acts(None, 20), "a and b must be over the same samples, got 24 and 20"),
    "other ids": (acts(range(N)), acts([*range(23), 99]), "different samples: at position 23 a has sample id 23 and b"),
    "other order": (acts(range(N)), acts([1, 0, *range(2, N)]), "the same samples in another order: at position 0 "),
    "other number in b": (A, {"short": X[:20]}, "layer 'short': layers must be over the same samples, got 20 here"),
    "other number in a": ({**A, "short": X[:20]}, None, "layer 'short': .* same samples, got 20 here and 24 before"),
    "other graph": ({"x": X}, {"g": knn_graph(X[:9])}, "layer 'g': .*same samples, got 9 here and 24 before"),
}


@pytest.mark.parametrize("case", UNPAIRED)
def test_samples_that_do_not_pair_are_refused(case):
    a, b, message = UNPAIRED[case]
    for function in (between_layers, between_layers_null):
        with pytest.raises(ValueError, match=message):
            function(gbs, a, b, progress=False)


def test_subset_puts_samples_in_another_order_right():
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    a, b = acts(range(N)), acts(range(N)).subset(order)
    with pytest.raises(ValueError, match="another order"):
        table(gbs, a, b)
    assert table(gbs, a, b.subset(order.argsort())).equals(table(gbs, a, a))


def test_clean_and_altered_inputs_pair_by_their_ids():
    altered = X + 0.1 * torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="different inputs for 24 of 24 samples, the first at position 0"):
        table(gbs, take(Net()), take(Net(), altered))
    ids = [f"image {i}" for i in range(N)]
    clean, other = take(Net(), sample_ids=ids), take(Net(), altered, sample_ids=ids)
    found = table(linear_cka, clean, other)
    np.testing.assert_allclose(found, by_pairs(linear_cka, clean, other), atol=1e-6)
    assert (np.diag(found) > 0.9).all()
    assert (np.diag(found) < 1).all()


@pytest.mark.parametrize(
    ("a", "message"), [({}, "a must be .*got none"), ([X], "a must be Activations or a mapping.*got list")]
)
def test_what_holds_no_layers_is_refused(a, message):
    with pytest.raises(ValueError, match=message):
        table(gbs, a)
    with pytest.raises(ValueError, match=message.replace("a must", "b must")):
        table(gbs, A, a)


def test_unknown_option_is_named():
    with pytest.raises(TypeError, match="gbs has no option 'neighbours'; it has k, symmetrize, weighted, empty"):
        table(gbs, A, neighbours=3)
    with pytest.raises(TypeError, match="linear_cka has no option 'k'; it has unbiased"):
        compare_layers([partial(linear_cka, k=3)], A)
    with pytest.raises(TypeError, match="procrustes has no option 'k'"):
        null(procrustes, A, k=3)


@pytest.mark.parametrize("measure", [gbs, linear_cka, mutual_knn, procrustes, minibatch_cka])
def test_errors_name_the_layer(measure):
    bad = A["body"].clone()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'body' must be finite, got NaN"):
        table(measure, {**A, "body": bad})
    with pytest.raises(ValueError, match=r"layer 'bad' must be finite, got NaN"):
        table(measure, A, {"bad": bad})


def test_option_out_of_range_names_the_layer():
    with pytest.raises(ValueError, match=r"layer 'stem': k must be an integer with 1 <= k < n, got k = 24 with n = 24"):
        table(gbs, A, k=N)


@pytest.mark.parametrize("measure", [linear_cka, partial(linear_cka, unbiased=True), procrustes])
def test_constant_layer_is_undefined_and_named(measure):
    layers = {"stem": A["stem"], "flat": torch.full((N, 3), 0.1), "head": A["a head"]}
    with pytest.warns(UserWarning, match=r"is undefined \(nan\) for the layers 'flat': their features are constant"):
        found = table(measure, layers)
    assert found.loc["flat"].isna().all()
    assert found["flat"].isna().all()
    assert found.drop(index="flat", columns="flat").notna().all(axis=None)
    assert math.isfinite(found.attrs["chance"])


def test_pairs_that_are_undefined_are_told():
    def undefined_at_stem(x, y):
        return float("nan") if x is y is A["stem"] else 0.5

    with pytest.warns(UserWarning, match=r"undefined_at_stem is undefined \(nan\) for the layers 'stem'"):
        found = table(undefined_at_stem, A, permutations=0)
    assert found.isna().to_numpy().sum() == 1
    assert np.isnan(found.loc["stem", "stem"])


def test_isolated_samples_are_told_once_with_the_layer():
    x = A["body"].clone()
    x[:3] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = table(gbs, {**A, "body": x}, B)
    assert [str(w.message) for w in caught] == ["layer 'body': 3 of 24 samples are isolated: no edge has weight"]
    assert found.notna().all(axis=None)


def test_null_has_a_row_for_each_pair_in_the_order_of_the_table():
    found, expected = null(gbs, A, B, permutations=7, seed=2), table(gbs, A, B, permutations=0)
    assert found.shape == (6, 7)
    assert found.index.tolist() == [(row, column) for row in A for column in B]
    assert found.index.names == ["a", "b"]
    mean = found.mean(axis=1).unstack(sort=False)  # noqa: PD010
    assert mean.index.equals(expected.index)
    assert mean.columns.equals(expected.columns)
    assert found.attrs == {**expected.attrs, "permutations": 7, "seed": 2}
    own = null(gbs, A, permutations=2).mean(axis=1).unstack(sort=False)  # noqa: PD010
    assert own.index.tolist() == own.columns.tolist() == list(A)


def test_null_shuffles_samples_and_the_same_for_all_layers():
    twice = {"one": A["body"], "same": A["body"].clone(), "other": A["stem"]}
    draws = null(linear_cka, A, twice, permutations=5)
    values = draws.to_numpy().reshape(3, 3, 5)
    np.testing.assert_allclose(values[:, 0], values[:, 1])
    assert np.unique(values[0, 0]).size == 5
    in_any_order = null(norm_ratio, A, B, permutations=3)  # does not see the order of the samples
    np.testing.assert_allclose(in_any_order, np.repeat(table(norm_ratio, A, B).to_numpy().reshape(-1, 1), 3, 1))


def test_null_follows_its_seed_and_leaves_the_random_state():
    state = torch.get_rng_state()
    first = null(gbs, A, permutations=4, seed=5)
    table(gbs, A)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.equals(null(gbs, A, permutations=4, seed=5))
    assert not first.equals(null(gbs, A, permutations=4, seed=6))


def test_null_is_what_chance_gives():
    layers = related(n=120)
    draws = null(mutual_knn, layers, k=12, permutations=30)
    assert draws.to_numpy().mean() == pytest.approx(12 / 119, abs=0.005)
    assert (table(mutual_knn, layers, k=12) > draws.max(axis=None)).all(axis=None)
    distances = null(procrustes, layers, permutations=5)
    assert distances.min(axis=None) > 0.8
    assert distances.min(axis=None) > table(procrustes, layers).max(axis=None)


def test_null_of_batches_is_refused_and_the_table_goes_without():
    with pytest.raises(ValueError, match="samples of a BatchGrams cannot be permuted"):
        null(minibatch_cka, A)
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        null(gbs, A, permutations=0)
    assert "chance" not in table(minibatch_cka, A).attrs


def test_only_the_constant_layer_is_blamed():
    with pytest.warns(UserWarning, match=r"linear_cka is undefined \(nan\) for the layers 'flat': ") as caught:
        found = between_layers(linear_cka, {"flat": torch.ones(N, 3)}, A, progress=False)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    assert "chance" not in found.attrs


def test_cknna_is_computed_in_both_directions():
    found = table(cknna, A, k=6)
    for row in A:
        for column in A:
            assert found.loc[row, column] == pytest.approx(cknna(A[row], A[column], k=6), abs=1e-12)


def test_warnings_point_at_the_line_that_called():
    x = A["body"].clone()
    x[:3] = 0
    for f in (between_layers, between_layers_null):
        with pytest.warns(UserWarning, match="isolated") as caught:
            f(gbs, {"body": x}, permutations=1, progress=False)
        assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: between_layers("gbs", A), TypeError, "measure of two layers, got 'gbs'"),
        (
            lambda: between_layers(gbs, A, names="ResNet"),
            ValueError,
            "names must be two, one for each axis, got 'ResNet'",
        ),
        (lambda: between_layers(gbs, A, names=("R",)), ValueError, "names must be two"),
        (lambda: between_layers(gbs, {"a": A["body"].numpy()}), ValueError, "layer 'a' must be a real torch tensor"),
        (
            lambda: between_layers(max, A, prepare=lambda z: z.sum()),
            ValueError,
            "one entry per sample, or n.* got Tensor",
        ),
    ],
)
def test_unusable_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
