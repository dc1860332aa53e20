"""capture and stream: run a model over data and keep what its layers give."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from hashlib import blake2b
from html import escape
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from repgraph.activations.batches import Batch, Source, model_dtype, to_device
from repgraph.activations.container import Activations, Spec, Writer, readable
from repgraph.activations.forward import Forward, kept_random_state, reseed, run
from repgraph.activations.layers import Select, choose, unwrap
from repgraph.activations.reduce import ChannelAxis, Reduce, check_choice, reduced
from repgraph.labels import Labels

_PROBE = 4096  # numbers compared per layer between two runs of the first batch


@kept_random_state()
def capture(
    model: nn.Module,
    data: object,
    layers: Select = "blocks",
    *,
    labels: Labels | None = None,
    reduce: Reduce = None,
    memory: int | str | None = None,
    folder: str | Path | None = None,
    forward: Forward | None = None,
    sample_ids: Sequence[object] | np.ndarray | None = None,
    samples: int | Sequence[int] | Tensor | None = None,
    batch_size: int = 64,
    channel_axis: ChannelAxis = None,
    progress: bool = True,
) -> Activations:
    """Run a model over data and keep the outputs of its layers, on the CPU, in the type in which they come.

    The model runs in eval mode without gradients and comes out as it went in, also after an exception: hooks, modes,
    buffers and random states are restored.

    Parameters
    ----------
    model
        Any nn.Module, on any device; it is not moved. DataParallel and torch.compile wrappers are looked through.
    data
        A tensor or array (n, ...), a tuple (inputs, labels), a dict of such, a map-style Dataset, or an iterable of
        batches (DataLoader, list, generator). Of a batch that is a tuple the first element is the input and the last
        the labels; a dict goes to the model by keyword, its 1-D "labels" taken out first. Floating inputs take the type
        of the model's parameters.
    layers
        "blocks" (residual blocks and stem, transformer blocks, convs of a plain chain), "leaves", a name, a wildcard
        ("layer1.*"), a module type, a predicate (name, module) -> bool, or a list of names, wildcards and types.
    labels
        Labels in the order of the data; they replace those of the batches.
    reduce
        None keeps each output whole. "mean" averages over image positions or tokens, "cls" and "last" take a token
        ("mean" and both of these heed an attention mask, padded on either side); or a function of one batch's output.
    memory
        Bytes of activations held at once, as a number or text ("2 GB"); half of the free memory by default. Where the
        layers need more, reading a layer runs the model again for as many layers as fit: the data must then come in
        the same order every time, which is checked, and the model must not change.
    folder
        Write the layers to files in this new or empty folder instead, in one pass; they are mapped when read.
    forward
        ``forward(model, batch)`` in place of the call described above; the batch is on the model's device.
    sample_ids
        Distinct ids in place of positions. They declare that samples of two captures belong together even if the
        inputs differ (clean and altered).
    samples
        The first so many samples, or the positions of those to take (kept in the order of the data).
    batch_size
        Samples per batch where the data come unbatched.
    channel_axis
        For `reduce`: the channel axis where a layer's output does not tell it, as a number for all layers or by name
        or wildcard. torch's own conv, norm and pooling layers have it at 1.
    progress
        Show a progress bar on work of more than a second.

    Returns
    -------
    Activations
        Layer name -> tensor (n, ...), in execution order, with labels, sample ids and input hashes. The second call of
        a module within a forward pass is "name#1", the third "name#2".

    Raises
    ------
    ValueError
        If a layer is not found, never runs, gives no tensor, a first axis that is not the batch, other shapes in other
        batches, or NaN; if a layer needs more than the memory; if two runs of the first batch differ (functional
        dropout, noise) or a later pass sees other samples; if labels or ids do not fit. The message names the layer.
    TypeError
        If the model or the data are of a kind that cannot be read.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> acts = capture(model, (torch.ones(5, 3), [0, 1, 0, 1, 0]), "leaves")
    >>> acts
    Activations(n=5, layers=3, 200 B in memory)
      0  4  float32
      1  4  float32
      2  2  float32
    """
    check_choice(reduce)
    recording = _Recording(model, data, layers, reduce, channel_axis, forward, batch_size, samples, progress)
    source, specs = recording.source, recording.specs
    own_labels = None if labels is None else source.pick(labels, "labels")
    ids = (
        source.positions.numpy() if sample_ids is None else source.pick(_id_labels(sample_ids), "sample_ids")
    )
    budget = _bytes(memory)
    settings: dict[str, object] = {
        "model": type(recording.model).__name__,
        "layers": _described(layers),
        "reduce": reduce
        if reduce is None or isinstance(reduce, str)
        else getattr(reduce, "__name__", "function"),
    }
    layer_map: Mapping[str, Tensor]
    if folder is not None:
        with Writer(folder, specs, source.n) as writer:
            recording.run(list(specs), writer.append)
            found = own_labels if own_labels is not None else recording.labels
            hashes = None if sample_ids is not None else recording.hashes
            writer.finish(found, np.asarray(ids), hashes, settings)
        return Activations.load(folder)
    groups = _groups(specs, source.n, budget)
    passes = _Passes(recording, groups)
    passes.read(0)
    if len(groups) > 1:
        recording.check_order()
        layer_map, place = passes, f"of which {readable(budget)} in memory at once, in {len(groups)} passes"
    else:
        layer_map, place = passes.held, "in memory"
    return Activations(
        layer_map,
        own_labels if own_labels is not None else recording.labels,
        np.asarray(ids),
        specs=specs,
        input_hashes=None if sample_ids is not None else recording.hashes,
        settings=settings,
        place=place,
        n=source.n,
    )


@kept_random_state()
def stream(
    model: nn.Module,
    data: object,
    f: Callable[[Tensor], Tensor],
    layers: Select = "blocks",
    *,
    combine: Literal["concat", "sum", "mean"] = "concat",
    reduce: Reduce = None,
    forward: Forward | None = None,
    samples: int | Sequence[int] | Tensor | None = None,
    batch_size: int = 64,
    channel_axis: ChannelAxis = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Apply a function to each batch of each layer's output inside the pass, and keep only what it returns.

    Parameters
    ----------
    model, data, layers, reduce, forward, samples, batch_size, channel_axis, progress
        As in `capture`.
    f
        Called with one batch of one layer's output (b, ...), on the model's device; returns a tensor. It must not change
        its argument.
    combine
        "concat" joins the results along their first axis, "sum" adds them, "mean" averages them weighted by batch size
        (integers become float32).

    Returns
    -------
    dict of str to Tensor
        Layer name -> combined result, in execution order, on the device on which f returned it.

    Raises
    ------
    ValueError
        As `capture`, or if f returns no tensor or `combine` is unknown.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    >>> stream(model, torch.ones(5, 3), lambda x: x.mean(0), "1", combine="mean")["1"].shape
    torch.Size([4])
    """
    check_choice(reduce)
    if combine not in ("concat", "sum", "mean"):
        raise ValueError(f"combine must be 'concat', 'sum' or 'mean', got {combine!r}")
    recording = _Recording(model, data, layers, reduce, channel_axis, forward, batch_size, samples, progress)
    kept: dict[str, list[Tensor]] = {name: [] for name in recording.specs}

    def keep(name: str, x: Tensor) -> None:
        value = f(x)
        if not isinstance(value, Tensor):
            raise ValueError(f"layer {name!r}: f must return a tensor, got {type(value).__name__}")
        if combine == "concat":
            # A view would keep the whole output alive, and a later in-place operation could change it.
            kept[name].append(value.clone() if _shares(value, x) else value)
            return
        if combine == "mean":
            value = (value if value.is_floating_point() else value.float()) * (len(x) / recording.source.n)
        kept[name] = [kept[name][0] + value] if kept[name] else [value.clone()]

    recording.run(list(recording.specs), keep)
    return {name: torch.cat(values) if combine == "concat" else values[0] for name, values in kept.items()}


