"""Every figure: data in, matplotlib Axes out. Nothing is shown or saved, and no global style is touched."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from repgraph.labels import Labels, as_labels, class_codes

if TYPE_CHECKING:
    from repgraph.graph import Graph

BLUE, GREY = "#0072B2", "#767676"
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
_NAMES = {
    "modularity": "modularity Q",
    "class_separation": "class separation R²",
    "community_modularity": "modularity of Leiden communities",
    "isolated": "isolated nodes",
    "negative_share": "share of negative edges",
    "features": "features",
}


def curve(
    curve: pd.Series | pd.DataFrame, *, column: str | None = None, ax: Axes | None = None, **line: object
) -> Axes:
    """One number against the layers, with its band and, where the table has one, its null.

    Parameters
    ----------
    curve
        A Series indexed by layer; a table of `profile` (the band is one standard deviation over the sample sets, the
        null is drawn with its own band); or a DataFrame of repeats, layer x repeat, drawn as mean and one standard
        deviation.
    column
        Which column of a table of `profile`; its first by default.
    ax
        Axes to draw into; new ones of a width that suits the number of layers by default.
    **line
        Passed to `Axes.plot` for the curve (color, label, ...).

    Returns
    -------
    Axes
        With the layer names below as densely as they can be read, and the table's settings as a caption.

    Raises
    ------
    ValueError
        If there are no layers, or the column does not exist.

    Examples
    --------
    >>> ax = curve(pd.Series([0.1, 0.3, 0.7], index=["stem", "block1", "block2"], name="modularity"))
    >>> ax.get_ylabel(), [tick.get_text() for tick in ax.get_xticklabels()]
    ('modularity Q', ['stem', 'block1', 'block2'])
    """
    if len(curve) == 0:
        raise ValueError("curve must have at least one layer, got an empty table")
    null: tuple[pd.Series, pd.Series] | None = None
    std: pd.Series | None = None
    if isinstance(curve, pd.Series):
        if column is not None:
            raise ValueError(f"column={column!r} needs a table, got a Series")
        mean, name = curve, str(curve.name or "")
    elif f"{column or curve.columns[0]}_std" in curve or column is not None:
        name = str(column or curve.columns[0])
        if name not in curve:
            raise ValueError(f"column must be one of {', '.join(map(str, curve.columns))}, got {name!r}")
        mean, std = curve[name], curve.get(f"{name}_std")
        if name == "modularity" and "null" in curve:
            null = curve["null"], curve["null_std"]
    else:
        mean, std, name = curve.mean(axis=1), curve.std(axis=1), ""
    if ax is None:
        width = float(np.clip(1.5 + 0.2 * len(mean), 5, 13))
        ax = plt.subplots(figsize=(width, 4), layout="constrained")[1]
    x = np.arange(len(mean))
    style: dict[str, object] = {"color": BLUE, "marker": "o", "markersize": 3.5, "linewidth": 1.5, **line}
    (drawn,) = ax.plot(x, mean.to_numpy(float), **style)  # type: ignore[arg-type]
    if std is not None and std.notna().any():
        ax.fill_between(x, mean - std, mean + std, color=drawn.get_color(), alpha=0.2, linewidth=0)
    if null is not None:
        ax.plot(x, null[0], color=GREY, linestyle="--", linewidth=1)
        ax.fill_between(x, null[0] - null[1], null[0] + null[1], color=GREY, alpha=0.2, linewidth=0)
        ax.annotate(
            "labels permuted",
            (x[-1], null[0].iloc[-1]),
            (0, 4),
            textcoords="offset points",
            ha="right",
            color=GREY,
            size=8,
        )
    if name == "modularity" and "ceiling" in curve:
        ax.plot(x, curve["ceiling"], color=GREY, linestyle=":", linewidth=1)
        ax.annotate("ceiling", (x[0], curve["ceiling"].iloc[0]), (0, 4), textcoords="offset points", color=GREY, size=8)
    label_layers(ax, [str(layer) for layer in mean.index])
    ax.set_ylabel(_NAMES.get(name, name.replace("_", " ")))
    ax.spines[["top", "right"]].set_visible(False)
    if curve.attrs:
        room = int(_inches(ax) * 72 / (8 * 0.56))
        band = ", band: 1 std over sets" if std is not None and std.notna().any() else ""
        ax.set_title(textwrap.fill(caption(curve) + band, room), loc="left", size=8, color="#444444")
    return ax


def caption(table: pd.Series | pd.DataFrame) -> str:
    """The settings of a table of `profile` in one line, for a figure's caption."""
    a = table.attrs
    sets = f"{a['repeats']} x {a['n']} samples" if "repeats" in a else ""
    reduce = f"reduce={a['reduce']}" if a.get("reduce") else ""
    graph = f"k={a['k']} {a['metric']} graphs ({a['symmetrize']})" if "k" in a else ""
    return ", ".join(part for part in (str(a.get("model", "")), sets, graph, reduce) if part)


def label_layers(ax: Axes, names: Sequence[str], *, size: float = 7.5) -> None:
    """Layer names along the x axis: all of them where they can be read, else every second, third, ... and the last."""
    room = max(2, int(_inches(ax) / (size / 72 * 1.35)))
    step = -(-len(names) // room)
    places = list(range(0, len(names), step))
    if places[-1] != len(names) - 1:  # the last layer is the one that readers look for
        if len(names) - 1 - places[-1] < step:
            places.pop()
        places.append(len(names) - 1)
    upright = max(map(len, names)) > 4 or len(names) > 12
    ax.set_xticks(
        places,
        [names[i] for i in places],
        rotation=90 if upright else 0,
        size=size,
        fontfamily="monospace" if upright else None,
    )
    ax.set_xticks(range(len(names)), minor=True)
    ax.set_xlim(-0.5, len(names) - 0.5)


def _inches(ax: Axes) -> float:
    """Width of the axes."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return float(ax.get_position().width * figure.get_size_inches()[0])


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
