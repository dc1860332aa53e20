"""The table over all layers: its columns, its sets, its settings."""

from itertools import pairwise

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repgraph import Activations, apply_layers, capture, knn_graph, profile, profile_activations
from repgraph.metrics.similarity import gbs, linear_cka

COLUMNS = [
    "modularity",
    "modularity_std",
    "null",
    "null_std",
    "ceiling",
    "class_separation",
    "features",
    "isolated",
    "negative_share",
]
UNLABELLED = [
    "community_modularity",
    "community_modularity_std",
    "communities",
    "features",
    "isolated",
    "negative_share",
]
N = 60
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Sigmoid())


def table_of(model, data, **options):
    options = {"layers": "leaves", "n": 20, "repeats": 3, "permutations": 5, "progress": False} | options
    return profile(model, data, **options)


def graph_of(x, k):
    """The symmetrised kNN graph of the definition, dense: (n, n)."""
    unit = x.flatten(1).double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-8)
    s = unit @ unit.T
    np.fill_diagonal(s, -np.inf)
    a = np.zeros_like(s)
    for i, row in enumerate(s):
        nearest = np.argsort(-row, kind="stable")[:k]
        a[i, nearest] = row[nearest]
    return (a + a.T) / 2


def q_of(weights, y):
    """Modularity by networkx; the signed one (Gomez 2009) where weights are negative."""
    classes = [set(np.flatnonzero(np.asarray(y) == c)) for c in np.unique(y)]
    parts = [(sign, (sign * weights).clip(0)) for sign in (1, -1)]
    values = [
        sign * part.sum() * nx.community.modularity(nx.from_numpy_array(part), classes)
        for sign, part in parts
        if part.any()
    ]
    return sum(values) / np.abs(weights).sum()


def row_of(x, y, sets, k=3):
    """The label columns of one layer that need no random numbers, from dense definitions."""
    found = {name: [] for name in ("modularity", "ceiling", "class_separation", "isolated", "negative_share")}
    for rows in sets:
        u, labels = graph_of(x[rows], k), np.asarray(y)[rows]
        share = np.array([np.abs(u)[labels == c].sum() for c in np.unique(labels)]) / np.abs(u).sum()
        unit = x[rows].flatten(1).double().numpy()
        distance = 1 - (unit @ unit.T) / np.outer(np.linalg.norm(unit, axis=1), np.linalg.norm(unit, axis=1))
        classes = [labels == c for c in np.unique(labels)]
        between = [[distance[a][:, b].mean() for b in classes] for a in classes]
        found["modularity"].append(q_of(u, labels))
        found["ceiling"].append(1 - (share**2).sum())
        found["class_separation"].append(1 - np.mean(np.diag(between)) / np.mean(between))
        found["isolated"].append((u == 0).all(1).sum())
        found["negative_share"].append((u < 0).sum() / (u != 0).sum())
    return {name: np.mean(values) for name, values in found.items()} | {
        "modularity_std": np.std(found["modularity"], ddof=1) if len(sets) > 1 else np.nan
    }


def assert_rows(table, acts, y, sets, k=3):
    assert table.index.tolist() == list(acts)
    for name in acts:
        expected = row_of(acts[name], y, sets, k)
        found = {column: table.loc[name, column] for column in expected}
        assert found == pytest.approx(expected, abs=1e-6, nan_ok=True), name


SETS = [np.arange(0, 20), np.arange(20, 40), np.arange(40, 60)]


def test_columns_and_values(model):
    table = table_of(model, (X, Y))
    assert table.columns.tolist() == COLUMNS
    assert table.index.name == "layer"
    assert table["features"].tolist() == [8, 8, 5, 5]
    assert table["features"].dtype.kind == "i"
    assert_rows(table, capture(model, X, "leaves", progress=False), Y, SETS)


def test_columns_without_labels(model):
    table = table_of(model, X)
    assert table.columns.tolist() == UNLABELLED
    expected = table_of(model, (X, Y))
    for column in ("features", "isolated", "negative_share"):
        assert table[column].tolist() == expected[column].tolist()
    assert table["community_modularity"].between(0, 1).all()
    assert (table["community_modularity"] > expected["modularity"]).all()


