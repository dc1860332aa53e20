"""How many filters each layer loses: equal shares, one global ranking, given rates, or a search for widths."""

from __future__ import annotations

import difflib
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.operations import checked
from repgraph.prune.filter_groups import FilterGroups, prepared, together
from repgraph.prune.plan import Plan
from repgraph.scores.weight_norm import num_filters
from repgraph.surgery.channels import CONVS
from repgraph.surgery.coupling import ChannelGroup, Place, mask_channels
from repgraph.surgery.slots import with_slots

Fold = Literal["mean", "max", "min"]
Budget = Literal["uniform", "global", "global_mean"] | Mapping[str, float]


def plan_filters(
    model: nn.Module,
    example: object,
    scores: Mapping[str, Tensor],
    ratio: float,
    *,
    budget: Budget = "uniform",
    of: Literal["filters", "macs"] = "filters",
    ignore: str | Sequence[str] = (),
    fold: Fold = "mean",
    min_keep: int = 1,
    round_to: int = 1,
    by: str = "scores",
    groups: FilterGroups | None = None,
) -> Plan:
    """Which filters to cut so that a share of the filters or of the MACs goes: any score, any of these budgets.

    Parameters
    ----------
    model, example
        As in `prune_filters`.
    scores
        Layer -> one finite number per output channel, high = keep. Layers that go together (the writers of a residual
        stream) are judged by those of them that have scores; where none has, they are left alone.
    ratio
        Share in [0, 1) that goes.
    budget
        Which filters go first.
        "uniform": those of lowest score in every layer, at the same pace, so that every layer loses the same share.
        "global": those of lowest rank within their layer (rank / width), over all layers; where no layers are coupled
        this is "uniform" up to rounding, coupled ones keep more filters.
        "global_mean": those of lowest score divided by the mean absolute score of their layer.
        A mapping layer -> rate, for example from `rates_from_sensitivity`: as "uniform", at paces in these proportions;
        layers without a rate keep all.
    of
        What ratio is a share of. "filters": with "uniform" every layer of C units loses floor(C ratio + 1e-9) of them,
        otherwise all layers together lose floor(sum C ratio + 1e-9). "macs": as few filters go as bring the MACs on the
        example down to (1 - ratio) of the whole, counting what the readers of a layer save.
    ignore
        Layers that keep all their filters, and with them those that are coupled to them.
    fold
        How the scores of coupled layers make one: "mean", "max" (a channel stays if any layer wants it) or "min".
    min_keep
        Units that every layer keeps at least.
    round_to
        Widths, in units, are rounded up to multiples of this.
    by
        Name of the scores, for the plan.
    groups
        Result of `prunable_filters` for the same model and example, to save time.

    Returns
    -------
    Plan
        `filters` in the numbering of the model, `by`; in `settings` the arguments, MACs before and after, as foretold
        (equal to what is counted after the cut), the widths of all layers before, and `left`: layers with scores that
        cannot be cut, and why.

    Raises
    ------
    ValueError
        If a score has another length, is not finite, or names no convolution or linear layer; if ratio is outside
        [0, 1), nothing can be cut, nothing would be, or the MACs cannot come down so far (the least is named).

    Notes
    -----
    Of equal scores the filter of lowest number stays. In a grouped convolution a unit is the same place in every group,
    judged by the mean.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> from repgraph.scores.weight_norm import weight_norm_scores
    >>> model, x = digits_resnet(), digits()[0][:1]
    >>> plan = plan_filters(model, x, weight_norm_scores(model), 0.5, of="macs")
    >>> 0.49 < plan.settings["macs"][1] / plan.settings["macs"][0] <= 0.5
    True
    """
    model = checked(model)
    _check_share(ratio, "ratio")
    if of not in ("filters", "macs"):
        raise ValueError(f"of must be 'filters' or 'macs', got {of!r}")
    budget = _checked_budget(model, budget)
    _check_count(min_keep, "min_keep")
    _check_count(round_to, "round_to")
    ignore = check_names(model, ignore, "ignore")
    found, judged = _judged(model, example, scores, groups, ignore, fold, budget)
    queue = _queue(judged, budget, min_keep)
    settings: dict[str, object] = {"ratio": ratio, "budget": budget, "of": of, "fold": fold}
    settings |= {"ignore": ignore, "min_keep": min_keep, "round_to": round_to}
    if of == "macs":
        counts = queue.fewest(found, _least(found, ratio), round_to)
    elif budget == "uniform":
        counts = [math.floor(len(values) * ratio + 1e-9) for _, values in judged]
        counts = queue.rounded([min(count, len(own)) for count, own in zip(counts, queue.units, strict=True)], round_to)
    else:
        total = math.floor(sum(len(values) for _, values in judged) * ratio + 1e-9)
        counts = queue.rounded(queue.counts(total), round_to)
    removed = queue.first(counts)
    if ratio and not removed:
        raise ValueError(f"nothing would be cut: with ratio {ratio} no layer loses a filter")
    return as_plan(found, removed, scores, by=by, settings=settings)


