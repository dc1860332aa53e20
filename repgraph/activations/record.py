"""capture and stream: run a model over data and keep what its layers give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from repgraph.activations.container import Activations
from repgraph.activations.copies import Copies
from repgraph.activations.files import Writer
from repgraph.activations.forward import Forward, kept_random_state
from repgraph.activations.layers import Select
from repgraph.activations.memory import Passes, as_bytes, fingerprint, groups_within
from repgraph.activations.recording import Recording
from repgraph.activations.reduce import ChannelAxis, Reduce, check_choice
from repgraph.activations.shards import shard_settings
from repgraph.activations.spec import readable
from repgraph.labels import Labels


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
    shard: tuple[int, int] | None = None,
    batch_size: int = 64,
    channel_axis: ChannelAxis = None,
    progress: bool = True,
) -> Activations:
    """Run a model over data and keep the outputs of its layers, on the CPU, in the type in which they come.

    From a GPU they are copied to pinned memory while the model goes on, at most 256 MiB at a time.

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
        "inputs:layer1.0" (or another choice behind "inputs:") takes what goes into a module: its first tensor argument.
        "gates" takes which side of its kink each ReLU-like unit is on, wherever the model calls one, as a module or a
        function: packed bits (n, ceil(D / 8)), uint8, for D units; "gates:layer1.*" some of them. They are named
        "gates:" and the module ("#1" behind it for a second call), or "gates:name#relu0", "gates:name#relu1", ... for
        calls of functions inside a module ("gates:#relu0" in the model itself). A bit is z > kink: 0, or the threshold;
        the upper kink of hardtanh, ReLU6, hardsigmoid and clamp(0, high) has "/upper" behind it. `reduce` leaves gates
        alone.
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
        Write the layers to files in this new or empty folder instead, in one pass; they are mapped when read, and
        checked against their checksums (see `Activations.load`). What a killed capture left there is replaced.
    forward
        ``forward(model, batch)`` in place of the call described above; the batch is on the model's device.
    sample_ids
        Distinct ids in place of positions. They declare that samples of two captures belong together even if the
        inputs differ (clean and altered).
    samples
        The first so many samples, or the positions of those to take (kept in the order of the data).
    shard
        (i, m), 0 <= i < m: take the i-th of m runs of these samples, as equal in length as can be, so that m processes
        or machines share the work; `join_shards` puts the parts together. `labels`, `sample_ids` and `samples` are
        those of all shards. Of a Dataset, only the samples of the shard are loaded; batches are read up to its end. The
        data must come in the same order every time, which is checked by reading the first batch again.
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
        dropout, noise) or a later pass sees other samples; if labels or ids do not fit, or there are fewer
        samples than shards. The message names the layer.
    TypeError
        If the model or the data are of a kind that cannot be read.
    OSError
        If a layer cannot be written to the folder (a full disk); nothing of the capture is left there.

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
    recording = Recording(model, data, layers, reduce, channel_axis, forward, batch_size, samples, progress, shard)
    source, specs = recording.source, recording.specs
    own_labels = None if labels is None else source.pick(labels, "labels")
    ids = source.positions.numpy() if sample_ids is None else source.pick(_id_labels(sample_ids), "sample_ids")
    budget = as_bytes(memory)
    settings: dict[str, object] = {
        "model": type(recording.model).__name__,
        "layers": _described(layers),
        "reduce": reduce if reduce is None or isinstance(reduce, str) else getattr(reduce, "__name__", "function"),
    }
    if shard is not None:
        settings["shard"] = shard_settings(shard, source.of_all_shards, fingerprint(recording.model))
    layer_map: Mapping[str, Tensor]
    if folder is not None:
        with Writer(folder, specs, source.n) as writer:
            with Copies(writer.append) as copies:
                recording.run(list(specs), copies)
            if shard is not None:
                recording.check_order()
            found = own_labels if own_labels is not None else recording.labels
            hashes = None if sample_ids is not None else recording.hashes
            writer.finish(found, np.asarray(ids), hashes, settings)
        return Activations.load(folder)
    groups = groups_within(specs, source.n, budget)
    passes = Passes(recording, groups)
    passes.read(0)
    if len(groups) > 1 or shard is not None:
        recording.check_order()
    if len(groups) > 1:
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
    f: Callable[[Tensor], Tensor] | Mapping[str, Callable[[Tensor], Tensor]],
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
        Called with one batch of one layer's output (b, ...), on the model's device; returns a tensor. It must not
        change its argument. Or layer name -> such a function.
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
        As `capture`, or if f returns no tensor or names other layers, or `combine` is unknown.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    >>> stream(model, torch.ones(5, 3), lambda x: x.mean(0), "1", combine="mean")["1"].shape
    torch.Size([4])
    """
    check_choice(reduce)
    if combine not in ("concat", "sum", "mean"):
        raise ValueError(f"combine must be 'concat', 'sum' or 'mean', got {combine!r}")
    recording = Recording(model, data, layers, reduce, channel_axis, forward, batch_size, samples, progress)
    kept: dict[str, list[Tensor]] = {name: [] for name in recording.specs}
    if not callable(f) and (missing := [name for name in recording.specs if name not in f]):
        raise ValueError(f"f has no function for layer {missing[0]!r}")

    def keep(name: str, x: Tensor) -> None:
        value = f(x) if callable(f) else f[name](x)
        if not isinstance(value, Tensor):
            raise ValueError(f"layer {name!r}: f must return a tensor, got {type(value).__name__}")
        if combine == "concat":
            if value.ndim == 0:
                raise ValueError(f"layer {name!r}: f must return a tensor with rows to concatenate, got a number")
            # A view would keep the whole output alive, and a later in-place operation could change it.
            kept[name].append(value.clone() if _shares(value, x) else value)
            return
        if combine == "mean":
            value = (value if value.is_floating_point() else value.float()) * (len(x) / recording.source.n)
        if kept[name] and kept[name][0].shape != value.shape:
            shapes = f"{tuple(kept[name][0].shape)} and then {tuple(value.shape)}"
            raise ValueError(f"layer {name!r}: f must return one shape for every batch, got {shapes}")
        kept[name] = [kept[name][0] + value] if kept[name] else [value.clone()]

    recording.run(list(recording.specs), keep)
    return {name: torch.cat(values) if combine == "concat" else values[0] for name, values in kept.items()}


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
