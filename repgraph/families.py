"""What each family of metrics says of one layer and one set of samples: the cells of the table of `profile`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from repgraph.activations import Activations
from repgraph.activations.gates import GATES
from repgraph.graph import Graph, communities
from repgraph.messages import heard
from repgraph.metrics.class_separation import class_separation
from repgraph.metrics.complexity.entropy import Pairs, pairs_of
from repgraph.metrics.complexity.report import label_entropy
from repgraph.metrics.feature_entropy.entropy import feature_entropy, floor_and_ceiling
from repgraph.metrics.modularity import modularity, modularity_ceiling, modularity_null
from repgraph.metrics.similarity.cka import linear_cka
from repgraph.metrics.similarity.gbs import gbs
from repgraph.metrics.similarity.gram import gram
from repgraph.metrics.similarity.measure import Measure
from repgraph.metrics.similarity.null import permuted

Family = Literal["modularity", "gbs", "cka", "feature_entropy", "complexity", "spline"]
Row = dict[str, np.ndarray]

WITH_GATES = ("complexity", "spline")
WITH_STD = (
    "modularity", "null", "community_modularity", "gbs_previous", "cka_previous", "feature_entropy", "complexity",
    "label_information",
)  # fmt: skip


def of_labels(x: Tensor, graph: Graph, labels: Tensor, permutations: int, seed: int) -> Row:
    """Modularity with null and ceiling, and class separation."""
    return {
        "modularity": np.array([modularity(graph, labels, negative="signed")]),
        "null": modularity_null(graph, labels, permutations=permutations, seed=seed).numpy(),
        "ceiling": np.array([modularity_ceiling(graph, labels)]),
        "class_separation": np.array([class_separation(x, labels)]),
    }


def of_communities(graph: Graph, seed: int) -> Row:
    """Modularity without labels: that of Leiden communities."""
    row, col, weight = graph.edges()
    positive = Graph.from_edges(graph.n, row, col, weight.clip(0))
    found = communities(positive, seed=seed)
    return {
        "community_modularity": np.array([found.modularity]),
        "communities": np.array([found.num_communities]),
    }


def of_edges(graph: Graph) -> Row:
    """What needs no labels."""
    weight = graph.edges()[2]
    return {
        "isolated": np.array([len(graph.isolated)]),
        "negative_share": np.array([(weight < 0).sum() / max(np.count_nonzero(weight), 1)]),
    }


def prepared(x: Tensor, graph: Graph, metrics: Sequence[Family]) -> dict[str, Any]:
    """What the similarity to the previous layer is computed from."""
    found: dict[str, Any] = {}
    if "gbs" in metrics:
        with heard():  # isolated nodes have a column of their own
            found["gbs"] = cast(Measure, gbs).prepare(graph)
    if "cka" in metrics:
        found["cka"] = gram(x)
    return found


def to_previous(previous: dict[str, Any], own: dict[str, Any], seed: int) -> Row:
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


def of_births(births: Tensor | None, side: int, labels: Tensor) -> Row:
    """Feature entropy and birth rate, mean over units and classes, with floor and ceiling; nan without maps."""
    names = ("feature_entropy", "feature_entropy_floor", "feature_entropy_ceiling", "birth_rate")
    if births is None:
        return {name: np.array([np.nan]) for name in names}
    found = [feature_entropy(births[labels == label]) for label in np.unique(labels.numpy())]
    limits = floor_and_ceiling(side, [one.n for one in found])
    entropy, rate = (float(torch.stack([getattr(one, c) for one in found]).mean()) for c in ("entropy", "birth_rate"))
    return {name: np.array([v]) for name, v in zip(names, (entropy, *limits.values(), rate), strict=True)}


def of_gates(
    gates: Mapping[str, tuple[Tensor, int]], labels: Tensor | None, lam: float, metrics: Sequence[Family]
) -> Row:
    """Complexity, label information and the number of regions, from packed gates and their numbers; nan without."""
    parts = [pairs_of(packed, count) for packed, count in gates.values()]
    names = ["gates"]
    if "complexity" in metrics:
        names += ["complexity", "complexity_ceiling"]
        names += [] if labels is None else ["label_information", "label_information_ceiling"]
    names += ["regions"] if "spline" in metrics else []
    row = dict.fromkeys(names, np.array([np.nan])) | {"gates": np.array([float(sum(part.gates for part in parts))])}
    if not parts:
        return row
    squares = parts[0].squares
    for part in parts[1:]:
        squares = squares + part.squares
    total = Pairs(squares, torch.cat([p.rates for p in parts]), int(row["gates"][0]), sum(p.active for p in parts))
    n = len(squares)
    if "complexity" in metrics:
        row["complexity"] = np.array([total.entropy(lam, "kde", "total")])
        row["complexity_ceiling"] = np.array([np.log2(n)])
        if labels is not None:
            labels = labels.to(squares.device)
            row["label_information"] = row["complexity"] - total.entropy(lam, "kde", "total", labels)
            row["label_information_ceiling"] = np.array([label_entropy(labels)])
    if "spline" in metrics:
        first = (squares == 0).int().argmax(1)  # the first sample of the same code
        row["regions"] = np.array([float((first == torch.arange(n, device=first.device)).sum())])
    return row


def gates_by_layer(activations: Activations) -> dict[str, list[str]]:
    """Which gates belong to each layer: those inside it, and behind it those outside any layer.

    A gate before the first layer belongs to the first.

    Raises
    ------
    ValueError
        If there are no layers.
    """
    layers = [name for name, spec in activations.specs.items() if spec.gates is None]
    if not layers:
        raise ValueError("layers holds gates only: name layers to which they belong, for example 'blocks'")
    found: dict[str, list[str]] = {name: [] for name in layers}
    order = list(activations.specs)
    for place, key in enumerate(order):
        if activations.specs[key].gates is None:
            continue
        around = [name for name in order[place:] if name in found and _inside(key.removeprefix(GATES), name)]
        before = [name for name in order[:place] if name in found]
        found[around[0] if around else before[-1] if before else layers[0]].append(key)
    return found


def _inside(gate: str, layer: str) -> bool:
    """Whether a gate is one of a layer's module, and not of an earlier call than the layer's."""
    owner, _, call = re.sub(r"/upper$", "", gate).partition("#")
    module, _, number = layer.partition("#")
    earlier = not call.startswith("relu") and int(call or 0) < int(number or 0)
    return (owner == module or owner.startswith(f"{module}.")) and not earlier
