"""Taylor scores by hand, against gradients of one sample at a time, finite differences and Torch-Pruning; no trace."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repgraph.scores.taylor import taylor_by_sample, taylor_scores

pytestmark = pytest.mark.usefixtures("one_thread")

generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(10, 4, 6, 6, generator=generator), torch.arange(10) * 7 % 3


class Net(nn.Module):
    """Everything that must not matter: groups, transposed, biases, in-place, a layer that runs twice, dropout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.bn = nn.BatchNorm2d(6)
        self.twice = nn.Conv2d(6, 6, 3, padding="same", padding_mode="reflect")
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.drop = nn.Dropout(0.5)
        self.token = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3, bias=False)
        self.idle = nn.Conv2d(1, 1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = self.relu(self.stem(x))
        x = self.relu(self.bn(self.twice(self.twice(x))))
        x = self.drop(self.relu(self.up(x)))
        x = self.token(x.flatten(2).mT).tanh().mean(1)
        return self.head(x), x


def net():
    torch.manual_seed(0)
    model = Net().double()
    for tensor in model.bn.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model.eval()


def scores_of(model, data, layers=None, **options):
    return taylor_scores(model, data, layers, progress=False, **options)


LAYERS = ["stem", "twice", "up", "token", "head"]
OUT_AXIS = {"up": 1}


def by_loop(model, x, y):
    """Gradients of the parameters for one sample at a time."""
    rows = {name: [] for name in LAYERS}
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1].double())[0], y[i : i + 1]).backward()
        for name in LAYERS:
            w = model.get_submodule(name).weight
            part = (w * w.grad).detach()
            if name == "up":  # (in, out / groups, ...): the inputs of either group make two of the outputs
                part = torch.cat([half.transpose(0, 1) for half in part.chunk(2)])
            rows[name].append(part.flatten(1).sum(1).square())
    model.zero_grad()
    return {name: torch.stack(values) for name, values in rows.items()}


# Values


def test_by_hand():
    """y = w x, loss (y - t)^2: w dL/dw = 2 (y - t) w x."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False)).double()
    model[0].weight.data = torch.tensor([[3.0], [1]]).double()
    x = torch.tensor([[1.0], [2]])
    loss = lambda y, t: (y - 1).square().sum(1).mean()  # noqa: E731
    found = taylor_by_sample(model, x, "0", loss=loss, progress=False)["0"]
    assert found.tolist() == [[(2 * 2 * 3) ** 2, 0], [(2 * 5 * 6) ** 2, (2 * 1 * 2) ** 2]]
    assert scores_of(model, x, "0", loss=loss)["0"].tolist() == [(144 + 3600) / 2, 8]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_parity_with_gradients_of_one_sample_at_a_time(batch_size):
    expected = by_loop(net(), X, Y)
    found = taylor_by_sample(net(), (X, Y), LAYERS, batch_size=batch_size, progress=False)
    means = scores_of(net(), (X, Y), LAYERS, batch_size=batch_size)
    for name in LAYERS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(means[name], expected[name].mean(0), rtol=1e-6, atol=1e-12)
        assert (found[name].dtype, found[name].requires_grad) == (torch.float64, False)


def test_finite_differences_of_a_factor_on_the_filter():
    model, step = net(), 1e-5
    found = taylor_by_sample(model, (X, Y), "stem", progress=False)["stem"]
    for channel in range(6):
        losses = []
        for factor in (1 + step, 1 - step):
            with torch.no_grad():
                kept = model.stem.weight[channel].clone()
                model.stem.weight[channel] *= factor
                losses.append(F.cross_entropy(model(X.double())[0], Y, reduction="none"))
                model.stem.weight[channel] = kept
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(found[:, channel], slope.square(), rtol=1e-4, atol=1e-9)


def test_parity_with_torch_pruning():
    """Theirs is |sum w dL/dw| of the gradients that lie in .grad: the same for one sample, but for the square."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3), nn.Flatten(), nn.Linear(180, 3))
    model = model.double().eval()
    importance = tp.importance.TaylorImportance(multivariable=True, group_reduction="first", normalizer=None)
    found = scores_of(model, (X, Y), ["0", "2"])
    theirs = {name: torch.zeros_like(scores) for name, scores in found.items()}
    for i in range(len(X)):
        model.zero_grad()
        F.cross_entropy(model(X[i : i + 1].double()), Y[i : i + 1]).backward()
        graph = tp.DependencyGraph().build_dependency(model, X[:1].double())
        for name, total in theirs.items():
            layer, channels = model.get_submodule(name), list(range(len(total)))
            total += importance(graph.get_pruning_group(layer, tp.prune_conv_out_channels, channels)) ** 2 / len(X)
    for name, scores in found.items():
        torch.testing.assert_close(scores, theirs[name], rtol=1e-5, atol=1e-12)