class LayerNames(list[str]):
    """Names of layers, shown with what they give."""

    def __init__(
        self, names: Sequence[str], kinds: Mapping[str, str], specs: Mapping[str, Spec], given: str
    ) -> None:
        super().__init__(names)
        self.kinds = dict(kinds)
        """Layer name -> class of the module."""
        self.specs = dict(specs)
        """Layer name -> shape of one sample's output and dtype; empty if no input could be told."""
        self.given = given
        """The input for which shapes and order hold."""

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (
                name,
                self.kinds[name],
                " x ".join(map(str, self.specs[name].shape)) if name in self.specs else "?",
            )
            for name in self
        ]

    def __repr__(self) -> str:
        wide = max((len(name) for name in self), default=0)
        kind = max((len(name) for name in self.kinds.values()), default=0)
        rows = [f"  {name:{wide}}  {what:{kind}}  {shape}" for name, what, shape in self._rows()]
        return "\n".join([f"{len(self)} layers, {self.given}", *rows])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows()
        )
        head = f"<caption>{len(self)} layers, {escape(self.given)}</caption>"
        return f"<table>{head}<tr><th>layer</th><th>class</th><th>output of a sample</th></tr>{rows}</table>"


@kept_random_state()
def layer_names(model: nn.Module, select: Select = "blocks", data: object = None) -> LayerNames:
    """Names of the layers that `capture` would take, in execution order, shown with their output shapes.

    Without data the order and the shapes are those for an assumed input, which the result's `given` names: the model's
    own `default_cfg` (timm) or `dummy_inputs` (Hugging Face), else the first layer's number of channels at 224, 64, 32
    or 28 pixels, its features, or eight token ids. It runs on fake tensors, which compute nothing. Where no assumed
    input fits, the names stand in order of registration, without shapes.

    Parameters
    ----------
    model
        Any nn.Module.
    select
        As `layers` in `capture`.
    data
        As in `capture`; its first batch is run through the model.

    Returns
    -------
    LayerNames
        A list of str that prints as a table.

    Raises
    ------
    ValueError
        As `capture`.

    Examples
    --------
    >>> layer_names(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3)))
    2 layers, for an assumed input of 3 x 224 x 224
      0  Conv2d  4 x 222 x 222
      2  Conv2d  8 x 220 x 220
    """
    model = unwrap(model)
    modules = choose(model, select)
    if data is not None:
        found = _Recording(model, data, select, None, None, None, 2, 2, progress=False)
        names, specs, given = list(found.specs), found.specs, "for the given data"
    else:
        names, specs, given = list(modules), {}, "in order of registration"
        for example in _assumed_inputs(model):
            with_shapes = _fake_shapes(model, modules, example)
            if with_shapes:
                names, specs = list(with_shapes), with_shapes
                given = f"for an assumed input of {_text(example)}"
                break
    kinds = {
        name: type(modules[name.split("#")[0]] if name.split("#")[0] in modules else modules[name]).__name__
        for name in names
    }
    return LayerNames(names, kinds, specs, given)


