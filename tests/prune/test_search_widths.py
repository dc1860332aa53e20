"""The search for widths: by hand on a net of 36 MACs, against plain loops, and what it leaves behind."""

import math
import re
from copy import deepcopy
from functools import cache
from itertools import pairwise, product

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_budgets import (
    Residual,
    case,
    draw_scores,
    found,
    layer_cuts,
    macs_without,
    one_by_one,
    order_by_hand,
    unit_scores_by_hand,
)
from torch import nn

from repgraph.cost import model_cost
from repgraph.prune import mask_filters, plan_filters, prunable_filters, prune_filters, search_widths

pytestmark = pytest.mark.usefixtures("one_thread")


def zeroed(net):
    """The filters of each layer whose weights are all zero."""
    weighted = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    rows = {name: module.weight.detach().flatten(1).any(1) for name, module in weighted.items()}
    return {name: tuple((~own).nonzero().flatten().tolist()) for name, own in rows.items() if not own.all()}


def search(model, example, scores, damage, reduction, **options):
    return search_widths(model, example, scores, damage, reduction, **{"progress": False, **options})


# Two layers of 4 filters and a fixed one of 3: F(a, b) = 2 a + a b + 3 b


SCORES = {"0": torch.tensor([4, 3, 2, 1.5]), "1": torch.tensor([10, 5, 1, 0.25])}
HAND_X = torch.zeros(1, 2, 1, 1)


def hand(inputs=2, outputs=3):
    torch.manual_seed(0)
    return one_by_one(inputs, 4, 4, outputs)


@cache
def hand_groups():
    return prunable_filters(hand(), HAND_X)


def lost(gone):
    """Sum of the scores of the filters that are gone."""
    return sum(float(SCORES[name][list(cut)].sum()) for name, cut in gone.items())


def recorder(harm=lost):
    """A damage, and the list of what it was called with and what it gave."""
    calls = []

    def damage(net):
        calls.append((zeroed(net), harm(zeroed(net))))
        return calls[-1][1]

    return damage, calls


def widths_of(gone):
    return tuple(4 - len(gone.get(name, ())) for name in "01")


def hand_macs(a, b):
    return 2 * a + a * b + 3 * b


def test_path_and_candidates_by_hand():
    """Check 1."""
    damage, calls = recorder()
    plan = search(hand(), HAND_X, SCORES, damage, 0.5, step=4 / 36)
    assert plan.settings["trace"] == [["1", 3, 29, 0.25], ["1", 2, 22, 1.25], ["0", 3, 18, 2.75]]
    assert plan.filters == {"0": (3,), "1": (2, 3)}
    assert plan.settings["macs"] == [36, 18]
    seen = [(widths_of(gone), value) for gone, value in calls]
    assert seen[:2] == [((3, 4), 1.5), ((4, 3), 0.25)]
    assert seen[2:4] == [((3, 3), 1.75), ((4, 2), 1.25)]
    assert seen[4:] == [((3, 2), 2.75), ((4, 1), 6.25)]
    assert all(gone[name] == tuple(range(4 - len(gone[name]), 4))[-4:] for gone, _ in calls for name in gone)


def test_exhaustive_search_by_hand():
    """Check 1: of all 16 pairs of widths within the budget the one of least damage."""
    kept = {name: own.sort(descending=True).values for name, own in SCORES.items()}
    pairs = [(a, b) for a, b in product(range(1, 5), repeat=2) if hand_macs(a, b) <= 18]
    best = min(pairs, key=lambda pair: sum(float(kept[name][n:].sum()) for name, n in zip("01", pair, strict=True)))
    plan = search(hand(), HAND_X, SCORES, recorder()[0], 0.5, step=4 / 36)
    assert best == (3, 2) == widths_of(plan.filters)


def test_one_layer_is_pure_division():
    model, x, scores = one_by_one(2, 20, 3), HAND_X, {"0": torch.arange(20.0)}
    groups = prunable_filters(model, x)
    for reduction, left in ((0.5, 10), (0.1, 18), (0.42, 11), (0.94, 1)):  # 5 MACs for each filter
        for step in (0.05, 0.3):
            plan = search(model, x, scores, lambda net: 0.0, reduction, step=step, groups=groups)
            assert plan.filters == {"0": tuple(range(20 - left))}


