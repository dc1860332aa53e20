"""Representational similarity analysis (RSA): whether two layers find the same pairs of samples unlike.

Kriegeskorte, Mur, Bandettini, "Representational similarity analysis", Frontiers in Systems Neuroscience 2:4 (2008).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repgraph.metrics.similarity.gram import Gram, gram, linear_gram, squared_distances
from repgraph.metrics.similarity.measure import as_number, both, measure
from repgraph.neighbors import as_samples

Rdm = Literal["euclidean", "sqeuclidean", "correlation", "cosine"]
Compare = Literal["spearman", "pearson", "cosine"]


@dataclass(frozen=True, slots=True, eq=False)
class Dissimilarities:
    """The upper triangle of a dissimilarity matrix, or its ranks, so scaled that an inner product is the comparison."""

    n: int
    values: Tensor
    """Row by row, (n (n - 1) / 2,)."""
    kind: tuple[str, str]

    def permuted(self, order: Tensor) -> Dissimilarities:
        """The same over the samples in another order."""
        order = order.to(self.values.device)
        i, j = torch.triu_indices(self.n, self.n, 1, device=order.device)
        low, high = torch.minimum(order[i], order[j]), torch.maximum(order[i], order[j])
        return Dissimilarities(self.n, self.values[_place(low, high, self.n)], self.kind)


def _place(i: Tensor, j: Tensor, n: int) -> Tensor:
    """Place of the pair i < j in the upper triangle, row by row."""
    return i * (2 * n - i - 1) // 2 + j - i - 1


def _dissimilarities(
    x: Tensor | Gram | Dissimilarities, rdm: Rdm = "euclidean", compare: Compare = "spearman"
) -> Dissimilarities:
    if isinstance(x, Dissimilarities):
        return x
    if rdm not in ("euclidean", "sqeuclidean", "correlation", "cosine"):
        raise ValueError(f"rdm must be 'euclidean', 'sqeuclidean', 'correlation' or 'cosine', got {rdm!r}")
    if compare not in ("spearman", "pearson", "cosine"):
        raise ValueError(f"compare must be 'spearman', 'pearson' or 'cosine', got {compare!r}")
    if rdm in ("euclidean", "sqeuclidean"):
        g = linear_gram(x)
        matrix = _without_noise(squared_distances(g), g.diagonal)
        # Ranks of distances are those of their squares.
        matrix = matrix.sqrt_() if rdm == "euclidean" and compare != "spearman" else matrix
    elif isinstance(x, Gram):
        raise ValueError(
            f"rdm={rdm!r} needs features: a Gram matrix of centred features gives Euclidean distances only"
        )
    else:
        x, zero = _directions(as_samples(x), centred=rdm == "correlation")
        # 1 - cos is half the squared distance of the directions, and 1 where there is no direction.
        g = gram(x)
        squares = _without_noise(squared_distances(g), g.diagonal)
        matrix = torch.ldexp(squares, torch.tensor(g.exponent - 1, device=x.device))
        matrix.masked_fill_(zero[:, None] | zero, 1).fill_diagonal_(0)
    if len(matrix) < 3:
        raise ValueError(f"x must have at least 3 samples, got {len(matrix)}")
    return Dissimilarities(len(matrix), _scaled(matrix, compare), (rdm, compare))


def _directions(x: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Rows of x (n, d), each minus its own mean where they are to be centred, scaled to norm 1; which are zero (n,)."""
    z = x / x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    z = z - z.mean(1, keepdim=True) if centred else z
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    rounding = 16 * torch.finfo(x.dtype).eps * x.shape[1] ** 0.5
    return z / norm.clamp_min(rounding), norm[:, 0] <= rounding


def _without_noise(squares: Tensor, diagonal: Tensor) -> Tensor:
    """Squared distances (n, n) with 0 where they are no more than the rounding of their norms; in place."""
    rounding = (4 * torch.finfo(squares.dtype).eps * diagonal).to(squares.dtype)
    return squares.mul_(squares > rounding[:, None] + rounding)


