"""CKNNA against masked matrices in float64, and as theorems."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from related_layers import X, Y, layers
from torch._subclasses import FakeTensorMode

from repgraph.metrics.similarity import cknna, gram, linear_cka, rbf_cka
from repgraph.metrics.similarity.cknna import Near, _cknna, _near, _nearest

seeds = st.integers(0, 2**32 - 1)


def products(x):
    """Inner products of the features, without those of a sample with itself."""
    k = x.flatten(1).double().numpy()
    k = k @ k.T
    np.fill_diagonal(k, 0)
    return k


def mask(k, count):
    """Whether j is among those of largest inner product with i; the lowest index first where they tie."""
    k = k.copy()
    np.fill_diagonal(k, -np.inf)
    m = np.zeros(k.shape)
    for i, row in enumerate(k):
        m[i, np.argsort(-row, kind="stable")[:count]] = 1
    return m


def masked_cknna(x, y, count):
    """The definition: HSIC of the products of the pairs that are neighbours in both arguments of that HSIC."""

    def s(p, q):
        n = len(p)
        common = mask(p, count) * mask(q, count)
        a, b = common * p, common * q
        total = a.sum() * b.sum() / ((n - 1) * (n - 2))
        return (np.trace(a @ b) + total - 2 / (n - 2) * (a.sum(0) @ b.sum(1))) / (n * (n - 3))

    p, q = products(x), products(y)
    return s(p, q) / math.sqrt(s(p, p) * s(q, q)) if min(s(p, p), s(q, q)) > 0 else math.nan


def value_of(x, y, k):
    """The value, with the warning where it is undefined for so few samples."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the similarity is undefined")
        return cknna(x, y, k)


# Parity


@given(seeds, st.integers(4, 30), st.integers(1, 12), st.data())
def test_parity_with_masked_matrices(seed, n, d, data):
    x, y, _ = layers(seed, n, d)
    k = data.draw(st.integers(2, n - 1))
    assert value_of(x, y, k) == pytest.approx(masked_cknna(x, y, k), rel=1e-8, abs=1e-9, nan_ok=True)


def test_ties_go_to_the_lowest_index():
    x = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 1], [1, 0], [2, 1]], dtype=torch.float64)
    y = torch.cat((Y, Y[:2] + 1))
    for k in (2, 3, 4):
        for dtype in (torch.float32, torch.float64):
            expected = masked_cknna(x, y, k)
            assert cknna(x.to(dtype), y.to(dtype), k) == pytest.approx(expected, abs=1e-5)


def test_the_mask_is_not_symmetric_and_each_hsic_has_its_own():
    x, y, _ = layers(0, 60, 8)
    near, n = _near(x, 10), 60
    one_sided = np.zeros((n, n))
    one_sided.flat[near.place.numpy()] = near.value.numpy() * 2.0 ** gram(x).exponent
    assert not np.array_equal(one_sided, one_sided.T)
    assert one_sided == pytest.approx(products(x) * mask(products(x), 10), abs=1e-10)
    common = mask(products(x), 10) * mask(products(y), 10)
    assert cknna(x, y) == pytest.approx(masked_cknna(x, y, 10), abs=1e-9)
    a, b = common * products(x), common * products(y)
    jointly = np.trace(a @ b) / math.sqrt(np.trace(a @ a) * np.trace(b @ b))
    assert cknna(x, y) < jointly - 0.1


def test_constant_features_are_undefined():
    y = layers(0)[1]
    with pytest.warns(UserWarning, match="constant"):
        assert math.isnan(cknna(torch.ones(len(y), 3), y))


# Theorems


@given(seeds, st.integers(5, 30))
def test_all_neighbors_give_unbiased_cka(seed, n):
    x, y, _ = layers(seed, n)
    assert cknna(x, y, n - 1) == pytest.approx(linear_cka(x, y, unbiased=True), abs=1e-9)


@given(seeds, st.integers(2, 39))
def test_scale_and_joint_permutation(seed, k):
    x, y, generator = layers(seed, 40)
    order = torch.randperm(40, generator=generator)
    value = cknna(x, y, k)
    assert -1 < value < 1.5
    assert cknna(y, x, k) == pytest.approx(value, abs=0.1)  # not symmetric in the sums of the masked rows
    assert cknna(x[order], y[order], k) == pytest.approx(value, abs=1e-9)
    assert cknna(3 * x, y, k) == pytest.approx(value, abs=1e-9)
    assert cknna(x, 3 * x, k) == pytest.approx(1, abs=1e-9)


