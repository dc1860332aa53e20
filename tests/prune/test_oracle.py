"""The oracles against models whose blocks are replaced by hand, and against brute loops."""

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from small_networks import Through
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from repgraph.demo import digits, digits_resnet
from repgraph.demo.network import DigitsResNet
from repgraph.metrics.similarity import linear_cka
from repgraph.prune import drop_and_evaluate, drop_greedily, drop_layers, plan_layers, result_change

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = digits()
X, Y = X[:150], Y[:150]
NAMES = ["layer1.1", "layer2.1", "layer2.2", "layer3.2"]


def loss(model):
    with torch.no_grad():
        return F.cross_entropy(model(X), Y)


def without(model, *names):
    model = deepcopy(model)
    for name in names:
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, nn.Identity())
    return model


def oracle(model, names=NAMES, evaluate=loss, example=X[:2]):
    return drop_and_evaluate(model, names, evaluate, example, progress=False)


def greedily(model, names, evaluate, count, example=X[:2]):
    return drop_greedily(model, names, evaluate, count, example, progress=False)


def network():
    torch.manual_seed(0)
    return DigitsResNet((2, 3, 3)).eval()


# One layer at a time


def test_against_identities_by_hand():
    model = digits_resnet()
    found, whole = oracle(model), float(loss(model))
    expected = [float(loss(without(model, name))) - whole for name in NAMES]
    assert list(found.index) == NAMES
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.attrs == {"whole": whole}
    assert (found.name, found.index.name, found.dtype) == ("drop_and_evaluate", "layer", np.float64)
    assert plan_layers(found, 1).layers == (NAMES[int(np.argmin(expected))],)
    assert plan_layers(found, 1).by == "drop_and_evaluate"


def test_how_often_and_on_what_evaluate_is_called():
    model, seen = network(), []

    def evaluate(net):
        assert not any(module.training for module in net.modules())
        seen.append(net)
        return float(len(seen))

    assert oracle(model, evaluate=evaluate).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert seen[0] is model
    assert len({id(net) for net in seen}) == 5
    assert len(oracle(model, [])) == 0


def test_a_model_that_is_better_without():
    noisy = nn.Sequential(nn.Linear(4, 4), Through(lambda x: x + 3), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        for layer in (noisy[0], noisy[2]):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    x = torch.randn(5, 4)
    found = oracle(noisy, ["0", "1"], lambda net: float((net(x) - x).square().mean().detach()), x)
    assert found.to_dict() == pytest.approx({"0": 0, "1": -9}, abs=1e-5)
    assert found.attrs["whole"] == pytest.approx(9)


def test_a_smaller_model_can_be_judged_in_turn():
    """What drop_layers made of a model in eval mode is in eval mode as a whole, stand-ins too."""
    torch.manual_seed(0)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Half(), Half()

        def forward(self, x):
            x = x + self.a(x)
            return x + self.b(x)

    model, x = nn.Sequential(Block(), Block(), Block()).eval(), torch.randn(6, 4)
    smaller = drop_layers(model, ["1.a"], x).model
    assert not any(module.training for module in smaller.modules())
    found = oracle(smaller, ["0.a", "1.b"], lambda net: float(net(x).square().mean().detach()), x)
    assert found.attrs["whole"] == pytest.approx(float(smaller(x).square().mean()))


def test_model_is_untouched():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    oracle(model, NAMES[:2])
    greedily(model, NAMES[:2], loss, 1)
    result_change(model.train(), X, NAMES[:2], samples=50, progress=False)
    assert all(module.training for module in model.modules())
    assert names == [name for name, _ in model.named_modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_wrapped_model():
    found = oracle(nn.DataParallel(network()).eval(), NAMES[:2])
    pd.testing.assert_series_equal(found, oracle(network(), NAMES[:2]))


@pytest.mark.parametrize("call", [oracle, lambda model: greedily(model, NAMES, loss, 1)])
def test_train_mode_is_refused(call):
    with pytest.raises(ValueError, match=r"model is in training mode \(as a whole\).*call model.eval\(\) first"):
        call(network().train())
    model = network()
    model.layer1[1].bn1.train()
    with pytest.raises(ValueError, match=r"in training mode \(layer1.1.bn1\)"):
        call(model)


@pytest.mark.parametrize("bad", [float("nan"), torch.tensor(float("-inf"))])
def test_a_loss_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=r"evaluate must give a finite loss, got .* for the whole model"):
        oracle(network(), evaluate=lambda net: bad)
    model = network()
    only = lambda net: 1.0 if net is model or len(net.layer2) == 3 else bad  # noqa: E731
    with pytest.raises(ValueError, match=r"evaluate must give a finite loss, got .* for the model without 'layer2.1'"):
        oracle(model, evaluate=only)
    with pytest.raises(ValueError, match=r"for the model without \['layer2.1'\]"):
        greedily(model, NAMES, only, 1)


def test_names_that_cannot_go_are_refused():
    with pytest.raises(ValueError, match=r"'layer2.0' cannot be left out"):
        oracle(network(), ["layer1.1", "layer2.0"])
    with pytest.raises(ValueError, match="no module 'layer7'"):
        oracle(network(), ["layer7"])


# Greedily


def brute(model, names, count):
    whole, gone, scores = float(loss(model)), [], {}
    for _ in range(count):
        losses = {name: float(loss(without(model, *gone, name))) for name in names if name not in gone}
        scores |= {name: value - whole for name, value in losses.items()}
        gone.append(min(losses, key=losses.get))
    return gone, scores, whole


@pytest.mark.parametrize("count", [1, 2])
def test_greedy_against_a_brute_loop(count):
    model, names = network(), ["layer1.0", "layer2.1", "layer3.2"]
    plan = greedily(model, names, loss, count)
    gone, scores, whole = brute(model, names, count)
    assert plan.settings["order"] == gone
    assert plan.layers == tuple(name for name in names if name in gone)
    assert plan.scores == pytest.approx(scores, abs=1e-6)
    assert plan.settings["whole"] == pytest.approx(whole)
    assert plan.by == "drop_and_evaluate, greedily"
    dropped = drop_layers(model, plan, X[:2]).model
    assert float(loss(dropped)) - whole == pytest.approx(scores[gone[-1]], abs=1e-5)


def test_of_equal_losses_the_later_layer_goes():
    plan = greedily(network(), NAMES[1:], lambda net: 1.0, 2)
    assert plan.settings["order"] == ["layer3.2", "layer2.2"]
    assert plan.scores == dict.fromkeys(NAMES[1:], 0.0)


def test_greedy_sees_what_one_shot_does_not():
    """Two layers that undo each other: either alone costs much, both cost nothing."""
    model = nn.Sequential(Through(lambda x: x + 5), Through(lambda x: x - 5), Through(lambda x: x + 1)).eval()
    model.append(nn.Linear(3, 3))
    x = torch.randn(4, 3)
    target = model(x).detach()
    plan = greedily(model.eval(), ["0", "1", "2"], lambda net: float((net(x) - target).square().mean().detach()), 3, x)
    assert plan.settings["order"][0] == "2"
    assert set(plan.settings["order"][1:]) == {"0", "1"}
    assert plan.scores["2"] < min(plan.scores["0"], plan.scores["1"]) + 1e-6


@pytest.mark.parametrize("count", [0, 5, -1, 1.5])
def test_counts_out_of_range_are_refused(count):
    with pytest.raises(ValueError, match="count must be"):
        greedily(network(), NAMES, lambda net: 1.0, count)


def test_a_layer_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"twice|names|count"):
        greedily(network(), ["layer1.1", "layer1.1"], lambda net: 1.0, 2)


