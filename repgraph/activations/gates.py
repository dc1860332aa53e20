"""Gates: on which side of its kink each ReLU-like unit is, seen where the model really calls one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from repgraph.activations.layers import Item, Select, call_key, choose, items_of

GateVisit = Callable[[str, Tensor, "Kinks"], None]
"""Called with the key of a call, its input z (pre-activation) and its kinks."""

GATES = "gates:"  # before the name of a gate where names of layers stand beside it
RELU_LIKE = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Threshold,
    nn.Hardtanh,  # and ReLU6, its subclass
    nn.Hardsigmoid,
)
_FUNCTIONS = {
    "relu",
    "leaky_relu",
    "_prelu_kernel",
    "rrelu_with_noise",
    "threshold",
    "hardtanh",
    "hardsigmoid",
    "clamp",
    "clamp_min",
}
_MAGIC = 0x0102040810204080  # gathers the lowest bits of 8 bytes in the highest byte


@dataclass(frozen=True, slots=True)
class Kinks:
    """A piecewise affine function of one variable: slopes[i] z + offsets[i] between at[i - 1] and at[i]."""

    at: tuple[float, ...]
    slopes: tuple[float | Tensor, ...]
    offsets: tuple[float, ...]

    def keys(self, key: str) -> list[str]:
        """Names of the gates: the call's own for the first kink, "/upper" behind it for the second."""
        return [key, f"{key}/upper"][: len(self.at)]

    def bits(self, z: Tensor) -> list[Tensor]:
        """One bool tensor for each kink: z > at."""
        return [z > at for at in self.at]

    def apply(self, z: Tensor, bits: list[Tensor]) -> Tensor:
        """The affine piece that the bits name, applied to z."""
        out = z * self.slopes[0] + self.offsets[0]
        for bit, slope, offset in zip(bits, self.slopes[1:], self.offsets[1:], strict=True):
            out = torch.where(bit, z * slope + offset, out)
        return out


def kinks_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kinks | None:
    """The kinks of an ATen operation if it is ReLU-like, else None.

    ReLU, leaky, parametric and randomized (in eval mode) ReLU, threshold, hardtanh and ReLU6, hardsigmoid, and a clamp
    from 0 up.
    """
    name = function_name(func)
    if name not in _FUNCTIONS or not args[0].is_floating_point():  # a clamp of indices is none
        return None
    given = {  # the dispatcher leaves out arguments that have their default value
        argument.name: args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(func._schema.arguments)
    }
    if name in ("clamp", "clamp_min"):
        low, high = given["min"], given.get("max")
        if isinstance(low, Tensor) or isinstance(high, Tensor) or low != 0:
            return None
        return _one(0.0) if high is None else _between(0.0, high)
    if name == "leaky_relu":
        return _one(given["negative_slope"])
    if name == "_prelu_kernel":
        return _one(given["weight"])
    if name == "rrelu_with_noise":
        return _one((given["lower"] + given["upper"]) / 2)
    if name == "threshold":
        return Kinks((float(given["threshold"]),), (0.0, 1.0), (float(given["value"]), 0.0))
    if name == "hardtanh":
        return _between(given["min_val"], given["max_val"])
    return _between(-3.0, 3.0, 1 / 6, 0.5) if name == "hardsigmoid" else _one(0.0)


def function_name(func: Any) -> str:
    """Name of an ATen operation, the same for its in-place form; empty for any other operation."""
    if getattr(func, "namespace", "") != "aten" or not isinstance(func, torch._ops.OpOverload):
        return ""
    name: str = func.overloadpacket.__name__
    return name.removesuffix("_")


def _one(slope: float | Tensor) -> Kinks:
    """The identity above 0, with another slope below."""
    return Kinks((0.0,), (slope, 1.0), (0.0, 0.0))


