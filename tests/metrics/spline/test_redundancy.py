"""Redundant borders by hand, against double loops, folded layers and a greedy written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from piecewise import draw
from torch import nn
from torch._subclasses import FakeTensorMode

from repgraph.metrics.spline import redundant_units, unit_redundancy
from repgraph.metrics.spline.redundancy import _distances

seeds = st.integers(0, 2**32 - 1)


def linear(rows, bias):
    module = nn.Linear(len(rows[0]), len(rows)).double()
    module.weight.data, module.bias.data = (torch.as_tensor(x, dtype=torch.float64) for x in (rows, bias))
    return module


ROWS = linear([(3, 4), (6, 8), (-3, -4), (4, -3), (3, 4)], [1, 2, -1, 1, 3])


def plain(w, b, rho, normalize, orientation):
    w, b = w.flatten(1).tolist(), b.tolist()
    out = torch.zeros(len(w), len(w), dtype=torch.float64)
    norms = [math.hypot(*row) for row in w]
    for i in range(len(w)):
        for j in range(len(w)):
            if i != j:
                cosine = sum(p * q for p, q in zip(w[i], w[j], strict=True)) / (norms[i] * norms[j])
                p, q = (b[i] / norms[i], b[j] / norms[j]) if normalize else (b[i], b[j])
                q = -q if orientation == "ignore" and cosine < 0 else q
                out[i, j] = 1 - abs(cosine) + rho * abs(p - q)
    return out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalize": False, "orientation": "keep"}, [0, 0.05, 0.1, 1, 0.1]),
        ({"normalize": True, "orientation": "keep"}, [0, 0, 0.02, 1, 0.02]),
        ({}, [0, 0, 0, 1, 0.02]),
        ({"rho": 0}, [0, 0, 0, 1, 0]),
        ({"rho": 1}, [0, 0, 0, 1, 0.4]),
    ],
)
def test_by_hand(options, expected):
    assert unit_redundancy(ROWS, **options)[0].tolist() == pytest.approx(expected, abs=1e-15)


@given(seeds, st.floats(0, 2), st.booleans(), st.sampled_from(["ignore", "keep"]))
def test_parity_with_a_double_loop(seed, rho, normalize, orientation):
    w, b = draw(5, 3, seed=seed), draw(5, seed=seed + 1)
    found = unit_redundancy(linear(w, b), rho=rho, normalize=normalize, orientation=orientation)
    torch.testing.assert_close(found, plain(w, b, rho, normalize, orientation))
    assert torch.equal(found, found.T)


@given(seeds, st.floats(0.01, 100), st.sampled_from([-1, 1]))
def test_multiples_draw_the_same_border(seed, factor, sign):
    w, b = draw(4, 3, seed=seed), draw(4, seed=seed + 1)
    w[3], b[3] = sign * factor * w[1], sign * factor * b[1]
    found = unit_redundancy(linear(w, b))
    assert found[1, 3] == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(found[1, :3], found[3, :3], atol=1e-12, rtol=0)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(unit_redundancy(linear(w[order], b[order])), found[order][:, order], atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("module", "bn", "shape"),
    [
        (nn.Linear(3, 4), nn.BatchNorm1d(4), (2, 3)),
        (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, affine=False), (2, 2, 7)),
        (nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.3), (2, 2, 5, 5)),
        (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 3, 3, 3)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_batchnorm_is_folded(module, bn, shape):
    generator = torch.Generator().manual_seed(0)
    bn.running_mean.normal_(generator=generator)
    bn.running_var.uniform_(0.5, 2, generator=generator)
    if bn.affine:
        bn.weight.data.normal_(generator=generator)
        bn.bias.data.normal_(generator=generator)
    module, bn = module.double().eval(), bn.double().eval()
    with torch.no_grad():
        x = draw(*shape)
        both = lambda z: bn(module(z)) - bn(module(torch.zeros_like(z)))  # noqa: E731
        basis = torch.eye(module.weight[0].numel(), dtype=torch.float64).view(-1, *module.weight.shape[1:])
        rows = both(basis).flatten(1).T
        bias = bn(module(torch.zeros_like(basis[:1]))).flatten()
        assert bn(module(x)).shape[1] == 4
    torch.testing.assert_close(unit_redundancy(module, bn=bn), plain(rows, bias, 0.05, True, "ignore"))


def test_filters_of_other_groups_are_orthogonal():
    conv = nn.Conv2d(4, 4, 3, groups=2).double()
    conv.weight.data, conv.bias.data = draw(1, 2, 3, 3).repeat(4, 1, 1, 1), torch.zeros(4).double()
    found = unit_redundancy(conv)
    expected = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


def test_dead_units_have_no_border():
    w, b = draw(4, 3), draw(4, seed=1)
    w[2] = 0
    found = unit_redundancy(linear(w, b))
    alive = [0, 1, 3]
    assert found[2, alive].isnan().all()
    assert found[alive, 2].isnan().all()
    assert found[2, 2] == 0
    torch.testing.assert_close(found[alive][:, alive], plain(w[alive], b[alive], 0.05, True, "ignore"))
    bn = nn.BatchNorm1d(4).double().eval()
    bn.weight.data[1] = 0
    assert unit_redundancy(linear(draw(4, 3), b), bn=bn)[1, alive[:1]].isnan().all()


def test_the_layer_is_left_alone():
    module = nn.Linear(3, 4)
    before = [p.clone() for p in module.parameters()]
    found = unit_redundancy(module)
    assert (found.dtype, found.requires_grad) == (torch.float64, False)
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))


def test_refusals():
    with pytest.raises(ValueError, match="module must be a Linear or Conv layer, got ReLU"):
        unit_redundancy(nn.ReLU())
    with pytest.raises(ValueError, match="bn must be a BatchNorm layer with running statistics, got LayerNorm"):
        unit_redundancy(ROWS, bn=nn.LayerNorm(5))
    with pytest.raises(ValueError, match="bn must be a BatchNorm layer with running statistics"):
        unit_redundancy(ROWS, bn=nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(ValueError, match="bn must have 5 channels as module has units, got 4"):
        unit_redundancy(ROWS, bn=nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="orientation must be 'ignore' or 'keep', got 'drop'"):
        unit_redundancy(ROWS, orientation="drop")
    for rho in (-0.1, math.nan):
        with pytest.raises(ValueError, match="rho must be at least 0"):
            unit_redundancy(ROWS, rho=rho)


# Greedy


def plain_greedy(d, ratio, norms):
    left = list(range(len(d)))
    dropped = []
    while len(dropped) < math.floor(ratio * len(d) + 1e-9):
        i, j = min(((i, j) for i in left for j in left if i < j), key=lambda pair: d[pair[0]][pair[1]])
        out = i if norms[i] <= norms[j] else j
        dropped.append(out)
        left.remove(out)
    return dropped


def test_greedy_by_hand():
    """Pairs in order: 0-1 (0 goes, the smaller), 1-2 (2 goes), then 1-3 (1 goes)."""
    d = torch.tensor([[0, 0.1, 0.15, 0.9], [0.1, 0, 0.2, 0.5], [0.15, 0.2, 0, 0.6], [0.9, 0.5, 0.6, 0]])
    norms = torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert redundant_units(d, 0.75, norms) == [0, 2, 1]
    assert redundant_units(d, 0.5, norms) == [0, 2]
    assert redundant_units(d, 0.49, norms) == [0]
    assert redundant_units(d, 0, norms) == []


@given(seeds, st.integers(1, 8), st.floats(0, 0.99))
def test_parity_with_a_plain_greedy(seed, n, ratio):
    d = draw(n, n, seed=seed).abs()
    d = (d + d.T).fill_diagonal_(0)
    norms = draw(n, seed=seed + 1).abs()
    before = d.clone()
    assert redundant_units(d, ratio, norms) == plain_greedy(d.tolist(), ratio, norms.tolist())
    assert torch.equal(d, before)


def test_tenths_of_ten_units_are_whole():
    d = 1 - torch.eye(10, dtype=torch.float64)
    for tenths in range(10):
        assert len(redundant_units(d, tenths / 10, torch.arange(10.0))) == tenths


def test_dead_units_go_first():
    w, b = draw(6, 3), draw(6, seed=1)
    w[2], w[4], w[1], b[1] = 0, 0, 2 * w[0], 2 * b[0]
    module = linear(w, b)
    found = redundant_units(unit_redundancy(module), 0.5, w.norm(dim=1))
    assert (sorted(found[:2]), found[2]) == ([2, 4], 0)
    assert redundant_units(unit_redundancy(module), 0.2, w.norm(dim=1)) in ([2], [4])


@pytest.mark.parametrize("alive", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 3])
def test_the_only_unit_alive_is_kept(n, alive):
    w = torch.zeros(n, 2, dtype=torch.float64)
    w[min(alive, n - 1)] = 1
    found = redundant_units(unit_redundancy(linear(w, torch.zeros(n))), (n - 1) / n, w.norm(dim=1))
    assert min(alive, n - 1) not in found
    assert len(found) == n - 1


def test_greedy_refusals():
    d = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"d must have shape \(c, c\), got \(3, 2\)"):
        redundant_units(d[:, :2], 0.5, torch.ones(3))
    with pytest.raises(ValueError, match=r"norms must have shape \(3,\), got \(2,\)"):
        redundant_units(d, 0.5, torch.ones(2))
    for ratio in (-0.1, 1, math.nan):
        with pytest.raises(ValueError, match="ratio must be in"):
            redundant_units(d, ratio, torch.ones(3))


def test_distances_stay_on_cuda():
    with FakeTensorMode():
        w, b = torch.empty(5, 3, dtype=torch.float64, device="cuda"), torch.empty(5, dtype=torch.float64, device="cuda")
        group = torch.zeros(5, dtype=torch.int64, device="cuda")
        for normalize in (True, False):
            for ignore in (True, False):
                found = _distances(w, b, group, 0.05, normalize, ignore)
                assert (found.device.type, found.shape, found.dtype) == ("cuda", (5, 5), torch.float64)
