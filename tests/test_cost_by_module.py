"""Cost of every module, forms of models and examples, no trace, refusals and results."""

import copy

import pytest
import torch
from cost_networks import (
    COLUMNS,
    SelfAttention,
    Tied,
    Toy,
    bert,
    images,
    llama,
    random,
    tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from repgraph.cost import Cost, Latency, cost_by_module, latency, model_cost

pytestmark = pytest.mark.usefixtures("one_thread")

torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

# By module


def test_table():
    table = cost_by_module(Toy(), images(2))
    names = ["", "stem", "bn", "b1", *(f"b1.{n}" for n in ("conv1", "bn1", "conv2", "bn2", "short")), "b2"]
    names += [f"b2.{n}" for n in ("conv1", "bn1", "conv2", "bn2", "short", "short.0", "short.1")] + ["fc"]
    assert (list(table.index), list(table), table.index.name) == (names, COLUMNS, "module")
    assert (table.dtypes == "int64").all()
    assert (table["calls"] == 1).all()
    assert table.attrs == {"example": (2, 3, 16, 16), "dtype": "float32"}
    cost = model_cost(Toy(), images(2))
    assert tuple(table.loc["", COLUMNS[1:]]) == (cost.macs, cost.parameters, cost.activation_bytes)
    assert table.loc["b2.short"].tolist() == [1, 2 * 8 * 16 * 64, 128 + 32, 2 * 2 * 4 * 16 * 64]


@pytest.mark.parametrize("make", [Toy, lambda: torchvision.models.resnet18(weights=None)])
def test_a_parent_is_the_sum_of_what_is_inside_and_its_own(make):
    model = make()
    table = cost_by_module(model, images(1, 32))
    for name, module in model.named_modules():
        children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        if children:
            inside = table.loc[[child for child in children if child in table.index]].sum()
            assert (inside["macs"], inside["parameters"]) == (table.loc[name, "macs"], table.loc[name, "parameters"])
            assert inside["activation_bytes"] <= table.loc[name, "activation_bytes"]


def without(model, name):
    model = copy.deepcopy(model)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model


class Looped(nn.Module):
    """A module that runs three times, one under two names, one that never runs, a list, and parts called past it."""

    def __init__(self):
        super().__init__()
        self.loop, self.twin = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)
        self.same = nn.Sequential(self.twin, nn.Tanh())
        self.idle = nn.Linear(9, 9)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.bypassed = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        for _ in range(3):
            x = self.loop(x)
        x = self.same(self.twin(x))
        for layer in self.layers:
            x = layer(x)
        return x + (self.bypassed[0](x) if isinstance(self.bypassed, nn.Sequential) else 0)


def test_modules_that_run_several_times_or_never():
    table = cost_by_module(Looped(), random(5, 4))
    linear = 5 * 16
    expected = {
        "": (1, 7 * linear, 4 * 20 + 90), "loop": (3, 3 * linear, 20), "loop.0": (3, 3 * linear, 20),
        "loop.1": (3, 0, 0), "twin": (2, 2 * linear, 20), "same": (1, linear, 0), "same.1": (1, 0, 0),
        "idle": (0, 0, 90), "layers": (0, linear, 20), "layers.0": (1, linear, 20), "layers.1": (1, 0, 0),
        "bypassed": (0, linear, 20), "bypassed.0": (1, linear, 20),
    }  # fmt: skip
    assert {name: tuple(row) for name, row in table[COLUMNS[:3]].iterrows()} == expected


PREDICTED = {
    "toy": (Toy, images(2), ["b1", "b2.bn1", "b1.conv2", "bn", "b1.short"]),
    "tied": (Tied, torch.zeros(2, 6, dtype=torch.long), ["inner"]),
    "looped": (Looped, random(5, 4), ["loop", "loop.0", "same", "idle", "bypassed.0"]),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)),
        random(3, 4),
        ["0"],
    ),
    "spectral norm, by a hook": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)),
        random(3, 4),
        ["0"],
    ),
    "resnet18": (
        lambda: torchvision.models.resnet18(weights=None),
        images(1, 32),
        ["layer1.1", "layer3.1", "layer4.1.relu", "layer2.0.bn2"],
    ),
    "bert": (lambda: bert("sdpa")[0], tokens(), ["encoder.layer.0.intermediate.intermediate_act_fn", "pooler.dense"]),
}


