"""The Gram matrix of a layer, prepared once for every measure that is made of inner products or distances."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repgraph.neighbors import as_samples
from repgraph.precision import full_precision

WORKSPACE = 32 * 2**20  # bytes of centred features held at once
_BLOCK = 256  # rows per product: small enough to save half of them
_SMALL, _LARGE = 1e-12, 1e12  # features whose products float32 holds


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Gram:
    """Double-centred kernel values between all pairs of n samples, on the device where they were computed.

    Made by `gram` (linear kernel) and, inside `rbf_cka`, with a Gaussian kernel. Every measure that rests on inner
    products or Euclidean distances accepts it in place of features.

    Parameters
    ----------
    off
        Centred kernel values, (n, n), symmetric, with a zero diagonal.
    diagonal
        Centred kernel value of each sample with itself, (n,), float64.
    shift
        What centring took away, (n,), float64: off_ij + shift_i + shift_j is the kernel value itself.
    kernel
        "linear" or "rbf".
    exponent
        All of the above lack the factor 2^exponent, which makes the mean of the diagonal about 1.

    Attributes
    ----------
    sums : Tensor
        Row sums of `off`, (n,), float64.
    square : Tensor
        Sum of the squares of `off`, float64.

    Examples
    --------
    >>> gram(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]]))
    Gram(n=3, kernel=linear, float32)
    """

    off: Tensor
    diagonal: Tensor
    shift: Tensor
    kernel: str = "linear"
    exponent: int = 0
    sums: Tensor = field(init=False)
    square: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums", self.off.sum(1, dtype=torch.float64))
        object.__setattr__(self, "square", dot(self.off, self.off))

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.off)

    @property
    def matrix(self) -> Tensor:
        """The centred kernel matrix with its diagonal, (n, n), a new tensor."""
        full = self.off.clone()
        full.diagonal().copy_(self.diagonal)
        return torch.ldexp(full, torch.tensor(self.exponent, device=full.device))

    def permuted(self, order: Tensor) -> Gram:
        """The same over the samples in another order."""
        order = order.to(self.off.device)
        off = self.off.index_select(0, order).index_select(1, order)
        return Gram(off, self.diagonal[order], self.shift[order], self.kernel, self.exponent)

    def __repr__(self) -> str:
        return f"Gram(n={self.n}, kernel={self.kernel}, {str(self.off.dtype).removeprefix('torch.')})"


def gram(x: Tensor | Gram, *, dtype: torch.dtype | None = None) -> Gram:
    """Inner products of the centred features of all pairs of samples: K_ij = <x_i - m, x_j - m>, m the mean sample.

    Parameters
    ----------
    x
        Samples, shape (n, ...); trailing axes are flattened. A Gram matrix is returned as it is.
    dtype
        torch.float32 or torch.float64, the type to compute in; by default float64 where x is, else float32.

    Returns
    -------
    Gram
        On the device of x.

    Raises
    ------
    ValueError
        If x is not a finite (n, ...) tensor of at least 2 samples, or dtype is another.

    Notes
    -----
    Half of the products are computed and mirrored. Centring first costs nothing in CKA, RSA or Procrustes, which are
    invariant to translation, and keeps float32 from losing the digits of small differences between large features.
    Features that differ by no more than rounding are constant: all values are 0. Time n^2 d / 2 multiply-adds; memory
    n^2 numbers and at most 32 MiB (512 n numbers if that is more) of centred features.

    Examples
    --------
    >>> gram(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])).matrix.tolist()
    [[2.0, 0.0, -2.0], [0.0, 2.0, -2.0], [-2.0, -2.0, 4.0]]
    """
    if isinstance(x, Gram):
        return x
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    x = as_samples(x)
    if len(x) < 2:
        raise ValueError(f"x must have at least 2 samples, got {len(x)}")
    low, high = x.aminmax()
    peak = float(torch.maximum(-low, high))
    exponent = 0
    if peak > _LARGE or 0 < peak < _SMALL:
        exponent = max(-1000, min(1000, math.frexp(peak)[1]))
        x = (x.double() * 2.0**-exponent).to(x.dtype)
    with full_precision(x.device):
        off, diagonal, shift, more = centred_products(x, dtype or x.dtype)
    return Gram(off, diagonal, shift, exponent=2 * exponent + int(more))


def linear_gram(x: Tensor | Gram, *, dtype: torch.dtype | None = None) -> Gram:
    """As `gram`; a Gram matrix with another kernel is refused."""
    g = gram(x, dtype=dtype)
    if g.kernel != "linear":
        raise ValueError(f"Gram matrix must have a linear kernel, got {g.kernel}")
    return g


def centred_products(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of the centred rows of x (n, d): off the diagonal (n, n), on it (n,), shift (n,), exponent."""
    n, d = x.shape
    off = torch.zeros((n, n), dtype=dtype, device=x.device)
    projection = off.new_zeros(n)  # of the centred rows on the mean
    square = torch.zeros((), dtype=torch.float64, device=x.device)  # of the mean
    slab = min(d, max(512, WORKSPACE // (off.element_size() * n)))
    workspace = off.new_empty(n * slab)
    for f in range(0, d, slab):
        part = x[:, f : f + slab]
        mean = part.mean(0, dtype=dtype)
        z = torch.sub(part, mean, out=workspace[: part.numel()].view_as(part))
        projection += z @ mean
        square += mean.double().square().sum()
        add_gram_(off, z)
    diagonal = off.diagonal().to(torch.float64, copy=True)
    # What is left of constant features is the rounding of their mean.
    varies = diagonal.sum() > (16 * torch.finfo(dtype).eps) ** 2 * n * square
    exponent = torch.frexp(diagonal.mean()).exponent
    factor = torch.exp2(-exponent.double())
    off = mirror_(off.fill_diagonal_(0).mul_((varies * factor).to(dtype)))
    return off, diagonal * varies * factor, (projection.double() + square / 2) * factor, exponent


def add_gram_(matrix: Tensor, z: Tensor) -> None:
    """Add the products of all pairs of rows of z (n, d) to the upper half of a matrix (n, n)."""
    for i in range(0, len(z), _BLOCK):
        matrix[i : i + _BLOCK, i:].addmm_(z[i : i + _BLOCK], z[i:].T)


def mirror_(matrix: Tensor) -> Tensor:
    """Copy the upper half of a square matrix to the lower."""
    for i in range(0, len(matrix), _BLOCK):
        j = min(i + _BLOCK, len(matrix))
        corner = matrix[i:j, i:j]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[j:, i:j] = matrix[i:j, j:].T
    return matrix


def principal_components(x: Tensor | Gram) -> tuple[Tensor, Tensor]:
    """Left singular vectors (n, r) and singular values (r,), falling, of the centred features, in float64.

    r is the rank: what is smaller than the rounding of the features or of their Gram matrix is left out.
    """
    if isinstance(x, Tensor) and x[:1].numel() < len(x):
        vectors, values, least = _components(as_samples(x))
    else:
        g = linear_gram(x, dtype=torch.float64)
        vectors, values, least = _components_of_gram(g.off, g.diagonal)
    rank = int((values > least).sum())
    return vectors[:, :rank], values[:rank]


def _components(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors and values of the centred rows of x (n, d), and the size of their rounding."""
    z = x.double() / x.abs().amax().double().clamp_min(torch.finfo(torch.float64).tiny)
    mean = z.mean(0)
    vectors, values, _ = torch.linalg.svd(z - mean, full_matrices=False)
    return vectors, values, 16 * torch.finfo(z.dtype).eps * (values[0] + len(z) ** 0.5 * mean.norm())


def _components_of_gram(off: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_components`, from a centred Gram matrix."""
    squares, vectors = torch.linalg.eigh(off.double() + diagonal.diag())
    squares = squares.flip(0).clamp_min(0)
    least = squares[0] * len(off) * torch.finfo(off.dtype).eps
    return vectors.flip(1), squares.sqrt(), least.sqrt()


def squared_distances(g: Gram) -> Tensor:
    """Squared Euclidean distances between the samples of a linear Gram, (n, n), in its type and up to its scale."""
    own = g.diagonal.to(g.off.dtype)
    return (own[:, None] + own - 2 * g.off).clamp_min_(0).fill_diagonal_(0)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a_ij b_ij over two matrices, the rows added up in float64."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    rows = max(1, WORKSPACE // (a.element_size() * a.shape[1]))
    for i in range(0, len(a), rows):
        total += (a[i : i + rows] * b[i : i + rows]).sum(1).double().sum()
    return total
