"""Shortcuts that pad with zero channels, held so that they stay exact when channels go."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from repgraph.activations.forward import run_example


class Slots(nn.Module):
    """What a module without weights does between channels some of which went.

    Its input is put where the channels were, zeros where they went; of its output those that went are left out. So a
    shortcut that pads with zero channels stays exact.
    """

    taken: Tensor
    given: Tensor

    def __init__(self, inner: nn.Module, places: Tensor, given: int) -> None:
        super().__init__()
        self.inner = inner
        self.places = places.tolist()  # of the input's channels in the output
        self.width, self.total = len(places), given
        self.register_buffer("taken", torch.arange(self.width), persistent=False)
        self.register_buffer("given", torch.arange(given), persistent=False)

    @property
    def whole(self) -> bool:
        """Whether no channel went."""
        return len(self.taken) == self.width and len(self.given) == self.total

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        whole = x.new_zeros(x.shape[0], self.width, *x.shape[2:]).index_copy(1, self.taken, x)
        out: Tensor = self.inner(whole)
        return out.index_select(1, self.given)


def with_slots(model: nn.Module, example: object) -> nn.Module:
    """A copy in which `Slots` stand around the modules without weights that add channels, as a zero-padded shortcut."""
    bare, copy = bare_copy(model), deepcopy(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[object, ...], output: object) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen[name] = (args[0], output)

        module.register_forward_hook(hook)

    for name, module in bare.named_modules():
        own = not type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None
        held = isinstance(bare.get_submodule(name.rpartition(".")[0]), Slots)
        if name and own and not held and not [*module.parameters(), *module.buffers()]:
            watch(name, module)
    run_example(bare, example)
    for name, (x, out) in seen.items():
        places = _places(bare.get_submodule(name), x, out)
        if places is not None:
            parent, _, key = name.rpartition(".")
            inner = copy.get_submodule(name)
            slots = Slots(inner, places, out.shape[1]).to(x.device).train(inner.training)
            copy.get_submodule(parent).register_module(key, slots)
    return copy


def _places(module: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
    """Where a module that adds zero channels puts each channel of its input; None for any other module."""
    if (
        x.ndim != 4
        or out.ndim != 4
        or len(x) != len(out)
        or out.shape[1] <= x.shape[1]
        or out[0].numel() > x[0].numel() * 4
    ):
        return None
    probe = x.new_zeros(x.shape[1], *x.shape[1:])
    probe[range(len(probe)), range(len(probe))] = 1
    with torch.no_grad():
        reached = module.forward(probe).flatten(2).any(2)
        silent = not bool(module.forward(torch.zeros_like(x)).any())
    return reached.long().argmax(1) if silent and bool((reached.sum(1) == 1).all()) else None


def without_slots(model: nn.Module) -> nn.Module:
    """The same model with the modules back in place of those `Slots` of which no channel went."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Slots) and module.whole:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent).register_module(key, module.inner)
    return model


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy that can be traced: without hooks, with gradients."""
    copy = deepcopy(model)
    for module in copy.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    for parameter in copy.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return copy
