"""GBS and mutual kNN by hand, against dense matrices and sets, and as theorems."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import related_layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from repgraph import Graph, knn_graph, threshold_graph
from repgraph.metrics.similarity import gbs, gbs_per_sample, mutual_knn
from repgraph.metrics.similarity.gbs import Rows, _dense, _isolated, _row_cosines, _unit
from repgraph.metrics.similarity.mutual_knn import _as_rows, _overlap

seeds = st.integers(0, 2**32 - 1)
layers = partial(related_layers.layers, noise=1.0)
X3 = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
Y3 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
X6 = torch.tensor([[1, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]], dtype=torch.float64)
Y6 = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 1], [1, 1, 3], [3, 0, 1], [1, 2, 2]], dtype=torch.float64)


def neighbors(x, k):
    cosine = np.corrcoef(np.c_[x, -x])  # rows without a mean: their correlation is their cosine
    np.fill_diagonal(cosine, -np.inf)
    return cosine, [np.argsort(-row, kind="stable")[:k] for row in cosine]


def adjacency(x, k, symmetrize, weighted):
    cosine, nearest = neighbors(x.numpy(), len(x) - 1 if k is None else k)
    a, edge = np.zeros_like(cosine), np.zeros(cosine.shape, bool)
    for i, columns in enumerate(nearest):
        a[i, columns], edge[i, columns] = cosine[i, columns], True
    if symmetrize == "mean":
        a = (a + a.T) / 2
    elif symmetrize == "union":
        a = np.where(edge, a, a.T)
    elif symmetrize == "mutual":
        a = a * edge.T
    return (a != 0).astype(float) if weighted is False else a


def by_rows(x, y, k, symmetrize="mean", weighted=True):
    """The definition: cosine of row i of one adjacency with row i of the other, 0 where one of them is zero."""
    a, b = (adjacency(z, k, symmetrize, weighted) for z in (x, y))
    length = np.sqrt(np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b))
    return np.array([a[i] @ b[i] / length[i] if length[i] else 0.0 for i in range(len(a))])


def isolating(f, *args, **options):
    """A value that may come with the warning of isolated samples."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[xy]: .* isolated")
        return f(*args, **options)


# By hand


@pytest.mark.parametrize(
    ("x", "y", "options", "expected"),
    [
        (X3, Y3, {"k": 1}, 2 * 0.8 / (3 * math.sqrt(0.73))),
        (X3, Y3, {"k": 1, "symmetrize": "none"}, 2 / 3),
        (X6, Y6, {"k": 2}, 0.840797128),
        (X6, Y6, {"k": 2, "symmetrize": "none"}, 0.738873755),
        (X6, Y6, {"k": 2, "symmetrize": "none", "weighted": False}, 2 / 3),
    ],
)
def test_sparse_by_hand(x, y, options, expected):
    assert gbs(x, y, **options) == pytest.approx(expected, abs=1e-9)
    assert gbs(x.float(), y.float(), **options) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("x", "y", "expected"), [(X3, Y3, 8 / 15), (X6, Y6, 0.910252874)])
def test_dense_by_hand(x, y, expected):
    with pytest.warns(UserWarning, match=r"dense graphs \(k=None\) of non-negative features"):
        assert gbs(x, y, k=None) == pytest.approx(expected, abs=1e-9)


def test_per_sample_by_hand():
    with pytest.warns(UserWarning, match="dense graphs"):
        assert gbs_per_sample(X3, Y3, k=None).tolist() == pytest.approx([0, 0.8, 0.8], abs=1e-12)
    assert gbs_per_sample(X3, Y3, k=1, symmetrize="none").tolist() == [0, 1, 1]


def test_mutual_knn_by_hand():
    assert mutual_knn(X6, Y6, k=2) == pytest.approx(2 / 3, abs=1e-12)
    assert mutual_knn(X3, Y3, k=1) == pytest.approx(2 / 3, abs=1e-12)
    assert mutual_knn(X3, Y3, k=2) == pytest.approx(1, abs=1e-12)


# Parity