@pytest.mark.parametrize("what", PREDICTED)
def test_a_row_predicts_what_dropping_the_module_saves(what):
    make, x, names = PREDICTED[what]
    model = make()
    table = cost_by_module(model, x)
    for name in names:
        left = model_cost(without(model, name), x)
        saved = table.loc[""] - table.loc[name]
        assert (left.macs, left.parameters, left.activation_bytes) == tuple(saved[COLUMNS[1:]]), name


@given(st.integers(1, 6))
def test_batches_scale(n):
    one, many = cost_by_module(Toy(), images(1)), cost_by_module(Toy(), images(n))
    assert (many[["macs", "activation_bytes"]] == n * one[["macs", "activation_bytes"]]).all(axis=None)
    assert (many[["calls", "parameters"]] == one[["calls", "parameters"]]).all(axis=None)


def test_scripted_parts_count_where_they_are_held():
    model = nn.Sequential(nn.Sequential(torch.jit.script(nn.Linear(4, 4))), nn.Linear(4, 2))
    table = cost_by_module(model, random(3, 4))
    assert table["macs"].to_dict() == {"": 3 * 24, "0": 3 * 16, "1": 3 * 8}
    assert table["parameters"].to_dict() == {"": 30, "0": 20, "1": 10}


# Forms of models and examples


def test_forms_of_an_example():
    x, labels, expected = images(3), torch.arange(3), model_cost(Toy(), images(3))
    for example in ((x, labels), [(x, labels), (x, labels)], x.numpy(), x.double(), {"x": x, "labels": labels}):
        assert model_cost(Toy(), example) == expected
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat((x, x)), labels.repeat(2)), 3)
    assert model_cost(Toy(), loader) == expected


def test_wrapped_models_are_read_inside():
    expected = cost_by_module(Toy(), images())
    for model in (nn.DataParallel(Toy()), torch.compile(Toy(), backend="eager")):
        assert cost_by_module(model, images()).equals(expected)


def test_parts_that_are_compiled_are_counted():
    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 2))
    model(random(3, 4))
    assert model_cost(model, random(3, 4)).macs == 3 * 24


