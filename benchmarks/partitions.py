"""Exact cells in a plane: ``python -m benchmarks.partitions`` (a minute).

SplineCam, the peer, needs graph-tool and CUDA and is not run here: published counts are compared in the tests, and on
one CPU it took 2.9 s for 160 cells of a 10-16-16-16 network and 4.6 s for 375 cells of 5-32-32. The dense grid that
users draw instead is run on the same network: it finds fewer cells than there are.
"""

from itertools import pairwise

import torch
from torch import nn

from benchmarks.rss import measured
from repgraph.demo import digits, digits_resnet
from repgraph.metrics.spline import region_codes, slice_partition, slice_through_samples

SIDE = 400


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10)).eval()


def box(half: float) -> list[list[float]]:
    return [[-half, -half], [half, -half], [half, half], [-half, half]]


def main() -> None:
    plane = torch.randn(3, 784, generator=torch.Generator().manual_seed(1))
    slice_partition(mlp(2, 4), torch.zeros(2), torch.eye(2), box(1), progress=False)  # compile
    for widths, half in (((784, 200, 200, 200), 1.0), ((784, 200, 200, 200), 3.0), ((784, 16, 16, 16), 30.0)):
        net, origin, basis = mlp(*widths), 0.3 * plane[0], plane[1:] / 28
        arguments = net, origin, basis, box(half)
        seconds, grown, cells = measured(lambda given=arguments: slice_partition(*given, progress=False))
        area = abs(cells.areas.sum() / (2 * half) ** 2 - 1)
        print(f"{'-'.join(map(str, widths))}: {cells.count} cells in {seconds:.2f} s, "
              f"{1000 * seconds / cells.count:.3f} s per 1000; peak growth {grown / 1e6:.0f} MB; "
              f"areas add up to {area:.0e}")  # fmt: skip
        u = torch.linspace(-half, half, SIDE).double()
        points = origin + torch.cartesian_prod(u, u).to(torch.float32) @ basis
        given = net, points
        taken, _, codes = measured(lambda a=given: region_codes(*a, packed=True, batch_size=4096, progress=False))
        print(f"    grid of {SIDE} x {SIDE}: {codes.n_unique} of them in {taken:.2f} s")
    images = digits()[0]
    three = torch.stack([images[0] + 0.02 * (images[i] - images[0]) for i in range(3)])
    seconds, grown, cells = measured(lambda: slice_through_samples(digits_resnet(), three, progress=False))
    print(f"demo ResNet, {len(cells.region.layers)} gate layers, {cells.region.gates} gates: {cells.count} cells in "
          f"{seconds:.2f} s, {1000 * seconds / cells.count:.2f} s per 1000; "
          f"peak growth {grown / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
