"""Centred kernel alignment (CKA) of two layers: linear and Gaussian kernel, biased and unbiased.

Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv 1905.00414.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repgraph.metrics.similarity.gram import Gram, dot, gram, squared_distances
from repgraph.metrics.similarity.measure import as_number, both, measure


def _cka(a: Gram, b: Gram, unbiased: bool = False) -> Tensor:
    _check_kind(a, b, unbiased)
    cross = _hsic(dot(a.off, b.off), a, b, unbiased)
    value = normalized(cross, _hsic(a.square, a, a, unbiased), _hsic(b.square, b, b, unbiased))
    return value if unbiased else value.clamp(0, 1)


def normalized(cross: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Cross / sqrt(own other), nan unless both are positive."""
    return cross / (own.clamp_min(0).sqrt() * other.clamp_min(0).sqrt()).masked_fill(
        (own <= 0) | (other <= 0), torch.nan
    )


def _check_kind(a: Gram, b: Gram, unbiased: bool) -> None:
    if a.kernel != b.kernel:
        raise ValueError(f"Gram matrices must have the same kernel, got {a.kernel} and {b.kernel}")
    if unbiased and a.n < 4:
        raise ValueError(f"the unbiased estimate needs at least 4 samples, got {a.n}")


def _hsic(product: Tensor, a: Gram, b: Gram, unbiased: bool) -> Tensor:
    """HSIC of two Gram matrices whose entries off the diagonal have the given inner product."""
    n = a.n
    if unbiased:
        return unbiased_hsic(product, a.sums, b.sums)
    r, s = a.sums + a.diagonal, b.sums + b.diagonal
    return (product + a.diagonal @ b.diagonal - 2 / n * (r @ s) + r.sum() * s.sum() / n**2) / (n - 1) ** 2


def unbiased_hsic(product: Tensor, sums_a: Tensor, sums_b: Tensor) -> Tensor:
    """HSIC of two matrices A, B with zero diagonals from sum_ij A_ij B_ji, column sums of A and row sums of B (n,)."""
    n = len(sums_a)
    total = sums_a.sum() * sums_b.sum() / ((n - 1) * (n - 2))
    return (product + total - 2 / (n - 2) * (sums_a @ sums_b)) / (n * (n - 3))


def hsic(x: Tensor | Gram, y: Tensor | Gram, *, unbiased: bool = True) -> float:
    r"""Hilbert-Schmidt independence criterion of two layers with linear kernels; 0 for independent ones.

    Unbiased: [sum_ij K_ij L_ij + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 1'KL1 / (n-2)] / (n (n-3)) of Gram matrices whose
    diagonals are 0. Biased: tr(KHLH) / (n-1)^2. Not normalised: it grows with the fourth power of the features' scale.

    Parameters
    ----------
    x, y
        Features (n, ...) or Gram matrices of `gram`, over the same samples.
    unbiased
        Song's unbiased estimate (default), which may be negative, or the biased one, which is >= 0.

    Returns
    -------
    float
        The criterion.

    Raises
    ------
    ValueError
        If x or y are not finite (n, ...) tensors over the same samples, or n < 4 for the unbiased estimate.

    References
    ----------
    Song, Smola, Gretton, Bedo, Borgwardt, "Feature Selection via Dependence Maximization", JMLR 13 (2012), eq. 5.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]])
    >>> round(hsic(x, x), 6)
    1.455556
    """
    a, b = both(gram, x, y)
    _check_kind(a, b, unbiased)
    value = _hsic(dot(a.off, b.off), a, b, unbiased)
    return float(torch.ldexp(value, torch.tensor(a.exponent + b.exponent, device=value.device)))