@given(seeds, st.integers(1, 23), st.sampled_from(["mean", "union", "mutual", "none"]), st.booleans())
def test_parity_with_rows_of_dense_matrices(seed, k, symmetrize, weighted):
    x, y, _ = layers(seed)
    options = {"k": k, "symmetrize": symmetrize, "weighted": weighted}
    expected = by_rows(x, y, **options)
    found = isolating(gbs_per_sample, x, y, **options)
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(expected, abs=1e-10)
    assert isolating(gbs, x, y, **options) == pytest.approx(expected.mean(), abs=1e-10)


@given(seeds)
def test_parity_of_dense_graphs(seed):
    x, y, _ = layers(seed)
    expected = by_rows(x, y, None)
    assert gbs_per_sample(x, y, k=None).numpy() == pytest.approx(expected, abs=1e-12)
    assert gbs(x, y, k=None) == pytest.approx(expected.mean(), abs=1e-12)


@given(seeds, st.integers(1, 23))
def test_parity_of_mutual_knn_with_sets(seed, k):
    x, y, _ = layers(seed)
    shared = [len(set(a) & set(b)) / k for a, b in zip(neighbors(x, k)[1], neighbors(y, k)[1], strict=True)]
    assert mutual_knn(x, y, k=k) == pytest.approx(np.mean(shared), abs=1e-12)


# Theorems


@given(seeds, st.integers(1, 23))
def test_mutual_knn_is_the_gbs_of_unweighted_directed_graphs(seed, k):
    x, y, _ = layers(seed)
    expected = gbs(x, y, k, symmetrize="none", weighted=False)
    assert mutual_knn(x, y, k) == pytest.approx(expected, abs=1e-12)


@given(seeds)
@settings(max_examples=10)
def test_all_neighbors_are_the_dense_graph(seed):
    x, y, _ = layers(seed)
    for symmetrize in ("mean", "union", "mutual", "none"):
        assert gbs(x, y, 23, symmetrize=symmetrize) == pytest.approx(gbs(x, y, None), abs=1e-10)
    assert mutual_knn(x, y, 23) == pytest.approx(1, abs=1e-12)


@given(seeds, st.sampled_from([None, 1, 5]), st.floats(1e-3, 1e3))
def test_a_rotated_and_scaled_layer_gives_1(seed, k, c):
    x, _, generator = layers(seed)
    orthogonal = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    lengths = torch.rand(24, 1, generator=generator, dtype=torch.float64) + 0.1
    for y in (c * x @ orthogonal, lengths * x):
        assert gbs(x, y, k) == pytest.approx(1, abs=1e-10)
    assert gbs(x, x - 2, k) < 1 - 1e-3


@given(seeds, st.sampled_from([None, 1, 3, 10]), st.sampled_from(["mean", "none"]))
@settings(max_examples=10)
def test_symmetry_bounds_and_joint_permutation(seed, k, symmetrize):
    x, y, generator = layers(seed)
    order = torch.randperm(24, generator=generator)
    value = gbs(x, y, k, symmetrize=symmetrize)
    assert -1 <= value <= 1
    assert gbs(y, x, k, symmetrize=symmetrize) == pytest.approx(value, abs=1e-12)
    assert gbs(x[order], y[order], k, symmetrize=symmetrize) == pytest.approx(value, abs=1e-10)
    each = gbs_per_sample(x, y, k, symmetrize=symmetrize)
    assert each.mean().item() == pytest.approx(value, abs=1e-12)
    shuffled = gbs_per_sample(x[order], y[order], k, symmetrize=symmetrize)
    torch.testing.assert_close(shuffled, each[order], rtol=0, atol=1e-10)


@given(seeds, st.integers(1, 23))
def test_symmetry_bounds_and_joint_permutation_of_mutual_knn(seed, k):
    x, y, generator = layers(seed)
    order = torch.randperm(24, generator=generator)
    value = mutual_knn(x, y, k)
    assert max(0, 2 * k - 23) / k - 1e-12 <= value <= 1 + 1e-12
    assert mutual_knn(y, x, k) == pytest.approx(value, abs=1e-12)
    assert mutual_knn(x[order], y[order], k) == pytest.approx(value, abs=1e-12)
    assert mutual_knn(x, x, k) == pytest.approx(1, abs=1e-12)


