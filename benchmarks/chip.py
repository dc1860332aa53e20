"""Channel independence beside one SVD per masked channel: ``python -m benchmarks.chip`` (a minute).

The authors zero one row after the other and take the nuclear norm, in a loop; batched, all masked copies of a sample
go through one call. Each is in float64, as the differences ask for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rss import measured
from repgraph.scores.chip import channel_independence_by_sample

SIZES = ((16, 1024), (32, 256), (64, 256), (64, 64), (128, 16), (512, 16), (256, 196), (64, 3136))
"""Channels and positions: CIFAR ResNets, 16 x 16 maps of 64 channels, late and early maps of wider networks."""


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


def best(f: Callable[[], Tensor]) -> tuple[float, int, Tensor]:
    """Seconds, peak growth in bytes and result of the fastest of some runs, ten or as many as take half a second."""
    runs = [measured(f)]
    while len(runs) < 10 and sum(run[0] for run in runs) < 0.5:
        runs.append(measured(f))
    return min(runs, key=lambda run: run[0])


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}; seconds per sample")
        for c, m in SIZES:
            maps = torch.randn(16, c, m, generator=generator, dtype=torch.float64).relu()
            own, grown, found = best(lambda a=maps: channel_independence_by_sample(a))
            own /= len(maps)
            line = f"  {c:4} x {m:4}: {own:.5f} ({grown / 1e6:3.0f} MB for {len(maps)})"
            for peer in (batched, looped):
                seconds, grown, expected = best(lambda a=maps[0], f=peer: f(a))
                off = (found[0] - expected).abs().max() / torch.linalg.matrix_norm(maps[0], 2)
                line += f"; {peer.__name__} {seconds:.4f} ({grown / 1e6:3.0f} MB), {seconds / own:4.0f}x, off {off:.0e}"
            for method in ("gram", "qr"):
                seconds, _, _ = best(lambda a=maps[:1], f=method: channel_independence_by_sample(a, method=f))
                line += f"; {method} {seconds:.4f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
