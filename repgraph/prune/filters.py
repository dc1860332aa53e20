"""Cut filters out of a model, verified against the model in which they are set to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from repgraph.activations.layers import unwrap
from repgraph.cost import Cost, model_cost
from repgraph.operations import checked
from repgraph.prune.budgets import Budget, Fold, check_names, plan_filters
from repgraph.prune.filter_groups import FilterGroups, difference, prepared, together
from repgraph.prune.plan import Plan
from repgraph.prune.pruned import Pruned
from repgraph.scores.weight_norm import num_filters
from repgraph.surgery.coupling import ChannelGroup, cut_channels, mask_channels
from repgraph.surgery.slots import without_slots


def prune_filters(
    model: nn.Module,
    example: object,
    scores: Mapping[str, Tensor] | Plan,
    ratio: float | None = None,
    *,
    budget: Budget = "uniform",
    of: Literal["filters", "macs"] = "filters",
    ignore: str | Sequence[str] = (),
    fold: Fold = "mean",
    min_keep: int = 1,
    round_to: int = 1,
) -> Pruned:
    """A smaller copy of a model without some of its filters, verified against the model in which they are zero.

    Parameters
    ----------
    model
        Any nn.Module, in any mode, frozen or not; untouched. DataParallel and torch.compile are looked through.
    example
        One batch, as `capture` reads it. Costs are counted on it.
    scores
        Layer -> one number per filter, high = keep; or a `Plan`, whose filters are cut.
    ratio
        Share in [0, 1) of the filters or MACs that goes; not with a plan.
    budget, of, ignore, fold, min_keep, round_to
        As in `plan_filters`.

    Returns
    -------
    Pruned
        The smaller model; the plan, with the filters of every layer in the numbering of `model`; costs before and
        after, as counted.

    Raises
    ------
    ValueError
        As `plan_filters`; if a plan's filters are not whole units (the missing ones are named), all filters of a layer,
        or of a layer that cannot be cut (with the reason); if the smaller model does not compute what the masked one
        does.

    Notes
    -----
    Cut are rows and columns, with norms, depthwise convolutions and flattened columns in between, by Torch-Pruning's
    functions; all numbers refer to the whole model and are cut at once, so that no order of cuts matters. The check: on
    the example, in eval mode and float64 where the model allows, with noise on weights and example so that zeros hide
    nothing, every tensor that the smaller model gives agrees to a relative 1e-8 (float32: 1e-5) with that of the model
    whose filters, biases, and scales and shifts of norms are set to zero. Parameters are new objects: make the
    optimizer afterwards. A shortcut that pads with zero channels becomes a module that holds it and knows which
    channels are left.

    References
    ----------
    Dependency groups: Torch-Pruning (Fang et al., CVPR 2023). Voting of coupled layers by the mean is ours: HRank
    masks each convolution on its own, CHIP adds misaligned channels, Central Filter and FSM leave the stream alone.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> from repgraph.scores.weight_norm import weight_norm_scores
    >>> model, x = digits_resnet(), digits()[0][:2]
    >>> pruned = prune_filters(model, x, weight_norm_scores(model), 0.25)
    >>> model.layer1[0].conv1.out_channels, pruned.model.layer1[0].conv1.out_channels
    (8, 6)
    """
    model = unwrap(checked(model))
    slotted, groups = prepared(model, example)
    if isinstance(scores, Plan):
        if ratio is not None:
            raise ValueError("ratio must be left out with a plan, which says what to cut")
        plan = scores
    elif ratio is None:
        raise ValueError("ratio must be given with scores: the share of filters or MACs that goes")
    else:
        plan = plan_filters(
            model,
            example,
            scores,
            ratio,
            budget=budget,
            of=of,
            ignore=ignore,
            fold=fold,
            min_keep=min_keep,
            round_to=round_to,
            groups=groups,
        )
    removed = together(units_of(model, groups, plan))
    if reason := difference(slotted, example, removed):
        raise ValueError(f"the filters of the plan cannot be cut together: {reason}")
    before = model_cost(model, example)
    cut_channels(slotted, removed)
    smaller = without_slots(slotted)
    return Pruned(smaller, replace(plan, model=type(model).__name__), before, model_cost(smaller, example))


def filter_cost(model: nn.Module, example: object, plan: Plan) -> Cost:
    """What the model costs without a plan's filters."""
    slotted, groups = prepared(checked(model), example)
    cut_channels(slotted, together(units_of(model, groups, plan)))
    return model_cost(without_slots(slotted), example)


@torch.inference_mode(False)
@torch.no_grad()
def mask_filters(model: nn.Module, example: object, plan: Plan) -> nn.Module:
    """A copy of the model in which a plan's filters are set to zero, with the biases and norms behind them.

    What `prune_filters` gives is the same function with fewer parameters; this one keeps all shapes, as training
    loops that prune softly want it.

    Parameters, and errors, as in `prune_filters`.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> model, x = digits_resnet(), digits()[0][:2]
    >>> masked = mask_filters(model, x, Plan(filters={"layer1.0.conv1": (0, 3)}))
    >>> masked.layer1[0].conv1.weight.flatten(1).any(1).tolist()[:5]
    [False, True, True, False, True]
    """
    model = unwrap(checked(model))
    removed = together(units_of(model, prepared(model, example)[1], plan))
    masked = deepcopy(model)
    mask_channels(masked, removed)
    return masked


def units_of(model: nn.Module, groups: FilterGroups, plan: Plan) -> list[tuple[ChannelGroup, Tensor]]:
    """The units that a plan's filters make."""
    if plan.layers:
        raise ValueError(
            "plan drops layers too: drop them first, and cut the filters of what is left (load_pruned does)"
        )
    check_names(model, list(plan.filters), "plan")
    wanted = {name: set(channels) for name, channels in plan.filters.items() if channels}
    for name, own in wanted.items():
        width = num_filters(model.get_submodule(name))
        if max(own) >= width:
            raise ValueError(f"plan: {name!r} has {width} filters, got number {max(own)}")
        if len(own) == width:
            raise ValueError(f"plan: all {width} filters of {name!r} would go: keep at least one")
        if name not in groups.left and not any(name in group.layers for group in groups.groups):
            raise ValueError(f"plan: {name!r} does not run on the example, or without a gradient: it cannot be cut")
        if name in groups.left:
            raise ValueError(f"plan: the filters of {name!r} cannot be cut: {groups.left[name]}")
    found = []
    for group in groups.groups:
        chosen: set[int] = set()
        for name in group.layers:
            channels, unit = group.places[name, "out"]
            chosen |= set(unit[torch.isin(channels, torch.tensor(sorted(wanted.get(name, ()))))].tolist())
        if chosen:
            units = torch.tensor(sorted(chosen))
            for name in group.layers:
                channels, unit = group.places[name, "out"]
                missing = set(channels[torch.isin(unit, units)].tolist()) - wanted.get(name, set())
                if missing:
                    raise ValueError(f"plan: filters {sorted(missing)} of {name!r} go together with others: add them")
            found.append((group, units))
    return found
