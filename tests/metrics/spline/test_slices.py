"""Cells of a plane by hand, against dense samples, and independent of how the plane is given."""

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piecewise import BOX, ZOO, Net, at, cells, code_areas, draw, filled, holders, layer, mlp, outputs, plane
from torch import nn

from repgraph.metrics.spline import max_regions_bound, region_codes

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=6)


def areas(partition):
    return sorted(partition.areas.tolist())


# By hand


@pytest.mark.parametrize(("n", "expected"), [(1, 2), (2, 4), (3, 7), (5, 16), (8, 37)])
def test_lines_in_general_position(n, expected):
    found = cells(layer(draw(n, 2, seed=7).tolist(), draw(n, seed=8).tolist()), 1e3 * BOX)
    assert found.count == expected == max_regions_bound([n], 2)
    assert len(found.pairs) == n * n  # each line is cut in n pieces


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_lines_through_the_origin(n):
    found = cells(layer(draw(n, 2, seed=7).tolist(), [0.0] * n), 1e3 * BOX)
    assert found.count == 2 * n
    assert len(found.pairs) == (2 * n if n > 1 else 1)


def test_triangle_of_three_lines():
    found = cells(layer([[1, 0], [0, 1], [-1, -1]], [0, 0, 1]), 10 * BOX)
    assert areas(found) == pytest.approx([0.5, 40.5, 40.5, 59.5, 59.5, 99.5, 100], abs=1e-9)
    assert code_areas(found)[1, 1, 1] == pytest.approx(0.5, abs=1e-12)
    assert len(code_areas(found)) == 7
    assert (0, 0, 0) not in code_areas(found)


@pytest.mark.parametrize(
    ("rows", "bias", "expected"),
    [
        ([[1, 0]] * 3, [0, 0.5, -0.5], 4),
        ([[1, 0], [2, 0], [0, 1]], [0.5, 1, 0], 4),
        ([[1, 0], [-2, 0]], [0.5, -1], 2),
        ([[1, 0], [0, 1], [1, 1]], [0, 0, 0], 6),
        ([[1, 0], [0, 1], [1, 1], [1, -1]], [0, 0, 0, 0], 8),
        ([[1, 0], [0, 1]], [1, -1], 1),  # along the sides of the domain
        ([[1, 1], [1, -1]], [2, 2], 1),  # through its corners alone
        ([[0, 0], [1, 0]], [1, 0], 2),
    ],
)
def test_special_lines(rows, bias, expected):
    assert cells(layer(rows, bias)).count == expected


def test_bent_borders_of_a_second_layer():
    found = cells(layer([[1, 0], [-1, 0], [0, 1], [0, -1]], [0] * 4, ([[1, 1, 1, 1]], [-1])), 9 * BOX)
    assert areas(found) == pytest.approx([0.5] * 4 + [80.5] * 4, abs=1e-12)
    # four spokes, each cut in two by the diamond, and its four sides
    assert len(found.pairs) == 12
    assert found.lengths.sum() == pytest.approx(4 * 9 + 4 * 2**0.5, abs=1e-12)


@given(seeds, st.floats(0.01, 100))
@few
def test_three_lines_through_one_point_make_six_cells(seed, scale):
    w, p = draw(3, 2, seed=seed), 0.5 * torch.tanh(draw(2, seed=seed + 1))
    w = w / w.norm(dim=1, keepdim=True) * scale
    angles = torch.atan2(w[:, 1], w[:, 0]) % torch.pi
    if (angles.sort().values.diff() < 1e-3).any():
        return
    assert cells(layer(w.tolist(), (-w @ p).tolist())).count == 6


@pytest.mark.parametrize("beside", [True, False])
@given(seed=seeds)
@few
def test_a_unit_that_cancels_cuts_nothing(beside, seed):
    """A second layer's unit that computes v.x - v.x, by way of different first units; rounding alone is left."""
    v, (p, q) = draw(2, 2, seed=seed), draw(2, seed=seed + 1).tolist()
    rows = torch.stack((v[0], -v[0], v[1], -v[1], p * v[0] + q * v[1], -p * v[0] - q * v[1])).tolist()
    cancels = [p, -p, q, -q, -1.0, 1.0]
    more = ([cancels, [1.0, 0, 0, 0, 0, 0]], [0.0, 1.0]) if beside else ([cancels], [0.0])
    found = cells(layer(rows, [0.0] * 6, more), 3 * BOX)
    assert found.count == 6
    assert not found.codes[:, 6].any()


# Against samples


