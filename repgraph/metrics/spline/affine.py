"""The affine maps of a network whose gates are held, from a few points pushed through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from repgraph.activations.batches import model_device
from repgraph.activations.forward import first_tensor
from repgraph.activations.gates import Kinks, Watch, watched
from repgraph.activations.layers import unwrap
from repgraph.metrics.spline.codes import refuse_training

_SMOOTH = {
    "gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "sigmoid", "tanh", "hardswish", "log_sigmoid_forward",
    "_softmax", "_log_softmax", "native_layer_norm", "native_group_norm", "exp", "log", "sqrt", "rsqrt", "pow", "erf",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
}  # fmt: skip
_POOLS = {"max_pool2d_with_indices", "max_pool2d"}


@dataclass(frozen=True, slots=True)
class Call:
    """One call that cuts cells: a ReLU-like function of z, or a max pooling with windows of some entries."""

    key: str
    units: int
    """Gates of the call (units times kinks), or windows times entries."""
    kinks: Kinks | None = None
    entries: int = 0
    """Entries of a window, 0 for gates."""

    def columns(self) -> dict[str, int]:
        """Names of the gates and how many each has; one for each entry of each window in a max pooling."""
        if self.kinks is None:
            return {self.key: self.units}
        names = self.kinks.keys(self.key)
        return dict.fromkeys(names, self.units // len(names))


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass at the wanted call."""


