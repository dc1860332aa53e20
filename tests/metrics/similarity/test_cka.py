"""CKA and HSIC by hand, against plain matrices in float64, and as theorems; the Gram matrix they rest on."""

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from related_layers import X, Y, layers
from scipy.spatial.distance import cdist, pdist
from torch._subclasses import FakeTensorMode

from repgraph.metrics.similarity import gram, hsic, linear_cka, minibatch_cka, rbf_cka
from repgraph.metrics.similarity.cka import _cka, _gaussian, _hsic
from repgraph.metrics.similarity.gram import Gram, centred_products, dot, principal_components, squared_distances
from repgraph.metrics.similarity.minibatch import BatchGram, BatchGrams, _centred, _minibatch_cka

seeds = st.integers(0, 2**32 - 1)


def kernel(x, bandwidth=None):
    """x x', or the Gaussian kernel whose width is a fraction of the median squared distance."""
    x = x.flatten(1).double().numpy()
    x = x - x.mean(0)  # changes no value, but keeps the digits
    if bandwidth is None:
        return x @ x.T
    return np.exp(-cdist(x, x, "sqeuclidean") / (2 * bandwidth**2 * np.median(pdist(x, "sqeuclidean"))))


def plain_hsic(p, q, unbiased):
    n = len(p)
    if not unbiased:
        h = np.eye(n) - 1 / n
        return np.trace(p @ h @ q @ h) / (n - 1) ** 2
    p, q = p - np.diag(np.diag(p)), q - np.diag(np.diag(q))
    one = np.ones(n)
    total = (one @ p @ one) * (one @ q @ one) / ((n - 1) * (n - 2))
    return (np.trace(p @ q) + total - 2 * one @ p @ q @ one / (n - 2)) / (n * (n - 3))


def plain_cka(x, y, unbiased=False, bandwidth=None):
    p, q = kernel(x, bandwidth), kernel(y, bandwidth)
    return plain_hsic(p, q, unbiased) / math.sqrt(plain_hsic(p, p, unbiased) * plain_hsic(q, q, unbiased))


def plain_minibatch(x, y, size):
    """HSIC summed over the batches in each of the three places, then divided."""
    parts = [(kernel(p), kernel(q)) for p, q in zip(x.split(size), y.split(size), strict=True) if len(p) > 3]
    cross, own, other = (sum(plain_hsic(k[i], k[j], True) for k in parts) for i, j in ((0, 1), (0, 0), (1, 1)))
    return cross / math.sqrt(own * other)


