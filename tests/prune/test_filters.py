"""prune_filters, mask_filters, plans and their files: no trace, flags and modes, replay, together with layers."""

import hashlib
import random
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_pruning as tp
from architectures import apart, filter_scores, image, lively, zeroed
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from repgraph.cost import model_cost
from repgraph.demo import digits
from repgraph.demo.network import DigitsResNet
from repgraph.prune import (
    Plan,
    drop_layers,
    load_pruned,
    mask_filters,
    plan_filters,
    predict_cost,
    prunable_filters,
    prune_filters,
)

pytestmark = pytest.mark.usefixtures("one_thread")

X = digits()[0][:2]


def network(seed=0):
    torch.manual_seed(seed)
    return lively(DigitsResNet((3, 2, 2)))


SCORES = filter_scores(network())
INNER = Plan(filters={"layer1.0.conv1": (0, 3), "layer3.1.conv1": (5, 6, 30)})


class Pad(nn.Module):
    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, after // before, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if before == after else Pad()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def padded():
    """Two stages, the second behind a zero-padded shortcut."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return lively(nn.Sequential(*stem, Block(8, 8), Block(8, 16), Block(16, 16), *head))


def chain(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 36, 5),
    )  # fmt: skip


def bits(model):
    digest = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state(model):
    modes = [module.training for module in model.modules()]
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith("_hooks")]
    hooks = [(kind, list(getattr(module, kind))) for module in model.modules() for kind in kinds]
    flags = [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()]
    parts = [(name, type(module), id(module)) for name, module in model.named_modules()]
    return bits(model), modes, hooks, flags, parts, [id(b) for b in model.buffers()]


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


# no trace


CALLS = {
    "prune": lambda model, x: prune_filters(model, x, SCORES, 0.3),
    "prune by plan": lambda model, x: prune_filters(model, x, INNER),
    "mask": lambda model, x: mask_filters(model, x, INNER),
    "groups": prunable_filters,
    "plan": lambda model, x: plan_filters(model, x, SCORES, 0.3, of="macs", budget="global"),
    "predict": lambda model, x: predict_cost(model, INNER, x),
}
REFUSED = {
    "a layer that stays": (lambda model, x: prune_filters(model, x, Plan(filters={"linear": (0,)})), ValueError),
    "a part of a unit": (lambda model, x: prune_filters(model, x, Plan(filters={"conv1": (0,)})), ValueError),
    "no number": (lambda model, x: prune_filters(model, x, {"conv1": torch.full((8,), torch.nan)}, 0.5), ValueError),
    "another example": (lambda model, _: prune_filters(model, torch.zeros(1, 3, 8, 8), SCORES, 0.5), RuntimeError),
    "no example": (lambda model, _: prune_filters(model, None, SCORES, 0.5), TypeError),
}


def trained():
    """Mixed modes, a frozen parameter, hooks, a gradient."""
    model = network().train()
    model.layer1.eval()
    model.layer2[1].conv1.requires_grad_(False)
    model.layer1.register_forward_hook(lambda *_: None)
    model.conv1.register_forward_pre_hook(lambda *_: None)
    model.layer3.register_full_backward_hook(lambda *_: None)
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    return model


@pytest.mark.parametrize("call", CALLS)
def test_the_model_is_as_it_was(call):
    model, x = trained(), X.clone()
    before, numbers = state(model), random_states()
    CALLS[call](model, x)
    assert state(model) == before
    assert random_states() == numbers
    assert torch.equal(x, X)


@pytest.mark.parametrize("call", REFUSED)
def test_the_model_is_as_it_was_after_an_exception(call):
    model = trained()
    before, numbers = state(model), random_states()
    run, kind = REFUSED[call]
    with pytest.raises(kind):
        run(model, X)
    assert state(model) == before
    assert random_states() == numbers


def test_the_model_is_as_it_was_after_an_exception_in_its_forward():
    model = trained()
    model.layer2[1].bn1 = nn.BatchNorm2d(7)
    before = state(model)
    with pytest.raises((ValueError, RuntimeError)):
        prune_filters(model, X, SCORES, 0.3)
    assert state(model) == before


def test_the_copy_has_the_modes_flags_and_hooks():
    model = trained()
    pruned = prune_filters(model, X, SCORES, 0.3).model
    for (name, a), (other, b) in zip(model.named_modules(), pruned.named_modules(), strict=True):
        assert (name, a.training, len(a._forward_hooks)) == (other, b.training, len(b._forward_hooks))
    for (name, a), (other, b) in zip(model.named_parameters(), pruned.named_parameters(), strict=True):
        assert (name, a.requires_grad) == (other, b.requires_grad)
        assert a is not b
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in pruned.parameters()}


def test_the_copy_can_be_trained():
    model = prune_filters(network(), X, SCORES, 0.5).model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(digits()[0][:16]).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_padded_shortcut_can_be_trained_too():
    model = prune_filters(padded(), image(8), filter_scores(padded()), 0.5).model.train()
    model(image(8).repeat(4, 1, 1, 1)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    model = padded().to(dtype)
    pruned = prune_filters(model, image(8), filter_scores(model), 0.4)
    assert {t.dtype for t in pruned.model.state_dict().values() if t.is_floating_point()} == {dtype}
    assert pruned.model(image(8).to(dtype)).dtype == dtype
    assert apart(model, pruned, image(8))[0] < 1e-12


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode],
)
def test_inside_contexts_without_gradients(context):
    model = lively(chain())
    expected = prune_filters(model, image(8), filter_scores(model), 0.3)
    with context():
        pruned = prune_filters(model, image(8), filter_scores(model), 0.3)
    assert pruned.plan == expected.plan
    assert pruned.after == expected.after


def test_wrappers_are_looked_through():
    inner = lively(chain())
    expected = prune_filters(inner, image(8), filter_scores(inner), 0.3)
    for model in (nn.DataParallel(inner), torch.compile(inner)):
        pruned = prune_filters(model, image(8), filter_scores(inner), 0.3)
        assert pruned.plan == expected.plan
        assert bits(pruned.model) == bits(expected.model)
        assert predict_cost(model, pruned.plan, image(8)) == pruned.after


def test_batches_in_any_form():
    model, x = lively(chain()), image(8)
    expected = prune_filters(model, x, filter_scores(model), 0.3)
    for example in ((x, torch.zeros(1)), [x, x], x.numpy(), x.double()):
        pruned = prune_filters(model, example, filter_scores(model), 0.3)
        assert (pruned.plan, pruned.after.macs) == (expected.plan, expected.after.macs)


def test_options_do_not_leak_from_call_to_call():
    model = lively(chain())
    first = prune_filters(model, image(8), filter_scores(model), 0.5)
    prune_filters(model, image(8), filter_scores(model), 0.25, ignore=["0"], fold="max", min_keep=5)
    again = prune_filters(model, image(8), filter_scores(model), 0.5)
    assert again.plan == first.plan
    assert bits(again.model) == bits(first.model)


# nothing, everything, exactly what is named


@pytest.mark.parametrize("make", [padded, lambda: lively(chain())])
def test_cutting_nothing_changes_nothing(make):
    model = make()
    for pruned in (prune_filters(model, image(8), filter_scores(model), 0.0), prune_filters(model, image(8), Plan())):
        assert pruned.model is not model
        assert bits(pruned.model) == bits(model)
        assert str(pruned.model) == str(model)
        assert torch.equal(pruned.model(image(8)), model(image(8)))
        assert pruned.before == pruned.after == predict_cost(model, pruned.plan, image(8))
        assert (pruned.table()["change_percent"] == 0).all()


def test_named_filters_go_and_no_others():
    """A quarter in Torch-Pruning's manual_prune_width leaves a quarter; here numbers say what goes."""
    model = lively(chain())
    pruned = prune_filters(model, image(8), Plan(filters={"0": (7, 1), "3": (2,)}))
    kept, left = [0, 2, 3, 4, 5, 6], [0, 1, 3, 4, 5]
    columns = [36 * channel + place for channel in left for place in range(36)]
    expected = {
        "0.weight": model[0].weight[kept], "0.bias": model[0].bias[kept],
        "1.running_var": model[1].running_var[kept], "3.weight": model[3].weight[left][:, kept],
        "3.bias": model[3].bias[left], "6.weight": model[6].weight[:, columns], "6.bias": model[6].bias,
    }  # fmt: skip
    state = pruned.model.state_dict()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert pruned.plan.filters == {"0": (1, 7), "3": (2,)}
    assert pruned.plan.model == "Sequential"


