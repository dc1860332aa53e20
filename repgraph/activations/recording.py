"""One pass at a time over a model's layers, with every check on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from repgraph.activations.batches import Batch, Source
from repgraph.activations.forward import Enough, Forward, reseed, run
from repgraph.activations.gates import GATES, Kinks, choose_with_gates, matches, pack
from repgraph.activations.layers import Item, Select, choose, unwrap
from repgraph.activations.reduce import ChannelAxis, Reduce, channel_axis_of, reduced
from repgraph.activations.spec import Spec

_PROBE = 4096  # numbers compared per layer between two runs of the first samples
_PART = 256  # one in so many samples is run ahead
_FINE, _NAN = torch.tensor(0.0, device="cpu"), torch.tensor(torch.nan, device="cpu")


class Recording:
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
        shard: tuple[int, int] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.modules, items, self.patterns = choose_with_gates(self.model, layers)
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if nn.parameter.is_lazy(tensor) or tensor.is_meta:
                state = "is not initialized (lazy)" if nn.parameter.is_lazy(tensor) else "is on the meta device"
                raise ValueError(f"model cannot run: parameter {name!r} {state}")
        self.source = Source(data, batch_size, samples, whole_batch=forward is not None, shard=shard)
        self.reduce, self.channel_axis, self.forward, self.progress = reduce, channel_axis, forward, progress
        self.passes = 0
        self.labels: Tensor | np.ndarray | None = None
        self.hashes = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._iterator: Iterator[Batch] | None = iter(self.source)
        self._first = next(self._iterator)
        plain = forward is None and _plain(self.model)
        self._few = self._first.head(max(3, self.source.n // _PART | 1)) if plain else None  # odd, as widths rarely are
        """The first samples, run ahead to see what there is; None where the first batch is run twice instead."""
        self._probes: dict[str, Tensor] = {}
        self._axes: dict[tuple[str, int], int] = {}
        self.specs = self._probe(items)

    def _probe(self, items: Sequence[Item]) -> dict[str, Spec]:
        """Which layers run in which order and what they give, from a few samples or else from the first batch."""
        specs, gates = self._few_seen() or self._seen(self._first)
        check_found(self.patterns, gates)
        exact = [item for item in items if isinstance(item, str) and re.search(r"#\d+$", item)]
        silent = [name for name in self.modules if name not in specs]
        named = [name for name in (*silent, *exact) if name in items and name not in specs]
        if named or not specs:
            what = f"layer {named[0]!r} does" if named else "the chosen layers do"
            raise ValueError(
                f"{what} not run in a forward pass in eval mode; those that ran: {', '.join(specs) or 'none'}"
            )
        if exact:  # of a module that is meant by call, only the named calls
            others = [item for item in items if item not in exact]
            every = choose(self.model, others) if others else {}
            specs = {
                key: spec
                for key, spec in specs.items()
                if key in exact or key.split("#")[0] in every or spec.gates is not None
            }
        return specs

    def _few_seen(self) -> tuple[dict[str, Spec], list[str]] | None:
        """As `_seen`, of a few samples; None where they do not tell."""
        if self._few is None:
            return None
        try:
            specs, gates = self._seen(self._few)
            by_batch = any(self._few.size in spec.shape for spec in specs.values())  # perhaps (b, b)
            if not by_batch and all(name in specs for name in self.modules):
                return specs, gates
        # A model may take batches of one size alone; any other error comes again with the whole first batch.
        except Exception:
            pass
        self._few = None
        return None

    def _seen(self, batch: Batch, until: AbstractSet[str] = frozenset()) -> tuple[dict[str, Spec], list[str]]:
        """What the layers give for a batch, in the order in which they run, and all gates; keeps some numbers of each.

        The forward pass ends when all layers of `until` have run.
        """
        specs: dict[str, Spec] = {}
        all_gates: list[str] = []
        self._probes = {}

        def look(key: str, module: nn.Module, x: Tensor, batch: Batch) -> None:
            value = self._value(key, module, x, batch)
            specs[key] = Spec(tuple(value.shape[1:]), value.dtype)
            self._probes[key] = _sample(value)
            if until and until <= specs.keys():
                raise Enough

        def look_at_gates(key: str, z: Tensor, kinks: Kinks, batch: Batch) -> None:
            for name in kinks.keys(GATES + key):
                all_gates.append(name)
                if matches(name, self.patterns):
                    _check_batch(name, z, batch)
                    specs[name] = gate_spec(z)
                    self._probes[name] = _sample(z)
            if until and until <= specs.keys():
                raise Enough

        gates = look_at_gates if self.patterns else None
        with closing(run(self.model, self.modules, [batch], look, gates=gates, forward=self.forward)) as batches:
            for _ in batches:
                pass
        return specs, all_gates

    def _repeated(self, wanted: AbstractSet[str], until: AbstractSet[str] = frozenset()) -> str | None:
        """Run the few samples again; the first of the wanted layers that gives something else than at first."""
        assert self._few is not None
        before = self._probes
        try:
            self._seen(self._few, until)
            odd = (x for x in before if x in wanted and not _alike(self._probes.get(x), before[x]))
            return next(odd, None)
        finally:
            self._probes = before

    def _ends_early(self, wanted: AbstractSet[str]) -> bool:
        """Whether forward passes may end behind the last wanted layer, tried with the few samples."""
        if self._few is None:
            return False
        if self._repeated(wanted, wanted) is None and self._repeated(wanted, wanted) is None:
            return True
        self._repeated(wanted)  # a model that remembers something in between comes to its end again
        return False

    def _value(self, key: str, module: nn.Module, x: Tensor, batch: Batch) -> Tensor:
        _check_batch(key, x, batch)
        axis = self._axes.get((key, x.ndim), self.channel_axis)
        if isinstance(self.reduce, str) and x.ndim > 2 and (key, x.ndim) not in self._axes:
            axis = self._axes[key, x.ndim] = channel_axis_of(x, module, key, self.channel_axis)
        return reduced(x, self.reduce, mask=batch.mask, channel_axis=axis, key=key, module=module)

    def run(
        self,
        names: Sequence[str],
        keep: Callable[[str, Tensor], None],
        description: str = "capture",
        start: int = 0,
    ) -> None:
        """One pass that hands the batches of the named layers to `keep`, in order, and checks everything on the way.

        Later passes than the first may leave out the first `start` samples.
        """
        wanted = set(names)
        first = self._iterator is not None
        ends = not first and self._ends_early(wanted)
        with_gates = any(self.specs[name].gates is not None for name in (self.specs if first else names))
        modules = {  # the first pass sees all, for calls that the first batch has not
            name: m
            for name, m in self.modules.items()
            if first or any(key.split("#")[0] == name or key == name for key in wanted)
        }
        seen: set[str] = set()
        other: list[str] = []
        paused = False
        flaws: list[tuple[str, Tensor]] = []

        def visit(key: str, module: nn.Module, x: Tensor, batch: Batch) -> None:
            if paused:
                return
            if key not in wanted:
                if key not in self._probes:
                    raise ValueError(f"layer {key!r} runs at sample {batch.start}, but not in the first batch")
                return
            value = self._value(key, module, x, batch)
            spec = self.specs[key]
            if tuple(value.shape[1:]) != spec.shape:
                raise ValueError(
                    f"layer {key!r} gives shape {tuple(value.shape)} at sample {batch.start}, expected (b, "
                    f"{', '.join(map(str, spec.shape))}) as in the first batch: pass reduce='mean' or equal inputs"
                )
            if value.is_floating_point() and value.numel():
                flaws.append((key, _flaw(value)))
            if batch.start == 0 and not self._as_before(key, value):
                other.append(key)
            seen.add(key)
            keep(key, value)
            if ends and seen == wanted:
                raise Enough

        def see(key: str, z: Tensor, kinks: Kinks, batch: Batch) -> None:
            for name, bits in zip(kinks.keys(GATES + key), kinks.bits(z), strict=True):
                if name not in wanted:
                    if name not in self._probes and matches(name, self.patterns):
                        raise ValueError(f"layer {name!r} runs at sample {batch.start}, but not in the first batch")
                    continue
                _check_batch(name, z, batch)
                count, expected = math.prod(bits.shape[1:]), self.specs[name].gates
                if count != expected:
                    raise ValueError(
                        f"layer {name!r} has {count} units at sample {batch.start}, expected {expected} as in the "
                        "first batch: pass inputs of equal size"
                    )
                if z.numel():
                    flaws.append((name, _flaw(z)))
                if batch.start == 0 and not self._as_before(name, z):
                    other.append(name)
                seen.add(name)
                keep(name, pack(bits.reshape(len(bits), count)))
            if ends and seen == wanted:
                raise Enough

        batches = chain([self._first], self._iterator) if self._iterator is not None else self.source.batches(start)
        self._iterator = None
        passing = run(
            self.model,
            modules,
            batches,
            visit,
            gates=see if with_gates else None,
            forward=self.forward,
            passes=self.passes,
            progress=description if self.progress else None,
            total=None if start else self.source.num_batches,
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
                if other and self._few is not None:  # rows may depend on one another: the same few tell
                    paused = True
                    other = [name for name in [self._repeated(wanted)] if name]
                    paused = False
                if other:
                    raise _random(other[0])
                _refuse_nan(flaws, batch)
                seen.clear()
                flaws.clear()
                hashes.append(batch.hashes())
                if not first:
                    self._compare(hashes[-1], batch)
                elif batch.labels is not None:
                    labels.append(batch.labels)
        if first:
            self.hashes = torch.cat(hashes)
            self.labels = _joined(labels, self.source.n)

    def _as_before(self, key: str, x: Tensor) -> bool:
        """Whether a layer gives for the first batch, or the few samples in it, what it gave for them at first."""
        return _alike(_sample(x if self._few is None else x[: self._few.size]), self._probes[key])

    def _compare(self, hashes: Tensor, batch: Batch) -> None:
        differ = (hashes != self.hashes[batch.start : batch.start + batch.size]).nonzero()
        if len(differ):
            raise ValueError(
                f"data gave another sample {batch.start + int(differ[0])} in a later pass than in the first: "
                "several passes, and shards, need a loader that does not shuffle and images without random "
                "augmentation; several passes are avoided by a larger memory= or by folder="
            )

    def check_order(self) -> None:
        """Compare the first batch of another reading with the first pass, before any later pass is needed."""
        reseed(self.passes)
        batch = next(iter(self.source))
        self._compare(batch.hashes(), batch)


def check_found(patterns: Sequence[str], gates: Sequence[str]) -> None:
    """Refuse a choice of gates that none of those called matches.

    Raises
    ------
    ValueError
        That lists the gates.
    """
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in gates):
            names = ", ".join(name.removeprefix(GATES) for name in gates)
            found = f"the gates are {names}" if gates else "none was called"
            which = "" if pattern == f"{GATES}*" else f" {pattern.removeprefix(GATES)!r}"
            raise ValueError(
                f"no gate{which} in the model: gates are those of ReLU, leaky and parametric ReLU, threshold, "
                f"hardtanh, ReLU6, hardsigmoid and clamp from 0; {found}"
            )


def gate_spec(z: Tensor) -> Spec:
    """What is kept of the gates of a call with input z (b, ...): one bit per unit, eight to a byte."""
    count = math.prod(z.shape[1:])
    return Spec((-(-count // 8),), torch.uint8, count)


def _check_batch(key: str, x: Tensor, batch: Batch) -> None:
    if x.ndim == 0 or len(x) != batch.size:
        raise ValueError(
            f"layer {key!r} gives shape {tuple(x.shape)} for a batch of {batch.size} samples: its first axis must "
            "be the batch (batch_first=True in torch's attention and recurrent layers; other gates can be chosen as "
            "'gates:name')"
        )


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, -(-len(flat) // _PROBE))].to(device="cpu", copy=True)


def _alike(a: Tensor | None, b: Tensor) -> bool:
    """Equal but for the rounding of a run; NaN is not judged here."""
    if a is None or a.shape != b.shape:
        return False
    tolerance = 1e-3 if b.dtype.itemsize >= 4 else 5e-2
    a, b = a.float(), b.float()
    scale = float(b.nan_to_num(0, 0, 0).abs().max()) if len(b) else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _random(key: str) -> ValueError:
    return ValueError(
        f"layer {key!r} differs between two runs of the first batch: the forward pass is random "
        "(functional dropout, noise) even in eval mode"
    )


def _plain(model: nn.Module) -> bool:
    """Whether nobody else looks at the calls of modules: no hooks of others, no wrapped or compiled forward."""
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or "forward" in vars(m)
        or hasattr(m, "_orig_mod")
        or isinstance(m, torch.jit.ScriptModule)
        or m._compiled_call_impl is not None
        for m in model.modules()
    )


def _flaw(x: Tensor) -> Tensor:
    """NaN if any entry is NaN or infinite, else 0."""
    if x.device.type == "cpu":
        finite = math.isfinite(x.sum().item()) or bool(x.isfinite().all())  # a sum of finite numbers may overflow
        return _FINE if finite else _NAN
    low, high = x.aminmax()  # both are NaN where any entry is
    return (low * 0 + high * 0).float()


def _refuse_nan(flaws: list[tuple[str, Tensor]], batch: Batch) -> None:
    """One look at the device for all layers of a batch."""
    if not flaws:
        return
    finite = torch.stack([flaw for _, flaw in flaws]).isfinite()
    if not bool(finite.all()):
        name = flaws[int((~finite).nonzero()[0])][0]
        raise ValueError(
            f"layer {name!r} gives NaN or infinite values among the {batch.size} samples from sample {batch.start} on"
        )


def _joined(labels: list[Tensor | np.ndarray], n: int) -> Tensor | np.ndarray | None:
    if sum(map(len, labels)) != n:
        return None
    if all(isinstance(part, Tensor) for part in labels):
        return torch.cat([torch.as_tensor(part) for part in labels])
    return np.concatenate([np.asarray(part) for part in labels])
