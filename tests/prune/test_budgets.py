"""Budgets of filters against plain loops, MACs against formulas written out by hand, and what is refused."""

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repgraph.cost import model_cost
from repgraph.prune import plan_filters, prunable_filters, prune_filters, rates_from_sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGETS = ["uniform", "global", "global_mean"]


# Networks whose groups and MACs are written out by hand


def one_by_one(*widths):
    """1 x 1 convolutions in a row; the last one is the output."""
    return nn.Sequential(*(nn.Conv2d(before, after, 1, bias=False) for before, after in pairwise(widths)))


class Residual(nn.Module):
    def __init__(self, width=6, inner=5):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.fc((x + y).relu().mean((2, 3)))


class Mixed(nn.Module):
    """A grouped and a depthwise convolution beside a plain one, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.side = nn.Conv2d(3, 5, 3, padding=1)
        self.fc = nn.Linear(17, 4)

    def forward(self, x):
        y = self.depthwise(self.grouped(self.stem(x).relu()).relu())
        return self.fc(torch.cat([y, self.side(x)], 1).relu().mean((2, 3)))


class Flattened(Mixed):
    """The same, flattened."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(17 * 16, 4)

    def forward(self, x):
        y = self.depthwise(self.grouped(self.stem(x).relu()).relu())
        return self.fc(torch.cat([y, self.side(x)], 1).relu().flatten(1))


@dataclass(frozen=True, eq=False)
class Case:
    model: nn.Module
    example: torch.Tensor
    groups: list[dict[str, list[tuple[int, ...]]]]
    """Of each group its layers, and of each layer the channels of every unit."""
    macs: Callable[..., int]
    """MACs at these numbers of units."""

    @property
    def widths(self):
        return [len(next(iter(own.values()))) for own in self.groups]

    @property
    def layers(self):
        return {name: sum(map(len, units)) for own in self.groups for name, units in own.items()}


def channels(width):
    return [(channel,) for channel in range(width)]


