"""Norm of a filter's weights: what is small does little."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from repgraph.activations.layers import Select, choose, unwrap
from repgraph.surgery.channels import CONVS

Layer = nn.modules.conv._ConvNd | nn.Linear
"""What has filters: convolutions, transposed ones too, and linear layers."""


def weight_norm_scores(model: nn.Module, layers: Select | None = None, *, p: float = 1) -> dict[str, Tensor]:
    r"""p-norm of each filter's weights, >= 0, high = keep: no data needed.

    (sum_w \|w\|^p)^(1/p) over the weights w that make one output channel, without the bias.

    Parameters
    ----------
    model
        Untouched.
    layers
        Convolutions and linear layers, as `capture` chooses them; by default all convolutions.
    p
        1, 2 or any other positive number; infinity for the largest weight.

    Returns
    -------
    dict
        Layer -> (C,), float64 on the CPU.

    Raises
    ------
    ValueError
        If a layer has no filters or weights that are not finite, or p is not positive.

    Notes
    -----
    Batch norm behind the layer undoes any scale of a filter, which this score sees: norms of different layers do not
    compare.

    References
    ----------
    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710, section 3.1 (p = 1).

    Examples
    --------
    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> layer.weight.data = torch.tensor([[3.0, -4], [1, 0]])
    >>> weight_norm_scores(nn.Sequential(layer), "0")["0"].tolist()
    [7.0, 1.0]
    """
    if not p > 0:
        raise ValueError(f"p must be positive, got {p!r}")
    chosen = layers_with_filters(model, layers)
    return as_scores({name: filter_rows(m).double().norm(p, dim=1) for name, m in chosen.items()})


def layers_with_filters(model: nn.Module, layers: Select | None = None) -> dict[str, Layer]:
    """The chosen convolutions and linear layers by name; by default all convolutions.

    Raises
    ------
    ValueError
        If there are none, or one of the choice is of another kind.
    """
    model = unwrap(model)
    found: dict[str, Layer] = {}
    if layers is None:
        found |= {name: module for name, module in model.named_modules() if isinstance(module, CONVS) and name}
        if not found:
            raise ValueError("the model has no convolution: name the layers")
        return found
    for name, module in choose(model, layers).items():
        if not isinstance(module, Layer):
            raise ValueError(f"layer {name!r} must be a convolution or a linear layer, got {type(module).__name__}")
        found[name] = module
    return found


def num_filters(module: nn.Module) -> int:
    """Number of output channels of a convolution or linear layer."""
    return module.out_features if isinstance(module, nn.Linear) else int(module.out_channels)  # type: ignore[arg-type]


def filter_rows(module: Layer) -> Tensor:
    """The weights of each filter as a row, (C, k)."""
    w = module.weight.detach()
    if isinstance(module, CONVS) and module.transposed:
        # (in, C / groups, ...), and each group of inputs has outputs of its own
        w = w.view(module.groups, -1, *w.shape[1:]).transpose(1, 2).flatten(0, 1)
    return w.flatten(1)


def as_scores(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores in float64 on the CPU.

    Raises
    ------
    ValueError
        If a layer's are not finite.
    """
    scores = {name: value.detach().cpu().double() for name, value in values.items()}
    for name, value in scores.items():
        if count := int((~value.isfinite()).sum()):
            raise ValueError(f"layer {name!r} must have finite scores, got NaN or infinite values in {count}")
    return scores
