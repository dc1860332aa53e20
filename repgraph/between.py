"""Layer x layer tables of similarity: in one model, between two models, or between clean and altered inputs."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations import Activations, capture
from repgraph.activations.forward import Forward
from repgraph.activations.layers import Select
from repgraph.activations.pairing import check_paired
from repgraph.messages import named, tell
from repgraph.metrics.similarity.measure import Measure
from repgraph.metrics.similarity.minibatch import BatchGram, BatchGrams, minibatch_cka
from repgraph.metrics.similarity.null import can_permute, permuted
from repgraph.parallel import Item, each

_BLOCK = 8  # layers on each side of a block of pairs

Similarity = Callable[..., float]
Given = tuple[Similarity, Callable[..., object] | None, Mapping[str, object]]
"""A similarity, its preparation and its options, as the user gave them."""


@dataclass(frozen=True)
class _Measure:
    """A similarity with its options: how a layer is prepared and how two prepared layers are compared."""

    name: str
    prepare: Callable[[object], object]
    base: Callable[[object], object] | None
    pair: Callable[[object, object], Tensor | float]
    distance: bool
    symmetric: bool
    settings: dict[str, object]


def between_layers(
    similarity: Similarity,
    a: Mapping[str, object],
    b: Mapping[str, object] | None = None,
    *,
    prepare: Callable[..., object] | None = None,
    names: tuple[str, str] | None = None,
    device: torch.device | str | None = None,
    permutations: int = 10,
    seed: int = 0,
    progress: bool = True,
    **options: object,
) -> pd.DataFrame:
    """Similarity of every layer of a to every layer of b: which layer corresponds to which, and which are alike.

    Every layer is read and prepared once (its graph or Gram matrix), so that Activations of any size will do; what is
    held at a time is one layer and what the measure prepares of all: n k numbers a layer for graphs, n^2 for Gram
    matrices.

    Parameters
    ----------
    similarity
        A measure of `repgraph.metrics.similarity`, or any function of two tensors or prepared objects, which is then
        called for every ordered pair.
    a, b
        Activations, or mappings from layer names to features (n, ...), graphs or Gram matrices, over the same samples.
        Without b the layers of a are compared with each other.
    prepare
        Applied to each layer first, once; measures of repgraph name their own.
    names
        What to call a and b on the axes; their model classes by default.
    device
        Where to prepare and compare; where the features are by default.
    permutations
        Pairs of layers, evenly spaced, for which the samples of b are shuffled once for the chance level; 0 for none.
    seed
        Seed of the shuffling.
    progress
        Show progress bars.
    **options
        Passed to the measure, as ``unbiased=True`` or ``k=10``.

    Returns
    -------
    DataFrame
        Rows are the layers of a, columns those of b, both in execution order; the names of index and columns say which
        is which. `attrs` hold the measure and its options, n, chance and chance_std (mean and deviation over the
        shuffled pairs), and whether it is a distance. nan, with a warning, where a measure is undefined.

    Raises
    ------
    ValueError
        If a and b are not over the same samples: other numbers, sample ids or inputs (see `capture`); or as the
        measure, with the layer's name.
    TypeError
        If the measure does not know an option.

    Notes
    -----
    One half of a's own table is computed where the measure is symmetric, as all of ours but CKNNA are. Inside
    ``joblib.parallel_config(...)`` layers are prepared, and blocks of 8 x 8 pairs compared, side by side.

    Examples
    --------
    >>> from repgraph.metrics.similarity import linear_cka
    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> table = between_layers(linear_cka, {"stem": x, "head": x[:, :1] * 2})
    >>> table.round(2).to_numpy().tolist()
    [[1.0, 0.46], [0.46, 1.0]]
    """
    given: dict[str, Given] = {"measure": (similarity, prepare, options)}
    return _tables(given, a, b, names, device, permutations, seed, progress)["measure"]


def compare_layers(
    measures: Mapping[str, Similarity] | Sequence[Similarity],
    a: Mapping[str, object],
    b: Mapping[str, object] | None = None,
    *,
    names: tuple[str, str] | None = None,
    device: torch.device | str | None = None,
    permutations: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """The table of `between_layers` for several measures, reading each layer once.

    Measures that rest on one Gram matrix share it. Options go in by `functools.partial`.

    Parameters
    ----------
    measures
        Name -> measure, or a sequence of measures, which go by their own names.
    a, b, names, device, permutations, seed, progress
        As in `between_layers`.

    Returns
    -------
    dict of str to DataFrame
        One table per measure.

    Raises
    ------
    ValueError
        As `between_layers`, or if two measures have one name.

    Examples
    --------
    >>> from functools import partial
    >>> from repgraph.metrics.similarity import gbs, linear_cka
    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> tables = compare_layers({"gbs": gbs, "cka": partial(linear_cka, unbiased=True)}, {"stem": x})
    >>> [round(float(table.loc["stem", "stem"]), 6) for table in tables.values()]
    [1.0, 1.0]
    """
    if not isinstance(measures, Mapping):
        listed = [(_name(similarity), similarity) for similarity in measures]
        measures = dict(listed)
        if len(measures) != len(listed):
            raise ValueError(f"measures must have distinct names, got {[name for name, _ in listed]}: pass a mapping")
    if not measures:
        raise ValueError("measures must hold at least one measure")
    given: dict[str, Given] = {name: (similarity, None, {}) for name, similarity in measures.items()}
    return _tables(given, a, b, names, device, permutations, seed, progress)


def between_layers_null(
    similarity: Similarity,
    a: Mapping[str, object],
    b: Mapping[str, object] | None = None,
    *,
    prepare: Callable[..., object] | None = None,
    names: tuple[str, str] | None = None,
    device: torch.device | str | None = None,
    permutations: int = 20,
    seed: int = 0,
    progress: bool = True,
    **options: object,
) -> pd.DataFrame:
    """The permutation null of every entry of `between_layers`: the samples of b are shuffled, the same for all layers.

    Parameters
    ----------
    similarity, a, b, prepare, names, device, seed, progress, **options
        As in `between_layers`.
    permutations
        How many permutations.

    Returns
    -------
    DataFrame
        One row per pair (layer of a, layer of b), one column per permutation; ``null.mean(axis=1).unstack(sort=False)``
        has the shape of the table.

    Raises
    ------
    ValueError
        As `between_layers`, or if permutations < 1.

    Examples
    --------
    >>> from repgraph.metrics.similarity import mutual_knn
    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> null = between_layers_null(mutual_knn, {"stem": x, "head": x[:, :2]}, k=5, permutations=10)
    >>> null.shape, bool((null < 0.3).all(axis=None))
    ((4, 10), True)
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    measure = _resolved("measure", similarity, prepare, options)
    rows, columns = _both_prepared({"measure": measure}, a, b, device, progress)
    left, right = rows["measure"], rows["measure"] if columns is None else columns["measure"]
    draws = np.empty((permutations, len(left), len(right)))
    for r in tqdm(range(permutations), desc="null", disable=not progress, delay=1, leave=False):
        shuffled = {name: permuted(item, torch.Generator("cpu").manual_seed(seed + r)) for name, item in right.items()}
        draws[r] = _entries(measure, left, shuffled, False)
    table = _labelled(draws[0], measure, left, right, a, b, names)
    index = pd.MultiIndex.from_product([table.index, table.columns], names=[table.index.name, table.columns.name])
    null = pd.DataFrame(draws.reshape(permutations, -1).T, index=index)
    null.attrs = {**table.attrs, "permutations": permutations, "seed": seed}
    return null


