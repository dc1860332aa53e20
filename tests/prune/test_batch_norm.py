"""Batch norm's statistics anew: those computed by hand, and nothing else changes."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from repgraph.demo import digits
from repgraph.demo.network import DigitsResNet
from repgraph.prune import reestimate_batch_norm_

pytestmark = pytest.mark.usefixtures("one_thread")

X = digits("train")[0][:64]


def network(blocks=(2, 3, 3)):
    torch.manual_seed(0)
    return DigitsResNet(blocks).eval()


def out(model, x):
    with torch.no_grad():
        return model(x)


def norms(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_the_plain_mean_of_those_of_the_batches(momentum):
    model = network((1, 2, 1))
    for norm in norms(model).values():
        norm.momentum = momentum
    sums = {name: [0, 0] for name in norms(model)}
    byhand = deepcopy(model).train()
    handles = []
    for name, norm in norms(byhand).items():

        def see(_, args, name=name):
            rows = args[0].movedim(1, -1).flatten(0, -2)
            sums[name] = [a + b for a, b in zip(sums[name], (rows.mean(0), rows.var(0)), strict=True)]

        handles.append(norm.register_forward_pre_hook(see))
    batches = [X[:30], X[30:60], X[60:]]
    for batch in batches:
        out(byhand, batch)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert reestimate_batch_norm_(model, batches, progress=False) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    for name, norm in norms(model).items():
        torch.testing.assert_close(norm.running_mean, sums[name][0] / 3)
        torch.testing.assert_close(norm.running_var, sums[name][1] / 3)
        assert (norm.momentum, int(norm.num_batches_tracked)) == (momentum, 3)


class Odd(nn.Module):
    """Beside batch norm: dropout, a norm of instances with running statistics, spectral norm, a frozen mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3))
        self.bn = nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.plain(self.instance(self.drop(self.bn(self.conv(x)))))


def test_nothing_but_batch_norm_changes():
    torch.manual_seed(0)
    model = Odd().eval()
    model.drop.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    reestimate_batch_norm_(model, X, progress=False)
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert modes == [module.training for module in model.modules()]
    assert changed == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


def test_input_kinds_and_wrapped_models():
    expected = network((1, 1, 1))
    reestimate_batch_norm_(expected, X, batch_size=32, progress=False)
    y = torch.zeros(64)
    for data in ((X, y), [(X[:32], y[:32]), (X[32:], y[32:])], iter(X.split(32)), X.double().numpy()):
        model = nn.DataParallel(network((1, 1, 1)))
        reestimate_batch_norm_(model, data, batch_size=32, progress=False)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(model.module.state_dict()[name], value)
    first = network((1, 1, 1))
    reestimate_batch_norm_(first, X, samples=32, progress=False)
    other = network((1, 1, 1))
    reestimate_batch_norm_(other, X[:32], progress=False)
    assert torch.equal(first.bn1.running_mean, other.bn1.running_mean)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([X[:10], X[10:11]], "at least 2 samples, got 1"),
        ([X[:10], X[:10, :, :, :2], X[:10].expand(-1, 2, -1, -1)], None),
    ],
)
def test_refusals_leave_the_model_as_it_was(data, message):
    model = network((1, 1, 1))
    model.layer1.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises((ValueError, RuntimeError), match=message):
        reestimate_batch_norm_(model, data, progress=False)
    assert modes == [module.training for module in model.modules()]
    assert {norm.momentum for norm in norms(model).values()} == {0.1}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_without_batch_norm_nothing_happens():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    before = deepcopy(model.state_dict())
    reestimate_batch_norm_(model, torch.randn(5, 4), progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