def search_widths(
    model: nn.Module,
    example: object,
    scores: Mapping[str, Tensor],
    damage: Callable[[nn.Module], float],
    reduction: float,
    *,
    step: float = 0.02,
    min_width: int = 1,
    skip: str | Sequence[str] = (),
    fold: Fold = "mean",
    by: str = "scores",
    groups: FilterGroups | None = None,
    progress: bool = True,
) -> Plan:
    """Search the widths of all layers under a MAC budget, greedily: steps of equal saving, each where it harms least.

    From all filters on, as long as the MACs are above (1 - reduction) of the whole: for every layer the smallest number
    of filters of lowest score is found whose removal saves step times the whole, next layer included; `damage` is
    measured with each of these sets to zero; that of least damage goes. Of the last step the filters
    come back that the budget does not ask for, so that it is met within one filter of that layer.

    Parameters
    ----------
    model, example, scores, fold, by, groups
        As in `plan_filters`. Their order within a layer is fixed during the search. Coupled layers are one.
    damage
        Called with a copy of the model in eval mode, filters set to zero; returns a finite number, for example the
        cross-entropy on samples that are not those of the test. It must not change the model.
    reduction
        Share in [0, 1) of the MACs that goes.
    step
        Share of the whole MACs that a step saves, above 0.
    min_width
        Units that every layer keeps at least.
    skip
        Layers that keep all their filters.
    progress
        Show a progress bar.

    Returns
    -------
    Plan
        As of `plan_filters`; `settings["trace"]` lists the steps: first layer of the group, its width after the whole
        step, MACs, damage.

    Raises
    ------
    ValueError
        As `plan_filters`; if damage is not finite, or the budget is out of reach (the least MACs are named).

    Notes
    -----
    About reduction / step times the number of layers calls of `damage`.

    References
    ----------
    A reconstruction in the spirit of SNF (arXiv 2112.07282), of which only the abstract could be read: widths first,
    then any criterion within the layers. The greedy rule follows NetAdapt (ECCV 2018) without its fine-tuning.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> from repgraph.prune import evaluate_classifier
    >>> from repgraph.scores.weight_norm import weight_norm_scores
    >>> model, (x, y) = digits_resnet(), digits()
    >>> harm = lambda net: evaluate_classifier(net, (x[:100], y[:100]), progress=False)["cross_entropy"]
    >>> plan = search_widths(model, x[:1], weight_norm_scores(model), harm, 0.1, step=0.05, progress=False)
    >>> len(plan.settings["trace"])
    2
    """
    model = checked(model)
    _check_share(reduction, "reduction")
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
        raise ValueError(f"step must be a positive number, got {step!r}")
    _check_count(min_width, "min_width")
    if not callable(damage):
        raise ValueError(f"damage must be a function of a model, got {damage!r}")
    skip = check_names(model, skip, "skip")
    work = with_slots(model, example).eval()
    found, judged = _judged(model, example, scores, groups, skip, fold, "uniform")
    queue = _queue(judged, "uniform", min_width)
    counts, trace = [0] * len(judged), []
    target, saving = _least(found, reduction), found.macs * (step - 1e-9)

    def macs(at: Sequence[int]) -> int:
        return found.macs_after(queue.gone(at))

    with tqdm(total=100, desc="widths", unit="%", disable=not progress, delay=1, leave=False) as bar:
        while (now := macs(counts)) > target:
            candidates = []
            for g, own in enumerate(queue.units):
                wanted = [[*counts[:g], count, *counts[g + 1 :]] for count in range(counts[g] + 1, len(own) + 1)]
                place = bisect_left(wanted, -(now - saving), key=lambda at: -macs(at))
                if place < len(wanted):
                    candidates.append((g, wanted[place]))
            # where no layer alone can save a step, one gives all that it can
            candidates = candidates or [
                (g, [*counts[:g], len(own), *counts[g + 1 :]])
                for g, own in enumerate(queue.units)
                if counts[g] < len(own)
            ]
            if not candidates:
                raise ValueError(f"the MACs cannot come down to {target:,.0f}: {now:,} is the least")
            tried = []
            for g, at in candidates:
                undo = mask_channels(work, together(queue.first(at)))
                given = damage(work)
                undo()
                value = given.detach() if isinstance(given, Tensor) else given
                if isinstance(value, str) or value is None or not math.isfinite(value):
                    raise ValueError(
                        f"damage must be a finite number, got {given!r} without filters of {judged[g][0].layers[0]!r}"
                    )
                value = float(value)
                tried.append((value, macs(at), g, at))
            value, left, g, at = min(tried)
            trace.append([judged[g][0].layers[0], len(judged[g][1]) - at[g], left, value])
            before, counts = counts, at
            bar.update(min(100.0, 100 * (found.macs - left) / max(1, found.macs - target)) - bar.n)
    if trace:  # give back what the budget does not ask for
        fewer = [[*counts[:g], count, *counts[g + 1 :]] for count in range(before[g] + 1, counts[g] + 1)]
        counts = fewer[bisect_left(fewer, -target, key=lambda at: -macs(at))]
    settings = {"reduction": reduction, "step": step, "budget": "search", "of": "macs", "fold": fold, "trace": trace}
    settings |= {"skip": skip, "min_width": min_width}
    return as_plan(found, queue.first(counts), scores, by=by, settings=settings)