def _scaled(matrix: Tensor, compare: str) -> Tensor:
    """Upper triangle of a matrix (n, n), ranked for "spearman", centred except for "cosine", scaled to norm 1."""
    i, j = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    values = matrix[i, j]
    wide = _ranks(values) if compare == "spearman" else values.double()
    rounding = 16 * torch.finfo(matrix.dtype).eps * torch.linalg.vector_norm(wide)
    if compare != "cosine":
        wide = wide - wide.mean()
    norm = torch.linalg.vector_norm(wide)
    return wide.div_(norm.masked_fill(norm <= rounding, torch.nan)).to(matrix.dtype)


def _ranks(values: Tensor) -> Tensor:
    """Ranks 0, 1, ... of values >= 0, (m,) in float64, ties averaged: what agrees in 16 bits, float64 in 40."""
    # The bits of floats >= 0 are ordered as they are; rounding them off leaves the leading ones.
    spare = 7 if values.dtype == torch.float32 else 12
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    ordered, order = ((bits + (1 << (spare - 1))) >> spare).sort()
    m = len(values)
    place = torch.arange(m, device=values.device)
    new = torch.ones(m, dtype=torch.bool, device=values.device)
    new[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(new, place, 0).cummax(0).values
    last = torch.where(new.roll(-1), place, m).flip(0).cummin(0).values.flip(0)
    return torch.empty(m, dtype=torch.float64, device=values.device).scatter_(0, order, (first + last).double() / 2)


def _compared(a: Dissimilarities, b: Dissimilarities) -> Tensor:
    if a.kind != b.kind:
        raise ValueError(f"dissimilarities must be of one kind, got {' '.join(a.kind)} against {' '.join(b.kind)}")
    parts = zip(torch.split(a.values, 2**22), torch.split(b.values, 2**22), strict=True)
    return torch.stack([(p * q).sum().double() for p, q in parts]).sum()


@measure(_dissimilarities, _compared, base=gram)
def rsa(x: Tensor | Gram, y: Tensor | Gram, *, rdm: Rdm = "euclidean", compare: Compare = "spearman") -> float:
    """RSA of two layers, in [-1, 1]: correlation of their dissimilarities over all pairs of samples.

    Parameters
    ----------
    x, y
        Features (n, ...), or Gram matrices of `gram` for Euclidean distances, over the same samples.
    rdm
        Dissimilarity of two samples: "euclidean" distance (default), its square "sqeuclidean", "correlation" (1 minus
        Pearson's over the features), or "cosine" (1 minus the cosine).
    compare
        "spearman" (default) or "pearson" correlation, or the "cosine" of the two triangles, which is high for anything.

    Returns
    -------
    float
        In [-1, 1]; unrelated layers: about 0. nan, with a warning, where all dissimilarities are equal.

    Raises
    ------
    ValueError
        If x or y are not finite (n, ...) tensors over the same n >= 3 samples, or a choice is unknown.

    Notes
    -----
    Invariances are those of the dissimilarity: Euclidean to orthogonal maps, isotropic scaling and translation;
    correlation to a positive scale per sample and an offset that all features share; cosine to orthogonal maps and a
    scale per sample. Tied ranks are averaged; two dissimilarities tie when they agree to 40 bits, 16 in
    float32. Euclidean distances come from the Gram matrix and have its precision. Memory: n^2 / 2
    numbers a layer, and about 30 n^2 bytes while they are ranked.

    References
    ----------
    Kriegeskorte et al. 2008. rsatoolbox's "euclidean" is squared and divided by the number of features: use
    "sqeuclidean" to compare Pearson or cosine.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]])
    >>> y = torch.tensor([[1.0, 2, 0], [2, 0, 1], [0, 1, 1], [1, 1, 3], [3, 0, 1], [1, 2, 2]])
    >>> round(rsa(x, y), 6), round(rsa(x, y, rdm="sqeuclidean", compare="pearson"), 6)
    (0.508404, 0.38996)
    """
    return as_number(_compared(*both(_dissimilarities, x, y, rdm=rdm, compare=compare)))
