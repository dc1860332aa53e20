"""The numbers of the surgery card: groups, slices bit for bit, votes, steps, offsets behind a concatenation, counts."""

from dataclasses import replace

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn import functional as F

from repgraph.demo import digits, digits_resnet
from repgraph.prune import Plan, drop_layers, load_pruned, prunable_filters, prune_filters

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Sequential()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        return F.relu(self.short(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.b1, self.b2, self.fc = Block(8, 8, 1), Block(8, 16, 2), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.b2(self.b1(F.relu(self.bn(self.stem(x))))).mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.fc(F.relu(self.bn(torch.cat((x, self.b(x), self.c(x)), 1))).mean((2, 3)))


def alive(model, seed=0):
    """Every norm with statistics and parameters of its own."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight, 0.5),
                (module.bias, -0.5),
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):
                tensor.data = low + torch.rand(tensor.shape, generator=generator)
    return model.eval()


def random_scores(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(m.out_channels, generator=generator) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)
    }


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def kept(plan, name, width):
    return [i for i in range(width) if i not in plan.filters.get(name, ())]


def test_groups_and_slices_of_the_toy_bit_for_bit():
    torch.manual_seed(0)
    model = alive(Toy())
    groups = {frozenset(group.layers) for group in prunable_filters(model, X).groups}
    assert groups == {
        frozenset(g) for g in (("stem", "b1.conv2"), ("b1.conv1",), ("b2.conv1",), ("b2.conv2", "b2.short.0"))
    }
    pruned = prune_filters(model, X, random_scores(model), 0.5)
    stem, inner = kept(pruned.plan, "stem", 8), kept(pruned.plan, "b1.conv1", 8)
    second, last = kept(pruned.plan, "b2.conv1", 16), kept(pruned.plan, "b2.conv2", 16)
    assert [len(own) for own in (stem, inner, second, last)] == [4, 4, 8, 8]
    assert kept(pruned.plan, "b1.conv2", 8) == stem
    assert kept(pruned.plan, "b2.short.0", 16) == last
    expected = {
        "stem.weight": model.stem.weight[stem],
        "bn.running_var": model.bn.running_var[stem],
        "b1.conv1.weight": model.b1.conv1.weight[inner][:, stem],
        "b1.bn1.bias": model.b1.bn1.bias[inner],
        "b1.conv2.weight": model.b1.conv2.weight[stem][:, inner],
        "b2.conv1.weight": model.b2.conv1.weight[second][:, stem],
        "b2.conv2.weight": model.b2.conv2.weight[last][:, second],
        "b2.short.0.weight": model.b2.short[0].weight[last][:, stem],
        "b2.short.1.running_mean": model.b2.short[1].running_mean[last],
        "fc.weight": model.fc.weight[:, last],
        "fc.bias": model.fc.bias,
    }
    state = pruned.model.state_dict()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize(("fold", "first"), [("mean", {0, 1, 2, 3}), ("max", {0, 1, 2, 3}), ("min", {0, 1, 2, 3})])
def test_votes_of_a_coupled_group(fold, first):
    """Stem 1..8, b1.conv2 9 for the first four: the mean keeps these; the stem alone would keep the others."""
    model = alive(Toy())
    stem, other = torch.arange(1.0, 9), torch.tensor([9.0] * 4 + [0.0] * 4)
    pruned = prune_filters(model, X, {"stem": stem, "b1.conv2": other}, 0.5, fold=fold)
    assert set(kept(pruned.plan, "stem", 8)) == first
    assert set(kept(prune_filters(model, X, {"stem": stem}, 0.5).plan, "stem", 8)) == {4, 5, 6, 7}


def test_cut_equals_the_model_with_zeros():
    torch.manual_seed(1)
    model = alive(Toy())
    pruned = prune_filters(model, X, random_scores(model), 0.5)
    pairs = {"stem": "bn", "b1.conv1": "b1.bn1", "b1.conv2": "b1.bn2", "b2.conv1": "b2.bn1", "b2.conv2": "b2.bn2",
             "b2.short.0": "b2.short.1"}  # fmt: skip
    with torch.no_grad():
        for conv, norm in pairs.items():
            gone = list(pruned.plan.filters[conv])
            for tensor in (
                model.get_submodule(conv).weight,
                model.get_submodule(norm).weight,
                model.get_submodule(norm).bias,
            ):
                tensor[gone] = 0
        torch.testing.assert_close(pruned.model(X), model(X), rtol=0, atol=1e-6)


def test_four_steps_equal_one():
    torch.manual_seed(2)
    model = alive(Toy())
    scores = {"b1.conv1": torch.rand(8, generator=torch.Generator().manual_seed(3))}
    once = prune_filters(model, X, scores, 0.5).model
    stepped, left, widths = model, scores["b1.conv1"], []
    for _ in range(4):
        pruned = prune_filters(stepped, X, {"b1.conv1": left}, 1 / len(left))
        left = left[kept(pruned.plan, "b1.conv1", len(left))]
        stepped = pruned.model
        widths.append(stepped.b1.conv1.out_channels)
    assert widths == [7, 6, 5, 4]
    for a, b in zip(once.state_dict().values(), stepped.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_offsets_behind_a_concatenation():
    torch.manual_seed(3)
    model = alive(Concatenated())
    pruned = prune_filters(model, X, random_scores(model), 0.5)
    places = [
        *kept(pruned.plan, "a", 8),
        *(8 + i for i in kept(pruned.plan, "b", 4)),
        *(12 + i for i in kept(pruned.plan, "c", 4)),
    ]
    assert torch.equal(pruned.model.bn.running_mean, model.bn.running_mean[places])
    assert torch.equal(pruned.model.fc.weight, model.fc.weight[:, places])


def test_counts_of_the_toy():
    """579,664 MACs of convolutions and linear layers; Torch-Pruning adds 18,432 for batch norm and 5 for the bias."""
    model = alive(Toy())
    before = prune_filters(model, X[:1], Plan()).before
    assert (before.macs, before.parameters) == (579_664, 5_181)
    assert tp.utils.count_ops_and_params(model, X[:1])[0] == 579_664 + 18_432 + 5


def test_twenty_at_four_fifths_keep_four_and_ten_at_nine_tenths_one():
    """Binary rounding of C (1 - ratio) would keep 3, and none."""
    for width, ratio, left in ((20, 0.8, 4), (10, 0.9, 1)):
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 3))
        pruned = prune_filters(model, X, {"0": torch.rand(width)}, ratio)
        assert pruned.model[0].out_channels == left


def test_equal_scores_are_cut_like_others_and_no_layer_is_emptied():
    model = alive(Toy())
    scores = {name: torch.zeros(len(own)) for name, own in random_scores(model).items()}
    for budget in ("uniform", "global", "global_mean"):
        pruned = prune_filters(model, X, scores, 0.75, budget=budget)
        assert min(m.out_channels for m in pruned.model.modules() if isinstance(m, nn.Conv2d)) >= 1
    extreme = {**scores, "b1.conv1": torch.full((8,), -1e9)}
    assert prune_filters(model, X, extreme, 0.5, budget="global_mean").model.b1.conv1.out_channels >= 1


def test_frozen_parameters_are_cut_and_stay_frozen():
    model = alive(Toy()).requires_grad_(False)
    with torch.no_grad():
        pruned = prune_filters(model, X, random_scores(model), 0.5)
    assert pruned.model.stem.out_channels == 4
    assert not any(parameter.requires_grad for parameter in pruned.model.parameters())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"stem": torch.tensor([1.0] * 7 + [torch.nan])}, "'stem' are not finite"),
        ({"stem": torch.ones(7)}, r"'stem' must have shape \(8,\)"),
        ({"trunk": torch.ones(8)}, "'trunk' is no convolution"),
        ({"fc": torch.ones(5)}, "they are the model's output"),
        ({}, "scores must map"),
    ],
)
def test_bad_scores(scores, message):
    with pytest.raises(ValueError, match=message):
        prune_filters(alive(Toy()), X, scores, 0.5)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, "half", True, float("nan")])
def test_bad_ratios(ratio):
    with pytest.raises(ValueError, match="ratio must be"):
        prune_filters(alive(Toy()), X, {"stem": torch.ones(8)}, ratio)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"stem": (0,)}, r"filters \[0\] of 'b1.conv2' go together"),
        ({"b1.conv1": tuple(range(8))}, "keep at least one"),
        ({"b1.conv1": (8,)}, "has 8 filters"),
        ({"fc": (0,)}, "cannot be cut"),
    ],
)
def test_plans_that_cannot_be(filters, message):
    with pytest.raises(ValueError, match=message):
        prune_filters(alive(Toy()), X, Plan(filters=filters))


def test_layers_and_filters_of_one_plan_come_from_a_folder(tmp_path):
    """Neither function does half of such a plan; saved, both halves come back."""
    model, x = digits_resnet(), digits()[0][:2]
    dropped = drop_layers(model, ["layer1.2"], x)
    cut = prune_filters(dropped.model, x, Plan(filters={"layer1.2.conv1": (0, 5)}))  # layer1.3 of the whole model
    both = replace(dropped.plan, filters=cut.plan.filters)
    with pytest.raises(ValueError, match="drops layers too"):
        prune_filters(model, x, both)
    with pytest.raises(ValueError, match="a plan with filters"):
        drop_layers(model, both, x)
    replace(cut, plan=both).save(tmp_path)
    loaded = load_pruned(digits_resnet(1), tmp_path, x)
    assert loaded.plan == both
    with torch.no_grad():
        assert torch.equal(loaded.model(x), cut.model(x))


def test_layers_that_do_not_run_are_refused():
    model = alive(Toy())
    model.unused = nn.Conv2d(3, 8, 1)
    with pytest.raises(ValueError, match="'unused' does not run"):
        prune_filters(model, X, Plan(filters={"unused": (0, 1)}))


def test_search_for_dependencies_ends():
    """Windows that are rolled and split bring channels back with other numbers."""
    model = torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [2, 2], num_classes=4).eval()
    found = prunable_filters(model, torch.randn(1, 3, 32, 32))
    assert {"features.1.0.mlp.0", "features.1.1.mlp.0"} <= {name for group in found.groups for name in group.layers}
