"""Random networks: cut equals zeros by hand, MACs are foretold, plans follow their filters; groups as they print."""

import pytest
import torch
from architectures import apart, filter_scores, image, lively
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from repgraph.demo import digits, digits_resnet
from repgraph.prune import Plan, plan_filters, predict_cost, prunable_filters, prune_filters

pytestmark = pytest.mark.usefixtures("one_thread")

X = image(5)


class Drawn(nn.Module):
    """Steps (kind, from, from or width) on tensors of 5 x 5: each may read any before it."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.widths = [], [3]
        self.parts = nn.ModuleList()
        for kind, a, b in steps:
            a = a % len(self.widths)
            width = self.widths[a]
            if kind == "conv":
                norm = nn.BatchNorm2d(b) if b % 3 else nn.Identity()
                part, after = nn.Sequential(nn.Conv2d(width, b, 3, 1, 1, bias=b % 2 == 0), norm, nn.ReLU()), b
            elif kind == "depthwise":
                part, after = (
                    nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width)),
                    width,
                )
            elif kind == "add":
                same = [i for i, other in enumerate(self.widths) if other == width]
                b, part, after = same[b % len(same)], nn.Identity(), width
            elif kind == "cat":
                b = b % len(self.widths)
                part, after = nn.BatchNorm2d(width + self.widths[b]), width + self.widths[b]
            else:
                part, after = nn.MaxPool2d(3, 1, 1), width
            self.steps.append((kind, a, b))
            self.parts.append(part)
            self.widths.append(after)
        self.head = nn.Linear(self.widths[-1], 3)

    def forward(self, x):
        values = [x]
        for (kind, a, b), part in zip(self.steps, self.parts, strict=True):
            if kind == "add":
                values.append(values[a] + values[b])
            else:
                values.append(part(torch.cat((values[a], values[b]), 1) if kind == "cat" else values[a]))
        return self.head(values[-1].mean((2, 3)))


steps = st.tuples(
    st.sampled_from(["conv", "conv", "conv", "depthwise", "add", "cat", "pool"]), st.integers(0, 9), st.integers(4, 8)
)
seeds = st.integers(0, 999)


@st.composite
def networks(draw):
    chosen = [("conv", 0, draw(st.integers(4, 8))), *draw(st.lists(steps, min_size=1, max_size=5))]
    torch.manual_seed(0)
    model = Drawn(chosen)
    assume(max(model.widths) <= 40)
    return lively(model, draw(seeds))


@settings(max_examples=15)
@given(networks(), seeds, st.sampled_from([0.25, 0.5, 0.7]), st.sampled_from(["uniform", "global", "global_mean"]))
def test_cut_equals_zeros_and_costs_are_foretold(model, seed, ratio, budget):
    scores = filter_scores(model, seed)
    found = prunable_filters(model, X)
    free = {layer for group in found.groups for layer in group.layers}
    assert not free & found.left.keys()
    assume(free)
    pruned = prune_filters(model, X, scores, ratio, budget=budget)
    assert apart(model, pruned, X)[0] < 1e-12
    assert pruned.plan.settings["macs"] == [pruned.before.macs, pruned.after.macs]
    assert predict_cost(model, pruned.plan, X) == pruned.after
    again = Plan.from_json(pruned.plan.to_json())
    assert again == pruned.plan
    smaller = prune_filters(model, X, again).model
    assert all(torch.equal(a, b) for a, b in zip(smaller.parameters(), pruned.model.parameters(), strict=True))


@pytest.mark.parametrize("seed", [72, 95, 108, 240])
def test_channels_that_never_fire_hide_nothing(seed):
    """Torch-Pruning counts the channels behind the model's input from 0; on the example all of them are silent."""
    torch.manual_seed(0)
    model = lively(Drawn([("conv", 0, 7), ("conv", 1, 4), ("cat", 0, 2)]), seed)
    assert "parts.1.0" in prunable_filters(model, X).left


@settings(max_examples=10)
@given(networks(), seeds)
def test_any_units_can_go_and_their_macs_are_foretold(model, seed):
    """Of every group a random set, not the same share."""
    generator = torch.Generator().manual_seed(seed)
    found = prunable_filters(model, X)
    units = [
        (g, torch.randperm(g.width, generator=generator)[: int(torch.randint(0, g.width, (), generator=generator))])
        for g in found.groups
    ]
    filters = {}
    for group, own in units:
        for (name, side), channels in group.removed(own).items():
            if side == "out" and name in group.layers and len(channels):
                filters.setdefault(name, []).extend(channels.tolist())
    pruned = prune_filters(model, X, Plan(filters=filters))
    assert apart(model, pruned, X)[0] < 1e-12
    assert found.macs_without(units) == pruned.after.macs
    assert found.macs_without([]) == found.macs == pruned.before.macs


@settings(max_examples=8)
@given(seeds, st.sampled_from(["uniform", "global", "global_mean"]))
def test_a_plan_follows_its_filters(seed, budget):
    """Filters, norm and the columns that read them in another order: the same filters go, under their new numbers."""
    torch.manual_seed(seed)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten()]
    model = lively(nn.Sequential(*parts, nn.Linear(6, 5)), seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *parts[2:3], nn.Conv2d(8, 6, 3), *parts[4:], model[6])
    state = model.state_dict()
    for name in state:
        if name.startswith(("0.", "1.")) and state[name].ndim:
            state[name] = state[name][order]
    state["3.weight"] = state["3.weight"][:, order]
    other.load_state_dict(state)
    scores = filter_scores(model, seed, {"0", "3"})
    plan = plan_filters(model, X, scores, 0.5, budget=budget)
    moved = plan_filters(other, X, {**scores, "0": scores["0"][order]}, 0.5, budget=budget)
    assert {int(order[i]) for i in moved.filters.get("0", ())} == set(plan.filters.get("0", ()))
    assert moved.filters.get("3", ()) == plan.filters.get("3", ())
    assert moved.settings["macs"] == plan.settings["macs"]


def test_every_channel_is_in_one_unit_of_one_group():
    found = prunable_filters(digits_resnet(), digits()[0][:1])
    seen = [(layer, c) for g in found.groups for layer in g.layers for c in g.places[layer, "out"][0].tolist()]
    assert len(seen) == len(set(seen))
    widths = {name: len(own) for name, own in filter_scores(digits_resnet()).items()}
    assert len(seen) == sum(width for name, width in widths.items() if name not in found.left)


def test_groups_print_their_widths_and_what_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    )
    found = prunable_filters(model, X)
    assert repr(found).splitlines() == [
        "FilterGroups: 1 groups of 4 units in all",
        "      4  2",
        "   left  5: they are the model's output",
        "   left  0: cutting some changes more than setting them to zero",
    ]
    assert "<td>left</td><td>5: they are the model&#x27;s output</td>" in found._repr_html_()
