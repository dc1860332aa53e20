"""Numbers by pairs of layers: heat maps, similarity against depth, samples that two layers see differently."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from repgraph.labels import Labels, as_labels
from repgraph.plot.by_layer import BLUE, GREY, caption, draw_chance, inches, spaced

if TYPE_CHECKING:
    from repgraph.segments import Segmentation

_TITLES = {
    "gbs": "GBS",
    "linear_cka": "linear CKA",
    "rbf_cka": "Gaussian CKA",
    "minibatch_cka": "minibatch CKA",
    "mutual_knn": "mutual kNN",
    "cknna": "CKNNA",
    "procrustes": "Procrustes distance",
    "rsa": "RSA",
    "svcca": "SVCCA",
    "rtd": "RTD",
}


def heatmap(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    limits: tuple[float, float] | None = None,
    stage: Callable[[str], object] | None = None,
    best: bool = False,
    segments: Segmentation | pd.Series | None = None,
    colorbar: bool = True,
) -> Axes:
    """Similarity of layers to layers; which axis is which model is written on it.

    Parameters
    ----------
    table
        A table of `between_layers`, or any with layers as index and columns.
    ax
        Axes to draw into.
    limits
        Values at the ends of the colour scale; by default 0 (less where values are negative) and 1 for similarities, 0
        and the largest value for distances.
    stage
        Layer name -> stage; lines are drawn where it changes. By default the name without a number at its end
        ("layer2.5" -> "layer2").
    best
        Mark the best match of each row with a dot.
    segments
        Runs of consecutive layers to outline on the diagonal of one model's own table: of `repgraph.segment_layers`,
        or a Series layer -> run. The title tells how many, and their cost where it is known.
    colorbar
        Draw the colour scale.

    Returns
    -------
    Axes
        With the first layers at the top left, and measure, n and chance level in the title.

    Raises
    ------
    ValueError
        If the table is empty; if segments are given for a table of two models, or are not runs of its layers.

    Examples
    --------
    >>> table = pd.DataFrame([[1.0, 0.4], [0.4, 1.0]], index=["conv1", "layer1.0"], columns=["conv1", "layer1.0"])
    >>> ax = heatmap(table.rename_axis(index="ResNet-20", columns="ResNet-56"))
    >>> ax.get_ylabel(), ax.get_xlabel()
    ('ResNet-20', 'ResNet-56')
    """
    if not table.size:
        raise ValueError(f"table must have at least one layer on each side, got {table.shape[0]} x {table.shape[1]}")
    starts = None if segments is None else _starts(table, segments)
    if ax is None:
        height, width = (float(np.clip(1.6 + 0.16 * size, 3.2, 11)) for size in table.shape)
        ax = plt.subplots(figsize=(width + 0.9, height), layout="constrained")[1]
    low, high = limits if limits is not None else _limits([table])
    values = table.to_numpy(float)
    image = ax.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="nearest")
    rows, columns = ([str(name) for name in names] for names in (table.index, table.columns))
    _mark(ax, rows, columns, stage or _stage)
    if best:
        falls = table.attrs.get("distance", False)
        known = np.flatnonzero(~np.isnan(values).all(1))
        found = (np.nanargmin if falls else np.nanargmax)(values[known], axis=1)
        ax.plot(found, known, linestyle="", marker="o", markersize=3, color="#D55E00", markeredgewidth=0)
    note = ""
    if segments is not None and starts is not None:
        for start, end in pairwise([*starts, len(rows)]):
            ax.add_patch(_outline(start, end))
        cost = "" if isinstance(segments, pd.Series) else f", cost {segments.cost:.3g}"
        note = f"squares: {len(starts)} segments{cost}"
    ax.set_ylabel(str(table.index.name or "layer"))
    ax.set_xlabel(str(table.columns.name or "layer"))
    if colorbar:
        _colorbar(image, [ax])
    if table.attrs.get("measure") or note:
        _title(ax, table, note)
    return ax


def heatmaps(
    tables: Mapping[str, pd.DataFrame],
    *,
    columns: int = 3,
    stage: Callable[[str], object] | None = None,
    best: bool = False,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Several tables side by side, all on one colour scale.

    Parameters
    ----------
    tables
        Title -> table, similarities only or distances only.
    columns
        Panels in a row.
    stage, best
        As in `heatmap`.
    axes
        Axes to draw into, one per table.

    Returns
    -------
    ndarray of Axes
        One per table.

    Raises
    ------
    ValueError
        If there are no tables, similarities are mixed with distances, or there are not as many axes as tables.

    Examples
    --------
    >>> table = pd.DataFrame([[1.0, 0.4], [0.4, 1.0]], index=["a", "b"], columns=["a", "b"])
    >>> axes = heatmaps({"one": table, "other": table * 0.5})
    >>> len({ax.images[0].get_clim() for ax in axes})
    1
    """
    if not tables:
        raise ValueError("tables must hold at least one table")
    if len({bool(table.attrs.get("distance", False)) for table in tables.values()}) > 1:
        raise ValueError("tables must be all similarities or all distances to share a scale, got both")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if axes is None:
        columns = min(columns, len(tables))
        rows = -(-len(tables) // columns)
        shape = np.max([table.shape for table in tables.values()], axis=0)
        height, width = (float(np.clip(1.4 + 0.1 * size, 3, 6)) for size in shape)
        _, grid = plt.subplots(
            rows, columns, figsize=(width * columns + 0.8, height * rows), squeeze=False, layout="constrained"
        )
        for ax in grid.flat[len(tables) :]:
            ax.remove()
        axes = list(grid.flat[: len(tables)])
    axes = list(np.asarray(axes, dtype=object).flat)
    if len(axes) != len(tables):
        raise ValueError(f"axes must be one per table: expected {len(tables)}, got {len(axes)}")
    limits = _limits(list(tables.values()))
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        heatmap(table, ax=ax, limits=limits, stage=stage, best=best, colorbar=False)
        ax.set_title(title, loc="left", size=10)
    _colorbar(axes[0].images[0], list(axes))
    return np.array(list(axes), dtype=object)


def _limits(tables: Sequence[pd.DataFrame]) -> tuple[float, float]:
    values = np.concatenate([table.to_numpy(float).ravel() for table in tables])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if any(table.attrs.get("distance", False) for table in tables):
        return 0.0, high or 1.0
    return min(low, 0.0), max(high, 1.0)


def _stage(name: str) -> str:
    head, _, tail = name.rpartition(".")
    return head if tail.split("#")[0].isdigit() else name


def _starts(table: pd.DataFrame, segments: Segmentation | pd.Series) -> list[int]:
    """Places of the first layers of the runs."""
    rows, columns = ([str(name) for name in names] for names in (table.index, table.columns))
    sides = table.index.name, table.columns.name
    if rows != columns or (None not in sides and sides[0] != sides[1]):
        raise ValueError("segments can be outlined only in a table of one model's layers with themselves")
    membership = segments if isinstance(segments, pd.Series) else segments.membership
    if [str(name) for name in membership.index] != rows:
        raise ValueError(
            f"segments must have the table's {len(rows)} layers in its order, {rows[0]} to {rows[-1]}, "
            f"got {len(membership)}"
        )
    runs = list(membership)
    starts = [0, *(i for i in range(1, len(runs)) if runs[i] != runs[i - 1])]
    if len(starts) != len(set(runs)):
        raise ValueError("segments must be runs of consecutive layers, got one that begins twice")
    return starts


def _outline(start: int, end: int) -> Rectangle:
    """The square of the layers from start to before end."""
    place, size = (start - 0.5, start - 0.5), end - start
    square = Rectangle(place, size, size, fill=False, edgecolor="#D55E00", linewidth=2, zorder=3)  # above stage lines
    square.set_clip_on(False)  # along the border its line would lose half of its width
    return square


def _mark(ax: Axes, rows: list[str], columns: list[str], stage: Callable[[str], object]) -> None:
    """Layer names as densely as they can be read, and lines between stages."""
    for names, axis, line, room in (
        (rows, ax.yaxis, ax.axhline, inches(ax)[1]),
        (columns, ax.xaxis, ax.axvline, inches(ax)[0]),
    ):
        places = spaced(len(names), max(2, int(room / 0.125)))
        axis.set_ticks(places, [names[i] for i in places], size=7, fontfamily="monospace")
        stages = [stage(name) for name in names]
        if len(set(stages)) < len(stages):  # where every layer is a stage of its own, lines say nothing
            for place in range(1, len(names)):
                if stages[place] != stages[place - 1]:
                    line(place - 0.5, color="white", linewidth=1)
    ax.tick_params(axis="x", rotation=90)


def _colorbar(image: AxesImage, axes: list[Axes]) -> None:
    figure = axes[0].get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)


