"""Centred kernel nearest-neighbour alignment (CKNNA) of two layers: CKA that looks only at near pairs.

Huh, Cheung, Wang, Isola, "The Platonic Representation Hypothesis", ICML 2024, arXiv 2405.07987.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from repgraph.metrics.similarity.cka import normalized, unbiased_hsic
from repgraph.metrics.similarity.gram import WORKSPACE, Gram, gram, linear_gram
from repgraph.metrics.similarity.measure import as_number, both, measure
from repgraph.metrics.similarity.places import located, reordered


@dataclass(frozen=True, slots=True, eq=False)
class Near:
    """Inner products of every sample with its k nearest."""

    n: int
    k: int
    place: Tensor
    """i n + j for each of the k neighbours j of i, rising, (n k,)."""
    value: Tensor
    """Their inner products, (n k,), float64."""
    mirror: Tensor = field(init=False)
    """Index of the entry (j, i) for each entry (i, j); m = n k where there is none."""
    own: Tensor = field(init=False)
    """The alignment of the layer with itself, before normalisation."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mirror", _mirror(self.place, self.n))
        object.__setattr__(self, "own", _alignment(self, self.value, self.value))

    def permuted(self, order: Tensor) -> Near:
        """The same over the samples in another order."""
        order = order.to(self.place.device)
        place, entry = reordered(self.place, order, self.n)
        return Near(self.n, self.k, place, self.value[entry])


def _near(x: Tensor | Gram | Near, k: int = 10) -> Near:
    if isinstance(x, Near):
        return x
    g = linear_gram(x)
    if isinstance(k, bool) or not isinstance(k, Integral) or not 2 <= k < g.n or g.n < 4:
        raise ValueError(f"k must be an integer with 2 <= k < n and n >= 4, got k = {k!r} with n = {g.n} samples")
    place, value = _nearest(g.off, g.shift, int(k))
    return Near(g.n, int(k), place, value * (g.diagonal.sum() > 0))  # all samples are near in constant features


def _nearest(off: Tensor, shift: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Places and inner products (n k,) of the k largest of each row of off_ij + shift_i + shift_j, i != j."""
    n = len(off)
    largest = off.abs().amax() + 2 * shift.abs().amax()
    steps = 2.0**40 / largest.clamp_min(torch.finfo(torch.float64).tiny)
    columns = torch.arange(n, device=off.device)
    indices, values = [], []
    rows = max(1, WORKSPACE // (8 * n))
    for i in range(0, n, rows):
        block = off[i : i + rows].double() + shift[i : i + rows, None] + shift
        # The column breaks ties: equal values, up to 2^-40 of the largest, go to the lowest index.
        key = (block * steps).round().long() * n - columns
        key.masked_fill_(columns == columns[i : i + rows, None], torch.iinfo(torch.int64).min)
        nearest = key.topk(k, dim=1).indices.sort(1).values
        indices.append(columns[i : i + rows, None] * n + nearest)
        values.append(block.gather(1, nearest))
    return torch.cat(indices).flatten(), torch.cat(values).flatten()


def _mirror(place: Tensor, n: int) -> Tensor:
    """Index of the place of (j, i) for each place of (i, j), (m,); m where there is none."""
    at, there = located(place, place % n * n + place // n)
    return torch.where(there, at, len(place))


def _alignment(near: Near, a: Tensor, b: Tensor) -> Tensor:
    """Unbiased HSIC of two sparse matrices with entries a and b (m,) at the places of `near`."""
    n = near.n
    row, column = near.place // n, near.place % n
    product = a @ torch.cat((b, b.new_zeros(1)))[near.mirror]
    column_sums = torch.zeros(n, dtype=a.dtype, device=a.device).index_add_(0, column, a)
    row_sums = torch.zeros(n, dtype=b.dtype, device=b.device).index_add_(0, row, b)
    return unbiased_hsic(product, column_sums, row_sums)


def _cknna(a: Near, b: Near) -> Tensor:
    if a.k != b.k:
        raise ValueError(f"layers must have the same k, got {a.k} and {b.k}")
    at, common = located(b.place, a.place)
    cross = _alignment(a, a.value * common, b.value[at] * common)
    return normalized(cross, a.own, b.own)


@measure(_near, _cknna, base=gram, symmetric=False)
def cknna(x: Tensor | Gram, y: Tensor | Gram, k: int = 10) -> float:
    """CKNNA of two layers, about [0, 1]: unbiased linear CKA over the pairs that are neighbours in both layers.

    s(K, L) / sqrt(s(K, K) s(L, L)), where s(K, L) is the unbiased HSIC (see `hsic`) of M.K and M.L: the inner products
    of the pairs (i, j) for which j is among the k samples of largest inner product with i in both K and L, and 0
    elsewhere. Each s uses the mask of its own two arguments.

    Parameters
    ----------
    x, y
        Features (n, ...) or Gram matrices of `gram`, over the same samples.
    k
        Neighbours per sample, 2 <= k < n.

    Returns
    -------
    float
        About [0, 1]; it can exceed 1 for small n. Unrelated layers: about 0. nan, with a warning, where s(K, K) <= 0.

    Raises
    ------
    ValueError
        If x or y are not finite (n, ...) tensors over the same samples, n < 4, or k is out of range.

    Notes
    -----
    k = n - 1 is unbiased CKA. Invariant to orthogonal maps and isotropic scaling only: neighbours go by the inner
    product, which translation changes. The mask is not symmetric, so that x and y cannot quite change places,
    and M.K enters the first term of s with its transpose. Inner products are restored from those of centred features.

    References
    ----------
    Huh et al., ICML 2024. Their scores normalise the rows of the features first; do so before if you compare with them.
    They add 1e-6 to the denominator; here nothing is added.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]])
    >>> round(cknna(x, 2 * x, k=3), 6)
    1.0
    """
    return as_number(_cknna(*both(_near, x, y, k=k)))
