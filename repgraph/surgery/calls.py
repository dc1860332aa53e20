"""What goes into and comes out of a model's modules in one forward pass, and what becomes of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from repgraph.activations.forward import run_example
from repgraph.activations.layers import INPUTS, call_key

_USUAL = ("hidden_states", "hidden_state", "x", "input", "inputs", "src", "tgt", "query")
_MORE = "/more"  # behind the name of a module, for the tensors of its tuple behind the first
_ADD = ("add", "add_")
_SCALE = ("mul", "mul_", "roll")
AVERAGE = ("mean", "_adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
SHAPE = ("view", "_unsafe_view", "reshape", "permute", "transpose", "clone")


@dataclass
class Call:
    """What a module does in a forward pass, as far as it matters for leaving it out."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    given: list[tuple[int | str, Tensor]]
    """Its tensor arguments, by position or keyword."""
    result: Tensor | None
    """The first tensor that it gives."""
    parts: int | None = None
    """Length of the tuple that it gives; None for a tensor."""
    place: int = 0
    """Where in the tuple the result stands."""
    leaf: bool = False
    """Whether it has no modules inside."""
    passed: int | str | None = None
    """The argument that agrees with the result in shape and type and can stand in for it; None if there is none."""
    branch: bool = False
    """Whether its result is only added to something, so that leaving it out means adding nothing."""
    before: str | None = None
    """What `capture` calls the tensor that takes the place of the result; None if no module gives or takes it."""
    after: str | None = None
    """What `capture` calls the result: of a branch, the sum."""
    also: dict[int, int | str] = field(default_factory=dict)
    """Other places of the tuple in which an argument is handed on as it came."""
    more: bool = False
    """Whether the rest of the model uses other tensors of the tuple that it gives."""
    ambiguous: tuple[str, ...] = ()
    """Keywords of several arguments that agree with the result, none of which is usual for what goes through."""
    grown: bool = False
    """Whether something is added to its result in place."""
    from_modules: list[str] = field(default_factory=list)
    """Modules that made the other tensor arguments."""
    followed: set[str] = field(default_factory=set)
    """The operations that its result was followed through: scaling, averages and changes of shape."""
    taken_by: list[str] = field(default_factory=list)
    """The watched modules that took its result, so followed, as their first argument."""
    used_in: set[str] = field(default_factory=set)
    """The innermost watched modules in which all other operations on its result ran; "" outside of all."""

    @property
    def droppable(self) -> bool:
        """Whether the result can be replaced: by an argument that agrees with it, or by adding nothing."""
        return self.passed is not None and not self.more

    def text(self) -> str:
        """Why it cannot be left out: what comes in and goes out, as shapes."""
        if self.more and self.passed is not None:
            return "the rest of the model uses more of what it gives than its first tensor"
        if self.ambiguous:
            return f"its arguments {' and '.join(self.ambiguous)} both have the shape of what it gives"
        comes = " and ".join(str(tuple(value.shape)) for _, value in self.given) or "no tensor"
        return f"it turns {comes} into {'no tensor' if self.result is None else tuple(self.result.shape)}"