def test_torch_pruning_cuts_the_same():
    """Where it is right: its own groups, cut at the same channels."""
    model = network()
    pruned = prune_filters(model, X, SCORES, 0.5)
    peer = network().requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(peer, X)
    done = set()
    for name, channels in pruned.plan.filters.items():
        if name not in done:
            group = graph.get_pruning_group(peer.get_submodule(name), tp.prune_conv_out_channels, list(channels))
            names = {module: other for other, module in peer.named_modules()}
            done |= {names[item.dep.target.module] for item in group if item.dep.handler == tp.prune_conv_out_channels}
            group.prune()
    assert bits(peer) == bits(pruned.model)
    macs, parameters = tp.utils.count_ops_and_params(peer, X[:1])
    assert pruned.after.parameters == parameters
    assert model_cost(pruned.model, X[:1]).macs < macs  # which counts norms and activations, too


def test_masked_model_keeps_all_shapes_and_equals_the_smaller_one():
    model = padded()
    plan = prune_filters(model, image(8), filter_scores(model), 0.5).plan
    masked = mask_filters(model, image(8), plan)
    assert [p.shape for p in masked.state_dict().values()] == [p.shape for p in model.state_dict().values()]
    assert bits(masked) == bits(zeroed(model, image(8), plan.filters))
    assert str(masked) == str(model)
    torch.testing.assert_close(masked(image(8)), prune_filters(model, image(8), plan).model(image(8)))


