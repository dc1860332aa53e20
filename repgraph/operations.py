"""Multiply-accumulates and written bytes of ATen operations, added up for the modules that run them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from repgraph.activations.batches import example_inputs, model_dtype
from repgraph.activations.forward import kept_random_state, run_example
from repgraph.activations.gates import function_name
from repgraph.activations.layers import unwrap


def count(model: nn.Module, example: object) -> tuple[nn.Module, Counts, dict[str, object]]:
    """Run the model once: what ran (a copy where there are no data), its counts, and the settings to report.

    It runs in eval mode without gradients and comes out as it went in. What cannot be counted is named in a warning
    to the caller's caller.
    """
    model = checked(model)
    pretended: FakeTensorMode | None = None
    if without_data(model, example):
        model, inputs, pretended = _on_fake_tensors(model, example)
    else:
        inputs = example_inputs(example)
    shapes = tree_map(lambda v: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__, inputs)
    counts, fused = Counts(model), torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)  # torch's fused encoder layer hides its products
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(counts.enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(counts.leave, always_call=True).remove)
        try:
            if pretended is None:
                run_example(model, (inputs,), within=counts)
            else:
                with kept_random_state(), pretended, torch.no_grad(), counts:
                    model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        except Exception as error:
            error.add_note(f"repgraph: example of shape {shapes}")
            raise
    if counts.unknown:
        names = ", ".join(sorted(counts.unknown))
        warnings.warn(f"macs leave out what cannot be counted and may hold products: {names}", stacklevel=3)
    dtype = model_dtype(model)
    return model, counts, {"example": shapes, "dtype": None if dtype is None else str(dtype).removeprefix("torch.")}


def checked(model: nn.Module) -> nn.Module:
    """The model inside wrappers, if it is one that can be run as it is.

    Raises
    ------
    TypeError
        If it is no nn.Module.
    ValueError
        If it is scripted or has lazy parameters.
    """
    model = unwrap(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"model must have no lazy parameters, got {name!r} without a shape: run it once on data")
    return model


def without_data(model: nn.Module, example: object) -> bool:
    """Whether a tensor of the model or of the example is on "meta" or a fake one."""
    leaves = tree_leaves(dict(example) if isinstance(example, Mapping) else example)
    tensors = (*model.parameters(), *model.buffers(), *(v for v in leaves if isinstance(v, Tensor)))
    return any(isinstance(v, FakeTensor) or v.is_meta for v in tensors)


def _on_fake_tensors(model: nn.Module, example: object) -> tuple[nn.Module, object, FakeTensorMode]:
    """A copy of the model in eval mode, and the inputs, as fake tensors on the CPU, and the mode in which they run."""
    example = dict(example) if isinstance(example, Mapping) else example
    held = [v for m in model.modules() for own in (m._parameters, m._buffers, vars(m)) for v in own.values()]
    tensors = [v for v in held if isinstance(v, Tensor)]
    mode = detect_fake_mode([*tensors, *tree_leaves(example)]) or FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: object, dtype: torch.dtype | None = None) -> object:
        if not isinstance(value, Tensor):
            return value
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        made = torch.empty_strided(value.shape, value.stride(), dtype=kind, device="cpu")
        return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made

    with mode:
        memo = {id(value): fake(value) for value in tensors}
        inputs = example_inputs(tree_map(fake, example))  # labels, too, are without data: they cannot be moved
        inputs = tree_map(lambda value: fake(value, model_dtype(model)), inputs)
    copied = deepcopy(model, memo)
    for module in copied.modules():
        module.training = False
    return copied, inputs, mode


class Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what ATen operations cost, for the modules that are running and those that hold these."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.above: dict[nn.Module, set[nn.Module]] = {}
        """Module -> those that are on every path to it, itself included: it goes with any of them."""
        paths = dict(model.named_modules(remove_duplicate=False))
        for path, module in paths.items():
            parts = path.split(".")
            passed = {paths[".".join(parts[:i])] for i in range(len(parts) + 1)}
            self.above[module] = self.above.get(module, passed) & passed
        self.running: list[nn.Module] = []
        self.calls: Counter[nn.Module] = Counter()
        self.macs: Counter[nn.Module] = Counter()
        self.written: Counter[nn.Module] = Counter()
        self.unknown: set[str] = set()

    def enter(self, module: nn.Module, _: object) -> None:
        """Forward pre-hook of every module."""
        self.running.append(module)
        self.calls[module] += 1

    def leave(self, module: nn.Module, _: object, __: object) -> None:
        """Forward hook of every module."""
        if self.running and self.running[-1] is module:  # not where an earlier hook stopped it from being entered
            self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        macs = _formula(func)
        if macs is None and isinstance(func, torch._ops.OpOverload) and func.namespace != "prim":
            with self:  # in inference mode, composite operations come here whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        counted = set[nn.Module]().union(*(self.above[module] for module in self.running))
        given = {_storage(value) for value in _dense((args, kwargs))}
        written = sum(v.numel() * v.element_size() for v in _dense(out) if _storage(v) not in given)
        self.written.update(dict.fromkeys(counted, written))
        if macs is not None:
            number = macs(args, kwargs, out)
            self.macs.update(dict.fromkeys(counted, number))
        elif _may_hold_products(func, args):
            self.unknown.add(str(func))
        return out


def _dense(values: object) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.layout is torch.strided]


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _formula(func: Any) -> Callable[[Any, Any, Any], int] | None:
    """MACs of an operation, of its arguments and result; None if there is no formula for it."""
    name = function_name(func)  # the same for the in-place form
    own = _MACS.get(name)
    if own is not None:
        return lambda args, kwargs, out: own(args, out)
    flops = flop_registry.get(getattr(torch.ops.aten, name, None) if name else getattr(func, "overloadpacket", func))
    return None if flops is None else lambda args, kwargs, out: int(flops(*args, **kwargs, out_val=out)) // 2


def _may_hold_products(func: Any, args: Any) -> bool:
    name = function_name(func)
    if name:
        return _PRODUCTS.search(name) is not None and _NO_PRODUCTS.search(name) is None
    return getattr(func, "namespace", "") != "prim" and any(v.is_floating_point() for v in _dense(args))


def _attention(args: Any, _: object) -> int:
    """Queries (b, h, T, d), keys (b, h or fewer, S, d), values (b, h or fewer, S, d')."""
    q, k, v = args[:3]
    return int(q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))


