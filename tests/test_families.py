"""The columns of every family in the table of `profile`, against what each says on its own, set by set."""

import inspect
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from repgraph import Activations, capture, families, profile, profile_activations
from repgraph.metrics.complexity import gating_states
from repgraph.metrics.feature_entropy import feature_birth, feature_entropy, feature_entropy_floor
from repgraph.metrics.spline import local_complexity_by_layer

N, SIZE = 48, 24
X = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1] * 16)
ALL = ("modularity", "gbs", "cka", "feature_entropy", "complexity", "spline")
BIRTHS = ["feature_entropy", "feature_entropy_std", "feature_entropy_floor", "feature_entropy_ceiling", "birth_rate"]
BITS = ["gates", "complexity", "complexity_std", "complexity_ceiling"]
TOLD = ["label_information", "label_information_std", "label_information_ceiling"]
LOCAL = ["regions", "local_complexity"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

    def forward(self, x):
        return F.relu(x + self.two(self.relu(self.one(x))))


class Net(nn.Module):
    """ReLUs in the root, in a module and as a function inside blocks, and a head without any."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block1, self.block2 = Block(), Block()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        x = self.block2(self.block1(F.relu(self.norm(self.stem(x)))))
        return self.head(self.drop(x.mean((2, 3))))


LAYERS = ["block1", "block2", "head"]
GATES = {
    "block1": ["#relu0", "block1.relu", "block1#relu0"],  # the root's first comes before any layer
    "block2": ["block2.relu", "block2#relu0"],
    "head": [],
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def table_of(model, data=(X, Y), **options):
    options = {"layers": LAYERS, "n": SIZE, "repeats": 2, "permutations": 3, "progress": False} | options
    return profile(model, data, **options)


def sets_of(seed, n=SIZE, repeats=2, total=N):
    order = (
        torch.arange(total) if seed is None else torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    )
    return [order[r * n : (r + 1) * n] for r in range(repeats)]


def bits_by_definition(S, lam):
    """-mean_i log2 mean_j exp(-d_ij / (2 lam D)) of bool gates (N, D), D given by hand for classes."""
    rows = S.numpy()
    distance = (rows[:, None] != rows[None]).sum(-1)
    return -np.log2(np.exp(-distance / (2 * lam * rows.shape[1])).mean(1)).mean()


def assert_column(table, layer, column, values):
    assert table.loc[layer, column] == pytest.approx(np.mean(values), abs=1e-6), (layer, column)
    if f"{column}_std" in table:
        assert table.loc[layer, f"{column}_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-6), (layer, column)


@pytest.mark.parametrize("seed", [None, 4])
def test_feature_entropy_columns_are_means_over_sets_of_means_over_classes(model, seed):
    table = table_of(model, metrics=("feature_entropy",), seed=seed)
    acts = capture(model, X, LAYERS, progress=False)
    for layer in ("block1", "block2"):
        found = {column: [] for column in BIRTHS if column != "feature_entropy_std"}
        for rows in sets_of(seed):
            births, y = feature_birth(acts[layer][rows]), Y[rows]
            one = [feature_entropy(births[y == c]) for c in (0, 1)]
            sizes = [int((y == c).sum()) for c in (0, 1)]
            found["feature_entropy"].append(np.mean([float(f.entropy.mean()) for f in one]))
            found["birth_rate"].append(np.mean([float(f.birth_rate.mean()) for f in one]))
            found["feature_entropy_floor"].append(feature_entropy_floor(6, round(float(np.mean(sizes)))))
            found["feature_entropy_ceiling"].append(np.mean(np.log(sizes)))
        for column, values in found.items():
            assert_column(table, layer, column, values)
    assert 0 < table.loc["block1", "birth_rate"] < 1
    assert table.loc["head", BIRTHS].isna().all()


@pytest.mark.parametrize(("seed", "lam"), [(None, 0.01), (4, 0.04)])
def test_complexity_columns_are_those_of_the_gates_of_a_layer(model, seed, lam):
    table = table_of(model, metrics=("complexity", "spline"), seed=seed, lam=lam, radius=0.3)
    states = gating_states(model, X, progress=False)
    for layer in ("block1", "block2"):
        S = torch.cat([states[name] for name in GATES[layer]], 1)
        found = {column: [] for column in ("complexity", "label_information", "label_information_ceiling", "regions")}
        for rows in sets_of(seed):
            own, y = S[rows], Y[rows]
            share = torch.bincount(y).numpy() / SIZE
            whole = bits_by_definition(own, lam)
            within = sum(p * bits_by_definition(own[y == c], lam) for c, p in enumerate(share))
            found["complexity"].append(whole)
            found["label_information"].append(whole - within)
            found["label_information_ceiling"].append(-(share * np.log2(share)).sum())
            found["regions"].append(len({tuple(row) for row in own.tolist()}))
        for column, values in found.items():
            assert_column(table, layer, column, values)
        assert table.loc[layer, "gates"] == S.shape[1] == 4 * 36 * len(GATES[layer])
    assert table["complexity_ceiling"].dropna().tolist() == pytest.approx([math.log2(SIZE)] * 2)
    assert table.attrs["lam"] == lam


def test_regions_count_codes_that_repeat_once():
    net = mlp()
    x = torch.randn(6, 3).repeat(5, 1)
    states = gating_states(net, x, progress=False)
    table = table_of(net, x, layers="blocks", n=30, repeats=1, metrics=("spline",), k=3)
    assert table.loc[["0", "2"], "regions"].tolist() == [len(states[k].unique(dim=0)) for k in ("1", "3")]
    assert table.loc["0", "regions"] <= 6


@pytest.mark.parametrize("seed", [None, 4])
def test_local_complexity_is_that_around_the_first_set(model, seed):
    table = table_of(model, metrics=("spline",), seed=seed, radius=0.3)
    around = X[sets_of(seed)[0].sort().values]
    local = local_complexity_by_layer(model, around, radius=0.3, n_dirs=20, progress=False)
    for layer in ("block1", "block2"):
        assert table.loc[layer, "local_complexity"] == pytest.approx(local[GATES[layer]].sum())
    assert np.isnan(table.loc["head", "local_complexity"])
    assert (table.attrs["radius"], table.attrs["around"]) == (0.3, SIZE)


@pytest.mark.parametrize(("n", "step"), [(64, 1), (65, 2), (150, 3)])
def test_at_most_64_samples_spread_over_the_set_stand_for_it(n, step):
    net, x = mlp().eval(), torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    table = table_of(net, x, layers="blocks", n=n, repeats=1, metrics=("spline",), seed=0)
    around = x[sets_of(0, n, 1, 200)[0].sort().values][::step]
    assert table.attrs["around"] == len(around) <= 64
    flat = around.double()
    radius = 0.01 * float(((flat - flat.mean(0)) ** 2).sum(1).mean().sqrt())
    assert table.attrs["radius"] == pytest.approx(radius)
    local = local_complexity_by_layer(net, around, radius=radius, n_dirs=3, progress=False)  # 3 inputs have no 20
    assert table.loc[["0", "2"], "local_complexity"].tolist() == pytest.approx(local[["1", "3"]].tolist())


def test_families_side_by_side_are_what_each_gives_alone(model):
    together = table_of(model, metrics=ALL, radius=0.3)
    start = ["modularity", "modularity_std", "null", "null_std", "ceiling", "class_separation"]
    between = [f"{one}_previous{part}" for one in ("gbs", "cka") for part in ("", "_std", "_null")]
    plain = ["features", "isolated", "negative_share"]
    assert set(together) == {*start, *between, *plain, *BIRTHS, *BITS, *TOLD, *LOCAL}
    for metric in ALL:
        alone = table_of(model, metrics=(metric,), radius=0.3)
        pd.testing.assert_frame_equal(alone, together[alone.columns.tolist()])
    backwards = table_of(model, metrics=ALL[::-1], radius=0.3)
    pd.testing.assert_frame_equal(backwards, together, check_like=True)


def test_activations_with_gates_give_the_table_without_local_complexity(model):
    acts = capture(model, (X, Y), [*LAYERS, "gates"], progress=False)
    for seed in (None, 3):
        options = {"n": SIZE, "repeats": 2, "permutations": 3, "seed": seed, "metrics": ALL, "progress": False}
        found = profile_activations(acts, **options)
        expected = table_of(model, metrics=ALL, seed=seed)
        assert "local_complexity" not in found
        pd.testing.assert_frame_equal(found, expected.drop(columns="local_complexity"))


def test_layers_without_maps_or_gates_are_nan(model):
    table = table_of(model, metrics=ALL)
    undefined = table.columns[table.loc["head"].isna()].tolist()
    assert set(undefined) == {*BIRTHS, *BITS[1:], *TOLD, *LOCAL}
    assert table.loc["head", "gates"] == 0
    assert table.loc["block2"].notna().all()


def test_maps_that_are_small_or_not_square_are_nan():
    generator = torch.Generator().manual_seed(0)
    shapes = {"maps": (2, 4, 4), "small": (2, 3, 3), "wide": (2, 4, 5), "tall": (2, 5, 4), "volume": (2, 4, 4, 4)}
    layers = {name: torch.rand(24, *shape, generator=generator) for name, shape in shapes.items()}
    acts = Activations(layers, torch.arange(24) % 2)
    table = profile_activations(acts, n=24, repeats=1, metrics=("feature_entropy",), progress=False)
    assert table["feature_entropy"].notna().tolist() == [True, False, False, False, False]
    assert np.isnan(table.loc["maps", "feature_entropy_std"])  # one set


@pytest.mark.parametrize("seed", [None, 4])
def test_several_passes_give_the_same_table(model, seed):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    expected = table_of(model, metrics=ALL, seed=seed, radius=0.3)
    once = len(calls)
    found = table_of(model, metrics=ALL, seed=seed, radius=0.3, memory=2 * N * 4 * 36 * 4, batch_size=16)
    handle.remove()
    assert len(calls) - once > once
    pd.testing.assert_frame_equal(found, expected)


def test_kinds_of_data_give_the_same_table(model):
    some = ("modularity", "complexity", "spline")
    expected = table_of(model, metrics=some, seed=1, radius=0.3)
    batches = [(X[i : i + 10], Y[i : i + 10]) for i in range(0, N, 10)]
    for data in (batches, (b for b in batches), DataLoader(TensorDataset(X, Y), 10), (X.numpy(), Y.tolist())):
        pd.testing.assert_frame_equal(table_of(model, data, metrics=some, seed=1, radius=0.3), expected)
    unseeded = table_of(model, metrics=("spline",), n=15)
    found = table_of(model, (b for b in batches), metrics=("spline",), n=15)
    pd.testing.assert_frame_equal(found, unseeded)
    assert found.attrs["radius"] == pytest.approx(unseeded.attrs["radius"])


def test_endless_data_are_read_as_far_as_the_sets_reach(model):
    def endless():
        for number in itertools.count():
            if number > 50:
                raise RuntimeError("read on and on")
            yield X[:8], Y[:8]

    assert table_of(model, endless(), n=8, metrics=("complexity",)).attrs["repeats"] == 2
    assert table_of(model, endless(), n=8, metrics=("spline",)).attrs["around"] == 8


def test_forward_is_refused_where_the_model_itself_is_called(model):
    with pytest.raises(ValueError, match="cannot use forward="):
        table_of(model, metrics=("spline",), forward=lambda net, batch: net(100 * batch[0]))


def test_unlabelled_data_have_complexity_and_no_label_columns(model):
    table = table_of(model, X, metrics=("complexity", "spline"))
    assert table.columns.tolist() == ["features", "isolated", "negative_share", *BITS, *LOCAL]
    labelled = table_of(model, metrics=("complexity", "spline"))
    pd.testing.assert_frame_equal(table, labelled[table.columns.tolist()])


def test_spline_alone_needs_no_two_classes(model):
    table = table_of(model, (X, torch.zeros(N, dtype=torch.int64)), metrics=("spline",))
    assert table.columns.tolist() == ["features", "isolated", "negative_share", "gates", *LOCAL]


def test_settings_name_what_was_used(model):
    table = table_of(model, metrics=("complexity", "spline"), lam=0.04, radius=0.2)
    assert table.attrs == {
        "model": "Net", "layers": [*LAYERS, "gates"], "reduce": None, "k": 3, "metric": "cosine", "symmetrize": "mean",
        "n": SIZE, "repeats": 2, "seed": None, "permutations": 3, "lam": 0.04, "radius": 0.2, "around": SIZE,
    }  # fmt: skip
    assert not {"lam", "radius", "around"} & set(table_of(model).attrs)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"metrics": ("feature_entropy",)}, X, "'feature_entropy' needs labels"),
        ({"metrics": ("feature_entropy",), "layers": "head"}, (X, Y), "needs layers with square maps"),
        ({"metrics": ("feature_entropy",), "reduce": "mean"}, (X, Y), "needs layers with square maps.*reduce="),
        ({"metrics": ("complexity", "entropy")}, (X, Y), "metrics must be a sequence.*'complexity', 'spline'.*got"),
        ({"metrics": "complexity"}, (X, Y), "metrics must be a sequence"),
        ({"metrics": ("complexity",), "lam": 0}, (X, Y), "lam must be positive, got 0"),
        ({"metrics": ("complexity",), "lam": -0.1}, (X, Y), "lam must be positive, got -0.1"),
        ({"metrics": ("complexity",), "lam": math.nan}, (X, Y), "lam must be positive, got nan"),
        ({"metrics": ("spline",), "radius": 0.0}, (X, Y), "radius must be positive, got 0"),
        ({"metrics": ("spline",), "radius": -1.0}, (X, Y), "radius must be positive, got -1"),
    ],
)
def test_bad_options_are_refused(model, options, data, message):
    with pytest.raises(ValueError, match=message):
        table_of(model, data, **options)


@pytest.mark.parametrize("metric", ["feature_entropy", "complexity"])
def test_one_sample_of_a_class_in_a_set_is_refused_with_its_name(model, metric):
    names = np.array(["cat", "dog"])[Y]
    names[30] = "owl"
    with pytest.raises(ValueError, match=r"set 1 of 24 samples has one sample of class 'owl'.*larger n"):
        table_of(model, (X, names), metrics=(metric,))
    names[31] = "owl"
    assert table_of(model, (X, names), metrics=(metric,))[metric].notna().any()  # absent from set 0, two in set 1
    names[30:] = "dog"
    with pytest.raises(ValueError, match="set 1 of 24 samples"):
        table_of(model, (X, np.append(names[:47], "emu")), metrics=(metric,))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids):
        return F.relu(self.fc(self.embed(ids).mean(1)))


def test_spline_refuses_inputs_that_are_no_real_numbers():
    ids = torch.randint(0, 9, (24, 5))
    for data in (ids, {"ids": ids}):
        with pytest.raises(ValueError, match="'spline' needs inputs that are tensors of real numbers"):
            table_of(Tokens(), data, layers="fc", n=12, metrics=("spline",))
        assert table_of(Tokens(), data, layers="fc", n=12, metrics=("complexity",)).loc["fc", "gates"] == 4


@pytest.mark.parametrize("metric", ["complexity", "spline"])
def test_missing_gates_are_refused(model, metric):
    acts = capture(model, (X, Y), LAYERS, progress=False)
    with pytest.raises(ValueError, match=r"activations hold no gates.*capture layers and 'gates'"):
        profile_activations(acts, n=SIZE, repeats=2, metrics=(metric,), progress=False)
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh())
    with pytest.raises(ValueError, match=r"no gate in the model"):
        table_of(smooth, layers="leaves", metrics=(metric,))


@pytest.mark.parametrize("layers", ["gates", ["gates:block1.*"]])
def test_gates_without_any_layer_are_refused(model, layers):
    with pytest.raises(ValueError, match=r"layer"):
        table_of(model, layers=layers, metrics=("complexity",))
    with pytest.raises(ValueError, match=r"layer"):
        profile_activations(capture(model, (X, Y), layers, progress=False), n=SIZE, repeats=2, progress=False)


class Called(nn.Module):
    """A plain layer, a block and a ReLU that each run twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(3, 3), nn.ReLU()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x):
        x = self.block(self.block(self.relu(self.fc(x))))
        return self.relu(self.fc(x))


