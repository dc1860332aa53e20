"""Networks whose channels standard surgery mistakes: a cut equals the model with zeros, what cannot be cut is left."""

from copy import deepcopy

import pytest
import torch
from small_networks import Through
from torch import nn
from torch.nn import functional as F

from repgraph.prune import prunable_filters, prune_filters

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A first convolution and norm, what a case does with the 8 channels, and two heads."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.data = 0.5 + torch.rand(tensor.shape)

    def forward(self, x):
        return self.run(self, F.relu(self.norm(self.first(x))))


class Pad(nn.Module):
    """The option A shortcut as a module of its own."""

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


def conv(before, after, size=1, stride=1, groups=1):
    return nn.Conv2d(before, after, size, stride, size // 2, groups=groups)


def mean(x):
    return x.mean((2, 3))


def padded(shortcut):
    def forward(net, x):
        y = F.relu(net.down(F.relu(net.up(x))) + shortcut(net, x))
        return net.head(mean(F.relu(net.last(F.relu(net.inner(y))) + y)))

    return forward


def zeros_joined(net, x):
    x = x[:, :, ::2, ::2]
    zeros = torch.zeros_like(x[:, :4])
    return torch.cat((zeros, x, zeros), 1)


def padded_net(shortcut, **more):
    return lambda: Net(
        padded(shortcut), up=conv(8, 8, 3), down=conv(8, 16, 3, 2), inner=conv(16, 8, 3), last=conv(8, 16, 3),
        head=nn.Linear(16, 4), **{name: part() for name, part in more.items()})  # fmt: skip


def shuffled(net, x):
    n, c, h, w = x.shape
    return net.head(mean(net.a(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))))


def attended(net, x):
    t = net.embed(x.flatten(2).transpose(1, 2))
    q, k, v = (f(t).view(len(t), -1, 4, 3).transpose(1, 2) for f in (net.q, net.k, net.v))
    return net.head(net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))


CASES = {
    "padded by a module": padded_net(lambda net, x: net.pad(x), pad=Pad),
    "padded by a lambda": padded_net(
        lambda net, x: net.pad(x), pad=lambda: Through(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
    ),
    "padded in the forward": padded_net(lambda net, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))),
    "zeros joined": padded_net(zeros_joined),
    "chunks to different readers": lambda: Net(
        lambda net, x: net.head(mean(net.a(x.chunk(2, 1)[0]) + net.b(x.chunk(2, 1)[1]))),
        a=conv(4, 6), b=conv(4, 6), head=nn.Linear(6, 4)),
    "chunks the other way round": lambda: Net(
        lambda net, x: net.head(mean(net.b(x.chunk(2, 1)[1]) + net.a(x.chunk(2, 1)[0]))),
        a=conv(4, 6), b=conv(4, 6), head=nn.Linear(6, 4)),
    "a slice by number": lambda: Net(
        lambda net, x: net.head(mean(net.a(x[:, :4]) + net.b(x[:, 4:]))),
        a=conv(4, 6), b=conv(4, 6), head=nn.Linear(6, 4)),
    "channel shuffle": lambda: Net(shuffled, a=conv(8, 6, groups=2), head=nn.Linear(6, 4)),
    "pixel shuffle": lambda: Net(
        lambda net, x: net.head(mean(net.a(F.pixel_shuffle(x, 2)))), a=conv(2, 6), head=nn.Linear(6, 4)),
    "attention without a number of heads": lambda: Net(
        attended, embed=nn.Linear(8, 12), q=nn.Linear(12, 12), k=nn.Linear(12, 12), v=nn.Linear(12, 12),
        o=nn.Linear(12, 12), head=nn.Linear(12, 4)),
    "sigmoid": lambda: Net(lambda net, x: net.head(mean(torch.sigmoid(net.a(x)))), a=conv(8, 6), head=nn.Linear(6, 4)),
    "group norm": lambda: Net(
        lambda net, x: net.head(mean(net.g(net.a(x)))), a=conv(8, 6), g=nn.GroupNorm(2, 6), head=nn.Linear(6, 4)),
    "grouped": lambda: Net(
        lambda net, x: net.head(mean(F.relu(net.b(F.relu(net.a(x)))))), a=conv(8, 12, 3, groups=4),
        b=conv(12, 6, groups=3), head=nn.Linear(6, 4)),
    "depthwise, two for each": lambda: Net(
        lambda net, x: net.head(mean(net.b(F.relu(net.a(x))))), a=conv(8, 16, 3, groups=8), b=conv(16, 6),
        head=nn.Linear(6, 4)),
    "squeeze and excite": lambda: Net(
        lambda net, x: net.head(mean(net.b(x * torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))))),
        down=conv(8, 4), up=conv(4, 8), b=conv(8, 6), head=nn.Linear(6, 4)),
    "the same tensor twice": lambda: Net(
        lambda net, x: net.head(mean(net.a(torch.cat((x, x), 1)))), a=conv(16, 6), head=nn.Linear(6, 4)),
    "flattened": lambda: Net(lambda net, x: net.head(F.max_pool2d(x, 2).flatten(1)), head=nn.Linear(128, 4)),
    "transposed": lambda: Net(
        lambda net, x: net.head(mean(net.b(F.relu(net.a(x))))), a=nn.ConvTranspose2d(8, 6, 2, 2), b=conv(6, 6),
        head=nn.Linear(6, 4)),
}  # fmt: skip
FREE = {  # layers that must be cut, not only may
    "padded by a module": {"first", "up", "down", "inner", "last"},
    "padded by a lambda": {"first", "up", "down", "inner", "last"},
    "padded in the forward": {"up", "inner"},
    "zeros joined": {"up", "inner"},
    "grouped": {"first", "b"},
    "depthwise, two for each": {"a"},
    "squeeze and excite": {"first", "down", "up"},
    "the same tensor twice": {"first", "a"},
    "flattened": {"first"},
    "transposed": {"first", "a", "b"},
}
LEFT = {
    "padded in the forward": {"first", "down", "last"},
    "attention without a number of heads": {"q", "k", "v"},
    "sigmoid": {"a"},
    "group norm": {"a"},
}


def with_zeros(model, filters):
    """By hand: rows of weights, biases, and what the norm behind `first` adds."""
    model = deepcopy(model)
    with torch.no_grad():
        for name, gone in filters.items():
            module = model.get_submodule(name)
            weight = module.weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else module.weight
            weight[list(gone)] = 0
            module.bias[list(gone)] = 0
            if name == "first":
                for tensor in (model.norm.weight, model.norm.bias):
                    tensor[list(gone)] = 0
    return model


@pytest.mark.parametrize("name", CASES)
def test_cut_equals_the_model_with_zeros(name):
    torch.manual_seed(0)
    model = CASES[name]().double().eval()
    x = X.double()
    weighted = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)}
    widths = {n: m.out_features if isinstance(m, nn.Linear) else m.out_channels for n, m in weighted.items()}
    found = prunable_filters(model, x)
    free = {layer for group in found.groups for layer in group.layers}
    assert FREE.get(name, set()) <= free
    assert LEFT.get(name, set()) <= found.left.keys()
    assert free | found.left.keys() == weighted.keys()
    scores = {n: torch.rand(width) for n, width in widths.items() if n in free}
    if not scores:
        return
    for ratio in (0.5, 0.67):
        pruned = prune_filters(model, x, scores, ratio)
        with torch.no_grad():
            torch.testing.assert_close(
                pruned.model(x), with_zeros(model, pruned.plan.filters)(x), rtol=1e-9, atol=1e-12
            )
        assert pruned.plan.settings["macs"] == [pruned.before.macs, pruned.after.macs]
