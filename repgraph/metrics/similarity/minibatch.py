"""Linear CKA from minibatches: no n x n matrix, so any number of samples.

Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural Network
Representations Vary with Width and Depth", ICLR 2021, arXiv 2010.15327.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repgraph.metrics.similarity.cka import normalized
from repgraph.metrics.similarity.gram import dot, gram
from repgraph.metrics.similarity.measure import as_number, both, measure


@dataclass(frozen=True, slots=True, eq=False)
class BatchGrams:
    """Gram matrices of the batches of a layer, one below the other.

    Each is U-centred and scaled by 1 / sqrt(b (b - 3)), so that inner products over all entries are the sums of the
    batches' unbiased HSIC.
    """

    matrix: Tensor
    """(n, b) of float32 or float64; a last batch of fewer than b samples leaves columns 0."""

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.matrix)


@dataclass(frozen=True)
class BatchGram:
    """Turns one batch of a layer's output into its rows of `BatchGrams`: the ``reduce`` of a capture that streams.

    Parameters
    ----------
    batch_size
        Samples b per Gram matrix; a larger batch is split, a smaller one is filled up with zero columns.
    """

    batch_size: int

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (b, batch_size) of a batch (b, ...)."""
        parts = [_centred(part, self.batch_size) for part in torch.split(x.flatten(1), self.batch_size)]
        return torch.cat(parts)


def _centred(x: Tensor, width: int) -> Tensor:
    """U-centred Gram matrix of a batch (b, d), scaled and filled up to (b, width); zeros for fewer than 4 samples."""
    b = len(x)
    out = torch.zeros((b, width), dtype=x.dtype if x.dtype == torch.float64 else torch.float32, device=x.device)
    if b < 4:
        return out
    g = gram(x)
    sums = g.sums / (b - 2)
    total = g.sums.sum() / ((b - 1) * (b - 2))
    centred = g.off.double() - sums[:, None] - sums + total
    out[:, :b] = torch.ldexp(centred.fill_diagonal_(0), torch.tensor(g.exponent)) / (b * (b - 3)) ** 0.5
    return out


def _batches(x: Tensor | BatchGrams, batch_size: int = 256) -> BatchGrams:
    if isinstance(x, BatchGrams):
        return x
    if batch_size < 4:
        raise ValueError(f"batch_size must be at least 4, got {batch_size}")
    if not isinstance(x, Tensor) or x.ndim < 2 or len(x) < 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor (n, ...) of at least 4 samples, got {got}")
    return BatchGrams(BatchGram(min(batch_size, len(x)))(x))


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