@settings(max_examples=5)
@given(st.floats(0.1, 10), st.integers(0, 5))
def test_loss_scales_and_a_filter_that_nothing_reads(factor, channel):
    model = net()
    model.twice.weight.data[:, channel] = 0
    whole = scores_of(model, (X, Y))
    scaled = scores_of(model, (X, Y), loss=lambda out, y: factor * F.cross_entropy(out[0], y))
    assert whole["stem"][channel] == 0
    assert (whole["stem"] > 0).sum() == 5
    torch.testing.assert_close(scaled["stem"], factor**2 * whole["stem"])


def test_it_is_not_the_gradient_of_the_mean():
    """Two samples that pull a filter in opposite directions: it matters to both."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    model[0].weight.data[:] = 1
    loss = lambda y, _: (y[:, 0] * y.new_tensor([1, -1])).mean()  # noqa: E731
    assert scores_of(model, torch.ones(2, 1), "0", loss=loss)["0"].tolist() == [1]


# Data


def test_every_form_of_data_labels_and_loss():
    expected = scores_of(net(), (X, Y))
    forms = [
        ((X, torch.zeros(10).long()), {"labels": Y}),
        (X, {"labels": Y.tolist()}),
        (X.numpy(), {"labels": Y.numpy()}),
        (DataLoader(TensorDataset(X, Y), 3), {}),
        (iter([(X[:4], Y[:4]), (X[4:], Y[4:])]), {}),
        ({"x": X, "labels": Y}, {}),
        ((X, Y), {"loss": lambda out, y: F.cross_entropy(out[0], y)}),
        (X, {"loss": lambda out, y: F.cross_entropy(out[0], Y), "labels": None}),
    ]
    for data, options in forms:
        found = scores_of(net(), data, **options)
        assert list(found) == ["stem", "twice", "up"]  # not the one that does not run
        for name, scores in found.items():
            torch.testing.assert_close(scores, expected[name], rtol=1e-6, atol=1e-14)


def test_samples():
    expected = taylor_by_sample(net(), (X, Y), "up", progress=False)["up"]
    for samples, rows in ((3, [0, 1, 2]), ([8, 1], [1, 8])):
        found = taylor_by_sample(net(), (X, Y), "up", samples=samples, batch_size=2, progress=False)["up"]
        torch.testing.assert_close(found, expected[rows])


# No trace


def boom(output, labels):
    raise ZeroDivisionError


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("loss", [None, boom])
@pytest.mark.parametrize("frozen", [False, True])
def test_model_is_untouched(context, loss, frozen):
    model = net().train()
    model.bn.eval()
    model.stem.weight.requires_grad_(False)
    model.requires_grad_(model.stem.weight.requires_grad if frozen else True)
    model.head.weight.grad = torch.full((3, 5), 7.0).double()

    def snapshot():
        return (
            {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
            {name: id(p.grad) for name, p in model.named_parameters() if p.grad is not None},
            {name: value.tolist() for name, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
            (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),  # noqa: NPY002
        )

    expected, before = scores_of(net(), (X, Y)), snapshot()
    with context():
        inside = torch.is_grad_enabled()
        if loss is None:
            torch.testing.assert_close(scores_of(model, (X, Y)), expected)
        else:
            with pytest.raises(ZeroDivisionError):
                scores_of(model, (X, Y), loss=loss)
        assert torch.is_grad_enabled() == inside
    assert snapshot() == before
    assert model.head.weight.grad.tolist() == [[7.0] * 5] * 3


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": X}, "data must have labels"),
        ({"labels": Y[:4]}, "labels must have one entry per sample: expected 10, got 4"),
        ({"labels": Y + 1}, "labels must be integers from 0 to 2"),
        ({"labels": Y - 1}, "labels must be integers from 0 to 2"),
        ({"labels": Y.double()}, "labels must be integers"),
        ({"labels": ["a"] * 10}, "labels must be integers"),
        ({"loss": lambda out, y: F.cross_entropy(out[0], y, reduction="none")}, "loss must give one finite number"),
        ({"loss": lambda out, y: out[0].sum() * torch.nan}, "loss must give one finite number"),
        ({"loss": lambda out, y: 1.0}, "loss must give one finite number"),
        ({"loss": lambda out, y: torch.tensor(1.0)}, "the loss does not depend on layer 'stem'"),
        ({"layers": ["stem", "idle"]}, "the loss does not depend on layer 'idle'"),
        ({"layers": "bn"}, "layer 'bn' must be a convolution or a linear layer, got BatchNorm2d"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        scores_of(net(), **{"data": (X, Y), **options})


def test_outputs_that_are_no_class_scores_or_no_batch():
    model = nn.Sequential(nn.Conv2d(4, 3, 3))
    with pytest.raises(ValueError, match=r"one row of class scores per sample, or pass loss=; got \(10, 3, 4, 4\)"):
        scores_of(model, (X, Y))
    folded = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 2), nn.Unflatten(0, (10, 4)), nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(ValueError, match=r"layer '1' gives shape \(40, 6, 2\) for a batch of 10 samples"):
        scores_of(folded, (X, Y), ["1"])
