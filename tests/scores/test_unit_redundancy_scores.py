"""Scores by redundant borders: every prefix is what redundant_units drops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repgraph.demo import digits, digits_resnet
from repgraph.metrics.spline import redundant_units, unit_redundancy
from repgraph.scores.unit_redundancy import unit_redundancy_scores

pytestmark = pytest.mark.usefixtures("one_thread")

seeds = st.integers(0, 2**32 - 1)


def linear(w, b=None):
    module = nn.Linear(w.shape[1], len(w), bias=b is not None).double()
    module.weight.data = w.double()
    if b is not None:
        module.bias.data = b.double()
    return module


def scores_of(module):
    return unit_redundancy_scores(nn.Sequential(module), torch.ones(1, module.in_features).double(), "0")["0"]


def prefixes(scores, d, norms):
    """Whether for every number of filters the lowest scores are those that go, in this order."""
    order, c = scores.argsort().tolist(), len(scores)
    return all(order[:q] == redundant_units(d, q / c, norms) for q in range(c))


def test_by_hand():
    """0 and 1 draw one border, and 0 is smaller; then 2 is 0.2 from 1, and smaller; 3 is the dead one."""
    found = scores_of(linear(torch.tensor([[1.0, 0], [10, 0], [0.8, 0.6], [0, 0], [0, 5]], dtype=torch.float64)))
    assert found.argsort().tolist() == [3, 0, 2, 4, 1]
    assert found.tolist() == pytest.approx([0, 1, 0.2, -1, 1], abs=1e-10)
    assert found.dtype == torch.float64


@given(seeds, st.integers(1, 9), st.booleans(), st.booleans())
def test_every_prefix_is_what_redundant_units_drops(seed, c, ties, dead):
    generator = torch.Generator().manual_seed(seed)
    w, b = torch.randn(c, 3, generator=generator), torch.randn(c, generator=generator)
    if ties:
        w, b = w.round(), b.round()
    if dead:
        w[torch.rand(c, generator=generator) < 0.4] = 0
    module = linear(w, b)
    found = scores_of(module)
    assert prefixes(found, unit_redundancy(module), w.double().norm(dim=1))
    assert len(found.unique()) == c
    assert ((found < -0.5) == (w == 0).all(1)).all()


def test_batch_norm_is_folded_and_convolutions_of_the_demo_network_agree():
    model, x = digits_resnet(), digits()[0][:2]
    found = unit_redundancy_scores(model, x)
    assert len(found) == 31
    for name, conv, bn in [
        ("conv1", model.conv1, model.bn1),
        ("layer3.2.conv1", model.layer3[2].conv1, model.layer3[2].bn1),
        ("layer3.0.shortcut", model.layer3[0].shortcut, None),
    ]:
        scale = 1 if bn is None else bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
        norms = (conv.weight.detach().double().flatten(1).T * scale).norm(dim=0)
        assert prefixes(found[name], unit_redundancy(conv, bn=bn), norms)


def test_a_filter_that_batch_norm_kills_is_dead():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[1].weight.data = torch.tensor([1.0, 0, 2, 1])
    found = unit_redundancy_scores(model, torch.zeros(1, 2, 5, 5))["0"]
    assert (found < -0.5).tolist() == [False, True, False, False]


def test_multiples_of_another_filter_go_first_whatever_their_norm():
    torch.manual_seed(0)
    w = torch.randn(6, 4)
    w[4] = -100 * w[1]
    assert scores_of(linear(w)).argmin() == 1  # the smaller of the two
    w[4] = 0.01 * w[1]
    assert scores_of(linear(w)).argmin() == 4


def test_transposed_layers_and_norms_without_statistics():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ConvTranspose2d(3, 2, 3))
    x = torch.zeros(1, 1, 5, 5)
    assert list(unit_redundancy_scores(model, x)) == ["0"]
    with pytest.raises(ValueError, match="layer '1': module must be a Linear or Conv layer, got ConvTranspose2d"):
        unit_redundancy_scores(model, x, ["0", "1"])
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU())
    with pytest.raises(ValueError, match="layer '0': bn must be a BatchNorm layer with running statistics"):
        unit_redundancy_scores(model, x)
