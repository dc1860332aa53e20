"""Region codes against the pre-activations themselves, distances of partitions, and the early-bird rule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from piecewise import Net, draw, filled, mlp
from torch import nn

from repgraph.metrics.spline import (
    EarlyBird,
    RegionCodes,
    partition_distance,
    partition_distance_by_layer,
    region_codes,
)

seeds = st.integers(0, 2**32 - 1)


def codes_of(net, x, **options):
    return region_codes(net, x, progress=False, **options)


def bits_of(net, x):
    """Of a chain of layers and ReLUs."""
    found = []
    for part in net:
        if isinstance(part, nn.ReLU | nn.LeakyReLU):
            found.append((x > 0).flatten(1))
        x = part(x)
    return torch.cat(found, 1).to(torch.uint8)


@given(seeds, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_bits_are_signs_of_pre_activations(seed, first, second, packed):
    net, x = mlp([3, first, second, 2], seed), draw(9, 3, seed=seed)
    found = codes_of(net, x, packed=packed, batch_size=4)
    expected = bits_of(net, x)
    assert torch.equal(found.unpacked, expected)
    assert found.unpacked.dtype == torch.uint8
    assert found.layers == {"1": slice(0, first), "3": slice(first, first + second)}
    assert (len(found), found.gates, found.packed) == (9, first + second, packed)
    assert found.n_unique == len({tuple(row) for row in expected.tolist()})
    assert torch.equal(found.layer("3"), expected[:, first:])
    width = -(-first // 8) + -(-second // 8) if packed else first + second
    assert (found.bits.shape, found.bits.dtype) == ((9, width), torch.uint8)


def test_bits_of_channels_and_positions():
    net, x = filled(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU())), draw(5, 2, 3, 4)
    assert torch.equal(codes_of(net, x).bits, (net[0](x) > 0).flatten(1).to(torch.uint8))


def test_zero_is_off():
    net = nn.Sequential(nn.Identity(), nn.ReLU()).eval()
    assert codes_of(net, torch.tensor([[0.0, -0.0, 1e-40, -1.0]])).bits.tolist() == [[0, 0, 1, 0]]


def test_two_kinks_are_two_gates():
    net = nn.Sequential(nn.Identity(), nn.ReLU6()).eval()
    found = codes_of(net, torch.tensor([[-1.0], [0.0], [3.0], [6.0], [7.0]]))
    assert found.bits.tolist() == [[0, 0], [0, 0], [1, 0], [1, 0], [1, 1]]
    assert list(found.layers) == ["1", "1/upper"]


def test_some_layers():
    net, x = mlp([3, 4, 5, 6, 2]), draw(9, 3)
    full = codes_of(net, x)
    for layers in ("3", ["3"], ("3",)):
        assert torch.equal(codes_of(net, x, layers=layers).bits, full.layer("3"))
    both = codes_of(net, x, layers=["1", "5"])
    assert list(both.layers) == ["1", "5"]
    assert torch.equal(both.unpacked, torch.cat([full.layer("1"), full.layer("5")], 1))
    with pytest.raises(KeyError):
        both.layer("3")
    with pytest.raises(KeyError):
        codes_of(net, x, packed=True).layer("7")


def test_an_in_place_gate_in_front_leaves_the_samples_alone():
    net, x = filled(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4), nn.ReLU())), draw(6, 3)
    before = x.clone()
    found = codes_of(net, x)
    assert torch.equal(x, before)
    assert torch.equal(found.layer("0"), (before > 0).to(torch.uint8))


def test_a_gate_of_a_parameter_is_no_gate_of_the_input():
    net = filled(
        Net(lambda n, x: n.gate(nn.functional.linear(x, n.raw.weight.relu())), raw=nn.Linear(3, 5), gate=nn.ReLU())
    )
    x = draw(7, 3)
    found = codes_of(net, x)
    assert torch.equal(found.bits, (x @ net.raw.weight.relu().T > 0).to(torch.uint8))


@given(seeds, st.floats(0.01, 100))
def test_scaled_units_with_divided_outgoing_weights_keep_the_codes(seed, factor):
    net, x = mlp([3, 6, 5, 2], seed), draw(20, 3, seed=seed)
    before = codes_of(net, x).bits
    net[0].weight.data[2] *= factor
    net[0].bias.data[2] *= factor
    assert torch.equal(codes_of(net, x, layers="1").bits, before[:, :6])
    net[2].weight.data[:, 2] /= factor
    assert torch.equal(codes_of(net, x).bits, before)


@given(seeds)
def test_permuted_units_permute_the_bits(seed):
    net, x = mlp([3, 6, 5, 2], seed), draw(20, 3, seed=seed)
    before = codes_of(net, x)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    net[0].weight.data, net[0].bias.data = net[0].weight.data[order], net[0].bias.data[order]
    net[2].weight.data = net[2].weight.data[:, order]
    after = codes_of(net, x)
    assert torch.equal(after.layer("1"), before.layer("1")[:, order])
    assert torch.equal(after.layer("3"), before.layer("3"))


def test_leaky_and_plain_agree_on_the_first_layer():
    x = draw(50, 3)
    plain, leaky = codes_of(mlp([3, 6, 5, 2]), x), codes_of(mlp([3, 6, 5, 2], gate=lambda: nn.LeakyReLU(0.9)), x)
    assert torch.equal(plain.layer("1"), leaky.layer("1"))
    assert not torch.equal(plain.layer("3"), leaky.layer("3"))


@pytest.mark.parametrize("where", ["net", "dropout"])
def test_train_mode_is_refused(where):
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout()).eval()
    (net if where == "net" else net[2]).train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        codes_of(net, torch.zeros(1, 2))


def test_no_gates_are_refused():
    with pytest.raises(ValueError, match=r"gate|ReLU"):
        codes_of(nn.Sequential(nn.Linear(2, 3), nn.GELU()).eval(), torch.zeros(1, 2))


# Distance


def random_codes(seed, widths=(3, 9, 1), n=6):
    start, layers = 0, {}
    for number, width in enumerate(widths):
        layers[str(number)] = slice(start, start + width)
        start += width
    return RegionCodes((draw(n, start, seed=seed) > 0).to(torch.uint8), layers)


@given(seeds)
def test_distance_is_the_mean_over_layers_of_the_shares_that_differ(seed):
    a, b = random_codes(seed), random_codes(seed + 1)
    parts = {
        name: sum(
            p != q for p, q in zip(a.layer(name).flatten().tolist(), b.layer(name).flatten().tolist(), strict=True)
        )
        / a.layer(name).numel()
        for name in a.layers
    }
    assert partition_distance_by_layer(a, b).to_dict() == pytest.approx(parts)
    assert partition_distance(a, b) == pytest.approx(sum(parts.values()) / 3)
    assert partition_distance(b, a) == partition_distance(a, b)


def test_identical_codes_are_at_0_and_complementary_at_1():
    a = random_codes(0)
    b = RegionCodes(1 - a.bits, a.layers)
    assert partition_distance(a, a) == 0
    assert partition_distance(a, b) == 1


def test_packed_and_plain_codes_compare():
    x = draw(30, 3)
    nets = mlp([3, 11, 5, 2]), mlp([3, 11, 5, 2], 1)
    expected = partition_distance(*(codes_of(net, x) for net in nets))
    assert 0 < expected < 1
    for first in (True, False):
        found = partition_distance(codes_of(nets[0], x, packed=first), codes_of(nets[1], x, packed=True))
        assert found == expected


def test_small_layers_weigh_like_large_ones():
    a = RegionCodes(torch.zeros(2, 10, dtype=torch.uint8), {"a": slice(0, 1), "b": slice(1, 10)})
    bits = a.bits.clone()
    bits[:, 0] = 1
    assert partition_distance(a, RegionCodes(bits, a.layers)) == 0.5


def test_unlike_codes_are_refused():
    a = random_codes(0)
    with pytest.raises(ValueError, match="same samples: codes_a has 6, codes_b has 7"):
        partition_distance(a, random_codes(0, n=7))
    with pytest.raises(ValueError, match=r"codes must have the same gates.*differ first at '1'"):
        partition_distance(a, random_codes(0, widths=(3, 8, 2)))
    with pytest.raises(ValueError, match="codes must have the same gates"):
        partition_distance(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"codes must have shape \(N, D\)"):
        partition_distance(torch.zeros(3), torch.zeros(3))


# Early bird


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(1, 4), st.floats(0.05, 0.9))
def test_early_bird_is_the_rule(ones, lookback, threshold):
    epochs = [torch.tensor([[1] * k + [0] * (20 - k)]) for k in ones]
    bird = EarlyBird(threshold, lookback)
    for e, codes in enumerate(epochs):
        full = e >= lookback
        largest = max((abs(k - ones[e]) / 20 for k in ones[max(0, e - lookback) : e]), default=0)
        assert bird.update(codes) is (full and largest < threshold)
        assert math.isnan(bird.distances[-1]) is not full
        if full:
            assert bird.distances[-1] == pytest.approx(largest)


def test_the_threshold_itself_is_not_settled():
    bird = EarlyBird(threshold=0.25, lookback=1)
    found = [bird.update(torch.tensor([row])) for row in ([0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1])]
    assert found == [False, False, True]


def test_detectors_share_no_history():
    first, second = EarlyBird(lookback=1), EarlyBird(lookback=1)
    codes = torch.tensor([[0, 1]])
    assert [first.update(codes), second.update(codes), first.update(codes)] == [False, False, True]
    assert (len(first.distances), len(second.distances)) == (2, 1)


def test_another_distance():
    bird = EarlyBird(threshold=3, lookback=1, distance=lambda a, b: float((a - b).abs().sum()))
    found = [bird.update(torch.tensor([[value]])) for value in (0, 3, 5)]
    assert (found, bird.distances[1:]) == ([False, False, True], [3, 2])


def test_early_bird_refusals():
    for threshold in (0, -1, math.nan):
        with pytest.raises(ValueError, match="threshold must be positive"):
            EarlyBird(threshold)
    with pytest.raises(ValueError, match="lookback must be at least 1"):
        EarlyBird(lookback=0)
