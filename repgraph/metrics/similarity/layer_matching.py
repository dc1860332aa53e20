"""Layer matching: how often a measure of similarity finds the corresponding layer of another network.

Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv 1905.00414.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd
from torch import Tensor


def layer_matching_accuracy(
    table: pd.DataFrame | Tensor | np.ndarray,
    *,
    group: Callable[[str], object] | None = None,
    best: Literal["largest", "smallest"] | None = None,
) -> float:
    """Share of the layers whose best match is the corresponding layer of the other network, in [0, 1].

    For each row the column of largest similarity is a hit if it is at the row's own place, or with ``group`` if both
    layers are of one group.

    Parameters
    ----------
    table
        Layers of one network by layers of the other, of `between_layers` with any measure, or a plain matrix.
    group
        Layer name -> stage, for networks of different depth, as ``lambda name: name.split(".")[0]``. Without it the
        table must be square.
    best
        Which entry is the best match; by default "smallest" if the table says that it holds a distance, else "largest".

    Returns
    -------
    float
        The share of hits. Of two equal entries the first counts. By chance 1 / L, or with groups
        `layer_matching_chance`.

    Raises
    ------
    ValueError
        If the table has a nan, is not square and has no groups, or `best` is unknown.

    Notes
    -----
    Networks that differ in their initial weights only should score near 1. The published protocol averages over all
    pairs of ten networks.

    References
    ----------
    Kornblith et al., ICML 2019, section 6.1; Chen et al., arXiv 2111.11165, section 4.1.

    Examples
    --------
    >>> table = pd.DataFrame([[0.9, 0.5], [0.8, 0.7]], index=["a", "b"], columns=["a", "b"])
    >>> layer_matching_accuracy(table)
    0.5
    """
    if best not in (None, "largest", "smallest"):
        raise ValueError(f"best must be 'largest' or 'smallest', got {best!r}")
    table = table if isinstance(table, pd.DataFrame) else pd.DataFrame(np.asarray(table))
    values = table.to_numpy(float)
    if np.isnan(values).any():
        row, column = np.argwhere(np.isnan(values))[0]
        raise ValueError(f"table has a nan at {table.index[row]!r}, {table.columns[column]!r}: leave that layer out")
    falls = table.attrs.get("distance", False) if best is None else best == "smallest"
    found = values.argmin(1) if falls else values.argmax(1)
    return float(_hits(table, group)[np.arange(len(table)), found].mean())


def layer_matching_chance(table: pd.DataFrame, *, group: Callable[[str], object] | None = None) -> float:
    """Layer-matching accuracy of a random choice for each layer.

    Raises
    ------
    ValueError
        If the table is not square and has no groups.

    Examples
    --------
    >>> layer_matching_chance(pd.DataFrame(0.0, index=["a.0", "b.0"], columns=["a.0", "a.1", "a.2", "b.0"]),
    ...                       group=lambda name: name[0])
    0.5
    """
    return float(_hits(table, group).mean())


def _hits(table: pd.DataFrame, group: Callable[[str], object] | None) -> np.ndarray:
    if not table.size:
        raise ValueError("table must have at least one layer on each side")
    if group is None:
        if table.shape[0] != table.shape[1]:
            raise ValueError(f"table must be square, or group= given, got {table.shape[0]} x {table.shape[1]} layers")
        return np.eye(len(table), dtype=bool)
    rows, columns = ([group(str(name)) for name in names] for names in (table.index, table.columns))
    return np.array([[a == b for b in columns] for a in rows])
