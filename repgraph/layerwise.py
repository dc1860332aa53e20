"""Over all layers at once: one function for each stored item, and the profile of a model in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from repgraph import families
from repgraph.activations import Activations, capture
from repgraph.activations.batches import Source, model_device, read_batches
from repgraph.activations.forward import Forward, kept_random_state, untouched
from repgraph.activations.gates import GATES
from repgraph.activations.layers import Select, items_of, unwrap
from repgraph.activations.reduce import ChannelAxis, Reduce
from repgraph.checkpoint import Checkpoint, Row
from repgraph.families import Family
from repgraph.labels import Labels, as_labels, class_codes
from repgraph.layer_row import Last, LayerRow, Options
from repgraph.metrics.feature_entropy.entropy import warn_before_relu
from repgraph.metrics.spline.local import local_complexity_by_layer
from repgraph.neighbors import Metric
from repgraph.parallel import Item, each

T = TypeVar("T")

_AROUND, _DIRECTIONS = 64, 20  # samples around which local complexity is taken, and directions from each


def apply_layers(f: Callable[[T], float], items: Mapping[str, T]) -> pd.Series:
    """One number per layer: f of each stored item, in order.

    Items are read one at a time, so that `Activations` of any size will do; inside ``joblib.parallel_config(...)`` each
    worker has its own.

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
    tasks = ((f, Item(items, name)) for name in items)
    found = dict(each(_number, tasks, len(items), "layers", "layer", progress=False))
    values = {name: found[name] for name in items}
    return pd.Series(values, name=getattr(f, "__name__", None), dtype=float).rename_axis("layer")


