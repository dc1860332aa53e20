"""Whether criteria rank the filters alike, and whether other images would rank them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor


def score_agreement(scores: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """Mean over the layers of the Spearman correlation between two criteria's scores of the filters, in [-1, 1].

    Parameters
    ----------
    scores
        Criterion -> layer -> scores (C,). A pair of criteria is compared over the layers that both have.

    Returns
    -------
    DataFrame
        Criterion x criterion, symmetric, diagonal 1; NaN where no layer is left. ``attrs["constant"]`` counts the
        layers of each criterion that were left out because all filters score the same.

    Raises
    ------
    ValueError
        If there are no criteria, a layer's scores differ in number between criteria, or are not finite.

    Notes
    -----
    Ties take the mean of their ranks. Every layer weighs the same, whatever its width; random scores of C filters have
    a standard deviation of 1 / sqrt(C - 1) around 0.

    Examples
    --------
    >>> a, b = {"conv": torch.tensor([1.0, 2, 3])}, {"conv": torch.tensor([10.0, 30, 20])}
    >>> score_agreement({"a": a, "b": b}).round(3).values.tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    if not scores:
        raise ValueError("scores must hold at least one criterion")
    names = list(scores)
    total, count = np.zeros((2, len(names), len(names)))
    constant = dict.fromkeys(names, 0)
    for layer in dict.fromkeys(layer for own in scores.values() for layer in own):
        having = [name for name in names if layer in scores[name]]
        rows = [_checked(scores[name][layer], f"scores of {name!r}, layer {layer!r},", 1) for name in having]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"layer {layer!r} must have as many scores in each criterion, got {list(map(len, rows))}")
        units = _unit_ranks(np.stack(rows))
        varied = ~np.isnan(units).any(1)
        for name, any_ in zip(having, varied, strict=True):
            constant[name] += not any_
        at = np.ix_(*[[names.index(name) for name, any_ in zip(having, varied, strict=True) if any_]] * 2)
        total[at] += units[varied] @ units[varied].T
        count[at] += 1
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    table = pd.DataFrame(mean.clip(-1, 1), index=names, columns=names)
    table.attrs = {"constant": constant}
    return table


def score_stability(
    by_sample: Mapping[str, Tensor], *, sizes: Sequence[int] = (16, 64, 256), repeats: int = 10, seed: int = 0
) -> pd.DataFrame:
    """How alike two disjoint sets of so many images rank a layer's filters: mean Spearman correlation, in [-1, 1].

    Two random sets of m images without one in common, the mean score of each filter over either, the Spearman
    correlation of the two over the filters; the mean over the repeats.

    Parameters
    ----------
    by_sample
        Layer -> score of each filter on each image, (n, C).
    sizes
        Images m in a set; 2 m <= n.
    repeats
        Pairs of sets. Layers of as many images share them.
    seed
        At least 0. No global random state is read or changed.

    Returns
    -------
    DataFrame
        Layer x size; NaN where all filters score the same. The settings are in `attrs`.

    Raises
    ------
    ValueError
        If scores are not (n, C) or not finite, a size is out of range, or repeats is less than 1.

    Examples
    --------
    >>> image, channel = torch.rand(64, 1), torch.arange(8)
    >>> score_stability({"conv": image + channel}, sizes=(1, 32)).loc["conv"].round(6).tolist()
    [1.0, 1.0]
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats!r}")
    table = {}
    for layer, values in by_sample.items():
        x = _checked(values, f"scores of layer {layer!r}", 2)
        if wrong := [size for size in sizes if not 1 <= size <= len(x) / 2]:
            raise ValueError(f"sizes must be from 1 to {len(x) // 2}, half of the {len(x)} images, got {wrong[0]!r}")
        table[layer] = [_stability(x, size, repeats, seed) for size in sizes]
    found = pd.DataFrame.from_dict(table, orient="index", columns=list(sizes)).rename_axis("layer")
    found.attrs = {"repeats": repeats, "seed": seed}
    return found


def _stability(x: np.ndarray, size: int, repeats: int, seed: int) -> float:
    chosen = np.zeros((2 * repeats, len(x)))  # rows 2 r and 2 r + 1: the two sets of repeat r
    for repeat in range(repeats):
        images = np.random.default_rng([seed, size, repeat]).permutation(len(x))
        for half in range(2):
            chosen[2 * repeat + half, images[half * size : (half + 1) * size]] = 1
    units = _unit_ranks(chosen @ x)  # sums rank as means do
    correlations = (units[::2] * units[1::2]).sum(1)
    known = correlations[~np.isnan(correlations)]
    return float(known.mean()) if len(known) else np.nan


def _unit_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks along the rows of (k, c), centred and of norm 1, so that products are correlations; NaN where constant."""
    ranks = rankdata(x, axis=1) - (x.shape[1] + 1) / 2
    norm = np.linalg.norm(ranks, axis=1, keepdims=True)
    units: np.ndarray = np.divide(ranks, norm, out=np.full_like(ranks, np.nan), where=norm > 0)
    return units


def _checked(values: Tensor, what: str, ndim: int) -> np.ndarray:
    x: np.ndarray = torch.as_tensor(values).detach().cpu().double().numpy()
    if x.ndim != ndim or x.size == 0:
        raise ValueError(f"{what} must have shape {'(C,)' if ndim == 1 else '(n, C)'}, got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{what} must be finite, got NaN or infinite values")
    return x
