"""Decision boundaries against the outputs of the network and against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piecewise import BOX, ZOO, at, cells, filled, layer, mlp, outputs, plane
from torch import nn

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=6)


def with_output(net, weight, bias):
    out = nn.Linear(len(weight[0]), len(weight)).double()
    out.weight.data, out.bias.data = (torch.tensor(x, dtype=torch.float64) for x in (weight, bias))
    return nn.Sequential(*net, out).eval()


def on(pieces, shares=(0.02, 0.5, 0.9)):
    return np.concatenate([pieces[:, 0] + s * (pieces[:, 1] - pieces[:, 0]) for s in shares])


def crossings(values, u):
    """Points between neighbours on each grid line where a value (side, side) changes sign, by interpolation."""
    found = []
    for axis in (0, 1):
        v, p = (np.moveaxis(x, axis, 0) for x in (values, u))
        change = (v[1:] > 0) != (v[:-1] > 0)
        found.append(((p[1:] + p[:-1]) / 2)[change])
    return np.concatenate(found)


def distance(points, pieces):
    """From each point to the nearest piece."""
    start, run = pieces[:, 0], pieces[:, 1] - pieces[:, 0]
    off = points[:, None] - start
    t = ((off * run).sum(2) / np.maximum((run * run).sum(1), 1e-300)).clip(0, 1)
    return np.linalg.norm(off - t[..., None] * run, axis=2).min(1)


def grid(side=61, half=1.0):
    line = np.linspace(-half, half, side) * 0.9999
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1)


def test_by_hand():
    """Outputs |u1| and 1/2 meet at u1 = -1/2 and 1/2."""
    net = with_output(layer([[1, 0], [-1, 0]], [0, 0]), [[1, 1], [0, 0]], [0, 0.5])
    found = cells(net).decision_boundary(0, 1)
    assert sorted(found[:, 0, 0]) == pytest.approx([-0.5, 0.5])
    assert np.array_equal(found[..., 0], found[:, [1, 0], 0])
    assert np.abs(found[..., 1]).tolist() == [[1, 1], [1, 1]]
    single = with_output(layer([[1, 0], [-1, 0]], [0, 0]), [[1, 1]], [-0.25])
    assert sorted(cells(single).decision_boundary()[:, 0, 0]) == pytest.approx([-0.25, 0.25])


@given(seeds)
@few
def test_two_outputs_are_equal_on_their_boundary(seed):
    net = mlp([2, 7, 6, 3], seed)
    found = cells(net, 2 * BOX)
    u = grid(half=2)
    values = outputs(net, at(found, u.reshape(-1, 2))).reshape(61, 61, 3)
    for a, b in ((0, 1), (2, 0)):
        pieces = found.decision_boundary(a, b)
        if len(pieces):
            out = outputs(net, at(found, on(pieces)))
            np.testing.assert_allclose(out[:, a], out[:, b], atol=1e-9, rtol=0)
        marks = crossings(values[..., a] - values[..., b], u)
        assert len(pieces) or not len(marks)
        if len(marks):
            assert distance(marks, pieces).max() < 4 / 60


@given(seeds)
@few
def test_the_two_largest_outputs_are_equal_where_the_class_changes(seed):
    net = mlp([2, 7, 6, 4], seed)
    found = cells(net, 2 * BOX)
    pieces = found.decision_boundary()
    if len(pieces):
        top = np.sort(outputs(net, at(found, on(pieces))), 1)
        np.testing.assert_allclose(top[:, -1], top[:, -2], atol=1e-9, rtol=0)
    u = grid(half=2)
    best = outputs(net, at(found, u.reshape(-1, 2))).argmax(1).reshape(61, 61)
    for label in range(4):
        marks = crossings(np.where(best == label, 1.0, -1.0), u)
        if len(marks):
            assert distance(marks, pieces).max() < 4 / 60


@pytest.mark.parametrize("name", ["leaky", "residual", "padded max", "jump"])
def test_boundaries_of_other_networks(name):
    shape, make = ZOO[name]
    net = filled(make())
    found = cells(net, 0.5 * BOX, *plane(shape))
    out = outputs(net, at(found, np.array([p.mean(0) for p in found.polygons])))
    with torch.no_grad():
        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        last.bias[0] -= float(np.median(out[:, 0] - out[:, 1]))
    found = cells(net, 0.5 * BOX, *plane(shape))
    pieces = found.decision_boundary(0, 1)
    assert len(pieces)
    out = outputs(net, at(found, on(pieces)))
    np.testing.assert_allclose(out[:, 0], out[:, 1], atol=1e-9, rtol=0)


@given(seeds)
@few
def test_pieces_join_up(seed):
    """A continuous function's zero set has no loose ends inside the domain."""
    pieces = cells(mlp([2, 7, 6, 1], seed), 2 * BOX).decision_boundary()
    points = pieces.reshape(-1, 2)
    inner = points[np.abs(points).max(1) < 2 - 1e-9]
    for p in inner:
        assert (np.linalg.norm(points - p, axis=1) < 1e-7).sum() >= 2


def test_order_and_pair_do_not_matter_for_two_outputs():
    net = mlp([2, 7, 6, 2])
    with torch.no_grad():
        net[4].bias += net(torch.zeros(1, 2).double())[0].flip(0)  # equal at the origin
    found = cells(net, 2 * BOX)
    sets = [
        sorted(np.sort(piece, 0).round(9).tolist() for piece in found.decision_boundary(*pair))
        for pair in ((0, 1), (1, 0), ())
    ]
    assert sets[0] == sets[1] == sets[2]
    assert sets[0]


def test_no_boundary_where_one_output_leads():
    net = with_output(layer([[1, 0]], [0]), [[1], [1]], [0, 1])
    assert cells(net).decision_boundary().shape == (0, 2, 2)
    assert cells(net).decision_boundary(0, 1).shape == (0, 2, 2)


def test_outputs_that_are_equal_but_for_rounding_have_no_boundary():
    """Both outputs are 0.6 relu(u1) + 0.6 relu(u2), as 0.1 + 0.2 + 0.3 and as 0.6 of equal units."""
    rows = [[1, 0.3]] * 3 + [[0.2, 1]] * 3
    net = with_output(layer(rows, [0.1] * 6), [[0.1, 0.2, 0.3] * 2, [0.3, 0.3, 0, 0.6, 0, 0]], [0.7, 0.7])
    assert len(cells(net).decision_boundary(0, 1)) == 0


def test_refusals():
    found = cells(mlp([2, 5, 4, 3]))
    for pair in ((0, None), (None, 1), (1, 1), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match=r"a and b must be two different outputs in 0\.\.2"):
            found.decision_boundary(*pair)
    with pytest.raises(ValueError, match="partition is by some of the layers"):
        cells(mlp([2, 5, 4, 3]), layers=["1"]).decision_boundary(0, 1)
