"""Data in every form users hold it, as batches: inputs, labels, attention mask, one content hash per sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Integral
from typing import TypeGuard

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset

from repgraph.activations.hashes import content_hashes
from repgraph.activations.shards import shard_rows
from repgraph.labels import Labels, as_labels


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch, cut down to the samples that are wanted."""

    raw: object
    """The batch as the data gave it."""
    inputs: object
    """What goes into the model: a tensor, or a dict that is passed by keyword."""
    labels: Tensor | np.ndarray | None
    mask: Tensor | None
    """Attention mask (b, T), where the batch is a dict that has one."""
    size: int
    """Number of samples b."""
    start: int
    """Number of wanted samples before this batch."""
    seen: object
    """What the hashes cover: the inputs, or the whole batch where the user's own `forward` reads it."""

    def hashes(self) -> Tensor:
        """One 64-bit content hash per sample, (b,), of everything that the model may see."""
        return content_hashes(self.seen, self.size)

    def head(self, size: int) -> Batch | None:
        """The first samples alone; None where there are no more, or a part of the inputs is no tensor of samples."""
        parts = self.inputs.values() if isinstance(self.inputs, Mapping) else [self.inputs]
        if size >= self.size or not all(isinstance(x, Tensor) and x.ndim and len(x) == self.size for x in parts):
            return None
        inputs = _take(self.inputs, slice(size), self.size)
        mask = None if self.mask is None else self.mask[:size]
        return replace(self, raw=inputs, inputs=inputs, labels=None, mask=mask, size=size, seen=inputs)