@dataclass(frozen=True)
class _Queue:
    """The units of every group in the order in which they go, and a key that orders them over all groups."""

    groups: list[ChannelGroup]
    units: list[Tensor]
    keys: list[Tensor]
    sums: list[dict[Place, list[int]]]
    """Channels of each place that go with the first unit, the first two, ..."""

    def first(self, counts: Sequence[int]) -> list[tuple[ChannelGroup, Tensor]]:
        """The first so many units of each group, without groups that lose none."""
        return [(g, own[:count]) for g, own, count in zip(self.groups, self.units, counts, strict=True) if count]

    def gone(self, counts: Sequence[int]) -> Counter[Place]:
        """How many channels go at each place with the first so many units of each group."""
        found: Counter[Place] = Counter()
        for sums, count in zip(self.sums, counts, strict=True):
            if count:
                found.update({place: own[count - 1] for place, own in sums.items()})
        return found

    def counts(self, total: int) -> list[int]:
        """How many of each group are among the first `total` of all."""
        of = torch.cat([torch.full((len(key),), g) for g, key in enumerate(self.keys)])
        order = torch.cat(self.keys).sort(stable=True).indices[:total]
        return torch.bincount(of[order], minlength=len(self.groups)).tolist()

    def rounded(self, counts: Sequence[int], to: int) -> list[int]:
        """Fewer, so that what stays is a multiple."""
        kept = [math.ceil((g.width - count) / to) * to for g, count in zip(self.groups, counts, strict=True)]
        return [g.width - min(g.width, left) for g, left in zip(self.groups, kept, strict=True)]

    def fewest(self, found: FilterGroups, target: float, to: int) -> list[int]:
        """The fewest units that bring the MACs down to a target."""
        totals = range(sum(map(len, self.units)) + 1)

        def macs(total: int) -> int:
            return found.macs_after(self.gone(self.rounded(self.counts(total), to)))

        place = bisect_left(totals, -target, key=lambda total: -macs(total))
        if place == len(totals):
            raise ValueError(f"the MACs cannot come down to {target:,.0f}: {macs(totals[-1]):,} is the least")
        return self.rounded(self.counts(place), to)