@pytest.mark.parametrize("name", ["unused", "frozen"])
def test_filters_of_layers_that_do_not_run_are_refused(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
            self.unused, self.head = nn.Conv2d(8, 8, 3), nn.Linear(6, 5)

        def forward(self, x):
            with torch.no_grad():
                x = self.frozen(x).relu()
            return self.head(self.last(x).mean((2, 3)))

    with pytest.raises(ValueError, match=name):
        prune_filters(Net(), image(8), Plan(filters={name: (0, 1)}))


# files and replay


def test_replay_on_an_equal_model_is_equal():
    pruned = prune_filters(padded(), image(8), filter_scores(padded()), 0.5, budget="global")
    plan = Plan.from_json(pruned.plan.to_json())
    assert plan == pruned.plan
    again = prune_filters(padded(), image(8), plan)
    assert again.plan == plan
    assert bits(again.model) == bits(pruned.model)
    assert (again.before, again.after) == (pruned.before, pruned.after)
    assert torch.equal(again.model(image(8)), pruned.model(image(8)))


def test_a_saved_model_comes_back_on_other_weights(tmp_path):
    pruned = prune_filters(padded(), image(8), filter_scores(padded()), 0.5)
    with torch.no_grad():
        for parameter in pruned.model.parameters():
            parameter.add_(0.01)  # fine-tuned
    files = pruned.save(tmp_path)
    assert [file.suffix for file in files] == [".json", ".safetensors"]
    with safe_open(files[1], "pt") as stored:
        assert set(stored.keys()) == set(pruned.model.state_dict())
    fresh = lively(padded(), seed=7)
    before = bits(fresh)
    loaded = load_pruned(fresh, tmp_path, image(8))
    assert bits(fresh) == before
    assert bits(loaded.model) == bits(pruned.model)
    assert torch.equal(loaded.model(image(8)), pruned.model(image(8)))
    assert (loaded.plan, loaded.before, loaded.after) == (pruned.plan, pruned.before, pruned.after)


def test_weights_of_another_cut_do_not_fit(tmp_path):
    prune_filters(padded(), image(8), filter_scores(padded()), 0.5).save(tmp_path)
    Plan(filters={"3.conv1": (0,)}).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="does not fit Sequential without what the plan removes"):
        load_pruned(padded(), tmp_path, image(8))


# layers and filters


def dropped_and_cut():
    dropped = drop_layers(network(), ["layer1.1", "layer3.1"], X)
    cut = prune_filters(dropped.model, X, filter_scores(dropped.model), 0.4)
    plan = replace(dropped.plan, filters=cut.plan.filters)
    return replace(cut, plan=plan, before=dropped.before)


def test_layers_then_filters_in_one_plan(tmp_path):
    both = dropped_and_cut()
    assert predict_cost(network(), both.plan, X) == both.after
    both.save(tmp_path)
    loaded = load_pruned(network(1), tmp_path, X)
    assert bits(loaded.model) == bits(both.model)
    assert loaded.plan == both.plan
    assert (loaded.before, loaded.after) == (both.before, both.after)


def test_a_plan_of_layers_and_filters_is_not_cut_by_half():
    plan = Plan(layers=("layer1.1",), filters={"layer1.1.conv1": (0, 1)})
    try:
        found = prune_filters(network(), X, plan)
    except ValueError:
        return
    smaller = drop_layers(network(), ["layer1.1"], X).model
    assert bits(found.model) == bits(prune_filters(smaller, X, replace(plan, layers=())).model)