class _Recording:
    """A model, data and a choice of layers: tells what the layers give, then records some of them in a pass."""

    def __init__(
        self,
        model: nn.Module,
        data: object,
        layers: Select,
        reduce: Reduce,
        channel_axis: ChannelAxis,
        forward: Forward | None,
        batch_size: int,
        samples: int | Sequence[int] | Tensor | None,
        progress: bool,
    ) -> None:
        self.model = unwrap(model)
        self.modules = choose(self.model, layers)
        self.source = Source(data, batch_size, samples)
        self.reduce, self.channel_axis, self.forward, self.progress = reduce, channel_axis, forward, progress
        self.passes = 0
        self.labels: Tensor | np.ndarray | None = None
        self.hashes = torch.zeros(0, dtype=torch.int64)
        self._iterator: Iterator[Batch] | None = iter(self.source)
        self._first = next(self._iterator)
        self._probes: dict[str, Tensor] = {}
        self.specs = self._probe(layers)

    def _probe(self, layers: Select) -> dict[str, Spec]:
        """Run the first batch once, to see which layers run in which order and what they give."""
        specs: dict[str, Spec] = {}

        def look(key: str, module: nn.Module, x: Tensor, batch: Batch) -> None:
            value = self._value(key, module, x, batch)
            specs[key] = Spec(tuple(value.shape[1:]), value.dtype)
            self._probes[key] = _sample(value)

        with closing(run(self.model, self.modules, [self._first], look, forward=self.forward)) as batches:
            for _ in batches:
                pass
        items = [layers] if isinstance(layers, str) else [] if callable(layers) else list(layers)
        exact = [item for item in items if isinstance(item, str) and re.search(r"#\d+$", item)]
        silent = [name for name in self.modules if name not in specs]
        named = [name for name in (*silent, *exact) if name in items and name not in specs]
        if named or not specs:
            what = f"layer {named[0]!r} does" if named else "the chosen layers do"
            raise ValueError(
                f"{what} not run in a forward pass in eval mode; those that ran: {', '.join(specs) or 'none'}"
            )
        if exact:  # of a module that is meant by call, only the named calls
            meant = {item.split("#")[0] for item in exact} - set(items)
            specs = {
                key: spec for key, spec in specs.items() if key in exact or key.split("#")[0] not in meant
            }
        return specs

    def _value(self, key: str, module: nn.Module, x: Tensor, batch: Batch) -> Tensor:
        if x.ndim == 0 or len(x) != batch.size:
            raise ValueError(
                f"layer {key!r} gives shape {tuple(x.shape)} for a batch of {batch.size} samples: its first axis must be "
                "the batch (batch_first=True in torch's attention and recurrent layers)"
            )
        return reduced(
            x, self.reduce, mask=batch.mask, channel_axis=self.channel_axis, key=key, module=module
        )

    def run(
        self, names: Sequence[str], keep: Callable[[str, Tensor], None], description: str = "capture"
    ) -> None:
        """One pass that hands the batches of the named layers to `keep`, in order, and checks everything on the way."""
        wanted = set(names)
        modules = {
            name: m
            for name, m in self.modules.items()
            if any(key.split("#")[0] == name or key == name for key in wanted)
        }
        seen: set[str] = set()
        extremes: list[tuple[str, Tensor]] = []

        def visit(key: str, module: nn.Module, x: Tensor, batch: Batch) -> None:
            if key not in wanted:
                if key not in self._probes:
                    raise ValueError(
                        f"layer {key!r} runs at sample {batch.start}, but not in the first batch"
                    )
                return
            value = self._value(key, module, x, batch)
            spec = self.specs[key]
            if tuple(value.shape[1:]) != spec.shape:
                raise ValueError(
                    f"layer {key!r} gives shape {tuple(value.shape)} at sample {batch.start}, expected (b, "
                    f"{', '.join(map(str, spec.shape))}) as in the first batch: pass reduce='mean' or inputs of one size"
                )
            if value.is_floating_point() and value.numel():
                extremes.append((key, torch.stack(value.aminmax())))  # both are NaN where any entry is
            if batch.start == 0 and not _alike(_sample(value), self._probes[key], value.dtype):
                raise ValueError(
                    f"layer {key!r} differs between two runs of the first batch: the forward pass is random (functional "
                    "dropout, noise) even in eval mode"
                )
            seen.add(key)
            keep(key, value)

        first = self._iterator is not None
        batches = chain([self._first], self._iterator) if self._iterator is not None else iter(self.source)
        self._iterator = None
        passing = run(
            self.model,
            modules,
            batches,
            visit,
            forward=self.forward,
            passes=self.passes,
            progress=description if self.progress else None,
            total=self.source.num_batches,
        )
        self.passes += 1
        labels: list[Tensor | np.ndarray] = []
        hashes: list[Tensor] = []
        with closing(passing):
            for batch in passing:
                missing = wanted - seen
                if missing:
                    raise ValueError(
                        f"layer {min(missing)!r} does not run at sample {batch.start}, but in the first batch"
                    )
                _refuse_nan(extremes, batch)
                seen.clear()
                extremes.clear()
                hashes.append(batch.hashes())
                if not first:
                    self._compare(hashes[-1], batch)
                elif batch.labels is not None:
                    labels.append(batch.labels)
        if first:
            self.hashes = torch.cat(hashes)
            self.labels = _joined(labels, self.source.n)

    def _compare(self, hashes: Tensor, batch: Batch) -> None:
        differ = (hashes != self.hashes[batch.start : batch.start + batch.size]).nonzero()
        if len(differ):
            raise ValueError(
                f"data gave another sample {batch.start + int(differ[0])} in a later pass than in the first: several passes "
                "need a loader that does not shuffle and images without random augmentation; or raise memory=, or pass folder="
            )

    def check_order(self) -> None:
        """Compare the first batch of another reading with the first pass, before any later pass is needed."""
        reseed(self.passes)
        batch = next(iter(self.source))
        self._compare(batch.hashes(), batch)


