"""Relative residual: how much a block adds to what goes through it."""

from __future__ import annotations

import torch
from torch import Tensor

from repgraph.metrics.block_influence import CHUNK, check_known, pair_of


def relative_residual(x: Tensor, y: Tensor) -> float:
    r"""Mean size of what a block adds, as a share of what enters it; at least 0, 0 where nothing changes.

    (1/n) sum_i \|y_i - x_i\| / \|x_i\|.

    Parameters
    ----------
    x, y
        Input and output of the block, of one shape (n, ...); trailing axes are flattened, tokens too. For a value per
        token pass ``x.flatten(0, 1)``, without padding: ``x[mask]``.

    Returns
    -------
    float
        At least 0; may exceed 1.

    Raises
    ------
    ValueError
        If x and y differ in shape, are empty or not finite, or if samples of x are zero vectors.

    Notes
    -----
    Not symmetric: it is relative to x. Invariant to one orthogonal map of both and to a scale per sample of both;
    not to a scale of y alone, which `block_influence` does not see, and not to translation. Time and memory are
    linear in the size of x: float64 copies of 2^21 numbers at a time.

    References
    ----------
    No paper's code was followed.

    Examples
    --------
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> relative_residual(x, x + torch.tensor([[0.0, 1.0], [0.0, 1.0]]))  # (1/5 + 1/2) / 2
    0.35
    """
    x, y = pair_of(x, y)
    value = float(_relative_residual(x.flatten(1), y.flatten(1)))
    check_known(value, x, y, None)
    if value - value != 0 and (zeros := int((x.flatten(1) == 0).all(1).sum())):
        raise ValueError(f"x must have no zero samples, to which nothing is relative, got {zeros} of {len(x)}")
    return value


def _relative_residual(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    step = max(1, CHUNK // x.shape[1])
    for i in range(0, len(x), step):
        a, b = x[i : i + step].double(), y[i : i + step].double()
        peak = a.abs().amax(1, keepdim=True)  # the squares of a / peak stay in range
        total += (torch.linalg.vector_norm((b - a) / peak, dim=1) / torch.linalg.vector_norm(a / peak, dim=1)).sum()
    return total / len(x)