def _title(ax: Axes, table: pd.DataFrame, note: str = "") -> None:
    room = max(30, int(inches(ax)[0] * 72 / (8 * 0.56)))
    settings = caption(table) if table.attrs.get("measure") else ""
    text = "\n".join(textwrap.fill(part, room) for part in (settings, note) if part)
    ax.set_title(text, loc="left", size=8, color="#444444")


def similarity_by_distance(
    table: pd.DataFrame, null: pd.DataFrame | None = None, *, ax: Axes | None = None, **line: object
) -> Axes:
    r"""Similarity of two layers against their distance in depth, with the band that chance gives.

    Parameters
    ----------
    table
        A table of `between_layers`. Of one model with itself, layers i and j are \|i - j\| apart, and each pair
        counts once if the measure is symmetric; between two models layers are matched by relative depth, and the
        distance is in layers of the deeper one.
    null
        Its null of `between_layers_null`, drawn as a band of one standard deviation.
    ax
        Axes to draw into.
    **line
        Passed to `Axes.plot` for the mean.

    Returns
    -------
    Axes
        With every pair as a dot, and the mean at each distance as a line.

    Raises
    ------
    ValueError
        If the table is empty, or the null is of other layers.

    Examples
    --------
    >>> table = pd.DataFrame([[1, 0.4, 0.2], [0.4, 1, 0.6], [0.2, 0.6, 1]], index=list("abc"), columns=list("abc"))
    >>> ax = similarity_by_distance(table)
    >>> ax.lines[0].get_ydata().tolist()
    [1.0, 0.5, 0.2]
    """
    if not table.size:
        raise ValueError("table must have at least one layer on each side")
    if null is not None and list(null.index) != [(row, column) for row in table.index for column in table.columns]:
        raise ValueError("null must be of the same pairs of layers as the table, in its order")
    if ax is None:
        ax = plt.subplots(figsize=(6, 4), layout="constrained")[1]
    distance, chosen = _depth_distance(table)
    values = table.to_numpy(float)[chosen]
    style: dict[str, object] = {"color": BLUE, "linewidth": 1.5, "zorder": 3, **line}
    mean = pd.Series(values).groupby(distance).mean()
    (drawn,) = ax.plot(mean.index, mean, **style)  # type: ignore[arg-type]
    ax.scatter(distance, values, s=6, color=drawn.get_color(), alpha=0.25, linewidths=0, zorder=2)
    if null is not None:
        draws = null.to_numpy(float).reshape(*table.shape, -1)[chosen]
        by_distance = pd.Series(draws.ravel()).groupby(np.repeat(distance, draws.shape[1]))
        level, std = by_distance.mean(), by_distance.std(ddof=0)
        draw_chance(ax, level.index.to_numpy(), level, std, "samples shuffled", zorder=1)
    ax.set_xlabel("distance in depth (layers)")
    ax.set_ylabel(_TITLES.get(table.attrs.get("measure", ""), str(table.attrs.get("measure", "similarity"))))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    if table.attrs.get("measure"):
        _title(ax, table)
    return ax