@given(seeds, st.sampled_from(["mean", "union", "mutual", "none"]))
def test_graphs_in_place_of_features(seed, symmetrize):
    x, y, _ = layers(seed)
    a, b = (knn_graph(z, 4, symmetrize=symmetrize) for z in (x, y))
    value = isolating(gbs, x, y, 4, symmetrize=symmetrize)
    assert isolating(gbs, a, b) == value
    assert isolating(gbs, a, y, 4, symmetrize=symmetrize) == value
    each = isolating(gbs_per_sample, x, y, 4, symmetrize=symmetrize)
    assert torch.equal(isolating(gbs_per_sample, a, b), each)
    if symmetrize == "none":
        assert mutual_knn(a, b) == mutual_knn(x, b, 4) == mutual_knn(x, y, 4)


@given(seeds)
def test_prepared_rows_are_permuted_as_features_are(seed):
    x, y, generator = layers(seed)
    order = torch.randperm(24, generator=generator)
    for k in (None, 4):
        shuffled = gbs.prepare(y, k=k).permuted(order)
        assert gbs.pair(gbs.prepare(x, k=k), shuffled).item() == pytest.approx(gbs(x, y[order], k), abs=1e-10)
    shuffled = mutual_knn.prepare(y, k=4).permuted(order)
    assert mutual_knn.pair(mutual_knn.prepare(x, k=4), shuffled).item() == mutual_knn(x, y[order], 4)


def test_opposite_rows_give_minus_1():
    graph = Graph.from_edges(3, [0, 1], [1, 2], [1.0, 0.5])
    opposite = Graph.from_edges(3, [0, 1], [1, 2], [-2.0, -1.0])
    assert gbs(graph, opposite) == pytest.approx(-1, abs=1e-12)
    assert gbs(graph, opposite, weighted=False) == pytest.approx(1, abs=1e-12)


def test_threshold_graphs():
    x, y, _ = layers(0)
    a, b = threshold_graph(x, -0.5), threshold_graph(y, -0.5)
    p, q = a.adjacency.toarray(), b.adjacency.toarray()
    expected = [u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in zip(p, q, strict=True)]
    assert gbs_per_sample(a, b).numpy() == pytest.approx(expected, abs=1e-12)


# Chance


def test_independent_layers_are_near_chance():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 500, 20, generator=generator)
    assert 0 < gbs(x, y) < 0.03
    assert mutual_knn(x, y, 100) == pytest.approx(100 / 499, abs=0.02)


def test_dense_graphs_of_absolute_gaussians_are_alike_with_a_warning():
    x, y = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(0)).abs()
    with pytest.warns(UserWarning, match="alike whatever the features: choose k") as caught:
        assert gbs(x, y, k=None) > 0.99
    assert [str(warning.message)[:2] for warning in caught] == ["x:", "y:"]
    assert {warning.filename for warning in caught} == {__file__}
    assert gbs(x, y) < 0.1


# Isolated samples


@pytest.mark.parametrize("symmetrize", ["mean", "none"])
def test_zero_rows_are_isolated(symmetrize):
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    x[[4, 11]] = 0
    with pytest.warns(UserWarning, match="[xy]: 2 of 20 samples are isolated: no edge has weight"):
        assert gbs(x, x, symmetrize=symmetrize) == pytest.approx(1 - 2 / 20, abs=1e-12)
    with pytest.warns(UserWarning, match="isolated"):
        assert gbs(x, x, symmetrize=symmetrize, empty="skip") == pytest.approx(1, abs=1e-12)
    with pytest.warns(UserWarning, match="isolated"):
        each = gbs_per_sample(x, x, symmetrize=symmetrize)
    assert each[[4, 11]].tolist() == [0, 0]
    assert each.sum().item() == pytest.approx(18, abs=1e-12)


def test_zero_rows_in_dense_graphs():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    x[[4, 11]] = 0
    with pytest.warns(UserWarning, match="[xy]: 2 of 20 samples are isolated"):
        assert gbs(x, x, None) == pytest.approx(1 - 2 / 20, abs=1e-6)


def test_a_sample_isolated_in_either_layer_is_skipped():
    a = Graph.from_edges(4, [0, 1], [1, 2])
    b = Graph.from_edges(4, [1, 2], [2, 3])
    with pytest.warns(UserWarning, match="1 of 4 samples are isolated"):
        assert gbs(a, b, empty="skip") == pytest.approx((1 / math.sqrt(2) + 1 / math.sqrt(2)) / 2, abs=1e-12)
    with pytest.warns(UserWarning, match="isolated"):
        assert gbs(a, b) == pytest.approx(1 / math.sqrt(2) / 2, abs=1e-12)


