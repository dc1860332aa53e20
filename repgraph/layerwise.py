"""Over all layers at once: one function for each stored item, and the profile of a model in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations import Activations, capture
from repgraph.activations.batches import Source, model_device
from repgraph.activations.forward import Forward, kept_random_state
from repgraph.activations.layers import Select, unwrap
from repgraph.activations.reduce import ChannelAxis, Reduce
from repgraph.graph import Graph, communities, knn_graph
from repgraph.labels import Labels, as_labels, class_codes
from repgraph.metrics.class_separation import class_separation
from repgraph.metrics.modularity import modularity, modularity_ceiling, modularity_null
from repgraph.metrics.similarity.cka import linear_cka
from repgraph.metrics.similarity.gbs import gbs
from repgraph.metrics.similarity.gram import gram
from repgraph.metrics.similarity.measure import Measure
from repgraph.metrics.similarity.null import permuted
from repgraph.neighbors import Metric

T = TypeVar("T")
Family = Literal["modularity", "gbs", "cka"]


def apply_layers(f: Callable[[T], float], items: Mapping[str, T]) -> pd.Series:
    """One number per layer: f of each stored item, in order.

    Items are read one at a time, so that `Activations` of any size will do.

    Parameters
    ----------
    f
        Takes an item (a tensor, a graph) and returns a number.
    items
        Layer name -> item.

    Returns
    -------
    Series
        Indexed by layer name.

    Examples
    --------
    >>> apply_layers(lambda x: x.mean(), {"stem": torch.zeros(4, 8), "head": torch.ones(4, 2)}).tolist()
    [0.0, 1.0]
    """
    values = {}
    for name in items:
        values[name] = float(f(items[name]))
    return pd.Series(values, name=getattr(f, "__name__", None), dtype=float).rename_axis("layer")


def profile(
    model: nn.Module,
    data: object,
    *,
    layers: Select = "blocks",
    k: int = 3,
    n: int = 500,
    repeats: int = 5,
    seed: int | None = None,
    metrics: Sequence[Family] = ("modularity",),
    labels: Labels | None = None,
    reduce: Reduce = None,
    metric: Metric = "cosine",
    symmetrize: Literal["mean", "union", "mutual"] = "mean",
    permutations: int = 20,
    memory: int | str | None = None,
    forward: Forward | None = None,
    batch_size: int = 64,
    channel_axis: ChannelAxis = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Modularity of a trained network by layer, in one call: one row per layer, in execution order.

    The layers' outputs for `repeats` disjoint sets of n samples become graphs (`knn_graph`), and each number below is
    its mean over the sets; std is the one with sets - 1 (nan for one set).

    Parameters
    ----------
    model, data, layers, labels, reduce, memory, forward, batch_size, channel_axis
        As in `capture`. Graphs are built on the model's device.
    k, metric, symmetrize
        As in `knn_graph`.
    n
        Samples per set.
    repeats
        Number of sets. Set r takes the samples r n to (r + 1) n in the order of the data.
    seed
        Take the sets from a random permutation of all samples with this seed; needed where the data are sorted by
        class. It also seeds the null (0 if None).
    metrics
        Families of metrics: "modularity"; "gbs" and "cka" add the similarity to the previous layer, GBS of the same
        graphs and unbiased linear CKA.
    permutations
        Label permutations per set for the null.
    progress
        Show progress bars.

    Returns
    -------
    DataFrame
        Index: layer name. Columns: modularity, modularity_std; null, null_std (labels permuted); ceiling (all weight
        inside classes); class_separation; features (dimension of the flattened output); isolated (nodes without
        weight); negative_share (share of the edges with negative weight; modularity is then the signed one). Without
        labels: community_modularity and community_modularity_std (of Leiden communities, negative weights set to 0),
        communities, features, isolated, negative_share. With "gbs" or "cka" in metrics: gbs_previous, gbs_previous_std
        and gbs_previous_null (samples shuffled), and the same of cka_previous; nan for the first layer. The settings
        are in `attrs`.

    Raises
    ------
    ValueError
        As `capture` and `knn_graph`; if a set holds one class only (pass `seed=`), if n or repeats is out of range, or
        a metric is unknown.

    Warns
    -----
    UserWarning
        If the data run out before `repeats` sets are full, or a class of a set has k members or fewer.

    References
    ----------
    Lu et al., "Understanding the Dynamics of DNNs Using Graph Modularity", ECCV 2022: k = 3, n = 500, five sets.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3))
    >>> table = profile(model, (torch.rand(40, 1, 8, 8), torch.arange(40) % 2), n=20, repeats=2)
    >>> table.index.tolist(), table["features"].tolist()
    (['0', '2'], [144, 128])
    """
    _check_sets(n, repeats, metrics, k)
    with kept_random_state():
        samples: int | Tensor = n * repeats
        if seed is not None:
            data = list(data) if isinstance(data, Iterator) else data
            order = set_order(data, batch_size, seed)
            if labels is not None and len(as_labels(labels)) != len(order):
                raise ValueError(
                    f"labels must have one entry per sample: expected {len(order)}, got {len(as_labels(labels))}"
                )
            samples = order[: n * repeats]
        activations = capture(
            model,
            data,
            layers,
            labels=labels,
            reduce=reduce,
            memory=memory,
            forward=forward,
            samples=samples,
            batch_size=batch_size,
            channel_axis=channel_axis,
            progress=progress,
        )
    order = torch.arange(activations.n, device="cpu") if isinstance(samples, int) else samples.argsort().argsort()
    sets = _sets(order, n, repeats)
    device = model_device(unwrap(model))
    return _profile(activations, sets, k, metrics, metric, symmetrize, permutations, seed, device, progress)


