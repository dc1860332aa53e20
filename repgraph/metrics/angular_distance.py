"""Angular distance between two layers, by which runs of blocks are chosen for removal."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from repgraph.activations.reduce import reduced
from repgraph.metrics.block_influence import check_known, cosine_gaps, pair_of, shown_tokens


def angular_distance(x: Tensor, y: Tensor, mask: Tensor | None = None) -> float:
    r"""Mean angle between the samples' vectors in two layers, in units of pi: in [0, 1], 0 where directions agree.

    (1 / (n pi)) sum_i arccos cos(x_i, y_i). Of tokens, x_i and y_i are the last ones that the mask shows. The run of
    blocks with the smallest distance from its input to its output is the first to drop.

    Parameters
    ----------
    x, y
        The layers, of one shape: tokens (n, t, d), or samples (n, ...) of any other number of axes, flattened. For
        all tokens alike pass ``x.flatten(0, 1)``; at each position of a conv map (n, c, h, w)
        ``x.flatten(2).mT.flatten(0, 1)``.
    mask
        Attention mask (n, t), bool or 0 and 1, with the padding on either side. Without it the last token is the last
        in memory.

    Returns
    -------
    float
        In [0, 1]; 0.5 is a right angle.

    Raises
    ------
    ValueError
        If x and y differ in shape, are empty or not finite at the tokens taken, if the mask does not fit, or if it
        hides all tokens of a sample.

    Notes
    -----
    Invariant to one orthogonal map of both and to a positive scale per sample, down to norms of 1e-8; not to
    translation. A zero vector is at a right angle to everything, itself included. The angle is computed as
    2 atan2(\|u - v\|, \|u + v\|) of unit vectors in float64, accurate also where x and y nearly agree, where arccos
    is not. Time and memory are linear in the number of values taken.

    References
    ----------
    Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887.

    Examples
    --------
    >>> round(angular_distance(torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 1], [0, 1]])), 9)
    0.125
    """
    x, y = pair_of(x, y)
    shown = shown_tokens(x, mask)
    x, y = (_last(z, shown) for z in (x, y))
    value = float(_angular_distance(x, y))
    check_known(value, x, y, None)
    return value


def _last(x: Tensor, shown: Tensor | None) -> Tensor:
    """The last token of each sample, or the whole sample where there are no tokens: (n, d)."""
    if x.ndim != 3:
        return x.flatten(1)
    return reduced(x, "last", mask=shown, channel_axis=None, key="x", module=nn.Identity())


def _angular_distance(x: Tensor, y: Tensor) -> Tensor:
    minus, plus = cosine_gaps(x, y)
    return 2 / math.pi * torch.atan2(minus.sqrt(), plus.sqrt()).mean()