def test_no_edges_at_all():
    empty = Graph.from_edges(3, [], [])
    with pytest.warns(UserWarning, match="3 of 3 samples are isolated"):
        assert gbs(empty, empty) == 0
    with pytest.warns(UserWarning, match=r"undefined \(nan\)|isolated") as caught:
        assert math.isnan(gbs(empty, empty, empty="skip"))
    assert "undefined (nan)" in str(caught[-1].message)


def test_mutual_knn_warns_of_zero_rows():
    x = layers(0)[0]
    x[3] = 0
    with pytest.warns(UserWarning, match="[xy]: 1 of 24 samples are zero vectors"):
        assert mutual_knn(x, x, 3) == pytest.approx(1, abs=1e-12)


def test_constant_features_warn():
    x, y, _ = layers(0)
    with pytest.warns(UserWarning, match="y: constant features: every sample is equally near"):
        assert 0 <= gbs(x, torch.ones_like(y), 3) < 0.5


# Types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_types(dtype):
    x, y, _ = layers(0, d=40)
    x, y = ((20 * z).round().to(dtype) for z in (x, y))
    assert gbs(x, y, 4) == pytest.approx(by_rows(x.double(), y.double(), 4).mean(), abs=1e-6)
    assert gbs(x, y, None) == pytest.approx(by_rows(x.double(), y.double(), None).mean(), abs=1e-5)
    assert mutual_knn(x, y, 4) == mutual_knn(x.double(), y.double(), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1e20])
def test_small_and_very_large_features(scale, dtype):
    x, y, _ = layers(0)
    assert gbs((scale * x).to(dtype), y.to(dtype), None) == pytest.approx(by_rows(x, y, None).mean(), abs=1e-6)
    expected = by_rows(x, y, 4).mean()
    assert gbs((scale * x).to(dtype), y.to(dtype), 4) == pytest.approx(expected, abs=1e-6)
    assert mutual_knn((scale * x).to(dtype), y.to(dtype), 4) == mutual_knn(x, y, 4)


@pytest.mark.parametrize("f", [gbs, gbs_per_sample, mutual_knn])
def test_trailing_axes_and_gradients(f):
    x, y, _ = layers(0, d=6)
    before = x.clone()
    value = f(x, y, 3)
    again = f(x.requires_grad_().reshape(24, 3, 2, 1), y, 3)
    assert torch.equal(torch.as_tensor(value), torch.as_tensor(again))
    assert isinstance(value, torch.Tensor if f is gbs_per_sample else float)
    assert torch.equal(x, before)


# Bad input


NAN = torch.tensor([[1.0], [math.nan], [0.0]])


@pytest.mark.parametrize("f", [gbs, gbs_per_sample, mutual_knn])
@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (X3, X6, {"k": 1}, "x and y must be over the same samples, got 3 and 6"),
        (X3, NAN, {"k": 1}, "^y must be finite, got NaN or infinite values in 1 of 3 samples"),
        (torch.ones(4), Y3, {"k": 1}, r"^x must have shape \(n, \.\.\.\) .*got \(4,\)"),
        (X3, torch.ones(3, 0), {"k": 1}, "^y must have shape"),
        (X3, Y3, {"k": 3}, "x: k must be an integer with 1 <= k < n, got k = 3 with n = 3 samples"),
        (X3, Y3, {"k": 0}, "k must be an integer"),
        (X3, Y3, {"k": 1.5}, "k must be an integer"),
        (knn_graph(X6, 2, symmetrize="none"), knn_graph(Y6, 3, symmetrize="none"), {}, "k=2.* against .*k=3"),
        (knn_graph(X6, 2, symmetrize="none"), Y6, {"k": 3}, "graphs must be made in the same way, got"),
    ],
)
def test_bad_input(f, x, y, options, message):
    if f is not mutual_knn and "k" in options:
        options = options | {"symmetrize": "none"}
    with pytest.raises(ValueError, match=message):
        f(x, y, **options)


