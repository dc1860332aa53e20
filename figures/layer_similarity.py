"""Which layer corresponds to which: ``python -m figures.layer_similarity`` (about two minutes).

GBS, unbiased CKA and mutual kNN between all layers of two networks. ResNet-20 against ResNet-56 and ResNet-56 against
ResNet-44 on 1000 CIFAR-10 test images where the shared data are present, else the two demo networks on digits. Writes
figures/layer_similarity.png and, beside it, the share of layers whose best match lies in the same stage.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

import repgraph
from benchmarks import shared_data
from repgraph import Activations, plot
from repgraph.demo import digits, digits_resnet
from repgraph.metrics.similarity import (
    gbs,
    layer_matching_accuracy,
    layer_matching_chance,
    linear_cka,
    mutual_knn,
)

MEASURES = {"GBS": gbs, "unbiased CKA": partial(linear_cka, unbiased=True), "mutual kNN": mutual_knn}


def networks() -> tuple[Mapping[str, Activations], list[tuple[str, str]]]:
    """Activations by network, and which networks to compare."""
    if not shared_data.available():
        pair = ("seed 0", "seed 1")
        return {name: repgraph.capture(digits_resnet(seed), digits()) for seed, name in enumerate(pair)}, [pair]
    images, _ = shared_data.cifar_images(1000)
    found = {
        f"ResNet-{depth}": repgraph.capture(shared_data.cifar_network(depth), images, memory="4 GB")
        for depth in (20, 44, 56)
    }
    return found, [("ResNet-20", "ResNet-56"), ("ResNet-56", "ResNet-44")]


def stage(layer: str) -> str:
    return layer.split(".")[0]


def main() -> None:
    mpl.use("Agg")
    activations, pairs = networks()
    panels: dict[str, pd.DataFrame] = {}
    lines = []
    for a, b in pairs:
        tables = repgraph.compare_layers(MEASURES, activations[a], activations[b], names=(a, b))
        for name, table in tables.items():
            hits, chance = (f(table, group=stage) for f in (layer_matching_accuracy, layer_matching_chance))
            panels[f"{name}, {a} and {b}: {hits:.0%}"] = table
            lines.append(
                {"rows": a, "columns": b, "measure": name, "same_stage": hits, "by_chance": chance,
                 "shuffled_samples": table.attrs["chance"], "n": table.attrs["n"]}
            )  # fmt: skip
    figure, grid = plt.subplots(
        len(pairs), 3, figsize=(13, 3.6 * len(pairs) + 0.4), squeeze=False, layout="constrained"
    )
    plot.heatmaps(panels, axes=list(grid.flat), best=True)
    found = pd.DataFrame(lines)
    figure.supxlabel(
        f"{found['n'][0]} samples; GBS k = 5, mutual kNN k = 10; dot: best match of each row; % of rows whose best "
        f"match is in the same stage (a random layer: {', '.join(f'{c:.0%}' for c in found['by_chance'].unique())})",
        size=8,
        color="#444444",
    )
    place = Path(__file__).with_suffix("")
    figure.savefig(place.with_suffix(".png"), dpi=150)
    found.to_csv(place.with_suffix(".csv"), index=False, float_format="%.4f")
    print(found.to_string(index=False))
    print(f"wrote {place}.png and .csv")


if __name__ == "__main__":
    main()