def test_communities_of_separate_clusters_are_found():
    x = torch.eye(5).repeat_interleave(4, 0).repeat(2, 1)  # five cliques of four, in two sets
    table = profile_activations(Activations({"a": x}), n=20, repeats=2, progress=False)
    assert table.loc["a", "communities"] == 5
    assert table.loc["a", "community_modularity"] == pytest.approx(1 - 1 / 5)
    assert table.loc["a", "community_modularity_std"] == pytest.approx(0)


@pytest.mark.filterwarnings("ignore:set . has a class")
@pytest.mark.parametrize("k", [1, 5, 19])
def test_k_is_used_and_negative_weights_are_signed(model, k):
    table = table_of(model, (X, Y), k=k)
    assert k < 19 or table.loc["0", "negative_share"] > 0.3
    assert_rows(table, capture(model, X, "leaves", progress=False), Y, SETS, k)


def test_perfect_classes_reach_the_ceiling():
    x = torch.eye(4).repeat(10, 1) + 0.01 * X[:40, :4].abs()
    table = profile_activations(Activations({"a": x}, torch.arange(40) % 4), n=20, repeats=2, progress=False)
    assert table.loc["a", "modularity"] == pytest.approx(table.loc["a", "ceiling"])
    assert table.loc["a", "ceiling"] == pytest.approx(0.75, abs=1e-3)
    assert table.loc["a", "class_separation"] > 0.99


def test_null_is_what_chance_gives():
    torch.manual_seed(0)
    acts = Activations({"a": torch.rand(400, 5)}, torch.arange(400) % 4)
    table = profile_activations(acts, n=200, repeats=2, permutations=100, progress=False)
    assert abs(table.loc["a", "null"]) < 0.01
    assert 0.01 < table.loc["a", "null_std"] < 0.05
    assert abs(table.loc["a", "modularity"]) < 4 * table.loc["a", "null_std"]


def test_null_does_not_see_the_order_of_the_labels(model):
    mixed = Y[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    a, b = (table_of(model, (X, labels), layers="0", permutations=100) for labels in (Y, mixed))
    assert abs(a["null"] - b["null"]).max() < 0.05
    assert abs(a["null_std"] - b["null_std"]).max() < 0.02
    assert a.equals(table_of(model, (X, Y), layers="0", permutations=100))


def test_settings_travel_with_the_table(model):
    table = table_of(model, (X, Y), seed=0, k=2, reduce="mean", metric="euclidean", symmetrize="union", permutations=7)
    assert table.attrs == {
        "model": "Sequential",
        "layers": "leaves",
        "reduce": "mean",
        "k": 2,
        "metric": "euclidean",
        "symmetrize": "union",
        "n": 20,
        "repeats": 3,
        "seed": 0,
        "permutations": 7,
    }


def test_rows_stand_in_execution_order():
    class OtherOrder(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(6, 4), nn.Linear(6, 6)

        def forward(self, x):
            return self.last(self.first(self.first(x)))

    assert table_of(OtherOrder(), (X, Y)).index.tolist() == ["first", "first#1", "last"]


def test_sets_follow_the_order_of_the_data(model):
    """Set r is the samples r n to (r + 1) n; what lies behind the last set is not read."""
    acts = capture(model, X, "leaves", progress=False)
    sets = [np.arange(0, 15), np.arange(15, 30)]
    seen = []
    forward = lambda model, batch: (seen.append(len(batch[0])), model(batch[0]))  # noqa: E731
    table = table_of(model, (X, Y), n=15, repeats=2, batch_size=8, forward=forward)
    assert_rows(table, acts, Y, sets)
    assert sum(seen) <= 30 + 8  # the first batch runs twice


def test_seed_draws_the_sets_at_random_and_labels_stay_with_their_samples(model):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5)).numpy()
    sets = [order[:20], order[20:40]]
    table = table_of(model, (X, Y), repeats=2, seed=5)
    assert_rows(table, capture(model, X, "leaves", progress=False), Y, sets)
    assert table.attrs["seed"] == 5
    assert not table.equals(table_of(model, (X, Y), repeats=2, seed=6))


def test_seed_mixes_data_that_are_sorted_by_class():
    y = torch.arange(N) // 20
    x = torch.eye(3)[y] + 0.05 * X[:, :3].abs()  # the class can be read off the features
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    with pytest.raises(ValueError, match=r"labels: set 0 of 20 samples holds one class only.*pass seed="):
        table_of(model, (x, y))
    for data in ((x, y), DataLoader(TensorDataset(x, y), 7), iter([(x[:35], y[:35]), (x[35:], y[35:])])):
        table = table_of(model, data, seed=0)
        assert table.loc["0", "modularity"] == pytest.approx(table.loc["0", "ceiling"])
    labels = [f"class {v}" for v in y]
    assert table_of(model, x, labels=labels, seed=0).equals(table_of(model, (x, y), seed=0))


