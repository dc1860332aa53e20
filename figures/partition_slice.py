"""The cells of a small trained network in the plane through three images: ``python -m figures.partition_slice``.

A network of two hidden layers of 48 units, trained on scikit-learn's digits (half a minute). Writes
figures/partition_slice.png.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repgraph import plot
from repgraph.demo import digits
from repgraph.metrics.spline import slice_through_samples


def trained(epochs: int = 60) -> nn.Module:
    """Adam on the training digits."""
    torch.manual_seed(0)
    x, y = digits("train")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x)), 32):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def three_images() -> tuple[Tensor, list[int]]:
    """Held-out images of a 3, a 5 and an 8."""
    x, y = digits()
    classes = [3, 5, 8]
    return torch.stack([x[int((y == label).nonzero()[0])] for label in classes]), classes


def main() -> None:
    mpl.use("Agg")
    net = trained()
    x, y = digits()
    accuracy = float((net(x).argmax(1) == y).float().mean())
    images, classes = three_images()
    cells = slice_through_samples(net, images, progress=False)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.1), layout="constrained")
    for ax, choice in zip(axes, ("slope", "area", "layer"), strict=True):
        plot.partition(cells, color_by=choice, ax=ax)
        for label, at in zip(classes, cells.points, strict=True):
            ax.annotate(f"{label}", at, (7, 5), textcoords="offset points", size=13, weight="bold")
    graph = cells.dual_graph()
    found = (
        f"Plane through three held-out digits (crosses), network 64-48-48-10, held-out accuracy {accuracy:.1%}: "
        f"{cells.count} cells, {graph.num_edges} shared borders; orange: where the named class changes. "
        f"The median cell takes {float(torch.tensor(cells.areas).median()) / cells.areas.sum():.1e} of the plane."
    )
    figure.supxlabel(found, size=8.5)
    place = Path(__file__).with_suffix(".png")
    figure.savefig(place, dpi=130)
    print(found)
    print(f"wrote {place}")


if __name__ == "__main__":
    main()
