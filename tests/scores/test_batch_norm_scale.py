"""Scales of batch norms behind their layers, against Torch-Pruning; layers that have none."""

import pytest
import torch
import torch_pruning as tp
from torch import nn

from repgraph.demo import digits_resnet
from repgraph.scores.batch_norm_scale import batch_norm_scale_scores

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.zeros(2, 3, 6, 6)


def chain():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)
    )
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
    return model


def test_by_hand():
    model = chain()
    found = batch_norm_scale_scores(model, X)
    assert list(found) == ["0", "3"]  # the last convolution has no norm
    for name, norm in (("0", model[1]), ("3", model[4])):
        assert found[name].tolist() == [abs(value) for value in norm.weight.tolist()]
        assert (found[name].dtype, found[name].requires_grad) == (torch.float64, False)
    assert list(batch_norm_scale_scores(model, X, "3")) == ["3"]


def test_parity_with_torch_pruning():
    model = chain()
    graph = tp.DependencyGraph().build_dependency(model, X)
    importance = tp.importance.BNScaleImportance(group_reduction="first", normalizer=None)
    group = graph.get_pruning_group(model[3], tp.prune_conv_out_channels, [0, 1, 2, 3, 4])
    importance.group_reduction = "mean"  # the norm is the only one of the group that counts
    torch.testing.assert_close(batch_norm_scale_scores(model, X)["3"], importance(group).double())


def test_weights_and_statistics_do_not_matter():
    model = chain()
    before = batch_norm_scale_scores(model, X)
    model[0].weight.data *= 3
    model[1].running_var += 5
    model[1].bias.data += 1
    after = batch_norm_scale_scores(model, X)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_linear_layers_by_name_and_a_residual_network():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    assert batch_norm_scale_scores(model, torch.zeros(2, 3), "0")["0"].tolist() == [1, 1, 1, 1]
    model, x = digits_resnet(), torch.zeros(2, 1, 8, 8)
    found = batch_norm_scale_scores(model, x)
    assert "layer2.0.shortcut" not in found
    assert torch.equal(found["layer2.1.conv2"], model.layer2[1].bn2.weight.detach().double().abs())
    assert len(found) == 29  # the stem and two convolutions in each of 14 blocks


def test_refusals():
    with pytest.raises(ValueError, match="layer '5' must have a batch norm with scale behind it, got none"):
        batch_norm_scale_scores(chain(), X, ["0", "5"])
    model = chain()
    model[1] = nn.BatchNorm2d(4, affine=False)
    assert list(batch_norm_scale_scores(model, X)) == ["3"]
    with pytest.raises(ValueError, match="layer '0' must have a batch norm with scale behind it, got 1"):
        batch_norm_scale_scores(model, X, "0")
    with pytest.raises(ValueError, match="no convolution of the model has a batch norm"):
        batch_norm_scale_scores(nn.Sequential(nn.Conv2d(3, 4, 3)), X)
    model[4].weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="layer '3' must have finite scores"):
        batch_norm_scale_scores(model, X)
