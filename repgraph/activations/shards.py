"""Shards: parts of the samples captured by processes or machines of their own, and joined again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from repgraph.activations.container import Activations
from repgraph.activations.spec import Spec

_MEANING = {
    "of": "number of shards",
    "samples": "number of samples",
    "positions": "checksum of the positions of all samples",
    "parameters": "digest of the model's parameters and buffers",
}


def shard_rows(n: int, shard: tuple[int, int]) -> slice:
    """The run of samples that is shard i of m, both given as (i, m): as long as the others, the first ones by 1 longer.

    Raises
    ------
    ValueError
        If it is no such pair, or there are fewer samples than shards.
    """
    if len(shard) != 2 or not all(isinstance(number, Integral) for number in shard) or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be two integers (i, m) with 0 <= i < m, got {shard!r}")
    number, count = map(int, shard)
    if count > n:
        raise ValueError(f"shard {number} of {count}: {n} samples are too few for {count} shards, one would be empty")
    short, longer = divmod(n, count)
    start = number * short + min(number, longer)
    return slice(start, start + short + (number < longer))


def shard_settings(shard: tuple[int, int], positions: Tensor, parameters: str) -> dict[str, object]:
    """What a shard remembers, so that only shards of one whole are joined.

    `positions` are those of the samples of all shards, `parameters` is a digest of the model.
    """
    return {
        "number": int(shard[0]),
        "of": int(shard[1]),
        "samples": len(positions),
        "positions": zlib.crc32(positions.numpy().tobytes()),
        "parameters": parameters,
    }


def join_shards(parts: Sequence[Activations]) -> Activations:
    """One capture of all samples from its shards, captured with ``shard=(0, m)`` to ``shard=(m - 1, m)``.

    The parts may come in any order, from memory or from folders. Nothing is copied until a layer is read, and then that
    layer alone; `save` writes all of it into one folder. The result is that of a capture without shards: the same
    samples in the same order, and the same values to the last bit where the batches were the same (shards that hold a
    multiple of the batch size); else values agree to the rounding of a forward pass over batches of another size.

    Parameters
    ----------
    parts
        All shards, each once.

    Returns
    -------
    Activations
        With the labels, sample ids and input hashes of all parts.

    Raises
    ------
    ValueError
        If a part is no shard, a shard is missing or given twice, a sample is in two of them, or they differ in
        settings, model parameters, choice of samples, layers, shapes or types.

    Examples
    --------
    >>> import repgraph
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.ones(5, 3)
    >>> parts = [repgraph.capture(model, x, "leaves", shard=(i, 2)) for i in range(2)]
    >>> [part.n for part in parts], repgraph.join_shards(parts).n
    ([3, 2], 5)
    """
    if not parts:
        raise ValueError("parts is empty: give all shards")
    found: dict[int, Activations] = {}
    first = parts[0]
    for place, part in enumerate(parts):
        own = _about(part, place)
        _check_alike(first, part, place)
        number = own["number"]
        if number in found:
            raise ValueError(f"shard {number} of {own['of']} is given twice")
        rows = shard_rows(own["samples"], (number, own["of"]))
        if part.n != rows.stop - rows.start:
            raise ValueError(
                f"shard {number} of {own['of']} must hold {rows.stop - rows.start} samples, got {part.n}: "
                "join the shards first and take a subset then"
            )
        found[number] = part
    of, n = _about(first, 0)["of"], _about(first, 0)["samples"]
    missing = [number for number in range(of) if number not in found]
    if missing:
        rows = shard_rows(n, (missing[0], of))
        raise ValueError(
            f"shards {', '.join(map(str, missing))} of {of} are missing; "
            f"shard {missing[0]} holds samples {rows.start} to {rows.stop - 1} of {n}"
        )
    ordered = [found[number] for number in range(of)]
    ids = np.concatenate([part.sample_ids for part in ordered])
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1]
        raise ValueError(
            f"{len(twice)} sample ids are in two shards: {', '.join(map(str, twice[:5]))}{', ...' * (len(twice) > 5)}"
        )
    hashes = [part.input_hashes for part in ordered if part.input_hashes is not None]
    return Activations(
        _Joined(ordered, n),
        _joined_labels(ordered),
        ids,
        specs=first.specs,
        input_hashes=torch.cat(hashes) if hashes else None,
        settings={key: value for key, value in first.settings.items() if key != "shard"},
        place=f"in {of} shards",
        n=n,
    )


class _Joined(Mapping[str, Tensor]):
    """Layers joined from those of the shards when they are read."""

    def __init__(self, parts: Sequence[Activations], n: int) -> None:
        self.parts, self.n, self.in_files = parts, n, all(part.in_files for part in parts)

    def __getitem__(self, name: str) -> Tensor:
        spec: Spec = self.parts[0].specs[name]
        x = torch.empty((self.n, *spec.shape), dtype=spec.dtype, device="cpu")
        start = 0
        for part in self.parts:  # one part at a time is read beside the whole
            x[start : start + part.n] = part[name]
            start += part.n
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts[0])

    def __len__(self) -> int:
        return len(self.parts[0])


def _about(part: Activations, place: int) -> dict[str, int]:
    own = part.settings.get("shard")
    if not isinstance(own, dict):
        raise ValueError(f"parts[{place}] is no shard: capture it with shard=(i, m)")
    return own


def _check_alike(a: Activations, b: Activations, place: int) -> None:
    """Refuse parts of different wholes; a is the first part, b the one at `place`."""
    whole, other = ({**part.settings, **_about(part, place)} for part in (a, b))
    for key in dict.fromkeys((*whole, *other)):
        if key not in ("shard", "number") and whole.get(key) != other.get(key):
            raise ValueError(
                f"parts[{place}] is a shard of another capture: expected {_MEANING.get(key, key)} {whole.get(key)!r}, "
                f"as in parts[0], got {other.get(key)!r}"
            )
    if list(a) != list(b):
        raise ValueError(
            f"parts[{place}] must have the layers of parts[0] in their order: expected {', '.join(a)}, "
            f"got {', '.join(b)}"
        )
    for name, spec in a.specs.items():
        if b.specs[name] != spec:
            raise ValueError(
                f"layer {name!r}: parts[{place}] has {b.specs[name].text} of {b.specs[name].dtype}, expected "
                f"{spec.text} of {spec.dtype} as in parts[0]"
            )
    for what, own, others in (("labels", a.labels, b.labels), ("input hashes", a.input_hashes, b.input_hashes)):
        if (own is None) != (others is None):
            has, lacks = (place, 0) if own is None else (0, place)
            raise ValueError(f"parts[{has}] has {what}, parts[{lacks}] has none")


def _joined_labels(parts: Sequence[Activations]) -> Tensor | np.ndarray | None:
    labels = [part.labels for part in parts if part.labels is not None]
    kinds = {str(values.dtype) if isinstance(values, Tensor) else "str" for values in labels}
    if len(kinds) > 1:
        raise ValueError(f"labels of the shards differ in type: {', '.join(sorted(kinds))}")
    tensors = [values for values in labels if isinstance(values, Tensor)]
    if tensors:
        return torch.cat(tensors)
    return np.concatenate(labels) if labels else None
