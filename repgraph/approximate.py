"""Approximate nearest neighbours by faiss's navigable small worlds, with the share of the true ones they found."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from repgraph.neighbors import Metric, as_samples, checked, nearest_among

_LINKS = 32  # per sample and level
_BUILD, _SEARCH = 80, 128  # candidates kept while links are made and followed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ApproximateNeighbors:
    """Neighbours of each sample, and how many of the true ones they are."""

    values: Tensor
    """Cosine similarities, falling, or distances, rising, (n, k): those of the neighbours found, exact."""
    indices: Tensor
    """The neighbours, (n, k), int64."""
    recall: float
    """Share of the true k neighbours that were found, in [0, 1], the mean over a sample of rows."""


def approximate_knn(
    x: Tensor, k: int, *, metric: Metric = "cosine", seed: int = 0, sample: int = 500
) -> ApproximateNeighbors:
    r"""Neighbours of each sample that are mostly the k nearest; `repgraph.graph.knn` finds the exact ones.

    A hierarchical navigable small world over all samples, in float32, proposes neighbours; their similarities or
    distances are then computed in float64, as `knn` does.

    Parameters
    ----------
    x
        Samples, shape (n, ...), as for `knn`. The search runs on the CPU; the result is on the device of x.
    k
        Neighbours per sample, 1 <= k < n.
    metric
        "cosine" (default) or "euclidean".
    seed
        Of the levels of the search and of the rows that are checked.
    sample
        Rows whose neighbours are compared with the exact ones: all, where n is not larger.

    Returns
    -------
    ApproximateNeighbors
        Values and indices as `knn` gives them, and the recall.

    Raises
    ------
    ValueError
        As `knn` does, or if `sample` is not a positive integer.
    ImportError
        If faiss is not installed.

    Notes
    -----
    The recall is counted by index, so a true neighbour that ties with another may count as missed. Over 500 rows its
    standard error is below 0.022. Features of classes are found well (0.99 for 20,000 samples around 20 centres), while
    unrelated ones hardly have neighbours that a search could be led to (about 0.5). The exact search is as fast up to
    some 50,000 samples.

    Links are made by all of torch's threads at once: with one thread the same seed gives the same neighbours, with
    several a few of them may differ from run to run. Memory beyond x: up to three copies of it, and 300 bytes a sample.

    References
    ----------
    Malkov, Yashunin, "Efficient and robust approximate nearest neighbor search using hierarchical navigable small world
    graphs", IEEE TPAMI 42 (2020).

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> found = approximate_knn(x, 1)
    >>> found.indices.tolist(), found.recall
    ([[1], [2], [1]], 1.0)
    """
    x = as_samples(checked(x, k, metric))
    if isinstance(sample, bool) or not isinstance(sample, Integral) or sample < 1:
        raise ValueError(f"sample must be a positive integer, got {sample!r}")
    device, x = x.device, x.cpu()
    n = len(x)
    others = _proposed(x, k, metric, seed)
    own = torch.arange(n)[:, None]
    others[others == own] = -1
    few = (others >= 0).sum(1) < k  # as among many duplicates
    values, indices = nearest_among(x, others, k, metric, ~few, few)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:sample]
    nobody = torch.zeros(n, dtype=torch.bool)
    exact = nearest_among(x, indices, k, metric, nobody, nobody.index_fill(0, rows, True))[1][rows]
    recall = (indices[rows][:, :, None] == exact[:, None]).any(2).double().mean().item()
    return ApproximateNeighbors(values=values.to(device), indices=indices.to(device), recall=recall)


def _proposed(x: Tensor, k: int, metric: Metric, seed: int) -> Tensor:
    """For each row k + 1 samples or fewer, mostly the nearest ones and itself; -1 = nobody."""
    try:
        import faiss  # here, since it is optional
    except ImportError as error:
        raise ImportError("approximate neighbours need faiss: pip install 'repgraph[approximate]'") from error
    z = x if metric == "cosine" else x - x.mean(0)
    z = (z / torch.linalg.vector_norm(z, torch.inf).clamp_min(torch.finfo(z.dtype).tiny)).float()  # within its range
    if metric == "cosine":
        z = torch.nn.functional.normalize(z)
    index = faiss.IndexHNSWFlat(
        z.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    )
    index.hnsw.efConstruction, index.hnsw.efSearch = _BUILD, max(_SEARCH, 2 * k)
    index.hnsw.rng = faiss.RandomGenerator(seed)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        index.add(z.numpy())
        return torch.from_numpy(index.search(z.numpy(), k + 1)[1])
    finally:
        faiss.omp_set_num_threads(threads)
