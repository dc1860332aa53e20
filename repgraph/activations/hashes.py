"""Content hashes: one per sample, and digests of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b, sha256

import numpy as np
import torch
from torch import Tensor, nn


def content_hashes(item: object, size: int) -> Tensor:
    """One 64-bit hash per sample, (size,), of everything in a batch that has one entry per sample."""
    total = torch.zeros(size, dtype=torch.int64, device="cpu")
    for number, values in enumerate(_columns(item, size)):
        total += (2 * number + 1) * _row_hashes(values)
    return total


def _columns(item: object, size: int) -> Iterator[Tensor | Sequence[str]]:
    """Everything in a batch that has one entry per sample: tensors, and texts."""
    if isinstance(item, Tensor):
        if item.ndim and len(item) == size:
            yield item
    elif isinstance(item, np.ndarray):
        if len(item) == size:
            yield [str(value) for value in item]
    elif isinstance(item, tuple | list) and len(item) == size and all(isinstance(value, str) for value in item):
        yield list(item)
    elif isinstance(item, Mapping):
        for key in sorted(item, key=str):
            yield from _columns(item[key], size)
    elif isinstance(item, tuple | list):
        for value in item:
            yield from _columns(value, size)


def _row_hashes(values: Tensor | Sequence[str]) -> Tensor:
    """Sum over the 64-bit words of each row of word times a fixed odd number, modulo 2^64: (b,).

    Zeros at the end of a row add nothing, so padding does not change the hash of a token sequence.
    """
    if not isinstance(values, Tensor):
        digests = [int.from_bytes(blake2b(v.encode(), digest_size=8).digest(), "little", signed=True) for v in values]
        return torch.tensor(digests, dtype=torch.int64, device="cpu")
    x = values.detach().reshape(len(values), -1).contiguous()
    data = x.view(torch.uint8) if x.dtype != torch.bool else x.to(torch.uint8)
    data = nn.functional.pad(data, (0, -data.shape[1] % 8))
    words = data.view(torch.int64)  # (b, words)
    return (words * _odd_numbers(words.shape[1]).to(words.device)).sum(1).cpu()


def _odd_numbers(count: int) -> Tensor:
    """The first numbers of the SplitMix64 generator, made odd."""
    z = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64))


def digest_of(*parts: bytes | Tensor) -> str:
    """Digest of bytes and of the types, shapes and contents of tensors."""
    digest = sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(part)
    return digest.hexdigest()
