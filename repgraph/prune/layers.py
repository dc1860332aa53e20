"""Leave layers out of a model: any module whose input and output agree, checked by a forward pass."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repgraph.activations.batches import example_inputs
from repgraph.activations.forward import run_example
from repgraph.activations.layers import Select, choose, unwrap
from repgraph.cost import Cost, cost_by_module, model_cost
from repgraph.operations import checked
from repgraph.prune.filters import filter_cost
from repgraph.prune.plan import Plan
from repgraph.prune.pruned import Pruned, new_name
from repgraph.surgery.calls import Call, observe
from repgraph.surgery.numbering import check_config, delete, mixed_attention, number_attention, numbered
from repgraph.surgery.outputs import agree
from repgraph.surgery.stand_ins import Affine, Skip

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_ACTIVATIONS = tuple(
    kind
    for name, kind in vars(nn.modules.activation).items()
    if name in nn.modules.activation.__all__
    and name not in ("Softmax", "LogSoftmax", "Softmin", "Softmax2d", "GLU", "MultiheadAttention")
)


def droppable_layers(model: nn.Module, example: object, layers: Select | Literal["halves"] = "blocks") -> list[str]:
    """Those of the chosen layers that `drop_layers` can leave out: their input and output agree in shape and type.

    Parameters
    ----------
    model, example
        As in `drop_layers`.
    layers
        As in `capture`, or "halves": the parts of every block that can be left out on their own, as the attention and
        the MLP half of a transformer block.

    Returns
    -------
    list of str
        In execution order; empty if there are none.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> droppable_layers(digits_resnet(), digits())[:6]
    ['layer1.0', 'layer1.1', 'layer1.2', 'layer1.3', 'layer1.4', 'layer2.1']
    """
    model = checked(model)
    if layers != "halves":
        return [name for name, call in observe(model, example, choose(model, layers)).items() if call.droppable]
    blocks = list(choose(model, "blocks"))
    inside = {part: block for block in blocks for part in _parts(model, block)}
    calls = observe(model, example, [*blocks, *inside])
    found = []
    for name in calls:
        if name not in inside or not calls[name].droppable:
            continue
        block = calls.get(inside[name])
        whole = block is not None and (calls[name].before, calls[name].after) == (block.before, block.after)
        mixed = any(mixed_attention(model, container) for container in _lists_around(model, name))
        if not whole and not (mixed and numbered(model, name)):
            found.append(name)
    return found


def _parts(model: nn.Module, block: str) -> list[str]:
    """Modules with parts of their own directly inside a block."""
    children = model.get_submodule(block).named_children()
    return [f"{block}.{name}" for name, module in children if next(module.children(), None) is not None]


def drop_layers(model: nn.Module, names: str | Sequence[str] | Plan, example: object) -> Pruned:
    """A copy of the model without some of its layers, which become the identity; the model itself is untouched.

    A layer can be left out if one of its arguments agrees with its result in shape and type. Members of a Sequential or
    ModuleList are taken out of it, and the rest moves up; in Hugging Face models the numbers of the attention layers
    and the config follow, so that `generate` keeps its cache. Other modules are replaced by nn.Identity or `Skip`.

    What counts as leaving out: a module gives its input back. If it has parts and its result is only added to
    something (the attention or MLP half of a transformer block, the branch of a residual block), it adds nothing
    instead. A convolution or linear layer in a Sequential takes the norm, activation and dropout with it that follow it
    there, whose statistics are those of its output. A module that only feeds one that is left out goes with it (the
    first half of BERT's MLP).

    Parameters
    ----------
    model
        Any nn.Module, in any mode and on any device; DataParallel and torch.compile are looked through.
    names
        Modules to leave out, or a `Plan`, whose layers are left out. None is allowed: [] gives an equal copy.
    example
        One batch, as `capture` reads it: a tensor, a tuple (inputs, labels), or a dict that goes to the model by
        keyword. Costs are counted on it.

    Returns
    -------
    Pruned
        The smaller model, the plan with every module that went, and the cost before and after.

    Raises
    ------
    ValueError
        If a name is unknown, given twice or inside another one; if a layer does not run on the example, changes the
        shape, or gives more than the rest of the model can do without; if no block would be left; if the smaller
        model does not run or does not compute what the model computes with these layers replaced by the identity.

    Notes
    -----
    The check: on the example, in eval mode, every tensor that the smaller model gives is compared with that of the
    model itself whose layers' results are exchanged by hooks, to a relative 1e-5; not compared are lists with an entry
    for each layer, and caches. Where a layer behaves by its own number (every second block of Swin shifts its windows,
    GPT-2 with scale_attn_by_inverse_layer_idx) the copy is right, but a model rebuilt from its config is not; there,
    and wherever a config cannot tell what is left (warned), save it with `Pruned.save`.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> pruned = drop_layers(digits_resnet(), ["layer1.1", "layer1.2"], digits()[0][:2])
    >>> [name for name, _ in pruned.model.layer1.named_children()], pruned.plan.renamed
    (['0', '1', '2'], {'layer1.3': 'layer1.1', 'layer1.4': 'layer1.2'})
    """
    model = unwrap(model)
    plan = names if isinstance(names, Plan) else Plan(layers=as_names(names))
    if plan.filters:
        raise ValueError("names is a plan with filters: cut them with prune_filters, after the layers")
    dropped = dropped_calls(model, plan.layers, example)
    expected = _exchanged(model, dropped, example)
    reasons = []
    for build in (_taken_out, _replaced):
        smaller = deepcopy(model)
        modules = dict(smaller.named_modules())  # held, or a new module may take the id of one that goes
        by_id = {id(module): name for name, module in modules.items()}
        try:
            build(smaller, dropped, plan.repairs, by_id)
            found = run_example(smaller, example)
        except Exception as error:  # what the rest of any model may raise where something is missing
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if agree(found, expected):
            plan = replace(
                plan,
                layers=tuple(dropped),
                model=type(model).__name__,
                renamed=_renamed(by_id, smaller),
            )
            if not plan.repairs and any(_in_list(model, name) for name in dropped):
                check_config(smaller)
            return Pruned(smaller, plan, model_cost(model, example), model_cost(smaller, example))
        reasons.append("its output is another one")
    raise ValueError(
        f"the model cannot do without {', '.join(map(repr, dropped))}: the rest uses more of what is left out than the "
        f"result that the identity stands in for ({reasons[-1]}); keep the first such layer of its list, or drop the "
        "parts inside it that only add to their input"
    )


def predict_cost(model: nn.Module, names: str | Sequence[str] | Plan, example: object) -> Cost:
    """What the model would cost without some of its layers or a plan's filters; nothing is computed with the smaller.

    Parameters, and errors about names, as in `drop_layers`; a plan's filters as in `prune_filters`.

    Returns
    -------
    Cost
        That of the whole minus that of the layers; with filters, counted on shapes. Equal to what `drop_layers` and
        `prune_filters` measure.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> model, x = digits_resnet(), digits()[0][:1]
    >>> predict_cost(model, ["layer3.3"], x) == drop_layers(model, ["layer3.3"], x).after
    True
    """
    model = unwrap(model)
    if isinstance(names, Plan) and names.repairs:
        raise ValueError("names is a plan with repairs, whose maps cannot be foretold: apply it and read its cost")
    if isinstance(names, Plan) and names.filters:
        return filter_cost(drop_layers(model, names.layers, example).model, example, replace(names, layers=()))
    dropped = dropped_calls(model, names.layers if isinstance(names, Plan) else as_names(names), example)
    table = cost_by_module(model, example)
    gone = table.loc[[name for name in dropped if name in table.index], ["macs", "activation_bytes"]].sum()
    inside = {id(p) for name in dropped for p in model.get_submodule(name).parameters()}
    elsewhere = {
        id(p)
        for name, module in model.named_modules()
        if not any(name == other or name.startswith(f"{other}.") for other in dropped)
        for p in module.parameters(recurse=False)
    }
    sizes = {id(p): p.numel() for p in model.parameters()}
    zeros = sum(
        call.result.numel() * call.result.element_size()
        for call in dropped.values()
        if call.branch and call.grown and call.result is not None
    )
    return Cost(
        macs=int(table.loc["", "macs"] - gone["macs"]),
        parameters=sum(sizes.values()) - sum(sizes[key] for key in inside - elsewhere),
        activation_bytes=int(table.loc["", "activation_bytes"] - gone["activation_bytes"]) + zeros,
    )


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of layers as given: distinct, none empty; one name alone counts as one."""
    if not isinstance(names, str | Iterable):
        raise ValueError(f"names must be names of modules, got {names!r}")
    names = [names] if isinstance(names, str) else list(names)
    if wrong := [name for name in names if not isinstance(name, str) or not name]:
        raise ValueError(f"names must be names of modules, got {wrong[0]!r}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"names hold {twice[0]!r} twice")
    return tuple(names)


def dropped_calls(model: nn.Module, names: Sequence[str], example: object) -> dict[str, Call]:
    """The calls of everything that goes, in order of execution; what cannot go is refused."""
    checked(model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model cannot run: it has parameters on the meta device")
    if sum(1 for value in tree_leaves(example_inputs(example)) if isinstance(value, Tensor) and not value.numel()):
        raise ValueError("example must hold at least one sample, got an empty tensor")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules or not name:
            close = difflib.get_close_matches(name, modules, 4, 0.5) or [key for key in modules if key][:4]
            raise ValueError(f"names: the model has no module {name!r}; close names are {', '.join(map(repr, close))}")
        inside = next((other for other in names if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise ValueError(f"names: {name!r} is inside {inside!r}, which goes as a whole: name one of them")
        shared = [other for other, module in modules.items() if module is modules[name] and other != name]
        if shared:
            raise ValueError(f"names: {name!r} is also {shared[0]!r}, the same module in two places, and stays")
    wanted = [*names]
    for name in names:
        wanted += [other for other in _followers(model, name) if other not in wanted]
    beside = {f"{name.rpartition('.')[0]}.{child}".lstrip(".") for name in wanted for child in _siblings(model, name)}
    calls = observe(model, example, beside)
    for name in list(wanted):
        call = calls.get(name)
        if call is not None and call.droppable:
            wanted += [other for other in call.from_modules if other not in wanted and not calls[other].droppable]
    feeding = {other for name in wanted if name in calls for other in calls[name].from_modules}
    for name in wanted:
        if name not in calls:
            raise ValueError(f"names: {name!r} does not run in a forward pass on the example, or is a list of layers")
        if not calls[name].droppable and name not in feeding:
            able = [other for other in calls if calls[other].droppable and other not in wanted]
            able = [other for other in able if type(modules[other]) is type(modules[name])]
            advice = (
                f"beside it {', '.join(map(repr, able[:6]))} can go" if able else "make it thinner by pruning filters"
            )
            raise ValueError(
                f"{name!r} cannot be left out, because {calls[name].text()}: only a layer whose input and output agree "
                f"can become the identity; {advice}"
            )
    blocks = [*choose(model, "blocks")]
    blocks = [name for name in blocks if not isinstance(modules[name], _WEIGHTED)] or blocks
    if wanted and all(any(name == w or name.startswith(f"{w}.") for w in wanted) for name in blocks):
        raise ValueError(f"names hold all {len(blocks)} blocks of the model: keep at least one")
    return {name: call for name, call in calls.items() if name in wanted}


def _siblings(model: nn.Module, name: str) -> list[str]:
    return [child for child, _ in model.get_submodule(name.rpartition(".")[0]).named_children()]


def _followers(model: nn.Module, name: str) -> list[str]:
    """Norm, activation and dropout directly behind a convolution or linear layer of a Sequential."""
    parent, _, key = name.rpartition(".")
    owner = model.get_submodule(parent)
    if not isinstance(owner, nn.Sequential) or not isinstance(owner._modules[key], _WEIGHTED):
        return []
    found = []
    for child, module in list(owner.named_children())[list(owner._modules).index(key) + 1 :]:
        if not isinstance(module, (*_NORMS, *_ACTIVATIONS, nn.modules.dropout._DropoutNd)):
            break
        found.append(f"{parent}.{child}" if parent else child)
    return found


def _exchanged(model: nn.Module, dropped: Mapping[str, Call], example: object) -> object:
    """What the model gives when hooks put the argument that is passed on, or zeros, in the place of each result."""
    kept: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., object]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            passed = dropped[name].passed
            x = args[passed] if isinstance(passed, int) else kwargs[passed]  # type: ignore[index]
            assert isinstance(x, Tensor)
            kept[name] = torch.zeros_like(x) if dropped[name].branch else x
            copy = x.clone()  # which the layer may change in place
            return tuple(copy if v is x else v for v in args), {k: copy if v is x else v for k, v in kwargs.items()}

        return hook

    def after(name: str) -> Callable[..., object]:
        def hook(_: nn.Module, __: object, output: object) -> object:
            if isinstance(output, Tensor):
                return kept[name]
            assert isinstance(output, tuple | list)
            place = dropped[name].place
            values = [*output[:place], kept[name], *output[place + 1 :]]
            make: Callable[[list[object]], object] = getattr(type(output), "_make", type(output))
            return make(values)

        return hook

    with ExitStack() as stack:
        for name, call in dropped.items():
            if call.droppable:
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
        return run_example(model, example)


def _taken_out(
    model: nn.Module, dropped: Mapping[str, Call], repairs: Mapping[str, int], by_id: dict[int, str]
) -> None:
    """Take members out of their lists, replace the other modules."""
    members: dict[str, list[str]] = defaultdict(list)
    rest = {}
    for name, call in dropped.items():
        parent, _, key = name.rpartition(".")
        if _in_list(model, name) and call.droppable and not call.branch and name not in repairs:
            members[parent].append(key)
        else:
            rest[name] = call
    _replaced(model, rest, repairs, by_id)
    for parent in sorted(members, key=len, reverse=True):  # inner lists first, under their old names
        delete(model, parent, members[parent])
        if isinstance(model.get_submodule(parent), nn.ModuleList):
            number_attention(model, parent)


def _replaced(model: nn.Module, dropped: Mapping[str, Call], repairs: Mapping[str, int], by_id: dict[int, str]) -> None:
    """Put nn.Identity, Skip or Affine in the place of the modules."""
    lists = set()
    for name, call in dropped.items():
        parent, _, key = name.rpartition(".")
        lists |= _lists_around(model, name) if numbered(model, name) else set()
        plain = call.parts is None and len(call.args) == 1 and not call.kwargs and not call.branch
        stand_in: nn.Module = nn.Identity()
        if call.passed is not None and call.result is not None and (name in repairs or not plain):
            given = call.passed, call.branch, call.parts, call.place, call.result
            if name in repairs:
                stand_in = Affine(*given, repairs[name], also=call.also)
            else:
                stand_in = Skip(*given, own=call.grown, also=call.also)
        stand_in.train(model.get_submodule(name).training)
        model.get_submodule(parent).register_module(key, stand_in)
        by_id[id(stand_in)] = name
    for container in lists:
        if mixed_attention(model, container):
            raise ValueError("its attention layers are of several kinds that go by number: drop whole layers instead")
        number_attention(model, container)


def _in_list(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Sequential | nn.ModuleList)


def _lists_around(model: nn.Module, name: str) -> set[str]:
    """The innermost ModuleList around a module, if there is one."""
    parts = name.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts))]
    lists = [container for container in around if isinstance(model.get_submodule(container), nn.ModuleList)]
    return set(lists[-1:])


def _renamed(by_id: Mapping[int, str], smaller: nn.Module) -> dict[str, str]:
    """Old name -> new name of the modules that moved up; what is inside them moved with them."""
    moves = [(by_id[id(module)], name) for name, module in smaller.named_modules() if id(module) in by_id]
    found: dict[str, str] = {}
    for old, new in moves:
        if new_name(old, found) != new:
            found[old] = new
    return found