def profile_activations(
    activations: Activations,
    *,
    k: int = 3,
    n: int = 500,
    repeats: int = 5,
    seed: int | None = None,
    metrics: Sequence[Family] = ("modularity",),
    metric: Metric = "cosine",
    symmetrize: Literal["mean", "union", "mutual"] = "mean",
    permutations: int = 20,
    progress: bool = True,
) -> pd.DataFrame:
    """The table of `profile` from activations that are there already, for example to vary k.

    Parameters, result, errors and warnings as in `profile`; graphs are built where the activations are.

    Examples
    --------
    >>> acts = Activations({"head": torch.rand(40, 6)}, labels=torch.arange(40) % 2)
    >>> profile_activations(acts, n=20, repeats=2).columns.tolist()[:2]
    ['modularity', 'modularity_std']
    """
    _check_sets(n, repeats, metrics, k)
    order = torch.arange(activations.n, device="cpu") if seed is None else _order(activations.n, seed)
    sets = _sets(order, n, repeats)
    return _profile(activations, sets, k, metrics, metric, symmetrize, permutations, seed, None, progress)


def _check_sets(n: int, repeats: int, metrics: Sequence[str], k: int) -> None:
    for name, value in (("n", n), ("repeats", repeats), ("k", k)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if n < 2:
        raise ValueError(f"n must be at least 2 samples per set, got {n}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not 1 <= k < n:
        raise ValueError(f"k must satisfy 1 <= k < n, got k = {k} with n = {n} samples per set")
    if "cka" in metrics and n < 4:
        raise ValueError(f"n must be at least 4 samples per set for unbiased CKA, got {n}")
    families = get_args(Family)
    if isinstance(metrics, str) or not metrics or any(name not in families for name in metrics):
        raise ValueError(f"metrics must be a sequence of names from {families}, got {metrics!r}")


def set_order(data: object, batch_size: int, seed: int) -> Tensor:
    """The random order of all samples of the data from which `profile` takes its sets, (total,)."""
    return _order(Source(data, batch_size, None).n, seed)


def _order(total: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def _sets(order: Tensor, n: int, repeats: int) -> list[Tensor]:
    """Disjoint sets of n samples, in order; all samples as one set where there are fewer than n."""
    full = min(repeats, len(order) // n)
    sets = [order[r * n : (r + 1) * n] for r in range(full)] or [order]
    if full < repeats:
        warnings.warn(
            f"the data hold {len(order)} samples, not {repeats} sets of {n}: "
            + (f"{full} sets are used" if full else f"one set of {len(order)} is used"),
            stacklevel=3,
        )
    return sets


def _profile(
    activations: Activations,
    sets: list[Tensor],
    k: int,
    metrics: Sequence[Family],
    metric: Metric,
    symmetrize: Literal["mean", "union", "mutual"],
    permutations: int,
    seed: int | None,
    device: torch.device | None,
    progress: bool,
) -> pd.DataFrame:
    set_labels: list[Tensor] | None = None
    if activations.labels is not None and "modularity" in metrics:
        codes, classes = class_codes(activations.labels, activations.n)
        set_labels = [codes[rows] for rows in sets]
        small = ""
        for number, y in enumerate(set_labels):
            sizes = torch.bincount(y, minlength=len(classes))
            present = sizes[sizes > 0]
            if len(present) < 2:
                raise ValueError(
                    f"labels: set {number} of {len(y)} samples holds one class only: the data are sorted by class or "
                    "have one class: pass seed= to draw the sets at random"
                )
            if int(present.min()) <= k:
                small = (
                    f"set {number} has a class of {int(present.min())} samples, not more than k = {k}: edges must "
                    "leave it, and the ceiling cannot be reached"
                )
        if small:
            warnings.warn(small, stacklevel=3)
    rows: dict[str, dict[str, float]] = {}
    previous: list[dict[str, Any]] = [{} for _ in sets]
    for name in tqdm(activations, desc="graphs", unit="layer", disable=not progress, delay=1, leave=False):
        layer = activations[name].reshape(activations.n, -1)
        found = []
        for number, chosen in enumerate(sets):
            x = layer[_as_slice(chosen)].to(device)
            try:
                graph = knn_graph(x, k, metric=metric, symmetrize=symmetrize)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
            row: dict[str, np.ndarray] = {}
            if set_labels is not None:
                row = _labelled(x, graph, set_labels[number], permutations, (seed or 0) + number)
            elif "modularity" in metrics:
                row = _unlabelled(graph, seed or 0)
            prepared = _prepared(x, graph, metrics)
            row |= _to_previous(previous[number], prepared, (seed or 0) + number)
            previous[number] = prepared
            found.append(row | _label_free(graph))
        rows[name] = _summary(found, layer.shape[1])
        del layer, x  # before the next layer is read, which may need the memory
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
    table = table.astype({"features": int})
    for column in ("gbs_previous", "cka_previous"):
        if column in table and len(undefined := table.index[1:][table[column].iloc[1:].isna()]):
            warnings.warn(f"{column} is undefined (nan) at {', '.join(undefined)}: constant features", stacklevel=3)
    table.attrs = {
        **{str(key): value for key, value in activations.settings.items()},
        "k": k,
        "metric": metric,
        "symmetrize": symmetrize,
        "n": len(sets[0]),
        "repeats": len(sets),
        "seed": seed,
        "permutations": permutations,
    }
    return table


def _as_slice(rows: Tensor) -> Tensor | slice:
    """A run of rows as a slice, which copies nothing."""
    start, end = int(rows[0]), int(rows[-1]) + 1
    return slice(start, end) if start < end and torch.equal(rows, torch.arange(start, end, device="cpu")) else rows


def _labelled(x: Tensor, graph: Graph, labels: Tensor, permutations: int, seed: int) -> dict[str, np.ndarray]:
    return {
        "modularity": np.array([modularity(graph, labels, negative="signed")]),
        "null": modularity_null(graph, labels, permutations=permutations, seed=seed).numpy(),
        "ceiling": np.array([modularity_ceiling(graph, labels)]),
        "class_separation": np.array([class_separation(x, labels)]),
    }


def _unlabelled(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    row, col, weight = graph.edges()
    positive = Graph.from_edges(graph.n, row, col, weight.clip(0))
    found = communities(positive, seed=seed)
    return {
        "community_modularity": np.array([found.modularity]),
        "communities": np.array([found.num_communities]),
    }


def _label_free(graph: Graph) -> dict[str, np.ndarray]:
    weight = graph.edges()[2]
    return {
        "isolated": np.array([len(graph.isolated)]),
        "negative_share": np.array([(weight < 0).sum() / max(np.count_nonzero(weight), 1)]),
    }


def _prepared(x: Tensor, graph: Graph, metrics: Sequence[Family]) -> dict[str, Any]:
    """What the similarity to the previous layer is computed from."""
    found: dict[str, Any] = {}
    if "gbs" in metrics:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # isolated nodes have a column of their own
            found["gbs"] = cast(Measure, gbs).prepare(graph)
    if "cka" in metrics:
        found["cka"] = gram(x)
    return found


def _to_previous(previous: dict[str, Any], own: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Similarity to the previous layer, and the same with the samples shuffled; nan for the first layer."""
    pairs: dict[str, Callable[..., Tensor | float]] = {
        "gbs": cast(Measure, gbs).pair,
        "cka": partial(cast(Measure, linear_cka).pair, unbiased=True),
    }
    row = {}
    for name, layer in own.items():
        both = (np.nan, np.nan)
        if previous:
            shuffled = permuted(layer, torch.Generator("cpu").manual_seed(seed))
            both = float(pairs[name](previous[name], layer)), float(pairs[name](previous[name], shuffled))
        row[f"{name}_previous"], row[f"{name}_previous_null"] = (np.array([value]) for value in both)
    return row


def _summary(found: list[dict[str, np.ndarray]], features: int) -> dict[str, float]:
    """Mean over the sets, and std where it is a column of its own."""
    row: dict[str, float] = {}
    for name in found[0]:
        values = np.concatenate([one[name] for one in found])
        if name == "isolated":
            row["features"] = features
        row[name] = float(values.mean())
        if name in ("modularity", "null", "community_modularity", "gbs_previous", "cka_previous"):
            row[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return row
