"""Angular distance by hand, against SciPy, at the last token of any padding, and as theorems."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from torch._subclasses import FakeTensorMode

from repgraph.metrics.angular_distance import _angular_distance, _last, angular_distance

seeds = st.integers(0, 2**32 - 1)
X = torch.tensor([[1.0, 0], [0, 2]])
Y = torch.tensor([[1.0, 1], [0, 1]])


def pair(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(*shape, generator=generator, dtype=torch.float64), generator


def reference(x, y):
    rows = zip(x.flatten(1).numpy(), y.flatten(1).numpy(), strict=True)
    return float(np.mean([np.arccos(np.clip(1 - cosine(a, b), -1, 1)) for a, b in rows]) / np.pi)


def test_by_hand():
    assert angular_distance(X, Y) == pytest.approx(0.125, abs=1e-12)
    assert angular_distance(X, X) == 0
    assert angular_distance(X, -X) == 1
    assert angular_distance(X, X.flip(1)) == pytest.approx(0.5, abs=1e-12)


@given(seeds, st.integers(1, 8), st.integers(1, 9))
def test_parity_with_scipy(seed, n, d):
    x, y, _ = pair(seed, n, d)
    assert angular_distance(x, y) == pytest.approx(reference(x, y), abs=1e-7)


@given(seeds)
def test_last_token_with_padding_on_either_side(seed):
    x, y, generator = pair(seed, 5, 6, 4)
    assert angular_distance(x, y) == pytest.approx(reference(x[:, -1], y[:, -1]), abs=1e-9)
    length = torch.randint(1, 7, (5,), generator=generator)
    right = torch.arange(6) < length[:, None]
    rows = torch.arange(5)
    expected = reference(x[rows, length - 1], y[rows, length - 1])
    assert angular_distance(x, y, right) == pytest.approx(expected, abs=1e-9)
    assert angular_distance(x, y, right.long()) == angular_distance(x, y, right)
    left = right.flip(1)
    assert angular_distance(x, y, left) == angular_distance(x, y)
    assert angular_distance(x.masked_fill(~left[..., None], float("nan")), y, left) == angular_distance(x, y)


def test_conv_maps_are_flattened():
    x, y, _ = pair(0, 3, 4, 5, 5)
    assert angular_distance(x, y) == pytest.approx(reference(x, y), abs=1e-9)
    positions = [z.flatten(2).mT.flatten(0, 1) for z in (x, y)]
    assert angular_distance(*positions) == pytest.approx(reference(*positions), abs=1e-9)


@given(seeds)
def test_invariances(seed):
    x, y, generator = pair(seed, 6, 5)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    scales = 0.1 + torch.rand(2, 6, 1, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    expected = pytest.approx(angular_distance(x, y), abs=1e-12)
    assert 0 <= angular_distance(x, y) <= 1
    assert angular_distance(y, x) == expected
    assert angular_distance(x @ turn, y @ turn) == expected
    assert angular_distance(x * scales[0], y * scales[1]) == expected
    assert angular_distance(x[order], y[order]) == expected


@given(seeds)
def test_triangle_inequality(seed):
    x, y, generator = pair(seed, 6, 3)
    z = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    assert angular_distance(x, z) <= angular_distance(x, y) + angular_distance(y, z) + 1e-12


def test_translation_changes_it():
    assert angular_distance(X + 3, Y + 3) < 0.1


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7, 1e-12, 1 - 1e-9])
def test_small_and_straight_angles_keep_their_digits(angle):
    """arccos of a float64 cosine would give 0 below 1e-8."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[math.cos(angle * math.pi), math.sin(angle * math.pi)]], dtype=torch.float64)
    assert angular_distance(x, y) == pytest.approx(angle, rel=1e-12)


def test_zero_vectors_are_at_right_angles():
    zero = torch.zeros(1, 2)
    assert angular_distance(zero, X[:1]) == angular_distance(zero, zero) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_types(dtype):
    x, y, _ = pair(0, 20, 4, 6)
    x, y = ((3 * z).round().to(dtype) for z in (x, y))
    assert angular_distance(x, y) == pytest.approx(angular_distance(x.double(), y.double()), abs=1e-15)


TOKENS = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("x", "y", "mask", "message"),
    [
        (X, Y[:1], None, r"one shape, got \(2, 2\) and \(1, 2\)"),
        (X[:, :0], Y[:, :0], None, r"x must have shape .* got \(2, 0\)"),
        (X * float("nan"), Y, None, "x must be finite.* in 2 of 2 samples"),
        (X, Y, torch.ones(2, 2), "mask needs tokens"),
        (TOKENS, TOKENS, torch.ones(3, 2), r"mask must be a tensor of shape \(2, 3\)"),
        (TOKENS, TOKENS, torch.zeros(2, 3), "a token, got none in 2 of 2 samples"),
        (TOKENS, TOKENS, torch.full((2, 3), 0.5), "mask must be bool or 0 and 1"),
    ],
)
def test_refusals(x, y, mask, message):
    with pytest.raises(ValueError, match=message):
        angular_distance(x, y, mask)


def test_kernels_stay_on_cuda():
    with FakeTensorMode():
        x = torch.empty(4, 6, 5, device="cuda")
        for mask in (None, torch.ones(4, 6, dtype=torch.bool, device="cuda")):
            last = _last(x, mask)
            assert (last.device.type, last.shape) == ("cuda", (4, 5))
        value = _angular_distance(last, last)
        assert (value.device.type, value.shape, value.dtype) == ("cuda", (), torch.float64)