class Rooted(nn.Module):
    """Functions in the root, before the first layer and behind each, one of them with two kinks."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return F.hardtanh(self.b(F.relu6(self.a(F.relu(x)))))


def named(**modules):
    net = nn.Sequential()
    for name, module in modules.items():
        net.add_module(name, module)
    return net


def pair():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())


OWNERS = {
    "relu behind a layer of a plain chain": (mlp, "blocks", {"0": ["1"], "2": ["3"], "4": []}),
    "relu chosen itself": (mlp, ["0", "1", "3"], {"0": [], "1": ["1"], "3": ["3"]}),
    "leaves": (mlp, "leaves", {"0": [], "1": ["1"], "2": [], "3": ["3"], "4": []}),
    "before the first layer": (mlp, "4", {"4": ["1", "3"]}),
    "called twice": (
        Called,
        ["fc", "block"],
        {"fc": ["relu"], "block": ["block.1"], "block#1": ["block.1#1"], "fc#1": ["relu#1"]},
    ),
    "relu called twice and chosen": (Called, "relu", {"relu": ["relu", "block.1", "block.1#1"], "relu#1": ["relu#1"]}),
    "a later call alone": (
        Called,
        ["fc", "block#1"],
        {"fc": ["relu", "block.1"], "block#1": ["block.1#1"], "fc#1": ["relu#1"]},
    ),
    "functions of the root": (
        Rooted,
        ["a", "b"],
        {"a": ["#relu0", "#relu1", "#relu1/upper"], "b": ["#relu2", "#relu2/upper"]},
    ),
    "upper kinks of a chosen module": (
        lambda: named(fc=nn.Linear(3, 3), act=nn.ReLU6()),
        ["fc", "act"],
        {"fc": [], "act": ["act", "act/upper"]},
    ),
    "names that begin alike": (
        lambda: named(b1=pair(), b10=pair(), b1x=nn.ReLU()),
        ["b1", "b10"],
        {"b1": ["b1.1"], "b10": ["b10.1", "b1x"]},
    ),
    "a layer inside a layer": (
        lambda: named(body=nn.Sequential(pair(), pair())),
        ["body", "body.0"],
        {"body.0": ["body.0.1"], "body": ["body.1.1"]},
    ),
}


@pytest.mark.parametrize("case", OWNERS)
def test_each_gate_belongs_to_one_layer(case):
    build, layers, expected = OWNERS[case]
    select = [layers, "gates"] if isinstance(layers, str) else [*layers, "gates"]
    found = families.gates_by_layer(capture(build(), torch.randn(4, 3), select, progress=False))
    assert {layer: [key.removeprefix("gates:") for key in keys] for layer, keys in found.items()} == expected


def test_gates_of_a_net_with_blocks(model):
    found = families.gates_by_layer(capture(model, X[:4], ["stem", *LAYERS, "gates"], progress=False))
    expected = {"stem": GATES["block1"][:1], **GATES, "block1": GATES["block1"][1:]}
    assert found == {layer: [f"gates:{name}" for name in names] for layer, names in expected.items()}


def test_model_comes_out_as_it_went_in(model):
    model.train()
    model.block1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    table = table_of(model, metrics=ALL, radius=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    pd.testing.assert_frame_equal(table, table_of(model.eval(), metrics=ALL, radius=0.3))


@pytest.mark.parametrize("metric", ["complexity", "spline"])
def test_random_state_is_kept_where_a_loader_is_read(model, metric):
    state = torch.get_rng_state()
    table_of(model, DataLoader(TensorDataset(X, Y), 10), metrics=(metric,))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_that_shuffles_is_refused_where_it_is_read_twice(model):
    """Local complexity would stand beside regions of other samples."""
    loader = DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    table_of(model, loader, n=8, metrics=("complexity",))
    with pytest.raises(ValueError, match=r"other samples .* shuffle"):
        table_of(model, loader, n=8, metrics=("spline",))


def test_a_wrapper_in_train_mode_is_looked_through(model):
    expected = table_of(model, metrics=("spline",))
    pd.testing.assert_frame_equal(table_of(nn.DataParallel(model), metrics=("spline",)), expected)


def test_negative_maps_warn_once_at_the_line_of_the_call(model):
    line = inspect.currentframe().f_lineno + 2
    with pytest.warns(UserWarning, match=r"negative values in stem, block1\.two: feature entropy") as caught:
        profile(model, (X, Y), layers=["stem", "block1.two", "block1"], n=SIZE, metrics=ALL, repeats=2, progress=False)
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
    acts = capture(model, (X, Y), ["stem", "block1"], progress=False)
    line = inspect.currentframe().f_lineno + 2
    with pytest.warns(UserWarning, match="negative values in stem: feature entropy") as caught:
        profile_activations(acts, n=SIZE, repeats=2, metrics=("feature_entropy",), progress=False)
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
