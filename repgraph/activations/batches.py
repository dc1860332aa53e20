"""Data in every form users hold it, as batches: inputs, labels, attention mask, one content hash per sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

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

    def hashes(self) -> Tensor:
        """One 64-bit content hash per sample, (b,), of everything that goes into the model."""
        total = torch.zeros(self.size, dtype=torch.int64)
        for number, tensor in enumerate(_tensors(self.inputs)):
            total += (2 * number + 1) * _row_hashes(tensor).cpu()
        return total


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

    Raises
    ------
    ValueError
        If there are no samples, or positions are repeated or out of range.
    TypeError
        If the data are of no kind named above.
    """

    def __init__(self, data: object, batch_size: int, samples: int | Sequence[int] | Tensor | None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(samples, int) and samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if isinstance(data, list) and _is_pair(data):
            raise ValueError("data is a list, which is read as batches: pass the tuple (inputs, labels) instead")
        limit = samples if isinstance(samples, int) else None
        self._counted = False
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            data = DataLoader(data, batch_size)
        if isinstance(data, np.ndarray | Tensor | tuple | Mapping):
            whole = _as_tensors(data)
            total = _size(whole)
            self._batches: Iterable[object] = _Slices(whole, total, batch_size)
        elif isinstance(data, Iterator):
            self._batches, total = _read(data, limit)
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
        if isinstance(samples, int) or samples is None:
            self.positions = torch.arange(min(total, samples or total))
        else:
            self.positions = torch.as_tensor(samples, dtype=torch.int64).sort().values
            if len(self.positions) == 0 or self.positions[0] < 0 or self.positions[-1] >= total:
                raise ValueError(f"samples must be positions in 0..{total - 1}, got {list(samples)[:5]}")
            if (self.positions[1:] == self.positions[:-1]).any():
                raise ValueError("samples must be distinct positions")
        self.n = len(self.positions)
        """Number of wanted samples."""

    @property
    def num_batches(self) -> int | None:
        """How many batches a pass reads, where that is known and all of them are read."""
        length = getattr(self._batches, "__len__", None)
        return len(self._batches) if length is not None and self.n == self.total else None  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        seen = done = 0
        for item in self._batches:
            if done == self.n:
                break
            raw = _as_tensors(item)
            size = _size(raw)
            end = int(torch.searchsorted(self.positions, seen + size))
            rows = self.positions[done:end] - seen
            if 0 < len(rows) < size:
                raw = _take(raw, rows, size)
            if len(rows):
                yield _parse(raw, len(rows), done)
            seen, done = seen + size, end
        if done < self.n:
            raise ValueError(f"data ended after {seen} samples, expected {int(self.positions[-1]) + 1}")

    def pick(self, values: Labels, name: str) -> Tensor | np.ndarray:
        """The wanted samples' entries of one value per sample, given for all samples or for the wanted ones.

        Raises
        ------
        ValueError
            If there are as many as neither.
        """
        array = as_labels(values)
        if len(array) == self.n:
            return array
        if len(array) == self.total or (self._counted and len(array) > int(self.positions[-1])):
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


def to_device(item: object, device: torch.device | None, dtype: torch.dtype | None = None) -> object:
    """A batch with its tensors on the device, floating ones in the dtype where one is given."""
    if isinstance(item, Tensor):
        cast = dtype if dtype is not None and item.is_floating_point() else None
        return item.to(device=device, dtype=cast, non_blocking=True)
    if isinstance(item, Mapping):
        return {key: to_device(value, device, dtype) for key, value in item.items()}
    if isinstance(item, tuple | list):
        return type(item)(to_device(value, device, dtype) for value in item)
    return item


def model_device(model: nn.Module) -> torch.device | None:
    """Device of the model's first parameter or buffer; None if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def model_dtype(model: nn.Module) -> torch.dtype | None:
    """Type of the model's first floating parameter; None if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _as_tensors(item: object) -> object:
    """NumPy arrays become tensors (sharing memory); named tuples become tuples; everything else stays."""
    if isinstance(item, np.ndarray):
        return torch.from_numpy(item) if item.dtype.kind in "biufc" else item
    if isinstance(item, Mapping):
        return {key: _as_tensors(value) for key, value in item.items()}
    if isinstance(item, tuple | list):
        return tuple(_as_tensors(value) for value in item)
    return item


def _tensors(item: object) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for key in sorted(item, key=str):
            yield from _tensors(item[key])
    elif isinstance(item, tuple | list):
        for value in item:
            yield from _tensors(value)


def _size(item: object) -> int:
    first = next(_tensors(item), None)
    if first is None or first.ndim == 0:
        raise TypeError(f"a batch must hold a tensor with samples on its first axis, got {type(item).__name__}")
    return len(first)


def _take(item: object, rows: Tensor | slice, size: int) -> object:
    """The rows of everything in a batch that has one entry per sample."""
    if isinstance(item, Tensor):
        return item[rows] if item.ndim and len(item) == size else item
    if isinstance(item, np.ndarray):
        return item[rows if isinstance(rows, slice) else rows.numpy()] if len(item) == size else item
    if isinstance(item, Mapping):
        return {key: _take(value, rows, size) for key, value in item.items()}
    if isinstance(item, tuple):
        if len(item) == size and not any(isinstance(value, Tensor | np.ndarray | Mapping) for value in item):
            return item[rows] if isinstance(rows, slice) else tuple(item[i] for i in rows.tolist())
        return tuple(_take(value, rows, size) for value in item)
    return item


def _parse(raw: object, size: int, start: int) -> Batch:
    inputs, targets = raw, None
    if isinstance(raw, tuple):
        inputs, targets = raw[0], raw[-1] if len(raw) > 1 else None
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
        own = inputs.get("labels")
        if isinstance(own, Tensor) and own.ndim == 1 and len(own) == size:
            targets = inputs.pop("labels")
        mask = inputs.get("attention_mask")
    else:
        mask = None
    if targets is not None:
        # Dense targets (masks, boxes) are no labels; nothing here could use them.
        sized = hasattr(targets, "__len__") and len(targets) == size
        targets = as_labels(targets) if sized and getattr(targets, "ndim", 1) <= 2 else None
    return Batch(raw, inputs, targets, mask if isinstance(mask, Tensor) else None, size, start)


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


def _read(data: Iterator[object], limit: int | None) -> tuple[list[object], int]:
    items, total = [], 0
    for item in data:
        items.append(item)
        total += _size(_as_tensors(item))
        if limit is not None and total >= limit:
            break
    return items, total


def _row_hashes(x: Tensor) -> Tensor:
    """Sum over the 64-bit words of each row of word times a fixed odd number, modulo 2^64: (b,).

    Zeros at the end of a row add nothing, so padding does not change the hash of a token sequence.
    """
    x = x.detach().reshape(len(x), -1).contiguous()
    data = x.view(torch.uint8) if x.dtype != torch.bool else x.to(torch.uint8)
    data = nn.functional.pad(data, (0, -data.shape[1] % 8))
    words = data.view(torch.int64)  # (b, words)
    return (words * _odd_numbers(words.shape[1]).to(words.device)).sum(1)


def _odd_numbers(count: int) -> Tensor:
    """The first numbers of the SplitMix64 generator, made odd."""
    z = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64))