def test_reduction_0_keeps_all():
    damage, calls = recorder()
    plan = search(hand(), HAND_X, SCORES, damage, 0)
    assert (plan.filters, plan.settings["trace"], plan.settings["macs"], calls) == ({}, [], [36, 36], [])


def test_of_equal_damage_the_larger_saving_goes():
    """One filter of layer 0 saves 2 + 4, of layer 1 saves 4 + 3."""
    plan = search(hand(), HAND_X, SCORES, lambda net: 1.0, 0.15, step=4 / 36)
    assert plan.filters == {"1": (3,)}


def test_of_equal_damage_and_saving_the_earlier_layer_goes():
    plan = search(hand(2, 2), HAND_X, SCORES, lambda net: 1.0, 0.15, step=4 / 32)
    assert plan.filters == {"0": (3,)}


def test_negative_damage_goes_first():
    def harm(gone):
        return -len(gone.get("0", ()))

    plan = search(hand(), HAND_X, SCORES, recorder(harm)[0], 0.4, step=1 / 36)
    assert plan.filters == {"0": (1, 2, 3)}


def test_least_width_and_skip():
    damage, calls = recorder()
    plan = search(hand(), HAND_X, SCORES, damage, 0.5, step=4 / 36, min_width=2)
    assert widths_of(plan.filters) == (3, 2)
    assert min(min(widths_of(gone)) for gone, _ in calls) == 2  # (4, 1) is no candidate any more
    damage, calls = recorder()
    plan = search(hand(), HAND_X, SCORES, damage, 0.4, step=4 / 36, skip=["1"])
    assert plan.filters == {"0": (1, 2, 3)}  # 6 MACs each, 14.4 are asked for
    assert {name for gone, _ in calls for name in gone} == {"0"}


# Every network: plain loops


def greedy(name, scores, harm, reduction, step, min_width, skip, fold):
    """The rule of note 15 with the last step given back; (cut, trace, candidates), or why there is none."""
    judged = unit_scores_by_hand(name, scores, "uniform", skip, fold)
    orders = {place: order_by_hand(values) for place, values in judged}
    counts, trace, seen = dict.fromkeys(orders, 0), [], []

    def cut(counts):
        return {place: orders[place][:count] for place, count in counts.items()}

    def macs(counts):
        return macs_without(name, cut(counts))

    whole = macs(counts)
    target, saving = whole * (1 - reduction + 1e-9), whole * (step - 1e-9)
    while macs(counts) > target:
        candidates = []
        for turn, place in enumerate(orders):
            for count in range(counts[place] + 1, len(orders[place]) - min_width + 1):
                trial = {**counts, place: count}
                if macs(trial) <= macs(counts) - saving:
                    gone = layer_cuts(name, cut(trial))
                    seen.append(gone)
                    candidates.append((harm(gone), macs(trial), turn, place, trial))
                    break
        if not candidates:  # nobody alone can save a step: each gives all that it has left
            for turn, place in enumerate(orders):
                trial = {**counts, place: max(0, len(orders[place]) - min_width)}
                if trial != counts:
                    seen.append(layer_cuts(name, cut(trial)))
                    candidates.append((harm(seen[-1]), macs(trial), turn, place, trial))
        if not candidates:
            return f"the MACs cannot come down to {target:,.0f}: {macs(counts):,} is the least"
        value, left, _, place, trial = min(candidates)
        first = next(layer for layer in case(name).layers if layer in case(name).groups[place])
        trace.append([first, case(name).widths[place] - trial[place], left, value])
        before, counts = counts, trial
    if trace:
        while counts[place] - 1 > before[place] and macs({**counts, place: counts[place] - 1}) <= target:
            counts = {**counts, place: counts[place] - 1}
    return cut(counts), trace, seen


def weighted_harm(scores, power=2):
    """Not additive over layers, the same for the same sets."""
    low = {layer: own.min() - 0.5 for layer, own in scores.items()}

    def harm(gone):
        sums = (float((scores[name] - low[name])[list(cut)].sum()) for name, cut in sorted(gone.items()))
        return sum(i * value**power for i, value in enumerate(sums, 1))

    return harm


