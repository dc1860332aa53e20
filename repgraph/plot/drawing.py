"""Drawings of the graphs of one or several layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from repgraph.labels import Labels, as_labels, class_codes

if TYPE_CHECKING:
    from repgraph.graph import Graph

# Paul Tol's "muted" scheme and black: told apart by readers with any of the common colour-vision deficiencies.
CLASS_COLORS = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#000000",
)
_MARKERS = "os^Dv"


def graph(
    graph: Graph,
    labels: Labels | None = None,
    *,
    positions: np.ndarray | None = None,
    seed: int = 0,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """One layer's graph: nodes coloured by class, edges as light lines, edges between classes in orange.

    Parameters
    ----------
    graph
        The graph of one layer.
    labels
        Class of each sample, for the colours.
    positions
        Positions of the nodes, (n, 2); `Graph.layout` by default.
    seed
        Seed of the layout.
    legend
        Name the classes beside the drawing (up to 20 of them).
    ax
        Axes to draw into.

    Returns
    -------
    Axes
        With the nodes as one collection and the edges as another, without ticks.

    Raises
    ------
    ValueError
        If labels or positions do not fit the graph.
    """
    if positions is None:
        positions = graph.layout(seed=seed)
    if np.shape(positions) != (graph.n, 2):
        raise ValueError(f"positions must have shape ({graph.n}, 2), got {np.shape(positions)}")
    if ax is None:
        ax = plt.subplots(figsize=(5.5, 4.5), layout="constrained")[1]
    codes, classes = (np.zeros(graph.n, int), [None]) if labels is None else _classes(labels, graph.n)
    row, col, weight = graph.edges()
    shown = weight != 0
    ends = np.stack((positions[row[shown]], positions[col[shown]]), axis=1)
    across = codes[row[shown]] != codes[col[shown]]
    for part, color, alpha in ((~across, "#999999", 0.5), (across, "#D55E00", 0.55)):
        if part.any():
            ax.add_collection(LineCollection(list(ends[part]), colors=color, linewidths=0.5, alpha=alpha, zorder=1))
    colors, markers = _class_style(len(classes))
    size = float(np.clip(4000 / graph.n, 4, 40))
    for marker in sorted(set(markers)):
        mine = np.array([markers[c] == marker for c in codes])
        x, y = positions[mine].T
        ax.scatter(x, y, c=[colors[c] for c in codes[mine]], s=size, marker=marker, linewidths=0, zorder=2)
    ax.set(xticks=[], yticks=[], xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    ax.spines[:].set_color("#DDDDDD")
    if labels is not None and legend and len(classes) <= 20:
        _legend(ax, classes)
    return ax


def graphs(
    graphs: Mapping[str, Graph],
    labels: Labels | None = None,
    *,
    titles: Mapping[str, str] | None = None,
    columns: int = 4,
    seed: int = 0,
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """The graph through the layers, as small multiples in which a sample stays near its place.

    The layout of the last layer, where the classes are clearest, is found first; going back, each layer starts from the
    layout of the one after it. So what moves between two panels is what the edges moved.

    Parameters
    ----------
    graphs
        Layer name -> graph over the same samples, in execution order.
    labels
        Class of each sample.
    titles
        Layer name -> text for its panel; the layer name by default.
    columns
        Panels side by side.
    seed
        Seed of the first layout.
    axes
        Axes to draw into, one per layer.

    Returns
    -------
    ndarray of Axes
        One per layer, in order.

    Raises
    ------
    ValueError
        If there are no graphs, their sizes differ, or the number of axes is another.
    """
    if not graphs:
        raise ValueError("graphs must hold at least one layer, got none")
    sizes = {name: g.n for name, g in graphs.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"graphs must be over the same samples, got sizes {sizes}")
    if axes is None:
        columns = min(columns, len(graphs))
        rows = -(-len(graphs) // columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(2.9 * columns, 3.1 * rows), layout="constrained", squeeze=False
        )
        axes = list(grid.flat)[: len(graphs)]
        for spare in list(grid.flat)[len(graphs) :]:
            spare.remove()
        if labels is not None:
            classes = _classes(labels, next(iter(sizes.values())))[1]
            if len(classes) <= 20:
                figure.legend(
                    handles=_handles(classes), loc="outside lower center", ncols=11, frameon=False, fontsize=8
                )
    if len(axes) != len(graphs):
        raise ValueError(f"axes must be one per layer: expected {len(graphs)}, got {len(axes)}")
    positions: dict[str, np.ndarray] = {}
    last: np.ndarray | None = None
    for name in reversed(list(graphs)):
        last = positions[name] = graphs[name].layout(start=last, seed=seed)
    for ax, (name, one) in zip(axes, graphs.items(), strict=True):
        graph(one, labels, positions=positions[name], legend=False, ax=ax)
        ax.set_title((titles or {}).get(name, name), size=9)
    return np.array(list(axes), dtype=object)


def _classes(labels: Labels, n: int) -> tuple[np.ndarray, list[object]]:
    codes, classes = class_codes(labels, n)
    return codes.numpy(), classes


def _class_style(count: int) -> tuple[list[str], list[str]]:
    """A colour and a marker per class: ten colours, then the same with other markers, then a continuous scale."""
    palette = len(CLASS_COLORS)
    if count <= palette * len(_MARKERS):
        return [CLASS_COLORS[i % palette] for i in range(count)], [_MARKERS[i // palette] for i in range(count)]
    scale = mpl.colormaps["viridis"](np.linspace(0, 1, count))
    return [mpl.colors.to_hex(color) for color in scale], ["o"] * count


def class_handles(labels: Labels) -> list[Line2D]:
    """Legend entries for the classes, for a figure's own legend."""
    values = as_labels(labels)
    return _handles(class_codes(values, len(values))[1])


def _handles(classes: Sequence[object]) -> list[Line2D]:
    colors, markers = _class_style(len(classes))
    return [
        Line2D([], [], linestyle="", marker=marker, color=color, markersize=5, label=str(name))
        for name, color, marker in zip(classes, colors, markers, strict=True)
    ]


def _legend(ax: Axes, classes: Sequence[object]) -> None:
    ax.legend(handles=_handles(classes), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
