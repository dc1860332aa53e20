"""A network as a graph of operations, followed through its cells: on each every value is affine."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from repgraph.activations.batches import model_device
from repgraph.activations.forward import first_tensor
from repgraph.activations.gates import Kinks, Watch, function_name, kinks_of, pack, watched
from repgraph.activations.layers import unwrap
from repgraph.metrics.spline.codes import RegionCodes, refuse_training

_SMOOTH = {
    "gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "sigmoid", "tanh", "hardswish", "log_sigmoid_forward",
    "_softmax", "_log_softmax", "native_layer_norm", "native_group_norm", "exp", "log", "sqrt", "rsqrt", "pow", "erf",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
}  # fmt: skip
_POOL = "max_pool2d_with_indices"
_WORKSPACE = 2**21  # numbers held at once for a part of the cells: 16 MiB


@dataclass(frozen=True, slots=True)
class Call:
    """One call that cuts cells: a ReLU-like function, or a max pooling with windows of some entries."""

    key: str
    shape: tuple[int, ...]
    """Of its input, for a batch of one."""
    kinks: Kinks | None = None
    places: Tensor | None = None
    """For a max pooling: where the entries of each window are in the flat image, (windows, entries); -1 is padding."""

    @property
    def units(self) -> int:
        """Gates of the call (units times kinks), or channels times windows times entries."""
        if self.places is not None:
            return math.prod(self.shape[:-2]) * self.places.numel()
        return math.prod(self.shape) * len(self.kinks.at if self.kinks else ())

    def columns(self) -> dict[str, int]:
        """Names of the gates and how many each has; a max pooling has one for each entry of each window."""
        if self.kinks is None:
            return {self.key: self.units}
        names = self.kinks.keys(self.key)
        return dict.fromkeys(names, self.units // len(names))

    def forms(self, z: Tensor) -> Tensor:
        """From inputs z (rows, ...) what the cells are cut by: z - kink (rows, units), or the entries of the windows.

        The latter are (rows, windows, entries), -inf outside the image.
        """
        if self.places is None:
            assert self.kinks is not None
            return torch.cat([(z - at).flatten(1) for at in self.kinks.at], 1)
        images = z.reshape(len(z), -1, self.shape[-2] * self.shape[-1])
        padded = nn.functional.pad(images, (0, 1), value=-torch.inf)
        return padded[:, :, self.places.to(z.device)].flatten(1, 2)

    def apply(self, z: Tensor, bits: Tensor, out: tuple[int, ...]) -> Tensor:
        """The output (rows, *out), where the bits (rows, units) say which piece holds."""
        if self.places is not None:
            chosen = bits.view(len(z), -1, self.places.shape[1]).to(torch.uint8).argmax(2, keepdim=True)
            return self.forms(z).gather(2, chosen).reshape(len(z), *out)
        assert self.kinks is not None
        return self.kinks.apply(z, [part.view(z.shape) for part in bits.tensor_split(len(self.kinks.at), 1)])


class Cells(Protocol):
    """Some cells: polygons of a plane, intervals of a line."""

    def __len__(self) -> int:
        """How many."""

    def cut(self, call: Call, z: np.ndarray, limit: int) -> tuple[Self, np.ndarray, np.ndarray]:
        """Cells after the cuts of a call with values z (P, cells, ...), their parents, and bits (cells, units) bool."""

    def part(self, a: int, b: int) -> Self:
        """Cells a to b."""


C = TypeVar("C", bound=Cells)


class AffineNetwork:
    """A network in float64 as a graph of ATen operations.

    Parameters
    ----------
    model
        In eval mode. It is left as it is: float64 copies of its parameters stand in while it is traced.
    example
        One input, without batch axis.

    Raises
    ------
    ValueError
        If the model is in train mode, has no gates, cannot be traced, calls a function that is not piecewise affine, or
        the input is not of a floating type.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        refuse_training(model)
        self.model = unwrap(model)
        self.device = model_device(self.model) or torch.device("cpu")
        if not example.is_floating_point():
            raise ValueError(f"the input space must be of real numbers, got inputs of {example.dtype}")
        self.tensors = {
            name: tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
        }
        keys: list[str] = []

        def traced(x: Tensor) -> Tensor:
            keys.clear()
            return self._forward(x, lambda key, z, kinks: keys.append(key), _TracingWatch)

        x = example[None].to(self.device, torch.float64, copy=True)
        try:
            with torch.no_grad():
                module = make_fx(functionalize(traced))(x)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"the model cannot be followed (control flow that depends on values, or a function that cannot be "
                f"traced): {' '.join(str(error).split())[:300]}"
            ) from error
        self.nodes = list(module.graph.nodes)
        self.constants: dict[fx.Node, Any] = {}
        self.calls: dict[fx.Node, Call] = {}
        self._setup(module, x, iter(keys))
        if not self.calls:
            raise ValueError("the model calls no ReLU-like function: its input space is one cell")

    def _setup(self, module: fx.GraphModule, x: Tensor, keys: Iterator[str]) -> None:
        """Compute what does not depend on the input, name the calls, and find when each value is last used."""
        values: dict[fx.Node, Any] = {}
        last: dict[fx.Node, int] = {}
        for number, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                last[source] = number
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                self.constants[node] = getattr(module, str(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.constants.get(n, values.get(n)))
                result = node.target(*args, **kwargs)
                constant = all(source in self.constants for source in node.all_input_nodes)
                (self.constants if constant else values)[node] = result
                pools = function_name(node.target) == _POOL
                kinks = None if pools or not args else kinks_of(node.target, args, kwargs)
                if pools or kinks is not None:
                    key = next(keys)  # also of a function of parameters alone, which cuts nothing
                    if not constant:
                        places = _places(node.target, args) if pools else None
                        self.calls[node] = Call(key, tuple(args[0].shape), kinks, places)
        self.ends: list[list[fx.Node]] = [[] for _ in self.nodes]
        for source, number in last.items():
            self.ends[number].append(source)
        self.shapes = {node: v.shape if isinstance(v, Tensor) else v[0].shape for node, v in values.items()}
        live: set[fx.Node] = set()
        self.largest = 1
        for number, node in enumerate(self.nodes):
            live.add(node)
            numbers = sum(self.shapes[n].numel() for n in live if n in self.shapes)
            self.largest = max(self.largest, numbers + 2 * (self.calls[node].units if node in self.calls else 0))
            live.difference_update(self.ends[number])

    def walk(
        self, points: Tensor, cells: C, max_regions: int, depth: int, seen: Callable[[int], object]
    ) -> Iterator[tuple[C, RegionCodes, Tensor | None]]:
        """Follow the cells through the network, cutting them at each call, a part of them at a time.

        Parameters
        ----------
        points
            (P, *input shape), float64; three points of a plane or two of a line make an affine map.
        cells
            What is cut: as a rule one, the domain.
        max_regions
            Refuse more cells than this.
        depth
            Number of calls that cut; the walk ends behind the last of them.
        seen
            Called with the number of cells that are done.

        Yields
        ------
        tuple
            Cells, their codes (packed), and the outputs at the points (P, cells, outputs), float64 on the CPU; None in
            place of the outputs if not all calls cut.
        """
        rows = len(points)
        room = max(1, _WORKSPACE // (rows * self.largest))
        first = {node: points[:, None, None].to(self.device) for node in self.nodes if node.op == "placeholder"}
        stop = list(self.calls)[depth - 1]
        # Parts of the cells that wait: behind which operation, and what made their values from those before it.
        todo: list[tuple[int, Callable[[], dict[fx.Node, Any]], C, list[Tensor]]] = [(1, lambda: first, cells, [])]
        done = 0
        while todo:
            number, made, cells, codes = todo.pop()
            values = made()
            while number < len(self.nodes):
                node = self.nodes[number]
                if node in self.calls:
                    z = values[node.args[0]]
                    call = self.calls[node]
                    flat = call.forms(z.flatten(0, 1))
                    forms = flat.view(*z.shape[:2], *flat.shape[1:]).cpu().numpy()
                    limit = max_regions - done - sum(len(item[2]) for item in todo)
                    cells, parents, bits = cells.cut(call, forms, limit)
                    if len(cells) > limit:
                        raise ValueError(
                            f"max_regions is {max_regions}, and there are more cells at {call.key!r}: take a smaller "
                            "part of the input space or raise it"
                        )
                    by_name = torch.from_numpy(bits).tensor_split(len(call.columns()), 1)
                    codes = [code[parents] for code in codes] + [torch.cat([pack(part) for part in by_name], 1)]
                    pieces = range(0, len(cells), room)
                    for a in reversed(pieces[1:]):
                        b = min(a + room, len(cells))
                        later = partial(self._behind, number, values, parents[a:b], bits[a:b])
                        todo.append((number + 1, later, cells.part(a, b), [code[a:b] for code in codes]))
                    b = min(room, len(cells))
                    values = self._behind(number, values, parents[:b], bits[:b])
                    cells, codes = cells.part(0, b), [code[:b] for code in codes]
                    if node is stop and depth < len(self.calls):
                        break
                elif node.op == "output":
                    break
                elif node not in self.constants:
                    values[node] = self._compute(node, values)
                for source in self.ends[number]:
                    values.pop(source, None)
                number += 1
            done += len(cells)
            seen(len(cells))
            out = None
            if node.op == "output":
                out = values[node.args[0]].cpu()
                out = out.reshape(*out.shape[:2], -1)
            yield cells, self.region_codes(codes), out

    def _behind(
        self, number: int, values: dict[fx.Node, Any], parents: np.ndarray, bits: np.ndarray
    ) -> dict[fx.Node, Any]:
        """The values that are still needed behind a call, for some cells after its cuts."""
        node = self.nodes[number]
        at = torch.from_numpy(parents).to(self.device)
        kept = [source for source in values if source not in self.ends[number]]
        z = values[node.args[0]][:, at]
        held = torch.from_numpy(bits).to(self.device).repeat(len(z), 1)
        shape = self.shapes[node]
        out = self.calls[node].apply(z.flatten(0, 1), held, shape).view(*z.shape[:2], *shape)
        found = {source: _map(values[source], lambda value: value[:, at]) for source in kept}
        found[node] = (out, out) if self.calls[node].places is not None else out
        return found

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """One operation on all points and cells: the traced one, on one sample, mapped over both axes."""
        if node.target is operator.getitem:
            whole, place = node.args
            return values[whole][place]  # type: ignore[index]
        sources = [source for source in node.all_input_nodes if source in values]

        def one(*tensors: Tensor) -> Any:
            inputs = dict(zip(sources, tensors, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: inputs.get(n, self.constants.get(n)))
            return node.target(*args, **kwargs)  # type: ignore[operator]

        lead = values[sources[0]].shape[:2]
        result = vmap(one)(*[values[source].flatten(0, 1) for source in sources])
        return _map(result, lambda value: value.view(*lead, *value.shape[1:]))

    def real(self, x: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, Tensor]:
        """What the network itself does at inputs (n, ...).

        For each ReLU-like call its bits and which are beyond doubt, both (n, units) bool; the outputs (n, outputs); the
        largest absolute value met by each input (n, 1).
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        wanted = {call.key for call in self.calls.values()}
        size = torch.zeros(len(x), 1, dtype=torch.float64, device=self.device)

        def visit(key: str, z: Tensor, kinks: Kinks) -> None:
            nonlocal size
            if key in wanted:
                values = torch.cat([(z - at).reshape(len(z), -1) for at in kinks.at], 1)
                size = torch.maximum(size, values.abs().amax(1, keepdim=True))
                found[key] = (values > 0).cpu(), (values.abs() > 1e-9 * size).cpu()

        with torch.no_grad():
            out = self._forward(x.to(self.device, torch.float64, copy=True), visit, Watch)
        return found, out.reshape(len(x), -1).cpu(), size.cpu()

    def check(self, inputs: Tensor, codes: RegionCodes, outputs: Tensor | None) -> None:
        """Compare cells with the network itself, at one input in each.

        Raises
        ------
        ValueError
            If gates or outputs differ beyond rounding: the network is not affine between the gates that were found.
        """
        calls = [call for call in self.calls.values() if call.kinks is not None]
        step = max(1, _WORKSPACE // self.largest)
        for i in range(0, len(inputs), step):
            found, out, size = self.real(inputs[i : i + step])
            part = codes.subset(torch.arange(i, min(i + step, len(inputs))))
            bad = False
            for call in calls:
                names = list(call.columns())
                if names[0] in codes.layers:
                    bits, sure = found[call.key]
                    own = torch.cat([part.layer(name) for name in names], 1).bool()
                    bad |= bool(((bits != own) & sure).any())
            if outputs is not None:
                own = outputs[i : i + step]
                near = (out - own).abs() <= 1e-6 * out.abs().amax(1, keepdim=True) + 1e-9 * size
                bad |= not bool(near.all())  # NaN is not near
            if bad:
                raise ValueError(
                    "the model is not affine between its gates: something in it is neither affine nor a ReLU-like "
                    "function or 2-D max pooling (a product of activations, a norm, an absolute value, control flow)"
                )

    def region_codes(self, codes: list[Tensor]) -> RegionCodes:
        """The packed codes of the first calls side by side."""
        layers: dict[str, slice] = {}
        start = 0
        for call in list(self.calls.values())[: len(codes)]:
            for name, width in call.columns().items():
                layers[name] = slice(start, start + width)
                start += width
        return RegionCodes(torch.cat(codes, 1), layers, packed=True)

    def _forward(self, x: Tensor, visit: Callable[[str, Tensor, Kinks], None], kind: type[Watch]) -> Tensor:
        with watched(self.model, visit, kind):
            return first_tensor(functional_call(self.model, self.tensors, (x,)), "output")


class _TracingWatch(Watch):  # type: ignore[no-untyped-call]
    """Also names max poolings, and refuses what has no cells."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        if self.running and name == _POOL:
            where = self.running[-1][0]
            self.calls[f"{where}#pool"] += 1
            number = self.calls[f"{where}#pool"] - 1
            self.visit(f"{where}#pool{number}" if number else f"{where}#pool", args[0], Kinks((), (), ()))
        elif self.running and (name in _SMOOTH or "max_pool" in name):
            what = "is not supported here" if "max_pool" in name else "is not piecewise affine"
            where = f"layer {self.running[-1][0]!r}" if self.running[-1][0] else "the model"
            raise ValueError(
                f"{where} calls {name.strip('_')}, which {what}: there are no exact cells (local_complexity needs "
                "none); a softmax at the end can be left off"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


def _map(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(f, value)) if isinstance(value, tuple | list) else f(value)


def _places(func: Any, args: Any) -> Tensor:
    """For a max pooling: where the entries of each window are in the flat image, (windows, entries), -1 for padding."""
    names = [argument.name for argument in func._schema.arguments]
    given = {"stride": [], "padding": 0, "dilation": 1, "ceil_mode": False, **dict(zip(names, args, strict=False))}
    kernel, stride, padding, dilation = (_pair(given[k]) for k in ("kernel_size", "stride", "padding", "dilation"))
    stride = stride or kernel
    if given["ceil_mode"]:
        raise ValueError("max pooling with ceil_mode=True has no exact cells here: pad the image instead")
    places = []
    for side, size, step, pad, gap in zip(args[0].shape[2:], kernel, stride, padding, dilation, strict=True):
        count = (side + 2 * pad - gap * (size - 1) - 1) // step + 1
        at = torch.arange(count)[:, None] * step - pad + torch.arange(size) * gap
        places.append(torch.where((at >= 0) & (at < side), at, -1))
    rows, columns = places[0][:, None, :, None], places[1][None, :, None, :]
    flat = torch.where((rows >= 0) & (columns >= 0), rows * args[0].shape[3] + columns, -1)
    return flat.flatten(2).flatten(0, 1)


def _pair(value: Any) -> tuple[int, ...]:
    items = [value] if isinstance(value, int) else list(value)
    return tuple(items * 2 if len(items) == 1 else items)
