"""Which channels of which layers go together, from Torch-Pruning's dependency graph; the one file that imports it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repgraph.activations.batches import example_inputs, model_device, model_dtype, to_device
from repgraph.activations.forward import call_model, kept_random_state, untouched
from repgraph.surgery.channels import CONVS
from repgraph.surgery.slots import Slots, bare_copy

Place: TypeAlias = tuple[str, Literal["out", "in"]]
"""A module or parameter by name, and its output or input channels; "out" also where both are the same ones."""
Removed: TypeAlias = Mapping[Place, Tensor]
"""Place -> channels that go."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
_STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
_STEPS = 4  # how often a channel may come back to a place before it is given up


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Channels that go together, in units: unit u is the smallest set of them that can be removed."""

    layers: tuple[str, ...]
    """Convolutions and linear layers whose output channels they are, in the order of the model."""
    width: int
    """Number of units."""
    places: Mapping[Place, tuple[Tensor, Tensor]]
    """Place -> (channels, the unit of each)."""
    blocked: str = ""
    """Why none of them can go; empty if they can."""

    def removed(self, units: Tensor) -> dict[Place, Tensor]:
        """Place -> the channels of these units."""
        return {place: channels[torch.isin(unit, units)] for place, (channels, unit) in self.places.items()}

    def readers(self, layer: str) -> dict[str, Tensor]:
        """Convolutions and linear layers that read a layer's channels: name -> their input columns, (C, r)."""
        channels, units = self.places[layer, "out"]
        found = {}
        for (name, side), (columns, of) in self.places.items():
            if side == "in":
                own = [columns[of == unit] for unit in units[channels.argsort()]]
                if len({len(one) for one in own}) == 1:
                    found[name] = torch.stack(own)
        return found


class _SlotsPruner:
    """How Torch-Pruning cuts `Slots`; nothing of its base class is needed."""

    def prune_out_channels(self, layer: Slots, idxs: Sequence[int]) -> Slots:
        layer.given = _without(layer.given, idxs)
        return layer

    def prune_in_channels(self, layer: Slots, idxs: Sequence[int]) -> Slots:
        layer.taken = _without(layer.taken, idxs)
        return layer

    def get_out_channels(self, layer: Slots) -> int:
        return len(layer.given)

    def get_in_channels(self, layer: Slots) -> int:
        return len(layer.taken)


class _Index(NamedTuple):
    """A channel, and the channel of the root that it follows from."""

    idx: int
    root_idx: int


def _without(values: Tensor, places: Sequence[int]) -> Tensor:
    keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
    keep[list(places)] = False
    return values[keep]


def channel_groups(model: nn.Module, example: object) -> list[ChannelGroup]:
    """The groups of channels of all convolutions and linear layers, as far as Torch-Pruning tells; not yet verified.

    The model must have its `Slots` already (`with_slots`). Torch-Pruning's relations between pairs of channels are
    closed to units, with those of grouped convolutions (the same place in every group), of attention heads, of
    layers with one weight and of `Slots` added. Groups that reach the output, a normalisation over channels or an
    embedding are marked as blocked. Layers that run in training only (auxiliary heads) are followed, too.
    """
    traced = bare_copy(model)
    weighted = {module for module in traced.modules() if isinstance(module, (*CONVS, nn.Linear))}
    graph = _dependency_graph(traced, example)
    if silent := weighted - graph.module2node.keys():
        with suppress(ValueError):  # batch norms may refuse a small example in training
            more = _dependency_graph(traced, example, training=True)
            if (weighted - silent) < (weighted & more.module2node.keys()):
                graph = more
    names = {module: name for name, module in traced.named_modules()}
    names |= {parameter: name for name, parameter in traced.named_parameters()}
    nodes = _Nodes()
    blocked: dict[Place, str] = {}
    order = [module for module in traced.modules() if module in weighted and module in graph.module2node]
    roots = order + [module for module in traced.modules() if isinstance(module, Slots)]
    widest = max(
        (side for root in order for side in (root.weight.shape[0], root.weight.shape[1] * getattr(root, "groups", 1))),
        default=1,
    )
    for root in roots:
        here: Place = (names[root], "out")
        channels = np.arange(graph.get_pruner_of_module(root).get_out_channels(root))
        nodes.add(here, channels)
        try:
            for module, side, found, of in _reached(graph, root, widest):
                if isinstance(module, _MIXING):
                    blocked[here] = f"{names[module]!r} ({type(module).__name__}) mixes them"
                elif side == "out" and not graph.module2node[module].outputs:
                    blocked[here] = "they are the model's output"
                elif module in names and not _is_shared_slope(module):  # and no operation of Torch-Pruning's own
                    nodes.join(here, of, (names[module], side), found)
        # Torch-Pruning gives up on some networks with errors of any kind: these channels stay.
        except Exception as error:
            blocked[here] = f"they cannot be followed ({type(error).__name__}: {error})"
    for module, name in names.items():
        _join_within(nodes, module, name)
    for name, _, heads, linears in attentions(traced):
        nodes.join_heads(name, heads, [(linear, "out") for linear in linears])
    for owners in _shared_parameters(traced):
        first, *others = [names[module] for module, key in owners if key == "weight" and module in weighted] or [""]
        for other in others:
            nodes.join_alike((first, "out"), (other, "out"))
            nodes.join_alike((first, "in"), (other, "in"))
    return _grouped(nodes, blocked, [names[root] for root in order])


