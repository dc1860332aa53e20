"""Figures hold the data that were given, draw where they are told to, and change no global state."""

import random
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection

from repgraph import Activations, knn_graph, plot, profile_activations

pytestmark = pytest.mark.usefixtures("nothing_global")


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(0)
    layers = {f"layer{i}": torch.rand(60, 5, generator=generator) for i in range(4)}
    return profile_activations(Activations(layers, torch.arange(60) % 3), n=20, repeats=3, progress=False)


@pytest.fixture
def graphs():
    generator = torch.Generator().manual_seed(1)
    return {name: knn_graph(torch.randn(40, 6, generator=generator)) for name in ("first", "middle", "last")}


def test_curve_of_a_profile_holds_mean_band_null_and_ceiling(table):
    ax = plot.curve(table)
    assert np.allclose(ax.lines[0].get_ydata(), table["modularity"])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx((table["modularity"] + table["modularity_std"]).max())
    assert band.min() == pytest.approx((table["modularity"] - table["modularity_std"]).min())
    assert np.allclose(ax.lines[1].get_ydata(), table["null"])
    assert np.allclose(ax.lines[2].get_ydata(), table["ceiling"])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(table.index)
    assert "3 x 20 samples" in ax.get_title(loc="left")
    assert "k=3" in ax.get_title(loc="left")


def test_curve_of_another_column_has_no_null_and_claims_no_band(table):
    ax = plot.curve(table, column="class_separation")
    assert len(ax.lines) == 1
    assert np.allclose(ax.lines[0].get_ydata(), table["class_separation"])
    assert "band" not in ax.get_title(loc="left")
    assert ax.get_ylabel() == "class separation R²"


def test_curve_of_repeats_is_mean_and_std():
    repeats = pd.DataFrame([[1.0, 3.0], [2.0, 6.0]], index=["a", "b"])
    ax = plot.curve(repeats)
    assert list(ax.lines[0].get_ydata()) == [2.0, 4.0]
    top = ax.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(4 + 8**0.5)


def test_curve_draws_into_given_axes_with_given_style():
    figure, (left, right) = plt.subplots(1, 2)
    ax = plot.curve(pd.Series([1.0, 2.0], index=["a", "b"]), ax=right, color="black")
    assert ax is right
    assert not left.lines
    assert ax.lines[0].get_color() == "black"
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("layers", [1, 12, 152])
def test_layer_names_do_not_overlap(layers):
    names = [f"layer{i // 36 + 1}.{i % 36}" for i in range(layers)]
    ax = plot.curve(pd.Series(np.linspace(0, 1, layers), index=names, name="modularity"))
    ax.figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in ax.get_xticklabels()]
    assert all(a.x1 <= b.x0 + 1 for a, b in pairwise(boxes))
    shown = [tick.get_text() for tick in ax.get_xticklabels()]
    assert shown[0] == names[0]
    assert shown[-1] == names[-1]


def test_curve_refuses(table):
    with pytest.raises(ValueError, match=r"column must be one of modularity, .*, got 'Q'"):
        plot.curve(table, column="Q")
    with pytest.raises(ValueError, match="at least one layer"):
        plot.curve(pd.Series(dtype=float))
    with pytest.raises(ValueError, match="needs a table"):
        plot.curve(pd.Series([1.0]), column="modularity")


def test_graph_holds_nodes_and_edges(graphs):
    graph = graphs["first"]
    labels = torch.arange(40) % 2
    positions = np.random.default_rng(0).uniform(-1, 1, (40, 2))
    ax = plot.graph(graph, labels, positions=positions)
    lines = [c for c in ax.collections if isinstance(c, LineCollection)]
    row, col, _ = graph.edges()
    across = labels.numpy()[row] != labels.numpy()[col]
    assert [len(c.get_segments()) for c in lines] == [int((~across).sum()), int(across.sum())]
    (nodes,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert np.allclose(nodes.get_offsets(), positions)
    assert {mpl.colors.to_hex(c) for c in nodes.get_facecolors()} == {c.lower() for c in plot.CLASS_COLORS[:2]}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1"]


def test_graph_tells_thirty_classes_apart(graphs):
    labels = torch.arange(40) % 30
    ax = plot.graph(graphs["first"], labels, positions=np.zeros((40, 2)))
    nodes = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert sum(len(c.get_offsets()) for c in nodes) == 40
    assert len(nodes) == 3  # three markers of ten colours each


def test_layout_is_seeded_and_keeps_samples_in_their_place(graphs):
    state = random.getstate()
    first = graphs["first"].layout(seed=3)
    assert random.getstate() == state
    assert np.array_equal(first, graphs["first"].layout(seed=3))
    again = graphs["first"].layout(start=first)
    assert np.abs(again - first).mean() < 0.15
    other = graphs["first"].layout(seed=4)
    assert np.abs(other - first).mean() > 0.2


def test_graphs_are_small_multiples(graphs):
    axes = plot.graphs(graphs, torch.arange(40) % 2)
    assert axes.shape == (3,)
    assert all(isinstance(ax, Axes) for ax in axes)
    assert [ax.get_title() for ax in axes] == ["first", "middle", "last"]
    given = plt.subplots(1, 3)[1]
    assert list(plot.graphs(graphs, axes=given, titles={"last": "end"})) == list(given)
    assert given[2].get_title() == "end"


def test_graphs_refuse(graphs):
    with pytest.raises(ValueError, match="at least one layer"):
        plot.graphs({})
    with pytest.raises(ValueError, match="same samples, got sizes"):
        plot.graphs({**graphs, "odd": knn_graph(torch.rand(9, 3))})
    with pytest.raises(ValueError, match="axes must be one per layer: expected 3, got 1"):
        plot.graphs(graphs, axes=[plt.subplots()[1]])
    with pytest.raises(ValueError, match=r"positions must have shape \(40, 2\)"):
        plot.graph(graphs["first"], positions=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"start must have shape \(40, 2\)"):
        graphs["first"].layout(start=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="labels must have one entry per sample: expected 40, got 2"):
        plot.graph(graphs["first"], [0, 1])
