"""What the output channels of convolutions and linear layers go through next: a batch norm, an activation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from repgraph.activations.forward import run_example
from repgraph.activations.gates import function_name
from repgraph.activations.layers import unwrap

CONVS = (nn.modules.conv._ConvNd,)
NORMS = (nn.modules.batchnorm._BatchNorm,)
_ACTIVATIONS = {
    *("relu", "hardtanh", "leaky_relu", "prelu", "_prelu_kernel", "elu", "celu", "selu", "gelu", "silu", "mish"),
    *("hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus"),
}
_SAME = ("detach", "alias")


@dataclass(frozen=True, slots=True)
class OutputChannels:
    """What the output channels of a layer go through before anything else."""

    layer: str
    """Name of the convolution or linear layer."""
    norm: str | None
    """Name of the batch norm that takes its output, where nothing else does."""
    activation: str | None
    """Name in ATen of the activation that alone takes what comes out of the norm or, without one, of the layer:
    "relu", "hardtanh" (also ReLU6), "gelu", "silu", ..."""
    activate: Callable[[Tensor], Tensor] = field(compare=False, repr=False)
    """That activation; without one, it gives back what it takes."""
    axis: int
    """Where the channels are: 1 for convolutions and for rows (n, c), the last for tokens."""


def output_channels(
    model: nn.Module, example: object, layers: Sequence[str] | None = None
) -> dict[str, OutputChannels]:
    """Which batch norm and which activation follow each convolution and linear layer, seen in one forward pass.

    Parameters
    ----------
    model
        Runs once in eval mode and comes out as it went in.
    example
        One batch, in any form that `capture` reads.
    layers
        Names of convolutions and linear layers; by default all that run.

    Returns
    -------
    dict of str to OutputChannels
        By name, in execution order. Of a layer that runs several times the first call counts.

    Raises
    ------
    ValueError
        If a name is no convolution or linear layer of the model, or does not run.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> found = output_channels(model, torch.zeros(1, 3, 8, 8))
    >>> found["0"].norm, found["0"].activation, found["3"].norm, found["3"].activation
    ('1', 'relu', None, None)
    """
    model = unwrap(model)
    weighted = {name: m for name, m in model.named_modules() if isinstance(m, (*CONVS, nn.Linear)) and name}
    for name in layers or ():
        if name not in weighted:
            raise ValueError(f"layers: {name!r} is no convolution or linear layer of the model")
    watch = _Watch()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in weighted:
                stack.callback(module.register_forward_hook(partial(watch.leave_layer, name)).remove)
            elif isinstance(module, NORMS):
                stack.callback(module.register_forward_pre_hook(partial(watch.enter_norm, name), prepend=True).remove)
                stack.callback(module.register_forward_hook(watch.leave_norm).remove)
        run_example(model, example, within=watch)
    if missing := [name for name in layers or () if name not in watch.ran]:
        raise ValueError(f"layer {missing[0]!r} does not run on the example")
    return {name: watch.found(name, weighted[name]) for name in watch.ran if layers is None or name in layers}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what takes the outputs of layers, and what takes those of the norms behind them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: dict[str, int] = {}
        """Layer -> dimensions of its output."""
        self.marks: MutableMapping[Tensor, tuple[str, str]] = WeakTensorKeyDictionary()
        """Tensor -> (layer, norm it went through or "")."""
        self.uses: dict[tuple[str, str], list[tuple[str, Callable[[Tensor], Tensor] | None]]] = defaultdict(list)
        """What takes it: the name of a norm and None, or that of an operation and what applies it."""
        self.norm: list[tuple[str, str] | None] = []
        """Of the norms that run now: (layer, its name), or None."""

    def leave_layer(self, name: str, module: nn.Module, _: object, output: object) -> None:
        if name not in self.ran and isinstance(output, Tensor):
            self.ran[name] = output.ndim
            self.marks[output] = (name, "")

    def enter_norm(self, name: str, module: nn.Module, args: tuple[object, ...]) -> None:
        mark = self.marks.get(args[0]) if args and isinstance(args[0], Tensor) else None
        self.norm.append((mark[0], name) if mark is not None and not mark[1] else None)
        if self.norm[-1] is not None:
            self.uses[mark].append((name, None))  # type: ignore[index]

    def leave_norm(self, module: nn.Module, _: object, output: object) -> None:
        mark = self.norm.pop()
        if mark is not None and isinstance(output, Tensor):
            self.marks[output] = mark

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        inside = self.norm[-1] if self.norm else None
        marks = [self.marks.get(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for mark in marks:
            if mark is not None and name not in _SAME and (inside is None or mark != (inside[0], "")):
                self.uses[mark].append((name, partial(_apply, name, args[1:], kwargs or {})))
        out = func(*args, **(kwargs or {}))
        if name in _SAME and marks[0] is not None:
            self.marks[out] = marks[0]
        elif isinstance(out, Tensor) and any(value is out for value in args):  # in place: another value from here on
            self.marks.pop(out, None)
        return out

    def found(self, name: str, module: nn.Module) -> OutputChannels:
        """What was noted of a layer."""
        users = self.uses[name, ""]
        norm = users[0][0] if len(users) == 1 and users[0][1] is None else None
        after = users if norm is None else self.uses[name, norm]
        axis = 1 if isinstance(module, CONVS) or self.ran[name] == 2 else self.ran[name] - 1
        activation, activate = after[0] if len(after) == 1 else ("", None)
        if activate is None or activation not in _ACTIVATIONS:
            return OutputChannels(name, norm, None, nn.Identity(), axis)
        return OutputChannels(name, norm, activation.strip("_"), activate, axis)


def _apply(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    """An activation, never in place."""
    out: Tensor = getattr(torch.ops.aten, name)(x, *args, **kwargs)
    return out
