"""A profile under a memory budget of a tenth of the activations (or the largest layer), beside one that holds them all.

    python -m benchmarks.memory [--full]

ResNet-56 on CIFAR-10 images where they are present, else the demo network on digits. Growth may reach the budget, what
a pass without hooks takes, and 200 MB. The difference is the largest of the two tables. Each runs once: it is memory
that counts here.
"""

import math
from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor, nn

import repgraph
from benchmarks import shared_data
from benchmarks.rows import Row, Target, main, measure

SMALL, FULL = 60, 500
REPEATS = 5


@torch.no_grad()
def passed(model: nn.Module, x: Tensor) -> None:
    for batch in x.split(64):
        model(batch)


def apart(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """The largest difference; infinite where only one is NaN."""
    return float((a.fillna(math.inf) - b.fillna(math.inf)).abs().max(axis=None))


def rows(full: bool) -> Iterator[Row]:
    name, model, x, y = shared_data.network(REPEATS * (FULL if full else SMALL))
    n = len(x) // REPEATS
    layers = [len(x) * spec.nbytes for spec in repgraph.layer_names(model, data=x[:2]).specs.values()]
    whole, budget = sum(layers), max(sum(layers) // 10, *layers)
    sizes = f"{name}, {REPEATS} x {n}, {whole / 1e6:,.0f} MB of activations"

    def profile(memory: int | None) -> pd.DataFrame:
        return repgraph.profile(model, (x, y), n=n, repeats=REPEATS, memory=memory, progress=False)

    repgraph.profile(model, (x[:100], y[:100]), n=50, repeats=2, progress=False)  # libraries allocate on first use
    bare = measure("pass without hooks", sizes, lambda: passed(model, x), runs=1)
    yield bare
    yield measure(
        "profile under a budget",
        sizes,
        lambda: profile(budget),
        peers={"all in memory": lambda: profile(None)},
        difference=lambda found, others: apart(found, others["all in memory"]),
        target=Target(growth=budget / 1e6 + bare.growth + 200, difference=0),
        runs=1,
        note=f"budget {budget / 1e6:.0f} MB",
    )


if __name__ == "__main__":
    main(rows)
