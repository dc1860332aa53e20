"""Random scores: permutations that depend on seed and name alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repgraph.demo import digits_resnet
from repgraph.scores.random_scores import random_scores

pytestmark = pytest.mark.usefixtures("one_thread")


@given(st.integers(0, 2**40))
def test_permutations_that_repeat(seed):
    model = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ConvTranspose2d(7, 12, 3, groups=1), nn.Linear(2, 5))
    found = random_scores(model, ["0", "1", "2"], seed=seed)
    for scores, count in zip(found.values(), (7, 12, 5), strict=True):
        assert (scores.sort().values.tolist(), scores.dtype) == (list(range(count)), torch.float64)
    again = random_scores(model, ["2", "1", "0"], seed=seed)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_other_layers_of_the_choice_do_not_matter():
    model = digits_resnet()
    whole, part = random_scores(model, seed=3), random_scores(model, ["layer3.*.conv2", "conv1"], seed=3)
    assert len(part) == 5
    assert all(torch.equal(whole[name], part[name]) for name in part)


def test_seeds_and_layers_differ():
    model = digits_resnet()
    first, second = random_scores(model), random_scores(model, seed=1)
    wide = [name for name in first if len(first[name]) == 32]
    assert all(not torch.equal(first[name], second[name]) for name in wide)
    assert len({tuple(first[name].tolist()) for name in wide}) == len(wide)
    ranks = np.stack([random_scores(model, "layer3.0.conv1", seed=seed)["layer3.0.conv1"] for seed in range(400)])
    assert abs(ranks.mean(0) - 15.5).max() < 2.3  # five standard errors


def test_random_state_is_neither_read_nor_changed():
    model = digits_resnet()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = random_scores(model, "conv1")["conv1"]
    now = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], now[0])
    assert before[1:] == now[1:]
    torch.manual_seed(1)
    assert torch.equal(first, random_scores(model, "conv1")["conv1"])


def test_refusals():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        random_scores(digits_resnet(), seed=-1)
    with pytest.raises(ValueError, match="layer 'bn1' must be a convolution or a linear layer"):
        random_scores(digits_resnet(), "bn1")