def _recurrent(x: Tensor, weights: list[Tensor]) -> int:
    """Every matrix once for each step of each sample; x is (..., features), biases have one axis."""
    return x.shape[:-1].numel() * sum(w.numel() for w in weights if w.ndim == 2)


_MACS: dict[str, Callable[[Any, Any], int]] = {  # (args, result) -> MACs, where torch has no formula
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "mkldnn_rnn_layer": lambda args, _: _recurrent(args[0], args[1:3]),
    "_cudnn_rnn": lambda args, _: _recurrent(args[0], args[1]),
    "miopen_rnn": lambda args, _: _recurrent(args[0], args[1]),
    "mv": lambda args, _: args[0].numel(),
    "addmv": lambda args, _: args[1].numel(),
    "dot": lambda args, _: args[0].numel(),
    "vdot": lambda args, _: args[0].numel(),
    "addbmm": lambda args, _: args[1].numel() * args[2].shape[-1],
    "_int_mm": lambda args, _: args[0].numel() * args[1].shape[-1],
    "_addmm_activation": lambda args, _: args[1].numel() * args[2].shape[-1],
    "conv_tbc": lambda args, out: out.numel() * args[1].shape[:2].numel(),  # weight (kernel, in, out)
}
_PRODUCTS = re.compile(
    r"(mm|mv)(_|$)|matmul|conv(olution|\d|_)|linear|rnn|lstm|gru|attention|transformer|linalg|solve|cholesky|ormqr|trilinear$"
)
_NO_PRODUCTS = re.compile(r"upsample|norm|cross|diagonal|check|flatten|reorder|thnn_fused")
