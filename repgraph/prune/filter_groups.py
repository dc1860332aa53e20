"""Which filters of a model can be cut: groups of channels that go together, tried against masks, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from html import escape
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from repgraph.activations.batches import example_inputs
from repgraph.activations.forward import run_example
from repgraph.cost import cost_by_module, model_cost
from repgraph.operations import checked, without_data
from repgraph.surgery.channels import CONVS
from repgraph.surgery.coupling import ChannelGroup, Place, channel_groups, cut_channels, mask_channels
from repgraph.surgery.outputs import agree
from repgraph.surgery.slots import with_slots

Units = Sequence[tuple[ChannelGroup, Tensor]]
"""Groups, and the units of each that go."""


@dataclass(frozen=True, slots=True, eq=False)
class FilterGroups:
    """The channels of a model that can be cut, and what they cost; see `prunable_filters`."""

    groups: tuple[ChannelGroup, ...]
    """Channels that go together, in units; no layer is in two of them with the same channel."""
    left: Mapping[str, str]
    """Convolutions and linear layers whose channels cannot be cut, and why."""
    macs: int
    """Multiply-accumulates of the whole model on the example."""
    parts: Mapping[str, tuple[int, Mapping[Place, int]]]
    """Module -> (its MACs, the places by whose widths they shrink, and these widths)."""

    def macs_without(self, removed: Units) -> int:
        """MACs of the model without these units, in closed form; equal to what `model_cost` counts after the cut."""
        return self.macs_after({place: len(channels) for place, channels in together(removed).items()})

    def macs_after(self, gone: Mapping[Place, int]) -> int:
        """The same from how many channels go at each place."""
        total = self.macs
        for macs, widths in self.parts.values():
            left = macs
            for place, width in widths.items():
                left = left * (width - gone.get(place, 0)) // width
            total -= macs - left
        return total

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        for group in self.groups:
            more = f" and {len(group.layers) - 3} more" if len(group.layers) > 3 else ""
            rows.append((str(group.width), ", ".join(group.layers[:3]) + more))
        return rows + [("left", f"{layer}: {why}") for layer, why in self.left.items()]

    def __repr__(self) -> str:
        title = f"FilterGroups: {len(self.groups)} groups of {sum(group.width for group in self.groups)} units in all"
        return "\n".join([title, *(f"  {width:>5}  {what}" for width, what in self._rows())])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows())
        return f"<table><tr><th>units</th><th>layers</th></tr>{rows}</table>"


def prunable_filters(model: nn.Module, example: object) -> FilterGroups:
    """Which filters can be cut, in units of channels that must go together: tried on the model, not only deduced.

    Parameters
    ----------
    model
        Any nn.Module; untouched.
    example
        One batch, as `capture` reads it.

    Returns
    -------
    FilterGroups
        Groups of channels, the layers that are left alone with the reason, and what foretells MACs.

    Raises
    ------
    ValueError
        If Torch-Pruning cannot trace the model.

    Notes
    -----
    Torch-Pruning's dependency graph tells which channels depend on one another. It is silently wrong on some networks
    (chunks that go different ways, channel shuffles, slices by number, attention), so random units, of half of the
    groups and then of all, are cut from a copy and the result compared, in float64, with the model in which they are
    set to zero: filters, biases, scales and shifts of norms. Weights and example have as much noise added for it as
    they vary themselves, so that zeros and channels that never fire hide nothing. Where the two differ, the groups to
    blame are found by halving and left alone. A layer whose activation does not map 0 to 0 is left alone by the same
    test.

    Handled beyond Torch-Pruning: shortcuts that pad with zero channels (the channels of the stages are followed
    through them, so that the stream of a CIFAR ResNet is cut exactly), attention heads as units where the number of
    heads is an attribute of the module, auxiliary heads that run in training only (followed, not compared), layers that
    share one weight (they still do afterwards), graphs on which its search does not end, frozen parameters, hooks.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> found = prunable_filters(digits_resnet(), digits()[0][:2])
    >>> len(found.groups), found.left
    (17, {'linear': "they are the model's output"})
    """
    return prepared(checked(model), example)[1]


@torch.inference_mode(False)
def prepared(model: nn.Module, example: object) -> tuple[nn.Module, FilterGroups]:
    """A copy with slots, and its groups."""
    if without_data(model, example):
        raise ValueError("model and example must hold data, got some on the meta device or fake")
    model = with_slots(model, example)
    whole = channel_groups(model, example)
    left = {name: group.blocked for group in whole if group.blocked for name in group.layers}
    left |= {name: "they all go together" for g in whole if not g.blocked and g.width == 1 for name in g.layers}
    groups = [group for group in whole if not any(name in left for name in group.layers)]
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(groups), generator=generator)[: (len(groups) + 1) // 2].tolist()
    # Half of the groups show what cannot go alone. In the second trial chunks of one layer lose different numbers, so
    # that none is taken for another.
    for chosen, thirds in ((some, (1, 1)), (range(len(groups)), (2, 1))):
        trial: list[tuple[ChannelGroup, Tensor]] = []
        for group in (groups[i] for i in chosen if not any(name in left for name in groups[i].layers)):
            count = max(1, group.width * thirds[len(trial) % 2] // 3)
            trial.append((group, torch.randperm(group.width, generator=generator)[:count]))
        for group, reason in _culprits(model, example, trial):
            left |= dict.fromkeys(group.layers, reason)
    trial = [(group, units) for group, units in trial if not any(name in left for name in group.layers)]
    found = FilterGroups(tuple(group for group, _ in trial), left, *_macs(model, example, trial))
    more, uneven = _products(model, example, found, trial)
    left |= uneven
    usable = tuple(group for group in found.groups if not any(name in uneven for name in group.layers))
    return model, replace(found, groups=usable, parts={**found.parts, **more})


def together(units: Units) -> dict[Place, Tensor]:
    """Place -> all its channels that go with these units."""
    found: dict[Place, list[Tensor]] = {}
    for group, own in units:
        for place, channels in group.removed(own).items():
            found.setdefault(place, []).append(channels)
    return {place: torch.cat(parts) for place, parts in found.items()}


@torch.inference_mode(False)
def difference(model: nn.Module, example: object, removed: Mapping[Place, Tensor]) -> str:
    """Why the model cannot do without these channels; empty where cutting them is the same as setting them to zero.

    Compared with noise on weights and example; without it where the model then gives nothing finite.
    """
    for exact, noise in product((True, False), (True, False)):
        smaller, inputs = deepcopy(model), example_inputs(example)
        smaller = smaller.double() if exact else smaller
        if noise:
            inputs = _stirred(smaller, inputs)
        masked = deepcopy(smaller)
        try:
            mask_channels(masked, removed)
        except IndexError:  # channels that are not there
            return "they cannot be followed"
        try:
            expected = run_example(masked, (inputs,))
        # What a model may raise of values that it does not expect, or where parts of it are written for float32.
        except Exception as error:
            if not noise and not (exact and isinstance(error, RuntimeError)):
                raise
            continue
        if noise and not any(bool(v.isfinite().any()) for v in tree_leaves(expected) if isinstance(v, Tensor)):
            continue
        try:
            cut_channels(smaller, removed)
            found = run_example(smaller, (inputs,))
        except Exception as error:  # what any model may raise where a width is another one
            return f"the model does not run without some ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
        break
    same = agree(found, expected, rtol=1e-8 if exact else 1e-5)
    return "" if same else "cutting some changes more than setting them to zero"


@torch.no_grad()
def _stirred(model: nn.Module, inputs: object) -> object:
    """The inputs with as much noise as they vary, and the model's parameters, in place; biases nearly gone.

    So hardly a channel is silent, and its number shows all the same: the comparison is in float64.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def noisy(tensor: object) -> object:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
            return tensor
        mean = tensor.double().mean()
        spread = (tensor - mean).square().mean().sqrt().nan_to_num(0, 0, 0)
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor.device)
        found = mean + (tensor - mean + spread * noise) / 2**0.5 if spread else tensor + 0.1 * noise
        return found.to(tensor.dtype)

    for name, parameter in model.named_parameters():
        parameter.copy_(noisy(parameter))  # type: ignore[arg-type]
        if name.endswith("bias"):
            parameter.mul_(0.01)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.mul_(0.01)
    return tree_map(noisy, inputs)


