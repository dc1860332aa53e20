"""Representation topology divergence (RTD) of two layers.

Barannikov, Trofimov, Balabin, Burnaev, "Representation Topology Divergence: A Method for Comparing Neural Network
Representations", ICML 2022, arXiv 2201.00058.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gudhi.sklearn.rips_persistence import RipsPersistence
from torch import Tensor

from repgraph.metrics.similarity.gram import Gram, gram, linear_gram, squared_distances
from repgraph.metrics.similarity.measure import as_number, both, measure


@dataclass(frozen=True, slots=True, eq=False)
class Distances:
    """Euclidean distances between the samples of a layer, (n, n)."""

    matrix: Tensor

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.matrix)

    def permuted(self, order: Tensor) -> Distances:
        """The same over the samples in another order."""
        order = order.to(self.matrix.device)
        return Distances(self.matrix[order][:, order])


def _distances(x: Tensor | Gram | Distances) -> Distances:
    if isinstance(x, Distances):
        return x
    g = linear_gram(x)
    return Distances(squared_distances(g).sqrt_())


def _rtd(a: Distances, b: Distances, size: int = 500, subsamples: int = 10, seed: int = 0) -> float:
    if size < 4 or subsamples < 1:
        raise ValueError(f"size must be at least 4 and subsamples at least 1, got {size} and {subsamples}")
    x, y = a.matrix.double().cpu().numpy(), b.matrix.double().cpu().numpy()
    n = len(x)
    generator = np.random.default_rng(seed)
    whole = n <= size
    chosen = [np.arange(n)] if whole else [generator.choice(n, size, replace=False) for _ in range(subsamples)]
    return float(np.mean([_divergence(x[np.ix_(rows, rows)], y[np.ix_(rows, rows)]) for rows in chosen]))


def _divergence(r1: np.ndarray, r2: np.ndarray) -> float:
    quantiles = np.quantile(r1, 0.9), np.quantile(r2, 0.9)
    if min(quantiles) <= 0:
        return float("nan")
    r1, r2 = r1 / quantiles[0], r2 / quantiles[1]
    return (_barcode_length(r1, r2) + _barcode_length(r2, r1)) / 2


def _barcode_length(r1: np.ndarray, r2: np.ndarray) -> float:
    """Total length of the finite H1 bars of the points of both layers, those of the first at distance 0."""
    matrix = np.block([[np.zeros_like(r1), r1], [r1, np.minimum(r1, r2)]])
    rips = RipsPersistence(1, input_type="full distance matrix", homology_coeff_field=2)
    bars = rips.fit_transform([matrix])[0]
    lengths = bars[:, 1] - bars[:, 0]
    return float(lengths[np.isfinite(lengths)].sum())


@measure(_distances, _rtd, base=gram, distance=True)
def rtd(x: Tensor | Gram, y: Tensor | Gram, *, size: int = 500, subsamples: int = 10, seed: int = 0) -> float:
    """Representation topology divergence of two layers, >= 0: loops in one layer that the other lacks.

    With distances r1, r2 divided by their 0.9 quantile, the total length of the H1 bars of the Vietoris-Rips filtration
    of the 2n points with distances [[0, r1], [r1, min(r1, r2)]]; the mean of that and of its mirror image, over random
    subsamples. gudhi computes the bars, with coefficients in Z/2.

    Parameters
    ----------
    x, y
        Features (n, ...) or Gram matrices of `gram`, over the same samples.
    size
        Samples per subsample, at least 4; where n is not larger, all of them are taken once.
    subsamples
        Number of random subsamples.
    seed
        Seed of the subsamples, which are the same for every pair of layers.

    Returns
    -------
    float
        The divergence, in units of the 0.9 quantile of the distances: 0 for equal distances, no upper bound. nan, with
        a warning, where nine tenths of the distances are 0.

    Raises
    ------
    ValueError
        If x or y are not finite (n, ...) tensors over the same samples, or size or subsamples are out of range.

    Notes
    -----
    Invariant to orthogonal maps, isotropic scaling and translation. It grows with the number of samples: compare values
    of the same size only. On the CPU; about 0.6 s for 200 samples and 12 s for 500, per direction.

    References
    ----------
    Barannikov et al. 2022. Their code needs a CUDA library for the barcodes; the quantile is, as there, over the whole
    matrix with its zero diagonal.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]], dtype=torch.float64)
    >>> round(rtd(x, 3 * x + 1), 9)
    0.0
    """
    return as_number(_rtd(*both(_distances, x, y), size, subsamples, seed))
