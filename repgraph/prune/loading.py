"""Smaller models from what `Pruned.save` wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from repgraph.prune.filters import prune_filters
from repgraph.prune.layers import drop_layers
from repgraph.prune.plan import Plan
from repgraph.prune.pruned import Pruned


def load_pruned(model: nn.Module, folder: str | Path, example: object) -> Pruned:
    """The smaller model that `Pruned.save` wrote, from a fresh model of the original kind with any weights.

    Parameters
    ----------
    model
        The original architecture; untouched.
    folder
        With plan.json and weights.safetensors.
    example
        As in `drop_layers` and `prune_filters`.

    Raises
    ------
    ValueError
        As `drop_layers` and `prune_filters`, or if the weights do not fit what the plan leaves of the model.
    FileNotFoundError
        If one of the files is missing.
    """
    path = Path(folder)
    plan = Plan.load(path / "plan.json")
    pruned = drop_layers(model, replace(plan, filters={}), example)
    if plan.filters:
        cut = prune_filters(pruned.model, example, replace(plan, layers=(), renamed={}, repairs={}))
        pruned = replace(cut, plan=replace(pruned.plan, filters=plan.filters), before=pruned.before)
    try:
        load_model(pruned.model, str(path / "weights.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path / 'weights.safetensors'} does not fit {type(model).__name__} without what the plan removes: {error}"
        ) from error
    return pruned
