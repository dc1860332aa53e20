"""Random filters: the control for every other score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from repgraph.activations.layers import Select
from repgraph.scores.weight_norm import layers_with_filters, num_filters


def random_scores(model: nn.Module, layers: Select | None = None, *, seed: int = 0) -> dict[str, Tensor]:
    """A random permutation of 0..C-1 for each layer, high = keep.

    It depends on the seed, the layer's name and its C alone: not on the other layers of the choice.

    Parameters
    ----------
    model
        Untouched.
    layers
        Convolutions and linear layers, as `capture` chooses them; by default all convolutions.
    seed
        At least 0. No global random state is read or changed.

    Returns
    -------
    dict
        Layer -> (C,), float64 on the CPU.

    Raises
    ------
    ValueError
        If a layer has no filters, or the seed is negative.

    References
    ----------
    Mittal et al., "Recovering from Random Pruning", WACV 2018, arXiv 1801.10447: fine-tuned long enough, it comes close
    to the others.

    Examples
    --------
    >>> random_scores(nn.Sequential(nn.Conv2d(1, 4, 3)))["0"].sort().values.tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed!r}")
    return {
        name: torch.from_numpy(np.random.default_rng([seed, *name.encode()]).permutation(num_filters(module))).double()
        for name, module in layers_with_filters(model, layers).items()
    }
