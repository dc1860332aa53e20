"""What a cut by each score leaves, bare, repaired and fine-tuned: ``python -m figures.layer_pruning``.

Draws what `python -m benchmarks.layers` has measured (benchmarks/layers.json); writes figures/layer_pruning.png.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks import layers

NETWORK = "resnet56-jpeg"
LINES = {  # score -> colour, marker
    "oracle": ("#000000", "s"),
    "redundancy": ("#D55E00", "o"),
    "block_influence": ("#0072B2", "^"),
    "modularity": ("#009E73", "v"),
    "tail": ("#CC79A7", "D"),
    "random": ("#999999", "x"),
}
STATES = {"dropped": "no repair", "repaired": "linear repair", "tuned": "repair and 100 steps"}


def values(kept: layers.Kept, by: str, state: str) -> dict[int, list[float]]:
    """Accuracy in percent, of each seed, by m."""
    found: dict[int, list[float]] = {}
    own = layers.score_table(kept, NETWORK)
    for m in layers.DROPPED[NETWORK]:
        for one in [f"random {seed}" for seed in layers.RANDOM_SEEDS] if by == "random" else [by]:
            result = layers.after(kept, NETWORK, own, one, m, state)
            if result is not None:
                found.setdefault(m, []).append(100 * result["accuracy"])
    return found


def draw(ax: Axes, kept: layers.Kept, state: str) -> None:
    """Accuracy against the number of dropped blocks."""
    for by, (color, marker) in LINES.items():
        found = values(kept, by, state)
        if not found:
            continue
        m, mean = list(found), np.array([np.mean(v) for v in found.values()])
        ax.plot(m, mean, color=color, marker=marker, markersize=4.5, linewidth=1.3, label=by.replace("_", " "))
        if by == "random":
            spread = np.array([np.std(v, ddof=1) if len(v) > 1 else 0 for v in found.values()])
            ax.fill_between(m, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    whole = 100 * kept.values[f"{NETWORK} oracle"]["accuracy"]
    ax.axhline(whole, color="#999999", linestyle="--", linewidth=0.9)
    ax.annotate(f"whole {whole:.1f}", (ax.get_xlim()[0], whole), (2, 3), textcoords="offset points", size=7.5)
    ax.set_title(f"ResNet-56: {STATES[state]}", size=9.5)
    ax.set_xlabel("blocks dropped of 25 that can be")
    ax.set_xticks(layers.DROPPED[NETWORK])
    ax.spines[["top", "right"]].set_visible(False)


def draw_correlations(ax: Axes, kept: layers.Kept) -> None:
    """Spearman correlation with the oracle on the held-out networks."""
    networks = [name for name in layers.HELD_OUT if f"{name} oracle" in kept.values]
    rows = [by for by in (*layers.BY, "result_change") if by != "oracle"]
    table = pd.DataFrame({name: layers.correlation(kept, name, " oracle") for name in networks}).reindex(rows)
    table = table.loc[table.mean(axis=1).sort_values().index]
    for name, marker in zip(networks, "osD^", strict=False):
        ax.plot(table[name], range(len(table)), linestyle="", marker=marker, markersize=4.5, alpha=0.75, label=name)
    ax.plot(table.mean(axis=1), range(len(table)), linestyle="", marker="|", markersize=15, color="black", label="mean")
    names = {"result_change": "CKA of the result (runs the model)"}
    ax.set_yticks(range(len(table)), [names.get(str(by), str(by).replace("_", " ")) for by in table.index], size=8)
    ax.axvline(0, color="#999999", linewidth=0.8)
    ax.set_title("Spearman correlation with the oracle, held-out networks", size=9.5)
    ax.legend(fontsize=7, frameon=False, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)


def main() -> None:
    mpl.use("Agg")
    kept = layers.Kept(layers.KEPT)
    figure = plt.figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.15))
    draw_correlations(figure.add_subplot(grid[0, :]), kept)
    axes: list[Axes] = []
    for column, state in enumerate(STATES):
        axes.append(figure.add_subplot(grid[1, column], sharey=axes[0] if axes else None))
        draw(axes[-1], kept, state)
    axes[0].set_ylabel("accuracy on 2,000 test images, %")
    axes[0].legend(fontsize=7.5, frameon=False, loc="lower left")
    place = Path(__file__).with_suffix(".png")
    figure.savefig(place, dpi=130)
    print(f"wrote {place}")


if __name__ == "__main__":
    main()