def _culprits(model: nn.Module, example: object, units: Units) -> list[tuple[ChannelGroup, str]]:
    """The groups that cannot be cut, and why."""
    reason = difference(model, example, together(units)) if units else ""
    if not reason:
        return []
    if len(units) == 1:
        return [(units[0][0], reason)]
    half = len(units) // 2
    found = _culprits(model, example, units[:half]) + _culprits(model, example, units[half:])
    return found or [(group, f"{reason}, together with others") for group, _ in units]


def _macs(model: nn.Module, example: object, units: Units) -> tuple[int, dict[str, tuple[int, dict[Place, int]]]]:
    """MACs of the model, and of the layers that shrink with channels."""
    table = cost_by_module(model, example)["macs"]
    places = {place for group, _ in units for place in group.places}
    parts: dict[str, tuple[int, dict[Place, int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, CONVS):
            sizes: dict[Place, int] = {(name, "out"): module.out_channels, (name, "in"): module.in_channels}
        elif isinstance(module, nn.Linear):
            sizes = {(name, "out"): module.out_features, (name, "in"): module.in_features}
        else:
            continue
        if places & sizes.keys():  # those that run in training only cost nothing
            parts[name] = int(table.get(name, 0)), {place: size for place, size in sizes.items() if place in places}
    return int(table[""]), parts


def _products(
    model: nn.Module, example: object, found: FilterGroups, trial: Units
) -> tuple[dict[str, tuple[int, dict[Place, int]]], dict[str, str]]:
    """What products of activations, as of queries and keys, save with each group: measured.

    Also the layers of which it cannot be told, and why.
    """

    def missed(units: Units) -> int | None:
        smaller = deepcopy(model)
        cut_channels(smaller, together(units))
        try:
            return found.macs_without(units) - model_cost(smaller, example).macs
        except RuntimeError:  # what could go with all others cannot go alone
            return None

    parts: dict[str, tuple[int, dict[Place, int]]] = {}
    left: dict[str, str] = {}
    if trial and missed(trial) != 0:
        for group, units in trial:
            place: Place = (group.layers[0], "out")
            width = found.parts[group.layers[0]][1][place]
            more, one = missed([(group, units)]), missed([(group, units[:1])])
            if more is None or one is None:
                left |= dict.fromkeys(group.layers, "they can go with all others only")
            elif more != one * len(units):
                left |= dict.fromkeys(group.layers, "products of activations do not shrink in proportion to its width")
            elif more:
                gone = len(group.removed(units)[place])
                parts[f"products with {group.layers[0]}"] = more * width // gone, {place: width}
    return parts, left
