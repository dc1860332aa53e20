"""Procrustes, SVCCA, RSA and RTD by hand, against SciPy and ripser, and as theorems."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from related_layers import X, Y, layers
from scipy.linalg import orth, subspace_angles
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.distance import cdist, pdist
from scipy.stats import pearsonr, rankdata, spearmanr
from torch._subclasses import FakeTensorMode

from repgraph.metrics.similarity import gram, procrustes, rbf_cka, rsa, rtd, svcca
from repgraph.metrics.similarity.gram import _components, _components_of_gram
from repgraph.metrics.similarity.procrustes import Shape, _distance
from repgraph.metrics.similarity.rsa import Dissimilarities, _compared, _directions, _ranks, _scaled, _without_noise
from repgraph.metrics.similarity.rtd import Distances
from repgraph.metrics.similarity.svcca import Subspace, _mean_correlation

seeds = st.integers(0, 2**32 - 1)
RDMS = ["euclidean", "sqeuclidean", "correlation", "cosine"]
COMPARE = ["spearman", "pearson", "cosine"]


def plain_rsa(x, y, rdm="euclidean", compare="spearman"):
    a, b = (pdist(z.flatten(1).double().numpy(), rdm) for z in (x, y))
    if compare == "cosine":
        return a @ b / math.sqrt((a @ a) * (b @ b))
    return {"spearman": spearmanr, "pearson": pearsonr}[compare](a, b).statistic


def plain_svcca(x, y, variance):
    """Cosines of the angles between the spaces of the leading components."""
    bases = []
    for z in (x, y):
        left, values, _ = np.linalg.svd(z.numpy() - z.numpy().mean(0), full_matrices=False)
        share = np.cumsum(values**2) / np.sum(values**2)
        bases.append(left[:, : 1 + np.flatnonzero(share >= variance - 1e-12)[0]])
    return np.cos(subspace_angles(*bases)).mean()


def cone(x, y):
    """Distances of the points of both layers, those of the first at distance 0, and of the two scaled layers."""
    a, b = (cdist(z.numpy(), z.numpy()) for z in (x, y))
    a, b = a / np.quantile(a, 0.9), b / np.quantile(b, 0.9)
    return np.block([[0 * a, a], [a, np.minimum(a, b)]]), a, b


def without_warning(f, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return f(*args, **options)


MEASURES = [procrustes, svcca, rsa, rtd]

# By hand


def test_procrustes_by_hand():
    assert procrustes(X, Y, kind="ding") == pytest.approx(0.420577229, abs=1e-9)
    assert math.sqrt(procrustes(X, Y, kind="ding")) == pytest.approx(0.648519259, abs=1e-9)
    assert procrustes(X, Y) == pytest.approx(0.660457928, abs=1e-9)
    size_and_shape = [(z - z.mean(0)).norm().item() for z in (X, Y)]
    inner = size_and_shape[0] * size_and_shape[1] * math.cos(procrustes(X, Y))
    assert math.sqrt(sum(s**2 for s in size_and_shape) - 2 * inner) == pytest.approx(2.350025382, abs=1e-9)


def test_svcca_by_hand():
    assert svcca(X, Y, variance=1) == pytest.approx((0.988456265 + 0.749083316) / 2, abs=1e-9)
    assert svcca(X, Y, variance=1) == pytest.approx(0.868769790, abs=1e-9)


def test_rsa_by_hand():
    assert rsa(X, Y) == pytest.approx(0.508403950, abs=1e-9)
    assert rsa(X, Y, rdm="sqeuclidean") == pytest.approx(0.508403950, abs=1e-9)
    assert rsa(X, Y, rdm="sqeuclidean", compare="pearson") == pytest.approx(0.389960273, abs=1e-9)


def test_rtd_by_hand():
    square = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.float64)
    line = torch.tensor([[0], [1], [2], [3]], dtype=torch.float64)
    assert rtd(square, square) == 0
    assert rtd(X, 3 * X + 1) == pytest.approx(0, abs=1e-9)
    # Sides of the square are sqrt(1/2), steps of the line 0.4. Three steps are there before the sides that join the
    # same points; the fourth side closes a loop that stays until the line fills it at 0.8.
    side = math.sqrt(0.5)
    assert rtd(square, line) == pytest.approx((3 * (side - 0.4) + (0.8 - side)) / 2, abs=1e-7)


# Parity


@given(seeds, st.integers(3, 30), st.integers(1, 12))
def test_parity_of_procrustes_with_scipy(seed, n, d):
    x, y, _ = layers(seed, n, d)
    padded = torch.cat((x, x.new_zeros(n, 2)), 1)
    disparity = scipy_procrustes(padded.numpy(), y.numpy())[2]  # 1 - nuclear^2
    assert math.sin(procrustes(x, y)) ** 2 == pytest.approx(disparity, abs=1e-8)
    assert (1 - procrustes(x, y, kind="ding") / 2) ** 2 == pytest.approx(1 - disparity, abs=1e-8)


@given(seeds, st.integers(3, 30), st.integers(1, 12), st.sampled_from([0.5, 0.9, 0.99]))
def test_parity_of_svcca_with_subspace_angles(seed, n, d, variance):
    x, y, _ = layers(seed, n, d)
    assert svcca(x, y, variance=variance) == pytest.approx(plain_svcca(x, y, variance), abs=1e-8)
    spaces = [orth(z.numpy() - z.numpy().mean(0)) for z in (x, y)]
    assert svcca(x, y, variance=1) == pytest.approx(np.cos(subspace_angles(*spaces)).mean(), abs=1e-8)


@pytest.mark.parametrize("rdm", RDMS)
@pytest.mark.parametrize("compare", COMPARE)
@given(seeds, st.integers(4, 24), st.integers(3, 12))
@settings(max_examples=8)
def test_parity_of_rsa_with_scipy(rdm, compare, seed, n, d):
    x, y, _ = layers(seed, n, d)
    expected = plain_rsa(x, y, rdm, compare)
    assert rsa(x, y, rdm=rdm, compare=compare) == pytest.approx(expected, abs=1e-8)
    rounding = 0.03 if compare == "spearman" else 1e-4  # which may swap two ranks
    assert rsa(x.float(), y.float(), rdm=rdm, compare=compare) == pytest.approx(expected, abs=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(seeds, st.integers(4, 16), st.integers(1, 4))
def test_tied_ranks_are_averaged(dtype, seed, n, d):
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat((torch.eye(n)[:, :d], torch.randint(3, (n, d), generator=generator)), 1).to(dtype)
    y = torch.cat((torch.eye(n)[:, -d:], torch.randint(3, (n, d), generator=generator)), 1).to(dtype)
    expected = spearmanr(*(pdist(z.double().numpy(), "sqeuclidean").round(6) for z in (x, y))).statistic
    assert rsa(x, y) == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30))
def test_ranks(values):
    for dtype in (torch.float32, torch.float64):
        found = _ranks(torch.tensor(values, dtype=dtype))
        assert found.numpy() == pytest.approx(rankdata(values) - 1, abs=0)


@given(seeds, st.integers(4, 20))
@settings(max_examples=8)
def test_gudhi_is_ripser(seed, n):
    ripser = pytest.importorskip("ripser").ripser
    x, y, _ = layers(seed, n)
    total = 0.0
    for first, second in ((x, y), (y, x)):
        bars = ripser(cone(first, second)[0], maxdim=1, distance_matrix=True)["dgms"][1]
        total += np.diff(bars[np.isfinite(bars).all(1)]).sum() / 2
    assert rtd(x, y) == pytest.approx(total, abs=1e-5)


# Theorems


@given(seeds)
def test_symmetry_bounds_and_joint_permutation(seed):
    x, y, generator = layers(seed)
    order = torch.randperm(24, generator=generator)
    orthogonal = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    for f, least, largest in ((procrustes, 0, math.pi / 2), (svcca, 0, 1), (rsa, -1, 1)):
        value = f(x, y)
        assert least <= value <= largest
        assert f(y, x) == pytest.approx(value, abs=1e-10)
        assert f(x[order], y[order]) == pytest.approx(value, abs=1e-8)
        same = 0.0 if f is procrustes else 1.0
        assert f(x, 2 * x @ orthogonal - 3) == pytest.approx(same, abs=1e-7)


@pytest.mark.parametrize("rdm", RDMS)
@pytest.mark.parametrize("compare", COMPARE)
def test_symmetry_and_bounds_of_every_rsa(rdm, compare):
    x, y, generator = layers(1)
    order = torch.randperm(24, generator=generator)
    value = rsa(x, y, rdm=rdm, compare=compare)
    assert -1 <= value <= 1
    assert rsa(y, x, rdm=rdm, compare=compare) == pytest.approx(value, abs=1e-12)
    assert rsa(x[order], y[order], rdm=rdm, compare=compare) == pytest.approx(value, abs=1e-10)
    assert rsa(x, x, rdm=rdm, compare=compare) == pytest.approx(1, abs=1e-12)


@given(seeds, st.integers(4, 16))
@settings(max_examples=10)
def test_symmetry_and_joint_permutation_of_rtd(seed, n):
    x, y, generator = layers(seed, n)
    order = torch.randperm(n, generator=generator)
    orthogonal = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    value = rtd(x, y)
    assert value >= 0
    assert rtd(y, x) == pytest.approx(value, abs=1e-6)
    assert rtd(x[order], y[order]) == pytest.approx(value, abs=1e-5)
    assert rtd(x, 3 * x @ orthogonal + 1) == pytest.approx(0, abs=1e-5)


@given(seeds)
def test_the_angular_distance_obeys_the_triangle_inequality(seed):
    x, y, generator = layers(seed)
    z = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    assert procrustes(x, z) <= procrustes(x, y) + procrustes(y, z) + 1e-9


@given(seeds, st.integers(5, 20), st.integers(1, 25))
@settings(max_examples=10)
def test_gram_matrices_and_prepared_layers_in_place_of_features(seed, n, d):
    x, y, generator = layers(seed, n, d)
    order = torch.randperm(n, generator=generator)
    for f in (procrustes, svcca, rsa):
        value = pytest.approx(f(x, y), abs=1e-6)
        assert f(gram(x), gram(y)) == value
        assert f(gram(x), y) == value
        assert f(f.prepare(x), f.prepare(y)) == value
        shuffled = pytest.approx(f(x, y[order]), abs=1e-6)
        assert f(x, gram(y).permuted(order)) == shuffled
        assert f(x, f.prepare(y).permuted(order)) == shuffled


def test_gram_matrices_and_prepared_layers_in_rtd():
    x, y, generator = layers(0, 15)
    order = torch.randperm(15, generator=generator)
    assert rtd(gram(x), y) == rtd(rtd.prepare(x), gram(y)) == rtd(x, y)
    assert rtd(x, rtd.prepare(y).permuted(order)) == pytest.approx(rtd(x, y[order]), abs=1e-5)


@pytest.mark.parametrize("rdm", RDMS)
@pytest.mark.parametrize("compare", COMPARE)
def test_dissimilarities_are_permuted_as_features_are(rdm, compare):
    x, y, generator = layers(0)
    order = torch.randperm(24, generator=generator)
    shuffled = rsa.prepare(y, rdm=rdm, compare=compare).permuted(order)
    value = rsa.pair(rsa.prepare(x, rdm=rdm, compare=compare), shuffled).item()
    assert value == pytest.approx(rsa(x, y[order], rdm=rdm, compare=compare), abs=1e-10)


@given(seeds)
def test_cca_sees_no_invertible_map(seed):
    x, y, generator = layers(seed)
    change = torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3 * torch.eye(5, dtype=torch.float64)
    assert svcca(x @ change, y, variance=1) == pytest.approx(svcca(x, y, variance=1), abs=1e-8)
    assert svcca(x @ change, x, variance=1) == pytest.approx(1, abs=1e-8)


def test_svcca_keeps_the_fewest_components():
    values = torch.tensor([[3.0, 0, 0], [0, 2, 0], [0, 0, 1]], dtype=torch.float64)
    x = torch.cat((values, -values))  # shares 9/14, 4/14, 1/14 of the variance
    kept = {variance: svcca.prepare(x, variance=variance).basis.shape[1] for variance in (0.6, 9 / 14, 0.7, 13 / 14, 1)}
    assert kept == {0.6: 1, 9 / 14: 1, 0.7: 2, 13 / 14: 2, 1: 3}


def test_more_features_than_samples():
    x, y = torch.randn(2, 12, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner = (x - x.mean(0)).T @ (y - y.mean(0)) / (x - x.mean(0)).norm() / (y - y.mean(0)).norm()
    assert procrustes(x, y) == pytest.approx(math.acos(torch.linalg.svdvals(inner).sum()), abs=1e-9)
    assert procrustes(x, y, kind="ding") < 0.2
    assert svcca(x, y, variance=1) == pytest.approx(1, abs=1e-9)


def test_independent_layers():
    x, y = torch.randn(2, 200, 10, generator=torch.Generator().manual_seed(0))
    for rdm in RDMS:
        assert rsa(x, y, rdm=rdm) == pytest.approx(0, abs=0.06)
        assert rsa(x, y, rdm=rdm, compare="cosine") > 0.8
    assert procrustes(x, y) > 1
    assert svcca(x, y) < 0.3


# Subsamples of RTD


def test_rtd_of_subsamples():
    x, y, _ = layers(0, 30)
    generator = np.random.default_rng(3)
    parts = [generator.choice(30, 10, replace=False) for _ in range(4)]
    expected = np.mean([rtd(x[part], y[part]) for part in parts])
    assert rtd(x, y, size=10, subsamples=4, seed=3) == pytest.approx(expected, abs=1e-5)
    assert rtd(x, y, size=10, subsamples=4, seed=3) != rtd(x, y, size=10, subsamples=4)
    assert rtd(x, y, size=30, seed=1) == rtd(x, y, size=31, subsamples=2) == rtd(x, y)


def test_rtd_grows_with_noise():
    angle = torch.linspace(0, 2 * math.pi, 31, dtype=torch.float64)[:30]
    circle = torch.stack((angle.cos(), angle.sin()), 1)
    noise = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert rtd(circle, circle) < rtd(circle, circle + 0.05 * noise) < rtd(circle, noise)


# Numerics


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_float32_with_a_large_offset(offset):
    x, y, _ = layers(0, 40, 20)
    x, y = (x + offset).float(), (y + offset).float()
    assert rsa(x, y) == pytest.approx(plain_rsa(x, y), abs=1e-4)
    assert rsa(x, y, compare="pearson") == pytest.approx(plain_rsa(x, y, compare="pearson"), abs=1e-5)
    assert procrustes(x, y) == pytest.approx(procrustes(x.double(), y.double()), abs=1e-6)
    assert svcca(x, y) == pytest.approx(svcca(x.double(), y.double()), abs=1e-6)


@pytest.mark.parametrize("f", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e35])
def test_very_small_and_large_features(f, scale, dtype):
    x, y, _ = layers(0, 15)
    expected = pytest.approx(f(x, y), abs=1e-5)
    assert without_warning(f, (scale * x).to(dtype), y.to(dtype)) == expected
    assert without_warning(f, (scale * x).to(dtype), (scale * y).to(dtype)) == expected


@pytest.mark.parametrize("rdm", ["correlation", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e35])
def test_very_small_and_large_angles(rdm, scale, dtype):
    x, y, _ = layers(0, 15)
    expected = pytest.approx(rsa(x, y, rdm=rdm, compare="pearson"), abs=1e-5)
    assert rsa((scale * x).to(dtype), y.to(dtype), rdm=rdm, compare="pearson") == expected


@pytest.mark.parametrize("f", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_types(f, dtype):
    x, y, _ = layers(0, 20, 10)
    x, y = ((20 * z).round().to(dtype) for z in (x, y))
    assert f(x, y) == pytest.approx(f(x.double(), y.double()), abs=1e-4)


@pytest.mark.parametrize("f", MEASURES)
def test_trailing_axes_and_gradients(f):
    x, y, _ = layers(0, 15, d=6)
    before = x.clone()
    value = f(x, y)
    assert f(x.requires_grad_().reshape(15, 3, 2, 1), y) == value
    assert isinstance(value, float)
    assert torch.equal(x, before)


# Undefined


@pytest.mark.parametrize("f", MEASURES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e5 / 3, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_features_are_undefined(f, value, dtype):
    x = layers(0, 15)[0].to(dtype)
    for constant in (torch.full((15, 3), value, dtype=dtype), torch.full((15, 30), value, dtype=dtype)):
        for a, b in ((x, constant), (constant, x), (constant, constant)):
            with pytest.warns(UserWarning, match=r"undefined \(nan\): the features of a layer are const") as caught:
                assert math.isnan(f(a, b))
            assert caught[0].filename == __file__


@pytest.mark.parametrize("f", MEASURES)
def test_hardly_varying_features_are_defined(f):
    x, y, _ = layers(0, 15)
    assert without_warning(f, 1 + 1e-6 * x, y) == pytest.approx(f(x, y), abs=1e-4)


def test_nine_tenths_of_the_distances_0():
    x = torch.zeros(30, 1)
    x[0] = 1
    with pytest.warns(UserWarning, match=r"undefined \(nan\)"):
        assert math.isnan(rtd(x, torch.arange(30.0)[:, None]))


def test_equal_dissimilarities_are_undefined():
    simplex = torch.eye(8)
    y = layers(0, 8)[1].float()
    for rdm in ("euclidean", "cosine"):
        for compare in ("spearman", "pearson"):
            with pytest.warns(UserWarning, match=r"undefined \(nan\)"):
                assert math.isnan(rsa(simplex, y, rdm=rdm, compare=compare))
    assert 0 < without_warning(rsa, simplex, y, compare="cosine") < 1


# Bad input


NAN = torch.tensor([[1.0]] * 5 + [[math.nan]])


@pytest.mark.parametrize("f", MEASURES)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, Y[:5], "x and y must be over the same samples, got 6 and 5"),
        (gram(X), Y[:5], "x and y must be over the same samples, got 6 and 5"),
        (X, NAN, "^y must be finite, got NaN or infinite values in 1 of 6 samples"),
        (torch.ones(6), Y, r"^x must have shape \(n, \.\.\.\) .*got \(6,\)"),
        (X, torch.ones(6, 0), "^y must have shape"),
        (X, rbf_cka.prepare(Y), "y: Gram matrix must have a linear kernel, got rbf"),
    ],
)
def test_bad_features(f, x, y, message):
    with pytest.raises(ValueError, match=message):
        f(x, y)


@pytest.mark.parametrize(
    ("f", "x", "y", "options", "message"),
    [
        (procrustes, X, Y, {"kind": "euclidean"}, "kind must be 'angular' or 'ding', got 'euclidean'"),
        (svcca, X, Y, {"variance": 0}, "variance must be a share with 0 < variance <= 1, got 0"),
        (svcca, X, Y, {"variance": 99}, "variance must be a share with 0 < variance <= 1, got 99"),
        (svcca, X, Y, {"variance": math.nan}, "variance must be a share .* got nan"),
        (rsa, X, Y, {"rdm": "manhattan"}, "rdm must be 'euclidean', .* got 'manhattan'"),
        (rsa, X, Y, {"compare": "kendall"}, "compare must be 'spearman', 'pearson' or 'cosine', got 'kendall'"),
        (rsa, X, gram(Y), {"rdm": "cosine"}, "y: rdm='cosine' needs features: a Gram matrix"),
        (rsa, X, NAN, {"rdm": "correlation"}, "^y must be finite"),
        (rsa, X[:2], Y[:2], {}, "^x must have at least 3 samples, got 2"),
        (rsa, rsa.prepare(X, compare="pearson"), Y, {}, "one kind, got euclidean pearson against euclidean spearman"),
        (rtd, X, Y, {"size": 3}, "size must be at least 4 and subsamples at least 1, got 3 and 10"),
        (rtd, X, Y, {"subsamples": 0}, "size must be at least 4 and subsamples at least 1, got 500 and 0"),
    ],
)
def test_bad_options(f, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        f(x, y, **options)


def test_one_sample_far_away_leaves_the_ranks_of_the_others():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, d, generator=generator) for d in (5, 7))
    x[0] *= 1e3
    assert rsa(x, y) == pytest.approx(rsa(x.double(), y.double()), abs=2e-4)


@pytest.mark.parametrize("compare", ["spearman", "pearson"])
@pytest.mark.parametrize("rdm", ["euclidean", "cosine"])
def test_dissimilarities_that_differ_by_rounding_are_undefined(rdm, compare):
    generator = torch.Generator().manual_seed(0)
    rows = {
        "euclidean": 10 * torch.eye(40, dtype=torch.float64) + 3.3,
        "cosine": torch.arange(1.0, 41)[:, None] * torch.rand(1, 30, generator=generator),
    }[rdm]
    with pytest.warns(UserWarning, match="undefined"):
        assert np.isnan(rsa(rows, torch.randn(40, 3, generator=generator), rdm=rdm, compare=compare))


def test_cosines_of_features_far_from_the_origin():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, 500, generator=generator) + offset for offset in (1e4, 0))
    exact = rsa(x.double(), y.double(), rdm="cosine", compare="pearson")
    assert rsa(x, y, rdm="cosine", compare="pearson") == pytest.approx(exact, abs=2e-3)


# Other devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_stay_on_cuda(dtype):
    with FakeTensorMode():
        order = torch.randperm(20)
        matrix = torch.empty(20, 20, device="cuda", dtype=dtype)
        results = []
        for compare in COMPARE:
            layer = Dissimilarities(20, _scaled(matrix, compare), ("euclidean", compare))
            results += [(layer.values, (190,)), (layer.permuted(order).values, (190,)), (_compared(layer, layer), ())]
        for centred in (True, False):
            directions, zero = _directions(matrix[:, :7], centred)
            results += [(directions, (20, 7)), (zero, (20,))]
        results.append((_without_noise(matrix.clone(), matrix[0].double()), (20, 20)))
        for vectors, values, least in (_components(matrix[:, :7]), _components_of_gram(matrix, matrix[0].double())):
            results += [(vectors, (20, len(values))), (values, (len(values),)), (least, ())]
        results += [(_ranks(matrix[0]), (20,)), (Distances(matrix).permuted(order).matrix, (20, 20))]
        shape, space = Shape(matrix[:, :3]), Subspace(matrix[:, :4])
        results += [(shape.permuted(order).matrix, (20, 3)), (space.permuted(order).basis, (20, 4))]
        results += [(_distance(shape, shape, kind), ()) for kind in ("angular", "ding")]
        results += [(_mean_correlation(space, space), ()), (_distance(Shape(matrix[:, :0]), shape), ())]
        assert {result.device.type for result, _ in results} == {"cuda"}
        assert [tuple(result.shape) for result, _ in results] == [shape for _, shape in results]