def observe(model: nn.Module, example: object, names: Iterable[str]) -> dict[str, Call]:
    """The named modules' calls in one forward pass on the example, in order of completion; of several the first.

    The model runs in eval mode without gradients and comes out as it went in.
    """
    watch = _Watch(set(names))
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                enter = module.register_forward_pre_hook(watch.enter(name), with_kwargs=True, prepend=True)
                leave = module.register_forward_hook(watch.leave(name), with_kwargs=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        run_example(model, example, within=watch)
    return watch.finished()


def _choose_argument(call: Call, result: Tensor) -> None:
    """Which argument passes through: the first by position that agrees with the result, else by usual keyword."""
    agree = {key: v for key, v in call.given if v.shape == result.shape and v.dtype == result.dtype}
    by_place = [key for key in agree if isinstance(key, int)]
    by_name = [key for key in _USUAL if key in agree]
    different = {id(value) for value in agree.values()}
    if by_place or by_name or len(different) == 1:
        call.passed = [*by_place, *by_name, *agree][0]
    elif agree:
        call.ambiguous = tuple(map(str, agree))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the results of the watched modules to the operations that use them.

    A tensor's value is told from what an in-place operation makes of it by its version.
    """

    def __init__(self, names: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.calls: dict[str, Call] = {}
        self.marks: MutableMapping[Tensor, set[str]] = WeakTensorKeyDictionary()
        """Tensor -> the watched modules whose result it is, scaled or reshaped at most."""
        self.places: MutableMapping[Tensor, list[tuple[int, str]]] = WeakTensorKeyDictionary()
        """Tensor -> (version, what capture calls it)."""
        self.uses: dict[str, set[str]] = defaultdict(set)
        """Module -> the operations on its result; "add" if they add something of the same shape."""
        self.followed: dict[str, set[str]] = defaultdict(set)
        """Module -> what scaled, averaged or reshaped its result."""
        self.sums: dict[str, tuple[Tensor, int, Tensor, int]] = {}
        """Module -> what its result was added to, and the sum."""
        self.readers: dict[str, list[str]] = defaultdict(list)
        self.running: list[str] = [""]
        self.used_in: dict[str, set[str]] = defaultdict(set)
        self.grown: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.arguments: dict[str, list[tuple[int | str, Tensor, int]]] = {}

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            given = [(k, v, v._version) for k, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor)]
            if given:
                self._place(given[0][1], call_key(INPUTS + name, self.counts))
            if name in self.names:
                self.running.append(name)
                self.arguments[name] = given  # type: ignore[assignment]
                for maker in self.marks.get(given[0][1], ()) if given else ():
                    self.readers[maker].append(name)

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            several = list(output) if isinstance(output, tuple | list) else [output]
            place = next((i for i, value in enumerate(several) if isinstance(value, Tensor)), 0)
            first = several[place] if several else None
            result = first if isinstance(first, Tensor) else None
            if result is not None:
                self._place(result, call_key(name, self.counts))
            if name not in self.names:
                return
            self.running.pop()
            if name in self.calls:
                return
            given = self.arguments[name]
            call = Call(args, kwargs, [(key, value) for key, value, _ in given], result)
            if isinstance(output, tuple | list):
                call.parts, call.place = len(output), place
            call.leaf = next(module.children(), None) is None
            if result is not None:
                _choose_argument(call, result)
                self.marks.setdefault(result, set()).add(name)
                for i, value in enumerate(several[place + 1 :], place + 1):
                    key = next((key for key, argument, _ in given if argument is value), None)
                    if key is not None:
                        call.also[i] = key
                    elif isinstance(value, Tensor):
                        self.marks.setdefault(value, set()).add(name + _MORE)
            self.calls[name] = call

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        versions = [value._version for value in tensors]
        used = [(tensor, set(self.marks.get(tensor, ()))) for tensor in tensors]
        out = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else ""
        for tensor, names in used:
            for name in names:
                self._follow(name, tensor, operation, tensors, versions, out)
        return out

    def _follow(
        self, name: str, tensor: Tensor, operation: str, tensors: list[Tensor], versions: list[int], out: Any
    ) -> None:
        others = [(other, version) for other, version in zip(tensors, versions, strict=True) if other is not tensor]
        if operation in _ADD and len(others) == 1 and others[0][0].shape == tensor.shape:
            self.uses[name].add("add")
            self.used_in[name].add(self.running[-1])
            if operation == "add_" and out is tensor:
                self.grown.add(name)
            in_place = operation.endswith("_")
            self.sums[name] = (*others[0], out, out._version + in_place)
            if in_place:
                self.marks[out] = self.marks.get(out, set()) - {name}
        elif operation in (*_SCALE, *AVERAGE, *SHAPE) and isinstance(out, Tensor):
            self.marks.setdefault(out, set()).add(name)
            self.followed[name].add(operation)
        else:
            self.uses[name].add(operation or "other")
            self.used_in[name].add(self.running[-1])

    def _place(self, tensor: Tensor, key: str) -> None:
        self.places.setdefault(tensor, []).append((tensor._version, key))

    def _key(self, tensor: Tensor, version: int) -> str | None:
        """An output of a watched module rather than another one, an output rather than an input."""
        keys = [key for at, key in self.places.get(tensor, []) if at == version]
        return min(keys, key=lambda key: (key not in self.names, key.startswith(INPUTS)), default=None)

    def finished(self) -> dict[str, Call]:
        """The calls, with what became of their results."""
        made = {id(call.result): name for name, call in self.calls.items()}
        for name, call in self.calls.items():
            if call.result is None:
                continue
            call.taken_by = self.readers[name]
            call.followed, call.used_in = self.followed[name], self.used_in[name]
            call.more, call.grown = bool(self.uses[name + _MORE]), name in self.grown
            call.branch = call.passed is not None and not call.leaf and self.uses[name] == {"add"}
            if call.branch:
                other, at, total, then = self.sums[name]
                call.before, call.after = self._key(other, at), self._key(total, then)
            elif call.passed is not None:
                value, version = next((v, at) for key, v, at in self.arguments[name] if key == call.passed)
                call.before, call.after = self._key(value, version), name
            call.from_modules = [
                made[id(value)] for key, value in call.given if key != call.passed and id(value) in made
            ]
        return self.calls
