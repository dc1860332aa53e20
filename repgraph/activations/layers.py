"""Which modules of a model are meant: blocks, leaves, names, wildcards, types, a predicate."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import nn

Item: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Select: TypeAlias = Item | Sequence[Item]
"""How layers are chosen: "blocks", "leaves", a name, a wildcard, a module type, a predicate, or several of these."""

_CONV = nn.modules.conv._ConvNd
_WEIGHTED = (_CONV, nn.Linear)
_LISTS = (nn.Sequential, nn.ModuleList)
INPUTS = "inputs:"  # before the name of a module whose input is taken in place of its output


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile, so that names carry no prefix.

    Raises
    ------
    TypeError
        If the model is no nn.Module.
    ValueError
        If it is a scripted or traced module, whose layers cannot be hooked.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        inner = model.module if isinstance(model, wrappers) else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model is a scripted or traced module, whose layers cannot be hooked: pass the original one")
    return model


def choose(model: nn.Module, select: Select = "blocks") -> dict[str, nn.Module]:
    """The chosen modules by name, in order of registration.

    A name may end in "#1", "#2", ... to mean a later call of a module that runs more than once. Wildcards are those
    of `fnmatch`, so "layer1.*" takes everything below layer1. "inputs:" before a choice means the inputs of its
    modules, under keys with that prefix.

    Raises
    ------
    ValueError
        If a name, wildcard or type matches nothing; the message lists what comes closest.
    """
    modules = _modules(model)
    if not modules:
        raise ValueError(f"model {type(model).__name__} has no submodules to take outputs from")
    found: dict[str, nn.Module] = {}
    for item in items_of(model, select):
        found |= _one(modules, item)
    if not found:
        raise ValueError("layers is empty: name at least one layer")
    return {key: module for name, module in modules.items() for key in (INPUTS + name, name) if key in found}


def items_of(model: nn.Module, select: Select) -> list[Item]:
    """The parts of a choice, names without the prefix that DataParallel gives."""
    items = [select] if isinstance(select, str | type) or callable(select) else list(select)
    if any(name == "module" for name, _ in model.named_children()):
        return items
    return [re.sub(r"^(gates:|inputs:)?module\.", r"\1", item) if isinstance(item, str) else item for item in items]


def call_key(name: str, calls: Counter[str]) -> str:
    """Key of the next call of a module within one forward pass, and count it: name, name#1, name#2, ..."""
    calls[name] += 1
    return f"{name}#{calls[name] - 1}" if calls[name] > 1 else name


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules below the model but those that only compute parameters (weight norm, spectral norm)."""
    return {name: m for name, m in model.named_modules() if name and "parametrizations" not in name.split(".")}


def _is_leaf(module: nn.Module) -> bool:
    return all(name == "parametrizations" for name, _ in module.named_children())


def _one(modules: dict[str, nn.Module], select: Item) -> dict[str, nn.Module]:
    if isinstance(select, str) and select.startswith(INPUTS):
        return {INPUTS + name: module for name, module in _one(modules, select.removeprefix(INPUTS)).items()}
    if isinstance(select, type):
        found = {name: module for name, module in modules.items() if isinstance(module, select)}
        described = f"type {select.__name__}"
    elif not isinstance(select, str):
        found = {name: module for name, module in modules.items() if select(name, module)}
        described = "the predicate"
    elif select == "blocks":
        return _blocks(modules)
    elif select == "leaves":
        return {name: module for name, module in modules.items() if _is_leaf(module)}
    else:
        wanted = {select, select.split("#")[0]}
        found = {
            name: module
            for name, module in modules.items()
            if name in wanted or (set("*?[") & set(select) and fnmatchcase(name, select))
        }
        described = f"{select!r}"
    if not found:
        close = difflib.get_close_matches(select, modules, 4, 0.5) if isinstance(select, str) else []
        some = close or [*modules][:4]
        raise ValueError(
            f"layers: {described} matches no layer; {'close' if close else 'the first'} names are "
            f"{', '.join(map(repr, some))} (layer_names(model, 'leaves') lists the rest)"
        )
    return found


def _blocks(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Outermost non-leaf modules whose class recurs, and the first conv; else every conv; else every linear layer.

    Plain containers do not count, and neither does a stage: a module that only holds a list of alike blocks.
    """
    inner = {name: module for name, module in modules.items() if not _is_leaf(module)}
    count = Counter(type(module) for module in inner.values())
    stages = {type(module) for module in inner.values() if _is_stage(module)}
    found: dict[str, nn.Module] = {}
    for name, module in inner.items():  # parents come before their children
        plain = type(module) in _LISTS or type(module) is nn.ModuleDict or type(module) in stages
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if count[type(module)] > 1 and not plain and not inside and _weights(module):
            found[name] = module
    convs: dict[str, nn.Module] = {name: module for name, module in modules.items() if isinstance(module, _CONV)}
    if not found:
        found = convs or {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        if not found:
            raise ValueError("layers='blocks' finds no repeated block, conv or linear layer: name the layers instead")
    first = next(iter(convs), None)
    return {name: module for name, module in modules.items() if name in found or name == first}


def _is_stage(module: nn.Module) -> bool:
    """Whether a module holds a list of at least two blocks of one class, each with two weight layers or more."""
    lists = [module] if isinstance(module, _LISTS) else [m for m in module.children() if type(m) in _LISTS]
    for items in map(list, map(nn.Module.children, lists)):
        alike = len({type(item) for item in items}) == 1
        if alike and len(items) > 1 and all(_weights(item) > 1 for item in items):
            return True
    return False


def _weights(module: nn.Module) -> int:
    """Number of weight layers: convs, linear layers, and leaves with a matrix (as Hugging Face's Conv1D)."""
    return sum(
        isinstance(m, _WEIGHTED) or (_is_leaf(m) and any(p.ndim == 2 for p in m.parameters(False)))
        for m in module.modules()
    )
