"""Lists of layers after a removal: places, layer_idx of their attention, and the counts in a Hugging Face config."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from copy import deepcopy

import torch
from torch import nn

_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
_NUMBERS = ("mlp_only_layers",)  # lists of the layers' numbers
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")


def delete(model: nn.Module, container: str, keys: Collection[str]) -> None:
    """Take members out of a Sequential or ModuleList; the rest moves up where the members are numbered.

    Attention layers that know their number learn the new one, and a config that counts the layers counts the rest.
    """
    owner = model.get_submodule(container)
    before = list(owner._modules)
    kept = [(key, module) for key, module in owner._modules.items() if key not in keys]
    names = _numbered(before)[: len(kept)] if _numbered(before) == before else [key for key, _ in kept]
    owner._modules.clear()
    owner._modules.update({name: module for name, (_, module) in zip(names, kept, strict=True)})
    _count(model, container, before, [key for key, _ in kept])


def number_attention(model: nn.Module, container: str) -> None:
    """Number the modules with a layer_idx inside a list of layers 0, 1, ... again, in the old order.

    A cache of keys and values has one place per number and takes its length from the first.
    """
    members = [
        module for module in model.get_submodule(container).modules() if type(getattr(module, "layer_idx", None)) is int
    ]
    places = {old: new for new, old in enumerate(sorted({int(module.layer_idx) for module in members}))}  # type: ignore[arg-type]
    for module in members:
        module.layer_idx = places[int(module.layer_idx)]  # type: ignore[arg-type, assignment]


def numbered(model: nn.Module, name: str) -> bool:
    """Whether a module, or one inside it, knows its number in a list of layers."""
    return any(hasattr(module, "layer_idx") for module in model.get_submodule(name).modules())


def mixed_attention(model: nn.Module, container: str) -> bool:
    """Whether a config says that the list's layers have attention of several kinds, which their numbers tell apart."""
    return any(len(set(getattr(config, "layer_types", None) or [])) > 1 for config in _configs(model, container))


def check_config(model: nn.Module) -> None:
    """Warn where a Hugging Face model's config does not describe its layers any more.

    Warns
    -----
    UserWarning
        If a model made from the config has other parameters, so that save_pretrained would write a broken one.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    try:
        with torch.device("meta"):
            fresh = type(model)(deepcopy(config))
    except Exception:  # what a config that is wrong may raise in any architecture
        fresh = None
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if fresh is None or own != {key: tuple(value.shape) for key, value in fresh.state_dict().items()}:
        warnings.warn(
            f"the config of {type(model).__name__} cannot describe what is left of its layers: save it with "
            "Pruned.save and load_pruned, not with save_pretrained",
            stacklevel=4,
        )


def _numbered(keys: list[str]) -> list[str]:
    """The keys as they would be if they counted up from the first: "0", "1", ... or "layer1", "layer2", ..."""
    found = re.fullmatch(r"(.*?)(\d+)", keys[0]) if keys else None
    if found is None:
        return []
    return [f"{found[1]}{int(found[2]) + i}" for i in range(len(keys))]


def _configs(model: nn.Module, container: str) -> list[object]:
    """The distinct configs of the model and of the modules around a list of layers."""
    parts = container.split(".")
    around: Iterable[nn.Module] = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    found = {id(config): config for module in around if (config := getattr(module, "config", None)) is not None}
    return list(found.values())


def _count(model: nn.Module, container: str, before: list[str], kept: list[str]) -> None:
    parts = container.split(".")
    stage = next((int(part) for part in parts if part.isdigit()), None)  # of a list inside a list
    decoder = "decoder" in parts
    for config in _configs(model, container):
        depths = getattr(config, "depths", None)
        if stage is not None:
            if isinstance(depths, list | tuple) and stage < len(depths) and depths[stage] == len(before):
                config.depths = [*depths[:stage], len(kept), *depths[stage + 1 :]]  # type: ignore[attr-defined]
            continue
        names = _DECODER_COUNTS if decoder and any(hasattr(config, name) for name in _DECODER_COUNTS) else _COUNTS
        for name in _PER_LAYER:
            values = getattr(config, name, None)
            if isinstance(values, list | tuple) and len(values) == len(before):
                setattr(config, name, [value for key, value in zip(before, values, strict=True) if key in kept])
        for name in _NUMBERS:
            if isinstance(values := getattr(config, name, None), list):
                setattr(config, name, [kept.index(before[i]) for i in values if before[i] in kept])
        for name in names:
            if getattr(config, name, None) == len(before):
                setattr(config, name, len(kept))