def _queue(judged: Sequence[tuple[ChannelGroup, Tensor]], budget: Budget, min_keep: int) -> _Queue:
    queue = _Queue([], [], [], [])
    for group, values in judged:
        units = _ascending(values)
        if isinstance(budget, Mapping):
            rates = [float(budget[name]) for name in group.layers if name in budget]
            pace = sum(rates) / len(rates) if rates else 0.0
        else:
            pace = 1.0
        last = max(0, group.width - min_keep) if pace else 0
        steps = torch.arange(1, group.width + 1, dtype=torch.float64) / (group.width * (pace or 1.0))
        queue.groups.append(group)
        queue.units.append(units[:last])
        queue.keys.append((values[units] if budget in ("global", "global_mean") else steps)[:last])
        each = {place: torch.bincount(unit, minlength=group.width) for place, (_, unit) in group.places.items()}
        queue.sums.append({place: own[units].cumsum(0).tolist() for place, own in each.items()})
    return queue


def _ascending(values: Tensor) -> Tensor:
    """The order of values; of equal ones the lowest number comes last."""
    return len(values) - 1 - values.flip(0).sort(stable=True).indices


def _least(found: FilterGroups, ratio: float) -> float:
    """The MACs that a share leaves; room for the rounding of the share."""
    return found.macs * (1 - ratio + 1e-9)


def _judged(
    model: nn.Module,
    example: object,
    scores: Mapping[str, Tensor],
    groups: FilterGroups | None,
    ignore: Sequence[str],
    fold: Fold,
    budget: Budget,
) -> tuple[FilterGroups, list[tuple[ChannelGroup, Tensor]]]:
    """The groups of the model and the scores of those that have some."""
    if fold not in get_args(Fold):
        raise ValueError(f"fold must be one of {', '.join(get_args(Fold))}, got {fold!r}")
    check_scores(model, scores)
    found = prepared(model, example)[1] if groups is None else groups
    known = dict(model.named_modules())
    if not isinstance(found, FilterGroups) or not all(
        isinstance(known.get(name), (*CONVS, nn.Linear))
        and found.parts[name][1][name, "out"] == num_filters(model.get_submodule(name))
        for group in found.groups
        for name in group.layers
    ):
        raise ValueError("groups must be what prunable_filters gives for this model")
    judged = unit_scores(found, scores, ignore=ignore, fold=fold, budget=budget)
    if not judged:
        some = "; ".join(f"{name!r}: {why}" for name, why in found.left.items() if name in scores)
        raise ValueError(f"no layer with scores can be cut ({some or 'all are ignored'})")
    return found, judged