NETWORKS = {
    "toy": (Toy, lambda: (images(2), torch.arange(2))),
    "attention": (lambda: SelfAttention(False), lambda: random(2, 5, 12)),
    "encoder": (lambda: nn.TransformerEncoderLayer(12, 3, 20), lambda: random(2, 5, 12)),
    "looped": (Looped, lambda: random(5, 4)),
    "tied": (Tied, lambda: torch.zeros(2, 6, dtype=torch.long)),
    "lstm": (lambda: nn.LSTM(3, 4, 2, bidirectional=True), lambda: random(5, 2, 3)),
    "bert": (lambda: bert("sdpa")[0], tokens),
    "llama": (lambda: llama("sdpa")[0], tokens),
    "llama, eager": (lambda: llama("eager")[0], tokens),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_without_data_the_counts_are_the_same(what):
    make, data = NETWORKS[what]
    own_ways = what.startswith(("bert", "llama"))  # they build their masks in another way without data
    columns = COLUMNS[:3] if own_ways else COLUMNS
    real = cost_by_module(make(), data())[columns]

    def state(model):
        return {name: (id(t), t.device) for name, t in model.state_dict(keep_vars=True).items()}, model.training

    def same(model, example):
        before = state(model)
        assert cost_by_module(model, example)[columns].equals(real)
        assert state(model) == before

    meta = tree_map(lambda t: t.to("meta"), data())
    with torch.device("meta"):
        model = make()
    same(model, meta)
    same(model, data())
    same(make(), meta)
    for device in ("cpu", "cuda") if what != "lstm" else ("cpu",):  # which asks the driver
        with FakeTensorMode(), torch.device(device):
            model, x = make(), data()
            same(model, x)
        same(model, x)


# No trace


class Unsteady(nn.Module):
    """Everything that could be left changed; fails on inputs above 90."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.bn.training = False

    def forward(self, x):
        self.calls += 1
        self.new = torch.rand(1)
        if (x > 90).any():
            raise ZeroDivisionError("in forward")
        return self.drop(self.bn(self.fc(x.abs_())))


def snapshot(model):
    hooks = [name for name in vars(nn.Module()) if "hook" in name]
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": [list(getattr(m, kind)) for m in model.modules() for kind in hooks if getattr(m, kind) is not None],
        "tensors": [(id(t), t.tolist()) for t in (*model.parameters(), *model.buffers())],
        "random": torch.get_rng_state().tolist(),
        "fused": torch.backends.mha.get_fastpath_enabled(),
        "grad": (torch.is_grad_enabled(), [p.requires_grad for p in model.parameters()]),
        "threads": torch.get_num_threads(),
        "modules": torch.utils._python_dispatch._len_torch_dispatch_stack(),
    }


JOBS = {
    "model_cost": model_cost,
    "cost_by_module": cost_by_module,
    "latency": lambda model, x: latency(model, x, seconds=0.001),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("job", JOBS)
def test_nothing_is_left_behind(job, fused):
    model, x = Unsteady(), random(3, 4)
    model.fc.register_forward_hook(lambda *_: None)
    before_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        before, given_x = snapshot(model), x.clone()
        JOBS[job](model, x)
        assert snapshot(model) == before
        assert torch.equal(x, given_x)
        with pytest.raises(ZeroDivisionError):
            JOBS[job](model, x + 100)
        assert snapshot(model) == before
    finally:
        torch.backends.mha.set_fastpath_enabled(before_fused)


def test_the_error_of_a_model_tells_the_shape():
    with pytest.raises(RuntimeError) as caught:
        model_cost(Toy(), torch.zeros(2, 5, 8, 8))
    assert caught.value.__notes__ == ["repgraph: example of shape (2, 5, 8, 8)"]


# Refusals


@pytest.mark.parametrize("job", JOBS)
def test_refusals(job):
    run = JOBS[job]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        run(lambda x: x, images())
    for example in ("text", 3, {"x": "text"}, [], ()):
        with pytest.raises(TypeError, match=r"example must be one batch: a tensor, .* got \w+"):
            run(Toy(), example)
    with pytest.raises(ValueError, match="scripted"):
        run(torch.jit.script(nn.Linear(3, 2)), random(1, 3))
    for lazy, name in ((nn.LazyLinear(3), "0.weight"), (nn.LazyBatchNorm1d(affine=False), "0.running_mean")):
        with pytest.raises(ValueError, match=f"no lazy parameters, got '{name}' without a shape"):
            run(nn.Sequential(lazy), random(2, 3))


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_no_time(seconds):
    with pytest.raises(ValueError, match=f"seconds must be a positive number, got {seconds}"):
        latency(Toy(), images(), seconds=seconds)


def test_no_latency_without_data():
    with pytest.raises(ValueError, match="must hold data"):
        latency(Toy().to("meta"), images(), seconds=0.01)


# Results


def test_cost_prints_itself():
    cost = Cost(macs=579_664, parameters=5_181, activation_bytes=2_500_000)
    assert repr(cost) == "Cost(579,664 MACs, 5,181 parameters, 2.5 MB activations)"
    assert all(f"<td>{value}</td>" in cost._repr_html_() for value in ("579,664", "5,181", "2.5 MB"))
    assert cost == copy.deepcopy(cost)
    with pytest.raises(AttributeError):
        cost.macs = 1


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["eager", "compiled"])
def test_latency(wrap):
    found = latency(wrap(Toy()), (images(), torch.zeros(1)), seconds=0.02)
    assert 0 < found.lower <= found.median <= found.upper < 60
    assert found.runs >= 3
    assert (found.threads, found.device) == (torch.get_num_threads(), "cpu")


def test_latency_prints_itself():
    found = Latency(median=0.00123456, lower=0.0012, upper=0.0013, runs=1812, threads=1, device="cpu")
    assert repr(found) == "Latency(1.235 ms, quartiles 1.2 to 1.3 ms, 1,812 runs, cpu, 1 thread)"
    assert "4 threads" in repr(Latency(median=1, lower=1, upper=1, runs=1, threads=4, device="cuda:0"))