class _Passes(Mapping[str, Tensor]):
    """Layers made when they are read: one pass over the data for each group of layers that fits the memory."""

    def __init__(self, recording: _Recording, groups: list[list[str]]) -> None:
        self.recording, self.groups = recording, groups
        self.held: dict[str, Tensor] = {}
        self.state = _fingerprint(recording.model) if len(groups) > 1 else b""

    @kept_random_state()
    def read(self, number: int) -> None:
        """Run the pass for one group; the group that was held is let go first."""
        recording, n = self.recording, self.recording.source.n
        self.held = {}
        if recording.passes and _fingerprint(recording.model) != self.state:
            raise ValueError(
                "the model has changed since capture, and these layers are made when they are read: capture again, raise "
                "memory= to keep all layers, or pass folder="
            )
        held = {
            name: torch.empty((n, *recording.specs[name].shape), dtype=recording.specs[name].dtype)
            for name in self.groups[number]
        }
        filled = dict.fromkeys(held, 0)

        def keep(name: str, x: Tensor) -> None:
            held[name][filled[name] : filled[name] + len(x)] = x
            filled[name] += len(x)

        label = f"capture {number + 1}/{len(self.groups)}" if len(self.groups) > 1 else "capture"
        recording.run(self.groups[number], keep, label)
        self.held = held

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.held:
            self.read(next(i for i, group in enumerate(self.groups) if name in group))
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.groups)

    def __len__(self) -> int:
        return sum(map(len, self.groups))