@pytest.mark.parametrize("name", ZOO)
def test_networks_are_affine_on_their_cells(name):
    shape, make = ZOO[name]
    net = filled(make())
    origin, basis = plane(shape)
    half = 0.4 if name == "padded max" else 1
    found = cells(net, half * BOX, origin, basis)
    u = np.random.default_rng(0).uniform(-half, half, (4000, 2))
    held = holders(found, u)
    assert (held.sum(0) == 1).all()
    cell = held.argmax(0)
    forms = found.forms[cell]
    expected = forms[:, 0] + np.einsum("np,npk->nk", u, forms[:, 1:] - forms[:, :1])
    np.testing.assert_allclose(outputs(net, at(found, u)), expected, atol=1e-9, rtol=0)
    real = region_codes(net, at(found, u), progress=False)
    for key in real.layers:
        assert torch.equal(found.region.layer(key)[cell], real.layer(key))
    assert set(found.region.layers) - set(real.layers) == {k for k in found.region.layers if k.endswith("#pool")}
    assert found.areas.sum() == pytest.approx(4 * half**2, abs=1e-9)
    assert len(code_areas(found)) == found.count
    assert nx.is_connected(found.to_networkx())


@given(seeds, st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh]))
@few
def test_every_code_of_a_grid_is_a_cell(seed, gate):
    net = mlp([2, 7, 6, 3], seed, gate)
    found = cells(net, 3 * BOX)
    line = torch.linspace(-3, 3, 60, dtype=torch.float64)
    codes = region_codes(net, torch.cartesian_prod(line, line), progress=False).bits
    assert {tuple(c) for c in codes.unique(dim=0).tolist()} <= set(code_areas(found))
    assert found.areas.sum() == pytest.approx(36, abs=1e-9)


@given(seeds)
@few
def test_largest_entries_of_windows(seed):
    """Padding, dilation and dead zeros that tie; the bits of the pooling name the first largest entry."""
    net = filled(
        nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.MaxPool2d(2, 1, 1), nn.Flatten(), nn.Linear(16, 2)), seed
    )
    origin, basis = plane((1, 4, 4), seed)
    found = cells(net, BOX, origin, basis)
    middles = np.array([p.mean(0) for p in found.polygons])
    with torch.no_grad():
        h = nn.functional.pad(net[:2](at(found, middles)), (1, 1, 1, 1), value=-torch.inf)
    windows = nn.functional.unfold(h.nan_to_num(neginf=-1e9), 2).view(len(h), 4, 16).transpose(1, 2)
    expected = nn.functional.one_hot(windows.argmax(2), 4).flatten(1)
    assert torch.equal(found.region.layer("2#pool").long(), expected)


def test_windows_whose_borders_coincide_keep_their_neighbours():
    """Entries 0, -x and 2x of one window: all three ties lie on the line x = 0, and 0 is never the largest."""
    net = Net(lambda n, x: n.gate(n.pool(n.lin(x).view(-1, 1, 2, 2)) + 9), lin=nn.Linear(2, 4), pool=nn.MaxPool2d(2),
              gate=nn.ReLU())  # fmt: skip
    net = net.double().eval()
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        rows = torch.tensor([[0.0, 0], [-1, 0], [2, 0]])[order]
        net.lin.weight.data = torch.cat((rows, torch.zeros(1, 2))).double()
        net.lin.bias.data = torch.tensor([0.0, 0, 0, -5]).double()
        found = cells(net)
        assert found.count == 2
        assert found.pairs.tolist() in ([[0, 1]], [[1, 0]])
        assert found.lengths.tolist() == [2]


# How the plane is given


@given(seeds)
@few
def test_orientation_start_and_turn_of_the_domain_do_not_matter(seed):
    net = mlp([2, 6, 5, 2], seed)
    expected = code_areas(cells(net))
    assert code_areas(cells(net, BOX[::-1])) == pytest.approx(expected, abs=1e-12)
    assert code_areas(cells(net, np.roll(BOX, 2, 0).tolist())) == pytest.approx(expected, abs=1e-12)
    c, s = np.cos(0.7), np.sin(0.7)
    turn = np.array([[c, -s], [s, c]])
    basis = torch.from_numpy(turn)
    assert code_areas(cells(net, BOX @ turn.T, basis=basis)) == pytest.approx(expected, abs=1e-12)


@given(seeds, st.sampled_from([1e-6, 1e-3, 1e3, 1e6]))
@few
def test_scale_of_the_basis_scales_areas(seed, scale):
    net = mlp([2, 6, 5, 2], seed)
    expected = code_areas(cells(net))
    found = code_areas(cells(net, BOX / scale, basis=scale * torch.eye(2, dtype=torch.float64)))
    assert {code: area * scale**2 for code, area in found.items()} == pytest.approx(expected, abs=1e-8)


