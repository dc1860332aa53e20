"""From numbers by layer to a plan: the cumulative rule, the lowest scores, and those in view of what is dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
import pandas as pd

from repgraph.prune.plan import Plan
from repgraph.segments import Segmentation


def redundant_blocks(curve: pd.Series | pd.DataFrame, droppable: Sequence[str], *, tol: float = 0.01) -> Plan:
    """The blocks at which a curve has not risen by more than `tol` since the last block that is kept.

    Walk through the layers in order; a droppable layer l goes if Q_l - Q_kept <= tol, Q_kept being the curve at the
    last layer that stays. Each step alone would not do: a slow climb rises by less than tol at every block, and all of
    them would go.

    Parameters
    ----------
    curve
        One number per layer in execution order, as the modularity of `profile`; of a table its column "modularity".
    droppable
        Layers that may go, as `droppable_layers` names them; the others always stay.
    tol
        Largest rise over the last kept layer that still counts as none, in the curve's units; at least 0. In the
        paper's control experiment layers of a rise of 0.01 were cut at no cost, layers of 0.04 were not.

    Returns
    -------
    Plan
        With the rise over the last kept layer as scores, and tol as the threshold.

    Raises
    ------
    ValueError
        If the curve has fewer than two layers, layers twice, or values that are not finite; if a droppable layer is not
        in it; if tol is negative.

    References
    ----------
    Lu et al., "Understanding the Dynamics of DNNs Using Graph Modularity", ECCV 2022, drop blocks on plateaus and
    where the curve falls. The paper gives no threshold; the rule and its tol are ours.

    Examples
    --------
    >>> curve = pd.Series({"stem": 0.1, "a": 0.105, "b": 0.108, "c": 0.115, "d": 0.3})
    >>> redundant_blocks(curve, ["a", "b", "c", "d"]).layers
    ('a', 'b')
    """
    if isinstance(curve, pd.DataFrame):
        if "modularity" not in curve:
            raise ValueError(f"curve has no column 'modularity', its columns are {', '.join(map(str, curve))}")
        curve = curve["modularity"]
    values = _numbers(curve, "curve")
    if len(values) < 2:
        raise ValueError(f"curve must have at least 2 layers, got {len(values)}")
    _check_known(droppable, list(values), "curve")
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol!r}")
    scores, gone = {}, []
    names = iter(values.items())
    _, kept = next(names)
    for name, value in names:
        if name in droppable:
            scores[name] = value - kept
        if name in droppable and value - kept <= tol:
            gone.append(name)
        else:
            kept = value
    return Plan(layers=tuple(gone), by="modularity", scores=scores, threshold=float(tol), settings=_settings(curve))


def plan_layers(
    scores: pd.Series,
    count: int | None = None,
    *,
    ratio: float | None = None,
    segments: Segmentation | None = None,
) -> Plan:
    """The `count` layers of the lowest scores.

    Parameters
    ----------
    scores
        One number per droppable layer, high = keep: a column of `layer_scores`, or what `drop_and_evaluate` gives. Its
        name goes into the plan.
    count
        How many layers to drop, 0 to all of the scores.
    ratio
        In place of count: the share of the scored layers to drop, floor(ratio x layers + 1e-9).
    segments
        Spread the count over the runs of `segment_layers`: each run loses its share by size, by largest remainders
        (ties to the later run), never all of its layers.

    Returns
    -------
    Plan
        Equal scores: the later layer goes.

    Raises
    ------
    ValueError
        If the scores are empty, name a layer twice or are not finite; if not exactly one of count and ratio is given,
        or it is out of range; if a layer is in none of the runs, or the runs cannot lose as many.

    Examples
    --------
    >>> plan_layers(pd.Series({"a": 0.3, "b": 0.1, "c": 0.2}, name="cka"), 2)
    Plan: drop 2 of 3 layers, by cka
           score
      a      0.3
      b      0.1  drop
      c      0.2  drop
    """
    values = _numbers(scores, "scores")
    count = _count(count, ratio, len(values))
    names = list(values)
    order = sorted(names, key=lambda name: (values[name], -names.index(name)))
    if segments is None:
        gone = set(order[:count])
    else:
        shares = _shares(segments, names, count)
        gone = {name for run, share in shares for name in [x for x in order if x in run][:share]}
    settings = {**_settings(scores), **({} if segments is None else {"segments": segments.m})}
    layers = tuple(name for name in names if name in gone)
    return Plan(layers=layers, by=str(scores.name or "scores"), scores=values, settings=settings)


def plan_greedily(
    distance: pd.DataFrame, droppable: Sequence[str], count: int | None = None, *, ratio: float | None = None
) -> Plan:
    """Drop `count` layers one after the other, each time the one nearest to the last layer that is still kept.

    The score of a layer l is distance(kept, l), kept being the last layer before it in the table that has not been
    dropped; so a run of layers that each change little is not dropped as a whole.

    Parameters
    ----------
    distance
        Layer x layer table, layers in execution order: how far the column's layer is from the row's, low = redundant.
        1 - a table of `between_layers` for similarities; Q_column - Q_row for a curve.
    droppable
        Layers that may go. The first layer of the table has none before it and stays.
    count, ratio
        As in `plan_layers`, of the droppable layers.

    Returns
    -------
    Plan
        The scores are those at the moment of the drop, and those at the end for the layers that stay.

    Raises
    ------
    ValueError
        If the table is not square with equal names, or not finite; if a droppable layer is not in it or is its first;
        if count is out of range.

    Examples
    --------
    >>> q = pd.Series({"stem": 0.1, "a": 0.104, "b": 0.108, "c": 0.3})
    >>> gain = pd.DataFrame(q.to_numpy()[None] - q.to_numpy()[:, None], q.index, q.index)
    >>> plan_greedily(gain, ["a", "b", "c"], 2).layers
    ('a', 'b')
    """
    names = [str(name) for name in distance.index]
    if names != [str(name) for name in distance.columns] or len(set(names)) != len(names):
        raise ValueError("distance must have the same layers as rows and columns, each once, in one order")
    table = distance.to_numpy(float)
    if not np.isfinite(table).all():
        raise ValueError(f"distance of {names[int((~np.isfinite(table)).any(0).argmax())]!r} is not finite")
    _check_known(droppable, names, "distance")
    if names[0] in droppable:
        raise ValueError(f"droppable holds {names[0]!r}, the first layer of the table, which has none before it")
    count = _count(count, ratio, len(droppable))
    kept, left = list(range(len(names))), {names.index(name) for name in droppable}
    scores: dict[int, float] = {}
    for _ in range(count):
        now = {i: float(table[kept[kept.index(i) - 1], i]) for i in left}
        gone = min(left, key=lambda i: (now[i], -i))
        scores[gone] = now[gone]
        kept.remove(gone)
        left.remove(gone)
    dropped = set(scores)
    scores |= {i: float(table[kept[kept.index(i) - 1], i]) for i in left}
    by = str(distance.attrs.get("measure", "distance"))
    return Plan(
        layers=tuple(name for i, name in enumerate(names) if i in dropped),
        by=f"{by}, greedily",
        scores={names[i]: scores[i] for i in sorted(scores)},
    )


def _numbers(values: pd.Series, name: str) -> dict[str, float]:
    if not isinstance(values, pd.Series):
        raise ValueError(f"{name} must be a pandas Series over layers, got {type(values).__name__}")
    if values.index.has_duplicates:
        raise ValueError(f"{name} name {values.index[values.index.duplicated()][0]!r} twice")
    if values.empty:
        raise ValueError(f"{name} are empty: no layer can be dropped")
    found = {str(key): float(value) for key, value in values.items()}
    if bad := [key for key, value in found.items() if not math.isfinite(value)]:
        raise ValueError(f"{name} must be finite, got {found[bad[0]]} at {bad[0]!r}")
    return found


def _check_known(droppable: Sequence[str], names: Sequence[str], where: str) -> None:
    if isinstance(droppable, str):
        raise ValueError(f"droppable must be a sequence of layers, got {droppable!r}")
    if twice := [name for name in droppable if list(droppable).count(name) > 1]:
        raise ValueError(f"droppable holds {twice[0]!r} twice")
    if unknown := [name for name in droppable if name not in names]:
        raise ValueError(f"droppable holds {unknown[0]!r}, which the {where} does not: it has {', '.join(names)}")


def _count(count: int | None, ratio: float | None, total: int) -> int:
    if (count is None) == (ratio is None):
        raise ValueError(f"pass one of count and ratio, got count = {count!r} and ratio = {ratio!r}")
    if ratio is not None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be from 0 to 1, got {ratio!r}")
        return math.floor(total * ratio + 1e-9)
    if isinstance(count, bool) or not isinstance(count, Integral) or not 0 <= int(count) <= total:
        raise ValueError(f"count must be an integer from 0 to the {total} droppable layers, got {count!r}")
    return int(count)


def _shares(segments: Segmentation, names: Sequence[str], count: int) -> list[tuple[list[str], int]]:
    """How many layers each run loses: in proportion to its droppable ones, and never the whole run."""
    runs = [[name for name in run if name in names] for run in segments.runs]
    if outside := [name for name in names if not any(name in run for run in runs)]:
        raise ValueError(f"segments: {outside[0]!r} is in none of the runs")
    room = [min(len(found), len(run) - 1) for found, run in zip(runs, segments.runs, strict=True)]
    if count > sum(room):
        raise ValueError(f"segments: the {segments.m} runs can lose {sum(room)} layers, one of each stays; got {count}")
    shares = [0] * len(runs)
    for _ in range(count):  # the run that is furthest behind its share
        open_runs = [i for i in range(len(runs)) if shares[i] < room[i]]
        behind = {i: len(runs[i]) * count - shares[i] * len(names) for i in open_runs}
        shares[max(open_runs, key=lambda i: (behind[i], i))] += 1
    return list(zip(runs, shares, strict=True))


def _settings(values: pd.Series) -> Mapping[str, object]:
    """What moved the numbers, as far as it is plain data."""
    plain = (str, int, float, bool)
    return {str(key): value for key, value in values.attrs.items() if isinstance(value, plain)}
