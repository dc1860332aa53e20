"""Plans: the score of every layer that could have been dropped, and those that were; widths before and after a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes

from repgraph.plot.by_layer import BLUE, GREY, label_layers, layer_axes


class Planned(Protocol):
    """What a `Plan` has."""

    @property
    def layers(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def by(self) -> str: ...  # noqa: D102
    @property
    def scores(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def threshold(self) -> float | None: ...  # noqa: D102
    @property
    def filters(self) -> Mapping[str, Sequence[int]]: ...  # noqa: D102
    @property
    def settings(self) -> Mapping[str, object]: ...  # noqa: D102


def plan(plan: Planned, *, ax: Axes | None = None) -> Axes:
    """The score of every layer that could be dropped, in order; the dropped ones in orange.

    Parameters
    ----------
    plan
        A `repgraph.prune.Plan` with scores.
    ax
        Axes to draw into; new ones of a width that suits the number of layers by default.

    Returns
    -------
    Axes
        With the threshold as a line, where one decided.

    Raises
    ------
    ValueError
        If the plan has no scores.

    Examples
    --------
    >>> from repgraph.prune import Plan
    >>> ax = plan(Plan(layers=("b",), by="cka", scores={"a": 0.3, "b": 0.1}))
    >>> [float(bar.get_height()) for bar in ax.patches], ax.get_ylabel()
    ([0.3, 0.1], 'cka')
    """
    if not plan.scores:
        raise ValueError("plan must have scores to draw, this one only names layers")
    names, values = list(plan.scores), np.array(list(plan.scores.values()))
    if ax is None:
        ax = layer_axes(len(names))
    colors = ["#D55E00" if name in plan.layers else BLUE for name in names]
    ax.bar(np.arange(len(names)), values, color=colors, width=0.75)
    ax.axhline(0, color=GREY, linewidth=0.8)
    if plan.threshold is not None:
        ax.axhline(plan.threshold, color=GREY, linestyle="--", linewidth=1)
    label_layers(ax, names)
    ax.set_ylabel(plan.by.replace("_", " "))
    ax.set_title(f"{sum(name in plan.layers for name in names)} of {len(names)} layers dropped (orange)", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def widths(plan: Planned, *, ax: Axes | None = None) -> Axes:
    """How many filters every layer keeps (blue) of those that it had (orange: cut), in the order of the model.

    Parameters
    ----------
    plan
        A `repgraph.prune.Plan` that `plan_filters` or `search_widths` made.
    ax
        Axes to draw into; new ones of a width that suits the number of layers by default.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If the plan does not know the widths of its layers.

    Examples
    --------
    >>> from repgraph.prune import Plan
    >>> ax = widths(Plan(filters={"conv1": (0, 2)}, settings={"widths": {"conv1": 8, "conv2": 4}}))
    >>> [float(bar.get_height()) for bar in ax.patches[:2]]
    [6.0, 4.0]
    """
    total = plan.settings.get("widths")
    if not isinstance(total, Mapping) or not total:
        raise ValueError("plan must say in its settings how wide its layers are: make it with plan_filters")
    names = list(total)
    whole = np.array([float(total[name]) for name in names])
    cut = np.array([float(len(plan.filters.get(name, ()))) for name in names])
    if ax is None:
        ax = layer_axes(len(names))
    places = np.arange(len(names))
    ax.bar(places, whole - cut, color=BLUE, width=0.75)
    ax.bar(places, cut, bottom=whole - cut, color="#D55E00", width=0.75)
    label_layers(ax, names)
    ax.set_ylabel("filters")
    ax.set_title(
        f"{int(cut.sum())} of {int(whole.sum())} filters cut (orange), by {plan.by.replace('_', ' ')}", fontsize=9
    )
    ax.spines[["top", "right"]].set_visible(False)
    return ax
