"""Channel independence beside one SVD per masked channel.

    python -m benchmarks.chip [--full]

The authors zero one row after the other and take the nuclear norm, in a loop; "batched" puts all masked copies of a
sample through one call. Each is in float64, as the differences ask for, which are relative to the spectral norm. Maps
as in CIFAR ResNets, 16 x 16 maps of 64 channels, late and early maps of wider networks.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.rows import Row, Target, main, measure
from repgraph.scores.chip import channel_independence_by_sample

SMALL = ((16, 16, 1024), (16, 32, 256), (16, 64, 64))
FULL = (*SMALL, (16, 64, 256), (16, 128, 16), (4, 512, 16), (2, 256, 196), (2, 64, 3136))
"""Samples, channels, positions."""


def looped(maps: Tensor) -> Tensor:
    """(C,) of one sample (C, M), as the authors' code has it."""
    whole, found = torch.linalg.matrix_norm(maps, "nuc"), []
    for j in range(len(maps)):
        masked = maps.clone()
        masked[j] = 0
        found.append(whole - torch.linalg.matrix_norm(masked, "nuc"))
    return torch.stack(found)


def batched(maps: Tensor) -> Tensor:
    """The same with all masked copies at once."""
    masked = maps * (1 - torch.eye(len(maps), dtype=maps.dtype))[:, :, None]
    return torch.linalg.matrix_norm(maps, "nuc") - torch.linalg.matrix_norm(masked, "nuc")


def by_sample(f: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
    return torch.stack([f(sample) for sample in maps])


def row(n: int, c: int, m: int, full: bool) -> Row:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(n, c, m, generator=generator, dtype=torch.float64).relu()
    scale = torch.linalg.matrix_norm(maps, 2).min()
    return measure(
        "channel independence",
        f"{n} samples, {c} channels x {m:,}",
        lambda: channel_independence_by_sample(maps),
        peers={"looped SVD": lambda: by_sample(looped, maps), "batched SVD": lambda: by_sample(batched, maps)},
        difference=lambda found, others: float((found - others["looped SVD"]).abs().max() / scale),
        target=Target(peer=1 / 20 if full else None, of="looped SVD", difference=1e-9),
    )


def rows(full: bool) -> Iterator[Row]:
    row(2, 8, 16, False)  # libraries allocate on first use
    for size in FULL if full else SMALL:
        yield row(*size, full)


if __name__ == "__main__":
    main(rows)