def _check_share(value: float, argument: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{argument} must be a number of at least 0 and below 1, got {value!r}")


def _check_count(value: int, argument: str) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{argument} must be at least 1 and whole, got {value!r}")


def _checked_budget(model: nn.Module, budget: Budget) -> Budget:
    """Rates as plain numbers."""
    if isinstance(budget, str) and budget in ("uniform", "global", "global_mean"):
        return budget
    if isinstance(budget, str) or not hasattr(budget, "items"):
        raise ValueError(f"budget must be 'uniform', 'global', 'global_mean' or rates by layer, got {budget!r}")
    try:
        rates = {str(name): float(rate) for name, rate in budget.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"budget must map layers to rates, got {budget!r}") from error
    check_names(model, list(rates), "budget")
    if not rates or not all(0 <= rate < math.inf for rate in rates.values()) or not any(rates.values()):
        raise ValueError(f"budget must hold rates of at least 0, one above, got {rates}")
    return rates


def unit_scores(
    found: FilterGroups, scores: Mapping[str, Tensor], *, ignore: Sequence[str], fold: Fold, budget: Budget = "uniform"
) -> list[tuple[ChannelGroup, Tensor]]:
    """One number per unit of every group that has scores: within a layer the mean, over its layers the fold."""
    judged = []
    for group in found.groups:
        if any(name in ignore for name in group.layers):
            continue
        votes = []
        for name in group.layers:
            if name in scores:
                own = torch.as_tensor(scores[name]).detach().double().cpu()
                if budget == "global":
                    own = torch.empty_like(own).scatter(0, _ascending(own), torch.arange(1.0, len(own) + 1).double())
                    own = own / len(own)
                elif budget == "global_mean":
                    own = own / own.abs().mean().clamp_min(torch.finfo(torch.float64).tiny)
                channels, units = group.places[name, "out"]
                sums = torch.zeros(group.width, dtype=torch.float64).index_add_(0, units, own[channels])
                votes.append(sums / torch.bincount(units, minlength=group.width))
        if votes:
            every = torch.stack(votes)
            folded = {"mean": every.mean(0), "max": every.amax(0), "min": every.amin(0)}[fold]
            judged.append((group, folded.round(decimals=12) if budget == "global" else folded))  # equal means of ranks
    return judged


def as_plan(
    found: FilterGroups,
    removed: Sequence[tuple[ChannelGroup, Tensor]],
    scores: Mapping[str, Tensor],
    *,
    by: str,
    settings: Mapping[str, object],
) -> Plan:
    """The plan that cuts these units, with the MACs that it foretells."""
    filters: dict[str, list[int]] = {}
    for (name, side), channels in together(removed).items():
        if side == "out" and any(name in group.layers for group, _ in removed):
            filters.setdefault(name, []).extend(channels.tolist())
    known = {name for group in found.groups for name in group.layers}
    left = {name: found.left.get(name, "it does not run on the example") for name in scores if name not in known}
    macs = [found.macs, found.macs_without(removed)]
    widths = dict.fromkeys(found.parts, 0)
    for group in found.groups:
        for name in group.layers:
            widths[name] += len(group.places[name, "out"][0])
    widths = {name: width for name, width in widths.items() if width}
    own = {name: tuple(filters[name]) for name in widths if name in filters}
    return Plan(filters=own, by=by, settings={**settings, "macs": macs, "widths": widths, "left": left})


def check_scores(model: nn.Module, scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that do not fit the model."""
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError(f"scores must map names of layers to one number per filter, got {type(scores).__name__}")
    check_names(model, list(scores), "scores")
    for name, own in scores.items():
        width = num_filters(model.get_submodule(name))
        values = torch.as_tensor(own)
        if values.shape != (width,):
            raise ValueError(
                f"scores of {name!r} must have shape ({width},), one per filter, got {tuple(values.shape)}"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(f"scores of {name!r} are not finite")


def check_names(model: nn.Module, names: str | Sequence[str], argument: str) -> list[str]:
    """Names of convolutions and linear layers of the model; one alone counts as one."""
    names = [names] if isinstance(names, str) else list(names)
    layers = [name for name, module in model.named_modules() if isinstance(module, (*CONVS, nn.Linear))]
    for name in names:
        if name not in layers:
            close = difflib.get_close_matches(str(name), layers, 4, 0.5) or layers[:4]
            some = ", ".join(map(repr, close))
            raise ValueError(f"{argument}: {name!r} is no convolution or linear layer of the model; close are {some}")
    return names
