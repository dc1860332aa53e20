"""Shards, joined, are the capture of all samples; what does not belong together is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import Loaded, Net, Through
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repgraph import Activations, capture, join_shards
from repgraph.activations.shards import shard_rows

pytestmark = pytest.mark.usefixtures("one_thread")

N = 11
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
NET = Net()


def take(data=(X, Y), model=NET, **options):
    return capture(model, data, "leaves", batch_size=options.pop("batch_size", 4), progress=False, **options)


def shards(m, data=(X, Y), **options):
    return [take(data, shard=(i, m), **options) for i in range(m)]


def check_same(found, whole, exact=True):
    assert list(found) == list(whole)
    assert (found.specs, found.settings, found.n) == (whole.specs, whole.settings, whole.n)
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    assert np.array_equal(np.asarray(found.labels), np.asarray(whole.labels))
    assert found.sample_ids.tolist() == whole.sample_ids.tolist()
    assert (found.input_hashes is None) == (whole.input_hashes is None)
    assert whole.input_hashes is None or torch.equal(found.input_hashes, whole.input_hashes)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_runs_are_those_of_numpy(n_and_m):
    n, m = n_and_m
    parts = [np.arange(n)[shard_rows(n, (i, m))].tolist() for i in range(m)]
    assert parts == [part.tolist() for part in np.array_split(np.arange(n), m)]


@given(st.data())
def test_shards_in_any_order_are_the_whole(data):
    n = data.draw(st.integers(1, N))
    m = data.draw(st.integers(1, n))
    order = data.draw(st.permutations(range(m)))
    parts = shards(m, (X[:n], Y[:n]), batch_size=data.draw(st.integers(1, 5)))
    check_same(join_shards([parts[i] for i in order]), take((X[:n], Y[:n])), exact=False)


@pytest.mark.parametrize(
    "kind", ["tensors", "dataset", "loader", "list", "generator", "iterable of batches", "dict", "arrays"]
)
def test_shards_at_batch_boundaries_are_the_whole_to_the_last_bit(kind):
    def data():
        batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 8, 4)]
        return {
            "tensors": (X[:8], Y[:8]),
            "dataset": TensorDataset(X[:8], Y[:8]),
            "loader": DataLoader(TensorDataset(X[:8], Y[:8]), 4),
            "list": batches,
            "generator": (batch for batch in batches),
            "iterable of batches": DataLoader(batches, batch_size=None),
            "dict": {"input": X[:8], "labels": Y[:8]},
            "arrays": (X[:8].numpy(), Y[:8].tolist()),
        }[kind]

    parts = [take(data(), shard=(i, 2)) for i in range(2)]
    assert [part.n for part in parts] == [4, 4]
    assert parts[1].sample_ids.tolist() == [4, 5, 6, 7]
    check_same(join_shards(parts), take(data()))


def test_only_the_samples_of_a_shard_are_loaded():
    data = Loaded(X, Y)
    part = take(data, shard=(1, 3))
    assert set(data.loaded) == {4, 5, 6, 7}
    assert part.labels.tolist() == Y[4:8].tolist()


@pytest.mark.parametrize("labels", [None, Y, [f"class {i % 2}" for i in range(N)], torch.eye(3)[Y]])
@pytest.mark.parametrize("ids", [None, [f"image {i}" for i in range(N)], range(100, 100 + N)])
def test_labels_and_ids_of_all_are_cut_and_joined(labels, ids):
    options = {"labels": labels, "sample_ids": ids}
    check_same(join_shards(shards(3, X, **options)[::-1]), take(X, **options), exact=False)


def test_chosen_samples_are_cut():
    chosen = [9, 1, 2, 10, 7]
    parts = shards(2, samples=chosen, labels=Y.flip(0))
    assert [part.sample_ids.tolist() for part in parts] == [[1, 2, 7], [9, 10]]
    check_same(join_shards(parts), take(samples=chosen, labels=Y.flip(0)), exact=False)
    of_chosen = shards(2, samples=chosen, labels=[0, 1, 2, 3, 4])
    assert [part.labels.tolist() for part in of_chosen] == [[0, 1, 2], [3, 4]]
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, N, 4)]
    first = [take((b for b in batches), samples=6, labels=Y, shard=(i, 2)) for i in range(2)]
    check_same(join_shards(first), take(samples=6), exact=False)


def test_labels_of_one_shard_alone_are_refused():
    with pytest.raises(ValueError, match="labels must have one entry per sample: expected 11, got 4"):
        take(labels=Y[:4], shard=(0, 3))


def test_shards_from_folders_under_a_budget_and_saved_again(tmp_path):
    parts = [
        take(shard=(0, 3), folder=tmp_path / "0"),
        take(shard=(1, 3), memory=4 * 8 * 4),
        take(shard=(2, 3), folder=tmp_path / "2"),
    ]
    parts[2] = Activations.load(tmp_path / "2")
    assert "passes" in repr(parts[1])
    joined = join_shards(parts)
    assert repr(joined).startswith("Activations(n=11, layers=4, 1.14 kB in 3 shards)")
    check_same(joined, take(), exact=False)
    joined.save(tmp_path / "whole")
    check_same(Activations.load(tmp_path / "whole"), joined)
    check_same(joined.subset([10, 0, 5]), joined.subset([10, 0, 5]))
    assert torch.equal(joined.subset([10, 0, 5])["2"], joined["2"][[10, 0, 5]])


def test_a_sample_that_occurs_twice_in_the_data_is_two_samples():
    same = X[:1].expand(4, 6)
    joined = join_shards(shards(2, same))
    assert len(set(joined.input_hashes.tolist())) == 1
    assert joined.sample_ids.tolist() == [0, 1, 2, 3]


def test_missing_and_doubled_shards_are_refused():
    parts = shards(4)
    with pytest.raises(ValueError, match=r"shards 1, 3 of 4 are missing; shard 1 holds samples 3 to 5 of 11"):
        join_shards([parts[2], parts[0]])
    with pytest.raises(ValueError, match="shard 2 of 4 is given twice"):
        join_shards([*parts, parts[2]])
    with pytest.raises(ValueError, match="parts is empty"):
        join_shards([])


def other_parameters():
    net = Net()
    with torch.no_grad():
        net[2].bias[1] += 1e-3
    return net


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: take(), r"parts\[1\] is no shard: capture it with shard=\(i, m\)"),
        (lambda: take(shard=(1, 3)), r"parts\[1\] is a shard of another capture: expected number of shards 2, .*got 3"),
        (lambda: take(samples=10, shard=(1, 2)), r"another capture: expected number of samples 11, .*got 10"),
        (lambda: take((X.repeat(2, 1), Y.repeat(2)), samples=range(2, 13), shard=(1, 2)), r"checksum of the positions"),
        (lambda: take(model=Net(seed=1), shard=(1, 2)), r"digest of the model's parameters"),
        (lambda: take(model=other_parameters(), shard=(1, 2)), r"digest of the model's parameters"),
        (lambda: take(reduce="mean", shard=(1, 2)), r"expected reduce None, as in parts\[0\], got 'mean'"),
        (lambda: take(X, shard=(1, 2)), r"parts\[0\] has labels, parts\[1\] has none"),
        (lambda: take(labels=Y / 2, shard=(1, 2)), r"labels of the shards differ in type: torch.float32, torch.int64"),
        (lambda: take(sample_ids=range(N), shard=(1, 2)), r"parts\[0\] has input hashes, parts\[1\] has none"),
        (lambda: take(shard=(1, 2)).subset(layers=["0", "1"]), r"layers .* expected 0, 1, 2, 3, got 0, 1"),
        (lambda: take(shard=(1, 2)).subset(layers=["1", "0", "2", "3"]), r"in their order: expected 0, 1, 2, 3, got 1"),
        (lambda: take(shard=(1, 2)).subset([0, 1]), r"shard 1 of 2 must hold 5 samples, got 2"),
    ],
)
def test_a_foreign_shard_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        join_shards([take(shard=(0, 2)), other()])


def test_layers_of_another_shape_or_type_are_refused():
    model = Through(lambda x: x[:, : 2 if x.sum() > 0 else 3])
    positive = X.abs()
    positive[6:] *= -1
    parts = shards(2, positive, model=nn.Sequential(model))
    with pytest.raises(ValueError, match=r"layer '0': parts\[1\] has 3 of torch.float32, expected 2 of torch.float32"):
        join_shards(parts)


def test_ids_in_two_shards_are_refused():
    ids = [*"abcdefghij", "c"]
    with pytest.raises(ValueError, match="1 sample ids are in two shards: c"):
        join_shards(shards(2, sample_ids=ids))


def test_more_shards_than_samples_and_what_is_no_shard_are_refused():
    with pytest.raises(ValueError, match="shard 0 of 12: 11 samples are too few for 12 shards, one would be empty"):
        take(shard=(0, 12))
    for bad in ((3, 3), (-1, 2), (0, 0), (0,), (0.5, 2), "12", (0, 1, 2)):
        with pytest.raises(ValueError, match=r"shard must be two integers \(i, m\) with 0 <= i < m, got"):
            take(shard=bad)


def test_a_shuffling_loader_cannot_be_cut_into_shards():
    loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True)
    with pytest.raises(ValueError, match=r"data gave another sample .* shards, need a loader that does not shuffle"):
        take(loader, shard=(1, 2))
