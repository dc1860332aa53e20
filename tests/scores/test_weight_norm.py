"""Norms of filters by hand, against the weights that autograd says make a channel, and against Torch-Pruning."""

import math

import pytest
import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repgraph.demo import digits_resnet
from repgraph.scores.weight_norm import weight_norm_scores

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [
    (nn.Linear(3, 4), (1, 3)),
    (nn.Conv1d(4, 6, 3, groups=2), (1, 4, 5)),
    (nn.Conv2d(3, 4, (1, 2)), (1, 3, 4, 4)),
    (nn.Conv3d(2, 4, 2, groups=2, bias=False), (1, 2, 3, 3, 3)),
    (nn.ConvTranspose1d(4, 6, 3), (1, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 2, groups=2), (1, 4, 3, 3)),
    (nn.ConvTranspose3d(2, 4, 2, groups=2), (1, 2, 2, 2, 2)),
]


def scores_of(module, **options):
    return weight_norm_scores(nn.Sequential(module), "0", **options)["0"]


def test_by_hand():
    conv = nn.Conv2d(1, 3, (1, 2))
    conv.weight.data = torch.tensor([[3.0, -4], [0, 0], [1, 1]]).view(3, 1, 1, 2)
    conv.bias.data = torch.full((3,), 100.0)  # does not count
    assert scores_of(conv).tolist() == [7, 0, 2]
    assert scores_of(conv, p=2).tolist() == pytest.approx([5, 0, math.sqrt(2)])
    assert scores_of(conv, p=math.inf).tolist() == [4, 0, 1]


@pytest.mark.parametrize(("module", "shape"), KINDS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_the_weights_of_a_filter_are_those_that_its_channel_depends_on(module, shape, p):
    out = module(torch.ones(shape))
    expected = []
    for channel in range(out.shape[1]):
        (slope,) = torch.autograd.grad(out[:, channel].sum(), module.weight, retain_graph=True)
        expected.append(float((module.weight.detach()[slope != 0].double().abs() ** p).sum() ** (1 / p)))
    found = scores_of(module, p=p)
    assert found.tolist() == pytest.approx(expected)
    assert (found.dtype, found.requires_grad) == (torch.float64, False)


@pytest.mark.parametrize("p", [1, 2])
def test_parity_with_torch_pruning(p):
    """The first layer of each group alone, neither normalised nor rooted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.ReLU(), nn.Flatten()
    )
    model += nn.Sequential(nn.Linear(6 * 8 * 8, 5), nn.ReLU(), nn.Linear(5, 2))
    example = torch.zeros(1, 3, 8, 8)
    found = weight_norm_scores(model, ["0", "3", "6"], p=p)
    graph = tp.DependencyGraph().build_dependency(model, example)
    importance = tp.importance.MagnitudeImportance(p=p, group_reduction="first", normalizer=None)
    for name, scores in found.items():
        layer = model.get_submodule(name)
        prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
        theirs = importance(graph.get_pruning_group(layer, prune, list(range(len(scores)))))
        torch.testing.assert_close(scores, theirs.double() ** (1 / p), rtol=1e-5, atol=0)


@given(st.integers(0, 2**32 - 1), st.floats(-4, 4), st.sampled_from([0.5, 1, 2, math.inf]))
def test_scale_and_order_of_filters(seed, factor, p):
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv1d(3, 5, 2).double()
    conv.weight.data = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)
    before = scores_of(conv, p=p)
    order = torch.randperm(5, generator=generator)
    conv.weight.data = factor * conv.weight.data[order]
    torch.testing.assert_close(scores_of(conv, p=p), abs(factor) * before[order])


def test_which_layers_by_default():
    model = digits_resnet()
    found = weight_norm_scores(model)
    assert list(found) == [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(weight_norm_scores(nn.DataParallel(model), ["linear", "layer1.*.conv1"]))[-1] == "linear"
    assert len(found["layer3.0.conv1"]) == 32


def test_refusals():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="no convolution: name the layers"):
        weight_norm_scores(model)
    with pytest.raises(ValueError, match="layer '1' must be a convolution or a linear layer, got ReLU"):
        weight_norm_scores(model, ["0", "1"])
    with pytest.raises(ValueError, match="'7' matches no layer"):
        weight_norm_scores(model, "7")
    for p in (0, -1, math.nan):
        with pytest.raises(ValueError, match="p must be positive"):
            weight_norm_scores(model, "0", p=p)
    model[0].weight.data[1, 0] = math.nan
    with pytest.raises(ValueError, match="layer '0' must have finite scores, got NaN or infinite values in 1"):
        weight_norm_scores(model, "0")
