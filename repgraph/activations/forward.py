"""One pass of a model over batches, with hooks, that leaves no trace in the model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations.batches import Batch, example_inputs, model_device, model_dtype, to_device
from repgraph.activations.gates import Kinks, Watch, watched
from repgraph.activations.layers import INPUTS, call_key

Forward = Callable[[nn.Module, object], object]
Visit = Callable[[str, nn.Module, Tensor, Batch], None]
SeeGate = Callable[[str, Tensor, Kinks, Batch], None]


class Enough(BaseException):
    """What a visitor raises when it wants nothing more of a forward pass; no handler of a model's own takes it."""


def run(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    visit: Visit,
    *,
    gates: SeeGate | None = None,
    forward: Forward | None = None,
    passes: int = 0,
    progress: str | None = None,
    total: int | None = None,
) -> Generator[Batch]:
    """Run the model over the batches in eval mode and yield each batch when it is through.

    Every call of a module in `modules` reaches ``visit(key, module, output, batch)`` inside the forward pass, before a
    later in-place operation can change the output. The second call of a module within one forward pass has the key
    "name#1", the third "name#2".

    ReLU-like calls reach ``gates(key, z, kinks, batch)`` with their input z, before they are computed.
    `passes` counts the passes over the same data so far. Later ones draw other random numbers than the first, so that a
    shuffling loader cannot repeat itself unseen.
    A visitor may raise `Enough` to end the forward pass of a batch where it is.
    `progress` is the description of a progress bar.
    """
    device, dtype = model_device(model), model_dtype(model)
    calls: Counter[str] = Counter()
    current: list[Batch] = []
    last = ""
    watch: Watch | None = None

    def see_layer(name: str, module: nn.Module, value: object) -> None:
        nonlocal last
        key = last = call_key(name, calls)
        if watch is not None:
            watch.paused = True  # what is done with an output is not the model's
        visit(key, module, first_tensor(value, key), current[0])
        if watch is not None:
            watch.paused = False

    def see(key: str, z: Tensor, kinks: Kinks) -> None:
        nonlocal last
        last = key
        assert gates is not None
        gates(key, z, kinks, current[0])

    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        for name, module in modules.items():
            stack.enter_context(_removed(listen(name, module, see_layer)))
        if passes:
            reseed(passes)
        bar = stack.enter_context(
            tqdm(desc=progress, total=total, unit="batch", disable=not progress, delay=1, leave=False)
        )
        for number, batch in enumerate(batches):
            calls.clear()
            current[:] = [batch]
            last = ""
            try:
                with torch.no_grad(), watched(model, see, Watch) if gates is not None else nullcontext() as watch:
                    if forward is not None:
                        forward(model, to_device(batch.raw, device, copy=True))
                    else:
                        call_model(model, to_device(batch.inputs, device, dtype, copy=True))
            except Enough:
                pass
            except Exception as error:
                error.add_note(
                    f"repgraph: batch {number} of shape {_shapes(batch.inputs)}; last layer to run: {last or 'none'}"
                )
                raise
            bar.update()
            yield batch


def listen(
    name: str, module: nn.Module, see: Callable[[str, nn.Module, object], None]
) -> torch.utils.hooks.RemovableHandle:
    """Hook `see` to the outputs of a module, or, where "inputs:" is before its name, to its inputs."""
    if name.startswith(INPUTS):
        return module.register_forward_pre_hook(lambda m, args, kwargs: see(name, m, (args, kwargs)), with_kwargs=True)
    return module.register_forward_hook(lambda m, _, output: see(name, m, output))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards modes and buffers are as they were, also after an exception.

    Flags are set one by one, since a model may override `train`.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {module: dict(module._buffers) for module in modes}
    copies = {id(b): b.clone() for own in buffers.values() for b in own.values() if b is not None}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, own in buffers.items():
            if not isinstance(module, torch.jit.ScriptModule):  # whose buffers cannot be replaced
                module._buffers.clear()
                module._buffers.update(own)
            for buffer in own.values():
                if buffer is not None and not torch.equal(buffer, copies[id(buffer)]):
                    buffer.data.copy_(copies[id(buffer)])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Afterwards the random states of torch, NumPy and Python are as they were, also after an exception."""
    cpu, own = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    legacy = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(own)
        np.random.set_state(legacy)  # noqa: NPY002


@kept_random_state()
def run_example(model: nn.Module, example: object, within: AbstractContextManager[object] | None = None) -> object:
    """What the model gives for one batch, in eval mode without gradients; it comes out as it went in.

    `within` is entered around the forward pass alone.
    """
    inputs = to_device(example_inputs(example), model_device(model), model_dtype(model), copy=True)
    with untouched(model), torch.no_grad(), within or nullcontext():
        return call_model(model, inputs)


def call_model(model: nn.Module, inputs: object) -> object:
    """A dict goes to the model by keyword."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def reseed(passes: int) -> None:
    """Random numbers for a later pass over the data: other ones than the first pass drew."""
    torch.manual_seed(torch.initial_seed() + passes & 0x7FFFFFFFFFFFFFFF)
    np.random.seed(passes)  # noqa: NPY002
    random.seed(passes)


def first_tensor(output: object, key: str) -> Tensor:
    """The tensor that stands for a layer's output: itself, or the first one of a tuple, dict or dataclass.

    Raises
    ------
    ValueError
        If there is none, or it is a nested or sparse tensor.
    """
    found = _first(output)
    if found is None:
        raise ValueError(f"layer {key!r} gives no tensor but {type(output).__name__}: choose a layer inside it")
    if found.is_nested or found.layout is not torch.strided:
        raise ValueError(
            f"layer {key!r} gives a nested or sparse tensor, expected a dense one "
            "(enable_nested_tensor=False in torch's TransformerEncoder)"
        )
    return found.detach()


def _first(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    items: Iterable[object] = ()
    if isinstance(output, Mapping):
        items = output.values()
    elif isinstance(output, tuple | list):
        items = output
    elif is_dataclass(output):
        items = (getattr(output, item.name) for item in fields(output))
    return next((found for found in map(_first, items) if found is not None), None)


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _shapes(inputs: object) -> object:
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape)
    if isinstance(inputs, Mapping):
        return {key: _shapes(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return [_shapes(value) for value in inputs]
    return type(inputs).__name__