def test_what_drop_layers_makes_of_a_plan_with_filters_can_be_loaded(tmp_path):
    plan = Plan(layers=("layer1.1",), filters={"layer1.1.conv1": (0, 1)})
    try:
        found = drop_layers(network(), plan, X)
    except ValueError:
        return
    found.save(tmp_path)
    assert bits(load_pruned(network(), tmp_path, X).model) == bits(found.model)


# again and again


@pytest.mark.parametrize("make", [padded, lambda: lively(chain())])
def test_a_smaller_model_can_be_cut_again(make):
    model = make()
    for seed in range(3):
        pruned = prune_filters(model, image(8), filter_scores(model, seed), 0.3)
        assert apart(model, pruned, image(8))[0] < 1e-12
        assert pruned.plan.settings["macs"] == [pruned.before.macs, pruned.after.macs]
        model = pruned.model


def test_the_stream_of_a_padded_network_can_be_cut_again():
    model = prune_filters(padded(), image(8), filter_scores(padded()), 0.3).model
    assert set(prunable_filters(model, image(8)).left) == {"8"}


def test_cost_of_a_second_cut_is_foretold():
    model = prune_filters(padded(), image(8), filter_scores(padded()), 0.3).model
    pruned = prune_filters(model, image(8), filter_scores(model), 0.3)
    assert predict_cost(model, pruned.plan, image(8)) == pruned.after


def test_cost_next_to_an_untouched_padding_is_foretold():
    class Twice(nn.Module):
        def forward(self, x):
            return torch.cat((x, 0 * x), 1)

    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), Twice(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    plan = Plan(filters={"2": (0, 1, 2)})
    assert predict_cost(model, plan, image(8)) == prune_filters(model, image(8), plan).after


# what only runs in training


def test_heads_that_only_train_read_what_is_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
            self.aside, self.head = nn.Conv2d(8, 4, 1), nn.Linear(6, 5)

        def forward(self, x):
            x = self.first(x).relu()
            y = self.head(self.last(x).mean((2, 3)))
            return (y, self.aside(x)) if self.training else y

    torch.manual_seed(0)
    model = Net()
    try:
        pruned = prune_filters(model, image(8), filter_scores(model), 0.5)
    except ValueError:
        return
    pruned.model.train()(image(8))


def test_no_model_no_example():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        prune_filters(3, X, SCORES, 0.5)
    with pytest.raises(TypeError, match="example must be one batch"):
        prune_filters(network(), 3, SCORES, 0.5)
    with pytest.raises(ValueError, match="scripted or traced"):
        prune_filters(torch.jit.trace(network(), X), X, SCORES, 0.5)
    with pytest.raises(ValueError, match="no lazy parameters"):
        prunable_filters(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), X)


def test_a_model_without_data_is_refused():
    with pytest.raises(ValueError, match="meta device"):
        prune_filters(network().to("meta"), X, SCORES, 0.5)


def test_a_model_that_asks_for_values_without_noise():
    class Strict(nn.Sequential):
        def forward(self, x):
            assert x.min() >= 0
            return super().forward(x)

    model = lively(Strict(*chain()))
    x = image(8).abs()
    pruned = prune_filters(model, x, filter_scores(model), 0.5)
    assert pruned.plan.filters
    assert apart(model, pruned, x)[0] < 1e-12


def test_masks_of_a_plan_with_layers_are_refused():
    plan = Plan(layers=("layer1.1",), filters={"layer3.1.conv1": (0, 1)})
    with pytest.raises(ValueError, match="plan drops layers too"):
        mask_filters(network(), X, plan)


def test_plan_xor_ratio():
    with pytest.raises(ValueError, match="ratio must be left out with a plan"):
        prune_filters(network(), X, INNER, 0.5)
    with pytest.raises(ValueError, match="ratio must be given with scores"):
        prune_filters(network(), X, SCORES)


def test_plan_that_went_in_is_as_it_was():
    plan = Plan(filters={"3": (5, 0, 2)}, by="hand", settings={"seed": 1})
    before = deepcopy(plan)
    found = prune_filters(lively(chain()), image(8), plan).plan
    assert plan == before
    assert found == replace(plan, model="Sequential")
    assert found.filters == {"3": (0, 2, 5)}
