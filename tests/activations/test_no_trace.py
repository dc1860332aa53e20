"""A model that went in comes out untouched, also after an exception."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from repgraph import capture, layer_names, profile, stream
from repgraph.activations.forward import kept_random_state

N, BATCH = 20, 6
X = torch.randn(N, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 2
HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


class Model(nn.Module):
    """Everything that could be left changed: modes, running statistics, counters, flags, hooks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.frozen_bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("nothing", None)
        self.register_buffer("unsaved", torch.full((2,), torch.nan), persistent=False)
        self.seen_by_hook = []

    def train(self, mode=True):
        raise AssertionError("train() may do more than set the mode: it is not for capture to call")

    def forward(self, x):
        self.calls += 1  # in place
        self.nothing = x.mean()
        self.unsaved = self.unsaved + 1  # a new tensor
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        if (x > 90).any():
            raise KeyboardInterrupt if (x > 900).any() else ZeroDivisionError("in forward")
        x = self.drop(self.relu(self.frozen_bn(self.bn(self.conv(x)))).mean((2, 3)))
        self.seen.mul_(0).add_(x.mean(0))
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model()
    model.frozen_bn.training = model.head.training = False
    model.bn.running_mean.normal_()
    model.conv.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones(2, 4)
    model.conv.register_forward_hook(lambda module, args, output: model.seen_by_hook.append(len(output)))
    model.conv.register_forward_hook(lambda module, args, kwargs, output: None, with_kwargs=True, always_call=True)
    model.conv.register_forward_pre_hook(lambda module, args: None)
    model.head.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    model.register_state_dict_post_hook(lambda *args: None)
    return model


def snapshot(model):
    """All that must be as before, by identity where others may hold on to it."""
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": {name: m.training for name, m in modules.items()},
        "hooks": {(name, kind): list(getattr(m, kind).items()) for name, m in modules.items() for kind in HOOKS
                  if hasattr(getattr(m, kind), "items")},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "objects": {name: (id(t), t.data_ptr(), type(t)) for name, t in tensors.items()},
        "buffers": {name: list(m._buffers) for name, m in modules.items()},
        "values": {name: t.detach().numpy().tobytes() for name, t in tensors.items()},
        "state": list(model.state_dict()),
        "flags": {name: (t.requires_grad, None if t.grad is None else t.grad.tolist()) for name, t in tensors.items()},
        "random": (
            torch.get_rng_state().tolist(),
            torch.initial_seed(),
            str(np.random.get_state()),  # noqa: NPY002
            random.getstate(),
        ),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }  # fmt: skip


def several_passes(model, x):
    acts = capture(model, (x, Y), "leaves", batch_size=BATCH, memory=N * 4 * 16 * 4, progress=False)
    assert "passes" in repr(acts)
    for name in reversed(list(acts)):
        acts[name]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "acts"


JOBS = {
    "capture": lambda m, x, f: capture(m, (x, Y), "leaves", batch_size=BATCH, progress=False),
    "capture to a folder": lambda m, x, f: capture(m, (x, Y), "leaves", batch_size=BATCH, folder=f, progress=False),
    "several passes": lambda m, x, f: several_passes(m, x),
    "stream": lambda m, x, f: stream(m, (x, Y), lambda t: t.relu(), "leaves", batch_size=BATCH, progress=False),
    "profile": lambda m, x, f: profile(
        m, (x, Y), layers="leaves", n=10, repeats=2, batch_size=BATCH, progress=False
    ),
    "profile with a seed": lambda m, x, f: profile(
        m, x, layers="leaves", n=10, repeats=2, seed=1, batch_size=BATCH, progress=False
    ),
    "shuffling loader": lambda m, x, f: capture(
        m, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, Y), BATCH, shuffle=True), progress=False
    ),
    "layer_names": lambda m, x, f: layer_names(m, "leaves"),
    "layer_names with data": lambda m, x, f: layer_names(m, "leaves", (x, Y)),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_nothing_is_left_behind(model, folder, job):
    before = snapshot(model)
    JOBS[job](model, X, folder)
    assert snapshot(model) == before


