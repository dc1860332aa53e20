"""Numbers by layer: the curve with its band and its null."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

BLUE, GREY = "#0072B2", "#767676"
_NAMES = {
    "modularity": "modularity Q",
    "class_separation": "class separation R²",
    "community_modularity": "modularity of Leiden communities",
    "isolated": "isolated nodes",
    "negative_share": "share of negative edges",
    "features": "features",
    "gbs_previous": "GBS to the previous layer",
    "cka_previous": "unbiased linear CKA to the previous layer",
    "feature_entropy": "feature entropy, nats",
    "birth_rate": "share of maps with a hole",
    "complexity": "transformation complexity, bits",
    "label_information": "label information of the gates, bits",
    "regions": "distinct region codes",
    "local_complexity": "local complexity, units",
}
_FAMILIES = ("modularity", "community_modularity", "gbs_previous", "cka_previous", "feature_entropy", "complexity",
             "local_complexity", "regions")  # fmt: skip


def curve(
    curve: pd.Series | pd.DataFrame, *, column: str | None = None, ax: Axes | None = None, **line: object
) -> Axes:
    """One number against the layers, with its band and, where the table has one, its null.

    Parameters
    ----------
    curve
        A Series indexed by layer; a table of `profile` (the band is one standard deviation over the sample sets, the
        null is drawn with its own band, floor and ceiling as lines); or a DataFrame of repeats, layer x repeat,
        drawn as mean and one standard deviation.
    column
        Which column of a table of `profile`; by default the main one of its first family.
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
    shuffled = "labels permuted"
    std: pd.Series | None = None
    if column is None and isinstance(curve, pd.DataFrame):
        column = next(iter(main_columns(curve)), None)
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
        if f"{name}_null" in curve:
            null, shuffled = (curve[f"{name}_null"], 0 * curve[f"{name}_null"]), "samples shuffled"
    else:
        mean, std, name = curve.mean(axis=1), curve.std(axis=1), ""
    if ax is None:
        ax = layer_axes(len(mean))
    x = np.arange(len(mean))
    style: dict[str, object] = {"color": BLUE, "marker": "o", "markersize": 3.5, "linewidth": 1.5, **line}
    (drawn,) = ax.plot(x, mean.to_numpy(float), **style)  # type: ignore[arg-type]
    if std is not None and std.notna().any():
        ax.fill_between(x, mean - std, mean + std, color=drawn.get_color(), alpha=0.2, linewidth=0)
    if null is not None:
        draw_chance(ax, x, *null, shuffled)
    limits = (
        {"ceiling": f"{name}_ceiling", "noise": f"{name}_floor"} if name != "modularity" else {"ceiling": "ceiling"}
    )
    for text, limit in limits.items():
        if isinstance(curve, pd.DataFrame) and limit in curve:
            draw_limit(ax, x, curve[limit], text, below=text == "ceiling" and name != "modularity")
    label_layers(ax, [str(layer) for layer in mean.index])
    ax.set_ylabel(_NAMES.get(name, name.replace("_", " ")))
    ax.spines[["top", "right"]].set_visible(False)
    if curve.attrs:
        room = int(inches(ax)[0] * 72 / (8 * 0.56))
        band = ", band: 1 std over sets" if std is not None and std.notna().any() else ""
        ax.set_title(textwrap.fill(caption(curve) + band, room), loc="left", size=8, color="#444444")
    return ax