def _number(f: Callable[[T], float], item: Item[T]) -> tuple[str, float]:
    return item.name, float(f(item.read()))


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
    lam: float = 0.01,
    radius: float | None = None,
    memory: int | str | None = None,
    folder: str | Path | None = None,
    forward: Forward | None = None,
    batch_size: int = 64,
    channel_axis: ChannelAxis = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What the layers of a trained network do, in one call: one row per layer, in execution order.

    The layers' outputs for `repeats` disjoint sets of n samples become graphs (`knn_graph`), and each number below is
    its mean over the sets; std is the one with sets - 1 (nan for one set). All families are read off one capture.

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
        Families of metrics, side by side: "modularity"; "gbs" and "cka", the similarity to the previous layer (GBS of
        the same graphs, unbiased linear CKA); "feature_entropy", of layers with square maps of at least 4 x 4;
        "complexity" and "spline", of the gates in a layer (those inside it, and those that follow outside any layer).
    permutations
        Label permutations per set for the null.
    lam
        Kernel width of "complexity", as in `gate_entropy`; the authors take 0.04 for convolutional networks.
    folder
        Keep each finished layer in this folder, new or of an earlier call with the same options. A run that was killed
        goes on there: the data are captured again, and a layer whose outputs, sets and labels are bit for bit those of
        a kept row is not computed again.
    radius
        Of the local complexity in "spline", in the units of the inputs; by default a hundredth of the samples' root
        mean square distance from their mean.
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
        and gbs_previous_null (samples shuffled), and the same of cka_previous; nan for the first layer.
        "feature_entropy": feature_entropy and feature_entropy_std (nats, mean over units and classes),
        feature_entropy_floor (noise), feature_entropy_ceiling (ln of the samples per class), birth_rate. "complexity":
        gates, complexity and complexity_std (bits), complexity_ceiling (log2 of the samples per set); with labels
        label_information, label_information_std and label_information_ceiling. "spline": gates, regions (distinct
        region codes among the samples of a set), local_complexity (units whose sign changes within the radius around
        a sample, mean over up to 64 samples and 20 directions). Layers without maps or gates have nan there (0
        gates). The settings are in `attrs`.

    Raises
    ------
    ValueError
        As `capture` and `knn_graph`; if a set holds one class only (pass `seed=`), or for "feature_entropy" and
        "complexity" one sample of a class; if n, repeats, lam or radius is out of range, the folder holds other things
        or other options' rows, a metric is unknown, "feature_entropy" finds no labels or no layer with square maps,
        "complexity" or "spline" no gates; or if "spline" meets inputs that are no tensors of real numbers, `forward`,
        or a loader that shuffles.

    Warns
    -----
    UserWarning
        If the data run out before `repeats` sets are full, a class of a set has k members or fewer, or feature entropy
        meets negative values (a layer captured before its ReLU); if a file in the folder is damaged (its layer is
        computed again) or a row cannot be written there (the run goes on).

    Notes
    -----
    Layers are worked on one after the other, each read when its turn comes; inside ``joblib.parallel_config(...)`` side
    by side, in threads, processes or on a cluster. "gbs" and "cka" then prepare each layer twice.

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
    options = Options(k, n, repeats, seed, _as_tuple(metrics), metric, symmetrize, permutations, lam)
    checkpoint = None if folder is None else _checkpoint(folder, options)
    if radius is not None and not radius > 0:
        raise ValueError(f"radius must be positive, got {radius!r}")
    if "spline" in metrics and forward is not None:
        raise ValueError("metrics: 'spline' calls the model itself around each sample and cannot use forward=")
    select = layers
    if set(metrics) & set(families.WITH_GATES):
        select = [*items_of(unwrap(model), layers), "gates"]
    with kept_random_state():
        samples: int | Tensor = n * repeats
        if isinstance(data, Iterator) and (seed is not None or "spline" in metrics):
            data = read_batches(data, n * repeats if seed is None else None)[0]
        if seed is not None:
            order = set_order(data, batch_size, seed)
            if labels is not None and len(as_labels(labels)) != len(order):
                raise ValueError(
                    f"labels must have one entry per sample: expected {len(order)}, got {len(as_labels(labels))}"
                )
            samples = order[: n * repeats]
        activations = capture(
            model,
            data,
            select,
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
    table = _profile(activations, sets, options, device, checkpoint, progress)
    if "spline" in metrics:
        with kept_random_state():
            _add_local_complexity(table, activations, model, data, batch_size, samples, sets[0], radius, progress)
    return table


def _add_local_complexity(
    table: pd.DataFrame,
    activations: Activations,
    model: nn.Module,
    data: object,
    batch_size: int,
    samples: int | Tensor,
    chosen: Tensor,
    radius: float | None,
    progress: bool,
) -> None:
    """Mean local complexity around a few samples of the first set, summed over the gates of each layer."""
    positions = torch.arange(activations.n, device="cpu") if isinstance(samples, int) else samples.sort().values
    rows = chosen.sort().values[:: -(-len(chosen) // _AROUND)]
    batches = list(Source(data, batch_size, positions[rows]))
    inputs = [batch.inputs for batch in batches]
    hashes = torch.cat([batch.hashes() for batch in batches])
    if activations.input_hashes is not None and not torch.equal(hashes, activations.input_hashes[rows]):
        raise ValueError(
            "data gave other samples when they were read again for 'spline': it needs a loader that does not shuffle "
            "and images without random augmentation"
        )
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in inputs):
        raise ValueError("metrics: 'spline' needs inputs that are tensors of real numbers")
    x = torch.cat([x for x in inputs if isinstance(x, Tensor)])
    if radius is None:
        flat = x.double().flatten(1)
        radius = 0.01 * float((flat - flat.mean(0)).square().sum(1).mean().sqrt())
        if radius == 0:
            raise ValueError("radius must be given for 'spline': the inputs do not vary")
    model = unwrap(model)
    with untouched(model):
        n_dirs = min(_DIRECTIONS, x[0].numel())
        local = local_complexity_by_layer(model, x, radius=radius, n_dirs=n_dirs, progress=progress)
    by_layer = families.gates_by_layer(activations)
    table["local_complexity"] = [
        local[[key.removeprefix(GATES) for key in by_layer[str(name)]]].sum() if by_layer[str(name)] else np.nan
        for name in table.index
    ]
    table.attrs |= {"radius": radius, "around": len(x)}


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
    lam: float = 0.01,
    folder: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """The table of `profile` from activations that are there already, for example to vary k.

    Parameters, result, errors and warnings as in `profile`; graphs are built where the activations are. "complexity"
    and "spline" need activations with gates, ``capture(model, data, ["blocks", "gates"])``; there is no
    local_complexity, which takes the model.

    Examples
    --------
    >>> acts = Activations({"head": torch.rand(40, 6)}, labels=torch.arange(40) % 2)
    >>> profile_activations(acts, n=20, repeats=2).columns.tolist()[:2]
    ['modularity', 'modularity_std']
    """
    options = Options(k, n, repeats, seed, _as_tuple(metrics), metric, symmetrize, permutations, lam)
    checkpoint = None if folder is None else _checkpoint(folder, options)
    order = torch.arange(activations.n, device="cpu") if seed is None else _order(activations.n, seed)
    sets = _sets(order, n, repeats)
    return _profile(activations, sets, options, None, checkpoint, progress)


def _checkpoint(folder: str | Path, options: Options) -> Checkpoint:
    return Checkpoint(folder, {"repgraph": version("repgraph"), **asdict(options)})


def _as_tuple(metrics: Sequence[Family]) -> Any:
    return metrics if isinstance(metrics, str) else tuple(metrics)


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
    options: Options,
    device: torch.device | None,
    checkpoint: Checkpoint | None,
    progress: bool,
) -> pd.DataFrame:
    metrics = options.metrics
    set_labels = _set_labels(activations, sets, options.k, metrics)
    by_layer = families.gates_by_layer(activations)
    if set(metrics) & set(families.WITH_GATES) and not any(by_layer.values()):
        raise ValueError("activations hold no gates, which 'complexity' and 'spline' need: capture layers and 'gates'")
    work = LayerRow(options, sets, set_labels, device, checkpoint is not None)
    items = {key: Item(activations, key) for key in activations}
    gates = {name: [(items[key], activations.specs[key].gates or 0) for key in by_layer[name]] for name in by_layer}
    pairs = bool({"gbs", "cka"} & set(metrics))
    before = dict(zip(by_layer, [None, *map(items.get, by_layer)], strict=False)) if pairs else {}
    kept = {} if checkpoint is None else checkpoint.rows
    last = Last()
    tasks = ((items[name], gates[name], before.get(name), last, kept.get(name)) for name in by_layer)
    rows: dict[str, Row] = {}
    for name, made_from, row in each(work, tasks, len(by_layer), "layers", "layer", progress):
        rows[name] = row
        if checkpoint is not None:
            checkpoint.put(name, made_from, row)
    before_relu = [name for name in by_layer if rows[name]["before_relu"]]
    table = pd.DataFrame.from_dict({name: rows[name] for name in by_layer}, orient="index").rename_axis("layer")
    table = table.drop(columns="before_relu")
    table = table.astype({"features": int})
    for column in ("gbs_previous", "cka_previous"):
        if column in table and len(undefined := table.index[1:][table[column].iloc[1:].isna()]):
            warnings.warn(f"{column} is undefined (nan) at {', '.join(undefined)}: constant features", stacklevel=3)
    if "feature_entropy" in table and table["feature_entropy"].isna().all():
        raise ValueError("metrics: 'feature_entropy' needs layers with square maps of at least 4 x 4, without reduce=")
    if before_relu:
        warn_before_relu(before_relu, stacklevel=4)
    table.attrs = {
        **{str(key): value for key, value in activations.settings.items()},
        "k": options.k,
        "metric": options.metric,
        "symmetrize": options.symmetrize,
        "n": len(sets[0]),
        "repeats": len(sets),
        "seed": options.seed,
        "permutations": options.permutations,
        **({"lam": options.lam} if "complexity" in metrics else {}),
    }
    return table


def _set_labels(activations: Activations, sets: list[Tensor], k: int, metrics: Sequence[Family]) -> list[Tensor] | None:
    """Class codes of each set, where there are labels and a metric uses them; what they make impossible is refused."""
    if activations.labels is None:
        if "feature_entropy" in metrics:
            raise ValueError("metrics: 'feature_entropy' needs labels, births are distributed within one class")
        return None
    if not {"modularity", "feature_entropy", "complexity"} & set(metrics):
        return None
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
        if int(present.min()) < 2 and {"feature_entropy", "complexity"} & set(metrics):
            lone = classes[int(((sizes > 0) & (sizes < 2)).nonzero()[0])]
            raise ValueError(
                f"labels: set {number} of {len(y)} samples has one sample of class {lone!r}: 'feature_entropy' and "
                "'complexity' need 2 of each class, take a larger n"
            )
        if int(present.min()) <= k and "modularity" in metrics:
            small = (
                f"set {number} has a class of {int(present.min())} samples, not more than k = {k}: edges must "
                "leave it, and the ceiling cannot be reached"
            )
    if small:
        warnings.warn(small, stacklevel=4)
    return set_labels
