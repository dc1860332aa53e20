"""What repair refuses, and with which sentence."""

import math

import pytest
import torch
from torch import nn

from repgraph.demo import digits
from repgraph.demo.network import DigitsResNet
from repgraph.prune import drop_layers, repair

X = digits("train")[0][:64]


def network(blocks):
    torch.manual_seed(0)
    return DigitsResNet(blocks).eval()


def mend(model, pruned, data, **options):
    return repair(model, pruned, data, progress=False, **options)


@pytest.mark.parametrize("ridge", [-1e-3, math.nan])
def test_penalties_below_0_are_refused(ridge):
    model = network((1, 2, 1))
    with pytest.raises(ValueError, match="ridge must be a finite number of at least 0"):
        mend(model, drop_layers(model, ["layer2.1"], X[:1]), X, ridge=ridge)


def test_nothing_dropped_is_refused():
    model = network((1, 2, 1))
    with pytest.raises(ValueError, match="pruned must have lost layers"):
        mend(model, drop_layers(model, [], X[:1]), X)


def test_another_model_is_refused():
    model = network((1, 2, 1))
    pruned = drop_layers(model, ["layer2.1"], X[:1])
    torch.manual_seed(0)
    others = [network((1, 3, 1)), network((2, 2, 1)), nn.Sequential(nn.Conv2d(1, 4, 3)).eval()]
    wide = network((1, 2, 1))
    wide.linear = nn.Linear(32, 7)
    for other in (*others, wide):
        with pytest.raises(ValueError, match=r"pruned|names"):
            mend(other, pruned, X)


def test_nan_is_refused_with_the_layer():
    model = network((1, 2, 1))
    bad = X.clone()
    bad[40] = math.nan
    with pytest.raises(ValueError, match=r"layer 'layer2.1' gives NaN or infinite values"):
        mend(model, drop_layers(model, ["layer2.1"], X[:1]), bad)
