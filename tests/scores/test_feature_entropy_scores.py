"""Feature entropy as a score: by hand, against the metric's own table, and streamed over labelled data."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repgraph import capture
from repgraph.metrics.feature_entropy import feature_birth, feature_entropy, unit_feature_entropy
from repgraph.scores.feature_entropy import birth_consistency, feature_entropy_scores

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:class .* has .* samples"),
    pytest.mark.filterwarnings("ignore:negative values"),
]

seeds = st.integers(0, 2**32 - 1)
LN5, LN10 = math.log(5), math.log(10)


# Births


@pytest.mark.parametrize(
    ("births", "score"),
    [
        ([3, 3, 5, 5, 0], LN5 - math.log(2)),
        ([4] * 10, LN10),
        (range(1, 11), 0),
        ([0] * 10, 0),
        ([3, 3, 3, 7], math.log(4) - 0.5623351),
        ([7] + [0] * 99, 0.01 * math.log(100)),
    ],
)
def test_by_hand(births, score):
    births = torch.tensor(list(births))[:, None]
    assert birth_consistency(births, ["a"] * len(births)).item() == pytest.approx(score, abs=1e-7)
    twice = birth_consistency(torch.cat([births, births + 3 * (births > 0)]), [0] * len(births) + [1] * len(births))
    assert twice.item() == pytest.approx(score, abs=1e-7)


def test_classes_are_not_mixed():
    births = torch.tensor([[3, 1], [3, 2]] * 10 + [[8, 1], [8, 2]] * 10)
    sorted_by_class, mixed = [0] * 20 + [1] * 20, [0, 1] * 20
    assert birth_consistency(births, sorted_by_class).tolist() == pytest.approx([math.log(20), math.log(10)])
    assert birth_consistency(births, mixed).tolist() == pytest.approx([math.log(10), math.log(20)])


def test_units_without_births_rank_last():
    rng = np.random.default_rng(0)
    steady, scattered = 4 + (rng.random(100) < 0.1), rng.integers(1, 60, 100)
    born = rng.random(100) < 0.05
    births = torch.from_numpy(np.stack([0 * steady, scattered, steady, 4 * born], 1))
    assert birth_consistency(births, [0] * 100).argsort().tolist() == [0, 3, 1, 2]


@given(seeds, st.integers(1, 3), st.integers(1, 5))
def test_the_order_is_that_of_the_mean_entropy(seed, classes, c):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), rng.integers(2, 30, classes))
    births = torch.from_numpy(rng.integers(0, 9, (len(labels), c)))
    found = birth_consistency(births, labels)
    entropy = torch.stack([feature_entropy(births[torch.from_numpy(labels == k)]).entropy for k in range(classes)])
    ceiling = np.log(np.bincount(labels)).mean()
    assert torch.allclose(found, ceiling - entropy.mean(0))
    assert (found >= -1e-12).all()
    assert (found <= ceiling + 1e-12).all()
    order, units = rng.permutation(len(labels)), rng.permutation(c)
    again = birth_consistency(births[order][:, units], labels[order])
    assert torch.allclose(again, found[units])


# Over a network


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten())
    model[1].bias.data = torch.tensor([0.5, -9, 0, 0, 1, 0])  # the second filter is dead
    return model.train()


def images_and_labels():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(60, 1, 9, 9, generator=generator), torch.arange(60) // 7 % 3


@pytest.mark.parametrize("limits", [{}, {"preset": "zhao2022"}, {"max_rank": 9, "density": 0.5}])
def test_scores_agree_with_the_table(limits):
    model, data = network(), images_and_labels()
    found = feature_entropy_scores(model, data, batch_size=7, progress=False, **limits)
    assert model.training
    maps = capture(model, data, ["2", "3"], progress=False)
    units = unit_feature_entropy(maps, progress=False, **limits).units
    assert list(found) == ["0", "3"]
    for name, scores in found.items():
        entropy = units.loc[{"0": "2", "3": "3"}[name]].groupby("unit")["entropy"].mean().to_numpy()
        assert scores.dtype == torch.float64
        assert scores.numpy() == pytest.approx(np.log([21, 21, 18]).mean() - entropy, abs=1e-12)
    assert found["0"][1] == 0 == found["0"].min()


def test_labels_stay_with_their_images():
    model, (images, labels) = network(), images_and_labels()
    expected = feature_entropy_scores(model, (images, labels), ["0"], progress=False)["0"]
    names = [f"class {k}" for k in labels]
    dataset = TensorDataset(images, labels)

    def scores(data, **options):
        return feature_entropy_scores(model, data, ["0"], progress=False, **options)["0"]

    assert torch.equal(scores(images, labels=labels), expected)
    assert torch.equal(scores((images, torch.zeros(60)), labels=names), expected)
    assert torch.equal(scores(dataset, batch_size=11), expected)
    assert torch.equal(scores(iter(DataLoader(dataset, 9))), expected)
    before = torch.get_rng_state()
    assert torch.allclose(scores(DataLoader(dataset, 9, shuffle=True)), expected)
    assert torch.equal(torch.get_rng_state(), before)
    some = torch.arange(0, 60, 2)
    births = feature_birth(model.eval()[:3](images[some]).detach())
    for data, own in ((images, labels), (images, labels[some]), (dataset, None)):
        assert torch.equal(scores(data, labels=own, samples=some), birth_consistency(births, labels[some]))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.randn(60, 1, 9, 9), {}, "labels are missing"),
        (torch.randn(60, 1, 9, 9), {"labels": [0, 1]}, "labels must have one entry per sample: expected 60, got 2"),
        ((torch.randn(60, 1, 9, 9), torch.arange(60).clamp_max(30)), {}, "class 0 must have at least 2 samples, got 1"),
        ((torch.randn(60, 1, 9, 9), torch.rand(60)), {}, "labels must be integers, bools or strings"),
        ((torch.randn(60, 1, 9, 8), torch.zeros(60).long()), {}, r"maps must be square.* got shape \(60, 6, 7, 6\)"),
        ((torch.randn(60, 1, 7, 7), torch.zeros(60).long()), {}, r"at least 4 x 4.* got shape \(60, 5, 3, 3\)"),
        ((torch.randn(60, 1, 9, 9), torch.zeros(60).long()), {"density": 2}, "density must be in"),
    ],
)
def test_refusals(data, options, message):
    with pytest.raises(ValueError, match=message):
        feature_entropy_scores(network(), data, progress=False, **options)


def test_refuses_layers_without_maps():
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"maps must be square, \(n, C, m, m\).* got \(60, 4\)"):
        feature_entropy_scores(model, images_and_labels(), ["1"], progress=False)


@pytest.mark.filterwarnings("default")
def test_warns_of_small_classes():
    with pytest.warns(UserWarning, match="class 'b' has 19 samples, fewer than 20"):
        birth_consistency(torch.ones(40, 1, dtype=torch.int64), ["a"] * 21 + ["b"] * 19)
