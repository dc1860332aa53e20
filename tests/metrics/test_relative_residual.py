"""Relative residual by hand, against NumPy and as theorems."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from repgraph.metrics import relative_residual as module
from repgraph.metrics.relative_residual import _relative_residual, relative_residual

seeds = st.integers(0, 2**32 - 1)
X = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
ADDED = torch.tensor([[0.0, 1.0], [0.0, 1.0]])


def pair(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(*shape, generator=generator, dtype=torch.float64), generator


def reference(x, y):
    a, b = x.double().flatten(1).numpy(), y.double().flatten(1).numpy()
    return np.mean(np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1))


def test_by_hand():
    assert relative_residual(X, X + ADDED) == pytest.approx(0.35, abs=1e-12)
    assert relative_residual(X, X) == 0
    assert relative_residual(X, 3 * X) == pytest.approx(2, abs=1e-12)
    assert relative_residual(X, torch.zeros(2, 2)) == 1


@given(seeds, st.sampled_from([(1, 1), (7, 5), (4, 3, 6), (3, 2, 4, 4)]))
def test_parity_with_numpy(seed, shape):
    x, y, _ = pair(seed, *shape)
    assert relative_residual(x, y) == pytest.approx(reference(x, y), rel=1e-12)


@given(seeds)
def test_invariances(seed):
    x, y, generator = pair(seed, 6, 5)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    scale = 0.1 + torch.rand(6, 1, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    expected = pytest.approx(relative_residual(x, y), rel=1e-9)
    assert relative_residual(x @ turn, y @ turn) == expected
    assert relative_residual(x * scale, y * scale) == expected
    assert relative_residual(x[order], y[order]) == expected
    assert relative_residual(1e200 * x, 1e200 * y) == expected
    assert relative_residual(1e-200 * x, 1e-200 * y) == expected


def test_what_changes_it():
    y = X + ADDED
    value = relative_residual(X, y)
    for other in (relative_residual(X, 2 * y), relative_residual(X + 3, y + 3), relative_residual(y, X)):
        assert abs(other - value) > 0.05


@pytest.mark.parametrize("numbers", [1, 11])
def test_chunks(monkeypatch, numbers):
    x, y, _ = pair(0, 9, 4)
    expected = relative_residual(x, y)
    monkeypatch.setattr(module, "CHUNK", numbers)
    assert relative_residual(x, y) == pytest.approx(expected, rel=1e-14)


def test_small_residuals_in_float32():
    x, y, _ = pair(0, 10, 50)
    x, y = x.float(), (x + 1e-5 * y).float()
    assert relative_residual(x, y) == pytest.approx(reference(x, y), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_types(dtype):
    x, y, _ = pair(0, 20, 6)
    x, y = ((3 * z).round().to(dtype) for z in (x, y))
    assert relative_residual(x, y) == pytest.approx(reference(x, y), rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, X[:1], r"one shape, got \(2, 2\) and \(1, 2\)"),
        (X[:0], X[:0], r"x must have shape .* got \(0, 2\)"),
        (X, X * float("nan"), "y must be finite.* in 2 of 2 samples"),
        (X * float("inf"), X, "x must be finite.* in 2 of 2 samples"),
        (torch.tensor([[0.0, 0], [1, 1]]), X, "no zero samples, to which nothing is relative, got 1 of 2"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "got 2 of 2"),
    ],
)
def test_refusals(x, y, message):
    with pytest.raises(ValueError, match=message):
        relative_residual(x, y)


def test_kernel_stays_on_cuda():
    with FakeTensorMode():
        x = torch.empty(8, 5, device="cuda")
        value = _relative_residual(x, x)
        assert (value.device.type, value.shape, value.dtype) == ("cuda", (), torch.float64)
