"""Modularity by layer of trained networks: ``python -m figures.modularity_curves`` (about two minutes).

ResNet-20, 32, 44 and 56 on CIFAR-10 test images where the shared data are present, else the demo network on digits.
Writes figures/modularity_curves.png and the numbers beside it.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

import repgraph
from benchmarks import shared_data
from repgraph import plot
from repgraph.demo import digits, digits_resnet


def tables() -> dict[str, pd.DataFrame]:
    if not shared_data.available():
        return {"demo network, digits": repgraph.profile(digits_resnet(), digits(), n=200)}
    data = shared_data.cifar_images(2500)
    depths = (20, 32, 44, 56)
    return {f"ResNet-{depth}": repgraph.profile(shared_data.cifar_network(depth), data) for depth in depths}


def main() -> None:
    mpl.use("Agg")
    found = tables()
    rows = -(-len(found) // 2)
    columns = min(2, len(found))
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.4 * columns, 3.7 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (name, table) in zip(axes.flat, found.items(), strict=True):
        plot.curve(table, ax=ax)
        ax.set_title(
            f"{name}, {len(table)} layers: Q {table['modularity'].iloc[-1]:.2f} at the end", loc="left", size=10
        )
        ax.label_outer(remove_inner_ticks=False)
        ax.tick_params(labelbottom=True)
    first = next(iter(found.values()))
    figure.supxlabel(
        f"{plot.caption(first).split(', ', 1)[1]}; line and band: mean and 1 std over the sets; "
        "dashed: labels permuted; dotted: ceiling",
        size=8,
        color="#444444",
    )
    place = Path(__file__).with_suffix("")
    figure.savefig(place.with_suffix(".png"), dpi=150)
    pd.concat(found, names=["network"]).to_csv(place.with_suffix(".csv"), float_format="%.6f")
    print(f"wrote {place}.png and .csv")


if __name__ == "__main__":
    main()
