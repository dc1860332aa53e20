"""Feature entropy over the units of each layer, and complexity over the layers, with floors and ceilings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from repgraph.plot.by_layer import BLUE, draw_limit, label_layers, layer_axes

if TYPE_CHECKING:
    from repgraph.metrics.complexity import ComplexityReport
    from repgraph.metrics.feature_entropy import UnitFeatureEntropy

_ORANGE, _GREEN = "#D55E00", "#009E73"


def unit_entropies(result: UnitFeatureEntropy, *, ax: Axes | None = None) -> Axes:
    """Distribution of the feature entropy over the units of each layer, with the layer's mean, floor and ceiling.

    Parameters
    ----------
    result
        From `unit_feature_entropy`; a unit's values are averaged over the classes.
    ax
        Axes to draw into; new ones by default.

    Returns
    -------
    Axes
        One shape per layer, as wide as there are units; a line through the means.

    Examples
    --------
    >>> import torch
    >>> from repgraph.metrics.feature_entropy import unit_feature_entropy
    >>> maps = torch.rand(40, 3, 7, 7)
    >>> ax = unit_entropies(unit_feature_entropy({"conv": maps}, torch.arange(40) % 2))
    >>> ax.get_ylabel()
    'feature entropy, nats'
    """
    table = result.layers
    if ax is None:
        ax = layer_axes(len(table))
    x = np.arange(len(table))
    by_unit = result.units["entropy"].groupby(level=["layer", "unit"]).mean()
    for place, layer in enumerate(table.index):
        values = by_unit[layer].dropna().to_numpy()
        if len(values) > 1 and np.ptp(values) > 0:
            parts = ax.violinplot([values], [place], widths=0.8, showextrema=False)
            for body in parts["bodies"]:  # type: ignore[attr-defined]
                body.set(facecolor=BLUE, alpha=0.35, linewidth=0)
        else:
            ax.plot(np.full(len(values), place), values, "_", color=BLUE)
    ax.plot(x, table["entropy"], color=BLUE, marker="o", markersize=3.5, linewidth=1.5)
    draw_limit(ax, x, table["floor"], "noise", below=False)
    draw_limit(ax, x, table["ceiling"], "ceiling ln n", below=True)
    label_layers(ax, [str(name) for name in table.index])
    ax.set_ylabel("feature entropy, nats")
    ax.set_title(
        f"{int(table['units'].sum())} units, {table['n'].mean():.0f} samples per class; width: units, line: mean",
        loc="left", size=8, color="#444444",
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def complexity(
    report: ComplexityReport, *, of: Literal["entropy", "label_information"] = "entropy", ax: Axes | None = None
) -> Axes:
    """Complexity of each layer, of the layers so far and of those to come, with the ceiling.

    Parameters
    ----------
    report
        From `transformation_complexity`.
    of
        "entropy", or "label_information" where the report has labels.
    ax
        Axes to draw into; new ones by default.

    Returns
    -------
    Axes
        Three lines, in bits.

    Raises
    ------
    ValueError
        If `of` is unknown or the report has no labels for it.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from repgraph.metrics.complexity import transformation_complexity
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    >>> ax = complexity(transformation_complexity(net, torch.randn(50, 3), lam=1.0))
    >>> [line.get_label() for line in ax.get_lines()[:3]]
    ['of the layer', 'of the layers so far', 'of this and later layers']
    """
    if of not in ("entropy", "label_information"):
        raise ValueError(f"of must be 'entropy' or 'label_information', got {of!r}")
    table = report.layers
    end = "" if of == "entropy" else "_label_information"
    names = {
        of: "of the layer",
        f"cumulative{end}": "of the layers so far",
        f"remaining{end}": "of this and later layers",
    }
    if of not in table:
        raise ValueError("the report has no labels: pass labels to transformation_complexity for label_information")
    if ax is None:
        ax = layer_axes(len(table))
    x = np.arange(len(table))
    for (column, label), color in zip(names.items(), (BLUE, _ORANGE, _GREEN), strict=True):
        ax.plot(x, table[column], color=color, marker="o", markersize=3, linewidth=1.5, label=label)
    ceiling, text = (report.ceiling, "ceiling log2 N") if of == "entropy" else (report.label_ceiling, "ceiling H(Y)")
    draw_limit(ax, x, pd.Series(np.full(len(x), ceiling)), text, below=True)
    label_layers(ax, [str(name) for name in table.index])
    ax.set_ylim(bottom=0)
    ax.set_ylabel("transformation complexity, bits" if of == "entropy" else "label information, bits")
    model = f"{table.attrs['model']}, " if "model" in table.attrs else ""
    ax.set_title(
        f"{model}{report.gates} gates, {report.n} samples, lam={report.lam}, {report.estimator}",
        loc="left", size=8, color="#444444",
    )  # fmt: skip
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