def _depth_distance(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Distance in layers of the chosen pairs, and which pairs these are."""
    rows, columns = table.shape
    values = table.to_numpy(float)
    own = list(table.index) == list(table.columns) and table.index.name == table.columns.name
    if own and np.allclose(values, values.T, equal_nan=True):
        i, j = np.indices(table.shape)
        return np.abs(i - j)[i <= j], i <= j
    deepest = max(rows, columns) - 1
    depth = [np.linspace(0, deepest, size) if size > 1 else np.array([deepest / 2]) for size in (rows, columns)]
    return np.abs(depth[0][:, None] - depth[1]).round().ravel().astype(int), np.ones(table.shape, dtype=bool)


def sample_agreement(
    scores: torch.Tensor | np.ndarray | pd.Series,
    *,
    images: torch.Tensor | np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    labels: Labels | None = None,
    count: int = 6,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Which samples two layers see alike and which differently: all scores in order, and the samples at both ends.

    Parameters
    ----------
    scores
        One number per sample, as `gbs_per_sample` gives, (n,).
    images
        The samples as images, (n, h, w), (n, c, h, w) or (n, h, w, c) with 1 or 3 channels, in any range.
    texts
        The samples as texts, n of them, in place of images.
    labels
        Class of each sample, written beside its score.
    count
        How many samples to show at each end.
    axes
        Axes to draw into: one, and with images 2 * count more, with texts 2 more.

    Returns
    -------
    ndarray of Axes
        The curve of all scores, then the samples of least agreement and those of most.

    Raises
    ------
    ValueError
        If scores are not (n,) or not finite, images, texts or labels are not n, both images and texts are given, or the
        number of axes is another.

    Examples
    --------
    >>> axes = sample_agreement(torch.tensor([0.9, 0.1, 0.5]), images=torch.rand(3, 1, 8, 8), count=1)
    >>> [ax.get_title() for ax in axes[1:]]
    ['1: 0.10', '0: 0.90']
    """
    values = np.asarray(scores.detach().double().cpu() if isinstance(scores, torch.Tensor) else scores, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores must be one number per sample, shape (n,), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite, got NaN or infinite ones for {(~np.isfinite(values)).sum()} samples")
    if images is not None and texts is not None:
        raise ValueError("images and texts are both given: choose one")
    classes = None if labels is None else as_labels(labels)
    for name, items in (("images", images), ("texts", texts), ("labels", classes)):
        if items is not None and len(items) != len(values):
            raise ValueError(f"{name} must be one per sample: expected {len(values)}, got {len(items)}")
    count = max(1, min(count, len(values) // 2))
    order = np.argsort(values, kind="stable")
    shown = np.concatenate((order[:count], order[::-1][:count]))
    if axes is None:
        axes = _agreement_axes(images is not None, texts is not None, count)
    expected = 1 + (2 * count if images is not None else 2 if texts is not None else 0)
    axes = list(np.asarray(axes, dtype=object).flat)
    if len(axes) != expected:
        raise ValueError(f"axes must be {expected} for these samples, got {len(axes)}")
    _ordered_scores(axes[0], values[order])
    tags = [f"{sample}: {values[sample]:.2f}" for sample in shown]
    if classes is not None:
        tags = [f"{tag} ({classes[int(sample)]})" for tag, sample in zip(tags, shown, strict=True)]
    if images is not None:
        pictures = _as_pictures(images, shown)
        for ax, picture, tag in zip(axes[1:], pictures, tags, strict=True):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(tag, size=7)
            ax.set_axis_off()
    if texts is not None:
        for ax, part in ((axes[1], slice(0, count)), (axes[2], slice(count, None))):
            _lines(ax, [f"{tag}  {texts[s]}" for tag, s in zip(tags[part], shown[part], strict=True)])
            ax.set_title("least agreement" if part.start == 0 else "most agreement", size=9, loc="left")
    return np.array(list(axes), dtype=object)


def _agreement_axes(images: bool, texts: bool, count: int) -> list[Axes]:
    if images:
        figure = plt.figure(figsize=(4 + 1.05 * count, 3.2), layout="constrained")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[4, 1.05 * count]).flat
        ends = list(right.subfigures(2, 1, squeeze=False).flat)
        for end, name in zip(ends, ("least", "most"), strict=True):
            end.suptitle(f"{name} agreement", size=9)
        return [left.subplots(), *(ax for end in ends for ax in end.subplots(1, count, squeeze=False).flat)]
    if texts:
        figure, grid = plt.subplots(
            3, 1, figsize=(8, 3 + 0.5 * count), layout="constrained", height_ratios=[3, count / 3, count / 3]
        )
        return list(grid)
    return [plt.subplots(figsize=(5, 3.5), layout="constrained")[1]]


def _ordered_scores(ax: Axes, ordered: np.ndarray) -> None:
    ax.plot(np.arange(len(ordered)), ordered, color=BLUE, linewidth=1.5)
    mean = ordered.mean()
    ax.axhline(mean, color=GREY, linestyle="--", linewidth=1)
    ax.annotate(f"mean {mean:.3f}", (0, mean), (2, 3), textcoords="offset points", color=GREY, size=8)
    ax.set_xlabel("samples, least agreement first")
    ax.set_ylabel("agreement of the two layers")
    ax.spines[["top", "right"]].set_visible(False)


def _as_pictures(images: torch.Tensor | np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The chosen images as (m, h, w) or (m, h, w, 3) in [0, 1], all on the scale of the whole set."""
    pixels = images.detach().cpu() if isinstance(images, torch.Tensor) else np.asarray(images)
    low, high = float(pixels.min()), float(pixels.max())
    some = pixels[shown]
    array = some.double().numpy() if isinstance(some, torch.Tensor) else some
    if array.ndim == 4 and array.shape[-1] not in (1, 3) and array.shape[1] in (1, 3):
        array = np.moveaxis(array, 1, -1)
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 and not (array.ndim == 4 and array.shape[-1] == 3):
        shapes = "(n, h, w), (n, c, h, w) or (n, h, w, c) with 1 or 3 channels"
        raise ValueError(f"images must be {shapes}, got {tuple(pixels.shape)}")
    return np.asarray((array - low) / ((high - low) or 1.0))


def _lines(ax: Axes, texts: list[str]) -> None:
    for place, text in enumerate(texts):
        ax.text(0, 1 - (place + 0.5) / len(texts), textwrap.shorten(text, 110), size=8, va="center", family="monospace")
    ax.set_axis_off()
