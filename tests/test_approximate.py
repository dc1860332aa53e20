"""Approximate neighbours against the exact ones."""

import sys

import pytest
import torch

from repgraph import Graph, approximate, knn_graph
from repgraph.approximate import approximate_knn
from repgraph.neighbors import knn

METRICS = ("cosine", "euclidean")


def classes(n, d=24, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, d, generator=generator, dtype=dtype)
    return centres[torch.arange(n) % 6] + 0.5 * torch.randn(n, d, generator=generator, dtype=dtype)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_easy_neighbours_are_all_found(metric, dtype):
    x = classes(400, dtype=dtype)
    found = approximate_knn(x.reshape(400, 4, 6), 5, metric=metric)
    values, indices = knn(x, 5, metric=metric)
    assert found.recall == 1
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.values, values)


@pytest.mark.parametrize("metric", METRICS)
def test_recall_is_the_share_of_true_neighbours_found(metric, monkeypatch):
    monkeypatch.setattr(approximate, "_LINKS", 4)
    monkeypatch.setattr(approximate, "_BUILD", 4)
    monkeypatch.setattr(approximate, "_SEARCH", 4)
    x = torch.randn(1500, 40, generator=torch.Generator().manual_seed(1))
    found = approximate_knn(x, 6, metric=metric, sample=1500)
    true = knn(x, 6, metric=metric)[1].tolist()
    shares = [len(set(own) & set(others)) / 6 for own, others in zip(found.indices.tolist(), true, strict=True)]
    assert found.recall == pytest.approx(sum(shares) / 1500, abs=1e-12)
    assert 0.05 < found.recall < 0.95
    assert approximate_knn(x, 6, metric=metric, sample=300).recall == pytest.approx(found.recall, abs=0.1)
    z = x / x.norm(dim=1, keepdim=True)
    of = found.indices[:, :, None].expand(-1, -1, 40)
    pairs = [rows[:, None].expand(-1, 6, -1).double() for rows in (z, x)], [rows.double() for rows in (z, x)]
    if metric == "cosine":
        expected = (pairs[0][0] * pairs[1][0][:, None].expand(-1, 6, -1).gather(0, of)).sum(2)
    else:
        expected = (pairs[0][1] - pairs[1][1][:, None].expand(-1, 6, -1).gather(0, of)).norm(dim=2)
    torch.testing.assert_close(found.values.double(), expected, atol=1e-6, rtol=1e-6)


def test_the_same_seed_finds_the_same_neighbours(monkeypatch):
    monkeypatch.setattr(approximate, "_SEARCH", 4)
    x = torch.randn(1500, 40, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    one, same, other = (approximate_knn(x, 3, seed=seed, sample=100) for seed in (4, 4, 5))
    assert torch.equal(one.indices, same.indices)
    assert one.recall == same.recall
    assert not torch.equal(one.indices, other.indices)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("metric", METRICS)
def test_every_sample_has_k_distinct_others(metric):
    """Also where the search proposes too few: all others, duplicates, zero rows."""
    huge = 1e200 * classes(200, dtype=torch.float64)
    for x, k in ((classes(30), 29), (classes(3).repeat(40, 1), 10), (torch.zeros(40, 5), 4), (huge, 5)):
        found = approximate_knn(x, k, metric=metric)
        n = len(x)
        assert found.values.isfinite().all()
        assert all(len(set(row) - {i}) == k for i, row in enumerate(found.indices.tolist()))
        assert found.indices.min() >= 0
        assert found.indices.max() < n
    assert found.recall == 1


def test_settings_of_a_graph_say_that_it_is_approximate(tmp_path):
    x = classes(300)
    graph = knn_graph(x, 4, approximate=True, symmetrize="union")
    assert graph.settings == {
        "k": 4,
        "metric": "cosine",
        "symmetrize": "union",
        "approximate": "faiss HNSW",
        "recall": 1.0,
    }
    assert (graph.adjacency != knn_graph(x, 4, symmetrize="union").adjacency).nnz == 0
    graph.save(tmp_path / "graph")
    assert Graph.load(tmp_path / "graph").settings == graph.settings
    assert "approximate=faiss HNSW, recall=1.0" in repr(graph)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'repgraph\[approximate\]'"):
        approximate_knn(classes(20), 2)
    with pytest.raises(ImportError, match="need faiss"):
        knn_graph(classes(20), 2, approximate=True)
    assert knn_graph(classes(20), 2).n == 20


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"k": 20}, "k must be an integer with 1 <= k < n, got k = 20 with n = 20"),
        ({"metric": "dot"}, "metric must be 'cosine' or 'euclidean', got 'dot'"),
        ({"sample": 0}, "sample must be a positive integer, got 0"),
        ({"sample": 2.5}, "sample must be a positive integer, got 2.5"),
        ({"x": classes(20) / 0}, "x must be finite"),
    ],
)
def test_bad_arguments(choices, message):
    with pytest.raises(ValueError, match=message):
        approximate_knn(**{"x": classes(20), "k": 3} | choices)


def test_precomputed_similarities_are_not_searched():
    with pytest.raises(ValueError, match="approximate needs features, got metric='precomputed'"):
        knn_graph(torch.eye(4), 2, metric="precomputed", approximate=True)