@given(st.data())
@settings(max_examples=15)
def test_search_against_plain_loops(data):
    name = data.draw(st.sampled_from(["chain", "residual", "mixed"]))
    own, scores = case(name), draw_scores(name, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([3, 1000])))
    harm = weighted_harm(scores, data.draw(st.sampled_from([0, 1, 2])))
    reduction, step = data.draw(st.integers(0, 54)) / 64, data.draw(st.sampled_from([1, 3, 6, 12, 24])) / 64
    options = {
        "min_width": data.draw(st.sampled_from([1, 1, 2, 3])),
        "skip": data.draw(st.just([]) | st.lists(st.sampled_from(list(own.layers)), max_size=1)),
        "fold": data.draw(st.sampled_from(["mean", "max", "min"])),
    }
    expected = greedy(name, scores, harm, reduction, step, **options)
    damage, calls = recorder(harm)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            search(own.model, own.example, scores, damage, reduction, step=step, groups=found(name), **options)
        return
    plan = search(own.model, own.example, scores, damage, reduction, step=step, groups=found(name), **options)
    cut, trace, seen = expected
    assert plan.filters == layer_cuts(name, cut)
    assert plan.settings["trace"] == trace
    assert [gone for gone, _ in calls] == seen
    whole, left = plan.settings["macs"]
    assert (whole, left) == (own.macs(*own.widths), macs_without(name, cut))
    # check 2
    budget = whole * (1 - reduction)
    assert left <= budget
    assert all(macs > budget for *_, macs, _ in trace[:-1])
    for width, gone in ((own.widths[place], gone) for place, gone in cut.items()):
        assert width - len(gone) >= min(width, options["min_width"])
    if trace:  # within one filter of the layer of the last step
        last = next(place for place, layers in enumerate(own.groups) if trace[-1][0] in layers)
        assert macs_without(name, {**cut, last: cut[last][:-1]}) > budget


@given(st.integers(0, 99), st.lists(st.integers(1, 48), min_size=2, max_size=2, unique=True))
@settings(max_examples=5)
def test_smaller_budgets_go_further_along_the_same_path(seed, reductions):
    """Check 3."""
    own, scores = case("chain"), draw_scores("chain", seed)
    traces = [
        search(
            own.model, own.example, scores, recorder(weighted_harm(scores))[0], share / 64, step=1 / 32,
            groups=found("chain"),
        ).settings["trace"]
        for share in sorted(reductions)
    ]  # fmt: skip
    assert traces[0] == traces[1][: len(traces[0])]


def normed(*widths):
    """Convolutions with batch norms of random statistics."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    for before, after in pairwise((3, *widths)):
        norm = nn.BatchNorm2d(after)
        for tensor, low in ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.5), (norm.running_var, 0.5)):
            tensor.data = torch.rand(after, generator=generator) + low
        model.extend([nn.Conv2d(before, after, 3, padding=1), norm, nn.ReLU()])
    return model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)]).eval()


def test_dead_filters_go_first():
    """Check 4."""
    torch.manual_seed(0)
    model, x = normed(6, 7), torch.randn(8, 3, 5, 5)
    dead = [1, 2, 5]
    model[1].weight.data[dead] = model[1].bias.data[dead] = 0
    scores = {"0": model[1].weight.detach().abs(), "3": torch.rand(7) + 1}
    with torch.no_grad():
        base = model(x)

    @torch.no_grad()
    def change(net):
        return (net(x) - base).abs().max()

    one = 9 * (3 + 7) * 25 * 8  # MACs of a filter of the first layer and what reads it
    plan = search(model, x, scores, change, 0.6, step=one / model_cost(model, x).macs - 1e-9)
    trace = plan.settings["trace"]
    assert [[layer, width, damage] for layer, width, _, damage in trace[:3]] == [["0", w, 0] for w in (5, 4, 3)]
    assert all(damage > 0 for *_, damage in trace[3:])
    assert len(trace) > 3
    assert set(dead) <= set(plan.filters["0"])
    assert search(model, x, scores, change, 0.2, step=0.05).filters.keys() == {"0"}


def test_masked_model_and_surgery_agree():
    """Check 5."""
    torch.manual_seed(0)
    model, x = normed(8, 12, 12, 16, 16), torch.randn(4, 3, 6, 6)
    scores = {name: torch.rand(m.out_channels) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    damage = recorder(weighted_harm(scores))[0]
    plan = search(model, x, scores, damage, 0.5, step=0.1)
    pruned = prune_filters(model, x, plan)
    with torch.no_grad():
        assert (pruned.model(x) - mask_filters(model, x, plan)(x)).abs().max() < 1e-5
        assert (pruned.model(x) - model(x)).abs().max() > 1e-3
    assert plan.settings["macs"] == [pruned.before.macs, pruned.after.macs]
    assert zeroed(mask_filters(model, x, plan)) == plan.filters
    assert pruned.model[0].out_channels == 8 - len(plan.filters.get("0", ()))


def test_macs_are_the_formula_and_torch_prunings_without_its_other_terms():
    """Check 6: it adds 2 for each element of a batch norm, 1 for one of a ReLU or before a pool, and biases."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, 2, groups=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(12, 5),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 10, 10)
    scores = {"0": torch.rand(8), "4": torch.rand(12)}

    def by_formula(a, b):
        return 9 * 3 * a * 100 + 9 * a // 2 * b * 4 + 5 * b

    def other_terms(a, b):
        return (1 + 2 + 1 + 1) * a * 100 + (2 + 1 + 1) * b * 4 + 5

    plan = search(model, x, scores, recorder(weighted_harm(scores))[0], 0.5, step=0.1)
    a, b = 8 - len(plan.filters["0"]), 12 - len(plan.filters.get("4", ()))
    assert plan.settings["macs"] == [by_formula(8, 12), by_formula(a, b)]
    assert tp.utils.count_ops_and_params(model, x)[0] == by_formula(8, 12) + other_terms(8, 12)
    pruned = prune_filters(model, x, plan).model
    assert tp.utils.count_ops_and_params(pruned, x)[0] == by_formula(a, b) + other_terms(a, b)