@measure(gram, _cka, base=gram)
def linear_cka(x: Tensor | Gram, y: Tensor | Gram, *, unbiased: bool = False) -> float:
    r"""Linear centred kernel alignment of two layers, in [0, 1]; 1 for layers equal up to rotation, scale and shift.

    \|Y'X\|^2 / (\|X'X\| \|Y'Y\|) with centred features, computed as HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the
    Gram matrices K = XX', L = YY'. With ``unbiased=True`` each HSIC is the unbiased estimate (see `hsic`), and the
    value is about 0 for independent features of any width.

    Parameters
    ----------
    x, y
        Features (n, ...) or Gram matrices of `gram`, over the same samples. Their widths may differ.
    unbiased
        Use the unbiased estimate. The biased value tends to 1 when features outnumber samples (0.96 for independent
        Gaussians, n = 200, d = 5000), so take the unbiased one for flattened maps.

    Returns
    -------
    float
        In [0, 1]; unbiased: about [-1, 1]. nan, with a warning, for constant features.

    Raises
    ------
    ValueError
        If x or y are not finite (n, ...) tensors over the same samples, or n < 4 for the unbiased estimate.

    Notes
    -----
    Invariant to orthogonal maps, isotropic scaling and translation of the features; not to scales per sample or other
    linear maps. Sensitive to shared outliers. Computed from centred features in their own type, summed up in float64:
    float32 is good to about 1e-6 and loses digits where one sample is 1000 times larger than the others.
    Unlike some codes nothing is added to the denominator, and negative values are not set to 0.

    References
    ----------
    Kornblith et al., ICML 2019. The unbiased estimate in it: Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn
    the Same Things?", ICLR 2021, arXiv 2010.15327.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]])
    >>> y = torch.tensor([[1.0, 2, 0], [2, 0, 1], [0, 1, 1], [1, 1, 3], [3, 0, 1], [1, 2, 2]])
    >>> round(linear_cka(x, y), 6), round(linear_cka(x, y, unbiased=True), 6)
    (0.712592, 0.712757)
    """
    return as_number(_cka(*both(gram, x, y), unbiased))


def _rbf(x: Tensor | Gram, bandwidth: float = 1.0) -> Gram:
    g = gram(x)
    if g.kernel == "rbf":
        return g
    if not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth must be a finite number > 0, got {bandwidth}")
    return Gram(*_gaussian(squared_distances(g), bandwidth), kernel="rbf")


def _gaussian(squares: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Double-centred Gaussian kernel of squared distances (n, n): off the diagonal, diagonal, shift."""
    n = len(squares)
    pairs = n * (n - 1) // 2
    flat = squares.flatten()  # n zeros, then every pair twice
    rank = (pairs + 1) // 2
    lower = upper = flat.kthvalue(n + 2 * rank).values
    if pairs % 2 == 0:  # the next larger distance, unless the lower one occurs again
        larger = torch.where(flat > lower, flat, torch.inf).amin()
        upper = torch.where((flat <= lower).sum() > n + 2 * rank, lower, larger)
    width = bandwidth**2 * (lower + upper)  # 2 sigma^2, since the median is the mean of both
    kernel = squares.div_(-width).expm1_()  # less 1, which centring removes and which would cost wide kernels digits
    mean = kernel.mean(1, dtype=torch.float64)
    shift = mean - mean.mean() / 2
    kernel -= shift[:, None].to(kernel.dtype)
    kernel -= shift.to(kernel.dtype)
    return kernel.fill_diagonal_(0), -2 * shift, shift + 0.5


@measure(_rbf, _cka, base=gram)
def rbf_cka(x: Tensor | Gram, y: Tensor | Gram, *, bandwidth: float = 1.0, unbiased: bool = False) -> float:
    r"""CKA of two layers with a Gaussian kernel, in [0, 1]: alike where close samples of one are close in the other.

    K_ij = exp(-d_ij^2 / (2 bandwidth^2 m)), d_ij Euclidean distances and m the median of d^2, per layer; then as
    `linear_cka`.

    Parameters
    ----------
    x, y
        Features (n, ...) or Gram matrices of `gram`, over the same samples.
    bandwidth
        Kernel width as a fraction of the median distance; as it grows the value tends to linear CKA.
    unbiased
        Use the unbiased estimate.

    Returns
    -------
    float
        In [0, 1]; unbiased: about [-1, 1]. nan, with a warning, where half of all pairs or more are identical.

    Raises
    ------
    ValueError
        As `linear_cka`, or if the bandwidth is not positive.

    Notes
    -----
    The median is over pairs of different samples, the mean of the two middle ones where their number is even. Others
    include the zero diagonal, or take the lower of the two; on one data set three codes gave 0.69148, 0.69171 and
    0.69172. Invariant to orthogonal maps, isotropic scaling and translation. Distances come from the Gram matrix and
    have its precision.

    References
    ----------
    Kornblith et al., ICML 2019.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]])
    >>> round(rbf_cka(x, 2 * x + 1), 5)
    1.0
    """
    return as_number(_cka(*both(_rbf, x, y, bandwidth=bandwidth), unbiased))
