"""Segmentations by hand, against every segmentation there is, and as theorems; the squares on the heat map."""

from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from repgraph import between_layers, plot, segment_layers
from repgraph.metrics.similarity import cknna, linear_cka, procrustes

pytestmark = pytest.mark.usefixtures("nothing_global")

seeds = st.integers(0, 2**32 - 1)
NAMES = ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "head"]


def kernel(seed, size=6, d=3):
    points = np.random.default_rng(seed).normal(size=(size, d))
    return points @ points.T, points


def named(values, names=None, **attrs):
    names = list(names or NAMES[: len(values)])
    table = pd.DataFrame(np.asarray(values, dtype=float), index=names, columns=names)
    table.attrs = attrs
    return table


def by_definition(values, kind, rows):
    part = values[np.ix_(rows, rows)]
    if kind == "distance":
        return (part**2).sum() / (2 * len(rows))
    return part.trace() - part.sum() / len(rows)


def every(values, m, kind):
    """(cost, starts) of all segmentations into m runs, in the order of their cuts."""
    size = len(values)
    for cuts in combinations(range(1, size), m - 1):
        bounds = [0, *cuts, size]
        runs = [list(range(a, b)) for a, b in pairwise(bounds)]
        yield sum(by_definition(values, kind, run) for run in runs), bounds[:-1]


def starts(found):
    return np.cumsum([0, *(len(run) for run in found.runs[:-1])]).tolist()


# By hand


def test_blocks_are_found():
    table = named(np.kron(np.eye(3), np.ones((2, 2))))
    found = segment_layers(table, 3)
    assert found.runs == (("stem", "layer1.0"), ("layer1.1", "layer2.0"), ("layer2.1", "head"))
    assert (found.cost, found.m, found.kind) == (0, 3, "similarity")
    assert found.membership.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.membership.index.tolist() == NAMES


def test_distances_on_a_line():
    q = np.array([0.0, 0.1, 0.5, 0.6, 0.7])  # runs of 2 and 3: 2 * 0.05^2 + 2 * 0.1^2
    found = segment_layers(named(np.abs(q[:, None] - q), distance=True), 2)
    assert (starts(found), found.kind) == ([0, 2], "distance")
    assert found.cost == pytest.approx(0.025, abs=1e-12)


