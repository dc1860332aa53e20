"""Feature entropy, complexity and partition over the epochs of a small net: ``python -m figures.over_training``.

A convolutional net of three layers on scikit-learn's digits (two minutes). Writes figures/over_training.png and the
numbers beside it.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import repgraph
from repgraph.demo import digits
from repgraph.metrics.complexity import transformation_complexity
from repgraph.metrics.feature_entropy import unit_feature_entropy
from repgraph.metrics.spline import EarlyBird, local_complexity, region_codes

EPOCHS = 40
RADIUS = 0.3
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def measured(net: nn.Module, x: Tensor, y: Tensor, held_out: tuple[Tensor, Tensor]) -> dict[str, float]:
    """All numbers of one epoch, on training images; accuracy and loss on both."""
    net.eval()
    maps = repgraph.capture(net, (x, y), nn.ReLU, progress=False)
    entropy = unit_feature_entropy(maps, progress=False).layers
    report = transformation_complexity(net, (x, y), lam=0.04, progress=False)
    row = {
        **{f"entropy_{name}": float(value) for name, value in entropy["entropy"].items()},
        "entropy_floor": float(entropy["floor"].iloc[0]),
        "entropy_ceiling": float(entropy["ceiling"].iloc[0]),
        "complexity": report.total,
        "complexity_ceiling": report.ceiling,
        "label_information": report.label_information,
        "label_ceiling": report.label_ceiling,
        "local_complexity": float(local_complexity(net, x[:64], radius=RADIUS, progress=False).sum(1).double().mean()),
    }
    with torch.no_grad():
        for name, (images, labels) in {"train": (x, y), "held_out": held_out}.items():
            scores = net(images)
            row[f"loss_{name}"] = float(F.cross_entropy(scores, labels))
            row[f"accuracy_{name}"] = float((scores.argmax(1) == labels).float().mean())
    net.train()
    return row


def run() -> pd.DataFrame:
    x, y = digits("train")
    held_out = digits()
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    bird = EarlyBird()
    rows = {}
    for epoch in range(EPOCHS + 1):
        if epoch:
            for chosen in torch.split(torch.randperm(len(x)), 64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[chosen]), y[chosen]).backward()
                optimizer.step()
        rows[epoch] = measured(net, x, y, held_out)
        settled = bird.update(region_codes(net.eval(), x[:200], packed=True, progress=False))
        rows[epoch] |= {"partition_distance": bird.distances[-1], "early_bird": settled}
        net.train()
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("epoch")


def main() -> None:
    mpl.use("Agg")
    table = run()
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    (entropy, complexity), (told, partition) = axes
    for name, color in zip(("1", "3", "5"), ("#56B4E9", BLUE, "#000000"), strict=True):
        entropy.plot(table[f"entropy_{name}"], color=color, label=f"ReLU {name}")
    limits = (
        (entropy, "entropy_floor", "noise"),
        (entropy, "entropy_ceiling", "ceiling ln n"),
        (complexity, "complexity_ceiling", "ceiling log2 N"),
        (told, "label_ceiling", "ceiling H(Y)"),
    )
    complexity.plot(table["complexity"], color=BLUE)
    told.plot(table["label_information"], color=BLUE)
    for ax, column, text in limits:
        ax.plot(table[column], ":", color=GREY, linewidth=1)
        below = text.startswith("ceiling")
        ax.annotate(text, (EPOCHS, table[column].iloc[0]), (0, -3 if below else 3), textcoords="offset points",
                    ha="right", va="top" if below else "bottom", color=GREY, size=8)  # fmt: skip
    partition.plot(table["partition_distance"], color=ORANGE, label="largest distance to the 3 epochs before")
    partition.axhline(0.16, color=GREY, linestyle=":", linewidth=1)
    partition.annotate("early bird below 0.16", (EPOCHS, 0.16), (0, 3), textcoords="offset points", ha="right",
                       color=GREY, size=8)  # fmt: skip
    partition.plot(table["local_complexity"] / 1000, color=BLUE, label=f"local complexity / 1000, r = {RADIUS}")
    for ax, text in ((entropy, "feature entropy, nats"), (complexity, "complexity of all gates, bits"),
                     (told, "label information, bits"), (partition, "partition")):  # fmt: skip
        ax.set_ylabel(text)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in (told, partition):
        ax.set_xlabel("epoch")
    for ax in (entropy, partition):
        ax.legend(frameon=False, fontsize=8)
    first = int(table["early_bird"].idxmax()) if table["early_bird"].any() else None
    end = table.iloc[-1]
    says = (
        f"Three conv layers, {len(digits('train')[0])} training digits; held-out accuracy "
        f"{table['accuracy_held_out'].iloc[0]:.0%} to {end['accuracy_held_out']:.0%}. Last layer's feature entropy "
        f"{table['entropy_5'].iloc[0]:.2f} to {end['entropy_5']:.2f} nats (noise {end['entropy_floor']:.2f}); "
        f"complexity {table['complexity'].iloc[0]:.2f} to {end['complexity']:.2f} bits;\nlabel information "
        f"{table['label_information'].iloc[0]:.2f} to {end['label_information']:.2f} bits; "
        + ("the early bird never fires." if first is None else f"the early bird fires at epoch {first}.")
    )
    figure.supxlabel(says, size=8.5)
    place = Path(__file__).with_suffix("")
    figure.savefig(place.with_suffix(".png"), dpi=130)
    table.to_csv(place.with_suffix(".csv"), float_format="%.5f")
    print(says)
    print(f"wrote {place}.png and .csv")


if __name__ == "__main__":
    main()
