"""The cells of a network in a plane, with the decision boundary inside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection

if TYPE_CHECKING:
    from repgraph.metrics.spline import SlicePartition

_ORANGE = "#D55E00"


def partition(
    cells: SlicePartition,
    *,
    color_by: Literal["slope", "area", "layer"] = "slope",
    boundary: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """The cells of a network in a plane, with the decision boundary inside them.

    Parameters
    ----------
    cells
        From `slice_partition`, `slice_through_samples` or `slice_through_pca`.
    color_by
        Fill: "slope", the norm of the outputs' gradient in the plane; "area"; or "layer": no fill, and borders in the
        colour of the layer that draws them.
    boundary
        Draw where the largest output changes (a single output's zero), if outputs are there.
    ax
        Axes to draw into; new ones by default.

    Returns
    -------
    Axes
        In the coordinates of the plane, at one scale; crosses mark the samples that it was laid through.

    Raises
    ------
    ValueError
        If color_by is unknown, or "slope" of a partition by some of the layers.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from repgraph.metrics.spline import slice_partition
    >>> net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    >>> cells = slice_partition(net, torch.zeros(2), torch.eye(2), [[-1, -1], [1, -1], [1, 1], [-1, 1]])
    >>> len(partition(cells).collections[0].get_paths()) == cells.count
    True
    """
    if color_by not in ("slope", "area", "layer"):
        raise ValueError(f"color_by must be 'slope', 'area' or 'layer', got {color_by!r}")
    if color_by == "slope" and cells.forms is None:
        raise ValueError("color_by='slope' needs the partition by all layers: its outputs")
    if ax is None:
        ax = plt.subplots(figsize=(6, 5.5), layout="constrained")[1]
    names: list[str] = []  # of the layers that draw borders
    thin = float(np.clip(12 / cells.count**0.5, 0.08, 0.8))
    fill = PolyCollection(cells.polygons, linewidths=thin, edgecolors="#555555", facecolors="white")
    if color_by == "layer":
        fill.set_edgecolor("none")
        drawn = cells.border_layers()
        names = [name for name in cells.region.layers if name in set(drawn)]
        colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
        ax.add_collection(fill)
        for name, color in zip(names, colors, strict=True):
            lines = LineCollection(cells.borders[drawn == name], colors=[color], linewidths=max(thin, 0.4), label=name)
            ax.add_collection(lines)
    else:
        values = cells.areas
        if color_by == "slope":
            assert cells.forms is not None
            values = np.linalg.norm(cells.forms[:, 1:] - cells.forms[:, :1], axis=(1, 2))
        positive = values[values > 0]
        log = color_by == "area" or (len(positive) and positive.max() > 50 * positive.min())
        fill.set_array(values)
        fill.set_cmap("Blues")
        if log and len(positive):
            fill.set_norm(mpl.colors.LogNorm(np.quantile(positive, 0.02), positive.max(), clip=True))
        ax.add_collection(fill)
        figure = ax.get_figure(root=True)
        assert figure is not None
        label = "gradient norm in the plane" if color_by == "slope" else "area of the cell"
        figure.colorbar(fill, ax=ax, shrink=0.6, aspect=25, label=label)
    if boundary and cells.forms is not None:
        found = cells.decision_boundary()
        ax.add_collection(LineCollection(list(found), colors=_ORANGE, linewidths=1.8, label="decision boundary"))
    if color_by == "layer" and 0 < len(names) <= 12:
        ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.plot(*cells.points.T, "x", color="black", markersize=7, markeredgewidth=2)
    low, high = cells.domain.min(0), cells.domain.max(0)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_xticks([])
    ax.set_yticks([])
    cell = "cell" if cells.count == 1 else "cells"
    ax.set_title(
        f"{cells.count} {cell} of {cells.region.gates} gates in {len(cells.region.layers)} layers; "
        f"plane of {high[0] - low[0]:.3g} x {high[1] - low[1]:.3g}",
        loc="left", size=8, color="#444444",
    )  # fmt: skip
    return ax
