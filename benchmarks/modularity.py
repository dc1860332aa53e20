"""Modularity of every layer, k = 3, from captured activations.

    python -m benchmarks.modularity [--full]

The lower bound is the bare float32 product X X' of each layer. The peer is the published route, written from the method
note: cosine similarities by one product, the k largest of each row by a heap, a dense adjacency, (A + A') / 2,
networkx's modularity. The difference is the largest of Q. Capture is excluded on all sides, which all read flattened
features mapped from a folder, and pooled ones in memory. ResNet-56 on CIFAR-10 images where they are present, else the
demo network on digits.
"""

import heapq
import shutil
import tempfile
from collections.abc import Callable, Iterator

import networkx as nx
import numpy as np
from torch import Tensor

import repgraph
from benchmarks import shared_data
from benchmarks.rows import Row, Target, main, measure

K = 3
SMALL = {500: Target(), 1000: Target(growth=1500)}
FULL = {500: Target(floor=1.1), 5000: Target(floor=0.6, peer=0.2), 10_000: Target(growth=1500)}
"""Samples of flattened features; ours alone runs on the most, for which the published route takes 20 minutes."""
POOLED = {500: Target(peer=1 / 13), 2000: Target(peer=1 / 45)}


def published(x: Tensor, labels: Tensor) -> float:
    z = x.flatten(1)
    z = z / z.norm(dim=1, keepdim=True).clamp_min(1e-8)
    similarity = z @ z.T
    similarity.fill_diagonal_(0)
    n = len(x)
    adjacency = np.zeros((n, n))
    for i, row in enumerate(similarity.tolist()):
        for j in heapq.nlargest(K, range(n), key=row.__getitem__):
            adjacency[i, j] = row[j]
    graph = nx.from_numpy_array((adjacency + adjacency.T) / 2)
    classes = [np.flatnonzero(labels.numpy() == c).tolist() for c in labels.unique().tolist()]
    return nx.community.modularity(graph, classes)


def ours(x: Tensor, labels: Tensor) -> float:
    return repgraph.modularity(repgraph.knn_graph(x, K), labels)


def product(x: Tensor, labels: Tensor) -> float:
    z = x.flatten(1)
    return float((z @ z.T)[0, 0])


def curve(f: Callable[[Tensor, Tensor], float], acts: repgraph.Activations) -> np.ndarray:
    return np.array([f(acts[name], acts.labels) for name in acts])


def row(acts: repgraph.Activations, sizes: str, target: Target, alone: bool = False) -> Row:
    """The target is of ResNet-56."""
    widths = [spec.nbytes // 4 for spec in acts.specs.values()]
    return measure(
        "modularity of layers",
        f"{sizes}, n = {acts.n:,}, {len(acts)} layers of {min(widths):,} to {max(widths):,} features",
        lambda: curve(ours, acts),
        floor=None if alone else ("X X'", lambda: curve(product, acts)),
        peers={} if alone else {"published route": lambda: curve(published, acts)},
        difference=None if alone else lambda found, others: np.abs(found - others["published route"]).max(),
        target=target if shared_data.available() else Target(),
        note=f"ours alone, on {acts.nbytes / 1e9:.1f} GB" if alone else "",
    )


def rows(full: bool) -> Iterator[Row]:
    targets, pooled = (FULL, POOLED) if full else (SMALL, {500: Target()})
    name, model, x, y = shared_data.network(max(targets))
    curve(ours, repgraph.capture(model, (x[:100], y[:100]), progress=False))  # libraries allocate on first use
    for n in sorted({n for n in (*targets, *pooled) if n > len(x)}):
        yield Row(work="modularity of layers", sizes=f"{name}, n = {n:,}", note=f"left out: {len(x):,} samples here")
    for n, target in pooled.items():
        if n <= len(x):
            yield row(repgraph.capture(model, (x[:n], y[:n]), reduce="mean", progress=False), f"{name}, pooled", target)
    most = max(n for n in targets if n <= len(x))
    need = most * sum(spec.nbytes for spec in repgraph.layer_names(model, data=x[:2]).specs.values())
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 1.1 * need:
            note = f"left out: {folder} has no room for {need / 1e9:.1f} GB"
            yield Row(work="modularity of layers", sizes=f"{name}, flattened", note=note)
            return
        acts = repgraph.capture(model, (x[:most], y[:most]), folder=folder, progress=False)
        for n, target in targets.items():
            if n <= len(x):
                yield row(acts.subset(slice(0, n)), f"{name}, flattened", target, alone=n == max(targets))


if __name__ == "__main__":
    main(rows)
