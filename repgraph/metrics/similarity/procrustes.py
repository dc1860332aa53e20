"""Procrustes distances of two layers: what remains after the best rotation of one onto the other.

Ding, Denain, Steinhardt, "Grounding Representation Similarity Through Statistical Testing", NeurIPS 2021, arXiv
2108.01661; Williams, Kunz, Kornblith, Linderman, "Generalized Shape Metrics on Neural Representations", NeurIPS 2021,
arXiv 2110.14739.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repgraph.metrics.similarity.gram import Gram, principal_components
from repgraph.metrics.similarity.measure import as_number, both, measure

Kind = Literal["angular", "ding"]


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Centred features of norm 1 up to rotation: (n, r) with the rank r; without columns for constant features."""

    matrix: Tensor

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.matrix)

    def permuted(self, order: Tensor) -> Shape:
        """The same over the samples in another order."""
        return Shape(self.matrix[order.to(self.matrix.device)])


def _shape(x: Tensor | Gram | Shape) -> Shape:
    if isinstance(x, Shape):
        return x
    vectors, values = principal_components(x)
    return Shape(vectors * (values / values.norm()))


def _distance(a: Shape, b: Shape, kind: Kind = "angular") -> Tensor:
    if kind not in ("angular", "ding"):
        raise ValueError(f"kind must be 'angular' or 'ding', got {kind!r}")
    if not a.matrix.shape[1] or not b.matrix.shape[1]:
        return a.matrix.new_tensor(torch.nan)
    nuclear: Tensor = torch.linalg.svdvals(a.matrix.T @ b.matrix).sum().clamp_max(1)
    return nuclear.arccos() if kind == "angular" else 2 - 2 * nuclear


@measure(_shape, _distance, distance=True)
def procrustes(x: Tensor | Gram, y: Tensor | Gram, *, kind: Kind = "angular") -> float:
    r"""Procrustes distance of two layers after the best rotation, 0 for layers equal up to rotation, scale and shift.

    With features centred and scaled to Frobenius norm 1, and \|.\|_* the sum of singular values: angular
    arccos \|X'Y\|_*, in [0, pi/2] radians, a true metric; ding 2 - 2 \|X'Y\|_*, in [0, 2].

    Parameters
    ----------
    x, y
        Features (n, ...) or Gram matrices of `gram`, over the same samples. Their widths may differ.
    kind
        "angular" (default): the shape distance of Williams et al.; "ding": the squared distance of Ding et al.

    Returns
    -------
    float
        The distance; nan, with a warning, for constant features. Like biased CKA it saturates where features outnumber
        samples: independent layers then come close to 0. `similarity_null` shows it.

    Raises
    ------
    ValueError
        If x or y are not finite (n, ...) tensors over the same samples, or `kind` is unknown.

    Notes
    -----
    Invariant to orthogonal maps, isotropic scaling and translation. Features of more than n columns are replaced by
    their principal components, which changes nothing, in float64. A Gram matrix in float32 has lost components
    below about 1e-7 n of its largest eigenvalue; they count as 0. Time n^3 a pair. An angle below 1e-8 is rounding.

    References
    ----------
    Ding et al. 2021 (some codes return the root); Williams et al. 2021, with alpha = 1.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]])
    >>> y = torch.tensor([[1.0, 2, 0], [2, 0, 1], [0, 1, 1], [1, 1, 3], [3, 0, 1], [1, 2, 2]])
    >>> round(procrustes(x, y), 6), round(procrustes(x, y, kind="ding"), 6)
    (0.660458, 0.420577)
    """
    return as_number(_distance(*both(_shape, x, y), kind))
