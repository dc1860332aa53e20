"""Minibatch CKA straight from the passes is that of the captured features, and needs the same samples twice."""

import numpy as np
import pytest
import torch
from small_networks import Deeper, N, Net, X, by_pairs, take
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repgraph import capture, stream_cka
from repgraph.metrics.similarity import hsic, minibatch_cka


def by_batches(x, y, parts):
    """Minibatch CKA from its definition, over the batches of at least 4 samples."""
    cross, one, other = (
        sum(hsic(u[rows].double(), v[rows].double()) for rows in parts if len(rows) > 3)
        for u, v in ((x, y), (x, x), (y, y))
    )
    return cross / (one * other) ** 0.5


def parts_of(*sizes):
    return torch.arange(sum(sizes)).split(sizes)


@pytest.mark.parametrize("n", [40, 41, 43, 44])
def test_stream_cka_is_minibatch_cka_of_the_captured_features(n):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(3))
    features, parts = take(Net(), x), parts_of(10, 10, 10, 10, n - 40)
    found = stream_cka(Net(), x, layers="leaves", batch_size=10, progress=False)
    assert found.index.tolist() == found.columns.tolist() == list(features)
    assert (found.index.name, found.columns.name) == ("Net", "Net")
    np.testing.assert_allclose(found, by_pairs(by_batches, features, features, parts=parts), atol=1e-5)
    np.testing.assert_allclose(found, by_pairs(minibatch_cka, features, features, batch_size=10), atol=1e-5)
    assert (found.attrs["measure"], found.attrs["batch_size"], found.attrs["n"]) == ("minibatch_cka", 10, n)


def test_stream_cka_of_two_models():
    one, other = take(Net(), layers=["0", "2"]), take(Deeper(), layers=["1", "3", "5"])
    found = stream_cka(
        Net(), X, Deeper(), layers=["0", "2"], other_layers=["1", "3", "5"], batch_size=9, progress=False
    )
    assert (found.index.tolist(), found.columns.tolist()) == (["0", "2"], ["1", "3", "5"])
    assert (found.index.name, found.columns.name) == ("a: Net", "b: Deeper")
    np.testing.assert_allclose(found, by_pairs(by_batches, one, other, parts=parts_of(9, 9, 6)), atol=1e-5)


def test_stream_cka_splits_larger_batches_and_takes_smaller_ones_as_they_come():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    features = take(Net(), x)
    for batches, size, parts in ((16, 6, (6, 6, 4, 6, 6, 4, 6, 2)), (7, 10, (7, 7, 7, 7, 7, 5))):
        loader = DataLoader(TensorDataset(x), batches)
        found = stream_cka(Net(), loader, layers="leaves", batch_size=size, progress=False)
        np.testing.assert_allclose(found, by_pairs(by_batches, features, features, parts=parts_of(*parts)), atol=1e-5)


def test_stream_cka_reduces_first_and_takes_chosen_samples():
    images = torch.randn(30, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 2))
    options = {"layers": "leaves", "reduce": lambda x: x.mean((2, 3)), "samples": 25, "progress": False}
    features = capture(model, images, **options)
    found = stream_cka(model, images, batch_size=8, **options)
    np.testing.assert_allclose(found, by_pairs(by_batches, features, features, parts=parts_of(8, 8, 8, 1)), atol=1e-5)
    assert found.attrs["n"] == 25


def test_stream_cka_within_a_budget_gives_the_identical_table():
    options = {"layers": "leaves", "batch_size": 8, "progress": False}
    assert stream_cka(Net(), X, memory=N * 9 * 4, **options).equals(stream_cka(Net(), X, **options))


def test_stream_cka_refuses_another_order_for_the_second_model():
    loader = DataLoader(TensorDataset(X), 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="a and b were given different inputs"):
        stream_cka(Net(), loader, Deeper(), layers="leaves", progress=False)
    assert np.diag(stream_cka(Net(), loader, layers="leaves", progress=False)) == pytest.approx(1)


def test_stream_cka_refuses_batches_too_small():
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 4, got 3"):
        stream_cka(Net(), X, layers="leaves", batch_size=3)
    with pytest.warns(UserWarning, match="undefined.*samples too few"):
        found = stream_cka(Net(), DataLoader(TensorDataset(X), 3), layers="leaves", progress=False)
    assert found.isna().all(axis=None)


def test_stream_cka_names_no_function_of_its_own_and_reads_a_generator_for_two_models():
    own = stream_cka(Net(), X, layers="leaves", batch_size=8, progress=False)
    assert own.attrs["reduce"] is None
    batches = (part for part in X.split(8))
    two = stream_cka(Net(), batches, Net(), layers="leaves", batch_size=8, progress=False)
    assert two.to_numpy() == pytest.approx(own.to_numpy(), abs=1e-6)


def test_reduce_must_be_a_function():
    with pytest.raises(ValueError, match="reduce must be a function of a layer's output, got 'mean'"):
        stream_cka(Net(), X, reduce="mean")
