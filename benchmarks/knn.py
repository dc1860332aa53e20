"""Exact cosine neighbours: ours against a bare product and the fastest peers, in the same run on the same data.

    python -m benchmarks.knn [--n 10000 20000] [--d 512 4096] [--data relu normal] [--repeats 3]

The floor is one full float32 product X X' in blocks of 1024 rows, of which nothing is kept. Peers: torch's product and
top-k in blocks, scikit-learn's brute force, faiss-cpu's IndexFlatIP (where it is installed) on normalised rows.
Neighbour sets are compared with float64 on 300 rows. "relu": half of 20 classes' features with noise, behind a ReLU,
whose cosines crowd near 1; "normal": independent.
"""

import argparse
import platform
import statistics
from collections.abc import Callable

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import repgraph
from benchmarks.rss import measured
from repgraph.neighbors import knn

K = 10
_BLOCK = 1024


def features(kind: str, n: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    if kind == "relu":
        centres = torch.randn(20, d, generator=generator)
        x = (x + centres[torch.arange(n) % 20] + 1).relu_()
    return x


def product(x: Tensor) -> None:
    for block in x.split(_BLOCK):
        block @ x.T


def by_topk(x: Tensor) -> Tensor:
    z = torch.nn.functional.normalize(x)
    found = []
    for i in range(0, len(z), _BLOCK):
        s = z[i : i + _BLOCK] @ z.T
        s[torch.arange(len(s)), torch.arange(i, i + len(s))] = -torch.inf
        found.append(s.topk(K).indices)
    return torch.cat(found)


def by_sklearn(x: Tensor) -> Tensor:
    search = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine").fit(x.numpy())
    return torch.from_numpy(search.kneighbors(return_distance=False))


def by_faiss(x: Tensor) -> Tensor:
    import faiss

    z = torch.nn.functional.normalize(x).numpy()
    index = faiss.IndexFlatIP(z.shape[1])
    index.add(z)
    return torch.from_numpy(index.search(z, K + 1)[1])


def ours(x: Tensor) -> Tensor:
    return knn(x, K)[1]


def agreement(x: Tensor, found: Tensor) -> int:
    """Of 300 rows, how many have another set than float64 finds, ties within 1e-12 aside."""
    rows = torch.linspace(0, len(x) - 1, 300).long()
    z = x / torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
    s = z[rows] @ z.T
    s[torch.arange(len(rows)), rows] = -torch.inf
    kth = s.topk(K).values[:, -1:]
    return int((s.gather(1, found[rows]) < kth - 1e-12).any(1).sum())


def median(f: Callable[[], object], repeats: int) -> tuple[float, int, object]:
    runs = [measured(f) for _ in range(repeats)]
    return statistics.median(run[0] for run in runs), max(run[1] for run in runs), runs[-1][2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[10_000, 20_000])
    parser.add_argument("--d", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--data", nargs="+", default=["relu", "normal"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-sklearn", action="store_true", help="the slowest peer")
    args = parser.parse_args()
    peers = {"torch": by_topk} | ({} if args.no_sklearn else {"sklearn": by_sklearn})
    try:
        import faiss

        peers["faiss"] = by_faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
    except ImportError:
        print("faiss-cpu is not installed: without it")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, k = {K}")
    print("data         n     d  product s  ours s /product   best peer s  /peer  growth wrong")
    ours(features("normal", 100, 8))  # compiles
    for kind in args.data:
        for n in args.n:
            for d in args.d:
                x = features(kind, n, d)
                floor, _, _ = median(lambda x=x: product(x), args.repeats)
                own, peak, found = median(lambda x=x: ours(x), args.repeats)
                times = {name: median(lambda f=f, x=x: f(x), args.repeats)[0] for name, f in peers.items()}
                best = min(times, key=times.__getitem__)
                print(
                    f"{kind:7}{n:7}{d:6}{floor:11.2f}{own:8.2f}{own / floor:9.2f}{best:>9}{times[best]:7.2f}"
                    f"{own / times[best]:7.2f}{peak / 2**20:6.0f} MB{agreement(x, found):6}",
                    flush=True,
                )
    print(f"repgraph {repgraph.__version__}")


if __name__ == "__main__":
    main()