READING_ALL = [job for job in JOBS if "layer_names" not in job]


@pytest.mark.parametrize(
    ("job", "row"),
    [*((job, row) for job in READING_ALL for row in (0, N - 1)), ("layer_names with data", 0)],
)
@pytest.mark.parametrize(("value", "error"), [(100, ZeroDivisionError), (1000, KeyboardInterrupt)])
def test_nothing_is_left_behind_after_an_error_in_forward(model, folder, job, row, value, error):
    x, before = X.clone(), snapshot(model)
    x[row] = value
    with pytest.raises(error):
        JOBS[job](model, x, folder)
    assert snapshot(model) == before


def fail(*args):
    raise ZeroDivisionError("in a function of the user's")


def batches():
    yield X[:BATCH], Y[:BATCH]
    fail()


FAILING = {
    "reduce": lambda m: capture(m, X, reduce=fail, progress=False),
    "forward": lambda m: capture(m, X, forward=fail, progress=False),
    "f": lambda m: stream(m, X, fail, progress=False),
    "predicate": lambda m: capture(m, X, fail, progress=False),
    "data": lambda m: capture(m, batches(), progress=False),
    "loader": lambda m: capture(m, torch.utils.data.DataLoader(list(batches()), batch_size=None), progress=False),
}


@pytest.mark.parametrize("what", FAILING)
def test_nothing_is_left_behind_after_an_error_in_the_users_functions(model, what):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        FAILING[what](model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "options",
    [{"layers": "head#7"}, {"labels": [0]}, {"memory": 10}, {"layers": ["conv", "nothing"]}, {"sample_ids": [0] * N}],
    ids=str,
)
def test_nothing_is_left_behind_after_a_refusal(model, options):
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer|labels|memory|sample_ids"):
        capture(model, X, progress=False, **options)
    assert snapshot(model) == before


def test_nothing_is_left_behind_in_the_modes_of_torch(model):
    with torch.inference_mode():
        capture(model, X, progress=False)
        assert torch.is_inference_mode_enabled()
    before = snapshot(model)
    assert before["grad mode"] == (True, False)


def test_hooks_of_the_users_own_still_run_and_count(model):
    model.conv.register_forward_hook(lambda module, args, output: 2 * output)
    acts = capture(model, X, "conv", progress=False)
    torch.testing.assert_close(acts["conv"], 2 * nn.functional.conv2d(X, model.conv.weight, model.conv.bias).detach())
    assert set(model.seen_by_hook) == {N}


def test_gradients_flow_as_before(model):
    capture(model, X, progress=False)
    model(X).sum().backward()
    assert model.conv.bias.grad is not None
    assert model.conv.weight.grad is None


def test_tensors_that_forward_caches_are_real_ones():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 4), None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.full((4,), 3.0)
            return self.fc(x) * self.scale

    model, x = Cached(), torch.ones(2, 4)
    assert layer_names(model) == ["fc"]
    assert torch.equal(model(x), model.fc(x) * 3)


def test_layers_that_are_not_made_yet_stay_so():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConv2d(5, 3))
    layer_names(model)
    assert model(X).shape == (N, 5, 2, 2)


def test_capture_of_layers_that_are_not_made_yet_is_refused():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConv2d(5, 3))
    with pytest.raises(ValueError, match=r"(?i)lazy|initiali"):
        capture(model, X, progress=False)
    assert type(model[0]) is nn.LazyConv2d


def test_random_states_are_kept():
    torch.manual_seed(3)
    before = (torch.initial_seed(), torch.rand(2).tolist())
    torch.manual_seed(3)
    with kept_random_state():
        torch.manual_seed(8), np.random.seed(8), random.seed(8)  # noqa: NPY002
    assert (torch.initial_seed(), torch.rand(2).tolist()) == before
