"""Class separation against the plain double loop, by hand and as theorems."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch._subclasses import FakeTensorMode

from repgraph import class_separation
from repgraph.metrics.class_separation import _distances

seeds = st.integers(0, 2**32 - 1)
ROWS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-5 / 13, 12 / 13]], dtype=torch.float64)


def samples(seed, n=24, d=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    labels = torch.cat((torch.arange(classes), torch.randint(classes, (n - classes,), generator=generator)))
    return x, labels, generator


def by_pairs(x, labels):
    """The definition: means over all n_a n_b ordered pairs of each two classes."""
    x, labels = x.flatten(1).double().numpy(), np.asarray(labels)
    distance = cdist(x, x, "cosine")
    classes = np.unique(labels)
    between = np.array([[distance[labels == a][:, labels == b].mean() for b in classes] for a in classes])
    return 1 - between.diagonal().mean() / between.mean()


def test_by_hand():
    assert class_separation(ROWS, [0, 0, 1, 1]) == pytest.approx(0.731601732, abs=1e-9)
    assert class_separation(ROWS.float(), [0, 0, 1, 1]) == pytest.approx(0.731601732, abs=1e-7)


@given(seeds, st.integers(1, 8), st.integers(1, 5))
def test_parity_with_all_pairs(seed, d, classes):
    x, labels, _ = samples(seed, d=d + 1, classes=classes)
    assert class_separation(x, labels) == pytest.approx(by_pairs(x, labels), abs=1e-12)


@pytest.mark.parametrize("d", [1023, 1024, 1025, 2100])
def test_features_in_chunks(d):
    x, labels, _ = samples(0, d=d)
    assert class_separation(x + 1, labels) == pytest.approx(by_pairs(x + 1, labels), abs=1e-12)
    assert class_separation((x + 1).reshape(24, d, 1, 1), labels) == class_separation(x + 1, labels)


@given(seeds)
def test_invariances(seed):
    x, labels, generator = samples(seed)
    order = torch.randperm(24, generator=generator)
    orthogonal = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    scale = torch.rand(24, 1, generator=generator, dtype=torch.float64) + 0.1
    names = ["z", "a", "m"]
    expected = pytest.approx(class_separation(x, labels), abs=1e-12)
    assert class_separation(x[order], labels[order]) == expected
    assert class_separation(x, [names[c] for c in labels]) == expected
    assert class_separation(x @ orthogonal, labels) == expected
    assert class_separation(1e-3 * x, labels) == expected
    assert class_separation(scale * x, labels) == expected
    assert class_separation(torch.cat((x, x)), torch.cat((labels, labels))) == expected


def test_translation_changes_it():
    assert class_separation(ROWS + 10, [0, 0, 1, 1]) != pytest.approx(0.731601732, abs=1e-2)


@given(seeds, st.integers(2, 5))
def test_one_direction_per_class_gives_1_and_is_the_maximum(seed, classes):
    x, labels, _ = samples(seed, classes=classes)
    assert class_separation(x[:classes][labels], labels) == pytest.approx(1, abs=1e-12)
    assert class_separation(x, labels) <= 1


@given(seeds)
def test_one_class_gives_0(seed):
    x, _, _ = samples(seed)
    assert class_separation(x, torch.zeros(24, dtype=torch.long)) == pytest.approx(0, abs=1e-12)


def test_samples_of_one_direction_give_nan():
    assert math.isnan(class_separation(torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.1, 0.2]]), [0, 1, 1]))


def test_a_zero_row_is_at_distance_1_from_everybody_and_itself():
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    within = ((0 + 1 + 1 + 1) / 4 + 0) / 2
    total = 1 - (0.25 / 4 + 1 / 4)
    assert class_separation(x, [0, 0, 1, 1]) == pytest.approx(1 - within / total, abs=1e-12)
    assert class_separation(torch.zeros(4, 2), [0, 0, 1, 1]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_types(dtype):
    x = (4 * samples(0)[0]).round().to(dtype)
    labels = samples(0)[1]
    assert class_separation(x, labels) == pytest.approx(by_pairs(x, labels), abs=1e-12)


def test_x_is_not_modified():
    x, labels, _ = samples(0)
    before = x.clone()
    assert isinstance(class_separation(x.requires_grad_(), labels), float)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (torch.ones(4), [0, 0, 1, 1], r"x must have shape .* got \(4,\)"),
        (torch.ones(0, 3), [], "x must have shape"),
        (torch.tensor([[1.0], [float("nan")]]), [0, 1], "x must be finite.* in 1 of 2 samples"),
        (ROWS, [0, 1], "labels must have one entry per sample: expected 4, got 2"),
        (ROWS, torch.ones(4), "labels must be integers, bools or strings"),
        (ROWS, torch.ones(4, 2), "labels must be one class per sample"),
    ],
)
def test_bad_input(x, labels, message):
    with pytest.raises(ValueError, match=message):
        class_separation(x, labels)


@pytest.mark.parametrize("d", [5, 1030])
def test_kernel_stays_on_cuda(d):
    with FakeTensorMode():
        x = torch.empty(20, d, device="cuda")
        distances = _distances(x, torch.zeros(20, dtype=torch.int64, device="cuda"), 3)
        assert (distances.device.type, distances.shape) == ("cuda", (2,))