def pairs(width):
    """Units of a convolution in two groups."""
    return [(channel, channel + width // 2) for channel in range(width // 2)]


@cache
def case(name):
    torch.manual_seed(0)
    if name == "chain":
        plain = [{str(i): channels(width)} for i, width in enumerate((7, 10, 4))]
        return Case(
            one_by_one(2, 7, 10, 4, 3), torch.randn(1, 2, 2, 2), plain,
            lambda a, b, c: 4 * (2 * a + a * b + b * c + 3 * c),
        )  # fmt: skip
    if name == "residual":
        coupled = [{"stem": channels(6), "conv2": channels(6)}, {"conv1": channels(5)}]
        return Case(
            Residual().eval(), torch.randn(2, 3, 4, 4), coupled,
            lambda s, t: 2 * (16 * 9 * (3 * s + 2 * s * t) + 4 * s),
        )  # fmt: skip
    mixed = [{"stem": pairs(8)}, {"grouped": pairs(12), "depthwise": pairs(12)}, {"side": channels(5)}]
    return Case(
        Mixed().eval(), torch.randn(1, 3, 4, 4), mixed,
        lambda s, g, d: 16 * 9 * (3 * 2 * s + s * 2 * g + 2 * g + 3 * d) + 4 * (2 * g + d),
    )  # fmt: skip


CASES = ["chain", "residual", "mixed"]


@cache
def found(name):
    return prunable_filters(case(name).model, case(name).example)


def in_their_order(name):
    """The groups of a case in the order of `prunable_filters`, by which layers that tie go."""
    sets = [set(own) for own in case(name).groups]
    return [sets.index(set(group.layers)) for group in found(name).groups]


def draw_scores(name, seed, levels=1000):
    """Eighths, so that sums are exact; few levels make ties."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randint(-levels // 2, levels, (width,), generator=generator, dtype=torch.float64) / 8
        for layer, width in case(name).layers.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_groups_and_macs_by_hand(name):
    own = case(name)
    groups = found(name).groups
    assert sorted(sorted(group.layers) for group in groups) == sorted(map(sorted, own.groups))
    assert own.macs(*own.widths) == model_cost(own.model, own.example).macs == found(name).macs
    for group, place in zip(groups, in_their_order(name), strict=True):
        assert group.width == own.widths[place]
        for layer, units in own.groups[place].items():
            owner, unit = group.places[layer, "out"]
            made = [tuple(sorted(owner[unit == u].tolist())) for u in range(group.width)]
            assert made == units


# The definition: plain loops


def unit_scores_by_hand(name, scores, budget, ignore, fold):
    """(number of the group in the case, score of each unit), in the order of `prunable_filters`."""
    judged = []
    for place in in_their_order(name):
        own, votes = case(name).groups[place], []
        if set(own) & set(ignore):
            continue
        for layer, units in own.items():
            if layer not in scores:
                continue
            values = scores[layer].tolist()
            if budget == "global":
                order = order_by_hand(values)
                values = [(order.index(channel) + 1) / len(values) for channel in range(len(values))]
            if budget == "global_mean":
                size = sum(map(abs, values)) / len(values)
                values = [value / size if size else 0.0 for value in values]
            votes.append([sum(values[c] for c in unit) / len(unit) for unit in units])
        if votes:
            fold_of = {"mean": lambda v: sum(v) / len(v), "max": max, "min": min}[fold]
            judged.append((place, [fold_of(own) for own in zip(*votes, strict=True)]))
    return judged


def order_by_hand(values):
    """Places of values from the lowest on: of equal ones the highest number first."""
    return sorted(range(len(values)), key=lambda unit: (values[unit], -unit))


def layer_cuts(name, cut):
    """Group -> units as layer -> channels."""
    return {
        layer: tuple(sorted(c for unit in gone for c in units[unit]))
        for place, gone in cut.items()
        for layer, units in case(name).groups[place].items()
        if gone
    }


def macs_without(name, cut):
    own = case(name)
    return own.macs(*(width - len(cut.get(place, ())) for place, width in enumerate(own.widths)))


def by_hand(
    name, scores, ratio, budget="uniform", of="filters", ignore=(), fold="mean", min_keep=1, round_to=1, last=False
):
    """Group -> units that go; or why nothing does. With `last` also what goes without the last unit of the queue."""
    judged = unit_scores_by_hand(name, scores, budget, ignore, fold)
    if not judged:
        return "no layer with scores can be cut"
    orders = {place: order_by_hand(values) for place, values in judged}
    queue = []
    for turn, (place, values) in enumerate(judged):
        pace = 1.0
        if isinstance(budget, dict):
            rates = [budget[layer] for layer in case(name).groups[place] if layer in budget]
            pace = sum(rates) / len(rates) if rates else 0.0
        for k in range(1, len(values) - min_keep + 1 if pace else 0):
            unit = orders[place][k - 1]
            queue.append((values[unit] if budget in ("global", "global_mean") else k / (len(values) * pace), turn, k))
    queue.sort()

    def cut(counts):
        gone = {}
        for place, values in judged:
            kept = len(values) - counts[place]
            while kept % round_to and kept < len(values):
                kept += 1
            gone[place] = orders[place][: len(values) - kept]
        return gone

    def first(total):
        return cut({place: sum(turn == at for _, at, _ in queue[:total]) for turn, (place, _) in enumerate(judged)})

    if of == "macs":
        target = macs_without(name, {}) * (1 - ratio)
        fits = [total for total in range(len(queue) + 1) if macs_without(name, first(total)) <= target]
        if not fits:
            return f": {macs_without(name, first(len(queue))):,} is the least"
        if last:
            return first(fits[0]), first(fits[0] - 1)
        gone = first(fits[0])
    elif budget == "uniform":
        gone = cut({
            place: max(0, min(math.floor(len(own) * ratio + 1e-9), len(own) - min_keep)) for place, own in judged
        })  # fmt: skip
    else:
        gone = first(math.floor(sum(len(own) for _, own in judged) * ratio + 1e-9))
    return gone if any(gone.values()) or not ratio else "nothing would be cut"


sixty_fourths = st.integers(0, 63).map(lambda k: k / 64)  # shares whose MACs are exact in floating point
rates = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@given(st.data())
@settings(max_examples=50)
def test_every_budget_against_plain_loops(data):
    name = data.draw(st.sampled_from(CASES))
    layers = list(case(name).layers)
    some = st.lists(st.sampled_from(layers), unique=True)
    scored = data.draw(st.just(layers) | some.filter(len))
    scores = draw_scores(name, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 3, 1000])))
    scores = {layer: scores[layer] for layer in scored}
    options = {
        "budget": data.draw(
            st.sampled_from(BUDGETS)
            | st.dictionaries(st.sampled_from(layers), rates).filter(lambda own: any(own.values()))
        ),
        "of": data.draw(st.sampled_from(["filters", "macs"])),
        "ignore": data.draw(st.just([]) | some),
        "fold": data.draw(st.sampled_from(["mean", "max", "min"])),
        "min_keep": data.draw(st.integers(1, 4)),
        "round_to": data.draw(st.sampled_from([1, 1, 2, 3, 4])),
    }
    ratio = data.draw(sixty_fourths)
    expected = by_hand(name, scores, ratio, **options)
    own = case(name)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            plan_filters(own.model, own.example, scores, ratio, groups=found(name), **options)
    else:
        plan = plan_filters(own.model, own.example, scores, ratio, groups=found(name), **options)
        assert plan.filters == layer_cuts(name, expected)
        assert plan.settings["macs"] == [own.macs(*own.widths), macs_without(name, expected)]


# Shares of filters


@cache
def all_widths():
    model, example = one_by_one(1, *range(2, 27), 3), torch.zeros(1, 1, 1, 1)
    return model, example, prunable_filters(model, example)


@given(st.integers(1, 40).flatmap(lambda b: st.tuples(st.integers(0, b - 1), st.just(b))))
@settings(max_examples=12)
def test_uniform_removes_the_floor_of_every_width(share):
    """In whole numbers: of C filters floor(C a / b) go for ratio a / b, whatever binary rounding makes of it."""
    a, b = share
    model, example, groups = all_widths()
    scores = {str(i): torch.arange(float(width)) for i, width in enumerate(range(2, 27))}
    expected = {name: len(own) * a // b for name, own in scores.items()}
    expected = {name: tuple(range(count)) for name, count in expected.items() if count}
    if a and not expected:
        with pytest.raises(ValueError, match=f"nothing would be cut: with ratio {a / b}"):
            plan_filters(model, example, scores, a / b, groups=groups)
    else:
        assert plan_filters(model, example, scores, a / b, groups=groups).filters == expected


def count_cut(plan, name):
    return [len(plan.filters.get(next(iter(own)), ())) for own in case(name).groups]


@given(st.integers(0, 99), st.sampled_from(["global", "global_mean"]), st.integers(4, 13).map(lambda k: k / 21))
def test_global_budgets_remove_the_floor_of_all(seed, budget, ratio):
    own = case("chain")
    plan = plan_filters(own.model, own.example, draw_scores("chain", seed), ratio, budget=budget, groups=found("chain"))
    assert sum(count_cut(plan, "chain")) == round(21 * ratio)


@pytest.mark.parametrize(("ratio", "each"), [(0.25, 2), (0.75, 6)])
def test_global_is_uniform_on_equal_scores(ratio, each):
    model, x = one_by_one(2, 8, 8, 3), torch.zeros(1, 2, 1, 1)
    scores = {"0": torch.zeros(8), "1": torch.arange(8.0)}
    plan = plan_filters(model, x, scores, ratio, budget="global")
    assert {name: len(own) for name, own in plan.filters.items()} == {"0": each, "1": each}


def test_global_is_uniform_on_distinct_scores():
    own, scores = case("chain"), {"0": torch.randn(7), "1": torch.randn(10), "2": torch.randn(4)}
    for ratio in (0.3, 0.5, 0.8):
        plan = plan_filters(own.model, own.example, scores, ratio, budget="global", groups=found("chain"))
        for count, width in zip(count_cut(plan, "chain"), own.widths, strict=True):
            assert abs(count - ratio * width) < 1


def test_coupled_layers_that_disagree_keep_more_under_the_global_budget():
    own = case("residual")
    up, down = torch.arange(6.0), torch.arange(6.0).flip(0)
    scores = {"stem": up, "conv2": down, "conv1": torch.arange(5.0)}
    plan = plan_filters(own.model, own.example, scores, 0.2, budget="global", groups=found("residual"))
    assert plan.filters == {"conv1": (0, 1)}  # every channel of the stream ranks 7/12 on average


def test_of_equal_mean_ranks_the_lowest_number_stays():
    own, up = case("residual"), torch.arange(6.0)
    plan = plan_filters(
        own.model, own.example, {"stem": up, "conv2": up.flip(0)}, 0.5, budget="global", groups=found("residual")
    )
    assert plan.filters == dict.fromkeys(("stem", "conv2"), (3, 4, 5))


def test_global_mean_by_hand():
    """Divided by 2 and by 10: [0.5, 1.5, 0.5, 1.5] and [0.2, 1, 1.4, 1.4]; all by score, the lower index last."""
    model, x = one_by_one(2, 4, 4, 3), torch.zeros(1, 2, 1, 1)
    scores = {"0": torch.tensor([1.0, 3, -1, 3]), "1": torch.tensor([2.0, 10, 14, 14])}

    def cut(ratio):
        return plan_filters(model, x, scores, ratio, budget="global_mean", groups=groups).filters

    groups = prunable_filters(model, x)
    assert cut(1 / 8) == {"0": (2,)}  # -0.5: the sign stays
    assert cut(2 / 8) == {"0": (2,), "1": (0,)}
    assert cut(3 / 8) == {"0": (0, 2), "1": (0,)}
    assert cut(4 / 8) == {"0": (0, 2), "1": (0, 1)}
    assert cut(5 / 8) == {"0": (0, 2), "1": (0, 1, 3)}


@pytest.mark.parametrize("budget", BUDGETS)
def test_of_equal_scores_the_lowest_numbers_stay(budget):
    own = case("chain")
    scores = {layer: torch.zeros(width) for layer, width in own.layers.items()}
    plan = plan_filters(own.model, own.example, scores, 0.5, budget=budget, groups=found("chain"))
    assert sum(map(len, plan.filters.values())) >= 10
    for layer, cut in plan.filters.items():
        assert cut == tuple(range(own.layers[layer]))[-len(cut) :]


# MACs


@given(st.sampled_from(CASES), st.integers(0, 99), st.sampled_from([*BUDGETS, "rates"]), sixty_fourths.filter(bool))
@settings(max_examples=30)
def test_macs_are_met_within_one_filter(name, seed, budget, ratio):
    """The unit that went last, given back, breaks the budget."""
    own, scores = case(name), draw_scores(name, seed)
    budget = {layer: (i + 1) / 8 for i, layer in enumerate(own.layers)} if budget == "rates" else budget
    target = own.macs(*own.widths) * (1 - ratio)
    if own.macs(*[1] * len(own.widths)) > target:
        with pytest.raises(ValueError, match="cannot come down"):
            plan_filters(own.model, own.example, scores, ratio, budget=budget, of="macs", groups=found(name))
        return
    plan = plan_filters(own.model, own.example, scores, ratio, budget=budget, of="macs", groups=found(name))
    whole, left = plan.settings["macs"]
    assert whole == own.macs(*own.widths)
    assert left <= target
    gone, before = by_hand(name, scores, ratio, budget, "macs", last=True)
    assert layer_cuts(name, gone) == plan.filters
    assert sum(map(len, gone.values())) == sum(map(len, before.values())) + 1
    assert macs_without(name, before) > target


@given(st.integers(0, 99), st.sampled_from(BUDGETS), st.tuples(sixty_fourths, sixty_fourths))
def test_larger_shares_cut_supersets(seed, budget, ratios):
    own, (low, high) = case("mixed"), sorted(ratios)
    for of, limit in (("macs", 0.75), ("filters", 1)):
        plans = [
            plan_filters(
                own.model, own.example, draw_scores("mixed", seed), ratio * limit, budget=budget, of=of,
                groups=found("mixed"),
            )
            for ratio in (low, high) if ratio == 0 or ratio * limit > 0.3
        ]  # fmt: skip
        for layer, cut in plans[0].filters.items() if len(plans) == 2 else ():
            assert set(cut) <= set(plans[1].filters[layer])


class Squeezed(nn.Module):
    """A squeeze-and-excite gate, and a convolution that runs twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.again, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3))).relu()).relu()[:, :, None, None]
        return self.fc(self.again(self.again(x).relu()).relu().mean((2, 3)))