class _HeldWatch(Watch):  # type: ignore[no-untyped-call]
    """Also sees max poolings, and refuses what has no cells."""

    pool: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        if self.running and name in _POOLS:
            return self.pool(self._pool_key(), func, args, kwargs or {})
        if self.running and (name in _SMOOTH or "max_pool" in name):
            what = "is not supported here" if "max_pool" in name else "is not piecewise affine"
            where = f"layer {self.running[-1][0]!r}" if self.running[-1][0] else "the model"
            raise ValueError(
                f"{where} calls {name.strip('_')}, which {what}: there are no exact cells (local_complexity needs "
                "none); a softmax at the end can be left off"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _pool_key(self) -> str:
        name = self.running[-1][0]
        self.calls[f"{name}#pool"] += 1
        number = self.calls[f"{name}#pool"] - 1
        return f"{name}#pool{number}" if number else f"{name}#pool"


class HeldNetwork:
    """A network in float64 in which the gates of each input row can be held at given bits.

    Parameters
    ----------
    model
        In eval mode. It is left as it is: float64 copies of its parameters stand in for the time of a pass.
    example
        One input, without batch axis.

    Raises
    ------
    ValueError
        If the model is in train mode, has no gates, calls a function that is not piecewise affine, or the input is
        not of a floating type.
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
        self.calls: list[Call] = []
        self.largest = 1
        """Most numbers per input row at any call."""
        self.outputs = self._probe(example[None]).shape[1]

    def _probe(self, x: Tensor) -> Tensor:
        def gate(key: str, z: Tensor, kinks: Kinks) -> None:
            if len(z) != len(x):
                raise ValueError(f"gate {key!r} has shape {tuple(z.shape)} for {len(x)} samples: its first axis must "
                                 "be the batch")  # fmt: skip
            self.calls.append(Call(key, z[0].numel() * len(kinks.at), kinks))

        def pool(key: str, func: Any, args: Any, kwargs: Any) -> Any:
            entries = len(_window_places(func, args, kwargs)[0])
            found = func(*args, **kwargs)
            values = found[0] if isinstance(found, tuple) else found
            self.calls.append(Call(key, values[0].numel() * entries, None, entries))
            return found

        out = self._run(x, gate, pool)
        if not self.calls:
            raise ValueError("the model calls no ReLU-like function: its input space is one cell")
        self.largest = max(call.units for call in self.calls)
        return out

    def forms(self, points: Tensor, held: Sequence[Tensor]) -> Tensor:
        """Values at P points of what comes after the held gates: of the next call, or of the outputs.

        Parameters
        ----------
        points
            (P, *input shape); three points of a plane or two of a line make an affine map.
        held
            For the first calls the bits of c cells, (c, units) bool each.

        Returns
        -------
        Tensor
            (P, c, units) float64 on the CPU: z - kink for each gate; the entries of each window, (P, c, windows,
            entries), -inf outside the image; or the outputs (P, c, outputs).
        """
        rows, cells = len(points), len(held[0]) if held else 1
        batch = points[:, None].expand(rows, cells, *points.shape[1:]).flatten(0, 1)
        reached: list[Tensor] = []
        bits = iter(held)
        calls = iter(self.calls)

        def bits_of(call: Call) -> Tensor | None:
            own = next(bits, None)
            return None if own is None else own.to(self.device).repeat(rows, 1)

        def gate(key: str, z: Tensor, kinks: Kinks) -> Tensor:
            own = bits_of(next(calls))
            if own is None:
                reached.append(torch.cat([(z - at).flatten(1) for at in kinks.at], 1))
                raise _Stop
            parts = own.tensor_split(len(kinks.at), 1)
            return kinks.apply(z, [part.view(z.shape) for part in parts])

        def pool(key: str, func: Any, args: Any, kwargs: Any) -> Any:
            call = next(calls)
            z = args[0]
            places, shape = _window_places(func, args, kwargs)
            own = bits_of(call)
            # (b, channels, windows, entries); place -1 is padding
            values = nn.functional.pad(z.flatten(2), (0, 1), value=-torch.inf)[:, :, places.T]
            if own is None:
                reached.append(values.flatten(1, 2))
                raise _Stop
            chosen = own.view(values.shape).to(torch.uint8).argmax(3, keepdim=True)
            out = values.gather(3, chosen).reshape(*z.shape[:2], *shape)
            return (out, torch.zeros_like(out, dtype=torch.int64)) if "indices" in func.overloadpacket.__name__ else out

        with suppress(_Stop):
            reached.append(self._run(batch, gate, pool))
        return reached[0].reshape(rows, cells, *reached[0].shape[1:]).cpu()

    def codes(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What the network really does at inputs (n, ...): for each call its bits and where they are beyond doubt.

        Both are (n, units) bool; the outputs (n, outputs) come second. In max poolings nothing is beyond doubt.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def gate(key: str, z: Tensor, kinks: Kinks) -> None:
            values = torch.cat([(z - at).flatten(1) for at in kinks.at], 1)
            sure = values.abs() > 1e-9 * values.abs().amax(1, keepdim=True)
            found.append(((values > 0).cpu(), sure.cpu()))

        def pool(key: str, func: Any, args: Any, kwargs: Any) -> Any:
            nothing = torch.zeros(len(x), self.calls[len(found)].units, dtype=torch.bool)
            found.append((nothing, nothing))
            return func(*args, **kwargs)

        out = self._run(x, gate, pool)
        return found, out.cpu()

    def chunks(self, cells: int, rows: int) -> Iterator[slice]:
        """The cells in parts whose values take about 64 MiB at the widest call."""
        step = max(1, 2**23 // (rows * self.largest))
        for start in range(0, cells, step):
            yield slice(start, start + step)

    def _run(self, x: Tensor, gate: Any, pool: Any) -> Tensor:
        with torch.no_grad(), watched(self.model, gate, _HeldWatch) as watch:
            watch.pool = pool
            out = functional_call(self.model, self.tensors, (x.to(self.device, torch.float64),))
        return first_tensor(out, "output").flatten(1)


def _window_places(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, tuple[int, int]]:
    """For a max pooling: where the entries of each window are in the flat image, (entries, windows), -1 for padding."""
    defaults = {"stride": [], "padding": 0, "dilation": 1, "ceil_mode": False}
    names = [argument.name for argument in func._schema.arguments]
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    kernel, stride, padding, dilation = (_pair(given[k]) for k in ("kernel_size", "stride", "padding", "dilation"))
    stride = stride or kernel
    z = args[0]
    if z.ndim != 4:
        raise ValueError(f"max pooling must be over (b, c, h, w), got shape {tuple(z.shape)}")
    height, width = z.shape[2:]
    across = [
        (side + 2 * pad - gap * (size - 1) - 1) // step + 1
        for side, size, step, pad, gap in zip((height, width), kernel, stride, padding, dilation, strict=True)
    ]
    if given["ceil_mode"]:
        raise ValueError("max pooling with ceil_mode=True has no exact cells here: pad the image instead")
    rows, columns = (
        torch.arange(count)[:, None] * step - pad + torch.arange(size) * gap
        for count, size, step, pad, gap in zip(across, kernel, stride, padding, dilation, strict=True)
    )
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[None, :, None, :]
    places = torch.where(inside, rows[:, None, :, None] * width + columns[None, :, None, :], -1)
    return places.flatten(2).flatten(0, 1).T.to(z.device), (across[0], across[1])


def _pair(value: Any) -> tuple[int, ...]:
    items = [value] if isinstance(value, int) else list(value)
    return tuple(items * 2 if len(items) == 1 else items)
