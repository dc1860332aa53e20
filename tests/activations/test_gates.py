"""Gates: where they are seen, their bits and names, packing, and the affine pieces that they name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import Through
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from repgraph import capture, layer_names
from repgraph.activations.gates import Kinks, kinks_of, pack, unpack

ROWS = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)) * 3
X = torch.randn(11, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 3
seeds = st.integers(0, 2**32 - 1)


def take(model, data, layers="gates", **options):
    return capture(model, data, layers, progress=False, **options)


def packed(bits):
    return torch.from_numpy(np.packbits(bits.flatten(1).numpy(), axis=1, bitorder="little"))


def same(acts, expected):
    """Whether the gates are these, by name and in order: bits (n, ...)."""
    assert list(acts) == list(expected)
    for name, bits in expected.items():
        assert acts[name].dtype == torch.uint8
        assert acts.specs[name].gates == bits[0].numel()
        assert torch.equal(acts[name], packed(bits)), name


# Bits


ONE_KINK = {
    "ReLU": (nn.ReLU(), 0),
    "in place": (nn.ReLU(inplace=True), 0),
    "LeakyReLU": (nn.LeakyReLU(0.3), 0),
    "LeakyReLU in place": (nn.LeakyReLU(0.3, inplace=True), 0),
    "PReLU": (nn.PReLU(), 0),
    "PReLU by channel": (nn.PReLU(3, init=-0.7), 0),
    "RReLU": (nn.RReLU(), 0),
    "Threshold": (nn.Threshold(0.7, -20), 0.7),
    "Threshold in place": (nn.Threshold(-1, 20, inplace=True), -1),
}
TWO_KINKS = {
    "Hardtanh": (nn.Hardtanh(), -1, 1),
    "Hardtanh with limits": (nn.Hardtanh(-0.5, 2.5, inplace=True), -0.5, 2.5),
    "ReLU6": (nn.ReLU6(), 0, 6),
    "ReLU6 in place": (nn.ReLU6(inplace=True), 0, 6),
    "Hardsigmoid": (nn.Hardsigmoid(), -3, 3),
}
CALLS = {
    "relu": (F.relu, 0),
    "torch.relu": (torch.relu, 0),
    "relu_": (lambda x: torch.relu_(x), 0),
    "x.relu()": (lambda x: x.relu(), 0),
    "x.relu_()": (lambda x: x.relu_(), 0),
    "in place": (lambda x: F.relu(x, inplace=True), 0),
    "clamp": (lambda x: x.clamp(min=0), 0),
    "clamp_": (lambda x: x.clamp_(0), 0),
    "clamp_min": (lambda x: x.clamp_min(0.0), 0),
    "clip": (lambda x: torch.clip(input=x, min=0), 0),
    "leaky_relu": (F.leaky_relu, 0),
    "leaky_relu_": (lambda x: F.leaky_relu_(x, 0.2), 0),
    "prelu": (lambda x: F.prelu(x, torch.full((1,), 0.2)), 0),
    "rrelu": (F.rrelu, 0),
    "threshold": (lambda x: F.threshold(x, 0.5, 9), 0.5),
    "threshold_": (lambda x: F.threshold_(x, 0.5, 9), 0.5),
    "vmap": (lambda x: torch.vmap(torch.relu)(x), 0),
}


@pytest.mark.parametrize("what", ONE_KINK)
@pytest.mark.parametrize("training", [True, False])
def test_bits_of_modules(what, training):
    act, at = ONE_KINK[what]
    model = nn.Sequential(nn.Conv2d(3, 3, 2), act).train(training)
    z = model[0](X).detach()
    same(take(model, X, batch_size=4), {"gates:1": z > at})


@pytest.mark.parametrize("what", TWO_KINKS)
def test_bits_of_modules_with_two_kinks(what):
    act, low, high = TWO_KINKS[what]
    model = nn.Sequential(nn.Conv2d(3, 4, 2), act)
    with torch.no_grad():
        model[0].weight.mul_(4)
    z = model[0](X).detach()
    same(take(model, X, batch_size=4), {"gates:1": z > low, "gates:1/upper": z > high})
    same(take(model, X, "gates:*/upper"), {"gates:1/upper": z > high})
    same(take(model, X, "gates:1"), {"gates:1": z > low})


@pytest.mark.parametrize("what", CALLS)
def test_bits_of_functions(what):
    f, at = CALLS[what]
    model = nn.Sequential(nn.Linear(6, 5), Through(f))
    z = model[0](ROWS).detach()
    same(take(model, ROWS, batch_size=4), {"gates:1#relu0": z > at})


@pytest.mark.parametrize(
    ("f", "low", "high"),
    [
        (lambda x: x.clamp(0, 2), 0, 2),
        (lambda x: torch.clamp_(x.clone(), max=2, min=0), 0, 2),
        (F.relu6, 0, 6),
        (F.hardtanh, -1, 1),
        (lambda x: F.hardtanh_(x.clone(), -2, 1), -2, 1),
        (F.hardsigmoid, -3, 3),
    ],
)
def test_bits_of_functions_with_two_kinks(f, low, high):
    z = ROWS.clone()
    expected = {"gates:1#relu0": z > low, "gates:1#relu0/upper": z > high}
    same(take(nn.Sequential(nn.Identity(), Through(f)), ROWS), expected)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.normalize(x, dim=1),
        lambda x: F.cosine_similarity(x, x[:1], dim=1)[:, None],
        lambda x: torch.cdist(x.repeat(1, 9).reshape(len(x), -1, 6), x[None].expand(len(x), -1, -1)),
        lambda x: x.softmax(1),
        lambda x: x.clamp(max=0),
        lambda x: x.clamp(min=1e-6),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(min=torch.ones(6)),
        lambda x: x.abs() + torch.where(x > 0, x, 0) + x.sign(),
        lambda x: F.layer_norm(x, (6,)),
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        *(F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.softplus, F.hardswish, F.logsigmoid, F.tanhshrink),
        *(F.softshrink, F.hardshrink, F.softsign, F.glu, torch.sigmoid, torch.tanh),
    ],
)
def test_what_is_no_gate(f):
    with pytest.raises(ValueError, match=r"no gate in the model.*none was called"):
        take(nn.Sequential(nn.Identity(), Through(f)), ROWS)
    same(
        take(nn.Sequential(nn.Identity(), Through(f), Through(lambda x: ROWS.relu())), ROWS),
        {"gates:2#relu0": ROWS > 0},
    )


def test_indices_kept_from_being_negative_are_no_gates():
    model = nn.Sequential(nn.ReLU(), Through(lambda x: x + torch.arange(-3, 3).clamp(min=0)))
    same(take(model, ROWS), {"gates:0": ROWS > 0})
    model = nn.Sequential(nn.ReLU(), Through(lambda x: x + x.long().clamp(min=0, max=9)))
    same(take(model, ROWS), {"gates:0": ROWS > 0})


def test_zero_is_on_the_lower_side():
    z = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 6.0, 6.0000005]])
    same(take(nn.Sequential(nn.ReLU6()), z), {"gates:0": z > 0, "gates:0/upper": z > 6})
    assert (z > 0).tolist()[0] == [False, False, True, False, True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_bits_in_other_precision(dtype):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).to(dtype)
    same(take(model, ROWS), {"gates:1": model[0](ROWS.to(dtype)).detach() > 0})


@pytest.mark.parametrize(
    "layout", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.mT, lambda x: x[:, :2]]
)
def test_units_are_counted_in_the_order_of_the_output(layout):
    model = nn.Sequential(nn.Identity(), Through(lambda x: F.relu(layout(x))))
    same(take(model, X, batch_size=5), {"gates:1#relu0": layout(X) > 0})


def test_one_number_for_each_sample():
    model = nn.Sequential(nn.Identity(), Through(lambda x: F.relu(x[:, 0])))
    same(take(model, ROWS, batch_size=4), {"gates:1#relu0": ROWS[:, :1] > 0})


def test_no_units():
    model = nn.Sequential(nn.ReLU(), Through(lambda x: F.relu(x[:, :0])))
    acts = take(model, ROWS)
    assert acts["gates:1#relu0"].shape == (11, 0)
    assert acts.specs["gates:1#relu0"].gates == 0


# Names


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.twin = nn.ReLU(), nn.Hardtanh()
        self.body = nn.Sequential(nn.Identity(), Through(lambda x: F.relu(-F.relu(x - 1) + 2)))

    def forward(self, x):
        x = self.act(x)
        x = self.body(torch.relu(x - 0.5))
        x = self.twin(self.act(x - 0.1)) + x.clamp(min=0)
        return self.act(self.twin(x))


def names_by_hand(x):
    gates = {}

    def gate(name, z, low=0.0, high=None):
        gates[f"gates:{name}"] = z > low
        if high is not None:
            gates[f"gates:{name}/upper"] = z > high
        return z.clip(low, high)

    x = gate("act", x)
    x = gate("#relu0", x - 0.5)
    x = gate("body.1#relu1", -gate("body.1#relu0", x - 1) + 2)
    y = gate("twin", gate("act#1", x - 0.1), -1, 1)
    x = y + gate("#relu1", x)
    gate("act#2", gate("twin#1", x, -1, 1))
    return gates


def test_names_of_later_calls_functions_and_the_root():
    expected = names_by_hand(ROWS)
    same(take(Names(), ROWS, batch_size=3), expected)
    assert list(layer_names(Names(), "gates", ROWS)) == list(expected)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("gates:act", ["act"]),
        ("gates:act#1", ["act#1"]),
        ("gates:act*", ["act", "act#1", "act#2"]),
        ("gates:body.*", ["body.1#relu0", "body.1#relu1"]),
        ("gates:#relu*", ["#relu0", "#relu1"]),
        ("gates:*/upper", ["twin/upper", "twin#1/upper"]),
        (["gates:twin#1", "gates:act"], ["act", "twin#1"]),
        (["gates:act", "gates"], [name.removeprefix("gates:") for name in names_by_hand(ROWS)]),
    ],
)
def test_some_of_the_gates(pattern, names):
    wanted = [f"gates:{name}" for name in names]
    same(take(Names(), ROWS, pattern), {name: bits for name, bits in names_by_hand(ROWS).items() if name in wanted})


@pytest.mark.parametrize("pattern", ["gates:nothing", "gates:act#7", ["gates", "gates:twin#1/lower"]])
def test_gates_that_are_not_there_are_refused_with_those_that_are(pattern):
    with pytest.raises(ValueError, match=r"no gate .*the gates are act, #relu0, "):
        take(Names(), ROWS, pattern)


def test_a_module_with_two_names_has_the_first():
    act = nn.ReLU()
    model = nn.Sequential(act, nn.Linear(6, 4), act)
    z = model[1](ROWS.relu()).detach()
    same(take(model, ROWS), {"gates:0": ROWS > 0, "gates:0#1": z > 0})


def test_a_forward_called_past_the_module_counts_for_the_one_that_calls():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.act.forward(x) - 1)

    same(take(Past(), ROWS), {"gates:#relu0": ROWS > 0, "gates:act": ROWS.relu() > 1})


def test_errors_that_the_model_catches_keep_the_names():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError

    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.act = Fails(), nn.ReLU()

        def forward(self, x):
            try:
                return self.fails(x)
            except KeyError:
                return self.act(F.relu(x))

    model = nn.Sequential(nn.Identity(), Catches())
    same(take(model, ROWS), {"gates:1#relu0": ROWS > 0, "gates:1.act": ROWS.relu() > 0})


def test_other_libraries_functions_of_the_same_name_are_no_gates():
    with torch.library._scoped_library("repgraph_tests", "DEF") as library:
        library.define("threshold(Tensor x) -> Tensor")
        library.impl("threshold", lambda x: x + 1, "CompositeExplicitAutograd")
        model = nn.Sequential(nn.ReLU(), Through(lambda x: torch.ops.repgraph_tests.threshold(x)))
        same(take(model, ROWS), {"gates:0": ROWS > 0})


def test_data_parallel_wrapped():
    model = nn.DataParallel(nn.Sequential(nn.Linear(6, 4), nn.ReLU()))
    z = model.module[0](ROWS).detach()
    for select in ("gates", "gates:1", "gates:module.1"):
        same(take(model, ROWS, select), {"gates:1": z > 0})


# Names without data


def test_names_without_data_are_those_of_a_pass():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), Through(F.relu6), nn.PReLU(4)
    )
    found, data = layer_names(model, "gates"), torch.zeros(2, 3, 224, 224)
    assert list(found) == list(take(model, data)) == ["gates:1", "gates:3#relu0", "gates:3#relu0/upper", "gates:4"]
    assert [found.specs[name].gates for name in found] == [4 * 222 * 222, 16, 16, 16]
    assert set(found.kinds.values()) == {"gates"}
    assert list(layer_names(model, ["gates:4", "0"])) == ["0", "gates:4"]


def test_names_are_shown_with_the_number_of_gates():
    text = repr(layer_names(nn.Sequential(nn.Linear(6, 20), nn.ReLU()), "gates"))
    assert "20" in text.splitlines()[1]
    assert "20 gates" in repr(take(nn.Sequential(nn.Linear(6, 20), nn.ReLU()), ROWS))


def test_names_of_gates_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no gate"):
        layer_names(nn.Sequential(nn.Linear(6, 6), nn.GELU()), "gates")
    with pytest.raises(ValueError, match="no gate 'nothing'"):
        layer_names(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "gates:nothing")


# Packing


@given(seeds, st.integers(0, 9), st.integers(1, 70))
def test_packing_is_that_of_numpy(seed, n, gates):
    bits = torch.rand(n, gates, generator=torch.Generator().manual_seed(seed)) < 0.5
    got = pack(bits)
    assert got.dtype == torch.uint8
    assert torch.equal(got, packed(bits))
    back = unpack(got, gates)
    assert back.dtype == torch.bool
    assert torch.equal(back, bits)


def test_all_values_of_a_byte():
    octets = torch.arange(256, dtype=torch.uint8)[:, None]
    bits = torch.from_numpy(np.unpackbits(octets.numpy(), axis=1, bitorder="little")).bool()
    assert torch.equal(pack(bits), octets)
    assert torch.equal(unpack(octets, 8), bits)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (1, 1), (1, 8), (1, 64)])
def test_packing_at_the_edges(shape):
    bits = torch.ones(shape, dtype=torch.bool)
    assert pack(bits).shape == (shape[0], -(-shape[1] // 8))
    assert torch.equal(unpack(pack(bits), shape[1]), bits)


@pytest.mark.parametrize(
    "cut",
    [lambda x: x[:, 3:19], lambda x: x[:1, 3:11], lambda x: x[::2, ::3], lambda x: x.T, lambda x: x[1].expand(7, 21)],
)
def test_packing_of_parts_of_a_tensor(cut):
    bits = torch.rand(9, 21, generator=torch.Generator().manual_seed(0)) < 0.5
    before = bits.clone()
    assert torch.equal(pack(cut(bits)), packed(cut(bits)))
    assert torch.equal(bits, before)


# The affine pieces


def found_kinks(f, z):
    found = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(kinks_of(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Look(), torch.no_grad():
        f(z)
    return next(kinks for kinks in found if kinks is not None)


PIECES = [*(f for f, *_ in ONE_KINK.values()), *(f for f, *_ in TWO_KINKS.values()), *(f for f, _ in CALLS.values())]


@pytest.mark.parametrize("f", [f for f in PIECES if f is not CALLS["vmap"][0]])
def test_pieces_give_back_the_function(f):
    f = (
        f.eval()
        if isinstance(f, nn.Module)
        else lambda x, f=f: f(x) if f is not F.rrelu else F.rrelu(x, training=False)
    )
    z = torch.cat((X, torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 6.0]).repeat(13)[:75].reshape(1, 3, 5, 5)))
    kinks = found_kinks(f, z.clone())
    with torch.no_grad():
        torch.testing.assert_close(kinks.apply(z, kinks.bits(z)), f(z.clone()))
        half = kinks.apply(z.half(), kinks.bits(z)) if not isinstance(kinks.slopes[0], torch.Tensor) else z.half()
    assert half.dtype == torch.float16


def test_pieces_follow_the_bits_and_not_the_input():
    kinks = Kinks((0.0, 6.0), (0.0, 1.0, 0.0), (0.0, 0.0, 6.0))
    z = torch.tensor([-2.0, 3.0, 8.0])
    assert kinks.apply(z, [torch.tensor([True, False, True]), torch.tensor([False, False, False])]).tolist() == [
        -2,
        0,
        8,
    ]
    assert kinks.apply(z, [torch.ones(3).bool(), torch.ones(3).bool()]).tolist() == [6, 6, 6]


def test_everything_stays_on_the_device():
    with FakeTensorMode():
        z = torch.empty(5, 13, device="cuda")
        slope = torch.empty(13, device="cuda")
        for kinks in (Kinks((0.0,), (slope, 1.0), (0.0, 0.0)), Kinks((0.0, 6.0), (0.0, 1.0, 0.0), (0.0, 0.0, 6.0))):
            bits = kinks.bits(z)
            got = pack(bits[0])
            back = unpack(got, 13)
            pieces = kinks.apply(z, bits)
            for x, shape, dtype in (
                (got, (5, 2), torch.uint8),
                (back, (5, 13), torch.bool),
                (pieces, (5, 13), z.dtype),
            ):
                assert (x.device.type, tuple(x.shape), x.dtype) == ("cuda", shape, dtype)
