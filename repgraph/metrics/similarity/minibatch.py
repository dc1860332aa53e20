"""Linear CKA from minibatches: no n x n matrix, so any number of samples.

Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural Network
Representations Vary with Width and Depth", ICLR 2021, arXiv 2010.15327.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from repgraph.metrics.similarity.cka import normalized
from repgraph.metrics.similarity.gram import centred_products, dot
from repgraph.metrics.similarity.measure import as_number, both, measure
from repgraph.neighbors import as_samples
from repgraph.precision import full_precision

_NOTHING = -10000.0  # exponent of rows that hold nothing


@dataclass(frozen=True)
class BatchGram:
    """Turns one batch of a layer's output into rows of `BatchGrams`: the ``reduce`` of a capture that streams.

    Parameters
    ----------
    batch_size
        Samples per Gram matrix, at least 4; a larger batch is split, a smaller one is filled up with zeros.

    Raises
    ------
    ValueError
        If batch_size is not an integer of at least 4.
    """

    batch_size: int

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, Integral) or self.batch_size < 4:
            raise ValueError(f"batch_size must be an integer of at least 4, got {self.batch_size!r}")

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (b, batch_size + 1) of a batch (b, ...): a Gram matrix, and the exponent of its scale."""
        x = x.detach().flatten(1)
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        with full_precision(x.device):
            return torch.cat([_centred(part, self.batch_size) for part in torch.split(x, self.batch_size)])


def _centred(x: Tensor, width: int) -> Tensor:
    """U-centred Gram matrix of a batch (b, d), scaled, and its exponent: (b, width + 1); zeros for b < 4."""
    b = len(x)
    out = x.new_zeros(b, width + 1)
    if b < 4:
        out[:, -1] = _NOTHING
        return out
    exponent = torch.frexp(x.abs().amax()).exponent.clamp(-120, 120)
    off, _, _, more = centred_products(torch.ldexp(x, -exponent), x.dtype)
    sums = off.sum(1, dtype=torch.float64) / (b - 2)
    centred = off.double() - sums[:, None] - sums + sums.sum() / (b - 1)
    out[:, :b] = centred.fill_diagonal_(0) / (b * (b - 3)) ** 0.5
    out[:, -1] = 2 * exponent + more
    return out


@dataclass(frozen=True, slots=True, eq=False)
class BatchGrams:
    """Gram matrices of the batches of a layer, one below the other.

    Each is U-centred and divided by sqrt(b (b - 3)), so that inner products over all entries are the sums of the
    batches' unbiased HSIC, up to a common factor.
    """

    matrix: Tensor
    """(n, b) of float32 or float64; a batch of fewer than b samples leaves columns 0."""

    @classmethod
    def of_rows(cls, rows: Tensor) -> BatchGrams:
        """Batch Grams of rows of `BatchGram`, brought to one scale."""
        exponent = rows[:, -1:]
        factor = torch.exp2((exponent - exponent.amax()).double()).to(rows.dtype)
        return cls(rows[:, :-1] * factor)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.matrix)


def _batches(x: Tensor | BatchGrams, batch_size: int = 256) -> BatchGrams:
    if isinstance(x, BatchGrams):
        return x
    grams = BatchGram(batch_size)
    x = as_samples(x)
    if len(x) < 4:
        raise ValueError(f"x must have at least 4 samples, got {len(x)}")
    return BatchGrams.of_rows(BatchGram(min(grams.batch_size, len(x)))(x))


def _minibatch_cka(a: BatchGrams, b: BatchGrams) -> Tensor:
    if a.matrix.shape != b.matrix.shape:
        raise ValueError(
            f"layers must be cut into the same batches, got {tuple(a.matrix.shape)} and {tuple(b.matrix.shape)}"
        )
    return normalized(dot(a.matrix, b.matrix), dot(a.matrix, a.matrix), dot(b.matrix, b.matrix))


@measure(_batches, _minibatch_cka)
def minibatch_cka(x: Tensor, y: Tensor, *, batch_size: int = 256) -> float:
    """Minibatch linear CKA of two layers, about [-1, 1]: unbiased HSIC summed over batches, then divided.

    sum_b HSIC(K_b, L_b) / sqrt(sum_b HSIC(K_b, K_b) sum_b HSIC(L_b, L_b)) with the unbiased HSIC of `hsic` and the Gram
    matrices K_b, L_b of batch b. `repgraph.stream_cka` gives the same for all layers of a model without storing
    outputs.

    Parameters
    ----------
    x, y
        Features (n, ...) over the same samples, cut into batches in their order.
    batch_size
        Samples per batch, at least 4. Up to 3 samples in a last batch are left out.

    Returns
    -------
    float
        About [-1, 1], close to ``linear_cka(x, y, unbiased=True)``, with which it agrees for one batch; the value
        depends on the batch size. nan, with a warning, for constant features.

    Raises
    ------
    ValueError
        If x or y are not finite (n, ...) tensors over the same n >= 4 samples, or batch_size < 4.

    Notes
    -----
    The mean of the batches' own CKAs is another number. Invariant as linear CKA. Memory n b numbers a layer.

    References
    ----------
    Nguyen, Raghu, Kornblith, ICLR 2021, eq. 2 and 3.

    Examples
    --------
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> round(minibatch_cka(x, 2 * x - 1, batch_size=10), 6)
    1.0
    """
    return as_number(_minibatch_cka(*both(_batches, x, y, batch_size=batch_size)))