@pytest.mark.parametrize(
    ("f", "x", "y", "options", "message"),
    [
        (gbs, knn_graph(X6, 2), knn_graph(Y6, 2, symmetrize="union"), {}, "symmetrize=mean.* against .*=union"),
        (gbs, knn_graph(X6, 2), knn_graph(Y6, 2, metric="euclidean"), {}, "metric=cosine.* against .*=euclidean"),
        (gbs, knn_graph(X6, 2), threshold_graph(Y6, 0.5), {}, "k=2.* against threshold=0.5"),
        (gbs, knn_graph(X6, 2), Graph.from_edges(6, range(5), range(1, 6), directed=True), {}, "directed=False"),
        (gbs, X6, knn_graph(Y6, 2), {"k": None}, "all pairs .k=None. against a sparse graph"),
        (gbs, X6, Y6, {"k": 2, "symmetrize": "both"}, "symmetrize must be 'mean', 'union', 'mutual' or 'none'"),
        (gbs, X6, Y6, {"k": 2, "empty": "drop"}, "empty must be 'zero' or 'skip', got 'drop'"),
        (mutual_knn, knn_graph(X6, 2), Y6, {"k": 2}, r"graph must be one of knn_graph\(x, k, symmetrize='none'\)"),
        (mutual_knn, X6, Graph.from_edges(6, [0, 1], [1, 2], directed=True), {"k": 2}, "y: graph must be one of"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*dense graphs", "ignore:.*isolated")
def test_graphs_that_do_not_fit(f, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        f(x, y, **options)


@pytest.mark.parametrize("measure", [gbs, mutual_knn, gbs_per_sample])
@pytest.mark.parametrize("other", [[1, 2, 3], X6.numpy(), None])
def test_what_is_neither_features_nor_graph_is_refused(measure, other):
    with pytest.raises(ValueError, match="y must be a real torch tensor"):
        measure(X6, other, 2)


def test_graphs_without_edges_have_no_neighbors():
    with pytest.raises(ValueError, match="symmetrize='none'"):
        mutual_knn(Graph.from_edges(6, [], [], directed=True), X6)


def test_cosine_and_euclidean_neighbors_are_not_mixed():
    with pytest.raises(ValueError, match="metric=euclidean"):
        mutual_knn(knn_graph(X6, 2, metric="euclidean", symmetrize="none"), Y6, 2)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_weights_of_any_size(scale):
    a, b = knn_graph(X6, 2), knn_graph(Y6, 2)
    assert gbs(Graph(a.adjacency * scale), Graph(b.adjacency)) == pytest.approx(gbs(a, b), abs=1e-12)


def test_dense_graphs_without_weights_and_of_huge_features():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x.flip(0)
    assert gbs(x, y, None, weighted=False) == pytest.approx(gbs(x, y, 19, weighted=False), abs=1e-12)
    assert gbs(x * 1e200, y, None) == pytest.approx(gbs(x, y, None), abs=1e-12)


# Other devices


def test_kernels_stay_on_cuda():
    with FakeTensorMode():
        place = torch.arange(60, device="cuda")
        weight = torch.ones(60, device="cuda", dtype=torch.float64)
        sparse = Rows(20, place, weight)
        neighbors = _as_rows(torch.zeros((20, 3), dtype=torch.int64, device="cuda"), 3, "cosine")
        dense = Rows(20, None, _dense(torch.empty(20, 7, device="cuda")))
        order = torch.randperm(20)
        results = [
            (_row_cosines(place, weight, place, weight, 20), (20,)),
            (_unit(place // 20, weight, 20), (60,)),
            (_isolated(sparse), (20,)),
            (_isolated(dense), (20,)),
            (dense.weight, (20, 20)),
            (dense.permuted(order).weight, (20, 20)),
            (sparse.permuted(order).place, (60,)),
            (sparse.permuted(order).weight, (60,)),
            (neighbors.place, (60,)),
            (_overlap(neighbors, neighbors.permuted(order)), ()),
            (gbs.pair(dense, dense), ()),
            (gbs.pair(sparse, sparse, "skip"), ()),
        ]
        assert {result.device.type for result, _ in results} == {"cuda"}
        assert [tuple(result.shape) for result, _ in results] == [shape for _, shape in results]
