"""One row of a profile: everything about one layer, over all sets of samples."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from repgraph import families
from repgraph.activations.hashes import digest_of
from repgraph.checkpoint import Row
from repgraph.families import Family
from repgraph.graph import Graph, knn_graph
from repgraph.metrics.feature_entropy.entropy import layer_births
from repgraph.neighbors import Metric
from repgraph.parallel import Item

Gates = list[tuple[Item[Tensor], int]]
"""Packed gates of a layer and how many each item holds."""


Prepared = list[dict[str, Any]]
"""What the similarity of a layer to the next one is computed from, for each set."""


class Last:
    """What the layer before left for the similarity to it; it does not travel to other processes."""

    def __init__(self) -> None:
        self.layer: tuple[str, Prepared] = "", []

    def __reduce__(self) -> tuple[type[Last], tuple[()]]:
        return Last, ()


@dataclass(frozen=True)
class Options:
    """What `profile` lets one choose about the rows, checked."""

    k: int
    n: int
    repeats: int
    seed: int | None
    metrics: tuple[Family, ...]
    metric: Metric
    symmetrize: Literal["mean", "union", "mutual"]
    permutations: int
    lam: float

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("repeats", self.repeats), ("k", self.k)):
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if self.n < 2:
            raise ValueError(f"n must be at least 2 samples per set, got {self.n}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if not 1 <= self.k < self.n:
            raise ValueError(f"k must satisfy 1 <= k < n, got k = {self.k} with n = {self.n} samples per set")
        if "cka" in self.metrics and self.n < 4:
            raise ValueError(f"n must be at least 4 samples per set for unbiased CKA, got {self.n}")
        known = get_args(Family)
        if isinstance(self.metrics, str) or not self.metrics or any(name not in known for name in self.metrics):
            raise ValueError(f"metrics must be a sequence of names from {known}, got {self.metrics!r}")
        if not self.lam > 0:
            raise ValueError(f"lam must be positive, got {self.lam!r}")


@dataclass(frozen=True)
class LayerRow:
    """How a layer becomes a row, on a device; `labels` are those of each set of samples."""

    options: Options
    sets: list[Tensor]
    labels: list[Tensor] | None
    device: torch.device | None
    keys: bool
    """Whether to tell what rows are made from."""

    def __call__(
        self,
        layer: Item[Tensor],
        gates: Gates,
        previous: Item[Tensor] | None,
        last: Last,
        kept: tuple[str, Row] | None,
    ) -> tuple[str, str, Row]:
        """The layer's name, a digest of what its row is made from, and the row: the kept one if its digest is equal."""
        key = ""
        if self.keys:
            read = [*([] if previous is None else [previous]), layer, *(gate for gate, _ in gates)]  # in their order
            digests = [digest_of(*self.sets, *(self.labels or [])), *(digest_of(item.read()) for item in read)]
            key = digest_of("".join(digests).encode())
            if kept is not None and kept[0] == key:
                return layer.name, key, kept[1]
        before: Prepared = []
        if previous is not None:
            name, before = last.layer
            before = before if name == previous.name else self._prepared(previous)
        row, prepared = self._row(layer, gates, before)
        last.layer = layer.name, prepared
        return layer.name, key, row

    def _prepared(self, layer: Item[Tensor]) -> Prepared:
        x = layer.read().flatten(1)
        sets = [x[as_slice(chosen)].to(self.device) for chosen in self.sets]
        return [families.prepared(own, self._graph(layer.name, own), self.options.metrics) for own in sets]

    def _graph(self, name: str, x: Tensor) -> Graph:
        try:
            return knn_graph(x, self.options.k, metric=self.options.metric, symmetrize=self.options.symmetrize)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    def _row(self, item: Item[Tensor], gates: Gates, before: Prepared) -> tuple[Row, Prepared]:
        metrics = self.options.metrics
        maps = item.read()
        bits = {gate.name: (gate.read(), count) for gate, count in gates}
        births, side, before_relu = None, maps.shape[-1], False
        if "feature_entropy" in metrics and maps.ndim == 4 and maps.shape[2] == side >= 4:
            births, side, before_relu = layer_births(item.name, maps)
        layer = maps.reshape(len(maps), -1)
        found, prepared = [], []
        for number, chosen in enumerate(self.sets):
            at = as_slice(chosen)
            own_seed = (self.options.seed or 0) + number
            labels = None if self.labels is None else self.labels[number]
            row: families.Row = {}
            x = layer[at].to(self.device)
            graph = self._graph(item.name, x)
            if "modularity" in metrics:
                if labels is None:
                    row |= families.of_communities(graph, self.options.seed or 0)
                else:
                    row |= families.of_labels(x, graph, labels, self.options.permutations, own_seed)
            prepared.append(families.prepared(x, graph, metrics))
            row |= families.to_previous(before[number] if before else {}, prepared[-1], own_seed)
            row |= families.of_edges(graph)
            if "feature_entropy" in metrics:
                assert labels is not None
                row |= families.of_births(None if births is None else births[at], side, labels)
            if set(metrics) & set(families.WITH_GATES):
                packed = {name: (one[at].to(self.device), count) for name, (one, count) in bits.items()}
                row |= families.of_gates(packed, labels, self.options.lam, metrics)
            found.append(row)
        return {**_summary(found, layer.shape[1]), "before_relu": before_relu}, prepared


def as_slice(rows: Tensor) -> Tensor | slice:
    """A run of rows as a slice, which copies nothing."""
    start, end = int(rows[0]), int(rows[-1]) + 1
    return slice(start, end) if start < end and torch.equal(rows, torch.arange(start, end, device="cpu")) else rows


def _summary(found: list[families.Row], features: int) -> Row:
    """Mean over the sets, and std where it is a column of its own."""
    row: Row = {}
    for name in found[0]:
        values = np.concatenate([one[name] for one in found])
        if name == "isolated":
            row["features"] = features
        row[name] = float(values.mean())
        if name in families.WITH_STD:
            row[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return row
