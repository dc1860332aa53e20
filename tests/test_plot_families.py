"""Figures of families, units, complexity and partitions hold the numbers given and touch nothing else."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import FillBetweenPolyCollection, LineCollection, PolyCollection
from torch import nn

from repgraph import Activations, capture, plot, profile, profile_activations
from repgraph.metrics.complexity import transformation_complexity
from repgraph.metrics.feature_entropy import unit_feature_entropy
from repgraph.metrics.spline import slice_partition, slice_through_samples

FAMILIES = ["modularity", "gbs_previous", "cka_previous", "feature_entropy", "complexity", "local_complexity"]
METRICS = ("modularity", "gbs", "cka", "feature_entropy", "complexity", "spline")
pytestmark = pytest.mark.usefixtures("nothing_global")


def chain():
    torch.manual_seed(0)
    convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 3), (3, 4))]
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)).eval()


@pytest.fixture(scope="module")
def table():
    x = torch.randn(40, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    data = (x, torch.arange(40) % 2)
    return profile(chain(), data, layers=["1", "3", "5"], n=20, repeats=2, metrics=METRICS, progress=False)


@pytest.fixture(scope="module")
def units():
    generator = torch.Generator().manual_seed(1)
    maps = {
        "wide": torch.rand(40, 6, 7, 7, generator=generator),
        "narrow": torch.rand(40, 3, 5, 5, generator=generator),
    }
    maps["single"] = maps["wide"][:, :1]
    return unit_feature_entropy(maps, torch.arange(40) % 2, progress=False)


def report_of(labels=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(2))
    return transformation_complexity(net, x, labels, lam=0.2, progress=False)


def net_2d(outputs=3):
    """All outputs are zero at the origin, where decision boundaries meet."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, outputs)).eval()
    with torch.no_grad():
        net[4].bias -= net(torch.zeros(2))
    return net


SQUARE = [[-2, -1], [2, -1], [2, 1], [-2, 1]]


def cells_of(net=None, **options):
    return slice_partition(net or net_2d(), torch.zeros(2), torch.eye(2), SQUARE, progress=False, **options)


def lines_of(ax):
    return [np.asarray(line.get_ydata(), float) for line in ax.lines]


def texts_of(ax):
    return [text.get_text() for text in ax.texts]


def of_type(ax, kind):
    return [one for one in ax.collections if type(one) is kind]


def assert_holds(lines, *expected):
    assert len(lines) == len(expected)
    for found, values in zip(lines, expected, strict=True):
        np.testing.assert_allclose(found, values)


@pytest.mark.parametrize("column", ["feature_entropy", "complexity", "label_information"])
def test_curve_draws_floor_and_ceiling_of_its_column(table, column):
    ax = plot.curve(table, column=column)
    limits = [f"{column}_ceiling", *([f"{column}_floor"] if column == "feature_entropy" else [])]
    assert_holds(lines_of(ax), table[column], *(table[name] for name in limits))
    assert texts_of(ax) == ["ceiling", "noise"][: len(limits)]
    assert [line.get_linestyle() for line in ax.lines[1:]] == [":"] * len(limits)
    (band,) = of_type(ax, FillBetweenPolyCollection)
    heights = band.get_paths()[0].vertices[:, 1]
    mean, std = table[column], table[f"{column}_std"]
    assert (heights.min(), heights.max()) == pytest.approx(((mean - std).min(), (mean + std).max()))


def test_curve_of_a_family_without_bounds_draws_none(table):
    assert_holds(lines_of(plot.curve(table, column="local_complexity")), table["local_complexity"])
    ax = plot.curve(table, column="gbs_previous")
    assert_holds(lines_of(ax), table["gbs_previous"], table["gbs_previous_null"])
    assert texts_of(ax) == ["samples shuffled"]
    ax = plot.curve(table, column="modularity")
    assert_holds(lines_of(ax), table["modularity"], table["null"], table["ceiling"])


def test_curve_takes_the_main_column_of_the_first_family(table):
    columns = table.columns.tolist()
    ax = plot.curve(table[columns[columns.index("feature_entropy") :]])
    assert ax.get_ylabel() == "feature entropy, nats"
    np.testing.assert_allclose(ax.lines[0].get_ydata(), table["feature_entropy"])
    ax = plot.curve(table[["gates", "complexity", "complexity_std"]])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), table["complexity"])


def test_curve_of_regions_alone_is_no_mean_over_columns():
    acts = capture(chain(), torch.randn(20, 1, 5, 5), ["1", "3", "gates"], progress=False)
    table = profile_activations(acts, n=20, repeats=1, metrics=("spline",), progress=False)
    np.testing.assert_allclose(plot.curve(table).lines[0].get_ydata(), table["regions"])


def test_main_columns_are_in_the_order_of_the_families(table):
    assert plot.main_columns(table) == FAMILIES
    assert plot.main_columns(table[table.columns[::-1]]) == FAMILIES
    some = table[["features", "complexity_std", "regions", "feature_entropy"]]
    assert plot.main_columns(some) == ["feature_entropy", "regions"]
    assert plot.main_columns(table[["features", "isolated"]]) == []
    labelless = pd.DataFrame({"community_modularity": [0.5], "complexity": [1.0]}, index=["a"])
    assert plot.main_columns(labelless) == ["community_modularity", "complexity"]


def test_curves_are_one_panel_per_family(table):
    axes = plot.curves(table)
    assert axes.shape == (len(FAMILIES),)
    for ax, name in zip(axes, FAMILIES, strict=True):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), table[name])
    assert [bool(ax.get_title(loc="left")) for ax in axes] == [True] + [False] * 5
    assert len({ax.figure for ax in axes}) == 1
    axes[0].figure.canvas.draw()
    shown = [[tick.label1.get_visible() for tick in ax.xaxis.get_major_ticks()] for ax in axes]
    assert [any(one) for one in shown] == [False] * 5 + [True]
    assert [tick.get_text() for tick in axes[-1].get_xticklabels()] == table.index.tolist()


def test_curves_of_given_columns_draw_into_given_axes(table):
    figure, given = plt.subplots(2, 2)
    drawn = plot.curves(table, columns=["regions", "modularity"], axes=given[0])
    assert list(drawn) == list(given[0])
    assert_holds(lines_of(given[0, 0]), table["regions"])
    np.testing.assert_allclose(given[0, 1].lines[0].get_ydata(), table["modularity"])
    assert not any(ax.lines for ax in given[1])
    assert plt.get_fignums() == [figure.number]


def test_curves_refuse_and_leave_no_figure(table):
    refused = [
        (table, {"columns": ["Q"]}, "columns must be of modularity, .*, got 'Q'"),
        (table[["features", "isolated"]], {}, "no column of a family.*pass columns="),
        (table, {"columns": []}, "no column of a family"),
        (table.iloc[:0], {}, "at least one layer"),
    ]
    for given, options, message in refused:
        with pytest.raises(ValueError, match=message):
            plot.curves(given, **options)
    assert plt.get_fignums() == []
    with pytest.raises(ValueError, match="axes must be one for each of 6 columns, got 2"):
        plot.curves(table, axes=plt.subplots(1, 2)[1])


def test_unit_entropies_hold_means_bounds_and_a_shape_per_layer(units):
    ax = plot.unit_entropies(units)
    layers = units.layers
    single = units.units["entropy"].groupby(level=["layer", "unit"]).mean()["single"]
    assert_holds(lines_of(ax), single, layers["entropy"], layers["floor"], layers["ceiling"])
    assert list(ax.lines[0].get_xdata()) == [2]
    assert texts_of(ax) == ["noise", "ceiling ln n"]
    shapes = of_type(ax, FillBetweenPolyCollection)
    assert len(shapes) == 2
    for place, (shape, layer) in enumerate(zip(shapes, ("wide", "narrow"), strict=True)):
        values = units.units["entropy"].groupby(level=["layer", "unit"]).mean()[layer]
        spots = shape.get_paths()[0].vertices
        assert (spots[:, 1].min(), spots[:, 1].max()) == pytest.approx((values.min(), values.max()))
        assert np.ptp(spots[:, 0]) == pytest.approx(0.8)
        assert spots[:, 0].min() + 0.4 == pytest.approx(place)
    assert ax.get_title(loc="left").startswith("10 units, 20 samples per class")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["wide", "narrow", "single"]