def test_kinds_of_data_give_the_same_table(model):
    expected = table_of(model, (X, Y), seed=2, batch_size=16)
    batches = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, N, 16)]
    for data in (batches, (b for b in batches), DataLoader(TensorDataset(X, Y), 16), (X.numpy(), Y.tolist())):
        assert table_of(model, data, seed=2, batch_size=16).equals(expected)


def test_activations_give_the_same_table_as_the_model(model):
    acts = capture(model, (X, Y), "leaves", progress=False)
    for seed in (None, 0, 1):
        found = profile_activations(acts, n=20, repeats=3, seed=seed, permutations=5, progress=False)
        expected = table_of(model, (X, Y), seed=seed)
        pd.testing.assert_frame_equal(found, expected)
        assert found.attrs == expected.attrs


def test_string_and_bool_labels(model):
    names = np.array(["cat", "dog", "horse"])
    assert table_of(model, (X, names[Y])).equals(table_of(model, (X, Y)))
    assert table_of(model, (X, Y > 0)).equals(table_of(model, (X, (Y > 0).long())))


def test_labels_argument_is_in_the_order_of_the_data(model):
    expected = table_of(model, (X, Y), repeats=2, seed=1)
    assert table_of(model, X, labels=Y, repeats=2, seed=1).equals(expected)
    assert table_of(model, (X, Y.flip(0)), labels=pd.Series(Y), repeats=2, seed=1).equals(expected)


def test_labels_for_some_of_the_samples_cannot_go_with_a_seed(model):
    with pytest.raises(ValueError, match="labels must have one entry per sample: expected 60, got 40"):
        table_of(model, X, labels=Y[:40], repeats=2, seed=0)


def test_data_that_run_out_give_fewer_sets_with_a_warning(model):
    with pytest.warns(UserWarning, match="the data hold 60 samples, not 4 sets of 20: 3 sets are used"):
        table = table_of(model, (X, Y), repeats=4)
    assert table.attrs["repeats"] == 3
    assert table.equals(table_of(model, (X, Y)))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_fewer_samples_than_a_set_are_one_set_with_a_warning(model, seed):
    with pytest.warns(UserWarning, match="the data hold 60 samples, not 5 sets of 500: one set of 60 is used"):
        table = table_of(model, (X, Y), n=500, repeats=5, seed=seed)
    assert (table.attrs["n"], table.attrs["repeats"]) == (60, 1)
    assert table["modularity_std"].isna().all()
    assert_rows(table, capture(model, X, "leaves", progress=False), Y, [np.arange(N)])


def test_small_class_is_warned_about(model):
    y = Y.clone()
    y[:20] = torch.tensor([0] * 9 + [1] * 8 + [2] * 3)
    with pytest.warns(UserWarning, match="set 0 has a class of 3 samples, not more than k = 3"):
        table_of(model, (X, y))


def test_one_class_in_a_later_set_is_refused(model):
    y = Y.clone()
    y[20:40] = 1
    with pytest.raises(ValueError, match=r"set 1 of 20 samples holds one class only.*pass seed="):
        table_of(model, (X, y))


@pytest.mark.filterwarnings("ignore:set 0 has a class")
def test_one_class_in_a_set_behind_one_with_a_small_class_is_refused(model):
    y = Y.clone()
    y[:20] = torch.tensor([0] * 18 + [1] * 2)
    y[20:40] = 1
    with pytest.raises(ValueError, match=r"set 1 of 20 samples holds one class only.*pass seed="):
        table_of(model, (X, y))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(N), "labels must be integers, bools or strings.*bin"),
        (torch.eye(3)[Y], "labels must be one class per sample.*choose one column"),
        (Y[:-1], "labels must have one entry per sample: expected 60, got 59"),
    ],
)
def test_labels_that_are_no_classes_are_refused(model, labels, message):
    with pytest.raises(ValueError, match=message):
        table_of(model, X, labels=labels)


