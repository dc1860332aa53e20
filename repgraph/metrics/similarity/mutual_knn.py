"""Mutual k-nearest-neighbour alignment of two layers.

Huh, Cheung, Wang, Isola, "The Platonic Representation Hypothesis", ICML 2024, arXiv 2405.07987.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repgraph.graph import Graph
from repgraph.messages import tell
from repgraph.metrics.similarity.gbs import Rows, check_same_kind, row_cosines
from repgraph.metrics.similarity.measure import as_number, both, measure
from repgraph.neighbors import as_samples, knn, row_norms


def _neighbors(x: Tensor | Graph | Rows, k: int = 10) -> Rows:
    if isinstance(x, Rows):
        return x
    if isinstance(x, Graph):
        sizes = np.unique(np.diff(x.adjacency.indptr))
        if not x.directed or len(sizes) != 1 or sizes[0] == 0:
            raise ValueError(f"graph must be one of knn_graph(x, k, symmetrize='none'), got {x!r}")
        indices = torch.from_numpy(x.adjacency.indices.astype(np.int64)).reshape(x.n, -1)
        return _as_rows(indices, int(sizes[0]), str(x.settings.get("metric", "cosine")))
    x = as_samples(x)
    if zeros := int((row_norms(x) == 0).sum()):
        tell(f"{zeros} of {len(x)} samples are zero vectors: their neighbours mean nothing")
    return _as_rows(knn(x, k)[1], k, "cosine")


def _as_rows(indices: Tensor, k: int, metric: str) -> Rows:
    """Rows with the weight 1 / sqrt(k) at each of the k neighbours (n, k), so that a row cosine is overlap / k."""
    n = len(indices)
    place = (torch.arange(n, device=indices.device)[:, None] * n + indices.sort(1).values).flatten()
    weight = torch.full((n * k,), k**-0.5, dtype=torch.float64, device=indices.device)
    return Rows(n, place, weight, {"k": k, "metric": metric})


def _overlap(a: Rows, b: Rows) -> Tensor:
    check_same_kind(a, b)
    return row_cosines(a, b).mean()


@measure(_neighbors, _overlap)
def mutual_knn(x: Tensor | Graph, y: Tensor | Graph, k: int = 10) -> float:
    """Share of the k nearest neighbours that a sample keeps from one layer to the other, in [0, 1].

    (1/n) sum_i |N_x(i) and N_y(i)| / k, N the k samples of largest cosine similarity, self excluded.

    Parameters
    ----------
    x, y
        Features (n, ...), or directed graphs of ``knn_graph(x, k, symmetrize="none")``, over the same samples.
    k
        Neighbours per sample, for features.

    Returns
    -------
    float
        In [0, 1]; unrelated layers: k / (n - 1).

    Raises
    ------
    ValueError
        If x or y are neither such graphs nor finite (n, ...) tensors, differ in n or k, or k is out of range.

    Warns
    -----
    UserWarning
        If samples are zero vectors.

    Notes
    -----
    Exactly the GBS of unweighted directed graphs. Invariant to orthogonal maps, isotropic scaling and a positive scale
    per sample, down to norms of 1e-8. Ties go to the lowest index.

    References
    ----------
    Huh et al., ICML 2024. Their published scores also clip features at the 95% quantile and take the largest value over
    pairs of layers; this is the measure alone.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]])
    >>> y = torch.tensor([[1.0, 2, 0], [2, 0, 1], [0, 1, 1], [1, 1, 3], [3, 0, 1], [1, 2, 2]])
    >>> round(mutual_knn(x, y, k=2), 6)
    0.666667
    """
    return as_number(_overlap(*both(_neighbors, x, y, k=k)))
