"""Filters cut from networks of many kinds against filters set to zero by hand: without repgraph's own masks."""

import pytest
import torch
import torchvision
from architectures import filter_scores, image, lively
from filter_architectures import CASES, examine_filters, vit

from repgraph.prune import predict_cost, prunable_filters, prune_filters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CASES)
def test_cut_equals_zeros_by_hand(name):
    _, _, cut, total = CASES[name]
    row = examine_filters(name)
    assert (row.layers, row.total) == (cut, total)
    assert row.from_zeros < 1e-12
    assert row.from_whole > 1e-4
    assert row.foretold
    assert (row.macs < 0.9) == (cut > 0)


@pytest.mark.parametrize(
    "name",
    ["DenseNet", "ResNet-20, padded by lambdas", "flattened", "vision transformer", "autoencoder", "BERT", "Llama"],
)
def test_cost_is_foretold(name):
    make, example, *_ = CASES[name]
    torch.manual_seed(0)
    model, x = lively(make()), example()
    pruned = prune_filters(model, x, filter_scores(model), 0.3)
    assert predict_cost(model, pruned.plan, x) == pruned.after


def test_readers_that_run_in_training_only_are_cut_too():
    torch.manual_seed(0)
    model = torchvision.models.googlenet(weights=None, num_classes=4, init_weights=False, aux_logits=True)
    x = image(64).expand(2, -1, -1, -1)
    pruned = prune_filters(model, x, filter_scores(model), 0.5)
    outputs = pruned.model.train()(x)
    assert [tuple(out.shape) for out in outputs] == [(2, 4)] * 3
    torch.stack([out.sum() for out in outputs]).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.model.parameters())


def test_what_stays_of_transformers_is_what_norms_mix():
    model = lively(vit())
    left = prunable_filters(model, image(16)).left
    assert {name for name, why in left.items() if "'encoder.ln' (LayerNorm) mixes them" in why} == {
        "conv_proj", "encoder.layers.encoder_layer_0.mlp.3", "encoder.layers.encoder_layer_1.mlp.3",
    }  # fmt: skip
    assert left["heads.head"] == "they are the model's output"
