"""How time and memory grow with samples, layers and features.

    python -m benchmarks.scaling [--full]

`knn_graph`, k = 10, on features behind a ReLU as in benchmarks.knn; `profile_activations` of 7, 14 and 28 equal
layers; neighbours of 500 samples of very many features, with bound and difference as there. An exponent p is the slope
of a least-squares line through log time against log size: time grows as size^p.
"""

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch

import repgraph
from benchmarks.knn import K, features, product, wrong
from benchmarks.rows import Row, Target, interleaved, main, measure
from repgraph.neighbors import knn

SMALL, FULL = (1000, 2000, 4000), (1000, 2000, 5000, 10_000, 20_000, 50_000)
LAYERS = (7, 14, 28)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of seconds = c size^p that fits best on logs."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def by_samples(n: int, d: int, target: Target) -> Row:
    x = features("relu", n, d)
    return measure("knn_graph", f"n = {n:,}, d = {d:,}", lambda: repgraph.knn_graph(x, K), target=target)


def by_layers(counts: tuple[int, ...], n: int = 1000, d: int = 512) -> Row:
    x = features("relu", n, d)
    acts = repgraph.Activations({f"layer {i}": x.roll(i, 1) for i in range(max(counts))}, torch.arange(n) % 20)

    def profile(count: int) -> None:
        repgraph.profile_activations(acts.subset(layers=list(acts)[:count]), n=n, repeats=1, progress=False)

    times, _ = interleaved({f"{count} layers": lambda count=count: profile(count) for count in counts}, 5)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    return Row(
        work="profile: time ~ layers^p",
        sizes=f"{counts[0]} to {counts[-1]} layers, n = {n:,}, d = {d:,}",
        ours=medians[f"{counts[-1]} layers"],
        value=exponent(counts, list(medians.values())),
        unit="= p",
        target=Target(value=1.1),
        runs="≥ 5",
        note=", ".join(f"{name} {seconds:.3g} s" for name, seconds in medians.items()) + "; p = 1, and 0.1 for noise",
    )


def wide(n: int, d: int, target: Target) -> Row:
    x = features("relu", n, d)
    return measure(
        "nearest neighbours, wide",
        f"n = {n:,}, d = {d:,}",
        lambda: knn(x, K)[1],
        floor=("X X'", lambda: product(x)),
        difference=lambda found, _: wrong(x, found),
        target=target,
    )


def rows(full: bool) -> Iterator[Row]:
    by_samples(1100, 512, Target())  # compiles
    sizes = FULL if full else SMALL
    found = []
    for n in sizes:
        found.append(by_samples(n, 512, Target()))
        yield found[-1]
    p = exponent(sizes, [row.ours for row in found])
    yield Row(
        work="knn_graph: time ~ n^p",
        sizes=f"n = {sizes[0]:,} to {sizes[-1]:,}",
        value=p,
        unit="= p",
        target=Target(value=2.0),
    )
    if full:
        yield by_samples(50_000, 2048, Target(growth=2500))
    yield by_layers(LAYERS)
    for d in (100_000, 1_000_000) if full else (100_000,):
        yield wide(500, d, Target(growth=512, difference=0))


if __name__ == "__main__":
    main(rows)