class Source:
    """Batches of the wanted samples, readable any number of times.

    Parameters
    ----------
    data
        A tensor or array (n, ...); a tuple (inputs, labels) or a dict of such; a map-style Dataset; or an iterable of
        batches: a DataLoader, a list, a generator. A generator is read into memory once.
    batch_size
        Samples per batch where the data come unbatched.
    samples
        Which samples: None for all, a number for the first so many, or distinct positions (used in rising order).
    shard
        (i, m) for the i-th of m runs of these.

    Raises
    ------
    ValueError
        If there are no samples, positions are repeated or out of range, or there are fewer than shards.
    TypeError
        If the data are of no kind named above.
    """

    def __init__(
        self,
        data: object,
        batch_size: int,
        samples: int | Sequence[int] | Tensor | None,
        *,
        whole_batch: bool = False,
        shard: tuple[int, int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        limit = int(samples) if isinstance(samples, Integral) else None
        if limit is not None and limit < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if isinstance(data, list) and _is_pair(data):
            raise ValueError("data is a list, which is read as batches: pass the tuple (inputs, labels) instead")
        self._whole_batch = whole_batch
        self._counted = False
        dataset = data if isinstance(data, Dataset) and not isinstance(data, IterableDataset) else None
        if dataset is not None:
            data = DataLoader(dataset, batch_size)
        if isinstance(data, np.ndarray | Tensor | tuple | Mapping):
            whole = _as_tensors(data)
            total = _size(whole)
            if isinstance(whole, tuple) and len(whole) > 1:
                _check_length(whole[-1], total)
            self._batches: Iterable[object] = _Slices(whole, total, batch_size)
        elif isinstance(data, Iterator):
            self._batches, total = read_batches(data, limit)
            self._counted = limit is not None
        elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
            self._batches = data
            known = _length(data)
            total = _count(data, limit) if known is None else known
            self._counted = known is None and limit is not None
        else:
            raise TypeError(
                f"data must be a tensor, a tuple (inputs, labels), a dict, a Dataset or an iterable of batches, "
                f"got {type(data).__name__}"
            )
        if total == 0:
            raise ValueError("data holds no samples")
        self.total = total
        """Samples that the data hold; where `samples` is a number, at least as many of them as are wanted."""
        if limit is not None or samples is None:
            self.positions = torch.arange(min(total, limit or total), device="cpu")
        else:
            self.positions = torch.as_tensor(samples, dtype=torch.int64, device="cpu").sort().values
            if (
                self.positions.ndim != 1
                or not len(self.positions)
                or self.positions[0] < 0
                or self.positions[-1] >= total
            ):
                raise ValueError(f"samples must be positions in 0..{total - 1}, got {samples!r}")
            if (self.positions[1:] == self.positions[:-1]).any():
                raise ValueError("samples must be distinct positions")
        self.of_all_shards = self.positions
        """Positions of the wanted samples, those of other shards among them."""
        self._shard = slice(None) if shard is None else shard_rows(len(self.positions), shard)
        self.positions = self.positions[self._shard]
        self.n = len(self.positions)
        """Number of wanted samples."""
        self._rows = self.positions
        self._all = self.n == total
        self._dataset, self._batch_size = dataset, batch_size
        if dataset is not None and not self._all:  # which needs not load the others
            self._batches = self._loaded(0)
            self._rows, self._all = torch.arange(self.n, device="cpu"), True

    @property
    def num_batches(self) -> int | None:
        """How many batches a pass reads, where that is known and all of them are read."""
        try:
            return len(self._batches) if self._all else None  # type: ignore[arg-type]
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches, without the first `start` of the wanted samples."""
        items, seen, done = self._batches, 0, start
        if start and self._dataset is not None:
            items, seen = self._loaded(start), int(self._rows[start])
        for item in items:
            if done == self.n:
                break
            raw = _as_tensors(item)
            size = _size(raw)
            end = int(torch.searchsorted(self._rows, seen + size))
            rows = self._rows[done:end] - seen
            if 0 < len(rows) < size:
                raw = _take(raw, rows, size)
            if len(rows):
                yield _parse(raw, len(rows), done, self._whole_batch)
            seen, done = seen + size, max(done, end)
        if done < self.n:
            raise ValueError(f"data ended after {seen} samples, expected {int(self._rows[-1]) + 1}")

    def _loaded(self, start: int) -> Iterable[object]:
        assert self._dataset is not None
        return DataLoader(Subset(self._dataset, self.positions[start:].tolist()), self._batch_size)

    def pick(self, values: Labels, name: str) -> Tensor | np.ndarray:
        """The wanted samples' entries of one value per sample, given for all samples or for those of all shards.

        Raises
        ------
        ValueError
            If there are as many as neither.
        """
        array = as_labels(values)
        if len(array) == len(self.of_all_shards):
            return array[self._shard]
        if len(array) == self.total or (self._counted and len(array) > int(self.of_all_shards[-1])):
            return array[self.positions] if isinstance(array, Tensor) else array[self.positions.numpy()]
        raise ValueError(f"{name} must have one entry per sample: expected {self.total}, got {len(array)}")


class _Slices:
    """A whole data set in memory, cut into batches."""

    def __init__(self, whole: object, n: int, batch_size: int) -> None:
        self.whole, self.n, self.batch_size = whole, n, batch_size

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[object]:
        for start in range(0, self.n, self.batch_size):
            yield _take(self.whole, slice(start, start + self.batch_size), self.n)


def example_inputs(example: object) -> object:
    """What goes into a model of one batch in any form that `capture` reads: a tensor, or a dict to pass by keyword.

    Raises
    ------
    TypeError
        If there is no tensor in it.
    """
    whole = isinstance(example, Tensor | np.ndarray | tuple | Mapping | str | bytes)
    if isinstance(example, Iterable) and not whole:
        example = next(iter(example), None)
    raw = _as_tensors(example)
    try:
        size = _size(raw)
    except TypeError as error:
        raise TypeError(
            f"example must be one batch: a tensor, a tuple (inputs, labels) or a dict, got {type(example).__name__}"
        ) from error
    return _parse(raw, size, 0, False).inputs


def to_device(
    item: object, device: torch.device | None, dtype: torch.dtype | None = None, *, copy: bool = False
) -> object:
    """A batch with its tensors on the device, floating ones in the dtype where one is given."""
    if isinstance(item, Tensor):
        cast = dtype if dtype is not None and item.is_floating_point() else None
        return item.to(device=device, dtype=cast, non_blocking=True, copy=copy)
    return _mapped(item, lambda value: to_device(value, device, dtype, copy=copy))


def model_device(model: nn.Module) -> torch.device | None:
    """Device of the model's first parameter or buffer; None if it has neither."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def model_dtype(model: nn.Module) -> torch.dtype | None:
    """Type of the model's first floating parameter; None if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _mapped(item: object, f: Callable[[object], object]) -> object:
    """Apply f to every part of a dict, tuple, named tuple or list; anything else as it is."""
    if isinstance(item, Mapping):
        return {key: f(value) for key, value in item.items()}
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*[f(value) for value in item])  # type: ignore[arg-type]
    if isinstance(item, tuple | list):
        return type(item)([f(value) for value in item])
    return item


def _as_tensors(item: object) -> object:
    """Arrays of numbers, Series and lists of single tensors become tensors; everything else stays."""
    if isinstance(item, np.ndarray) and item.dtype.kind in "biufc":
        native = item.astype(item.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    if isinstance(item, pd.Series):
        return as_labels(item)
    if isinstance(item, tuple | list) and item and all(isinstance(v, Tensor) and v.ndim == 0 for v in item):
        return torch.stack(list(item))
    return _mapped(item, _as_tensors)


def _tensors(item: object) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, tuple | list):
        for value in item:
            yield from _tensors(value)


def _size(item: object) -> int:
    """Number of samples: the length of the input, or of most tensors of a dict of inputs."""
    if isinstance(item, tuple | list) and item and isinstance(item[0], Tensor | Mapping):
        item = item[0]
    lengths = [len(tensor) for tensor in _tensors(item) if tensor.ndim]
    if not lengths:
        raise TypeError(f"a batch must hold a tensor with samples on its first axis, got {type(item).__name__}")
    return Counter(lengths).most_common(1)[0][0]


def _take(item: object, rows: Tensor | slice, size: int) -> object:
    """The rows of everything in a batch that has one entry per sample."""
    if isinstance(item, Tensor):
        return item[rows] if item.ndim and len(item) == size else item
    if isinstance(item, np.ndarray):
        return item[rows if isinstance(rows, slice) else rows.numpy()] if len(item) == size else item
    if isinstance(item, tuple | list) and len(item) == size:
        parts = item if size != 1 else ()
        if not any(isinstance(value, Tensor | np.ndarray) and np.ndim(value) for value in parts):
            return item[rows] if isinstance(rows, slice) else [item[i] for i in rows.tolist()]
    return _mapped(item, lambda value: _take(value, rows, size))


def _parse(raw: object, size: int, start: int, whole_batch: bool) -> Batch:
    inputs, targets = raw, None
    if isinstance(raw, tuple | list):
        inputs, targets = raw[0], raw[-1] if len(raw) > 1 else None
    mask = None
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
        own = inputs.get("labels")
        if isinstance(own, tuple | list | Tensor | np.ndarray) and len(np.shape(own)) == 1 and len(own) == size:
            targets = inputs.pop("labels")
        mask = inputs.get("attention_mask")
    labels = as_labels(targets) if _check_length(targets, size) else None
    mask = mask if isinstance(mask, Tensor) else None
    return Batch(raw, inputs, labels, mask, size, start, raw if whole_batch else inputs)


def _check_length(targets: object, size: int) -> TypeGuard[Labels]:
    """Whether targets are labels; dense targets (masks) and structures (boxes) are not, and nothing here uses them.

    Raises
    ------
    ValueError
        If they are, but not one per sample.
    """
    if isinstance(targets, tuple | list):
        if any(isinstance(value, Mapping | tuple | list) or np.ndim(value) for value in targets):
            return False
    elif not isinstance(targets, Tensor | np.ndarray) or targets.ndim > 2:
        return False
    found = len(targets) if np.ndim(targets) else 0
    if found != size:
        raise ValueError(f"labels must have one entry per sample: expected {size}, got {found}")
    return True


def _is_pair(data: list[object]) -> bool:
    """Whether a list looks like [inputs, labels] rather than two batches."""
    if len(data) != 2 or not all(isinstance(item, Tensor | np.ndarray) for item in data):
        return False
    x, y = (_as_tensors(item) for item in data)
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim > 1 and y.ndim == 1 and len(x) == len(y)


def _length(data: Iterable[object]) -> int | None:
    """Number of samples, where it can be told without reading the data."""
    if isinstance(data, DataLoader):
        sampler = data.batch_sampler
        if isinstance(data.dataset, IterableDataset) or type(sampler) is not BatchSampler:
            return None
        n = len(sampler.sampler)  # type: ignore[arg-type]
        return n // sampler.batch_size * sampler.batch_size if sampler.drop_last else n
    if isinstance(data, list):
        return sum(_size(_as_tensors(item)) for item in data)
    return None


def _count(data: Iterable[object], limit: int | None) -> int:
    total = 0
    for item in data:
        total += _size(_as_tensors(item))
        if limit is not None and total >= limit:
            break
    return total


def read_batches(data: Iterator[object], limit: int | None) -> tuple[list[object], int]:
    """The batches of an iterator, as many as hold so many samples, and the number of samples in them."""
    items, total = [], 0
    for item in data:
        items.append(item)
        total += _size(_as_tensors(item))
        if limit is not None and total >= limit:
            break
    return items, total