def _between(low: float, high: float, slope: float = 1.0, offset: float = 0.0) -> Kinks:
    """Constant below `low` and above `high`."""
    ends = slope * low + offset, slope * high + offset
    return Kinks((float(low), float(high)), (0.0, slope, 0.0), (ends[0], offset, ends[1]))


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every call of a ReLU-like function to a visitor, before it is computed.

    A call inside a ReLU-like module of torch has that module's name as its key ("name#1" for its second call within a
    forward pass); any other call "name#relu0", "name#relu1", ..., name being the innermost module that runs.
    """

    supports_higher_order_operators = True

    def __init__(self, visit: GateVisit, fixed: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.visit = visit
        self.fixed = WeakTensorKeyDictionary(dict.fromkeys(fixed, True))
        """Parameters, buffers, and what is computed from these alone: the gates are those of the input."""
        self.paused = False
        self.running: list[tuple[str, nn.Module]] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fixed = all(value in self.fixed for value in _tensors_in((args, kwargs)))
        if self.running and not self.paused and not fixed:
            kinks = kinks_of(func, args, kwargs or {})
            if kinks is not None:
                self.visit(self._key(), args[0], kinks)
        out = func(*args, **(kwargs or {}))
        for value in _tensors_in(out):
            if fixed:
                self.fixed[value] = True
            elif value in self.fixed:
                del self.fixed[value]
        return out

    def _key(self) -> str:
        name, module = self.running[-1]
        if isinstance(module, RELU_LIKE):
            return call_key(name, self.calls)
        self.calls[f"{name}#relu"] += 1
        return f"{name}#relu{self.calls[f'{name}#relu'] - 1}"


def _tensors_in(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


W = TypeVar("W", bound=Watch)


@contextmanager
def watched(model: nn.Module, visit: GateVisit, kind: type[W]) -> Iterator[W]:
    """Inside, which is to hold one forward pass, the visitor sees every ReLU-like call of the model.

    `kind` is `Watch` or a class of its kind that sees more.
    """
    watch = kind(visit, (*model.parameters(), *model.buffers()))

    def enter(name: str) -> Callable[[nn.Module, object], None]:
        return lambda module, _: watch.running.append((name, module))

    def leave(module: nn.Module, _: object, __: object) -> None:
        if watch.running and watch.running[-1][1] is module:  # not where an earlier hook stopped it from being entered
            watch.running.pop()

    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)  # torch's fused encoder layer hides its ReLU
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(enter(name)).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(watch)
        yield watch


def choose_with_gates(model: nn.Module, select: Select) -> tuple[dict[str, nn.Module], list[Item], list[str]]:
    """The modules of a choice of layers, its parts but for gates, and the patterns of the gates that it asks for.

    "gates" means "gates:*".
    """
    items, patterns = [], []
    for item in items_of(model, select):
        if isinstance(item, str) and (item == "gates" or item.startswith(GATES)):
            patterns.append(f"{GATES}*" if item == "gates" else item)
        else:
            items.append(item)
    return choose(model, items) if items or not patterns else {}, items, patterns


def gate_choice(names: str | Sequence[str] | None) -> list[str]:
    """The choice of layers that takes gates by their own names or wildcards; all of them for None."""
    if names is None:
        return ["gates"]
    return [f"{GATES}{name}" for name in ([names] if isinstance(names, str) else names)]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a gate is among those wanted: by name or by wildcard."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def pack(bits: Tensor) -> Tensor:
    """Bool (b, D) -> uint8 (b, ceil(D / 8)): bit i of byte j is gate 8 j + i, and the last byte is filled with 0."""
    padded = bits.new_zeros((len(bits), -(-bits.shape[1] // 8), 8))
    padded.flatten(1)[:, : bits.shape[1]] = bits
    return ((padded.view(torch.int64)[..., 0] * _MAGIC) >> 56).to(torch.uint8)


def unpack(packed: Tensor, gates: int) -> Tensor:
    """The reverse of `pack`: uint8 (b, ceil(D / 8)) -> bool (b, D), D = gates."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed[..., None].bitwise_right_shift(places).bitwise_and_(1)
    return bits.flatten(1)[:, :gates].bool()