class Padded(nn.Module):
    """A module that pads with zero channels as the shortcut."""

    class Shortcut(nn.Module):
        def forward(self, x):
            return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 1, 1)
        self.short, self.fc = self.Shortcut(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc((self.conv2(self.conv1(x).relu()) + self.short(x)).relu().mean((2, 3)))


class PaddedInside(Padded):
    """The same, written in the forward of the block, as most code for CIFAR has it."""

    def forward(self, x):
        x = self.stem(x).relu()
        padded = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.fc((self.conv2(self.conv1(x).relu()) + padded).relu().mean((2, 3)))


class Attention(nn.Module):
    """One head."""

    def __init__(self):
        super().__init__()
        self.inp, self.out, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.inp(x)
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5
        return self.fc(self.out(scores.softmax(2) @ self.v(x)))


class FusedAttention(nn.Module):
    """One head, its queries, keys and values by one layer."""

    def __init__(self):
        super().__init__()
        self.inp, self.qkv, self.out, self.fc = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.inp(x)).chunk(3, 2)
        return self.fc(self.out((q @ k.transpose(1, 2) / 8**0.5).softmax(2) @ v))


class LinearAttention(Attention):
    """Keys times values first, whose MACs go with both widths."""

    def forward(self, x):
        x = self.inp(x)
        return self.fc(self.out(self.q(x).relu() @ (self.k(x).relu().transpose(1, 2) @ self.v(x))))