def _groups(specs: Mapping[str, Spec], n: int, budget: int) -> list[list[str]]:
    """Runs of consecutive layers that fit the budget, as few as possible."""
    largest = max(specs, key=lambda name: specs[name].nbytes)
    if n * specs[largest].nbytes > budget:
        raise ValueError(
            f"memory is {readable(budget)}, but layer {largest!r} alone needs {n * specs[largest].nbytes} bytes "
            f"({readable(n * specs[largest].nbytes)}) for {n} samples: raise memory= to that, pass folder=, reduce= or fewer samples"
        )
    groups: list[list[str]] = [[]]
    room = budget
    for name, spec in specs.items():
        if n * spec.nbytes > room:
            groups.append([])
            room = budget
        groups[-1].append(name)
        room -= n * spec.nbytes
    return groups


def _bytes(memory: int | str | None) -> int:
    """A memory budget in bytes; half of what is free by default."""
    if memory is None:
        free = psutil.virtual_memory().available
        limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
        if (
            limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max"
        ):  # a container's share
            free = min(free, int(text) - int(used.read_text()))
        return max(free // 2, 1)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([kMGT]?)(i?)B?\s*", memory, re.IGNORECASE)
        if not match:
            raise ValueError(f"memory must be a number of bytes or text like '2 GB', got {memory!r}")
        step = 1024 if match[3] else 1000
        return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))
    if isinstance(memory, bool) or memory < 1:
        raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
    return int(memory)


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, -(-len(flat) // _PROBE))].to(device="cpu", dtype=torch.float32, copy=True)


def _alike(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the rounding of a run; NaN is not judged here."""
    tolerance = 1e-3 if dtype.itemsize >= 4 else 5e-2
    scale = float(b.nan_to_num(0, 0, 0).abs().max()) if len(b) else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _refuse_nan(extremes: list[tuple[str, Tensor]], batch: Batch) -> None:
    """One look at the device for all layers of a batch."""
    if not extremes:
        return
    finite = torch.stack([pair.float().isfinite().all() for _, pair in extremes])
    if not bool(finite.all()):
        name = extremes[int((~finite).nonzero()[0])][0]
        raise ValueError(
            f"layer {name!r} gives NaN or infinite values among the {batch.size} samples from sample {batch.start} on"
        )


def _joined(labels: list[Tensor | np.ndarray], n: int) -> Tensor | np.ndarray | None:
    if sum(map(len, labels)) != n:
        return None
    if all(isinstance(part, Tensor) for part in labels):
        return torch.cat([torch.as_tensor(part) for part in labels])
    return np.concatenate([np.asarray(part) for part in labels])


def _id_labels(ids: Sequence[object] | np.ndarray) -> np.ndarray:
    array = np.asarray(ids)
    return array if array.dtype.kind in "iu" else array.astype(str)


def _described(layers: Select) -> object:
    if isinstance(layers, str):
        return layers
    if isinstance(layers, type) or callable(layers):
        return getattr(layers, "__name__", "predicate")
    return [_described(item) for item in layers]


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _fingerprint(model: nn.Module) -> bytes:
    """Digest of all parameters and buffers."""
    digest = blake2b(digest_size=16)
    for tensor in chain(model.parameters(), model.buffers()):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _assumed_inputs(model: nn.Module) -> Iterator[object]:
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if size:
        yield torch.zeros(2, *size)
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        yield dict(dummy)
    for m in model.modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            axes = len(m.kernel_size)
            for side in (224, 64, 32, 28) if axes == 2 else (32, 128):
                yield torch.zeros(2, m.in_channels, *[side] * axes)
            return
        if isinstance(m, nn.Linear):
            yield torch.zeros(2, m.in_features)
            yield torch.zeros(2, 8, m.in_features)
            return
        if isinstance(m, nn.Embedding):
            yield torch.zeros(2, 8, dtype=torch.int64)
            return


def _fake_shapes(model: nn.Module, modules: Mapping[str, nn.Module], example: object) -> dict[str, Spec]:
    """What the layers give for an example input, on fake tensors; empty if the model does not take it."""
    specs: dict[str, Spec] = {}

    def look(key: str, module: nn.Module, x: Tensor, batch: Batch) -> None:
        specs[key] = Spec(tuple(x.shape[1:]), x.dtype)

    def call(model: nn.Module, raw: object) -> object:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return model(**raw) if isinstance(raw, Mapping) else model(raw)

    try:
        example = to_device(example, None, model_dtype(model))
        for _ in run(model, modules, Source(example, 2, None), look, forward=call):
            pass
    except Exception:  # any model may refuse any guess, for any reason
        return {}
    return specs


def _text(example: object) -> str:
    if isinstance(example, Mapping):
        return "dummy_inputs"
    assert isinstance(example, Tensor)
    return " x ".join(map(str, example.shape[1:])) + ("" if example.is_floating_point() else " token ids")
