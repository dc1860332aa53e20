"""Redundancy scores of layers, all from one capture of what goes into them and comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations import Activations, capture
from repgraph.activations.batches import Source, model_device, read_batches
from repgraph.activations.layers import INPUTS, Select, unwrap
from repgraph.activations.reduce import Reduce
from repgraph.graph import Graph, knn_graph
from repgraph.labels import Labels, as_labels, class_codes
from repgraph.layerwise import set_order
from repgraph.metrics.angular_distance import angular_distance
from repgraph.metrics.block_influence import block_influence
from repgraph.metrics.modularity import modularity
from repgraph.metrics.redundancy import redundancy
from repgraph.metrics.relative_residual import relative_residual
from repgraph.metrics.similarity import gbs, gram, linear_cka, mutual_knn
from repgraph.metrics.similarity.measure import Measure
from repgraph.prune.layers import droppable_layers
from repgraph.surgery.calls import Call, observe

Score = Literal[
    "redundancy",
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
_K = 10  # neighbours of "turnover"
_NEAR = 5  # neighbours of "redundancy"
_ROWS = 2000  # tokens whose graph "redundancy" builds


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

    @cached_property
    def rows(self) -> Any:
        return cast(Measure, gbs).prepare(self.x)

    @cached_property
    def gram(self) -> Any:
        return gram(self.x)


@dataclass(eq=False)
class _Last:
    """The last representation, whose graph "redundancy" reads."""

    z: Tensor
    mask: Tensor | None
    seed: int

    @cached_property
    def tokens(self) -> Tensor:
        """Places in (n T) of at most 2000 tokens that the mask shows and that are not the same in all samples."""
        same = torch.isclose(self.z, self.z[:1], rtol=1e-4, atol=1e-6 * float(self.z.abs().max())).all(2).all(0)
        shown = ~same.expand(self.z.shape[:2])
        places = (shown if self.mask is None else shown & (self.mask != 0)).flatten().nonzero()[:, 0].cpu()
        order = torch.randperm(len(places), generator=torch.Generator("cpu").manual_seed(self.seed), device="cpu")
        return places[order[:_ROWS].sort().values].to(self.z.device)

    @cached_property
    def token_graph(self) -> Graph:
        return knn_graph(self.z.flatten(0, 1)[self.tokens], _NEAR, symmetrize="none")

    @cached_property
    def graph(self) -> Graph:
        return knn_graph(self.z, _NEAR, symmetrize="none")

    def compare(self, x: Tensor, y: Tensor) -> float:
        """Redundancy over tokens where x and z have the same ones, else over samples."""
        if x.ndim == 3 and self.z.ndim == 3 and x.shape[:2] == self.z.shape[:2]:
            x, y = (end.flatten(0, 1)[self.tokens] for end in (x, y))
            return redundancy(x, y, self.token_graph)
        return redundancy(x, y, self.graph)


@dataclass(eq=False)
class _Layer:
    """A layer that could be dropped: the samples before and behind it, and its place among those that could."""

    before: _Point
    behind: _Point
    last: _Last
    mask: Tensor | None
    labels: Tensor | None
    place: int
    total: int
    draw: float


def _gain(layer: _Layer) -> float:
    assert layer.labels is not None
    ends = [modularity(point.graph, layer.labels, negative="signed") for point in (layer.behind, layer.before)]
    return ends[0] - ends[1]


_SCORES: dict[str, Callable[[_Layer], float]] = {
    "redundancy": lambda layer: layer.last.compare(layer.before.x, layer.behind.x),
    "modularity": _gain,
    "block_influence": lambda layer: block_influence(layer.before.x, layer.behind.x, layer.mask),
    "angular_distance": lambda layer: angular_distance(layer.before.x, layer.behind.x, layer.mask),
    "relative_residual": lambda layer: relative_residual(layer.before.x, layer.behind.x),
    "turnover": lambda layer: 1 - mutual_knn(layer.before.neighbors, layer.behind.neighbors),
    "gbs": lambda layer: 1 - gbs(layer.before.rows, layer.behind.rows),
    "cka": lambda layer: 1 - linear_cka(layer.before.gram, layer.behind.gram, unbiased=True),
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
        As in `capture`. Tokens that an attention mask hides count as 0, and not at all where tokens are compared one by
        one.
    layers
        As in `droppable_layers`: those of the choice that can be dropped are scored.
    by
        Columns to compute; by default all, without labels all but modularity, and nan with a warning where one is
        undefined.
    samples
        How many samples to take: the first ones.
    seed
        Take them at random with this seed instead; it also draws "random" (0 if None).
    progress
        Show progress bars.

    Returns
    -------
    DataFrame
        One row per droppable layer, in execution order. Columns: "redundancy" (ours, with the graph of what goes into
        the last linear layer behind the layers, or of the last layer's output; over at most 2000 tokens where there are
        tokens, without those that are the same in all samples); "modularity" (rise of modularity over the layer, k =
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
        data, total = read_batches(data, samples if seed is None else None)
        labels = labels if labels is None else as_labels(labels)[:total]
    example = next(iter(Source(data, batch_size, 2))).inputs
    names = droppable_layers(model, example, layers)
    if not names:
        raise ValueError("no layer of the choice can be dropped: none has input and output of one shape")
    calls, last = _observed(model, example, names)
    for name, call in calls.items():
        if call.before is None or call.after is None:
            raise ValueError(f"layer {name!r} adds to samples that no module takes or gives: choose whole blocks")
    chosen = samples if seed is None else set_order(data, batch_size, seed)[:samples]
    source, device = Source(data, batch_size, chosen), model_device(model)
    activations = capture(
        model,
        data,
        sorted({last, *(key for call in calls.values() for key in _ends(call))}),
        labels=labels,
        reduce=reduce,
        memory=memory,
        samples=chosen,
        batch_size=batch_size,
        progress=progress,
    )
    codes = None
    if activations.labels is not None and (by is None or "modularity" in by):
        codes = class_codes(activations.labels, activations.n)[0]
    if by is not None and codes is None and "modularity" in by:
        raise ValueError("by: 'modularity' needs labels, pass labels=")
    columns: Sequence[str] = by or [name for name in get_args(Score) if name != "modularity" or codes is not None]
    mask = _mask(source, activations)
    final = _Last(activations[last].to(device), mask, seed or 0)
    draws = np.random.default_rng(seed or 0).random(len(names))
    points: dict[str, _Point] = {}
    rows: dict[str, dict[str, float]] = {}
    for place, (name, call) in enumerate(
        tqdm(calls.items(), desc="scores", unit="layer", disable=not progress, delay=1, leave=False)
    ):
        points = {
            key: points[key] if key in points else _Point(_shown(activations[key].to(device), mask))
            for key in _ends(call)
        }  # the output of one layer is the input of the next
        before, behind = (points[key] for key in _ends(call))
        fits = mask is not None and before.x.ndim == 3 and before.x.shape[:2] == mask.shape
        layer = _Layer(before, behind, final, mask if fits else None, codes, place, len(names), float(draws[place]))
        rows[name] = {}
        for score in columns:
            try:
                rows[name][score] = _SCORES[score](layer)
            except ValueError as error:
                if by is not None:
                    raise ValueError(f"layer {name!r}: {error}") from error
                rows[name][score] = np.nan
                warnings.warn(f"layer {name!r}: {score} is undefined (nan): {error}", stacklevel=2)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
    table.attrs = {
        "model": type(model).__name__,
        "samples": activations.n,
        "seed": seed,
        "reduce": activations.settings["reduce"],
    }
    return table


def _observed(model: nn.Module, example: object, names: Sequence[str]) -> tuple[dict[str, Call], str]:
    """The calls of the layers, and what `capture` calls the last representation."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = observe(model, example, [*names, *linear])
    calls = {name: call for name, call in found.items() if name in names}
    end = list(calls)[-1]
    stream = calls[end].result
    for name in reversed(list(found)):
        taken = found[name].given[0][1] if found[name].given else None
        if name == end or stream is None:
            break
        if taken is not None and (taken.ndim == 3) == (stream.ndim == 3):
            return calls, INPUTS + name
    return calls, calls[end].after or end


def _mask(source: Source, activations: Activations) -> Tensor | None:
    """The attention masks of all samples, (n, T), where every batch has one."""
    masks, hashes = [], []
    for batch in source:
        if batch.mask is None:
            return None
        masks.append(batch.mask)
        hashes.append(batch.hashes())
    if activations.input_hashes is not None and not torch.equal(torch.cat(hashes), activations.input_hashes):
        raise ValueError("data gave other samples when they were read again for the mask: do not shuffle them")
    return torch.cat(masks) if len({mask.shape[1:] for mask in masks}) == 1 else None


def _shown(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that the mask hides as zeros."""
    if mask is None or x.ndim != 3 or x.shape[:2] != mask.shape:
        return x
    return x * (mask != 0).to(device=x.device, dtype=x.dtype)[..., None]


def _ends(call: Call) -> tuple[str, str]:
    assert call.before is not None
    assert call.after is not None
    return call.before, call.after
