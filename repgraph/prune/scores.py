"""Redundancy scores of layers, all from one capture of what goes into them and comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations import capture
from repgraph.activations.batches import Source, model_device, read_batches
from repgraph.activations.layers import Select, unwrap
from repgraph.activations.reduce import Reduce
from repgraph.graph import Graph, knn_graph
from repgraph.labels import Labels, class_codes
from repgraph.layerwise import set_order
from repgraph.metrics.angular_distance import angular_distance
from repgraph.metrics.block_influence import block_influence
from repgraph.metrics.modularity import modularity
from repgraph.metrics.relative_residual import relative_residual
from repgraph.metrics.similarity import gbs, linear_cka, mutual_knn
from repgraph.prune.calls import Call, observe
from repgraph.prune.layers import droppable_layers

Score = Literal[
    "modularity",
    "block_influence",
    "angular_distance",
    "relative_residual",
    "turnover",
    "gbs",
    "cka",
    "tail",
    "random",
]
_K = 10


@dataclass(eq=False)
class _Point:
    """The samples at one point of the network, and what is made of them at most once."""

    x: Tensor

    @cached_property
    def graph(self) -> Graph:
        return knn_graph(self.x)

    @cached_property
    def neighbors(self) -> Graph:
        return knn_graph(self.x, _K, symmetrize="none")


@dataclass(eq=False)
class _Layer:
    """A layer that could be dropped: the samples before and behind it, and its place among those that could."""

    before: _Point
    behind: _Point
    labels: Tensor | None
    place: int
    total: int
    draw: float


def _gain(layer: _Layer) -> float:
    assert layer.labels is not None
    ends = [modularity(point.graph, layer.labels, negative="signed") for point in (layer.behind, layer.before)]
    return ends[0] - ends[1]


_SCORES: dict[str, Callable[[_Layer], float]] = {
    "modularity": _gain,
    "block_influence": lambda layer: block_influence(layer.before.x, layer.behind.x),
    "angular_distance": lambda layer: angular_distance(layer.before.x, layer.behind.x),
    "relative_residual": lambda layer: relative_residual(layer.before.x, layer.behind.x),
    "turnover": lambda layer: 1 - mutual_knn(layer.before.neighbors, layer.behind.neighbors),
    "gbs": lambda layer: 1 - gbs(layer.before.x, layer.behind.x),
    "cka": lambda layer: 1 - linear_cka(layer.before.x, layer.behind.x, unbiased=True),
    "tail": lambda layer: 1 - (layer.place + 1) / layer.total,
    "random": lambda layer: layer.draw,
}


def layer_scores(
    model: nn.Module,
    data: object,
    *,
    layers: Select | Literal["halves"] = "blocks",
    by: Sequence[Score] | None = None,
    samples: int = 500,
    seed: int | None = None,
    labels: Labels | None = None,
    reduce: Reduce = None,
    memory: int | str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> pd.DataFrame:
    """How much each layer does that could be dropped, by every score, from one capture: high = keep.

    A score compares the samples before the layer with the samples behind it: its input and output; for a part that
    adds to a residual stream, as the attention half of a transformer block, the stream before and after the addition.
    A layer that does nothing scores 0 (but for tail and random).

    Parameters
    ----------
    model, data, labels, reduce, memory, batch_size
        As in `capture`. Transformers with padded inputs need `reduce`, as "mean".
    layers
        As in `droppable_layers`: those of the choice that can be dropped are scored.
    by
        Columns to compute; by default all, without labels all but modularity.
    samples
        How many samples to take: the first ones.
    seed
        Take them at random with this seed instead; it also draws "random" (0 if None).
    progress
        Show progress bars.

    Returns
    -------
    DataFrame
        One row per droppable layer, in execution order. Columns: "modularity" (rise of modularity over the layer, k =
        3); "block_influence"; "angular_distance"; "relative_residual"; "turnover" (share of a sample's 10 nearest
        neighbours that are others behind the layer, 1 - mutual kNN); "gbs" (1 - GBS, k = 5); "cka" (1 - unbiased
        linear CKA); "tail" (1 - (place + 1) / number of droppable layers: the last layer first); "random" (uniform).
        The settings are in `attrs`.

    Raises
    ------
    ValueError
        As `capture` and the measures, with the layer's name; if no layer can be dropped, a score is unknown or
        "modularity" finds no labels; if the samples before a layer are no module's input or output.

    References
    ----------
    Block Influence: ShortGPT, arXiv 2403.03853. Angular distance: Gromov et al., arXiv 2403.17887. The tail heuristic:
    Lu et al. 2024 drop the last blocks. Rise of modularity: Lu et al., ECCV 2022. CKA and GBS of a block's two ends
    are ours; SGLP (arXiv 2410.14720) and Pons et al. (arXiv 2405.17081) use CKA otherwise, see `segment_layers` and
    `result_change`.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> table = layer_scores(digits_resnet(), digits(), samples=100, progress=False)
    >>> table["block_influence"].idxmax(), len(table)
    ('layer1.0', 12)
    """
    unknown = [name for name in by or () if name not in get_args(Score)]
    if isinstance(by, str) or unknown or (by is not None and not by):
        raise ValueError(f"by must be a sequence of names from {get_args(Score)}, got {by!r}")
    model = unwrap(model)
    if isinstance(data, Iterator):
        data = read_batches(data, samples if seed is None else None)[0]
    example = next(iter(Source(data, batch_size, 2))).inputs
    names = droppable_layers(model, example, layers)
    if not names:
        raise ValueError("no layer of the choice can be dropped: none has input and output of one shape")
    calls = observe(model, example, names)
    for name, call in calls.items():
        if call.before is None or call.after is None:
            raise ValueError(f"layer {name!r} adds to samples that no module takes or gives: choose whole blocks")
    activations = capture(
        model,
        data,
        sorted({key for call in calls.values() for key in (call.before, call.after) if key is not None}),
        labels=labels,
        reduce=reduce,
        memory=memory,
        samples=samples if seed is None else set_order(data, batch_size, seed)[:samples],
        batch_size=batch_size,
        progress=progress,
    )
    codes = None
    if activations.labels is not None and (by is None or "modularity" in by):
        codes = class_codes(activations.labels, activations.n)[0]
    if by is None:
        by = [name for name in get_args(Score) if name != "modularity" or codes is not None]
    elif codes is None and "modularity" in by:
        raise ValueError("by: 'modularity' needs labels, pass labels=")
    draws = np.random.default_rng(seed or 0).random(len(names))
    device, points, rows = model_device(model), dict[str, _Point](), {}
    for place, (name, call) in enumerate(
        tqdm(calls.items(), desc="scores", unit="layer", disable=not progress, delay=1, leave=False)
    ):
        points = {
            key: points[key] if key in points else _Point(activations[key].to(device)) for key in _ends(call)
        }  # the output of one layer is the input of the next
        before, behind = (points[key] for key in _ends(call))
        layer = _Layer(before, behind, codes, place, len(names), float(draws[place]))
        try:
            rows[name] = {score: _SCORES[score](layer) for score in by}
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
    table.attrs = {
        "model": type(model).__name__,
        "samples": activations.n,
        "seed": seed,
        "reduce": activations.settings["reduce"],
    }
    return table


def _ends(call: Call) -> tuple[str, str]:
    assert call.before is not None
    assert call.after is not None
    return call.before, call.after