@pytest.mark.filterwarnings("ignore:set 0 has a class")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 1}, "n must be at least 2"),
        ({"n": -5}, "n must be at least 2"),
        ({"n": 2.5}, "n must be"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"repeats": 1.5}, "repeats must be"),
        ({"metrics": ("modularity", "entropy")}, "metrics must be a sequence of names.*entropy"),
        ({"metrics": ()}, "metrics must be"),
        ({"metrics": "modularity"}, "metrics must be a sequence"),
        ({"permutations": 0}, "permutations must be at least 1, got 0"),
        ({"k": 20}, "k must .*1 <= k < n, got k = 20 with n = 20"),
        ({"k": 0}, "k must .*1 <= k < n, got k = 0"),
        ({"metric": "dot"}, "metric must be"),
        ({"symmetrize": "none"}, "symmetrize|directed|undirected"),
        ({"layers": "leave"}, "'leave' matches no layer"),
        ({"memory": "many"}, "memory must be"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        table_of(model, (X, Y), **options)


def test_layer_without_any_weight_is_undefined_and_said_so():
    x = {"dead": torch.zeros(20, 3), "alive": torch.rand(20, 3)}
    acts = Activations(x, torch.arange(20) % 2)
    with pytest.warns(UserWarning, match="no weight"):
        table = profile_activations(acts, n=20, repeats=1, progress=False)
    assert np.isnan(table.loc["dead", "modularity"])
    assert table.loc["dead", "isolated"] == 20
    assert np.isfinite(table.loc["alive", "modularity"])


def test_nan_in_given_activations_is_refused_with_the_layer():
    x = torch.rand(20, 3)
    x[4] = torch.nan
    acts = Activations({"stem": torch.rand(20, 3), "head": x}, torch.arange(20) % 2)
    with pytest.raises(ValueError, match=r"'head'.*NaN"):
        profile_activations(acts, n=10, repeats=2, progress=False)


def test_layer_with_one_number_per_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1), nn.Sigmoid(), nn.Flatten(0))
    table = table_of(model, (X, Y))
    assert table["features"].tolist() == [1, 1, 1]
    assert table.loc["1", "modularity"] == table.loc["2", "modularity"]


