"""Exact cosine neighbours, k = 10.

    python -m benchmarks.knn [--full]

The lower bound is one full float32 product X X' in blocks of 1024 rows, of which nothing is kept. Peers: torch's
product and top-k in blocks, scikit-learn's brute force, faiss-cpu's IndexFlatIP on normalised rows. "relu": centres of
20 classes with noise, behind a ReLU, whose cosines crowd near 1; "normal": independent. The difference counts, of 300
rows, those with another set of neighbours than float64 finds, ties aside.
"""

from collections.abc import Iterator

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from benchmarks.machine import fast_bfloat16
from benchmarks.rows import Row, Target, main, measure, peer
from repgraph.neighbors import knn

K = 10
_BLOCK = 1024
SMALL = (("relu", 2000, 512), ("relu", 2000, 4096), ("normal", 2000, 512))
FULL = (
    *(("relu", n, d) for n in (10_000, 20_000) for d in (512, 4096)),
    *(("normal", 10_000, d) for d in (512, 4096)),
)


def features(kind: str, n: int, d: int) -> Tensor:
    """Samples of `kind`, (n, d), made in one allocation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    if kind == "relu":
        centres = torch.randn(20, d, generator=generator) + 1
        for i in range(0, n, 20):
            x[i : i + 20] += centres[: n - i]
        x.relu_()
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

    faiss.omp_set_num_threads(torch.get_num_threads())
    z = torch.nn.functional.normalize(x).numpy()
    index = faiss.IndexFlatIP(z.shape[1])
    index.add(z)
    return torch.from_numpy(index.search(z, K + 1)[1])


def wrong(x: Tensor, found: Tensor) -> int:
    """Of 300 rows, how many have another set than float64 finds, ties within 1e-12 aside."""
    rows = torch.linspace(0, len(x) - 1, 300).long()
    s, squares = torch.zeros(len(rows), len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for part in x.split(2048, dim=1):
        z = part.double()
        s += z[rows] @ z.T
        squares += z.square().sum(1)
    s /= (squares[rows, None] * squares).sqrt()
    s[torch.arange(len(rows)), rows] = -torch.inf
    kth = s.topk(K).values[:, -1:]
    return int((s.gather(1, found[rows]) < kth - 1e-12).any(1).sum())


def row(kind: str, n: int, d: int, full: bool) -> Row:
    x = features(kind, n, d)
    promised = {"floor": 0.6, "peer": 0.5} if fast_bfloat16() else {"peer": 1.0}
    return measure(
        "nearest neighbours",
        f"{kind}, n = {n:,}, d = {d:,}",
        lambda: knn(x, K)[1],
        floor=("X X'", lambda: product(x)),
        peers={
            "torch": lambda: by_topk(x),
            "faiss-cpu": peer("faiss", lambda: by_faiss(x)),
            "scikit-learn": lambda: by_sklearn(x),
        },
        difference=lambda found, _: wrong(x, found),
        target=Target(growth=512, difference=0, **(promised if full else {})),
    )


def rows(full: bool) -> Iterator[Row]:
    knn(features("normal", 2000, 300), K)  # compiles
    for kind, n, d in FULL if full else SMALL:
        yield row(kind, n, d, full)


if __name__ == "__main__":
    main(rows)