def without_warning(f, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return f(*args, **options)


# By hand


def test_cka_by_hand():
    assert linear_cka(X, Y) == pytest.approx(0.712592366, abs=1e-9)
    assert linear_cka(X, Y, unbiased=True) == pytest.approx(0.712756973, abs=1e-9)
    assert linear_cka(X.float(), Y.float(), unbiased=True) == pytest.approx(0.712756973, abs=1e-6)
    assert minibatch_cka(X, Y) == pytest.approx(0.712756973, abs=1e-9)


@pytest.mark.parametrize(("a", "b", "expected"), [(X, Y, 1.316666667), (X, X, 1.455555556), (Y, Y, 2.344444444)])
def test_hsic_by_hand(a, b, expected):
    assert hsic(a, b) == pytest.approx(expected, abs=1e-9)


def test_gram_by_hand():
    corner = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    g = gram(corner)
    assert g.matrix.tolist() == [[2, 0, -2], [0, 2, -2], [-2, -2, 4]]
    assert (squared_distances(g) * 2**g.exponent).tolist() == [[0, 4, 10], [4, 0, 10], [10, 10, 0]]
    shift = g.shift * 2**g.exponent
    restored = g.matrix.double() + shift[:, None] + shift
    torch.testing.assert_close(restored, (corner @ corner.T).double())
    assert gram(g) is g
    assert repr(g) == "Gram(n=3, kernel=linear, float32)"


# Parity


@given(seeds, st.integers(4, 30), st.integers(1, 40), st.booleans())
def test_parity_with_matrices(seed, n, d, unbiased):
    x, y, _ = layers(seed, n, d)
    assert linear_cka(x, y, unbiased=unbiased) == pytest.approx(plain_cka(x, y, unbiased), abs=1e-10)
    assert hsic(x, y, unbiased=unbiased) == pytest.approx(plain_hsic(kernel(x), kernel(y), unbiased), rel=1e-9)


@given(seeds, st.integers(6, 30), st.floats(0.1, 10), st.booleans())
def test_parity_of_the_gaussian_kernel(seed, n, bandwidth, unbiased):
    x, y, _ = layers(seed, n)
    expected = plain_cka(x, y, unbiased, bandwidth)
    assert rbf_cka(x, y, bandwidth=bandwidth, unbiased=unbiased) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_median_of_an_odd_or_even_number_of_pairs_with_ties(n):
    x, y = X[:n], Y[:n] if n < 7 else Y
    x, y = (torch.cat((z, z[:1] + 3)) if n == 7 else z for z in (x, y))
    assert rbf_cka(x, y) == pytest.approx(plain_cka(x, y, bandwidth=1), abs=1e-12)


@given(seeds, st.integers(4, 30), st.integers(4, 12))
def test_parity_of_minibatches(seed, n, size):
    x, y, _ = layers(seed, n)
    assert minibatch_cka(x, y, batch_size=size) == pytest.approx(plain_minibatch(x, y, size), abs=1e-10)


@given(seeds)
def test_gram_is_the_centred_kernel(seed):
    x, _, generator = layers(seed)
    order = torch.randperm(24, generator=generator)
    z = x - x.mean(0)
    for g, expected in ((gram(x), z @ z.T), (gram(x).permuted(order), z[order] @ z[order].T)):
        torch.testing.assert_close(g.matrix, expected)
        torch.testing.assert_close(g.sums * 2.0**g.exponent, expected.sum(1) - expected.diagonal())
        torch.testing.assert_close(g.square * 4.0**g.exponent, expected.fill_diagonal_(0).square().sum())


@pytest.mark.parametrize(("n", "d"), [(600, 3), (300, 700), (5, 1025)])
def test_gram_in_blocks_and_slabs(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    z = x - x.mean(0)
    g = gram(x)
    torch.testing.assert_close(g.matrix, z @ z.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(g.matrix, g.matrix.T, atol=0, rtol=0)
    shift = g.shift * 2.0**g.exponent
    torch.testing.assert_close(g.matrix + shift[:, None] + shift, x @ x.T, atol=1e-9, rtol=0)


def test_gram_of_more_features_than_the_workspace_holds(monkeypatch):
    monkeypatch.setattr(importlib.import_module("repgraph.metrics.similarity.gram"), "WORKSPACE", 1)
    x, y, _ = layers(0, d=1100)
    z = x - x.mean(0)
    torch.testing.assert_close(gram(x).matrix, z @ z.T)
    assert linear_cka(x, y) == pytest.approx(plain_cka(x, y), abs=1e-12)


@given(seeds, st.integers(2, 12), st.integers(1, 12))
def test_principal_components_of_features_and_gram_matrices(seed, n, d):
    x, _, _ = layers(seed, n, d)
    z = x - x.mean(0)
    expected = torch.linalg.svdvals(z)[: min(n - 1, d)]
    for given_as in (x, gram(x)):
        vectors, values = principal_components(given_as)
        torch.testing.assert_close(values / values[0], expected / expected[0], atol=1e-6, rtol=0)
        projector = vectors @ vectors.T
        torch.testing.assert_close(projector @ z, z, atol=1e-6, rtol=0)


# Theorems


@given(seeds, st.booleans())
@settings(max_examples=10)
def test_symmetry_bounds_and_joint_permutation(seed, unbiased):
    x, y, generator = layers(seed)
    order = torch.randperm(24, generator=generator)
    for f in (linear_cka, rbf_cka):
        value = f(x, y, unbiased=unbiased)
        assert (-1 if unbiased else 0) <= value <= 1
        assert f(y, x, unbiased=unbiased) == pytest.approx(value, abs=1e-12)
        assert f(x[order], y[order], unbiased=unbiased) == pytest.approx(value, abs=1e-12)
        assert f(x, x, unbiased=unbiased) == pytest.approx(1, abs=1e-12)
        assert f(x, 2 - 3 * x, unbiased=unbiased) == pytest.approx(1, abs=1e-12)
    assert hsic(x[order], y[order], unbiased=unbiased) == pytest.approx(hsic(y, x, unbiased=unbiased), rel=1e-10)
    assert hsic(x, y, unbiased=False) >= 0


@given(seeds, st.booleans())
@settings(max_examples=10)
def test_gram_matrices_in_place_of_features(seed, unbiased):
    x, y, generator = layers(seed)
    order = torch.randperm(24, generator=generator)
    a, b = gram(x), gram(y)
    for f in (linear_cka, rbf_cka, hsic):
        value = f(x, y, unbiased=unbiased)
        assert f(a, b, unbiased=unbiased) == f(a, y, unbiased=unbiased) == value
        shuffled = f(x, y[order], unbiased=unbiased)
        assert f(a, b.permuted(order), unbiased=unbiased) == pytest.approx(shuffled, rel=1e-9)
    p, q = rbf_cka.prepare(x, bandwidth=0.5), rbf_cka.prepare(y, bandwidth=0.5)
    assert p.kernel == "rbf"
    assert rbf_cka(p, q, bandwidth=3) == rbf_cka(x, y, bandwidth=0.5)
    assert linear_cka(p, q) == rbf_cka(p, q)


@given(seeds)
def test_a_wide_gaussian_kernel_is_the_linear_one(seed):
    x, y, _ = layers(seed)
    assert rbf_cka(x, y, bandwidth=1e3) == pytest.approx(linear_cka(x, y), abs=1e-5)


@given(seeds, st.integers(4, 24))
@settings(max_examples=10)
def test_minibatches(seed, size):
    x, y, _ = layers(seed)
    value = minibatch_cka(x, y, batch_size=size)
    assert minibatch_cka(y, x, batch_size=size) == pytest.approx(value, abs=1e-12)
    assert minibatch_cka(x, 1 - 2 * x, batch_size=size) == pytest.approx(1, abs=1e-12)
    whole = linear_cka(x, y, unbiased=True)
    assert minibatch_cka(x, y, batch_size=24) == pytest.approx(whole, abs=1e-10)
    assert minibatch_cka(x, y) == pytest.approx(whole, abs=1e-10)


@given(seeds, st.integers(4, 9))
def test_rows_that_arrive_batch_by_batch(seed, size):
    x, y, _ = layers(seed)
    reduce = BatchGram(size)
    rows = [torch.cat([reduce(part) for part in z.split(size)]) for z in (x, y)]
    a, b = (BatchGrams.of_rows(z) for z in rows)
    assert a.matrix.shape == (24, size)
    assert (a.n, a.matrix.dtype) == (24, torch.float64)
    assert minibatch_cka(a, b) == pytest.approx(plain_minibatch(x, y, size), abs=1e-10)
    torch.testing.assert_close(reduce(x.reshape(24, 5, 1, 1)), rows[0], atol=0, rtol=0)
    first = (BatchGrams.of_rows(z[: 2 * size]) for z in rows)
    assert minibatch_cka(*first) == pytest.approx(plain_minibatch(x[: 2 * size], y[: 2 * size], size), abs=1e-10)


def test_products_of_rows_are_sums_of_hsic():
    rows = [BatchGram(8)(z) for z in layers(0)[:2]]
    scaled = [z[:, :-1] * 2.0 ** z[:, -1:] for z in rows]
    parts = [hsic(p, q) for p, q in zip(layers(0)[0].split(8), layers(0)[1].split(8), strict=True)]
    product = scaled[0] * scaled[1]
    assert [half.sum().item() for half in product.split(8)] == pytest.approx(parts, rel=1e-10)


def test_up_to_three_samples_of_a_last_batch_are_left_out():
    x, y, _ = layers(0, 23)
    assert minibatch_cka(x, y, batch_size=10) == pytest.approx(minibatch_cka(x[:20], y[:20], batch_size=10), abs=1e-12)
    assert (BatchGram(10)(x)[20:, :-1] == 0).all()
    assert (BatchGram(10)(x[:3])[:, :-1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e-8, 1e8, 1e12, 1e16, 1e30])
def test_no_scale_is_too_small_or_large(scale, dtype):
    x, y, _ = layers(3)
    big = (x * scale).to(dtype)
    for value, expected in (
        (minibatch_cka(big, y.to(dtype), batch_size=9), minibatch_cka(x, y, batch_size=9)),
        (linear_cka(big, big.roll(1, 0)), linear_cka(x, x.roll(1, 0))),
        (linear_cka(big, y.to(dtype), unbiased=True), linear_cka(x, y, unbiased=True)),
        (rbf_cka(big, y.to(dtype)), rbf_cka(x, y)),
        (hsic(big, y.to(dtype)) / scale**2, hsic(x, y)),
    ):
        assert value == pytest.approx(expected, rel=2e-6 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("bandwidth", [1e3, 1e5])
def test_wide_kernels_tend_to_the_linear_one_also_in_float32(bandwidth):
    x, y, _ = layers(0)
    linear = linear_cka(x, y)
    assert rbf_cka(x.float(), y.float(), bandwidth=bandwidth) == pytest.approx(linear, rel=1e-5)


# Chance


def test_independent_wide_features():
    x, y = torch.randn(2, 200, 5000, generator=torch.Generator().manual_seed(0))
    assert linear_cka(x, y) == pytest.approx(0.96, abs=0.005)
    assert linear_cka(x, y, unbiased=True) == pytest.approx(0, abs=0.05)
    assert minibatch_cka(x, y, batch_size=50) == pytest.approx(0, abs=0.05)


def test_shuffled_samples_are_near_chance():
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    for f in (linear_cka, rbf_cka):
        assert f(x, x[order], unbiased=True) == pytest.approx(0, abs=0.05)


# Numerics


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_float32_with_a_large_offset(offset):
    x, y, _ = layers(0, 60, 20)
    x, y = (x + offset).float(), (y + offset).float()
    assert linear_cka(x, y, unbiased=True) == pytest.approx(plain_cka(x.double(), y.double(), True), abs=2e-6)
    assert rbf_cka(x, y, unbiased=True) == pytest.approx(plain_cka(x.double(), y.double(), True, 1), abs=2e-6)
    assert minibatch_cka(x, y, batch_size=20) == pytest.approx(plain_minibatch(x.double(), y.double(), 20), abs=2e-6)


@pytest.mark.parametrize(
    ("f", "dtype"),
    [(f, dtype) for f in (linear_cka, rbf_cka) for dtype in (torch.float32, torch.float64)]
    + [(minibatch_cka, torch.float64)],
)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-6, 1e6, 1e20, 1e35])
def test_very_small_and_large_features(f, scale, dtype):
    x, y, _ = layers(0)
    expected = pytest.approx(f(x, y), abs=1e-6)
    assert without_warning(f, (scale * x).to(dtype), y.to(dtype)) == expected
    assert without_warning(f, (scale * x).to(dtype), (scale * y).to(dtype)) == expected


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_hsic_grows_with_the_fourth_power_of_the_scale(scale, unbiased):
    x, y, _ = layers(0)
    expected = scale**4 * hsic(x, y, unbiased=unbiased)
    assert hsic(scale * x, scale * y, unbiased=unbiased) == pytest.approx(expected, rel=1e-10)
    g = gram((scale * x).float())
    assert g.exponent != 0
    assert g.permuted(torch.arange(24)).exponent == g.exponent


@pytest.mark.parametrize("f", [linear_cka, rbf_cka, minibatch_cka, hsic])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_types(f, dtype):
    x, y, _ = layers(0, d=40)
    x, y = ((20 * z).round().to(dtype) for z in (x, y))
    assert f(x, y) == pytest.approx(f(x.double(), y.double()), rel=1e-5)


@pytest.mark.parametrize("f", [linear_cka, rbf_cka, minibatch_cka, hsic])
def test_trailing_axes_and_gradients(f):
    x, y, _ = layers(0, d=6)
    before = x.clone()
    value = f(x, y)
    assert f(x.requires_grad_().reshape(24, 3, 2, 1), y) == value
    assert isinstance(value, float)
    assert torch.equal(x, before)


def test_float32_features_in_float64():
    x = layers(0)[0].float()
    assert gram(x).off.dtype == torch.float32
    assert gram(x, dtype=torch.float64).off.dtype == torch.float64
    torch.testing.assert_close(gram(x, dtype=torch.float64).off, gram(x.double()).off, atol=1e-12, rtol=0)


# Undefined


@pytest.mark.parametrize("f", [linear_cka, rbf_cka, minibatch_cka])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e5 / 3, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_features_are_undefined(f, value, dtype):
    x = layers(0)[0].to(dtype)
    constant = torch.full((24, 3), value, dtype=dtype)
    for a, b in ((x, constant), (constant, x), (constant, constant)):
        with pytest.warns(UserWarning, match=r"undefined \(nan\): the features of a layer are constant") as caught:
            assert math.isnan(f(a, b))
        assert caught[0].filename == __file__
    assert hsic(x, constant) == 0


@pytest.mark.parametrize("f", [linear_cka, rbf_cka, minibatch_cka])
def test_hardly_varying_features_are_defined(f):
    x, y, _ = layers(0)
    assert without_warning(f, 1 + 1e-6 * x, y) == pytest.approx(f(x, y), abs=1e-6)
    one = torch.zeros(24, 1)
    one[0] = 1
    assert without_warning(linear_cka, one, one) == pytest.approx(1, abs=1e-6)


def test_half_of_the_pairs_identical():
    x = torch.zeros(24, 1)
    x[0] = 1
    with pytest.warns(UserWarning, match="undefined"):
        assert math.isnan(rbf_cka(x, X.new_ones(24, 1)))


# Bad input


NAN = torch.tensor([[1.0]] * 5 + [[math.nan]])
INF = torch.tensor([[1.0]] * 5 + [[-math.inf]])


@pytest.mark.parametrize(
    ("f", "x", "y", "options", "message"),
    [
        (linear_cka, X, Y[:5], {}, "x and y must be over the same samples, got 6 and 5"),
        (rbf_cka, gram(X), Y[:5], {}, "x and y must be over the same samples, got 6 and 5"),
        (minibatch_cka, X, Y[:5], {}, "x and y must be over the same samples, got 6 and 5"),
        (hsic, X, Y[:5], {}, "x and y must be over the same samples, got 6 and 5"),
        (linear_cka, X, NAN, {}, "^y must be finite, got NaN or infinite values in 1 of 6 samples"),
        (rbf_cka, X, INF, {}, "^y must be finite"),
        (minibatch_cka, X, NAN, {}, "^y must be finite"),
        (hsic, NAN, Y, {}, "^x must be finite"),
        (linear_cka, X, torch.ones(6), {}, r"^y must have shape \(n, \.\.\.\) .*got \(6,\)"),
        (rbf_cka, torch.ones(6), Y, {}, "^x must have shape"),
        (minibatch_cka, X, torch.ones(6), {}, r"^y must have shape \(n, \.\.\.\) .* got \(6,\)"),
        (linear_cka, X, Y.numpy(), {}, "^y must be a real torch tensor, got ndarray"),
        (minibatch_cka, X, Y.numpy(), {}, "^y must be a real torch tensor, got ndarray"),
        (linear_cka, X[:1], Y[:1], {}, "^x must have at least 2 samples, got 1"),
        (linear_cka, X[:3], Y[:3], {"unbiased": True}, "the unbiased estimate needs at least 4 samples, got 3"),
        (rbf_cka, X[:3], Y[:3], {"unbiased": True}, "the unbiased estimate needs at least 4 samples, got 3"),
        (hsic, X[:3], Y[:3], {}, "the unbiased estimate needs at least 4 samples, got 3"),
        (minibatch_cka, X[:3], Y[:3], {}, "^x must have at least 4 samples, got 3"),
        (minibatch_cka, X, Y, {"batch_size": 3}, "batch_size must be an integer of at least 4, got 3"),
        (minibatch_cka, BatchGram(4)(X), Y, {"batch_size": 2}, "batch_size must be an integer of at least 4"),
        (
            minibatch_cka,
            BatchGrams.of_rows(BatchGram(4)(X)),
            Y,
            {},
            r"cut into the same batches, got \(6, 4\) and \(6, 6\)",
        ),
        (linear_cka, X, rbf_cka.prepare(Y), {}, "same kernel, got linear and rbf"),
        (hsic, rbf_cka.prepare(X), Y, {}, "same kernel, got rbf and linear"),
        (rbf_cka, X, Y, {"bandwidth": 0}, "bandwidth must be a finite number > 0, got 0"),
        (rbf_cka, X, Y, {"bandwidth": math.inf}, "bandwidth must be a finite number > 0, got inf"),
        (rbf_cka, X, Y, {"bandwidth": math.nan}, "bandwidth must be a finite number > 0, got nan"),
    ],
)
def test_bad_input(f, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        f(x, y, **options)


# Other devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_stay_on_cuda(dtype):
    with FakeTensorMode():
        x = torch.empty(300, 7, device="cuda", dtype=dtype)
        off, diagonal, shift, exponent = centred_products(x, dtype)
        g = Gram(off, diagonal, shift, exponent=4)
        shuffled = g.permuted(torch.randperm(300))
        squares = squared_distances(g)
        results = [(part, (300, 300)) for part in (g.off, g.matrix, shuffled.off, squares)] + [(exponent, ())]
        results += [(part, (300,)) for part in (g.diagonal, g.shift, g.sums, shuffled.diagonal, shuffled.shift)]
        results += [(part, ()) for part in (g.square, dot(g.off, shuffled.off))]
        results += [(_hsic(dot(g.off, g.off), g, shuffled, unbiased), ()) for unbiased in (True, False)]
        results += [(_cka(g, shuffled, unbiased), ()) for unbiased in (True, False)]
        off, diagonal, shift = _gaussian(squares, 1.0)
        results += [(off, (300, 300)), (diagonal, (300,)), (shift, (300,))]
        assert {result.device.type for result, _ in results} == {"cuda"}
        assert [tuple(result.shape) for result, _ in results] == [shape for _, shape in results]


def test_minibatches_stay_on_cuda():
    with FakeTensorMode():
        few, enough = (_centred(torch.empty(b, 7, device="cuda"), 8) for b in (3, 6))
        rows = BatchGram(8)(torch.empty(20, 3, 3, device="cuda", dtype=torch.float16))
        value = _minibatch_cka(BatchGrams.of_rows(rows), BatchGrams.of_rows(rows))
        assert [(part.device.type, part.shape) for part in (few, enough)] == [("cuda", (3, 9)), ("cuda", (6, 9))]
        assert (rows.device.type, rows.shape, rows.dtype) == ("cuda", (20, 9), torch.float32)
        assert (value.device.type, value.shape) == ("cuda", ())