def test_layers_are_read_one_at_a_time():
    class Watched(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    read = []
    layers = Watched(a=torch.rand(20, 3), b=torch.rand(20, 3))
    acts = Activations(layers, torch.arange(20) % 2)
    read.clear()
    profile_activations(acts, n=10, repeats=2, progress=False)
    assert read == ["a", "b"]


def test_apply_layers_keeps_the_order():
    def largest(x):
        return x.max()

    curve = apply_layers(largest, {"stem": torch.ones(4, 2), "body": torch.zeros(4, 3), "a": torch.full((4, 1), 2)})
    expected = pd.Series([1.0, 0.0, 2.0], index=pd.Index(["stem", "body", "a"], name="layer"), name="largest")
    pd.testing.assert_series_equal(curve, expected)


def test_apply_layers_takes_activations_and_other_items(model):
    acts = capture(model, (X, Y), "leaves", progress=False)
    curve = apply_layers(lambda x: x.shape[1], acts)
    assert curve.to_dict() == {"0": 8, "1": 8, "2": 5, "3": 5}
    assert apply_layers(len, {"a": "one", "b": "three"}).tolist() == [3, 5]
    assert apply_layers(len, {}).empty


SIMILARITY = [f"{family}_previous{part}" for family in ("gbs", "cka") for part in ("", "_std", "_null")]
CHAIN = torch.randn(N, 8, generator=torch.Generator().manual_seed(9))


def chain(labels=Y):
    """Layers that drift away from each other, the third of another width."""
    generator = torch.Generator().manual_seed(10)
    second = CHAIN + 0.5 * torch.randn(N, 8, generator=generator)
    third = second @ torch.randn(8, 12, generator=generator) + torch.randn(N, 12, generator=generator)
    return Activations({"first": CHAIN, "second": second, "third": third.reshape(N, 3, 4)}, labels)


def table_from(acts, **options):
    options = {"n": 20, "repeats": 3, "permutations": 5, "progress": False} | options
    return profile_activations(acts, **options)


def test_similarity_to_the_previous_layer_comes_after_modularity():
    table = table_from(chain(), metrics=("modularity", "gbs", "cka"))
    place = COLUMNS.index("features")
    assert table.columns.tolist() == [*COLUMNS[:place], *SIMILARITY, *COLUMNS[place:]]
    assert table.loc["first", SIMILARITY].isna().all()
    assert table.loc["second":, SIMILARITY].notna().all(axis=None)
    pd.testing.assert_frame_equal(table[COLUMNS], table_from(chain()))
    assert table_from(chain(), metrics=("gbs",)).columns.tolist() == [*SIMILARITY[:3], *COLUMNS[place:]]
    unlabelled = table_from(chain(None), metrics=("cka", "modularity")).columns.tolist()
    assert unlabelled == [*UNLABELLED[:3], *SIMILARITY[3:], *UNLABELLED[3:]]


@pytest.mark.parametrize(
    ("options", "sets"),
    [
        ({}, SETS),
        ({"k": 5, "metric": "euclidean", "symmetrize": "union"}, SETS),
        ({"n": 30, "repeats": 2}, [np.arange(30), np.arange(30, 60)]),
        ({"repeats": 1}, SETS[:1]),
        ({"seed": 4}, torch.randperm(N, generator=torch.Generator().manual_seed(4)).numpy().reshape(3, 20)),
    ],
)
def test_similarity_to_the_previous_layer_is_averaged_over_the_sets(options, sets):
    acts = chain()
    table = table_from(acts, metrics=("gbs", "cka"), **options)
    made = {"k": 3} | {key: options[key] for key in ("k", "metric", "symmetrize") if key in options}
    for before, name in pairwise(acts):
        pairs = [(acts[before][rows], acts[name][rows]) for rows in sets]
        values = {
            "gbs": [gbs(knn_graph(x, **made), knn_graph(y, **made)) for x, y in pairs],
            "cka": [linear_cka(x, y, unbiased=True) for x, y in pairs],
        }
        for family, found in values.items():
            std = np.std(found, ddof=1) if len(sets) > 1 else np.nan
            assert table.loc[name, f"{family}_previous"] == pytest.approx(np.mean(found), abs=1e-6)
            assert table.loc[name, f"{family}_previous_std"] == pytest.approx(std, abs=1e-6, nan_ok=True)
    assert 0.3 < table.loc["third", "gbs_previous"] < table.loc["second", "cka_previous"] < 0.9


def test_similarity_of_shuffled_samples_is_what_chance_gives():
    x = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    acts = Activations({"a": x, "b": 2 * x, "c": x @ torch.eye(10, 6)})
    table = table_from(acts, n=200, repeats=2, k=5, metrics=("gbs", "cka"))
    assert table.loc["b", ["gbs_previous", "cka_previous"]].to_numpy(float) == pytest.approx(1)
    assert table["cka_previous_null"].abs().max() < 0.03
    assert table["gbs_previous_null"].dropna().between(5 / 199 / 2, 2 * 5 / 199).all()
    again, other = (table_from(acts, n=200, repeats=2, k=5, metrics=("gbs", "cka"), seed=seed) for seed in (None, 1))
    assert table.equals(again)
    assert not table["gbs_previous_null"].equals(other["gbs_previous_null"])


def test_similarity_needs_no_labels_and_no_two_classes():
    expected = table_from(chain(None), metrics=("gbs",))
    assert not set(COLUMNS[:6]) & set(expected.columns)
    assert table_from(chain(torch.zeros(N, dtype=torch.int64)), metrics=("gbs",)).equals(expected)
    assert table_from(chain(torch.arange(N) // 20), metrics=("gbs",)).equals(expected)  # sorted by class
    with pytest.raises(ValueError, match="holds one class only"):
        table_from(chain(torch.zeros(N, dtype=torch.int64)), metrics=("modularity", "gbs"))


def test_profile_gives_the_similarities_of_its_own_activations(model):
    metrics = ("modularity", "gbs", "cka")
    table = table_of(model, (X, Y), metrics=metrics)
    expected = table_from(capture(model, (X, Y), "leaves", progress=False), metrics=metrics)
    pd.testing.assert_frame_equal(table, expected)


@pytest.mark.parametrize("metrics", [("gbs", "CKA"), ("linear_cka",), "gbs", ()])
def test_unknown_metrics_are_refused_with_the_choices(metrics):
    with pytest.raises(ValueError, match=r"metrics must be a sequence of names from .*modularity', 'gbs', 'cka'.*got"):
        table_from(chain(), metrics=metrics)