def test_one_name_in_place_of_a_list_is_read_as_one():
    assert oracle(network(), ("layer1.1",)).index.tolist() == ["layer1.1"]
    assert oracle(network(), "layer1.1").index.tolist() == ["layer1.1"]


# Change of the result


def entering(model, name, x):
    kept = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept[0]


def test_result_change_by_hand():
    model = network()
    found = result_change(model, (X, Y), NAMES, samples=60, progress=False)
    whole = entering(model, "linear", X[:60])
    for name in NAMES:
        changed = entering(without(model, name), "linear", X[:60])
        assert found[name] == pytest.approx(1 - linear_cka(whole, changed, unbiased=True), abs=1e-6)
    assert (list(found.index), found.name, found.index.name) == (NAMES, "result_change", "layer")


@pytest.mark.parametrize(
    ("at", "name"), [("layer2.2", "layer2.2"), ("inputs:layer2.2", "layer2.2"), ("layer3", "layer3")]
)
def test_result_change_elsewhere_and_at_a_layer_that_moves_up(at, name):
    model = network()
    found = result_change(model, X, ["layer2.1"], at=at, samples=60, progress=False)
    ends = []
    for net in (model, without(model, "layer2.1")):
        kept = []
        keep = (lambda _, args: kept.append(args[0])) if at.startswith("inputs:") else None  # noqa: B023
        module = net.get_submodule(name)
        if keep:
            module.register_forward_pre_hook(keep)
        else:
            module.register_forward_hook(lambda _, __, output: kept.append(output))  # noqa: B023
        with torch.no_grad():
            net(X[:60])
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        ends.append(kept[0])
    assert found["layer2.1"] == pytest.approx(1 - linear_cka(*ends, unbiased=True), abs=1e-6)


def test_result_change_of_what_comes_behind_and_of_nothing():
    model = network()
    assert result_change(model, X, ["layer3.1"], at="layer2.2", samples=60, progress=False)[
        "layer3.1"
    ] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        model.layer3[2].bn2.weight.zero_()
        model.layer3[2].bn2.bias.zero_()  # relu(0 + x), x >= 0
    assert result_change(model, X, ["layer3.2"], samples=60, progress=False)["layer3.2"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["loader", "list", "generator", "iterator"])
def test_result_change_of_batches(kind):
    loader = DataLoader(TensorDataset(X[:60], Y[:60]), 20)
    data = {
        "loader": loader,
        "list": list(loader),
        "generator": (batch for batch in loader),
        "iterator": iter(list(loader)),
    }[kind]
    found = result_change(network(), data, NAMES[:1], samples=50, progress=False)
    expected = result_change(network(), X[:50], NAMES[:1], progress=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_result_change_refusals():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    with pytest.raises(ValueError, match="at must name the layer before the classifier: no linear layer runs"):
        result_change(model, X, ["1"], progress=False)
    with pytest.raises(ValueError, match="'layer9' matches no layer"):
        result_change(network(), X, NAMES, at="layer9", progress=False)
    with pytest.raises(ValueError, match=r"'layer2.0' cannot be left out"):
        result_change(network(), X, ["layer2.0"], samples=20, progress=False)