class Gram(nn.Module):
    """Products of all pairs of channels, whose MACs go with the square of the width."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu().flatten(2)
        return self.fc((x @ x.transpose(1, 2)).sum(2))


class NonLocal(nn.Module):
    """A block of non-local neural networks."""

    def __init__(self):
        super().__init__()
        self.stem, self.out, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 1), nn.Linear(8, 3)
        self.theta, self.phi, self.g = (nn.Conv2d(8, 4, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x).relu()
        a = self.theta(x).flatten(2).transpose(1, 2) @ self.phi(x).flatten(2)
        y = self.g(x).flatten(2) @ a.softmax(2).transpose(1, 2)
        return self.fc((x + self.out(y.unflatten(2, x.shape[2:]))).mean((2, 3)))


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=12
    )
    return transformers.BertModel(config).eval()


def transposed(groups):
    return nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 8, 3, 2, groups=groups), nn.ReLU(),
        nn.ConvTranspose1d(8, 4, 2), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(80, 5), nn.ReLU(), nn.Linear(5, 2),
    ).eval()  # fmt: skip


volumes = nn.Sequential(nn.Conv3d(1, 4, 2), nn.ReLU(), nn.Conv3d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(48, 2))


@pytest.mark.parametrize(
    ("make", "example"),
    [
        *(pytest.param(lambda n=n: case(n).model, lambda n=n: case(n).example, id=n) for n in CASES),
        pytest.param(Squeezed, lambda: torch.randn(2, 3, 5, 5), id="squeeze-excite, runs twice"),
        pytest.param(Padded, lambda: torch.randn(1, 3, 6, 6), id="zero-padded shortcut"),
        pytest.param(lambda: transposed(1), lambda: torch.randn(2, 3, 11), id="1-D, transposed, flattened"),
        pytest.param(lambda: volumes, lambda: torch.randn(2, 1, 4, 4, 4), id="3-D, grouped"),
        pytest.param(tiny_bert, lambda: torch.arange(10).reshape(2, 5), id="heads of BERT"),
        pytest.param(PaddedInside, lambda: torch.randn(1, 3, 6, 6), id="padded in the forward"),
        pytest.param(Flattened, lambda: torch.randn(1, 3, 4, 4), id="concatenated, flattened"),
        pytest.param(lambda: transposed(2), lambda: torch.randn(2, 3, 11), id="transposed, grouped"),
        pytest.param(Attention, lambda: torch.randn(2, 5, 6), id="one head"),
        pytest.param(FusedAttention, lambda: torch.randn(2, 5, 6), id="one head of one layer"),
        pytest.param(LinearAttention, lambda: torch.randn(2, 5, 6), id="linear attention"),
        pytest.param(NonLocal, lambda: torch.randn(1, 3, 6, 6), id="non-local block"),
        pytest.param(Gram, lambda: torch.randn(1, 3, 6, 6), id="Gram matrix"),
    ],
)  # fmt: skip
def test_foretold_macs_are_those_counted(make, example):
    torch.manual_seed(0)
    model, x = make(), example()
    weighted = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    scores = {n: torch.rand(getattr(m, "out_channels", 0) or m.out_features) for n, m in weighted.items()}
    plan = plan_filters(model, x, scores, 0.3, of="macs", budget="global")
    pruned = prune_filters(model, x, plan)
    assert plan.settings["macs"] == [pruned.before.macs, pruned.after.macs]
    assert pruned.after.macs <= 0.7 * pruned.before.macs


def test_heads_go_whole():
    model, x = tiny_bert(), torch.arange(10).reshape(2, 5)
    name = "encoder.layer.0.attention.self."
    scores = {name + "query": torch.arange(16.0).flip(0)}
    plan = plan_filters(model, x, scores, 0.5)
    assert plan.filters == {name + key: tuple(range(8, 16)) for key in ("query", "key", "value")}
    b, t, d, heads = 2, 5, 16, 2
    products, inputs, rest = b * t * t * 2 * 4 * heads, b * t * d * 4 * heads * 3, b * t * (4 * heads * d + 2 * d * 12)
    assert plan.settings["macs"][1] == products + inputs + rest + b * d * d  # and the pooler


@pytest.mark.parametrize("budget", BUDGETS)
def test_macs_that_cannot_be_reached(budget):
    """2 a + a b + 3 b of 4 and 4 filters is 36, of 1 and 1 it is 6."""
    model, x = one_by_one(2, 4, 4, 3), torch.zeros(1, 2, 1, 1)
    scores, groups = {"0": torch.arange(4.0), "1": torch.arange(4.0)}, prunable_filters(model, x)

    def plan(ratio, **options):
        return plan_filters(model, x, scores, ratio, of="macs", budget=budget, groups=groups, **options)

    assert plan(0.83).settings["macs"] == [36, 6]
    for ratio, options, least in [
        (0.86, {}, 6), (0.7, {"min_keep": 2}, 14), (0.7, {"round_to": 2}, 14), (0.6, {"ignore": ["1"]}, 18),
        (0.9, {"min_keep": 9}, 36),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"cannot come down to {36 * (1 - ratio):.0f}: .*\b{least} is the least"):
            plan(ratio, **options)


@pytest.mark.parametrize("left", [6, 14])
def test_macs_that_are_reached_exactly(left):
    """On the path (4, 4), (3, 4), (3, 3), ..., (1, 1); of a batch as many times. There is room of 1e-9 of the whole."""
    model, scores = one_by_one(2, 4, 4, 3), {"0": torch.arange(4.0), "1": torch.arange(4.0)}
    for batch in (1, 7, 49):
        x = torch.zeros(batch, 2, 1, 1)
        groups = prunable_filters(model, x)
        for more in (0, 9e-10):
            plan = plan_filters(model, x, scores, (36 - left) / 36 + more, of="macs", groups=groups)
            assert plan.settings["macs"] == [36 * batch, left * batch]
        with nullcontext() if left > 6 else pytest.raises(ValueError, match="cannot come down"):
            plan = plan_filters(model, x, scores, (36 - left) / 36 + 2e-9, of="macs", groups=groups)
            assert plan.settings["macs"][1] < left * batch


# Coupled layers


def test_fold_by_hand():
    """Mean 4.5, 2.25, 3; max 9, 4, 3; min 0, 0.5, 3."""
    model, x = Residual(3, 5), torch.zeros(2, 3, 4, 4)
    scores, groups = {"stem": torch.tensor([0, 0.5, 3]), "conv2": torch.tensor([9.0, 4, 3])}, prunable_filters(model, x)
    for fold, channel in (("mean", 1), ("max", 2), ("min", 0)):
        plan = plan_filters(model, x, scores, 0.4, fold=fold, groups=groups)
        assert plan.filters == {"stem": (channel,), "conv2": (channel,)}


def test_coupling_by_hand():
    """Check 2 of note 19."""
    model, x = Residual(8), torch.zeros(2, 3, 4, 4)
    scores, groups = {"stem": torch.arange(1.0, 9)}, prunable_filters(model, x)
    assert plan_filters(model, x, scores, 0.5, groups=groups).filters["conv2"] == (0, 1, 2, 3)
    scores["conv2"] = torch.tensor([9.0] * 4 + [0.0] * 4)
    assert plan_filters(model, x, scores, 0.5, groups=groups).filters == dict.fromkeys(("stem", "conv2"), (4, 5, 6, 7))


def test_units_of_grouped_convolutions_are_judged_by_the_mean():
    own = case("mixed")
    scores = {"grouped": torch.tensor([9.0, 1, 1, 1, 1, 1, 0, 0, 4, 3, 5, 6])}  # means 4.5, 0.5, 2.5, 2, 3, 3.5
    plan = plan_filters(own.model, own.example, scores, 0.5, groups=found("mixed"))
    assert plan.filters == dict.fromkeys(("grouped", "depthwise"), (1, 2, 3, 7, 8, 9))


@pytest.mark.parametrize("ignored", ["stem", "conv2"])
def test_ignoring_one_layer_keeps_all_that_are_coupled_to_it(ignored):
    own = case("residual")
    plan = plan_filters(
        own.model, own.example, draw_scores("residual", 0), 0.5, ignore=[ignored], groups=found("residual")
    )
    assert set(plan.filters) == {"conv1"}
    with pytest.raises(ValueError, match="no layer with scores can be cut"):
        plan_filters(
            own.model, own.example, draw_scores("residual", 0), 0.5, ignore=[ignored, "conv1"], groups=found("residual")
        )


def test_layers_without_scores_are_left_alone():
    own, scores = case("residual"), draw_scores("residual", 0)
    plan = plan_filters(own.model, own.example, {"conv1": scores["conv1"]}, 0.5, groups=found("residual"))
    assert set(plan.filters) == {"conv1"}
    with pytest.raises(ValueError, match=r"cannot come down .*: 8,688 is the least"):  # 2 (16 * 9 (18 + 12) + 24)
        plan_filters(own.model, own.example, {"conv1": scores["conv1"]}, 0.9, of="macs", groups=found("residual"))


def test_layers_that_cannot_be_cut_are_named():
    own, groups = case("residual"), found("residual")
    for more, left in (({}, {}), ({"fc": torch.ones(4)}, {"fc": "they are the model's output"})):
        plan = plan_filters(own.model, own.example, {**draw_scores("residual", 0), **more}, 0.5, groups=groups)
        assert plan.settings["left"] == left
    with pytest.raises(ValueError, match=r"no layer with scores can be cut .'fc': they are the model's output"):
        plan_filters(own.model, own.example, {"fc": torch.ones(4)}, 0.5, groups=groups)


def test_layers_that_do_not_run_are_named():
    model = Residual()
    model.idle = nn.Conv2d(3, 4, 1)
    scores = {**draw_scores("residual", 0), "idle": torch.ones(4)}
    plan = plan_filters(model, torch.zeros(2, 3, 4, 4), scores, 0.5)
    assert plan.settings["left"] == {"idle": "it does not run on the example"}


# Limits


def widths_left(plan, name):
    return [width - count for width, count in zip(case(name).widths, count_cut(plan, name), strict=True)]


@pytest.mark.parametrize("budget", [*BUDGETS, {"0": 0.9, "1": 0.9, "2": 0.9}])
@pytest.mark.parametrize("of", ["filters", "macs"])
def test_least_widths_and_multiples(budget, of):
    own, scores = case("chain"), draw_scores("chain", 3)

    def left(ratio, **options):
        plan = plan_filters(
            own.model, own.example, scores, ratio, budget=budget, of=of, groups=found("chain"), **options
        )
        return widths_left(plan, "chain")

    assert min(left(0.6, min_keep=3)) >= 3
    assert all(kept in (3, 6, width) for kept, width in zip(left(0.5, round_to=3), own.widths, strict=True))
    assert all(kept in (5, width) for kept, width in zip(left(0.4, min_keep=4, round_to=5), own.widths, strict=True))


def test_uniform_widths_are_rounded_up():
    """Kept of 7, 10 and 4 at 0.4: 5, 6 and 3; in multiples of 3 that is 6, 6 and 3, of 4 7, 8 and 4, of 8 7, 8, 4."""
    own, scores = case("chain"), draw_scores("chain", 0)
    for multiple, kept in ((1, [5, 6, 3]), (3, [6, 6, 3]), (4, [7, 8, 4]), (8, [7, 8, 4])):
        plan = plan_filters(own.model, own.example, scores, 0.4, round_to=multiple, groups=found("chain"))
        assert widths_left(plan, "chain") == kept


def test_ratio_0_cuts_nothing():
    own = case("residual")
    for of in ("filters", "macs"):
        plan = plan_filters(own.model, own.example, draw_scores("residual", 0), 0, of=of, groups=found("residual"))
        assert (plan.filters, plan.settings["macs"]) == ({}, [own.macs(6, 5)] * 2)


# Rates


def test_rates_from_sensitivity_as_a_budget():
    """Check 1 of note 16: N p = [0.712, 3.797, 9.492]; k / (N p) of the 14 that go first."""
    model, x = one_by_one(2, 4, 8, 16, 3), torch.zeros(1, 2, 1, 1)
    scores, groups = {str(i): torch.arange(4.0 * 2**i) for i in range(3)}, prunable_filters(model, x)
    rates = rates_from_sensitivity([0.30, 0.10, 0.02], [4, 8, 16], 14).rates.tolist()
    budget = dict(zip("012", rates, strict=True))
    queue = sorted((k / (4 * 2**i * rate), i) for i, rate in enumerate(rates) for k in range(1, 4 * 2**i))
    counts = {str(i): sum(at == i for _, at in queue[:14]) for i in range(3)}
    assert counts == {"0": 0, "1": 4, "2": 10}
    for scale in (1, 4, 0.125):  # only their proportions matter
        scaled = {name: rate * scale for name, rate in budget.items()}
        plan = plan_filters(model, x, scores, 0.5, budget=scaled, groups=groups)
        assert plan.filters == {name: tuple(range(count)) for name, count in counts.items() if count}


def test_layers_of_rate_0_or_without_a_rate_keep_all():
    own, scores = case("chain"), draw_scores("chain", 0)
    for budget in ({"1": 0.5}, {"0": 0, "1": 0.5, "2": 0.0}):
        plan = plan_filters(own.model, own.example, scores, 0.4, budget=budget, groups=found("chain"))
        assert {name: len(cut) for name, cut in plan.filters.items()} == {"1": 8}
    with pytest.raises(ValueError, match="nothing would be cut"):
        plan_filters(own.model, own.example, scores, 0.4, budget={"3": 0.5}, groups=found("chain"))


@given(st.integers(0, 99), sixty_fourths.filter(lambda ratio: ratio < 0.75))
def test_equal_rates_are_uniform_in_macs(seed, ratio):
    own, scores = case("mixed"), draw_scores("mixed", seed)
    equal = dict.fromkeys(own.layers, 0.25)
    plans = [
        plan_filters(own.model, own.example, scores, ratio, of="macs", budget=budget, groups=found("mixed")).filters
        for budget in ("uniform", equal)
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda values: dict(zip("012", values, strict=True)), id="numbers of the tensor"),
        pytest.param(lambda values: pd.Series(values.numpy(), list("012")), id="series"),
    ],
)
def test_rates_of_other_makes(kind):
    own, scores = case("chain"), draw_scores("chain", 0)
    values = rates_from_sensitivity([0.3, 0.1, 0.02], own.widths, 8).rates
    expected = dict(zip("012", values.tolist(), strict=True))
    plans = [
        plan_filters(own.model, own.example, scores, 8 / 21, budget=budget, groups=found("chain"))
        for budget in (expected, kind(values))
    ]
    assert plans[0] == plans[1]
    assert type(plans[1]).from_json(plans[1].to_json()) == plans[1]


# Invariances


def same_plans(name, scores, others, budget, *, fold="mean"):
    own, plans = case(name), []
    for ratio, of in ((0.5, "filters"), (0.375, "macs"), (0.75, "filters")):
        plans.append([
            plan_filters(
                own.model, own.example, values, ratio, of=of, budget=budget, fold=fold, groups=found(name)
            ).filters
            for values in (scores, others)
        ])  # fmt: skip
    return all(a == b for a, b in plans)


@given(st.sampled_from(CASES), st.integers(0, 99), st.sampled_from(BUDGETS), st.sampled_from([0.125, 0.5, 4.0, 1024.0]))
@settings(max_examples=12)
def test_no_budget_sees_a_common_scale(name, seed, budget, scale):
    scores = draw_scores(name, seed, 9)
    assert same_plans(name, scores, {layer: scale * own for layer, own in scores.items()}, budget)


@given(st.sampled_from(CASES), st.integers(0, 99), st.integers(0, 9), st.sampled_from(["global", "global_mean"]))
@settings(max_examples=12)
def test_global_budgets_see_no_scale_of_a_layer(name, seed, other, budget):
    scores = draw_scores(name, seed, 9)
    scaled = {layer: 2.0 ** (other * i % 7 - 3) * own for i, (layer, own) in enumerate(scores.items())}
    assert same_plans(name, scores, scaled, budget)


@given(st.sampled_from(CASES), st.integers(0, 99), st.sampled_from(["mean", "max", "min"]))
@settings(max_examples=12)
def test_global_sees_only_the_order_within_a_layer(name, seed, fold):
    scores = draw_scores(name, seed, 9)
    bent = {layer: (own / (i + 1)).exp() - i for i, (layer, own) in enumerate(scores.items())}
    assert same_plans(name, scores, bent, "global", fold=fold)


@given(st.integers(0, 99))
@settings(max_examples=12)
def test_uniform_sees_only_the_order_within_a_layer(seed):
    scores = draw_scores("chain", seed, 9)
    assert same_plans("chain", scores, {layer: (own - 5) ** 3 for layer, own in scores.items()}, "uniform")


def test_uniform_sees_the_scales_of_coupled_layers():
    up, down = torch.arange(6.0), torch.arange(6.0).flip(0)
    scores = {"stem": 2 * up, "conv2": down}
    assert not same_plans("residual", scores, {"stem": up, "conv2": 2 * down}, "uniform")


def test_global_mean_sees_more_than_the_order():
    model, x = one_by_one(2, 4, 4, 3), torch.zeros(1, 2, 1, 1)
    scores = {"0": torch.tensor([1, 1.1, 1.2, 1.3]), "1": torch.tensor([0.1, 1, 2, 3])}
    cubes = {layer: own**3 for layer, own in scores.items()}
    plans = [plan_filters(model, x, s, 5 / 8, budget="global_mean").filters for s in (scores, cubes)]
    assert plans == [{"0": (0, 1, 2), "1": (0, 1)}, {"0": (0, 1), "1": (0, 1, 2)}]


# No trace, the same again


@pytest.mark.parametrize("budget", BUDGETS)
def test_same_plan_again_and_with_groups(budget):
    own, scores = case("mixed"), draw_scores("mixed", 0, 4)
    kept = {name: value.clone() for name, value in scores.items()}
    plans = [
        plan_filters(own.model, own.example, scores, 0.4, budget=budget, of="macs", groups=groups)
        for groups in (None, None, found("mixed"))
    ]
    assert all(plan == plans[0] for plan in plans)
    assert all(torch.equal(scores[name], value) for name, value in kept.items())


def test_model_comes_out_untouched():
    torch.manual_seed(0)
    model, calls = Residual().train(), []
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    before, drawn = deepcopy(model.state_dict()), torch.get_rng_state()
    parameters = [(id(p), p.data_ptr(), p.requires_grad, id(p.grad)) for p in model.parameters()]
    modes, hooks = [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plan_filters(model, x, draw_scores("residual", 0), 0.5)
    with pytest.raises(ValueError, match="the least"):
        plan_filters(model, x, draw_scores("residual", 0), 0.99, of="macs")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert parameters == [(id(p), p.data_ptr(), p.requires_grad, id(p.grad)) for p in model.parameters()]
    assert (modes, hooks) == (
        [m.training for m in model.modules()],
        [len(m._forward_hooks) for m in model.modules()],
    )


def test_wrappers_are_looked_through():
    own, scores = case("residual"), draw_scores("residual", 0)
    plan = plan_filters(own.model, own.example, scores, 0.5)
    assert plan_filters(nn.DataParallel(own.model), own.example, scores, 0.5) == plan


def test_settings():
    own, scores = case("chain"), draw_scores("chain", 0)
    plan = plan_filters(
        own.model, own.example, scores, 0.5, budget="global", of="macs", fold="max", ignore="0", min_keep=2, round_to=2,
        by="noise", groups=found("chain"),
    )  # fmt: skip
    expected = {"ratio": 0.5, "budget": "global", "of": "macs", "fold": "max"}
    expected |= {"ignore": ["0"], "min_keep": 2, "round_to": 2}
    assert plan.by == "noise"
    assert {name: plan.settings[name] for name in expected} == expected
    assert type(plan).from_json(plan.to_json()) == plan


# What is refused

NAN, INF, COUNTS = math.nan, math.inf, (0, -2, 1.5, True, "2", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1}, "ratio must be a number of at least 0 and below 1, got 1"),
        ({"ratio": -0.1}, "ratio must"),
        ({"ratio": NAN}, "ratio must"),
        ({"ratio": INF}, "ratio must"),
        ({"ratio": True}, "ratio must"),
        ({"ratio": "0.5"}, "ratio must"),
        ({"ratio": None}, "ratio must"),
        ({"ratio": 0.01}, "nothing would be cut: with ratio 0.01"),
        ({"of": "flops"}, "of must be 'filters' or 'macs', got 'flops'"),
        ({"of": None}, "of must"),
        ({"budget": "local"}, "budget must be 'uniform', 'global', 'global_mean' or rates by layer, got 'local'"),
        ({"budget": None}, "budget must"),
        ({"budget": [0.5, 0.5]}, "budget must"),
        *(({"min_keep": value}, f"min_keep must be at least 1 and whole, got {value!r}") for value in COUNTS),
        *(({"round_to": value}, f"round_to must be at least 1 and whole, got {value!r}") for value in COUNTS),
        ({"ignore": ["nope"]}, "ignore: 'nope' is no convolution or linear layer"),
        ({"ignore": ["bn"]}, "ignore: 'bn' is no convolution"),
        ({"by": 3}, "by must be text, got 3"),
        ({"scores": {}}, "scores must map names"),
        ({"scores": torch.ones(6)}, "scores must map names of layers to one number per filter, got Tensor"),
        ({"scores": {"stem.": torch.ones(6)}}, "scores: 'stem.' is no convolution .* close are 'stem'"),
        ({"scores": {"bn": torch.ones(6)}}, "scores: 'bn' is no convolution"),
        ({"scores": {"conv1": torch.ones(6)}}, r"scores of 'conv1' must have shape \(5,\), one per filter, got \(6,\)"),
        ({"scores": {"conv1": torch.ones(5, 1)}}, r"scores of 'conv1' must have shape \(5,\)"),
        ({"scores": {"conv1": torch.tensor(1.0)}}, r"scores of 'conv1' must have shape \(5,\)"),
        ({"scores": {"conv1": torch.tensor([1, 2, 3, 4, NAN])}}, "scores of 'conv1' are not finite"),
        ({"scores": {"conv1": torch.tensor([1, 2, 3, 4, INF])}}, "scores of 'conv1' are not finite"),
        ({"fold": "median"}, "fold must be one of mean, max, min, got 'median'"),
        ({"fold": None}, "fold must"),
        ({"budget": {}}, "budget must hold rates of at least 0, one above, got {}"),
        ({"budget": {"conv1": 0.0}}, "budget must hold rates"),
        ({"budget": {"conv1": NAN}}, "budget must hold rates"),
        ({"budget": {"conv1": INF}}, "budget must hold rates"),
        ({"budget": {"conv1": -1.0, "stem": 0.5}}, "budget must hold rates"),
        ({"budget": {"conv1": "much"}}, "budget must map layers to rates, got {'conv1': 'much'}"),
        ({"budget": {"conv1": 0.5, "conv9": 0.5}}, "budget: 'conv9' is no convolution"),
        ({"groups": "same"}, "groups must be what prunable_filters gives for this model"),
    ],
)
def test_what_is_refused(options, message):
    own = case("residual")
    arguments = {"scores": draw_scores("residual", 0), "ratio": 0.5, "groups": found("residual"), **options}
    with pytest.raises(ValueError, match=message):
        plan_filters(own.model, own.example, **arguments)


def test_no_model():
    with pytest.raises(TypeError, match="model"):
        plan_filters(3, torch.zeros(1), {"0": torch.ones(2)}, 0.5)


def test_one_name_in_place_of_a_list():
    model, x = one_by_one(*[3] * 13), torch.zeros(1, 3, 1, 1)
    scores, groups = {str(i): torch.arange(3.0) for i in range(11)}, prunable_filters(model, x)
    plans = [plan_filters(model, x, scores, 0.5, ignore=names, groups=groups) for names in ("10", ["10"])]
    assert plans[0] == plans[1]
    assert plans[0].filters == {str(i): (0,) for i in range(10)}


@pytest.mark.parametrize("other", [(2, 9, 10, 4, 3), (2, 7, 10)], ids=["wider", "shorter"])
def test_groups_of_another_network(other):
    model, scores = one_by_one(*other), {"0": torch.arange(float(other[1]))}
    with pytest.raises(ValueError, match="groups must be what prunable_filters gives for this model"):
        plan_filters(model, torch.randn(1, 2, 2, 2), scores, 0.5, groups=found("chain"))
