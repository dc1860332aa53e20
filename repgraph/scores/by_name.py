"""All filter scores under their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from repgraph.activations.batches import Source, read_batches
from repgraph.labels import Labels
from repgraph.scores.batch_norm_scale import batch_norm_scale_scores
from repgraph.scores.central_filter import central_filter_scores
from repgraph.scores.chip import chip_scores
from repgraph.scores.clp import clp_scores
from repgraph.scores.feature_entropy import feature_entropy_scores
from repgraph.scores.fsm import fsm_scores
from repgraph.scores.hrank import hrank_scores
from repgraph.scores.random_scores import random_scores
from repgraph.scores.taylor import taylor_scores
from repgraph.scores.unit_redundancy import unit_redundancy_scores
from repgraph.scores.weight_norm import weight_norm_scores

FilterScore = Literal[
    "l1",
    "l2",
    "bn_scale",
    "taylor",
    "hrank",
    "chip",
    "central_filter",
    "feature_entropy",
    "fsm",
    "clp",
    "unit_redundancy",
    "random",
]


def filter_scores(
    model: nn.Module,
    data: object,
    by: FilterScore = "chip",
    layers: Sequence[str] | None = None,
    *,
    labels: Labels | None = None,
    samples: int | Sequence[int] | Tensor | None = 256,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """One number per filter by any criterion, high = keep.

    Parameters
    ----------
    model, data, batch_size, progress
        As in `capture`.
    by
        From weights alone: "l1", "l2" (`weight_norm_scores`), "bn_scale" (`batch_norm_scale_scores`), "fsm"
        (`fsm_scores`), "clp" (`clp_scores`), "unit_redundancy" (`unit_redundancy_scores`), "random" (`random_scores`).
        From maps: "hrank" (`hrank_scores`), "chip" (`chip_scores`), "central_filter" (`central_filter_scores`).
        With labels: "taylor" (`taylor_scores`), "feature_entropy" (`feature_entropy_scores`).
    layers
        Names of layers; by default all convolutions to which the criterion applies.
    labels
        As in `capture`, for those that need them.
    samples
        How many samples to take, or their positions.
    seed
        Of "random".

    Returns
    -------
    dict of str to Tensor
        Layer -> (C,), float64, on the CPU.

    Raises
    ------
    ValueError
        If `by` is unknown, or as the function of the criterion.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> scores = filter_scores(digits_resnet(), digits(), "hrank", ["layer1.0.conv1"], samples=32, progress=False)
    >>> scores["layer1.0.conv1"].shape
    torch.Size([8])
    """
    if by not in get_args(FilterScore):
        raise ValueError(f"by must be one of {', '.join(get_args(FilterScore))}, got {by!r}")
    if isinstance(data, Iterator):
        data = read_batches(data, samples if isinstance(samples, int) else None)[0]
    if by in ("l1", "l2"):
        return weight_norm_scores(model, layers, p=1 if by == "l1" else 2)
    if by == "random":
        return random_scores(model, layers, seed=seed)
    from_weights: Mapping[str, Any] = {
        "bn_scale": batch_norm_scale_scores,
        "fsm": fsm_scores,
        "clp": clp_scores,
        "unit_redundancy": unit_redundancy_scores,
    }
    if by in from_weights:
        scores: dict[str, Tensor] = from_weights[by](model, next(iter(Source(data, batch_size, 2))).inputs, layers)
        return scores
    from_data: Mapping[str, Any] = {
        "hrank": hrank_scores,
        "chip": chip_scores,
        "central_filter": central_filter_scores,
        "taylor": partial(taylor_scores, labels=labels),
        "feature_entropy": partial(feature_entropy_scores, labels=labels),
    }
    found: dict[str, Tensor] = from_data[by](
        model, data, layers, samples=samples, batch_size=batch_size, progress=progress
    )
    return found
