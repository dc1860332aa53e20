"""The figure of a plan holds its scores, in order, with what is dropped in orange."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color

from repgraph import plot
from repgraph.demo import digits, digits_resnet
from repgraph.prune import Plan, drop_layers, layer_scores, plan_layers

pytestmark = pytest.mark.usefixtures("nothing_global")

SCORES = {"layer1.0": 0.3, "layer1.1": -0.1, "layer1.2": 0.05, "layer2.1": 0.2}
ORANGE = "#D55E00"


def plan_of(**options):
    return Plan(**({"layers": ("layer1.1", "layer1.2"), "by": "block_influence", "scores": SCORES} | options))


def orange(ax):
    return [same_color(bar.get_facecolor(), ORANGE) for bar in ax.patches]


def test_bars_hold_the_scores_and_dropped_ones_are_orange():
    ax = plot.plan(plan_of())
    assert isinstance(ax, Axes)
    assert [bar.get_height() for bar in ax.patches] == list(SCORES.values())
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx(range(4))
    assert orange(ax) == [False, True, True, False]
    assert len({bar.get_facecolor() for bar in ax.patches}) == 2
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(SCORES)
    assert ax.get_ylabel() == "block influence"
    assert ax.get_title() == "2 of 4 layers dropped (orange)"


@pytest.mark.parametrize("layers", [(), tuple(SCORES)])
def test_none_or_all_dropped(layers):
    ax = plot.plan(plan_of(layers=layers))
    assert orange(ax) == [bool(layers)] * 4
    assert ax.get_title() == f"{len(layers)} of 4 layers dropped (orange)"


@pytest.mark.parametrize("threshold", [0.07, 0.0, -0.05])
def test_threshold_is_a_dashed_line(threshold):
    ax = plot.plan(plan_of(threshold=threshold))
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[threshold, threshold]]


def test_without_threshold_only_zero_is_a_line():
    ax = plot.plan(plan_of())
    assert [list(line.get_ydata()) for line in ax.lines] == [[0, 0]]


def test_repaired_layers_are_dropped_ones():
    assert orange(plot.plan(plan_of(repairs={"layer1.1": 1}))) == [False, True, True, False]


def test_given_axes_are_used_and_no_others():
    figure, (left, right) = plt.subplots(1, 2)
    assert plot.plan(plan_of(), ax=right) is right
    assert len(right.patches) == 4
    assert not left.patches
    assert plt.get_fignums() == [figure.number]


def test_new_axes_are_wider_for_more_layers():
    many = Plan(layers=("5",), scores={str(i): float(i) for i in range(60)})
    few, wide = (plot.plan(plan).figure.get_figwidth() for plan in (plan_of(), many))
    assert wide > few


def test_plan_without_scores_is_refused():
    with pytest.raises(ValueError, match="plan must have scores to draw, this one only names layers"):
        plot.plan(Plan(layers=("layer1.1",)))
    assert not plt.get_fignums()


def test_title_counts_the_orange_bars():
    ax = plot.plan(plan_of(layers=("layer1.1", "layer9.9")))
    assert ax.get_title() == f"{sum(orange(ax))} of 4 layers dropped (orange)"


def test_of_a_real_cut():
    model, data = digits_resnet(), digits()
    scores = layer_scores(model, data, by=["block_influence"], samples=60, progress=False)["block_influence"]
    pruned = drop_layers(model, plan_layers(scores, 3), data[0][:2])
    ax = plot.plan(pruned.plan)
    np.testing.assert_array_equal([bar.get_height() for bar in ax.patches], scores.to_numpy())
    assert orange(ax) == [name in pruned.plan.layers for name in scores.index]
    assert sum(orange(ax)) == 3
