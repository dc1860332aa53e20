"""Exact cells in a plane.

    python -m benchmarks.partitions [--full]

SplineCam, the peer, needs graph-tool and CUDA and is not run here: published counts are compared in the tests, and on
one CPU it took 2.9 s for 160 cells of a 10-16-16-16 network and 4.6 s for 375 cells of 5-32-32. The dense grid that
users draw instead is run on the same network: it finds fewer cells than there are. The difference is that of the cells'
areas from the plane's, relative to it.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from benchmarks.rows import Row, Target, main, measure
from repgraph.demo import digits, digits_resnet
from repgraph.metrics.spline import RegionCodes, SlicePartition, region_codes, slice_partition, slice_through_samples

SIDE = 400
NARROW, WIDE = (784, 16, 16, 16), (784, 200, 200, 200)
SMALL = ((NARROW, 30.0, Target()),)
FULL = ((WIDE, 1.0, Target(value=0.17)), (WIDE, 3.0, Target(value=0.17)), *SMALL)
"""Widths, half the side of the square, and what is promised in seconds per 1000 cells."""


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10)).eval()


def box(half: float) -> list[list[float]]:
    return [[-half, -half], [half, -half], [half, half], [-half, half]]


def square(widths: tuple[int, ...], half: float, target: Target) -> Row:
    plane = torch.randn(3, 784, generator=torch.Generator().manual_seed(1))
    net, origin, basis = mlp(*widths), 0.3 * plane[0], plane[1:] / 28
    u = torch.linspace(-half, half, SIDE).double()
    points = origin + torch.cartesian_prod(u, u).float() @ basis
    grid, counts = f"grid of {SIDE} x {SIDE}", {}

    def area(cells: SlicePartition, others: dict[str, RegionCodes]) -> float:
        counts.update(cells=cells.count, grid=others[grid].n_unique)
        return abs(cells.areas.sum() / (2 * half) ** 2 - 1)

    row = measure(
        "cells in a plane",
        f"{'-'.join(map(str, widths))}, square of {2 * half:g}",
        lambda: slice_partition(net, origin, basis, box(half), progress=False),
        peers={grid: lambda: region_codes(net, points, packed=True, batch_size=4096, progress=False)},
        difference=area,
        target=replace(target, difference=1e-9),
    )
    note = f"the grid finds {counts['grid']:,} of {counts['cells']:,} cells"
    return replace(row, value=1000 * row.ours / counts["cells"], unit="s per 1000", note=note)


def residual(step: float) -> Row:
    """Through three digits, two of them this far towards others."""
    images, net = digits()[0], digits_resnet()
    three = torch.stack([images[0] + step * (images[i] - images[0]) for i in range(3)])
    count = slice_through_samples(net, three, progress=False).count
    row = measure(
        "cells in a plane", f"demo ResNet, {count:,} cells", lambda: slice_through_samples(net, three, progress=False)
    )
    return replace(row, value=1000 * row.ours / count, unit="s per 1000")


def rows(full: bool) -> Iterator[Row]:
    slice_partition(mlp(2, 4), torch.zeros(2), torch.eye(2), box(1), progress=False)  # compiles
    for widths, half, target in FULL if full else SMALL:
        yield square(widths, half, target)
    yield residual(0.01 if full else 0.005)


if __name__ == "__main__":
    main(rows)
