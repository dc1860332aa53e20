"""Block Influence: how far a block turns what goes through it."""

from __future__ import annotations

import torch
from torch import Tensor

_NORM_FLOOR = 1e-8  # as in repgraph.neighbors
CHUNK = 2**21  # per input in float64 at a time


def block_influence(x: Tensor, y: Tensor, mask: Tensor | None = None) -> float:
    r"""Mean of 1 - cos between what enters a block and what leaves it, in [0, 2]; 0 where the block only scales.

    (1/N) sum_i (1 - <x_i, y_i> / (max(\|x_i\|, 1e-8) max(\|y_i\|, 1e-8))), i over the N tokens of all samples. Blocks
    of the smallest influence are the first to drop.

    Parameters
    ----------
    x, y
        Input and output of the block, of one shape: tokens (n, t, d), each a row of d numbers, or samples (n, ...)
        of any other number of axes, each flattened to one row. For a row at each position of a conv map
        (n, c, h, w), pass ``x.flatten(2).mT``, which is (n, h w, c).
    mask
        Attention mask (n, t), bool or 0 and 1: tokens that it hides do not count, whatever they hold.

    Returns
    -------
    float
        In [0, 2].

    Raises
    ------
    ValueError
        If x and y differ in shape, are empty or not finite, if the mask does not fit, or if it hides all tokens of a
        sample.

    Notes
    -----
    Every token weighs the same, so that long samples weigh more. Invariant to one orthogonal map of both and to a
    positive scale per token, down to norms of 1e-8; not to translation. A zero vector has cosine 0 with everything,
    itself included. Time and memory are linear in the size of x: float64 copies of 2^21 numbers at a time. 1 - cos is
    computed as \|u - v\|^2 / 2 of unit vectors, accurate also where x and y nearly agree.

    References
    ----------
    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853.
    The authors' code sums over tokens where this is the mean (which keeps the order of the blocks), and takes the
    cosine with a zero vector as 0.5.

    Examples
    --------
    >>> round(block_influence(torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 1], [0, 1]])), 9)
    0.146446609
    """
    x, y = pair_of(x, y)
    shown = shown_tokens(x, mask)
    value = float(_block_influence(x, y, shown))
    check_known(value, x, y, shown)
    return value


def _block_influence(x: Tensor, y: Tensor, shown: Tensor | None) -> Tensor:
    gap, _ = cosine_gaps(token_rows(x), token_rows(y))
    if shown is None:
        return gap.mean()
    return gap.masked_fill(~shown.flatten(), 0).sum() / shown.sum()


def cosine_gaps(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos and 1 + cos of the rows of x and y (r, d), (r,) in float64, each accurate also where it is small."""
    step = max(1, CHUNK // x.shape[1])
    parts = [_gaps(x[i : i + step].double(), y[i : i + step].double()) for i in range(0, len(x), step)]
    minus, plus = (torch.cat(part) for part in zip(*parts, strict=True))
    return minus, plus


def _gaps(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    (u, short_u), (v, short_v) = _unit(x), _unit(y)
    short = (short_u + short_v) / 2
    return (u - v).square().sum(1) / 2 + short, (u + v).square().sum(1) / 2 + short


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows at norm 1, and 1 minus their squared norm: 0 but for rows below the floor, which stay shorter."""
    peak = x.abs().amax(1, keepdim=True).clamp_min(_NORM_FLOOR)  # the squares of x / peak stay in range
    x = x / peak
    norm, floor = torch.linalg.vector_norm(x, dim=1, keepdim=True), _NORM_FLOOR / peak
    return x / torch.maximum(norm, floor), 1 - (norm / floor).clamp_max(1).square()[:, 0]


def token_rows(x: Tensor) -> Tensor:
    """Tokens (n, t, d) as rows (n t, d), anything else as one row per sample."""
    return x.flatten(0, 1) if x.ndim == 3 else x.flatten(1)


def pair_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What enters and leaves a block, detached.

    Raises
    ------
    ValueError
        If they are not real tensors of one shape (n, ...) with at least one number.
    """
    for name, z in (("x", x), ("y", y)):
        if not isinstance(z, Tensor) or z.is_complex():
            got = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"{name} must be a real torch tensor, got {got}")
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x must have shape (n, ...) with samples of at least one feature, got {tuple(x.shape)}")
    return x.detach(), y.detach()


def shown_tokens(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as bools (n, t) on x's device.

    Raises
    ------
    ValueError
        If it is not one of 0 and 1 for each token of x (n, t, d), or a sample has no token left.
    """
    if mask is None:
        return None
    if x.ndim != 3:
        raise ValueError(f"mask needs tokens (n, t, d), got x of shape {tuple(x.shape)}")
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a tensor of shape {tuple(x.shape[:2])}, one entry per token, got {got}")
    shown = mask.detach().to(x.device) == 1
    if not (shown | (mask.detach().to(x.device) == 0)).all():
        raise ValueError("mask must be bool or 0 and 1, where 1 shows a token, got other values")
    if empty := int((~shown.any(1)).sum()):
        raise ValueError(f"mask must leave each sample a token, got none in {empty} of {len(x)} samples")
    return shown


def check_known(value: float, x: Tensor, y: Tensor, shown: Tensor | None) -> None:
    """Refuse a value that NaN or infinite features have made undefined; hidden tokens may hold what they like.

    Raises
    ------
    ValueError
        If the value is not finite.
    """
    if value - value == 0:
        return
    for name, z in (("x", x), ("y", y)):
        bad = ~z.isfinite() if shown is None else ~z.isfinite() & shown[..., None]
        if count := int(bad.flatten(1).any(1).sum()):
            raise ValueError(f"{name} must be finite, got NaN or infinite values in {count} of {len(z)} samples")