def _is_shared_slope(module: object) -> bool:
    """Whether it is a PReLU with one slope for all channels, which has no channels of its own."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _shared_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """(module, attribute) of all that hold one parameter, for parameters that several hold."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((module, key))
    return [own for own in owners.values() if len(own) > 1]


@kept_random_state()
def _dependency_graph(model: nn.Module, example: object, *, training: bool = False) -> Any:
    inputs = to_device(example_inputs(example), model_device(model), model_dtype(model), copy=True)
    import torch_pruning as tp  # here, since its import takes seconds

    graph = tp.DependencyGraph()
    with warnings.catch_warnings(), untouched(model), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                model,
                inputs,
                forward_fn=_in_training if training else call_model,  # Torch-Pruning switches to eval
                output_transform=lambda out: [t for t in tree_leaves(_plain(out)) if _has_history(t)],
                customized_pruners={Slots: _SlotsPruner()},
                verbose=False,
            )
        # Whatever stops it, the user has to know that it was the tracing and not the cut.
        except Exception as error:
            raise ValueError(
                f"Torch-Pruning cannot trace {type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
    return graph


def _in_training(model: nn.Module, inputs: object) -> object:
    for module in model.modules():
        module.training = not isinstance(module, _STOCHASTIC)
    return call_model(model, inputs)


def _plain(output: object) -> object:
    """Outputs of transformers are mappings that pytrees do not know."""
    return dict(output) if isinstance(output, Mapping) else output


def _has_history(value: object) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _reached(
    graph: Any, root: nn.Module, widest: int
) -> Iterator[tuple[Any, Literal["out", "in"], np.ndarray, np.ndarray]]:
    """(module, side, channels, channels of the root that they follow from) that removing the root's outputs reaches.

    Torch-Pruning's own search does not end on graphs with loops through rolls and splits; this one takes each pair of
    channels once, and gives up where channels multiply.
    """
    start = graph.get_pruner_of_module(root)
    node = graph.module2node[root]
    handler = start.prune_out_channels
    width = start.get_out_channels(root)
    if isinstance(root, CONVS) and root.groups == root.out_channels > 1:
        import torch_pruning as tp

        handler = tp.prune_depthwise_conv_out_channels
    seen: dict[tuple[Any, Any], set[tuple[int, int]]] = defaultdict(set)
    stack = [(node, handler, [_Index(i, i) for i in range(width)])]
    seen[node, handler] = {(i, i) for i in range(width)}
    while stack:
        node, handler, indices = stack.pop()
        for step in node.dependencies:
            if not step.is_triggered_by(handler):
                continue
            found: list[Any] = indices
            for mapping in step.index_mapping:
                found = found if mapping is None else mapping(found)
            known = seen[step.target, step.handler]
            new = [index for index in found if (index.idx, index.root_idx) not in known]
            known.update((index.idx, index.root_idx) for index in new)
            if len(known) > _STEPS * widest:
                raise ValueError("they come back to the same place again and again")
            if new:
                stack.append((step.target, step.handler, new))
    for (target, function), pairs in seen.items():
        own = graph.get_pruner_of_module(target.module)
        through = own.prune_in_channels == own.prune_out_channels
        if any(index is None for pair in pairs for index in pair):
            raise ValueError("some have no single origin")
        if pairs:
            channels, of = np.array(sorted(pairs)).T
            yield target.module, "out" if through or function == own.prune_out_channels else "in", channels, of


class _Nodes:
    """Channels of places as nodes of a graph; those that go together are joined."""

    def __init__(self) -> None:
        self.numbers: dict[Place, int] = {}
        self.channels: dict[Place, list[np.ndarray]] = defaultdict(list)
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, place: Place, channels: np.ndarray) -> np.ndarray:
        """The number of each channel among all: that of the place in the upper half."""
        number = self.numbers.setdefault(place, len(self.numbers))
        self.channels[place].append(channels)
        return (number << 32) + channels

    def join(self, a: Place, channels: np.ndarray, b: Place, others: np.ndarray) -> None:
        self.edges.append((self.add(a, channels), self.add(b, others)))

    def of(self, place: Place) -> np.ndarray:
        """The channels of a place."""
        return np.unique(np.concatenate(self.channels[place]))

    def units(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(number of the place, channel, unit) of all channels."""
        nodes = np.concatenate([(number << 32) + self.of(place) for place, number in self.numbers.items()])
        pairs = zip(*(self.edges or [(nodes[:0], nodes[:0])]), strict=True)
        a, b = (np.searchsorted(nodes, np.concatenate(side)) for side in pairs)
        graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(nodes), len(nodes)))
        place = nodes >> 32
        return place, nodes - (place << 32), connected_components(graph, directed=False)[1]

    def join_alike(self, a: Place, b: Place) -> None:
        """Join the channels of the same number of two places, where one of them is known."""
        known = [place for place in (a, b) if place in self.numbers]
        if known and a != b:
            channels = self.of(known[0])
            self.join(a, channels, b, channels)

    def join_heads(self, attention: str, heads: int, places: Sequence[Place]) -> None:
        """Of those places that go together, join the channels of each head: to the head, a channel of the attention."""
        where, _, unit = self.units()
        own = {place: set(unit[where == self.numbers[place]]) for place in places if place in self.numbers}
        for place, units in own.items():
            if any(units & others for other, others in own.items() if other != place):
                channels = self.of(place)
                size = (int(channels.max()) + 1) // heads
                self.join(place, channels, (attention, "out"), channels // size)

    def join_same_places(self, place: Place, groups: int, width: int) -> None:
        """Join the channels at the same place of every group."""
        if place in self.numbers:
            channels = self.of(place)
            self.join(place, channels, place, channels % (width // groups))


def _join_within(nodes: _Nodes, module: object, name: str) -> None:
    """What a module itself asks for: grouped convolutions, and `Slots` from input to output."""
    if isinstance(module, CONVS) and 1 < module.groups < max(module.in_channels, module.out_channels):
        nodes.join_same_places((name, "out"), module.groups, module.out_channels)
        nodes.join_same_places((name, "in"), module.groups, module.in_channels)
    elif isinstance(module, Slots):
        given, places = module.given.tolist(), [module.places[channel] for channel in module.taken.tolist()]
        taken = np.array([i for i, place in enumerate(places) if place in given], dtype=int)
        nodes.join((name, "in"), taken, (name, "out"), np.array([given.index(places[i]) for i in taken], dtype=int))


def _grouped(nodes: _Nodes, blocked: Mapping[Place, str], order: Sequence[str]) -> list[ChannelGroup]:
    """Units by the places that they touch."""
    where, channel, unit = (torch.from_numpy(values).long() for values in nodes.units())
    places = list(nodes.numbers)
    touched: dict[int, set[int]] = defaultdict(set)
    for u, p in zip(unit.tolist(), where.tolist(), strict=True):
        touched[u].add(p)
    alike: dict[frozenset[int], list[int]] = defaultdict(list)
    for u, own in sorted(touched.items()):
        alike[frozenset(own)].append(u)
    groups = []
    for around, units in alike.items():
        number = torch.full((int(unit.max()) + 1,), -1)
        number[units] = torch.arange(len(units))
        of = number[unit]
        masks = {places[p]: (where == p) & (of >= 0) for p in sorted(around)}
        members = tuple(name for name in order if (name, "out") in masks)
        if members:
            reasons = [blocked[p] for p in masks if p in blocked]
            both = {p: (channel[mask], of[mask]) for p, mask in masks.items()}
            groups.append(ChannelGroup(members, len(units), both, reasons[0] if reasons else ""))
    return sorted(groups, key=lambda group: order.index(group.layers[0]))


def attentions(model: nn.Module) -> Iterator[tuple[str, str, int, list[str]]]:
    """(module, its attribute for the number of heads, that number, linear layers directly inside that it divides)."""
    for name, module in model.named_modules():
        attribute = next((key for key in _HEADS if isinstance(vars(module).get(key), int)), None)
        heads: int = vars(module)[attribute] if attribute else 1
        linears = {key: m for key, m in module.named_children() if isinstance(m, nn.Linear)}
        if attribute and heads > 1 and len(linears) > 2:
            prefix = f"{name}." if name else ""
            yield name, attribute, heads, [prefix + key for key, m in linears.items() if m.out_features % heads == 0]


@torch.inference_mode(False)
@torch.no_grad()
def cut_channels(model: nn.Module, removed: Removed) -> None:
    """Remove channels from modules and parameters, in place; attention heads are counted anew, one weight stays one."""
    widths = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    counted = {name: (attribute, heads, linears) for name, attribute, heads, linears in attentions(model)}
    shared = _shared_parameters(model)
    import torch_pruning as tp  # here, since its import takes seconds

    graph = tp.DependencyGraph()
    graph.register_customized_layer(Slots, _SlotsPruner())
    parameters = dict(model.named_parameters())
    for (name, side), channels in removed.items():
        if not len(channels):
            continue
        if name in parameters:
            _cut_parameter(model, name, channels)
            continue
        module = model.get_submodule(name)
        if name in counted:
            attribute, heads, linears = counted[name]
            left = heads - len(channels)
            for width in {widths[linear] for linear in linears if len(removed.get((linear, "out"), ()))}:
                for other, value in list(vars(module).items()):
                    if type(value) is int and value == width:
                        setattr(module, other, width * left // heads)
            setattr(module, attribute, left)
            continue
        pruner = graph.get_pruner_of_module(module)
        flags = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        prune = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
        prune(module, channels.tolist())
        for parameter, flag in zip(module.parameters(recurse=False), flags, strict=True):
            parameter.requires_grad_(flag)
    for (first, key), *others in shared:
        for module, other in others:
            setattr(module, other, getattr(first, key))


def _cut_parameter(model: nn.Module, name: str, channels: Tensor) -> None:
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, key)
    axis = _last_axis(old)
    keep = _without(torch.arange(old.shape[axis], device=old.device), channels.tolist())
    setattr(module, key, nn.Parameter(old.index_select(axis, keep), requires_grad=old.requires_grad))


@torch.inference_mode(False)
@torch.no_grad()
def mask_channels(model: nn.Module, removed: Removed) -> Callable[[], None]:
    """Set what makes these channels to zero, in place: filters, biases, scales, shifts and means of norms, parameters.

    Returns what puts it back.
    """
    parameters = dict(model.named_parameters())
    kept: list[tuple[Tensor, Tensor]] = []

    def fill(tensor: Tensor, axis: int, channels: Tensor) -> None:
        kept.append((tensor, tensor.clone()))
        tensor.index_fill_(axis, channels.to(tensor.device), 0)

    @torch.no_grad()
    def undo() -> None:
        for tensor, before in reversed(kept):  # a tied tensor is in there twice
            tensor.copy_(before)

    for (name, side), channels in removed.items():
        if name in parameters:
            fill(parameters[name], _last_axis(parameters[name]), channels)
        elif side == "out" and not isinstance(model.get_submodule(name), Slots):
            module = model.get_submodule(name)
            transposed = getattr(module, "transposed", False)
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if key in ("weight", "bias", "running_mean"):
                    turned = transposed and key == "weight"  # (in, out / groups, ...)
                    fill(tensor, int(turned), channels % tensor.shape[1] if turned else channels)
    return undo


def _last_axis(parameter: Tensor) -> int:
    """The axis that Torch-Pruning takes for the channels of a parameter outside of a layer that it knows."""
    return max(i for i, size in enumerate(parameter.shape) if size > 1)
