"""Data in every form users hold it, labels, samples and ids."""

import itertools
from collections import UserDict, namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from repgraph import Activations, capture

N, SIZE = 20, 6  # the last batch is ragged
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


class Net(nn.Module):
    """Takes its input by position or by the keyword x; refuses labels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Rows(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], int(Y[i])


class DictRows(Rows):
    def __getitem__(self, i):
        return {"x": X[i], "labels": int(Y[i])}


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(Rows()[i] for i in range(N))


def batches():
    return [(X[i : i + SIZE], Y[i : i + SIZE]) for i in range(0, N, SIZE)]


LABELLED = {
    "tuple of tensors": lambda: (X, Y),
    "tuple of arrays": lambda: (X.numpy(), Y.numpy()),
    "tuple of array and list": lambda: (X.numpy(), Y.tolist()),
    "tuple with something between": lambda: (X, torch.zeros(N), Y),
    "dict": lambda: {"x": X, "labels": Y},
    "dict of arrays": lambda: {"x": X.numpy(), "labels": Y.numpy()},
    "dict-like, as of a tokenizer": lambda: UserDict(x=X, labels=Y),
    "tuple of dict and labels": lambda: ({"x": X}, Y),
    "map-style dataset": Rows,
    "dataset of dicts": DictRows,
    "TensorDataset": lambda: TensorDataset(X, Y),
    "DataLoader": lambda: DataLoader(Rows(), SIZE, num_workers=0),
    "DataLoader with a batch sampler": lambda: DataLoader(
        Rows(), batch_sampler=[list(range(i, min(i + SIZE, N))) for i in range(0, N, SIZE)]
    ),
    "DataLoader of whole batches": lambda: DataLoader(batches(), batch_size=None),
    "DataLoader of an IterableDataset": lambda: DataLoader(Streamed(), SIZE),
    "list of batches": batches,
    "list of batches of arrays": lambda: [(x.numpy(), y.tolist()) for x, y in batches()],
    "list of dicts": lambda: [{"x": x, "labels": y} for x, y in batches()],
    "generator": lambda: (batch for batch in batches()),
}
LONE = {
    "tensor": lambda: X,
    "array": lambda: X.numpy(),
    "float64 array": lambda: X.double().numpy(),
    "tuple of one": lambda: (X,),
    "dict": lambda: {"x": X},
    "list of tensors": lambda: [x for x, _ in batches()],
    "TensorDataset": lambda: TensorDataset(X),
    "generator": lambda: (x for x, _ in batches()),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def take(model, data, **options):
    return capture(model, data, "leaves", batch_size=SIZE, progress=False, **options)


@pytest.mark.parametrize("kind", LABELLED)
def test_every_kind_of_data_gives_the_same(model, kind):
    expected, found = take(model, X, labels=Y), take(model, LABELLED[kind]())
    assert list(found) == ["a", "b"]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.equal(found.labels, Y)
    assert found.sample_ids.tolist() == list(range(N))
    assert torch.equal(found.input_hashes, expected.input_hashes)


@pytest.mark.parametrize("kind", LONE)
def test_data_without_labels(model, kind):
    expected, found = take(model, X), take(model, LONE[kind]())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.labels is None


@pytest.mark.parametrize(
    "array",
    [
        np.frombuffer(X.numpy().tobytes(), dtype=np.float32).reshape(N, 4),  # read-only
        X.flip(0).numpy()[::-1],
        X.numpy().astype(">f4"),
    ],
    ids=["read-only", "negative stride", "big-endian"],
)
def test_arrays_that_torch_cannot_share(model, array):
    expected, found = take(model, X), take(model, array)
    assert torch.equal(found["b"], expected["b"])


def test_integers_stay_integers():
    model = nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, 2))
    ids = np.arange(12).reshape(4, 3) % 10
    assert torch.equal(capture(model, ids, "0", progress=False)["0"], model[0](torch.from_numpy(ids)).detach())


@pytest.mark.parametrize(
    "labels",
    [
        Y.int(),
        Y.tolist(),
        tuple(Y.tolist()),
        Y.numpy().astype(np.uint8),
        pd.Series(Y.numpy(), index=range(100, 100 + N)),
        [Y[i] for i in range(N)],
    ],
    ids=["int32", "list", "tuple", "uint8", "Series", "list of tensors"],
)
@pytest.mark.parametrize("place", ["argument", "data"])
def test_integer_labels(model, labels, place):
    found = take(model, X, labels=labels) if place == "argument" else take(model, (X, labels))
    assert found.labels.tolist() == Y.tolist()


@pytest.mark.parametrize("make", [list, np.array, pd.Series], ids=["list", "array", "Series"])
@pytest.mark.parametrize("place", ["argument", "data"])
def test_string_labels(model, make, place):
    labels = [("cat", "horse")[i % 2] for i in range(N)]
    found = take(model, X, labels=make(labels)) if place == "argument" else take(model, (X, make(labels)))
    assert found.labels.tolist() == labels


def test_string_labels_in_batches(model):
    data = [(x, [("cat", "horse")[int(v) % 2] for v in y]) for x, y in batches()]
    assert take(model, data).labels.tolist() == [("cat", "horse")[int(v) % 2] for v in Y]


@pytest.mark.parametrize("labels", [Y > 1, Y.double() / 3, torch.eye(3)[Y]], ids=["bool", "float", "multi-label"])
def test_other_targets_are_stored_as_they_are(model, labels):
    assert torch.equal(take(model, (X, labels)).labels, labels)


def test_dense_targets_are_no_labels(model):
    assert take(model, (X, torch.zeros(N, 1, 8, 8))).labels is None


def test_detection_targets_are_no_labels(model):
    boxes = [{"boxes": torch.zeros(2, 4), "labels": torch.ones(2)} for _ in range(N)]
    assert take(model, [(X, boxes)]).labels is None
    assert take(model, [(X[:2], {"boxes": 1, "labels": 2})]).labels is None


def test_labels_argument_replaces_those_of_the_data(model):
    assert take(model, (X, Y), labels=["a", *"b" * (N - 1)]).labels.tolist() == ["a", *"b" * (N - 1)]


@pytest.mark.parametrize("labels", [Y.tolist(), np.array(["a", "b"] * 10)], ids=["list", "array of str"])
def test_labels_of_a_dict_are_taken_out(model, labels):
    assert take(model, {"x": X, "labels": labels}).labels.tolist() == list(labels)


def test_labels_with_more_axes_go_to_the_model():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Embedding(9, 2)

        def forward(self, ids, labels):
            return self.out(ids + labels)

    model, ids = Tokens(), torch.zeros(5, 3, dtype=torch.long)
    acts = capture(model, {"ids": ids, "labels": ids + 1}, "out", progress=False)
    assert torch.equal(acts["out"], model.out(ids + 1).detach())
    assert acts.labels is None


@pytest.mark.parametrize("length", [N - 1, N + 1, SIZE, 1])
def test_labels_of_another_length_are_refused(model, length):
    labels = torch.zeros(length, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"labels must have one entry per sample: expected {N}, got {length}"):
        take(model, X, labels=labels)
    with pytest.raises(ValueError, match="labels"):
        take(model, (X, labels))
    with pytest.raises(ValueError, match="labels"):
        take(model, [(X, labels)])


def test_labels_of_another_length_in_one_batch_are_refused(model):
    data = batches()
    data[1] = (data[1][0], data[1][1][:-1])
    with pytest.raises(ValueError, match="labels"):
        take(model, data)


def test_mixed_labels_are_refused(model):
    with pytest.raises(ValueError, match="labels must be all integers, all bools or all strings"):
        take(model, X, labels=[None, *"b" * (N - 1)])


@pytest.mark.parametrize("kind", LABELLED)
def test_the_first_samples(model, kind):
    whole, found = take(model, X), take(model, LABELLED[kind](), samples=8)
    assert found.n == 8
    assert torch.equal(found.labels, Y[:8])
    assert found.sample_ids.tolist() == list(range(8))
    assert torch.equal(found.input_hashes, whole.input_hashes[:8])
    torch.testing.assert_close(found["b"], whole["b"][:8])


@pytest.mark.parametrize("kind", LABELLED)
def test_samples_by_position_keep_the_order_of_the_data(model, kind):
    whole, found = take(model, X), take(model, LABELLED[kind](), samples=[17, 2, 5])
    assert found.sample_ids.tolist() == [2, 5, 17]
    assert torch.equal(found.labels, Y[[2, 5, 17]])
    assert torch.equal(found.input_hashes, whole.input_hashes[[2, 5, 17]])
    torch.testing.assert_close(found["b"], whole["b"][[2, 5, 17]])


@pytest.mark.parametrize("samples", [8, np.int64(8), range(8), np.arange(8), torch.arange(8)])
def test_forms_of_samples(model, samples):
    assert take(model, X, samples=samples).sample_ids.tolist() == list(range(8))


def test_loader_that_drops_its_last_batch(model):
    loader = DataLoader(Rows(), SIZE, drop_last=True)
    assert take(model, loader).sample_ids.tolist() == list(range(18))
    with pytest.raises(ValueError, match="labels must have one entry per sample: expected 18, got 20"):
        take(model, loader, labels=Y)


def test_more_samples_than_there_are(model):
    assert take(model, X, samples=1000).n == N


def test_labels_and_ids_for_the_wanted_samples_or_for_all(model):
    ids = [f"image {i}" for i in range(N)]
    for labels, names in ((Y, ids), (Y[[2, 5]], [ids[2], ids[5]])):
        found = take(model, X, samples=[2, 5], labels=labels, sample_ids=names)
        assert found.labels.tolist() == Y[[2, 5]].tolist()
        assert found.sample_ids.tolist() == ["image 2", "image 5"]


def test_an_endless_generator_is_read_only_as_far_as_needed(model):
    endless = ((X + i, Y) for i in itertools.count())
    found = take(model, endless, samples=30)
    assert found.n == 30
    assert found.labels.tolist() == [*Y.tolist(), *Y[:10].tolist()]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (0, "samples must be at least 1, got 0"),
        ([], r"samples must be positions in 0\.\.19"),
        ([3, N], r"samples must be positions in 0\.\.19"),
        ([-1], r"samples must be positions in 0\.\.19"),
        ([1, 4, 1], "samples must be distinct"),
    ],
)
def test_bad_samples_are_refused(model, samples, message):
    with pytest.raises(ValueError, match=message):
        take(model, X, samples=samples)


def test_sample_ids_are_positions_or_what_is_given(model):
    plain = take(model, X)
    named = take(model, X, sample_ids=[f"image {i}" for i in range(N)])
    numbered = take(model, X, sample_ids=np.arange(N) + 100)
    assert plain.input_hashes.shape == (N,)
    assert named.sample_ids[3] == "image 3"
    assert numbered.sample_ids[3] == 103
    assert named.input_hashes is None  # explicit ids declare that other inputs belong together
    assert numbered.input_hashes is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [(range(N - 1), f"sample_ids must have one entry per sample: expected {N}, got {N - 1}"), ([7] * N, "distinct")],
)
def test_bad_sample_ids_are_refused(model, ids, message):
    with pytest.raises(ValueError, match=message):
        take(model, X, sample_ids=ids)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_sample_ids_must_be_distinct(ids):
    layers = {"a": torch.zeros(len(ids), 2)}
    if len(set(ids)) == len(ids):
        assert Activations(layers, sample_ids=ids).sample_ids.tolist() == ids
    else:
        with pytest.raises(ValueError, match="sample_ids must be distinct"):
            Activations(layers, sample_ids=ids)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, N - 1), st.integers(0, 3), st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_hashes_tell_which_input_differs(row, column, dtype):
    model, clean = nn.Sequential(nn.Linear(4, 2)).to(dtype), X.to(dtype)
    other = clean.clone()
    other[row, column] += 1
    a, b = (capture(model, x, "0", progress=False).input_hashes for x in (clean, other))
    assert (a != b).nonzero().flatten().tolist() == [row]
    assert len(a.unique()) == N


def test_hashes_cover_everything_that_goes_into_the_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x, y):
            return self.a(x + y)

    model, zero = Both(), torch.zeros(N, 4)
    first = capture(model, {"x": X, "y": zero}, "a", progress=False).input_hashes
    second = capture(model, {"x": zero, "y": X}, "a", progress=False).input_hashes
    assert (first != second).all()


def test_tensors_that_hold_no_samples_pass_through_a_dict():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x, scale):
            return self.a(x * scale)

    model = Scaled()
    acts = capture(model, {"x": X, "scale": torch.tensor(2.0)}, "a", batch_size=SIZE, progress=False)
    torch.testing.assert_close(acts["a"], model.a(2 * X).detach())


def test_forward_takes_the_whole_batch(model):
    found = take(model, (X, -X, Y), forward=lambda model, batch: model(batch[1]))
    torch.testing.assert_close(found["a"], model.a(-X).detach())
    assert torch.equal(found.labels, Y)


def test_forward_takes_named_tuples_as_they_are(model):
    Pair = namedtuple("Pair", ["image", "target"])
    found = take(model, [Pair(X, Y)], forward=lambda model, batch: model(batch.image))
    assert torch.equal(found.labels, Y)


def test_inputs_that_are_no_tensors_need_forward():
    model = nn.Sequential(nn.Linear(1, 2))
    data = [(["one", "three"], [0, 1], torch.zeros(2)), (["fifteen"], [1], torch.zeros(1))]
    found = capture(
        model, data, "0", forward=lambda m, batch: m(torch.tensor([[float(len(w))] for w in batch[0]])), progress=False
    )
    torch.testing.assert_close(found["0"], model(torch.tensor([[3.0], [5.0], [7.0]])).detach())


@pytest.mark.parametrize("data", ["images.npz", None, 3, object()])
def test_data_of_no_known_kind_are_refused(model, data):
    with pytest.raises(TypeError, match=f"data must be a tensor.*got {type(data).__name__}"):
        take(model, data)


@pytest.mark.parametrize("data", [X[:0], (X[:0], Y[:0]), [], iter([]), [(X[:0], Y[:0])]])
def test_empty_data_are_refused(model, data):
    with pytest.raises(ValueError, match="data holds no samples"):
        take(model, data)


@pytest.mark.parametrize("data", [[X, Y], [X.numpy(), Y.numpy()]])
def test_list_of_inputs_and_labels_is_refused_with_advice(model, data):
    with pytest.raises(ValueError, match=r"data is a list.*pass the tuple \(inputs, labels\)"):
        take(model, data)


def test_batch_without_a_tensor_is_refused(model):
    with pytest.raises(TypeError, match="a batch must hold a tensor with samples on its first axis"):
        take(model, [(["one", "two"], [0, 1])])


def test_batch_size_must_be_positive(model):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        capture(model, X, batch_size=0, progress=False)