def stream_cka(
    model: nn.Module,
    data: object,
    other: nn.Module | None = None,
    *,
    layers: Select = "blocks",
    other_layers: Select | None = None,
    batch_size: int = 256,
    reduce: Callable[[Tensor], Tensor] | None = None,
    forward: Forward | None = None,
    samples: int | Sequence[int] | Tensor | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Minibatch linear CKA of all layers of one or two models, straight from the passes over the data.

    The outputs are never stored: inside the pass each becomes the Gram matrix of its batch, n x batch_size numbers a
    layer in all.

    Parameters
    ----------
    model, other
        The models; without `other` the layers of `model` are compared with each other.
    data
        As in `capture`; both models see it, so it must give the same samples in the same order twice.
    layers, other_layers
        As in `capture`, for each model; `other_layers` is `layers` by default.
    batch_size
        Samples per Gram matrix and, where the data come unbatched, per forward pass. Smaller batches of a loader are
        taken as they come, larger ones split; of fewer than 4 samples nothing can be estimated, they are left out.
    reduce
        Function applied to a layer's output first, for example to pool it: ``lambda x: x.flatten(2).mean(2)``.
    forward, samples, memory, progress
        As in `capture`.

    Returns
    -------
    DataFrame
        As `between_layers` with `minibatch_cka`; without a chance level, which is 0.

    Raises
    ------
    ValueError
        As `capture`; if batch_size < 4; if the data come in another order for the second model.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> table = stream_cka(model, torch.randn(64, 3), layers="leaves", batch_size=32)
    >>> table.shape, round(float(table.loc["0", "0"]), 6)
    ((3, 3), 1.0)
    """
    grams = BatchGram(batch_size)
    if reduce is not None and not callable(reduce):
        raise ValueError(f"reduce must be a function of a layer's output, got {reduce!r}")
    if other is not None and isinstance(data, Iterator):
        data = list(data)  # the second model needs it again

    def rows(x: Tensor) -> Tensor:
        return grams(x if reduce is None else reduce(x))

    def captured(net: nn.Module, chosen: Select) -> Activations:
        return capture(
            net,
            data,
            chosen,
            reduce=rows,
            forward=forward,
            samples=samples,
            batch_size=batch_size,
            memory=memory,
            progress=progress,
        )

    a = captured(model, layers)
    b = None if other is None else captured(other, layers if other_layers is None else other_layers)
    table = between_layers(minibatch_cka, a, b, prepare=BatchGrams.of_rows, permutations=0, progress=progress)
    table.attrs["batch_size"] = batch_size
    table.attrs["reduce"] = None if reduce is None else getattr(reduce, "__name__", "function")
    return table


def _name(similarity: Similarity) -> str:
    similarity = similarity.func if isinstance(similarity, functools.partial) else similarity
    return str(getattr(similarity, "__name__", "similarity"))


def _resolved(
    key: str, similarity: Similarity, prepare: Callable[..., object] | None, options: Mapping[str, object]
) -> _Measure:
    if not callable(similarity):
        raise TypeError(f"{key} must be a measure of two layers, got {similarity!r}")
    if isinstance(similarity, functools.partial):
        if similarity.args:
            raise ValueError(f"{key}: options of a partial must go by keyword, got {similarity.args!r}")
        options = {**similarity.keywords, **options}
        similarity = similarity.func
    first = prepare if prepare is not None else lambda x: x
    if not hasattr(similarity, "prepare"):
        pair = functools.partial(similarity, **options)
        return _Measure(_name(similarity), first, None, pair, False, False, dict(options))
    own = cast(Measure, similarity)
    known = {name: value.default for name, value in list(inspect.signature(similarity).parameters.items())[2:]}
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"{_name(similarity)} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    for_prepare, for_pair = (
        {name: value for name, value in options.items() if name in inspect.signature(f).parameters}
        for f in (own.prepare, own.pair)
    )
    return _Measure(
        name=_name(similarity),
        prepare=lambda x: own.prepare(first(x), **for_prepare),
        base=own.base if prepare is None and not for_prepare else None,
        pair=functools.partial(own.pair, **for_pair),
        distance=own.distance,
        symmetric=own.symmetric,
        settings=known | dict(options),
    )


def _tables(
    given: Mapping[str, Given],
    a: Mapping[str, object],
    b: Mapping[str, object] | None,
    names: tuple[str, str] | None,
    device: torch.device | str | None,
    permutations: int,
    seed: int,
    progress: bool,
) -> dict[str, pd.DataFrame]:
    measures = {key: _resolved(key, *one) for key, one in given.items()}
    rows, columns = _both_prepared(measures, a, b, device, progress)
    tables = {}
    for key, measure in tqdm(measures.items(), desc="pairs", disable=not progress, delay=1, leave=False):
        left, right = rows[key], rows[key] if columns is None else columns[key]
        entries = _entries(measure, left, right, columns is None and measure.symmetric)
        table = tables[key] = _labelled(entries, measure, left, right, a, b, names)
        _tell_undefined(table, measure, left | right)
        draws = _chance(measure, list(left.values()), list(right.values()), min(permutations, table.size), seed)
        if draws:
            table.attrs.update(chance=float(np.mean(draws)), chance_std=float(np.std(draws)))
    return tables


def _both_prepared(
    measures: Mapping[str, _Measure],
    a: Mapping[str, object],
    b: Mapping[str, object] | None,
    device: torch.device | str | None,
    progress: bool,
) -> tuple[dict[str, dict[str, object]], dict[str, dict[str, object]] | None]:
    """Measure -> layer -> prepared layer, of a and of b."""
    if isinstance(a, Activations) and isinstance(b, Activations):
        check_paired(a, b)
    rows = _prepared(measures, a, "a", device, progress)
    if b is None:
        return rows, None
    return rows, _prepared(measures, b, "b", device, progress, _n(next(iter(next(iter(rows.values())).values()))))


def _prepared(
    measures: Mapping[str, _Measure],
    layers: Mapping[str, object],
    argument: str,
    device: torch.device | str | None,
    progress: bool,
    n: int | None = None,
) -> dict[str, dict[str, object]]:
    if not isinstance(layers, Mapping) or not layers:
        got = "none" if isinstance(layers, Mapping) else type(layers).__name__
        raise ValueError(f"{argument} must be Activations or a mapping of layer names to layers, got {got}")
    tasks = ((measures, Item(layers, name), device) for name in layers)
    done = dict(each(_prepared_layer, tasks, len(layers), "layers", "layer", progress))
    for name in layers:
        for item in done[name].values():
            here = _n(item)
            if n is not None and here != n:
                raise ValueError(
                    f"layer {name!r}: layers must be over the same samples, got {here} here and {n} before"
                )
            n = here
    return {key: {name: done[name][key] for name in layers} for key in measures}


def _prepared_layer(
    measures: Mapping[str, _Measure], item: Item[object], device: torch.device | str | None
) -> tuple[str, dict[str, object]]:
    """A layer's name, and the layer prepared for each measure."""
    layer = item.read()
    if device is not None and isinstance(layer, Tensor):
        layer = layer.to(device)
    found: dict[str, object] = {}
    with named(f"layer {item.name!r}"):
        bases: dict[object, object] = {}  # what several measures share
        for key, measure in measures.items():
            if measure.base is not None and isinstance(layer, Tensor):
                if measure.base not in bases:
                    bases[measure.base] = measure.base(layer)
                found[key] = measure.prepare(bases[measure.base])
            else:
                found[key] = measure.prepare(layer)
            _n(found[key])  # must be told, or nothing
    return item.name, found


def _n(layer: object) -> int:
    """Number of samples of a prepared layer."""
    n = getattr(layer, "n", None)
    if n is None and isinstance(layer, Sized) and getattr(layer, "ndim", 1) > 0:
        n = len(layer)
    if not isinstance(n, int):
        raise ValueError(f"a layer must have one entry per sample, or n, once prepared, got {type(layer).__name__}")
    return n


def _entries(measure: _Measure, left: Mapping[str, object], right: Mapping[str, object], half: bool) -> np.ndarray:
    """The measure of every pair; of one half of them, mirrored, where it is symmetric and both sides are one."""
    values = np.empty((len(left), len(right)))
    rows, columns = (
        [dict(list(side.items())[i : i + _BLOCK]) for i in range(0, len(side), _BLOCK)] for side in (left, right)
    )
    places = [(i, j) for i in range(len(rows)) for j in range(i if half else 0, len(columns))]
    tasks = ((measure.pair, i, j, rows[i], columns[j], half and i == j) for i, j in places)
    for i, j, block in each(_block, tasks, len(places), "pairs", "block", progress=False):
        values[i * _BLOCK : i * _BLOCK + len(block), j * _BLOCK : j * _BLOCK + block.shape[1]] = block
    below = np.tril_indices(len(left), -1)
    if half:
        values[below] = values.T[below]
    return values


def _block(
    pair: Callable[[object, object], Tensor | float],
    i: int,
    j: int,
    rows: Mapping[str, object],
    columns: Mapping[str, object],
    half: bool,
) -> tuple[int, int, np.ndarray]:
    """The entries of some rows and columns; of the half above the diagonal, the others are 0."""
    values = np.zeros((len(rows), len(columns)))
    for r, (row, one) in enumerate(rows.items()):
        for c, (column, other) in enumerate(columns.items()):
            if not half or c >= r:
                with named(f"layers {row!r} and {column!r}"):
                    values[r, c] = float(pair(one, other))
    return i, j, values


def _labelled(
    entries: np.ndarray,
    measure: _Measure,
    left: Mapping[str, object],
    right: Mapping[str, object],
    a: Mapping[str, object],
    b: Mapping[str, object] | None,
    names: tuple[str, str] | None,
) -> pd.DataFrame:
    table = pd.DataFrame(entries, index=list(left), columns=list(right))
    if names is not None and (isinstance(names, str) or len(names) != 2):
        raise ValueError(f"names must be two, one for each axis, got {names!r}")
    if names is None:
        own, other = (str(getattr(item, "settings", {}).get("model", "")) for item in (a, b))
        if b is None:
            names = own or "layer", own or "layer"
        else:
            names = f"a: {own}" if own else "a", f"b: {other}" if other else "b"
    table.index.name, table.columns.name = names
    item = next(iter(left.values()))
    made = getattr(item, "settings", {})  # of the graphs, which may have been given
    table.attrs = {
        "measure": measure.name,
        **{key: made.get(key, value) for key, value in measure.settings.items()},
        "n": _n(item),
        "distance": measure.distance,
        **({"reduce": a.settings.get("reduce")} if isinstance(a, Activations) else {}),
    }
    return table


def _tell_undefined(table: pd.DataFrame, measure: _Measure, layers: Mapping[str, object]) -> None:
    if not table.isna().any(axis=None):
        return
    own = [repr(name) for name, layer in layers.items() if math.isnan(measure.pair(layer, layer))]
    some = f"for the layers {', '.join(own)}" if own else "for some pairs"
    tell(f"{measure.name} is undefined (nan) {some}: their features are constant, or the samples too few")


def _chance(measure: _Measure, left: list[object], right: list[object], draws: int, seed: int) -> list[float]:
    """The measure of pairs of layers at the same relative depth after shuffling; none where that is not defined."""
    found = []
    for draw in range(draws):
        depth = (draw + 0.5) / draws
        one, other = left[int(depth * len(left))], right[int(depth * len(right))]
        if not can_permute(other):
            return []
        found.append(float(measure.pair(one, permuted(other, torch.Generator("cpu").manual_seed(seed + draw)))))
    return [value for value in found if not math.isnan(value)]
