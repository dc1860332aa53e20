"""Modularity of every layer: the published route against ours, on the same captured activations in the same run.

    python -m benchmarks.modularity [--n 500 2000 5000] [--repeats 3]

Published route, written from the method note: cosine similarities by one product, the k largest of each row by a heap,
a dense adjacency, (A + A') / 2, networkx's modularity. The floor is the bare float32 product X X' of each layer.
Capture is excluded on all sides. ResNet-56 on CIFAR-10 images where they are present, else the demo network on digits.
"""

import argparse
import heapq
import platform
import statistics
import time
from collections.abc import Callable

import networkx as nx
import numpy as np
import torch
from torch import Tensor

import repgraph
from benchmarks import shared_data
from benchmarks.rss import growth
from repgraph.demo import digits, digits_resnet

K = 3


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


def timed(
    f: Callable[[Tensor, Tensor], float], layers: dict[str, Tensor], y: Tensor, repeats: int
) -> tuple[float, list]:
    times, values = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        values = [f(x, y) for x in layers.values()]
        times.append(time.perf_counter() - start)
    return statistics.median(times), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[500, 2000, 5000])
    parser.add_argument("--repeats", type=int, default=5, help="median of so many runs; one run from n = 2000 on")
    args = parser.parse_args()
    real = shared_data.available()
    model = shared_data.cifar_network(56) if real else digits_resnet()
    x, y = shared_data.cifar_images(max(args.n)) if real else digits()
    network = "ResNet-56, CIFAR-10" if real else "demo network, digits"
    print(
        f"{network}; k = {K}; {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, networkx {nx.__version__}"
    )
    print(
        "features    n  layers      d       published      ours   ratio   products  ours/products  max |dQ|    growth"
    )
    for n in args.n:
        if n > len(x):
            print(f"n = {n}: only {len(x)} samples")
            continue
        for reduce in (None, "mean"):
            acts = repgraph.capture(model, x[:n], reduce=reduce, memory="12 GB", progress=False)
            layers = {name: acts[name] for name in acts}
            repeats = 1 if n >= 2000 else args.repeats
            with growth() as memory:  # a run of its own: watching costs time
                timed(ours, layers, y[:n], 1)
            mine, q = timed(ours, layers, y[:n], repeats)
            theirs, reference = timed(published, layers, y[:n], repeats)
            floor, _ = timed(product, layers, y[:n], repeats)
            widths = [spec.nbytes // 4 for spec in acts.specs.values()]
            difference = max(abs(a - b) for a, b in zip(q, reference, strict=True))
            print(
                f"{'pooled' if reduce else 'flattened':9s} {n:5d}  {len(layers):4d}  {min(widths):5d}-{max(widths):<6d}"
                f"{theirs:9.2f} s {mine:7.2f} s {theirs / mine:6.1f}x {floor:8.2f} s {mine / floor:10.2f}x   "
                f"{difference:9.1e}  {memory.peak / 1e6:8.0f} MB",
                flush=True,
            )
            del acts, layers


if __name__ == "__main__":
    main()
