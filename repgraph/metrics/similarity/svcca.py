"""Singular vector canonical correlation analysis (SVCCA) of two layers.

Raghu, Gilmer, Yosinski, Sohl-Dickstein, "SVCCA: Singular Vector Canonical Correlation Analysis for Deep Learning
Dynamics and Interpretability", NeurIPS 2017, arXiv 1706.05806.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repgraph.metrics.similarity.gram import Gram, principal_components
from repgraph.metrics.similarity.measure import as_number, both, measure


@dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """Orthonormal basis (n, r) of the kept directions of a layer; without columns for constant features."""

    basis: Tensor

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.basis)

    def permuted(self, order: Tensor) -> Subspace:
        """The same over the samples in another order."""
        return Subspace(self.basis[order.to(self.basis.device)])


def _subspace(x: Tensor | Gram | Subspace, variance: float = 0.99) -> Subspace:
    if isinstance(x, Subspace):
        return x
    if not 0 < variance <= 1:
        raise ValueError(f"variance must be a share with 0 < variance <= 1, got {variance}")
    vectors, values = principal_components(x)
    share = values.square().cumsum(0) / values.square().sum()
    kept = len(values) if variance == 1 else int((share < variance - 1e-12).sum()) + 1
    return Subspace(vectors[:, :kept])


def _mean_correlation(a: Subspace, b: Subspace) -> Tensor:
    if not a.basis.shape[1] or not b.basis.shape[1]:
        return a.basis.new_tensor(torch.nan)
    correlations: Tensor = torch.linalg.svdvals(a.basis.T @ b.basis).clamp_max(1)
    return correlations.mean()


@measure(_subspace, _mean_correlation)
def svcca(x: Tensor | Gram, y: Tensor | Gram, *, variance: float = 0.99) -> float:
    """SVCCA of two layers, in [0, 1]: mean canonical correlation of the directions that hold most of the variance.

    Each layer's centred features are cut to the fewest principal components with the given share of the variance; the
    canonical correlations are the singular values of Q_x' Q_y with orthonormal bases Q; their mean over the smaller
    number of components is returned.

    Parameters
    ----------
    x, y
        Features (n, ...) or Gram matrices of `gram`, over the same samples.
    variance
        Share of the variance that is kept, 0.99 in the paper; 1 gives CCA.

    Returns
    -------
    float
        The mean of rho (not of rho^2); nan, with a warning, for constant features. It tends to 1 where the components
        are not far fewer than the samples.

    Raises
    ------
    ValueError
        If x or y are not finite (n, ...) tensors over the same samples, or the share is out of range.

    Notes
    -----
    Invariant to orthogonal maps, isotropic scaling and translation; with variance=1 to any invertible linear map.

    References
    ----------
    Raghu et al. 2017. Published notebooks cut at 99% of the sum of singular values; here it is 99% of the variance, the
    sum of their squares, as the text says.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]])
    >>> y = torch.tensor([[1.0, 2, 0], [2, 0, 1], [0, 1, 1], [1, 1, 3], [3, 0, 1], [1, 2, 2]])
    >>> round(svcca(x, y, variance=1), 6)
    0.86877
    """
    return as_number(_mean_correlation(*both(_subspace, x, y, variance=variance)))