@given(seeds)
@few
def test_skew_basis_and_moved_origin(seed):
    net = mlp([2, 6, 5, 2], seed)
    expected = code_areas(cells(net))
    basis, origin = torch.tensor([[2.0, 1.0], [0.5, -1.0]]).double(), 10 * draw(2, seed=seed)
    domain = np.linalg.solve(basis.numpy().T, (BOX - origin.numpy()).T).T
    found = code_areas(cells(net, domain, origin, basis))
    assert {code: 2.5 * area for code, area in found.items()} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("away", [1e2, 1e4, 1e6])
def test_a_far_origin(away):
    net = mlp([2, 6, 5, 2])
    expected = code_areas(cells(net))
    far = torch.tensor([away, -away], dtype=torch.float64)
    assert code_areas(cells(net, BOX - far.numpy(), far)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("corners", [3, 6, 40])
def test_polygons_with_many_corners(corners):
    net, angle = mlp([2, 6, 5, 2]), 2 * np.pi * np.arange(corners) / corners
    found = cells(net, np.stack((np.cos(angle), np.sin(angle)), 1))
    assert found.areas.sum() == pytest.approx(corners / 2 * np.sin(2 * np.pi / corners), abs=1e-12)
    square = code_areas(cells(net))
    assert all(area <= square[code] + 1e-12 for code, area in code_areas(found).items())


def test_a_single_precision_plane_is_computed_in_double():
    net = mlp([3, 6, 5, 2])
    origin, basis = draw(3).float(), draw(2, 3, seed=1).float()
    found, expected = cells(net, BOX, origin, basis), cells(net, BOX, origin.double(), basis.double())
    assert np.array_equal(found.areas, expected.areas)
    assert found.forms.dtype == np.float64


# Layers, limits, parts


def test_first_layers_coarsen_the_partition():
    net = mlp([2, 6, 5, 4, 2])
    full = cells(net, 3 * BOX)
    for width, layers in ((6, ["1"]), (11, ["1", "3"]), (11, ["3", "1"]), (15, ["1", "3", "5"])):
        found = cells(net, 3 * BOX, layers=layers)
        merged = {}
        for code, area in code_areas(full).items():
            merged[code[:width]] = merged.get(code[:width], 0) + area
        assert code_areas(found) == pytest.approx(merged, abs=1e-9)
        assert list(found.region.layers) == sorted(layers)
        assert (found.forms is None) == (width < 15)
    assert code_areas(cells(net, 3 * BOX, layers="1")) == code_areas(cells(net, 3 * BOX, layers=["1"]))


def test_other_choices_of_layers_are_refused():
    net = mlp([2, 6, 5, 4, 2])
    for layers, message in (
        (["3"], "layers must be the first ones in execution order: '1' comes before"),
        (["1", "5"], "layers must be the first ones in execution order: '3' comes before"),
        (["1", "7"], "no gate layer '7'; the gate layers are 1, 3, 5"),
        ([], "layers is empty; the gate layers are 1, 3, 5"),
    ):
        with pytest.raises(ValueError, match=message):
            cells(net, layers=layers)


def test_limit_of_cells():
    net = mlp([2, 6, 5, 2])
    count = cells(net).count
    assert cells(net, max_regions=count).count == count
    for limit in (count - 1, 1):
        with pytest.raises(ValueError, match=f"max_regions is {limit}, and there are more cells at '[13]'"):
            cells(net, max_regions=limit)


@pytest.mark.parametrize("name", ["mlp", "residual", "max 1-D", "clamp"])
@pytest.mark.parametrize("room", [1, 3000])
def test_the_partition_does_not_depend_on_the_workspace(name, room, monkeypatch):
    shape, make = ZOO[name]
    net = filled(make())
    whole = cells(net, 0.5 * BOX, *plane(shape))
    monkeypatch.setattr("repgraph.metrics.spline.affine._WORKSPACE", room)
    parts = cells(net, 0.5 * BOX, *plane(shape), max_regions=whole.count)
    assert whole.count > 5
    assert code_areas(parts) == pytest.approx(code_areas(whole), abs=1e-12)
    edges = [
        {
            frozenset((tuple(codes[a]), tuple(codes[b]))): length
            for (a, b), length in zip(found.pairs, found.lengths, strict=True)
        }
        for found, codes in ((whole, whole.codes.tolist()), (parts, parts.codes.tolist()))
    ]
    assert edges[0] == pytest.approx(edges[1], abs=1e-12)
    with pytest.raises(ValueError, match="max_regions"):
        cells(net, 0.5 * BOX, *plane(shape), max_regions=whole.count - 1)