def test_coupled_layers_are_one():
    torch.manual_seed(0)
    own, scores = case("residual"), draw_scores("residual", 1)
    damage, calls = recorder(lambda gone: float(len(gone.get("conv1", ()))))
    plan = search(own.model, own.example, scores, damage, 0.3, step=0.05, groups=found("residual"))
    assert set(plan.filters) == {"stem", "conv2"}
    assert {layer for layer, *_ in plan.settings["trace"]} == {"stem"}
    assert all(gone.get("stem") == gone.get("conv2") for gone, _ in calls)
    with pytest.raises(ValueError, match="the MACs cannot come down to 2,251: 8,688 is the least"):
        search(own.model, own.example, scores, damage, 0.9, step=0.05, skip=["conv2"], groups=found("residual"))


# What damage is given


def test_damage_sees_the_masked_model_and_nothing_else():
    """Every call: a copy in eval mode, equal to the model but for the units that are tried, norms and biases too."""
    torch.manual_seed(0)
    model, x, seen = Residual(), case("residual").example, []
    for norm in (model.bn, model.bn1, model.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1)
        nn.init.uniform_(norm.bias, 0.5, 1)
    parts = {"stem": ("stem", "bn"), "conv1": ("conv1", "bn1"), "conv2": ("conv2", "bn2")}

    def damage(net):
        assert net is not model
        assert not any(module.training for module in net.modules())
        gone = zeroed(net)
        expected = deepcopy(model)
        for layer, cut in gone.items():
            for part in parts[layer]:
                expected.get_submodule(part).weight.data[list(cut)] = 0
                expected.get_submodule(part).bias.data[list(cut)] = 0
        with torch.no_grad():
            assert torch.equal(net(x), expected.eval()(x))
        assert {p.data_ptr() for p in net.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
        seen.append(gone)
        return weighted_harm(draw_scores("residual", 0))(gone)

    search(model.train(), x, draw_scores("residual", 0), damage, 0.5, step=0.06)
    assert len(seen) > 6


class Tied(nn.Module):
    """Two convolutions of one weight, added up behind norms of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
        self.b.weight = self.a.weight
        self.norm_a, self.norm_b, self.fc = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc((self.norm_a(self.a(x)) + self.norm_b(self.b(x))).relu().mean((2, 3)))


def test_tied_weights_are_put_back_after_each_candidate():
    damage, calls = recorder(lambda gone: float(len(gone.get("a", ()))))
    scores = {"stem": torch.arange(4.0), "a": torch.arange(6.0)}
    search(Tied(), torch.randn(2, 3, 4, 4), scores, damage, 0.3, step=0.05)
    both = dict.fromkeys("ab", (0,))
    assert [gone for gone, _ in calls] == [{"stem": (0,)}, both, {"stem": (0, 1)}, {"stem": (0,), **both}]


# No trace, the same again


@pytest.mark.parametrize("fails", [None, 0, 3, math.nan])
def test_model_comes_out_untouched(fails):
    torch.manual_seed(0)
    model, x, scores = Residual().train(), case("residual").example, draw_scores("residual", 0)
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    model.conv1.register_forward_hook(lambda *_: None)
    before, drawn = deepcopy(model.state_dict()), torch.get_rng_state()
    kept = {name: value.clone() for name, value in scores.items()}

    def rest():
        own = [(id(p), p.data_ptr(), p.requires_grad, id(p.grad)) for p in model.parameters()]
        return own, [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    noted, calls = rest(), []

    def damage(net):
        calls.append(1)
        if len(calls) - 1 == fails:
            raise ZeroDivisionError("of the user")
        return fails if fails is math.nan else weighted_harm(scores)(zeroed(net))

    if fails is None:
        search(model, x, scores, damage, 0.3, step=0.1)
    elif fails is math.nan:
        with pytest.raises(ValueError, match="damage must be a finite number, got nan without filters of 'stem'"):
            search(model, x, scores, damage, 0.3, step=0.1)
    else:
        with pytest.raises(ZeroDivisionError, match="of the user"):
            search(model, x, scores, damage, 0.3, step=0.1)
        assert len(calls) == fails + 1
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rest() == noted
    assert all(torch.equal(scores[name], value) for name, value in kept.items())


def test_same_plan_again_and_with_groups():
    own, scores = case("mixed"), draw_scores("mixed", 0)
    plans = [
        search(own.model, own.example, scores, recorder(weighted_harm(scores))[0], 0.4, step=0.1, groups=groups)
        for groups in (None, None, found("mixed"))
    ]
    assert all(plan == plans[0] for plan in plans)
    assert type(plans[0]).from_json(plans[0].to_json()) == plans[0]


def test_search_and_equal_shares_by_hand():
    """At half the MACs (3, 2) at damage 2.75; shares of 1/4, 2/4, ... go over (3, 3) to (2, 2), 1.5 + 2 + 0.25 + 1."""
    groups = hand_groups()
    searched = search(hand(), HAND_X, SCORES, recorder()[0], 0.5, step=1 / 36, groups=groups)
    equal = plan_filters(hand(), HAND_X, SCORES, 0.5, of="macs", groups=groups)
    assert [lost(plan.filters) for plan in (searched, equal)] == [2.75, 4.75]


def test_no_progress_is_printed(capfd):
    search(hand(), HAND_X, SCORES, recorder()[0], 0.5, step=4 / 36)
    assert capfd.readouterr() == ("", "")


def test_settings():
    plan = search(hand(), HAND_X, SCORES, recorder()[0], 0.2, step=0.125, skip="1", min_width=2, fold="max", by="norm")
    expected = {"reduction": 0.2, "step": 0.125, "fold": "max", "of": "macs", "budget": "search", "macs": [36, 24]}
    expected |= {"skip": ["1"], "min_width": 2}
    assert plan.by == "norm"
    assert {name: plan.settings[name] for name in expected} == expected


# Out of reach, refused


def test_budgets_out_of_reach():
    """F(1, 1) = 6, F(2, 2) = 14, F(1, 4) = 18."""
    for reduction, options, least in [
        (0.86, {"step": 1 / 64}, 6), (0.7, {"step": 1 / 64, "min_width": 2}, 14), (0.6, {"skip": ["1"]}, 18),
    ]:  # fmt: skip
        target = f"{36 * (1 - reduction):.0f}"
        with pytest.raises(ValueError, match=f"the MACs cannot come down to {target}: {least} is the least"):
            search(hand(), HAND_X, SCORES, recorder()[0], reduction, groups=hand_groups(), **options)


@pytest.mark.parametrize(
    ("reduction", "step", "seen", "trace", "left"),
    [
        # to (4, 1) a step of 14.4 goes; then layer 0 gives all, of which (3, 1) takes back what 14.4 MACs allow
        (0.6, 0.4, [(1, 4), (4, 1), (1, 1)], [["1", 1, 15, 6.25], ["0", 1, 6, 12.75]], [36, 12]),
        # none saves 21.6
        (0.5, 0.6, [(1, 4), (4, 1)], [["1", 1, 15, 6.25]], [36, 15]),
    ],
)
def test_steps_that_no_layer_alone_can_save(reduction, step, seen, trace, left):
    """Each layer's whole remaining saving is tried instead."""
    damage, calls = recorder()
    plan = search(hand(), HAND_X, SCORES, damage, reduction, step=step)
    assert [widths_of(gone) for gone, _ in calls] == seen
    assert (plan.settings["trace"], plan.settings["macs"]) == (trace, left)


@given(st.data())
@settings(max_examples=15)
def test_all_is_within_reach_down_to_the_least_widths(data):
    """In steps of any size."""
    name = data.draw(st.sampled_from(["chain", "residual", "mixed"]))
    own, min_width = case(name), data.draw(st.integers(1, 3))
    least = own.macs(*[min_width] * len(own.widths))
    reduction, step = 1 - least / own.macs(*own.widths), data.draw(st.floats(0.05, 3))
    plan = search(
        own.model, own.example, draw_scores(name, 0), lambda net: 0.0, reduction, step=step, min_width=min_width,
        groups=found(name),
    )  # fmt: skip
    assert plan.settings["macs"] == [own.macs(*own.widths), least]


def test_budget_that_is_reached_exactly():
    plan = search(hand(), HAND_X, SCORES, recorder()[0], 30 / 36, step=1 / 36)
    assert plan.settings["macs"] == [36, 6]


def test_step_that_is_saved_exactly():
    """A filter saves 5 of 85 MACs, and a step 3 of 17 filters."""
    damage, calls = recorder(lambda gone: 0.0)
    search(one_by_one(2, 17, 3), HAND_X, {"0": torch.arange(17.0)}, damage, 0.75, step=3 / 17)
    assert [len(gone["0"]) for gone, _ in calls] == [3, 6, 9, 12, 15]


@pytest.mark.parametrize("options", [{"scores": {"2": torch.ones(3)}}, {"skip": ["0", "1"]}])
def test_nothing_to_search(options):
    with pytest.raises(ValueError, match="no layer with scores can be cut"):
        search(hand(), HAND_X, **{"scores": SCORES, "damage": recorder()[0], "reduction": 0.5, **options})


NAN, INF, COUNTS = math.nan, math.inf, (0, -2, 1.5, True, "2", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 1}, "reduction must be a number of at least 0 and below 1, got 1"),
        ({"reduction": -0.1}, "reduction must"),
        ({"reduction": NAN}, "reduction must"),
        ({"reduction": True}, "reduction must"),
        ({"reduction": "0.5"}, "reduction must"),
        ({"step": 0}, "step must be a positive number, got 0"),
        ({"step": -0.1}, "step must"),
        ({"step": NAN}, "step must"),
        ({"step": INF}, "step must"),
        *(({"min_width": value}, f"min_width must be at least 1 and whole, got {value!r}") for value in COUNTS),
        ({"skip": ["nope"]}, "skip: 'nope' is no convolution or linear layer"),
        ({"by": 3}, "by must be text, got 3"),
        ({"scores": {}}, "scores must map names"),
        ({"scores": {"7": torch.ones(4)}}, "scores: '7' is no convolution"),
        ({"scores": {"1": torch.ones(5)}}, r"scores of '1' must have shape \(4,\), one per filter, got \(5,\)"),
        ({"scores": {"1": torch.tensor([1, 2, 3, NAN])}}, "scores of '1' are not finite"),
        ({"damage": lambda net: INF}, "damage must be a finite number, got inf"),
        ({"damage": lambda net: -INF}, "damage must be a finite number, got -inf"),
        ({"damage": lambda net: torch.tensor(NAN)}, r"damage must be a finite number, got tensor\(nan\)"),
        ({"damage": lambda net: None}, "damage must be a finite number, got None without filters of '0'"),
        ({"damage": lambda net: "much"}, "damage must be a finite number, got 'much'"),
        ({"damage": None}, "damage must be a function of a model, got None"),
        ({"step": "0.1"}, "step must be a positive number, got '0.1'"),
        ({"step": None}, "step must"),
        ({"fold": "median"}, "fold must be one of mean, max, min, got 'median'"),
    ],
)
def test_what_is_refused(options, message):
    arguments = {"scores": SCORES, "damage": recorder()[0], "reduction": 0.5, "groups": hand_groups(), **options}
    with pytest.raises(ValueError, match=message):
        search(hand(), HAND_X, **arguments)


def test_damage_may_be_a_tensor_with_gradients():
    x = torch.ones(1, 2, 1, 1)
    plan = search(hand(), x, SCORES, lambda net: net(x).square().sum(), 0.2)
    assert plan.filters
