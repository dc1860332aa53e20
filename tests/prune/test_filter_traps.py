"""Networks that mislead a surgeon: what is cut equals zeros by hand, what cannot be cut is left alone with a word.

Networks of `test_wrong_channels` are not repeated.
"""

import warnings

import pytest
import torch
from architectures import apart, filter_scores, lively, zeroed
from small_networks import Wired as Net
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from repgraph.prune import Plan, mask_filters, predict_cost, prunable_filters, prune_filters

pytestmark = pytest.mark.usefixtures("one_thread")


def conv(before, after, size=3, **options):
    return nn.Conv2d(before, after, size, padding=size // 2, **options)


def mean(x):
    return x.mean((2, 3))


def x8(n=2):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def chain(*between, width=8, after=6):
    """Convolution "0", what is between, another one with ReLU, a linear layer."""
    return nn.Sequential(
        conv(3, width),
        *between,
        conv(width, after),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(after, 5),
    )


def after_first(f):
    """What f makes of the first convolution's channels goes to another one."""
    return lambda: Net(
        lambda net, x: net.head(mean(net.last(f(net.first(x))))),
        first=conv(3, 8),
        last=conv(8, 6),
        head=nn.Linear(6, 5),
    )


def two_ways(split):
    """Two parts of the first convolution's channels go to convolutions of their own."""

    def forward(net, x):
        a, b = split(net.norm(net.first(x)).relu())
        return net.head(mean(torch.cat((net.a(a), net.b(b)), 1)))

    return forward


def halves(split, norm=None, bias=True):
    parts = {"first": conv(3, 8, bias=bias), "a": conv(4, 4, bias=bias), "b": conv(4, 4, bias=bias)}
    return Net(two_ways(split), **parts, norm=norm or nn.Identity(), head=nn.Linear(8, 5))


class Flip(torch.autograd.Function):
    """An operation of the user's own, which Torch-Pruning takes for element-wise."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(1)

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(1)


def with_parameters(net, **values):
    for name, value in values.items():
        setattr(net, name, nn.Parameter(value))
    return net


def with_buffer(net, value):
    net.register_buffer("scale", value)
    return net


def recurrent():
    return Net(
        lambda net, x: net.head(net.lstm(net.first(x).relu().flatten(2).transpose(1, 2))[0][:, -1]),
        first=conv(3, 8), lstm=nn.LSTM(8, 6, batch_first=True), head=nn.Linear(6, 5),
    )  # fmt: skip


def tied():
    net = Net(
        lambda net, x: net.head(net.b(net.a(mean(net.first(x))).tanh()).tanh()),
        first=conv(3, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 8), head=nn.Linear(8, 5))  # fmt: skip
    net.b.weight = net.a.weight
    return net


def parametrized(f):
    def make():
        net = chain(nn.ReLU(), conv(8, 8), nn.ReLU())
        f(net[2])
        return net

    return make


def without_gradients(net, x):
    with torch.no_grad():
        x = net.first(x).relu()
    return net.head(mean(net.last(x)))


def in_place(net, x):
    y = net.first(x)
    y.relu_()
    y += net.last(x)
    y[:, :4] *= 2
    return net.head(mean(y))


def unet(net, x):
    a = net.first(x).relu()
    b = F.interpolate(net.down(F.max_pool2d(a, 2)).relu(), scale_factor=2)
    return net.head(mean(net.up(torch.cat((b, a), 1)).relu()))


def dense(net, x):
    a = net.first(x).relu()
    b = torch.cat((a, net.b(a).relu()), 1)
    return net.head(mean(net.norm(torch.cat((b, net.c(b).relu(), a), 1))))


def film(net, x):
    scale, shift = net.film(mean(x)).chunk(2, 1)
    return net.head(mean(net.last(net.first(x).relu() * scale[:, :, None, None] + shift[:, :, None, None])))


def rectified_twice(net, x):
    y = net.first(x)
    return net.head(mean(net.last(torch.cat((y.relu(), (-y).relu()), 1))))


def efficient_attention(net, x):
    y = net.first(x).relu()
    return net.head(mean(net.last(y * net.k(mean(y)[:, None]).sigmoid()[:, 0, :, None, None])))


def gated(net, x):
    y = net.first(x).relu()
    return net.head(mean(net.last(y * net.gate(y).sigmoid())))


def gram(net, x):
    y = net.first(x).relu().flatten(2)
    return net.head(mean(net.last((y @ y.transpose(1, 2) @ y).view(len(y), -1, 8, 8))))


ALL = {"first", "last"}
CASES = {  # network -> (how to make it, layers that must be cut, layers that must be left alone with a word)
    # channels that go different ways, or change places
    "split into unequal parts": (
        lambda: Net(two_ways(lambda y: y.split([3, 5], 1)), first=conv(3, 8), norm=nn.Identity(), a=conv(3, 6),
                    b=conv(5, 6), head=nn.Linear(12, 5)),
        {"a", "b"}, {"first"}),
    "chunks that meet again": (
        lambda: Net(lambda net, x: net.head(mean(net.last(sum(net.first(x).relu().chunk(2, 1))))),
                    first=conv(3, 8), last=conv(4, 6), head=nn.Linear(6, 5)),
        {"last"}, set()),
    "gated linear unit": (
        lambda: Net(lambda net, x: net.head(mean(net.last(F.glu(net.first(x), 1)))),
                    first=conv(3, 8), last=conv(4, 6), head=nn.Linear(6, 5)),
        {"last"}, set()),
    "a slice by number, the rest unused": (
        lambda: Net(lambda net, x: net.head(mean(net.last(net.first(x).relu()[:, :4]))),
                    first=conv(3, 8), last=conv(4, 6), head=nn.Linear(6, 5)),
        {"last"}, {"first"}),
    "channel shuffle as a module": (lambda: chain(nn.ReLU(), nn.ChannelShuffle(2)), {"3"}, {"0"}),
    "pixel shuffle as a module": (
        lambda: nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 6), nn.Flatten(), nn.Linear(6 * 256, 5)),
        {"2"}, {"0"}),
    "pixel unshuffle": (
        lambda: nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 6), nn.Flatten(), nn.Linear(6 * 16, 5)),
        {"2"}, set()),
    "flipped": (after_first(lambda y: y.relu().flip(1)), {"last"}, {"first"}),
    "flipped and added": (after_first(lambda y: y + y.flip(1)), {"last"}, {"first"}),
    "rolled": (after_first(lambda y: y.relu().roll(1, 1)), {"last"}, {"first"}),
    "an operation of one's own": (after_first(Flip.apply), {"last"}, {"first"}),
    "repeated": (
        lambda: Net(lambda net, x: net.head(mean(net.first(x).repeat(1, 2, 1, 1))),
                    first=conv(3, 8), head=nn.Linear(16, 5)),
        set(), set()),
    "interleaved": (
        lambda: Net(lambda net, x: net.head(mean(net.first(x).repeat_interleave(2, 1))),
                    first=conv(3, 8), head=nn.Linear(16, 5)),
        set(), set()),
    "rectified twice": (
        lambda: Net(rectified_twice, first=conv(3, 8), last=conv(16, 6), head=nn.Linear(6, 5)),
        ALL, set()),
    "maxout": (
        lambda: Net(lambda net, x: net.head(mean(net.first(x).unflatten(1, (4, 2)).amax(2))),
                    first=conv(3, 8), head=nn.Linear(4, 5)),
        set(), set()),
    # channels that are mixed
    "scaled by the mean over channels": (after_first(lambda y: y * y.mean(1, keepdim=True)), {"last"}, {"first"}),
    "scaled by the largest channel": (after_first(lambda y: y * y.amax(1, keepdim=True)), {"last"}, {"first"}),
    "softmax over channels": (after_first(lambda y: y.softmax(1)), {"last"}, {"first"}),
    "sorted": (after_first(lambda y: y.sort(1).values), {"last"}, {"first"}),
    "divided by the width": (after_first(lambda y: y / y.shape[1]), {"last"}, {"first"}),
    "unit vectors": (after_first(lambda y: F.normalize(y, dim=1)), ALL, set()),  # zeros add nothing to a length
    "local response": (lambda: chain(nn.LocalResponseNorm(3)), {"2"}, {"0"}),
    "group norm with a group for each channel": (lambda: chain(nn.GroupNorm(8, 8)), {"2"}, {"0"}),
    "channel attention by a convolution over channels": (
        lambda: Net(efficient_attention, first=conv(3, 8), k=nn.Conv1d(1, 1, 3, padding=1), last=conv(8, 6),
                    head=nn.Linear(6, 5)),
        {"last"}, {"first"}),
    "recurrent": (recurrent, set(), {"first"}),
    "products of channels": (
        lambda: Net(gram, first=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5)), {"last"}, set()),
    "weights from a layer": (
        lambda: Net(lambda net, x: net.head(mean(F.conv2d(net.first(x), net.make(x.mean((0, 2, 3))).view(6, 8, 1, 1)))),
                    first=conv(3, 8), make=nn.Linear(3, 48), head=nn.Linear(6, 5)),
        set(), {"first", "make"}),
    "weights that are no module's": (
        lambda: with_parameters(
            Net(lambda net, x: net.head(mean(F.conv2d(net.first(x), net.kernel))),
                first=conv(3, 8), head=nn.Linear(6, 5)),
            kernel=torch.randn(6, 8, 1, 1)),
        set(), {"first"}),
    # zeros that do not stay zeros
    **{f"{name} of a filter without norm": (after_first(f), {"last"}, {"first"})
       for name, f in {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid, "softplus": F.softplus, "exp": torch.exp,
                       "cosine": torch.cos, "one plus": lambda y: 1 + y.relu()}.items()},
    **{f"{name} of a filter": (after_first(f), ALL, set())
       for name, f in {"tanh": torch.tanh, "hardswish": F.hardswish, "elu": F.elu, "mish": F.mish, "selu": F.selu,
                       "softsign": F.softsign, "tanhshrink": F.tanhshrink, "celu": F.celu}.items()},
    "PReLU for each channel": (lambda: chain(nn.PReLU(8)), {"0", "2"}, set()),
    "instance norm": (lambda: chain(nn.InstanceNorm2d(8, affine=True), nn.ReLU()), {"0", "3"}, set()),
    "instance norm without scales": (lambda: chain(nn.InstanceNorm2d(8)), {"0", "2"}, set()),
    "batch norm without scales": (lambda: chain(nn.BatchNorm2d(8, affine=False), nn.ReLU()), {"0", "3"}, set()),
    "batch norm without statistics": (
        lambda: chain(nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()), {"0", "3"}, set()),
    "batch norm of a sum": (
        lambda: Net(lambda net, x: net.head(mean(net.last(net.norm(net.first(x).relu() + net.other(x)).relu()))),
                    first=conv(3, 8), other=conv(3, 8), norm=nn.BatchNorm2d(8), last=conv(8, 6), head=nn.Linear(6, 5)),
        {"first", "other", "last"}, set()),
    "batch norm of the input": (lambda: nn.Sequential(nn.BatchNorm2d(3), *chain(nn.BatchNorm2d(8))), {"1", "3"}, set()),
    # who else reads
    "the output": (
        lambda: Net(lambda net, x: (net.head(mean(net.last(net.first(x).relu()))), net.first(x)),
                    first=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5)),
        {"last"}, {"first"}),
    "two outputs in a tuple and a dict": (
        lambda: Net(lambda net, x: (net.head(mean(net.first(x))), {"b": net.more(mean(net.last(net.first(x))))}),
                    first=conv(3, 8), last=conv(8, 6), head=nn.Linear(8, 5), more=nn.Linear(6, 5)),
        ALL, {"head", "more"}),
    "one convolution twice in a row": (
        lambda: Net(lambda net, x: net.head(mean(net.twice(net.twice(net.first(x).relu()).relu()))),
                    first=conv(3, 8), twice=conv(8, 8), head=nn.Linear(8, 5)),
        {"first", "twice"}, set()),
    "one convolution in two branches": (
        lambda: Net(lambda net, x: net.head(mean(net.last(net.first(x).relu()) + net.last(net.other(x).relu()))),
                    first=conv(3, 8), other=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5)),
        {"first", "other", "last"}, set()),
    "twins": (
        lambda: Net(lambda net, x: torch.cat([net.head(mean(net.last(net.first(y).relu()))) for y in (x, 2 * x)], 1),
                    first=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5)),
        ALL, set()),
    "tied weights": (tied, {"first", "a", "b"}, set()),
    "U-Net": (
        lambda: Net(unet, first=conv(3, 8), down=conv(8, 12), up=conv(20, 6), head=nn.Linear(6, 5)),
        {"first", "down", "up"}, set()),
    "dense": (
        lambda: Net(dense, first=conv(3, 8), b=conv(8, 4), c=conv(12, 4), norm=nn.BatchNorm2d(24),
                    head=nn.Linear(24, 5)),
        {"first", "b", "c"}, set()),
    "joined with the input": (
        lambda: Net(lambda net, x: net.head(mean(net.norm(torch.cat((net.first(x), x), 1)))),
                    first=conv(3, 8), norm=nn.BatchNorm2d(11), head=nn.Linear(11, 5)),
        {"first"}, set()),
    "behind the input": (
        lambda: Net(lambda net, x: net.head(mean(net.norm(torch.cat((x, net.first(x)), 1)))),
                    first=conv(3, 8), norm=nn.BatchNorm2d(11), head=nn.Linear(11, 5)),
        set(), set()),
    "added to the input": (
        lambda: Net(lambda net, x: net.head(mean(net.last(x + net.first(x)))),
                    first=conv(3, 3), last=conv(3, 8), head=nn.Linear(8, 5)),
        {"last"}, {"first"}),
    "added to a concatenation": (
        lambda: Net(lambda net, x: net.head(mean(torch.cat((net.a(x), net.b(x)), 1) + net.c(x))),
                    a=conv(3, 4), b=conv(3, 8), c=conv(3, 12), head=nn.Linear(12, 5)),
        {"a", "b", "c"}, set()),
    "stacked": (
        lambda: Net(lambda net, x: net.head(mean(torch.stack((net.a(x), net.b(x))).sum(0))),
                    a=conv(3, 8), b=conv(3, 8), head=nn.Linear(8, 5)),
        {"a", "b"}, set()),
    "gates of one channel": (
        lambda: Net(gated, first=conv(3, 8), gate=conv(8, 1), last=conv(8, 6), head=nn.Linear(6, 5)),
        {"last"}, set()),
    "scales and shifts from one layer": (
        lambda: Net(film, first=conv(3, 8), film=nn.Linear(3, 16), last=conv(8, 6), head=nn.Linear(6, 5)), ALL, set()),
    "a buffer of scales": (
        lambda: with_buffer(Net(lambda net, x: net.head(mean(net.last(net.first(x) * net.scale))),
                                first=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5)), torch.rand(8, 1, 1)),
        {"last"}, {"first"}),
    "flattened, channels last": (
        lambda: Net(lambda net, x: net.head(net.first(x).permute(0, 2, 3, 1).flatten(1)),
                    first=conv(3, 8), head=nn.Linear(8 * 64, 5)),
        set(), set()),
    "a view with the width as a number": (
        lambda: Net(lambda net, x: net.head(net.last(net.first(x)).view(-1, 8 * 64)),
                    first=conv(3, 8), last=conv(8, 8), head=nn.Linear(8 * 64, 5)),
        {"first"}, {"last"}),
    "read without gradients": (
        lambda: Net(lambda net, x: net.head(mean(net.a(net.first(x)) + net.b(net.first(x).detach()))),
                    first=conv(3, 8), a=conv(8, 8), b=conv(8, 8), head=nn.Linear(8, 5)),
        {"a", "b"}, set()),
    "made without gradients": (
        lambda: Net(without_gradients, first=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5)), {"last"}, set()),
    "changed in place": (
        lambda: Net(in_place, first=conv(3, 8), last=conv(3, 8), head=nn.Linear(8, 5)), set(), {"first", "last"}),
    # kinds of convolutions
    "depthwise, transposed": (lambda: chain(nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=8)), {"3"}, set()),
    "grouped, transposed": (lambda: chain(nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=4)), set(), set()),
    "depthwise on the input": (lambda: nn.Sequential(conv(3, 12, groups=3), conv(12, 4)), {"0"}, {"1"}),
    "one filter": (lambda: chain(nn.ReLU(), width=1), {"2"}, {"0"}),
    **{name: (parametrized(f), {"4"}, {"0", "2"})
       for name, f in {"weight norm": parametrizations.weight_norm, "spectral norm": parametrizations.spectral_norm,
                       "orthogonal": parametrizations.orthogonal,
                       "spectral norm of old": nn.utils.spectral_norm}.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # products of parametrizations are not counted
def test_cut_or_left_alone(name):
    make, cut, left = CASES[name]
    torch.manual_seed(0)
    model, x = lively(make()), x8()
    found = prunable_filters(model, x)
    free = {layer for group in found.groups for layer in group.layers}
    assert cut <= free
    assert left <= found.left.keys()
    assert all(found.left.values())
    assert not free & found.left.keys()
    if free:
        pruned = prune_filters(model, x, filter_scores(model, names=free), 0.5)
        assert pruned.plan.filters
        from_zeros, from_whole = apart(model, pruned, x)
        assert from_zeros < 1e-12
        assert from_whole > 1e-4
        assert pruned.plan.settings["macs"] == [pruned.before.macs, pruned.after.macs]


def test_parameters_along_the_channels_are_zero_and_go_too():
    """A class token, positions, scales: of the same channels, outside of any layer."""

    def forward(net, x):
        tokens = net.first(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((net.token.expand(len(tokens), -1, -1), tokens), 1) + net.places
        return net.head((tokens + net.b(net.a(tokens).relu()))[:, 0])

    torch.manual_seed(0)
    model = with_parameters(
        Net(forward, first=nn.Conv2d(3, 8, 4, 4), a=nn.Linear(8, 12), b=nn.Linear(12, 8), head=nn.Linear(8, 5)),
        token=torch.randn(1, 1, 8), places=torch.randn(1, 5, 8),
    ).eval()  # fmt: skip
    x = x8()
    pruned = prune_filters(model, x, filter_scores(model), 0.5)
    gone = list(pruned.plan.filters["first"])
    assert pruned.plan.filters["b"] == tuple(gone)
    zeros = zeroed(model, x, pruned.plan.filters)
    for parameter in (zeros.token, zeros.places):
        parameter.data[..., gone] = 0
    torch.testing.assert_close(pruned.model(x), zeros(x))
    kept = [i for i in range(8) if i not in gone]
    assert torch.equal(pruned.model.places, model.places[..., kept])
    assert pruned.model.places.requires_grad


def test_inputs_in_a_dict():
    def forward(net, image, scale):
        return {"logits": net.head(mean(net.last(net.first(image).relu() * scale[:, None, None, None])))}

    torch.manual_seed(0)
    model = lively(Net(forward, first=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5)))
    x = {"image": x8(), "scale": torch.tensor([0.5, 2.0])}
    pruned = prune_filters(model, x, filter_scores(model), 0.5)
    assert set(pruned.plan.filters) == ALL
    assert apart(model, pruned, x)[0] < 1e-12
    assert predict_cost(model, pruned.plan, x) == pruned.after


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.num_heads = 2

    def forward(self, x):
        parts = (f(x).unflatten(-1, (self.num_heads, -1)) for f in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def pair(net, x):
    return net.head(mean(net.a(x) + net.b(x)))


INCOMPLETE = {
    "grouped": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=2), nn.ReLU(), conv(8, 4)), x8(),
        {"2": (1,)}, r"filters \[5\] of '2'"),
    "heads": (
        lambda: nn.Sequential(nn.Linear(6, 8), Heads(), nn.Linear(8, 5)), torch.randn(2, 5, 6),
        {"1.query": (0, 1), "1.key": (0, 1), "1.value": (0, 1)}, r"filters \[2, 3\] of '1.query'"),
    "pairs": (
        lambda: Net(pair, a=conv(3, 8), b=conv(3, 8), head=nn.Linear(8, 5)), x8(),
        {"a": (0, 1), "b": (1, 2)}, r"filters \[2\] of 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
def test_incomplete_units_are_refused_and_what_is_missing_is_named(case):
    make, x, filters, missing = INCOMPLETE[case]
    with pytest.raises(ValueError, match=f"{missing} go together with others: add them"):
        prune_filters(lively(make()), x, Plan(filters=filters))


# what goes wrong


def test_the_check_does_not_depend_on_the_example():
    """A new network without biases gives zeros on zeros, whatever is cut."""
    torch.manual_seed(0)
    model = halves(lambda y: y.chunk(2, 1), nn.BatchNorm2d(8), bias=False).eval()
    zeros = torch.zeros(2, 3, 8, 8)
    try:
        pruned = prune_filters(model, zeros, Plan(filters={"first": (0, 1, 4, 6)}))
    except ValueError:
        return
    assert apart(model, pruned, x8())[0] < 1e-12


def test_the_check_does_not_depend_on_weights_that_start_at_zero():
    torch.manual_seed(0)
    model = halves(lambda y: y.chunk(2, 1)).eval()
    nn.init.zeros_(model.head.weight)
    try:
        pruned = prune_filters(model, x8(), Plan(filters={"first": (0, 1, 4, 6)}))
    except ValueError:
        return
    head = torch.randn(5, 8)
    model.head.weight.data, pruned.model.head.weight.data = head, head.clone()
    assert apart(model, pruned, x8())[0] < 1e-12


def test_what_is_called_prunable_can_be_pruned():
    torch.manual_seed(0)
    model = lively(halves(lambda y: y.chunk(2, 1)))
    free = {layer for group in prunable_filters(model, x8()).groups for layer in group.layers}
    pruned = prune_filters(model, x8(), filter_scores(model, names=free), 0.4)
    assert apart(model, pruned, x8())[0] < 1e-12


@pytest.mark.parametrize("width", [4, 8])
def test_a_slope_that_all_channels_share(width):
    model = lively(chain(nn.PReLU(), width=width))
    assert "0" not in prunable_filters(model, x8()).left


def test_inputs_of_a_depthwise_convolution_of_two_filters_each_stay():
    model = lively(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 16, groups=8), nn.ReLU(), conv(16, 4)))
    assert prunable_filters(model, x8()).left["0"] == "they all go together"


def test_layers_with_one_weight_keep_one_or_all_of_it():
    """Both write to the same stream, so that the cut itself is right."""

    def forward(net, x):
        x = net.first(x).relu()
        x = x + net.a(x).relu()
        return net.head(mean(x + net.b(x).relu()))

    model = Net(forward, first=conv(3, 8), a=conv(8, 8), b=conv(8, 8), head=nn.Linear(8, 5))
    model.b.weight = model.a.weight
    lively(model)
    if "a" in prunable_filters(model, x8()).left:
        return
    pruned = prune_filters(model, x8(), filter_scores(model), 0.5)
    assert pruned.model.b.weight is pruned.model.a.weight


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.num_heads = heads

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def transformer(width, heads, norm):
    def forward(net, x):
        x = net.embed(x)
        return net.head(net.out(x + net.attention(net.norm(x))).mean(1))

    torch.manual_seed(0)
    norms = {"norm": norm(width), "out": norm(width)}
    return lively(
        Net(forward, embed=nn.Linear(6, width), attention=Attention(width, heads), head=nn.Linear(width, 5), **norms)
    )


HEADS = {"attention.q", "attention.k", "attention.v"}


@pytest.mark.parametrize(("width", "heads"), [(16, 4), (16, 2), (12, 3), (24, 12)])
def test_heads_are_units(width, heads):
    model, x = transformer(width, heads, nn.LayerNorm), torch.randn(2, 5, 6)
    found = prunable_filters(model, x)
    assert {group.width for group in found.groups if set(group.layers) == HEADS} == {heads}
    pruned = prune_filters(model, x, filter_scores(model, names=HEADS), 0.5)
    assert pruned.model.attention.num_heads == heads - heads // 2
    assert apart(model, pruned, x)[0] < 1e-12


def test_the_stream_around_heads():
    """Without norms it can be cut as any other, and the heads stay as they are."""
    model, x = transformer(24, 4, lambda _: nn.Identity()), torch.randn(2, 5, 6)
    assert {"embed", "attention.o"} <= {layer for group in prunable_filters(model, x).groups for layer in group.layers}


def test_masks_by_hand_and_ours_agree():
    torch.manual_seed(0)
    model, x = lively(chain(nn.BatchNorm2d(8), nn.ReLU())), x8()
    plan = Plan(filters={"0": (1, 2, 7), "3": (0, 5)})
    masked, expected = mask_filters(model, x, plan), zeroed(model, x, plan.filters)
    assert torch.equal(masked(x), expected(x))
    for name, value in expected.state_dict().items():
        assert torch.equal(masked.state_dict()[name], value)


def test_old_weight_norm_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = parametrized(nn.utils.weight_norm)()
    with pytest.raises((ValueError, RuntimeError), match="weight_norm"):
        prunable_filters(model, x8())