def curves(
    table: pd.DataFrame, *, columns: Sequence[str] | None = None, axes: Sequence[Axes] | None = None
) -> np.ndarray:
    """Families of a table of `profile` below each other, on one axis of layers.

    Parameters
    ----------
    table
        A table of `profile`.
    columns
        Which columns; by default the main one of each family that is there.
    axes
        One for each column; a new figure by default.

    Returns
    -------
    ndarray of Axes
        One for each column.

    Raises
    ------
    ValueError
        If a column does not exist, none is known, or axes are too few.

    Examples
    --------
    >>> table = pd.DataFrame({"modularity": [0.1, 0.5], "complexity": [3.0, 4.0]}, index=["stem", "block1"])
    >>> [ax.get_ylabel().split()[0] for ax in curves(table)]
    ['modularity', 'transformation']
    """
    chosen = main_columns(table) if columns is None else [columns] if isinstance(columns, str) else list(columns)
    if not chosen or not len(table):
        raise ValueError(
            f"table has no column of a family, {', '.join(_FAMILIES)}; pass columns=" if len(table) else
            "table must have at least one layer, got an empty table"
        )  # fmt: skip
    missing = [name for name in chosen if name not in table]
    if missing:
        raise ValueError(f"columns must be of {', '.join(map(str, table.columns))}, got {missing[0]!r}")
    if axes is None:
        width = float(np.clip(2.5 + 0.2 * len(table), 6, 13))
        grid = plt.subplots(
            len(chosen),
            1,
            figsize=(width, max(4, 1.9 * len(chosen) + 0.9)),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )[1]
        drawn = grid[:, 0]
    else:
        drawn = np.asarray(axes).ravel()
        if len(drawn) != len(chosen):
            raise ValueError(f"axes must be one for each of {len(chosen)} columns, got {len(drawn)}")
    for number, (ax, name) in enumerate(zip(drawn, chosen, strict=True)):
        curve(table, column=name, ax=ax)
        ax.set_ylabel(textwrap.fill(ax.get_ylabel(), 20))
        if number:
            ax.set_title("", loc="left")
        ax.tick_params(labelbottom=number == len(chosen) - 1)
    return np.array(drawn)


def layer_axes(layers: int) -> Axes:
    """New axes of a width that suits the number of layers."""
    width = float(np.clip(1.5 + 0.2 * layers, 5, 13))
    ax: Axes = plt.subplots(figsize=(width, 4), layout="constrained")[1]
    return ax


def main_columns(table: pd.DataFrame) -> list[str]:
    """The main column of each family that a table of `profile` has."""
    found = [name for name in _FAMILIES if name in table]
    return found[:-1] if "local_complexity" in found and "regions" in found else found


def draw_limit(ax: Axes, x: np.ndarray, level: pd.Series, text: str, *, below: bool) -> None:
    """A bound that a number cannot pass, or what noise gives: a dotted line and its name."""
    ax.plot(x, level, color=GREY, linestyle=":", linewidth=1)
    known = np.flatnonzero(level.notna())
    if len(known):
        at = (x[known[0]], level.iloc[known[0]])
        ax.annotate(
            text, at, (0, -3 if below else 3), textcoords="offset points", va="top" if below else "bottom", color=GREY,
            size=8,
        )  # fmt: skip


def draw_chance(
    ax: Axes, x: np.ndarray, level: pd.Series, std: pd.Series, text: str, *, zorder: float | None = None
) -> None:
    """What chance gives at each x: a dashed line, its band of one deviation, and what was shuffled for it."""
    ax.plot(x, level, color=GREY, linestyle="--", linewidth=1, zorder=zorder)
    ax.fill_between(x, level - std, level + std, color=GREY, alpha=0.2, linewidth=0, zorder=zorder)
    at = (x[-1], level.iloc[-1])
    ax.annotate(text, at, (0, 4), textcoords="offset points", ha="right", color=GREY, size=8)


def caption(table: pd.Series | pd.DataFrame) -> str:
    """The settings of a table of `profile` or `between_layers` in one line, for a figure's caption."""
    a = table.attrs
    if "measure" in a:
        hidden = ("measure", "distance", "chance", "chance_std")
        made = [f"{key}={value}" for key, value in a.items() if key not in hidden and value is not None]
        chance = [f"chance {a['chance']:.3f} ± {a['chance_std']:.3f}"] if "chance" in a else []
        return ", ".join([a["measure"], *made, *chance])
    sets = f"{a['repeats']} x {a['n']} samples" if "repeats" in a else ""
    reduce = f"reduce={a['reduce']}" if a.get("reduce") else ""
    graph = f"k={a['k']} {a['metric']} graphs ({a['symmetrize']})" if "k" in a else ""
    return ", ".join(part for part in (str(a.get("model", "")), sets, graph, reduce) if part)


def label_layers(ax: Axes, names: Sequence[str], *, size: float = 7.5) -> None:
    """Layer names along the x axis: all of them where they can be read, else every second, third, ... and the last."""
    places = spaced(len(names), max(2, int(inches(ax)[0] / (size / 72 * 1.35))))
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


def spaced(count: int, room: int) -> list[int]:
    """Places 0, step, 2 step, ... and the last, the one that readers look for; at most about `room` of them."""
    step = -(-count // room)
    places = list(range(0, count, step))
    if places[-1] != count - 1:
        if count - 1 - places[-1] < step:
            places.pop()
        places.append(count - 1)
    return places


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    place = ax.get_position()
    return float(place.width * width), float(place.height * height)