@pytest.mark.parametrize(("m", "expected"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
@pytest.mark.parametrize("value", [1, 1 / 3, 1e-9])
def test_ties_go_to_the_earliest_cut(m, expected, value):
    assert starts(segment_layers(np.full((4, 4), value), m)) == expected
    spread = np.eye(4) * value  # every layer alone: cost (L - m) value for any cuts
    assert starts(segment_layers(spread, m)) == expected


def test_one_layer():
    found = segment_layers(np.array([[0.7]]), 1)
    assert (found.runs, found.cost) == ((("0",),), 0)
    assert segment_layers(np.array([[0.0]]), 1, kind="distance").cost == 0


# Every segmentation


@given(seeds, st.integers(1, 8), st.data(), st.sampled_from(["similarity", "distance"]))
def test_least_cost_of_all_segmentations(seed, size, data, kind):
    m = data.draw(st.integers(1, size))
    values = np.random.default_rng(seed).normal(size=(size, size))  # no kernel: costs may be negative
    values = values + values.T + 3 * np.eye(size)
    if kind == "distance":
        values = np.abs(values) * (1 - np.eye(size))
    found = segment_layers(values, m, kind=kind)
    best, where = min(every(values, m, kind))
    assert found.cost == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert starts(found) == where
    assert [name for run in found.runs for name in run] == [str(i) for i in range(size)]


@given(st.lists(st.integers(0, 2), min_size=2, max_size=7), st.data())
def test_ties_are_the_first_of_all_segmentations(values, data):
    m = data.draw(st.integers(1, len(values)))
    distance = np.abs(np.subtract.outer(values, values)).astype(float)
    costs = list(every(distance, m, "distance"))
    best = min(cost for cost, _ in costs)
    first = next(where for cost, where in costs if cost <= best + 1e-9)
    assert starts(segment_layers(distance, m, kind="distance")) == first


# Theorems


@given(seeds, st.integers(1, 6))
def test_cost_is_the_sum_of_squared_deviations_of_the_points(seed, m):
    values, points = kernel(seed)
    found = segment_layers(values, m)
    runs = np.split(points, starts(found)[1:])
    assert found.cost == pytest.approx(sum(((run - run.mean(0)) ** 2).sum() for run in runs), abs=1e-10)


@given(seeds, st.integers(1, 6))
def test_a_kernel_and_its_distances_agree(seed, m):
    values, points = kernel(seed)
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    one, other = segment_layers(values, m), segment_layers(distance, m, kind="distance")
    assert one.runs == other.runs
    assert one.cost == pytest.approx(other.cost, abs=1e-10)


@given(seeds, st.floats(1e-6, 1e6))
def test_scale_and_translation_of_the_points(seed, scale):
    values, points = kernel(seed)
    found = segment_layers(values, 3)
    assert segment_layers(scale * values, 3).runs == found.runs
    assert segment_layers(scale * values, 3).cost == pytest.approx(scale * found.cost, rel=1e-9)
    moved = (points + 2) @ (points + 2).T
    assert segment_layers(moved, 3).cost == pytest.approx(found.cost, abs=1e-9)


@given(seeds)
def test_layers_in_reverse_order(seed):
    values, _ = kernel(seed)
    found, other = segment_layers(values, 3), segment_layers(values[::-1, ::-1], 3)
    assert other.cost == pytest.approx(found.cost, abs=1e-12)
    assert [len(run) for run in other.runs] == [len(run) for run in found.runs][::-1]


@given(seeds)
def test_cost_falls_with_m_to_0(seed):
    costs = [segment_layers(kernel(seed)[0], m).cost for m in range(1, 7)]
    assert all(a >= b - 1e-12 for a, b in pairwise(costs))
    assert costs[-1] == 0


def test_rows_as_points_is_another_segmentation():
    values = np.array([[1, 0.8, 0.3, 0.0], [0.8, 1, 0.7, 0.1], [0.3, 0.7, 1, 0.6], [0.0, 0.1, 0.6, 1]])
    found = segment_layers(named(values) @ named(values).T, 3, kind="similarity")
    rows = np.split(values, starts(found)[1:])
    assert found.cost == pytest.approx(sum(((run - run.mean(0)) ** 2).sum() for run in rows))


def test_likeness_without_small_differences_is_not_lost():
    """Layers that agree to 1e-12 of a large value: differences of sums over all layers would be noise."""
    values = np.full((40, 40), 1e6)
    values[:20, 20:] = values[20:, :20] = 1e6 - 1
    found = segment_layers(values, 2)
    assert (starts(found), found.cost) == ([0, 20], 0)


def layers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, found = torch.randn(40, 6, generator=generator), {}
    for i, name in enumerate(NAMES):
        x = x + (2 if i == 3 else 0.1) * torch.randn(40, 6, generator=generator)
        found[name] = x
    return found


@pytest.mark.parametrize(("measure", "kind"), [(linear_cka, "similarity"), (procrustes, "distance")])
def test_tables_of_between_layers(measure, kind):
    table = between_layers(measure, layers(), progress=False)
    found = segment_layers(table, 2)
    assert (found.kind, found.runs) == (kind, (tuple(NAMES[:3]), tuple(NAMES[3:])))
    assert segment_layers(table.to_numpy(), 2, kind=kind).cost == found.cost


# Refusals


@pytest.mark.parametrize(
    ("table", "m", "message"),
    [
        (np.ones((2, 3)), 1, r"must be a square table, layer x layer, got shape \(2, 3\)"),
        (np.ones(3), 1, r"got shape \(3,\)"),
        (np.ones((0, 0)), 1, r"got shape \(0, 0\)"),
        (named(np.eye(2)).rename(columns={"stem": "conv"}), 1, "the same in index and columns, got layers stem"),
        (named(np.eye(2)).rename_axis(index="a: net", columns="b: net"), 1, "got a: net stem.* and b: net stem"),
        (named(np.eye(2), ["a", "a"]), 1, "distinct names, got a, a"),
        (named([[1, np.nan], [np.nan, np.nan]]), 1, "finite, got nan or infinite values for layers layer1.0: drop"),
        (named([[1, np.inf], [np.inf, 1]]), 1, "for layers stem, layer1.0"),
        (named([[1, 0.5], [0.4, 1]]), 1, r"got 0.5 for \(stem, layer1.0\) and 0.4 .* pass \(table \+ table.T\) / 2"),
        (np.array([[0, 0.5], [0.5, 0]]), 1, "pass kind='distance'"),
        (named(np.eye(3) + 0.5, distance=True), 1, "pass kind='similarity'"),
        (named([[0, -1], [-1, 0]], distance=True), 1, "at least 0, got -1"),
        (np.eye(3), 0, "1 <= m <= L, got m = 0 with L = 3"),
        (np.eye(3), 4, "got m = 4 with L = 3"),
        (np.eye(3), True, "m must be an integer"),
        (np.eye(3), 2.0, "m must be an integer"),
    ],
)
def test_refusals(table, m, message):
    with pytest.raises(ValueError, match=message):
        segment_layers(table, m)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind must be 'similarity', 'distance' or None, got 'cka'"):
        segment_layers(np.eye(2), 1, kind="cka")


def test_rounding_between_the_halves_is_no_asymmetry():
    values = kernel(0)[0]
    assert segment_layers(values.astype(np.float32), 2).runs == segment_layers(values, 2).runs
    values[0, 1] *= 1 + 1e-7
    assert segment_layers(values, 2).m == 2


def test_the_advice_on_asymmetric_tables_works():
    table = between_layers(cknna, layers(), progress=False, k=5)
    assert segment_layers((table + table.T) / 2, 2).m == 2


def test_tiny_distances_are_not_taken_for_similarities():
    assert segment_layers(np.zeros((3, 3)), 2, kind="distance").cost == 0
    assert segment_layers(np.full((3, 3), 1e-8), 2, kind="distance").m == 2


# Squares on the heat map


def squares(ax):
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in ax.patches]


@pytest.fixture
def table():
    return between_layers(linear_cka, layers(), progress=False)


def test_heatmap_squares_are_the_runs(table):
    found = segment_layers(table, 3)
    ax = plot.heatmap(table, segments=found)
    expected = [(i - 0.5, i - 0.5, len(run), len(run)) for i, run in zip(starts(found), found.runs, strict=True)]
    assert squares(ax) == expected
    assert all(isinstance(patch, Rectangle) and not patch.get_fill() for patch in ax.patches)
    assert all(patch.get_zorder() > line.get_zorder() for patch in ax.patches for line in ax.lines)


def test_the_heatmap_s_title_tells(table):
    found = segment_layers(table, 2)
    title = plot.heatmap(table, segments=found).get_title("left")
    assert title.splitlines()[-1] == f"squares: 2 segments, cost {found.cost:.3g}"
    assert title.startswith("linear_cka, unbiased=False, n=40")
    bare = table.copy()
    bare.attrs = {"k": 5}
    title = plot.heatmap(bare.rename_axis(index=None), segments=found.membership).get_title("left")
    assert title == "squares: 2 segments"


def test_the_heatmap_s_view_stays(table):
    found = segment_layers(table, 2)
    with_squares, without = plot.heatmap(table, segments=found), plot.heatmap(table)
    assert (with_squares.get_xlim(), with_squares.get_ylim()) == (without.get_xlim(), without.get_ylim())
    assert not without.patches
    own = plt.subplots()[1]
    assert plot.heatmap(table, ax=own, segments=found) is own


def test_a_series_of_any_marks(table):
    marks = pd.Series(["a", "b", "b", "b", "c", "c"], index=NAMES)
    assert squares(plot.heatmap(table, segments=marks)) == [
        (-0.5, -0.5, 1, 1),
        (0.5, 0.5, 3, 3),
        (3.5, 3.5, 2, 2),
    ]


def test_an_array_s_segments_on_its_frame():
    values = np.kron(np.eye(2), np.ones((2, 2)))
    ax = plot.heatmap(pd.DataFrame(values), segments=segment_layers(values, 2))
    assert squares(ax) == [(-0.5, -0.5, 2, 2), (1.5, 1.5, 2, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.iloc[:, :4], "only in a table of one model's layers with themselves"),
        (lambda t: t.rename_axis(columns="b: attacked"), "only in a table of one model's layers"),
        (lambda t: t.iloc[:4, :4], "segments must have the table's 4 layers in its order, stem to layer2.0, got 6"),
    ],
)
def test_refused_on_other_tables(table, change, message):
    with pytest.raises(ValueError, match=message):
        plot.heatmap(change(table), segments=segment_layers(table, 2))


def test_marks_that_are_no_runs(table):
    with pytest.raises(ValueError, match="runs of consecutive layers"):
        plot.heatmap(table, segments=pd.Series([0, 0, 1, 1, 0, 0], index=NAMES))
    assert not plt.get_fignums()
