"""What cuts of filters leave, by score and by budget, bare and refitted: ``python -m figures.filter_pruning``.

Draws what `python -m benchmarks.filters` has measured (benchmarks/filters.json); writes figures/filter_pruning.png.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks import filters
from benchmarks.kept import Kept

NETWORK = "resnet20-jpeg"
SCORES = {  # score -> colour, marker
    "l2": ("#0072B2", "^"),
    "taylor": ("#56B4E9", "v"),
    "chip": ("#D55E00", "o"),
    "hrank": ("#E69F00", "s"),
    "fsm": ("#000000", "*"),
    "central_filter": ("#CC79A7", "D"),
    "tp taylor": ("#009E73", "P"),
    "random": ("#999999", "x"),
}
BUDGETS = {
    "uniform": ("#0072B2", "^"),
    "global": ("#E69F00", "s"),
    "global_mean": ("#CC79A7", "D"),
    "sensitivity": ("#009E73", "v"),
    "search": ("#D55E00", "o"),
}


def draw(ax: Axes, kept: Kept, lines: Mapping[str, tuple[str, str]], state: str, budgets: bool) -> None:
    """Accuracy against the share of MACs that is left."""
    for name, (color, marker) in lines.items():
        points = []
        for ratio in filters.RATIOS[NETWORK]:
            budget, by = (name, filters.BUDGET_SCORE) if budgets else ("uniform", name)
            keys = [f"{NETWORK} {budget} {ratio} {one}" for one in (filters.RANDOM if by == "random" else (by,))]
            found = [kept.values[key] for key in keys if key in kept.values]
            if found:
                values = [100 * one[state]["accuracy"] for one in found]
                points.append((np.mean([one["macs"] for one in found]), np.mean(values), np.std(values)))
        if points:
            left, mean, spread = map(np.array, zip(*points, strict=True))
            ax.plot(100 * left, mean, color=color, marker=marker, markersize=4.5, linewidth=1.3, label=name)
            if name == "random":
                ax.fill_between(100 * left, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    whole = 100 * kept.values[f"{NETWORK} whole"]["accuracy"]
    ax.axhline(whole, color="#999999", linestyle="--", linewidth=0.9)
    ax.annotate(f"whole {whole:.1f}", (0.02, whole), (0, -10), ("axes fraction", "data"), "offset points", size=7.5)
    ax.spines[["top", "right"]].set_visible(False)


def main() -> None:
    mpl.use("Agg")
    kept = Kept(filters.KEPT)
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.6), layout="constrained", sharey="col", sharex=True)
    for row, (lines, title) in enumerate(
        ((SCORES, "every score, uniform budget"), (BUDGETS, f"every budget, score {filters.BUDGET_SCORE}"))
    ):
        for column, (state, what) in enumerate((("cut", "as cut"), ("refit", "after the least-squares refit"))):
            draw(axes[row, column], kept, lines, state, budgets=row == 1)
            axes[row, column].set_title(f"ResNet-20, {title}: {what}", size=9.5)
        axes[row, 1].legend(fontsize=7.5, frameon=False, loc="lower right")
        axes[row, 0].set_ylabel("accuracy on 2,000 test images, %")
    for ax in axes[1]:
        ax.set_xlabel("MACs left, %")
    place = Path(__file__).with_suffix(".png")
    figure.savefig(place, dpi=130)
    print(f"wrote {place}")


if __name__ == "__main__":
    main()
