"""Local complexity against a plain loop, the closed form of a first layer, and its invariances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piecewise import cells, draw, filled, layer, mlp
from torch import nn
from torch._subclasses import FakeTensorMode

from repgraph.metrics.spline import local_complexity, local_complexity_by_layer, region_codes
from repgraph.metrics.spline.local import _changes

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=8)


def lc(net, x, **options):
    return local_complexity(net, x, progress=False, **options)


def plain(net, x, directions, radius, layers):
    rows = []
    for sample in x:
        vertices = torch.stack([sample + s * radius * v for v in directions for s in (1, -1)])
        codes = region_codes(net, vertices, progress=False)
        rows.append([int((codes.layer(k).float().mean(0) % 1 != 0).sum()) for k in layers])
    return rows


def test_by_hand():
    net = layer([[1.0, 0], [0, 1]], [-0.5, -2])
    for radius, expected in ((0.4, 0), (1, 1), (2.1, 2)):
        assert lc(net, torch.zeros(1, 2), radius=radius, directions=torch.eye(2)).tolist() == [[expected]]


@given(seeds, st.floats(0.01, 3), st.integers(1, 4), st.integers(1, 40))
@few
def test_parity_with_a_plain_loop(seed, radius, p, batch_size):
    net, x = mlp([4, 9, 8, 2], seed), draw(5, 4, seed=seed)
    directions = torch.linalg.qr(draw(4, p, seed=seed + 1)).Q.T
    found = lc(net, x, radius=radius, directions=directions, batch_size=batch_size)
    assert found.dtype == torch.int64
    assert found.tolist() == plain(net, x, directions, radius, ["1", "3"])


@given(seeds, st.floats(0.01, 3))
@few
def test_closed_form_of_the_first_layer(seed, radius):
    w, b, x = draw(64, 5, seed=seed), draw(64, seed=seed + 1), draw(16, 5, seed=seed + 2)
    v = torch.linalg.qr(draw(5, 3, seed=seed + 3)).Q.T
    expected = (radius * (w @ v.T).abs().amax(1) > (x @ w.T + b).abs()).sum(1, keepdim=True)
    assert torch.equal(lc(layer(w.tolist(), b.tolist()), x, radius=radius, directions=v), expected)


@given(seeds)
@few
def test_the_first_layer_never_falls_with_the_radius(seed):
    net, x = mlp([4, 20, 8, 2], seed), draw(6, 4, seed=seed)
    counts = torch.stack([lc(net, x, radius=r, n_dirs=4)[:, 0] for r in (1e-9, 0.1, 0.5, 2, 50)])
    assert (counts.diff(dim=0) >= 0).all()
    assert counts[0].sum() == 0
    assert (counts[-1] == 20).all()


def test_a_lower_bound_on_units_that_change_in_the_hull():
    for seed in range(5):
        net, x = mlp([2, 16, 16, 2], seed), draw(1, 2, seed=seed)
        found = lc(net, x, radius=1, directions=torch.eye(2))[0]
        hull = x.numpy() + np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
        codes = cells(net, hull).codes
        varies = codes.amax(0) != codes.amin(0)
        assert found[0] == varies[:16].sum()
        assert found[1] <= varies[16:].sum()


def test_the_seed_alone_tells_the_directions():
    net, x = mlp([6, 30, 8, 2]), draw(20, 6)
    torch.manual_seed(5)
    one = lc(net, x, radius=0.5, n_dirs=3, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(one, lc(net, x, radius=0.5, n_dirs=3, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, lc(net, x, radius=0.5, n_dirs=3, seed=2))


@given(seeds, st.floats(0.1, 10))
@few
def test_invariances(seed, factor):
    x, v = draw(6, 4, seed=seed), torch.linalg.qr(draw(4, 3, seed=seed + 1)).Q.T
    net = mlp([4, 9, 8, 2], seed)
    expected = lc(net, x, radius=0.7, directions=v)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(lc(net, x, radius=0.7, directions=-v[order]), expected)
    assert torch.equal(lc(net, x, radius=0.35, directions=2 * v), expected)
    assert torch.equal(lc(net, x.flip(0), radius=0.7, directions=v).flip(0), expected)
    net[0].weight.data[3] *= factor
    net[0].bias.data[3] *= factor
    net[2].weight.data[:, 3] /= factor
    assert torch.equal(lc(net, x, radius=0.7, directions=v), expected)


def test_images_and_the_shapes_of_directions():
    net, x = (
        filled(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU())),
        draw(4, 2, 3, 3),
    )
    v = torch.linalg.qr(draw(18, 6)).Q.T
    flat = lc(net, x, radius=0.5, directions=v)
    assert torch.equal(flat, lc(net, x, radius=0.5, directions=v.view(6, 2, 3, 3)))
    assert flat.tolist() == plain(net, x, v.view(6, 2, 3, 3), 0.5, ["1", "4"])


def test_means_by_layer():
    net, x = mlp([4, 9, 8, 2]), draw(6, 4)
    found = local_complexity_by_layer(net, x, radius=0.5, n_dirs=4, progress=False)
    assert found.to_dict() == dict(
        zip(["1", "3"], lc(net, x, radius=0.5, n_dirs=4).double().mean(0).tolist(), strict=True)
    )


def test_smooth_layers_between_gates_are_taken():
    net = filled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU()))
    v = torch.eye(3, dtype=torch.float64)
    assert lc(net, draw(3, 3), radius=1, directions=v).tolist() == plain(net, draw(3, 3), v, 1, ["3"])


def test_refusals():
    net, x = mlp([4, 9, 8, 2]), draw(6, 4)
    for radius in (0, -1, math.nan):
        with pytest.raises(ValueError, match="radius must be positive"):
            lc(net, x, radius=radius, n_dirs=2)
    for n_dirs in (0, 5):
        with pytest.raises(ValueError, match=f"n_dirs must be between 1 and the input dimension 4, got {n_dirs}"):
            lc(net, x, radius=1, n_dirs=n_dirs)
    for directions in (torch.eye(3), torch.ones(4), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match="directions must have shape"):
            lc(net, x, radius=1, directions=directions)
    with pytest.raises(ValueError, match="x must be samples"):
        lc(net, x[0], radius=1, n_dirs=2)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        lc(mlp([4, 9, 2]).train(), x, radius=1, n_dirs=2)
    with pytest.raises(ValueError, match=r"gate|ReLU"):
        lc(nn.Linear(4, 2).double().eval(), x, radius=1, n_dirs=2)


def test_changes_by_hand_and_on_cuda():
    packed = torch.tensor([[0b101, 0], [0b100, 0], [0b101, 0b11], [7, 7], [7, 7], [7, 7]], dtype=torch.uint8)
    assert _changes(packed, 3).tolist() == [3, 0]
    with FakeTensorMode():
        found = _changes(torch.zeros(6, 4, dtype=torch.uint8, device="cuda"), 3)
        assert (found.device.type, found.shape) == ("cuda", (2,))
