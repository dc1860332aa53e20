"""The picture on the README's first screen: ``python -m figures.first_screen`` (about one minute).

ResNet-56 on CIFAR-10 test images where the shared data are present, else the demo network on digits.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

import repgraph
from benchmarks import shared_data
from repgraph import plot
from repgraph.demo import digits, digits_resnet

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def main() -> None:
    mpl.use("Agg")
    real = shared_data.available()
    model = shared_data.cifar_network(56) if real else digits_resnet()
    images, labels = shared_data.cifar_images(2500) if real else digits()
    if real:
        labels = np.array(CIFAR_CLASSES)[labels]
    table = repgraph.profile(model, (images, labels), n=500 if real else 200)
    names = table.index[np.linspace(0, len(table) - 1, 4).round().astype(int)]
    drawn = repgraph.capture(model, (images, labels), list(names), samples=500 if real else 300)
    graphs = {name: repgraph.knn_graph(drawn[name]) for name in drawn}

    figure = plt.figure(figsize=(11.5, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.15))
    ax = plot.curve(table, ax=figure.add_subplot(grid[0, :]))
    for name in names:
        place = table.index.get_loc(name)
        ax.plot(place, table["modularity"].iloc[place], "o", markersize=10, markerfacecolor="none", color="#D55E00")
    titles = {name: f"{name}: Q = {table['modularity'][name]:.2f}" for name in names}
    plot.graphs(graphs, drawn.labels, titles=titles, axes=[figure.add_subplot(grid[1, i]) for i in range(4)])
    figure.legend(
        handles=plot.class_handles(drawn.labels), loc="outside lower center", ncols=10, frameon=False, fontsize=9
    )
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
