"""What follows each layer: norms, activations, forks, in place, as functions, several calls."""

import pytest
import torch
from small_networks import Wired as Net
from torch import nn
from torch.nn import functional as F

from repgraph.demo import digits, digits_resnet
from repgraph.surgery.channels import output_channels

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(before=3, after=4):
    return nn.Conv2d(before, after, 3, 1, 1)


ACTIVATIONS = {
    "relu": (nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), lambda x: x.relu_(), nn.ReLU(inplace=True)),
    "hardtanh": (nn.ReLU6(), F.relu6, nn.ReLU6(inplace=True), nn.Hardtanh(-1, 2)),
    "leaky_relu": (nn.LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.3), nn.LeakyReLU(0.1, inplace=True)),
    "gelu": (nn.GELU(), nn.GELU("tanh"), F.gelu),
    "silu": (nn.SiLU(), F.silu),
    "hardswish": (nn.Hardswish(), nn.Hardswish(inplace=True)),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid),
    "tanh": (nn.Tanh(), torch.tanh),
    "elu": (nn.ELU(0.5), nn.ELU(0.5, inplace=True)),
    "mish": (nn.Mish(),),
    "softplus": (nn.Softplus(2.0),),
}


@pytest.mark.parametrize(("name", "f"), [(name, f) for name, own in ACTIVATIONS.items() for f in own])
@pytest.mark.parametrize("norm", [False, True])
def test_activations_by_name_and_as_functions(name, f, norm):
    model = Net(lambda net, x: net.last(f(net.norm(net.a(x)))), a=conv(), norm=nn.BatchNorm2d(4), last=conv(4, 2))
    if not norm:
        model.norm = nn.Identity()
    found = output_channels(model.eval(), X)["a"]
    assert (found.norm, found.activation, found.axis) == ("norm" if norm else None, name, 1)
    z = torch.randn(3, 4)
    kept = z.clone()
    torch.testing.assert_close(found.activate(z), f(z.clone()))
    assert torch.equal(z, kept)  # never in place


FORKS = {  # what is done with the layer -> its norm and activation
    "nothing": (lambda net, x: net.last(net.a(x)), None, None),
    "norm alone": (lambda net, x: net.last(net.norm(net.a(x))), "norm", None),
    "norm and a second reader": (lambda net, x: net.last(net.norm(y := net.a(x)) + y), None, None),
    "norm, then two readers": (lambda net, x: net.last(F.relu(y := net.norm(net.a(x))) + y), "norm", None),
    "activation and a second reader": (lambda net, x: net.last(F.relu(y := net.a(x)) + y), None, None),
    "activation, then norm": (lambda net, x: net.last(net.norm(F.relu(net.a(x)))), None, "relu"),
    "a sum first": (lambda net, x: net.last(F.relu(net.norm(net.a(x)) + 1)), "norm", None),
    "a pool first": (lambda net, x: net.last(F.relu(F.max_pool2d(net.a(x), 2))), None, None),
    "two norms": (lambda net, x: net.last(net.norm(net.a(x)) + net.norm(net.a(x))), "norm", None),
    "dropout in eval mode": (lambda net, x: net.last(F.relu(F.dropout(net.a(x), training=net.training))), None, "relu"),
    "group norm": (lambda net, x: net.last(F.relu(F.group_norm(net.a(x), 2))), None, None),
}


@pytest.mark.parametrize("name", FORKS)
def test_only_what_alone_follows_counts(name):
    run, norm, activation = FORKS[name]
    model = Net(run, a=conv(), norm=nn.BatchNorm2d(4), last=conv(4, 2)).eval()
    found = output_channels(model, X)["a"]
    assert (found.norm, found.activation) == (norm, activation)
    if activation is None:
        z = torch.randn(3)
        assert found.activate(z) is z


def test_the_demo_network_by_hand():
    found = output_channels(digits_resnet(), digits()[0][:1])
    for name, own in found.items():
        if name == "linear" or name.endswith("shortcut"):
            expected = (None, None)
        else:
            bn = f"{name[:-5]}bn{name[-1]}"
            expected = (bn, "relu" if not name.endswith("conv2") else None)
        assert (own.norm, own.activation) == expected, name
    assert next(iter(found)) == "conv1"
    assert list(found)[-1] == "linear"


def test_axis_of_tokens_and_rows():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    assert [own.axis for own in output_channels(model, torch.zeros(2, 5, 3)).values()] == [2, 2]
    assert [own.axis for own in output_channels(model, torch.zeros(2, 3)).values()] == [1, 1]


def test_the_first_call_counts():
    model = Net(lambda net, x: net.last(F.gelu(net.a(F.relu(net.a(x))))), a=conv(3, 3), last=conv(3, 2))
    assert output_channels(model, X)["a"].activation == "relu"


def test_chosen_layers_and_refusals():
    model = Net(lambda net, x: net.last(net.a(x)), a=conv(), last=conv(4, 2), unused=conv())
    assert list(output_channels(model, X)) == ["a", "last"]
    assert list(output_channels(model, X, ["last"])) == ["last"]
    with pytest.raises(ValueError, match="'b' is no convolution or linear layer"):
        output_channels(model, X, ["b"])
    with pytest.raises(ValueError, match="'unused' does not run on the example"):
        output_channels(model, X, ["unused"])


def test_no_trace():
    model = digits_resnet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    output_channels(model, digits()[0][:2])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(
        module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )
