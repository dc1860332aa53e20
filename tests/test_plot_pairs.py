"""Figures of layer pairs hold the tables they were given, say which axis is which, and leave global state alone."""

import warnings
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection

from repgraph import Activations, between_layers, between_layers_null, plot, profile_activations
from repgraph.metrics.similarity import gbs, linear_cka, mutual_knn, procrustes

pytestmark = pytest.mark.usefixtures("nothing_global")


def features(seed, names):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(30, 5, generator=generator)
    return {name: base + i * torch.randn(30, 5, generator=generator) for i, name in enumerate(names)}


STAGES = ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc"]


@pytest.fixture
def table():
    a, b = features(0, STAGES), features(0, ["conv", "block.0", "block.1", "head"])
    return between_layers(linear_cka, a, b, names=("ResNet", "ConvNet"), unbiased=True, progress=False)


@pytest.fixture
def distances():
    return between_layers(procrustes, features(0, ["a", "b", "c"]), features(1, ["d", "e"]), progress=False)


def square(values, names=None, **attrs):
    names = list(names or [f"l{i}x" for i in range(len(values))])
    table = pd.DataFrame(values, index=names, columns=names, dtype=float)
    table.attrs = attrs
    return table


def image(ax):
    return np.asarray(ax.images[0].get_array().filled(np.nan))


def dots(ax):
    (line,) = [line for line in ax.lines if line.get_marker() == "o"]
    return list(zip(line.get_ydata(), line.get_xdata(), strict=True))


def lines_at(ax):
    """Where the stage lines are: (across, down)."""
    across = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    return across, [line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]]


def test_heatmap_holds_the_table_and_names_its_axes(table):
    ax = plot.heatmap(table)
    assert np.array_equal(image(ax), table)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("ResNet", "ConvNet")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == STAGES
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(table.columns)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # first layer on top
    assert len(ax.figure.axes) == 2
    assert len(plot.heatmap(table, colorbar=False).figure.axes) == 1


def test_heatmap_of_any_table_names_both_axes_layer():
    ax = plot.heatmap(square([[1, 0.5], [0.5, 1]]))
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("layer", "layer")
    assert ax.get_title(loc="left") == ""


def test_title_holds_measure_settings_and_chance(table):
    title = " ".join(plot.heatmap(table).get_title(loc="left").split())
    assert title == plot.caption(table)
    assert title.startswith("linear_cka, unbiased=True, n=30, chance ")
    assert f"chance {table.attrs['chance']:.3f} ± {table.attrs['chance_std']:.3f}" in title


def test_caption_without_chance():
    a = features(0, ["x", "y"])
    assert plot.caption(between_layers(mutual_knn, a, permutations=0, progress=False)) == "mutual_knn, k=10, n=30"


@pytest.mark.parametrize(
    ("values", "attrs", "limits"),
    [
        ([[0.9, 0.2], [0.2, 0.9]], {}, (0, 1)),
        ([[1.0, -0.25], [-0.25, 1.0]], {}, (-0.25, 1)),
        ([[2.0, 0.5], [0.5, 2.0]], {}, (0, 2)),
        ([[0.0, 0.5], [0.5, 0.1]], {"distance": True}, (0, 0.5)),
        ([[0.0, 3.5], [np.nan, 0.0]], {"distance": True}, (0, 3.5)),
        ([[0.0, 0.0], [0.0, 0.0]], {"distance": True}, (0, 1)),
        ([[np.nan, np.nan], [np.nan, np.nan]], {}, (0, 1)),
    ],
)
def test_colour_scale_suits_the_values(values, attrs, limits):
    table = square(values, **attrs)
    assert plot.heatmap(table).images[0].get_clim() == limits
    assert plot.heatmap(table, limits=(-2, 4)).images[0].get_clim() == (-2, 4)


def test_stage_lines_stand_where_the_stage_changes(table):
    across, down = lines_at(plot.heatmap(table))
    assert across == [0.5, 2.5, 4.5]
    assert down == [0.5, 2.5]
    own = lines_at(plot.heatmap(table, stage=lambda name: "e" in name))
    assert own == ([4.5], [2.5])


@pytest.mark.parametrize(
    "names",
    [["0", "1", "2", "3"], ["conv1", "conv2", "fc1", "fc2"], ["layer1.0", "layer1.1", "layer1.2", "layer1.3"]],
)
def test_plain_chain_has_no_stage_lines(names):
    assert lines_at(plot.heatmap(square(np.eye(4), names))) == ([], [])


def test_later_calls_of_a_module_stay_in_its_stage():
    names = ["a.0", "a.1", "a.1#1", "b.0", "b.0#1"]
    assert lines_at(plot.heatmap(square(np.eye(5), names))) == ([2.5], [2.5])


def test_best_match_of_each_row_is_marked(table, distances):
    assert dots(plot.heatmap(table, best=True)) == list(enumerate(table.to_numpy().argmax(1)))
    assert dots(plot.heatmap(distances, best=True)) == list(enumerate(distances.to_numpy().argmin(1)))
    assert not [line for line in plot.heatmap(table).lines if line.get_marker() == "o"]


def test_undefined_rows_have_no_best_match():
    values = [[np.nan, 0.2, 0.7], [np.nan, np.nan, np.nan], [0.3, np.nan, 0.1]]
    assert dots(plot.heatmap(square(values), best=True)) == [(0, 2), (2, 0)]
    assert dots(plot.heatmap(square(values, distance=True), best=True)) == [(0, 1), (2, 2)]
    assert dots(plot.heatmap(square([[np.nan]]), best=True)) == []


def test_heatmap_draws_into_given_axes(table):
    figure, (left, right) = plt.subplots(1, 2)
    assert plot.heatmap(table, ax=right, colorbar=False) is right
    assert not left.images
    assert figure.axes == [left, right]
    assert plt.get_fignums() == [figure.number]


def test_names_of_many_layers_do_not_overlap():
    names = [f"layer{i // 30 + 1}.{i % 30}" for i in range(90)]
    ax = plot.heatmap(square(np.eye(90), names))
    ax.figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in ax.get_yticklabels()]
    assert all(low.y0 >= high.y1 - 1 or high.y0 >= low.y1 - 1 for low, high in pairwise(boxes))
    shown = [tick.get_text() for tick in ax.get_xticklabels()]
    assert (shown[0], shown[-1]) == (names[0], names[-1])


def test_table_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer on each side, got 0 x 0"):
        plot.heatmap(pd.DataFrame())
    with pytest.raises(ValueError, match="at least one layer"):
        plot.similarity_by_distance(pd.DataFrame())


def test_heatmaps_share_one_scale_and_one_bar(table):
    tables = {"one": table, "low": table - 0.5, "high": table + 0.25, "same": table.copy()}
    axes = plot.heatmaps(tables, best=True)
    figure = axes[0].figure
    assert axes.shape == (4,)
    assert len(figure.axes) == 5  # four panels and the bar; the two empty panels are gone
    low, high = (table.to_numpy() - 0.5).min(), (table.to_numpy() + 0.25).max()
    assert low < 0 < 1 < high
    assert {ax.images[0].get_clim() for ax in axes} == {(low, high)}
    assert [ax.get_title(loc="left") for ax in axes] == list(tables)
    assert all(np.array_equal(image(ax), t) for ax, t in zip(axes, tables.values(), strict=True))
    assert [dots(ax) for ax in axes] == [dots(axes[0])] * 4
    assert plt.get_fignums() == [figure.number]


def test_heatmaps_stand_in_the_chosen_number_of_columns(table):
    axes = plot.heatmaps({str(i): table for i in range(5)}, columns=2)
    places = [ax.get_subplotspec() for ax in axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert {place.get_gridspec().ncols for place in places} == {2}
    assert plot.heatmaps({"one": table})[0].get_subplotspec().get_gridspec().ncols == 1


def test_heatmaps_draw_into_given_axes(table):
    figure, given = plt.subplots(1, 2)
    assert list(plot.heatmaps({"one": table, "two": table}, axes=list(given))) == list(given)
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match="axes must be one per table: expected 1, got 2"):
        plot.heatmaps({"one": table}, axes=list(given))


def test_heatmaps_refuse_what_shares_no_scale(table, distances):
    with pytest.raises(ValueError, match=r"all similarities or all distances.*got both"):
        plot.heatmaps({"one": table, "other": distances})
    with pytest.raises(ValueError, match="at least one table"):
        plot.heatmaps({})
    limits = plot.heatmaps({"near": distances / 2, "far": distances})[0].images[0].get_clim()
    assert limits == (0, distances.to_numpy().max())


def pair_dots(ax):
    (found,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    return sorted(map(tuple, np.round(found.get_offsets(), 6).tolist()))


def test_similarity_against_distance_of_one_model():
    values = [[1, 0.5, 0.1, 0.2], [0.5, 1, 0.7, 0.3], [0.1, 0.7, 0.9, 0.6], [0.2, 0.3, 0.6, 1]]
    ax = plot.similarity_by_distance(square(values))
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert ax.lines[0].get_ydata() == pytest.approx([3.9 / 4, 0.6, 0.2, 0.2])
    expected = [(j - i, values[i][j]) for i in range(4) for j in range(i, 4)]
    assert pair_dots(ax) == sorted(expected)
    assert len(ax.lines) == 1


def test_similarity_of_two_models_goes_by_relative_depth():
    values = np.arange(15.0).reshape(3, 5) / 15
    table = pd.DataFrame(values, index=list("abc"), columns=list("vwxyz"))
    ax = plot.similarity_by_distance(table, color="black")
    distance = np.abs(np.array([0, 2, 4])[:, None] - np.arange(5))
    assert pair_dots(ax) == sorted(zip(distance.ravel().tolist(), values.ravel().round(6).tolist(), strict=True))
    mean = [values[distance == d].mean() for d in range(5)]
    assert ax.lines[0].get_ydata() == pytest.approx(mean)
    assert ax.lines[0].get_color() == "black"


def test_models_with_equal_layer_names_are_two_models():
    table = square([[1, 0.2], [0.4, 1]], "ab").rename_axis(index="first", columns="second")
    assert plot.similarity_by_distance(table).lines[0].get_ydata() == pytest.approx([1, 0.3])
    one = plot.similarity_by_distance(table.rename_axis(index="m", columns="m"))
    assert one.lines[0].get_ydata() == pytest.approx([1, 0.3])  # not symmetric: both directions count


def test_undefined_pairs_are_left_out_of_the_mean():
    values = [[1, 0.5, np.nan, 0.1], [0.5, 1, np.nan, 0.3], [np.nan] * 4, [0.1, 0.3, np.nan, 1]]
    ax = plot.similarity_by_distance(square(values))
    assert ax.lines[0].get_ydata() == pytest.approx([1, 0.5, 0.3, 0.1])


def test_null_is_a_band_of_one_deviation():
    layers = features(0, ["a", "b", "c", "d"])
    table = between_layers(gbs, layers, progress=False)
    null = between_layers_null(gbs, layers, permutations=8, progress=False)
    ax = plot.similarity_by_distance(table, null)
    draws = null.to_numpy().reshape(4, 4, 8)
    own = [np.concatenate([draws[i, i + d] for i in range(4 - d)]) for d in range(4)]
    level, std = (np.array([f(part) for part in own]) for f in (np.mean, np.std))
    assert ax.lines[1].get_ydata() == pytest.approx(level)
    (band,) = [c for c in ax.collections if isinstance(c, PolyCollection) and not isinstance(c, PathCollection)]
    edges = band.get_paths()[0].vertices[:, 1]
    assert edges.max() == pytest.approx((level + std).max())
    assert edges.min() == pytest.approx((level - std).min())
    assert "samples shuffled" in [text.get_text() for text in ax.texts]
    assert ax.get_ylabel() == "GBS"
    assert " ".join(ax.get_title(loc="left").split()) == plot.caption(table)
    with pytest.raises(ValueError, match="null must be of the same pairs of layers"):
        plot.similarity_by_distance(table, null.iloc[:4])
    with pytest.raises(ValueError, match="null must be of the same pairs of layers"):
        plot.similarity_by_distance(table, null.iloc[::-1])


def test_similarity_by_distance_draws_into_given_axes(table):
    figure, (left, right) = plt.subplots(1, 2)
    assert plot.similarity_by_distance(table, ax=right) is right
    assert not left.lines
    assert plt.get_fignums() == [figure.number]


SCORES = torch.tensor([0.5, 0.9, 0.1, 0.7, 0.3, 0.8])
PIXELS = torch.arange(6 * 4 * 4).reshape(6, 4, 4).float()


def titles(axes):
    return [ax.get_title() for ax in axes]


def test_samples_at_both_ends_are_shown_with_their_scores():
    axes = plot.sample_agreement(SCORES, images=PIXELS, count=2)
    assert axes.shape == (5,)
    assert all(isinstance(ax, Axes) for ax in axes)
    assert axes[0].lines[0].get_ydata() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.8, 0.9])
    assert axes[0].lines[1].get_ydata()[0] == pytest.approx(0.55)
    assert titles(axes[1:]) == ["2: 0.10", "4: 0.30", "1: 0.90", "5: 0.80"]
    for ax, sample in zip(axes[1:], (2, 4, 1, 5), strict=True):
        assert np.allclose(ax.images[0].get_array(), PIXELS[sample] / PIXELS.max())
    assert len(plt.get_fignums()) == 1


def test_count_is_at_most_half_of_the_samples():
    assert titles(plot.sample_agreement(SCORES[:3], images=PIXELS[:3], count=9)[1:]) == ["2: 0.10", "1: 0.90"]
    assert len(plot.sample_agreement(SCORES, images=PIXELS)) == 7


@pytest.mark.parametrize("scores", [SCORES.numpy(), pd.Series(SCORES.numpy()), SCORES.double().requires_grad_()])
def test_kinds_of_scores(scores):
    (ax,) = plot.sample_agreement(scores)
    assert ax.lines[0].get_ydata() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.8, 0.9])


COLOURS = torch.rand(6, 5, 4, 3, generator=torch.Generator().manual_seed(0))
LAYOUTS = {
    "(n, h, w)": (COLOURS[..., 0], COLOURS[..., 0]),
    "(n, 1, h, w)": (COLOURS[:, None, :, :, 0], COLOURS[..., 0]),
    "(n, h, w, 1)": (COLOURS[..., :1], COLOURS[..., 0]),
    "(n, 3, h, w)": (COLOURS.permute(0, 3, 1, 2), COLOURS),
    "(n, h, w, 3)": (COLOURS, COLOURS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["tensor", "array", "8 bits"])
def test_image_layouts(layout, kind):
    images, expected = LAYOUTS[layout]
    if kind == "8 bits":
        images, expected = ((255 * x).to(torch.uint8) for x in (images, expected))
    low, high = float(expected.min()), float(expected.max())
    axes = plot.sample_agreement(SCORES, images=images if kind == "tensor" else images.numpy(), count=1)
    for ax, sample in zip(axes[1:], (2, 1), strict=True):
        picture = np.asarray(ax.images[0].get_array())
        assert picture.shape == expected.shape[1:]
        assert np.allclose(picture, (expected[sample].numpy() - low) / (high - low), atol=1e-6)


def test_normalised_and_constant_images_are_drawn_in_range():
    negative = plot.sample_agreement(SCORES, images=PIXELS - 50, count=1)
    assert np.allclose(negative[1].images[0].get_array(), PIXELS[2] / PIXELS.max(), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat = plot.sample_agreement(SCORES, images=torch.full((6, 2, 2), 7.0), count=1)
    assert (flat[1].images[0].get_array() == 0).all()


def test_labels_stand_beside_the_scores():
    labels = np.array(["cat", "dog", "cow", "cat", "cow", "dog"])
    assert titles(plot.sample_agreement(SCORES, images=PIXELS, labels=labels, count=1)[1:]) == [
        "2: 0.10 (cow)",
        "1: 0.90 (dog)",
    ]
    classes = torch.tensor([4, 5, 6, 4, 6, 5])
    assert titles(plot.sample_agreement(SCORES, images=PIXELS, labels=classes, count=1)[1:]) == [
        "2: 0.10 (6)",
        "1: 0.90 (5)",
    ]


def test_texts_are_written_in_order():
    texts = [f"sentence number {i}" for i in range(6)]
    axes = plot.sample_agreement(SCORES, texts=texts, labels=list("abcdef"), count=2)
    assert len(axes) == 3
    assert [text.get_text() for text in axes[1].texts] == [
        "2: 0.10 (c) sentence number 2",
        "4: 0.30 (e) sentence number 4",
    ]
    assert [text.get_text() for text in axes[2].texts] == [
        "1: 0.90 (b) sentence number 1",
        "5: 0.80 (f) sentence number 5",
    ]
    assert [ax.get_title(loc="left") for ax in axes[1:]] == ["least agreement", "most agreement"]


def test_samples_go_into_given_axes():
    figure, given = plt.subplots(1, 5)
    assert list(plot.sample_agreement(SCORES, images=PIXELS, count=2, axes=list(given))) == list(given)
    assert titles(given[1:]) == ["2: 0.10", "4: 0.30", "1: 0.90", "5: 0.80"]
    (alone,) = plot.sample_agreement(SCORES, axes=[plt.figure(figure).add_subplot()])
    assert alone.figure is figure
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (SCORES[None], {}, r"scores must be one number per sample, shape \(n,\), got \(1, 6\)"),
        (SCORES[:0], {}, r"scores must be one number per sample.*got \(0,\)"),
        (SCORES, {"images": PIXELS[:5]}, "images must be one per sample: expected 6, got 5"),
        (SCORES, {"texts": ["a"]}, "texts must be one per sample: expected 6, got 1"),
        (SCORES, {"labels": [0, 1]}, "labels must be one per sample: expected 6, got 2"),
        (SCORES, {"images": PIXELS, "texts": ["a"] * 6}, "images and texts are both given"),
        (SCORES, {"images": torch.zeros(6, 2, 4, 4)}, r"images must be \(n, h, w\), .*got \(6, 2, 4, 4\)"),
        (SCORES, {"images": torch.zeros(6, 4)}, r"images must be \(n, h, w\), .*got \(6, 4\)"),
        (SCORES, {"images": PIXELS, "count": 2, "axes": [None]}, "axes must be 5 for these samples, got 1"),
        (SCORES, {"texts": ["a"] * 6, "axes": [None]}, "axes must be 3 for these samples, got 1"),
    ],
)
def test_sample_agreement_refuses(scores, options, message):
    with pytest.raises(ValueError, match=message):
        plot.sample_agreement(scores, **options)


def test_curve_of_the_similarity_to_the_previous_layer():
    layers = features(0, ["a", "b", "c", "d"])
    metrics = ("modularity", "gbs")
    acts = Activations(layers, torch.arange(30) % 2)
    table = profile_activations(acts, n=15, repeats=2, metrics=metrics, progress=False)
    ax = plot.curve(table, column="gbs_previous")
    mean, null = (line.get_ydata() for line in ax.lines)
    assert np.isnan([mean[0], null[0]]).all()
    assert mean[1:] == pytest.approx(table["gbs_previous"].to_numpy()[1:])
    assert null[1:] == pytest.approx(table["gbs_previous_null"].to_numpy()[1:])
    assert [text.get_text() for text in ax.texts] == ["samples shuffled"]
    top = np.nanmax(ax.collections[0].get_paths()[0].vertices[:, 1])
    assert top == pytest.approx((table["gbs_previous"] + table["gbs_previous_std"]).max())
    assert ax.get_ylabel() == "GBS to the previous layer"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(layers)
    with pytest.raises(ValueError, match=r"column must be one of modularity.*got 'cka_previous'"):
        plot.curve(table, column="cka_previous")


def test_a_distance_without_any_value_leaves_no_warning():
    values = [[1, 0.5, np.nan], [0.5, 1, np.nan], [np.nan, np.nan, np.nan]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = plot.similarity_by_distance(square(values))
    assert ax.lines[0].get_ydata()[:2] == pytest.approx([1, 0.5])


def test_axes_may_be_one_or_a_grid(table):
    grid = plt.subplots(2, 2)[1]
    assert list(plot.heatmaps(dict.fromkeys("abcd", table), axes=grid)) == list(grid.flat)
    assert plot.sample_agreement(np.arange(6.0), axes=plt.subplots()[1])[0].lines


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_and_images(dtype):
    scores, images = torch.arange(6.0).to(dtype) / 8, torch.rand(6, 1, 4, 4).to(dtype)
    assert len(plot.sample_agreement(scores, images=images, count=2)) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.heatmaps({"a": pd.DataFrame([[1.0]])}, columns=0), "columns must be at least 1, got 0"),
        (
            lambda: plot.sample_agreement(torch.tensor([0.1, float("nan")])),
            "scores must be finite, got NaN .* 1 samples",
        ),
    ],
)
def test_unusable_arguments_of_plots(call, message):
    with pytest.raises(ValueError, match=message):
        call()
