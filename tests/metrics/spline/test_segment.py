"""Cells along a segment: by hand, against 200,001 points, and the outputs in between."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piecewise import ZOO, Net, cells, draw, filled, layer, mlp, outputs
from torch import nn

from repgraph.metrics.spline import max_regions_bound, region_codes, segment_regions

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=6)


def ends(shape, seed=0):
    return 2 * draw(*shape, seed=seed + 1), 2 * draw(*shape, seed=seed + 2)


def along(x0, x1, t):
    t = torch.as_tensor(t).view(-1, *[1] * x0.ndim)
    return x0 + t * (x1 - x0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_tents(count):
    net = layer([[2.0], [4.0]], [0.0, -2.0], *[([[2.0, -2.0], [4.0, -4.0]], [0.0, -2.0])] * (count - 1))
    found = segment_regions(net, torch.zeros(1), torch.ones(1))
    assert found.count == 2**count
    assert found.t.tolist() == [k / 2**count for k in range(2**count + 1)]


def test_breaks_by_hand():
    net = layer([[2.0], [-4.0], [0.0], [4.0]], [-0.5, 3.0, 0.0, -1.0])
    found = segment_regions(net, torch.tensor([0.0]), torch.tensor([1.0]))
    assert found.t.tolist() == [0, 0.25, 0.75, 1]
    assert found.codes.tolist() == [[0, 1, 0, 0], [1, 1, 0, 1], [1, 0, 0, 1]]
    assert found.values[0].tolist() == [[0, 3, 0, 0], [0, 2, 0, 0]]
    assert repr(found) == "SegmentPartition(cells=3, gates=4, layers=1)"


def test_breaks_at_the_ends_are_none():
    assert segment_regions(layer([[1.0], [1.0]], [0.0, -1.0]), torch.zeros(1), torch.ones(1)).t.tolist() == [0, 1]


@given(seeds, st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh]))
@settings(max_examples=4)
def test_as_many_cells_as_sign_changes_at_200001_points(seed, gate):
    net, (x0, x1) = mlp([5, 7, 6, 2], seed, gate), ends((5,), seed)
    found = segment_regions(net, x0, x1)
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    codes = region_codes(net, along(x0, x1, t), progress=False, batch_size=50_000).bits
    changes = (codes[1:] != codes[:-1]).any(1)
    hidden = int((found.t.diff() < 5e-6).sum())  # cells between two of the points
    assert found.count - hidden <= int(changes.sum()) + 1 <= found.count
    nearest = np.abs(found.t[1:-1].numpy()[:, None] - t[1:][changes].numpy()).min(1)
    assert (nearest <= 5e-6).all()


@pytest.mark.parametrize("name", ZOO)
def test_outputs_and_codes_between_the_breaks(name):
    shape, make = ZOO[name]
    net, (x0, x1) = filled(make()), ends(shape)
    found = segment_regions(net, x0, x1)
    assert found.count > 1
    assert (found.t.diff() > 0).all()
    assert (found.t[0], found.t[-1]) == (0, 1)
    assert len({tuple(c) for c in found.codes.tolist()}) == found.count
    for share in (0.01, 0.4, 0.99):
        t = found.t[:-1] + share * found.t.diff()
        expected = (1 - share) * found.values[:, 0] + share * found.values[:, 1]
        np.testing.assert_allclose(outputs(net, along(x0, x1, t)), expected, atol=1e-9, rtol=0)
        real = region_codes(net, along(x0, x1, t), progress=False)
        for key in real.layers:
            assert torch.equal(found.region.layer(key), real.layer(key))
    if name not in ("jump",):
        torch.testing.assert_close(found.values[:-1, 1], found.values[1:, 0], atol=1e-9, rtol=0)


@given(seeds)
@few
def test_the_way_back(seed):
    net, (x0, x1) = mlp([3, 8, 7, 2], seed), ends((3,), seed)
    there, back = segment_regions(net, x0, x1), segment_regions(net, x1, x0)
    torch.testing.assert_close(1 - there.t.flip(0), back.t, atol=1e-11, rtol=0)
    assert torch.equal(there.codes.flip(0), back.codes)


@given(seeds, st.floats(0.1, 0.9))
@few
def test_halves_hold_all_cells(seed, share):
    net, (x0, x1) = mlp([3, 8, 7, 2], seed), ends((3,), seed)
    whole = segment_regions(net, x0, x1)
    middle = x0 + share * (x1 - x0)
    first, second = segment_regions(net, x0, middle), segment_regions(net, middle, x1)
    assert whole.count == first.count + second.count - 1
    t = torch.cat((share * first.t[:-1], share + (1 - share) * second.t[1:]))
    torch.testing.assert_close(t, whole.t, atol=1e-11, rtol=0)


@given(seeds)
@few
def test_the_same_breaks_as_in_a_thin_slice(seed):
    net, (x0, x1) = mlp([3, 8, 7, 2], seed), ends((3,), seed)
    found = segment_regions(net, x0, x1)
    basis = torch.stack((x1 - x0, torch.linalg.cross(x1 - x0, x0)))
    thin = cells(net, [[0, -1e-7], [1, -1e-7], [1, 1e-7], [0, 1e-7]], x0, basis)
    assert {tuple(c) for c in found.codes.tolist()} <= {tuple(c) for c in thin.codes.tolist()}
    assert found.count <= max_regions_bound([8, 7], 1)


@given(seeds)
@few
def test_a_unit_that_cancels_breaks_nothing(seed):
    a, b = draw(2, seed=seed).tolist()
    net = layer([[a], [-a], [a * b], [-a * b]], [0.0] * 4, ([[b, -b, -1.0, 1.0], [1.0, 0, 0, 0]], [0.0, 1.0]))
    found = segment_regions(net, torch.tensor([-1.3]), torch.tensor([1.7]))
    assert found.count == 2
    assert not found.codes[:, 4].any()


@pytest.mark.parametrize("name", ["mlp", "padded max", "clamp"])
def test_the_workspace_does_not_matter(name, monkeypatch):
    shape, make = ZOO[name]
    net, (x0, x1) = filled(make()), ends(shape)
    whole = segment_regions(net, x0, x1)
    monkeypatch.setattr("repgraph.metrics.spline.affine._WORKSPACE", 1)
    parts = segment_regions(net, x0, x1, max_regions=whole.count)
    torch.testing.assert_close(parts.t, whole.t, atol=1e-12, rtol=0)
    assert torch.equal(parts.codes, whole.codes)
    with pytest.raises(ValueError, match=f"max_regions is {whole.count - 1}"):
        segment_regions(net, x0, x1, max_regions=whole.count - 1)


def test_the_ends_are_left_alone_by_an_in_place_gate():
    net = filled(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)))
    x0, x1 = torch.tensor([-1.0, -0.5]).double(), torch.tensor([1.0, 1.0]).double()
    found = segment_regions(net, x0, x1)
    assert x0.tolist() == [-1, -0.5]
    assert x1.tolist() == [1, 1]
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    codes = region_codes(net, torch.stack([along(x0, x1, s)[0] for s in t]), progress=False).bits
    assert torch.equal(found.codes[torch.searchsorted(found.t, t) - 1], codes)


@pytest.mark.parametrize("axes", [(-1,), ()])
def test_a_single_output_without_its_axis(axes):
    net = filled(Net(lambda n, x: n.b(n.a(x).relu()).squeeze(*axes), a=nn.Linear(2, 5), b=nn.Linear(5, 1)))
    x0, x1 = ends((2,))
    kept = segment_regions(nn.Sequential(net.a, nn.ReLU(), net.b).eval(), x0, x1)
    torch.testing.assert_close(segment_regions(net, x0, x1).t, kept.t)


def test_single_and_double_ends():
    net, (x0, x1) = mlp([3, 8, 7, 2]), ends((3,))
    expected = segment_regions(net, x0.float().double(), x1)
    torch.testing.assert_close(segment_regions(net, x0.float(), x1).t, expected.t, atol=1e-12, rtol=0)


def test_refusals():
    net = mlp([3, 8, 7, 2])
    x = draw(3)
    for bad, message in (
        ((x, x.clone()), "x0 and x1 must differ"),
        ((x, x[:2]), r"same shape, got \(3,\) and \(2,\)"),
        ((x, x / 0), "x0 and x1 must be finite"),
        ((x, x + torch.nan), "x0 and x1 must be finite"),
        (
            (torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)),
            "real numbers, got inputs of torch.int64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            segment_regions(net, *bad)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        segment_regions(mlp([3, 8, 7, 2]).train(), x, x + 1)
    with pytest.raises(ValueError, match="layer '1' calls gelu, which is not piecewise affine"):
        segment_regions(mlp([3, 8, 7, 2], gate=nn.GELU), x, x + 1)
