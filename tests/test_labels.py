"""Every kind of label that is accepted, and every kind that is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repgraph.labels import as_labels, class_codes

ACCEPTED = {
    "tensor": (torch.tensor([5, 2, 5]), [2, 5]),
    "int8 tensor": (torch.tensor([5, 2, 5], dtype=torch.int8), [2, 5]),
    "bool tensor": (torch.tensor([True, False, True]), [False, True]),
    "array": (np.array([5, -2, 5]), [-2, 5]),
    "unsigned array": (np.array([5, 2, 5], dtype=np.uint16), [2, 5]),
    "bool array": (np.array([True, False, True]), [False, True]),
    "string array": (np.array(["b", "a", "b"]), ["a", "b"]),
    "object array of strings": (np.array(["b", "a", "b"], dtype=object), ["a", "b"]),
    "list": ([5, 2, 5], [2, 5]),
    "tuple": ((5, 2, 5), [2, 5]),
    "generator": ((c for c in "bab"), ["a", "b"]),
    "list of bools": ([True, False, True], [False, True]),
    "list of strings": (["dog", "cat", "dog"], ["cat", "dog"]),
    "list of NumPy integers": ([np.int64(5), np.int64(2), np.int64(5)], [2, 5]),
    "list of 0-d tensors": ([torch.tensor(5), torch.tensor(2), torch.tensor(5)], [2, 5]),
    "series": (pd.Series([5, 2, 5], index=[7, 8, 9]), [2, 5]),
    "series of bools": (pd.Series([True, False, True]), [False, True]),
    "series of strings": (pd.Series(["b", "a", "b"]), ["a", "b"]),
    "nullable series": (pd.Series([5, 2, 5], dtype="Int64"), [2, 5]),
    "nullable series of bools": (pd.Series([True, False, True], dtype="boolean"), [False, True]),
    "categorical strings": (pd.Series(["b", "a", "b"], dtype="category"), ["a", "b"]),
    "categorical integers": (pd.Series([5, 2, 5], dtype="category"), [2, 5]),
    "categorical with an unused class": (pd.Series(pd.Categorical(["b", "a", "b"], ["c", "b", "a"])), ["a", "b"]),
}


@pytest.mark.parametrize(("labels", "classes"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(labels, classes):
    codes, found = class_codes(labels, 3)
    assert found == classes
    assert [type(c) for c in found] == [type(c) for c in classes]
    assert codes.dtype == torch.int64
    assert codes.tolist() == [1, 0, 1]


REFUSED = {
    "float list": ([0.0, 1.0, 1.0], "labels must be integers, bools or strings, got torch.float64: bin"),
    "float tensor": (torch.ones(3), "labels must be .* got torch.float32: bin a continuous target"),
    "half tensor": (torch.ones(3).bfloat16(), "labels must be .* got torch.bfloat16: bin"),
    "complex tensor": (torch.ones(3).cfloat(), "labels must be .* got torch.complex64"),
    "nullable series with a gap": (pd.Series([1, None, 2], dtype="Int64"), "labels must be"),
    "one-hot tensor": (torch.eye(3).long(), r"labels must be one class per sample, shape \(3,\), got shape \(3, 3\)"),
    "nested list": ([[1, 0], [0, 1], [1, 1]], r"labels must be one class per sample.* got shape \(3, 2\)"),
    "a number": (torch.tensor(1), r"labels must be one class per sample.* got shape \(\)"),
    "too short": ([0, 1], "labels must have one entry per sample: expected 3, got 2"),
    "too long": (np.zeros(4, dtype=int), "labels must have one entry per sample: expected 3, got 4"),
    "too short strings": (["a", "b"], "labels must have .* expected 3, got 2"),
    "None in a list": ([0, None, 1], "labels must be all integers, .* a mix of NoneType, int"),
    "None in strings": (["a", None, "b"], "labels must be .* a mix of NoneType, str"),
    "gap in a series": (pd.Series(["a", None, "b"], dtype=object), "labels must be .* mix of NoneType, str"),
    "gap in a categorical": (pd.Series(["a", None, "b"], dtype="category"), "labels must be .* mix of float, str"),
    "mixed series": (pd.Series(["a", 1, "b"]), "labels must be all integers, .* a mix of int, str"),
    "integers and strings": ([1, "a", 2], "labels must be all integers, .* a mix of int, str"),
    "nan and strings": ([float("nan"), "a", "b"], "labels must be all integers, .* a mix of float, str"),
    "bools and integers": ([True, 2, 3], "labels must be all integers, .* a mix of bool, int"),
    "dates": (pd.Series(pd.date_range("2020", periods=3)), "labels must be .* got dtype datetime64"),
}


@pytest.mark.parametrize(("labels", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        class_codes(labels, 3)


@given(st.lists(st.integers(-5, 5) | st.integers(-(2**62), 2**62), min_size=1) | st.lists(st.text("abc"), min_size=1))
def test_codes_number_the_sorted_classes(labels):
    codes, classes = class_codes(labels, len(labels))
    assert classes == sorted(set(labels))
    assert [classes[c] for c in codes] == labels


@pytest.mark.parametrize(
    "target", [torch.rand(3, 2), np.array([0.5, 1.5]), [0.5, 1.5], pd.Series([0.5, 1.5]), torch.zeros(3, 4).long()]
)
def test_targets_that_are_no_classes_pass_through_as_labels(target):
    stored = as_labels(target)
    assert isinstance(stored, torch.Tensor)
    np.testing.assert_array_equal(stored.numpy(), np.asarray(target))


def test_as_labels_copies_arrays_and_detaches_tensors():
    array = np.array([0, 1])
    stored = as_labels(array)
    array[0] = 9
    assert stored.tolist() == [0, 1]
    assert not as_labels(torch.ones(2, requires_grad=True)).requires_grad


def test_strings_become_a_numpy_array():
    stored = as_labels(["b", "a"])
    assert isinstance(stored, np.ndarray)
    assert stored.tolist() == ["b", "a"]