@given(seeds, st.integers(2, 39))
@settings(max_examples=10)
def test_gram_matrices_and_prepared_layers_in_place_of_features(seed, k):
    x, y, generator = layers(seed, 40)
    order = torch.randperm(40, generator=generator)
    value = cknna(x, y, k)
    assert cknna(gram(x), gram(y), k) == cknna(gram(x), y, k) == cknna(_near(x, k), _near(y, k)) == value
    shuffled = pytest.approx(cknna(x, y[order], k), abs=1e-9)
    assert cknna(x, gram(y).permuted(order), k) == shuffled
    assert cknna(_near(x, k), _near(y, k).permuted(order)) == shuffled


def test_translation_changes_it():
    x, y, _ = layers(0, 60)
    assert cknna(x + 3, y, 5) == pytest.approx(masked_cknna(x + 3, y, 5), abs=1e-9)
    assert abs(cknna(x + 3, y, 5) - cknna(x, y, 5)) > 0.02


def test_independent_layers_are_near_0():
    x, y = torch.randn(2, 300, 20, generator=torch.Generator().manual_seed(0))
    assert cknna(x, y, 10) == pytest.approx(0, abs=0.05)
    x = torch.randn(100, 3000, generator=torch.Generator().manual_seed(1))
    assert cknna(x, torch.randn(100, 3000, generator=torch.Generator().manual_seed(2)), 10) == pytest.approx(0, abs=0.1)


# Numerics


@pytest.mark.parametrize("n", [24, 300])
def test_rows_in_blocks(n, monkeypatch):
    x, y, _ = layers(0, n)
    value = cknna(x, y, 7)
    monkeypatch.setitem(_nearest.__globals__, "WORKSPACE", 8 * n * 5)
    assert cknna(x, y, 7) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e-6, 1e6, 1e12, 1e20, 1e35])
def test_very_small_and_large_features(scale, dtype):
    x, y, _ = layers(0, 60)
    expected = pytest.approx(cknna(x, y), abs=1e-5)
    assert cknna((scale * x).to(dtype), y.to(dtype)) == expected
    assert cknna((scale * x).to(dtype), (scale * y).to(dtype)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_types(dtype):
    x, y, _ = layers(0, d=40)
    x, y = ((20 * z).round().to(dtype) for z in (x, y))
    assert cknna(x, y, 5) == pytest.approx(masked_cknna(x, y, 5), abs=1e-5)


def test_trailing_axes_and_gradients():
    x, y, _ = layers(0, d=6)
    before = x.clone()
    value = cknna(x, y)
    assert cknna(x.requires_grad_().reshape(24, 3, 2, 1), y) == value
    assert isinstance(value, float)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_features_are_undefined(dtype):
    x = layers(0)[0].to(dtype)
    zero = torch.zeros(24, 3, dtype=dtype)
    for a, b in ((x, zero), (zero, x), (zero, zero)):
        with pytest.warns(UserWarning, match=r"undefined \(nan\): the features of a layer are constant") as caught:
            assert math.isnan(cknna(a, b))
        assert caught[0].filename == __file__


# Bad input


@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        (X, Y[:5], 2, "x and y must be over the same samples, got 6 and 5"),
        (gram(X), Y[:5], 2, "x and y must be over the same samples, got 6 and 5"),
        (X, torch.tensor([[1.0]] * 5 + [[math.nan]]), 2, "^y must be finite, got NaN or infinite values in 1 of 6"),
        (X, torch.ones(6), 2, r"^y must have shape \(n, \.\.\.\) .*got \(6,\)"),
        (X.numpy(), Y, 2, "^x must be a real torch tensor, got ndarray"),
        (X, Y, 1, "x: k must be an integer with 2 <= k < n and n >= 4, got k = 1 with n = 6 samples"),
        (X, Y, 6, "k must be an integer with 2 <= k < n and n >= 4, got k = 6 with n = 6"),
        (X, Y, 2.0, "k must be an integer .* got k = 2.0"),
        (X, Y, True, "k must be an integer .* got k = True"),
        (X[:3], Y[:3], 2, "n >= 4, got k = 2 with n = 3 samples"),
        (X, rbf_cka.prepare(Y), 2, "y: Gram matrix must have a linear kernel, got rbf"),
        (_near(X, 2), Y, 3, "layers must have the same k, got 2 and 3"),
    ],
)
def test_bad_input(x, y, k, message):
    with pytest.raises(ValueError, match=message):
        cknna(x, y, k)


# Other devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_stay_on_cuda(dtype):
    with FakeTensorMode():
        off = torch.empty(20, 20, device="cuda", dtype=dtype)
        place, value = _nearest(off, torch.empty(20, device="cuda", dtype=torch.float64), 3)
        near = Near(20, 3, place, value)
        shuffled = near.permuted(torch.randperm(20))
        results = [(part, (60,)) for part in (place, value, shuffled.place, shuffled.value)]
        results += [(near.own, ()), (near.mirror, (60,)), (_cknna(near, shuffled), ())]
        assert {result.device.type for result, _ in results} == {"cuda"}
        assert [tuple(result.shape) for result, _ in results] == [shape for _, shape in results]