def test_unit_entropies_of_equal_units_are_a_mark():
    maps = torch.rand(40, 1, 5, 5).expand(40, 3, 5, 5)
    found = unit_feature_entropy({"same": maps}, torch.arange(40) % 2, progress=False)
    ax = plot.unit_entropies(found)
    assert not of_type(ax, FillBetweenPolyCollection)
    assert lines_of(ax)[0].tolist() == pytest.approx([found.layers["entropy"].item()] * 3)


@pytest.mark.parametrize("of", ["entropy", "label_information"])
def test_complexity_is_three_lines_and_a_ceiling(of):
    report = report_of(torch.arange(50) % 2)
    ax = plot.complexity(report, of=of)
    end = "" if of == "entropy" else "_label_information"
    ceiling = report.ceiling if of == "entropy" else report.label_ceiling
    columns = [report.layers[name] for name in (of, f"cumulative{end}", f"remaining{end}")]
    assert_holds(lines_of(ax), *columns, [ceiling] * 2)
    assert texts_of(ax) == ["ceiling log2 N" if of == "entropy" else "ceiling H(Y)"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["of the layer", "of the layers so far", "of this and later layers"]
    assert len({line.get_color() for line in ax.lines[:3]}) == 3
    assert ax.get_title(loc="left") == "Sequential, 14 gates, 50 samples, lam=0.2, kde"
    assert ax.get_ylim()[0] == 0


def test_complexity_refuses():
    report = report_of()
    with pytest.raises(ValueError, match="of must be 'entropy' or 'label_information', got 'plugin'"):
        plot.complexity(report, of="plugin")
    with pytest.raises(ValueError, match="no labels: pass labels to transformation_complexity"):
        plot.complexity(report, of="label_information")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("color_by", ["slope", "area"])
def test_partition_fills_each_cell_with_its_value(color_by):
    cells = cells_of()
    ax = plot.partition(cells, color_by=color_by)
    (fill,) = of_type(ax, PolyCollection)
    assert len(fill.get_paths()) == cells.count > 5
    for path, polygon in zip(fill.get_paths(), cells.polygons, strict=True):
        np.testing.assert_allclose(path.vertices[:-1], polygon)
    if color_by == "area":
        expected = cells.areas
    else:  # the outputs' Jacobian in the plane, at the middle of each cell
        middles = torch.from_numpy(np.stack([polygon.mean(0) for polygon in cells.polygons]))
        jacobians = torch.func.vmap(torch.func.jacrev(net_2d().double()))(middles)
        expected = jacobians.flatten(1).norm(dim=1).detach().numpy()
    np.testing.assert_allclose(fill.get_array(), expected, atol=1e-9)
    assert len(ax.figure.axes) == 2  # with a colour bar
    assert ax.get_xlim() + ax.get_ylim() == (-2, 2, -1, 1)
    assert ax.get_aspect() == 1
    assert ax.get_title(loc="left") == f"{cells.count} cells of 9 gates in 2 layers; plane of 4 x 2"


@pytest.mark.parametrize("outputs", [1, 3])
def test_partition_draws_the_decision_boundary(outputs):
    cells = cells_of(net_2d(outputs))
    ax = plot.partition(cells)
    (lines,) = of_type(ax, LineCollection)
    np.testing.assert_allclose(np.array(lines.get_segments()), cells.decision_boundary())
    assert len(lines.get_segments())
    assert not of_type(plot.partition(cells, boundary=False), LineCollection)


def test_partition_marks_the_samples():
    samples = torch.randn(3, 2, generator=torch.Generator().manual_seed(5))
    cells = slice_through_samples(net_2d(), samples, progress=False)
    (crosses,) = plot.partition(cells).lines
    np.testing.assert_allclose(crosses.get_xydata(), cells.points)
    assert crosses.get_marker() == "x"
    assert crosses.get_linestyle() == "None"
    lengths = torch.pdist(samples.double()).numpy()
    np.testing.assert_allclose(torch.pdist(torch.from_numpy(crosses.get_xydata())).numpy(), lengths, atol=1e-6)


def test_partition_by_layer_draws_borders_in_the_layers_colours():
    cells = cells_of()
    ax = plot.partition(cells, color_by="layer", boundary=False)
    lines = of_type(ax, LineCollection)
    drawn = cells.border_layers()
    assert [one.get_label() for one in lines] == ["1", "3"]
    for one in lines:
        np.testing.assert_allclose(np.array(one.get_segments()), cells.borders[drawn == one.get_label()])
    assert sum(len(one.get_segments()) for one in lines) == len(cells.pairs)
    colors = {mpl.colors.to_hex(one.get_colors()[0]) for one in lines}
    assert len(colors) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1", "3"]
    assert len(ax.figure.axes) == 1


def test_partition_by_some_layers_has_no_slope():
    cells = cells_of(layers=["1"])
    with pytest.raises(ValueError, match="'slope' needs the partition by all layers"):
        plot.partition(cells)
    assert plt.get_fignums() == []
    (fill,) = of_type(plot.partition(cells, color_by="area"), PolyCollection)
    np.testing.assert_allclose(fill.get_array(), cells.areas)
    (lines,) = of_type(plot.partition(cells, color_by="layer"), LineCollection)
    assert lines.get_label() == "1"


def test_partition_refuses_an_unknown_color():
    with pytest.raises(ValueError, match="color_by must be 'slope', 'area' or 'layer', got 'depth'"):
        plot.partition(cells_of(), color_by="depth")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("color_by", ["slope", "area", "layer"])
@pytest.mark.parametrize("kind", ["one cell", "no slope"])
def test_partition_of_nothing_to_tell_is_drawn(color_by, kind):
    net = net_2d()
    with torch.no_grad():
        if kind == "one cell":
            net[0].bias.fill_(100), net[2].bias.fill_(1000)
        else:
            net[4].weight.zero_()
    cells = cells_of(net)
    assert (cells.count == 1) == (kind == "one cell")
    ax = plot.partition(cells, color_by=color_by)
    ax.figure.canvas.draw()
    assert len(of_type(ax, PolyCollection)[0].get_paths()) == cells.count


def drawings():
    series = pd.Series([1.0, 2.0], index=["a", "b"], name="complexity")
    maps = {"conv": torch.rand(40, 3, 5, 5)}
    return {
        "curve": lambda ax: plot.curve(series, ax=ax),
        "units": lambda ax: plot.unit_entropies(unit_feature_entropy(maps, torch.arange(40) % 2), ax=ax),
        "complexity": lambda ax: plot.complexity(report_of(), ax=ax),
        "slope": lambda ax: plot.partition(cells_of(), ax=ax),
        "layer": lambda ax: plot.partition(cells_of(), color_by="layer", ax=ax),
    }


@pytest.mark.parametrize("kind", ["curve", "units", "complexity", "slope", "layer"])
def test_given_axes_are_used_and_returned(kind):
    figure, (left, right) = plt.subplots(1, 2)
    other = plt.figure()  # the current one is not the one drawn into
    assert drawings()[kind](right) is right
    assert right.has_data()
    assert not left.has_data()
    assert not other.axes
    assert plt.get_fignums() == [figure.number, other.number]
    own = drawings()[kind](None)
    assert own.figure not in (figure, other)


def test_activations_without_labels_are_drawn_by_their_main_columns():
    acts = Activations({name: torch.rand(20, 4) for name in "ab"})
    table = profile_activations(acts, n=20, repeats=1, metrics=("modularity", "cka"), progress=False)
    labels = [ax.get_ylabel().replace("\n", " ") for ax in plot.curves(table)]
    assert labels == ["modularity of Leiden communities", "unbiased linear CKA to the previous layer"]
