"""Scale of the batch norm behind a filter: network slimming."""

from __future__ import annotations

from torch import Tensor, nn

from repgraph.activations.layers import Select, unwrap
from repgraph.scores.weight_norm import as_scores, layers_with_filters
from repgraph.surgery.channels import output_channels


def batch_norm_scale_scores(model: nn.Module, example: object, layers: Select | None = None) -> dict[str, Tensor]:
    r"""Absolute scale \|gamma\| of the batch norm that takes a layer's output, >= 0, high = keep.

    Parameters
    ----------
    model
        Untouched.
    example
        One batch, to see which norm follows which layer.
    layers
        Convolutions and linear layers, as `capture` chooses them; by default all convolutions with such a norm.

    Returns
    -------
    dict
        Layer -> (C,), float64 on the CPU.

    Raises
    ------
    ValueError
        If a layer of the choice has no batch norm of its own, or one without scale; if no layer has one; if a scale is
        not finite.

    References
    ----------
    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, arXiv 1708.06519. There
    the model is trained with an L1 penalty on gamma first; without it the scales spread less.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    >>> model[1].weight.data = torch.tensor([0.5, -2.0, 0.0])
    >>> batch_norm_scale_scores(model, torch.zeros(2, 1, 4, 4))["0"].tolist()
    [0.5, 2.0, 0.0]
    """
    model = unwrap(model)
    chosen = layers_with_filters(model, layers)
    known = output_channels(model, example, None if layers is None else [*chosen])
    scores = {}
    for name, norm in ((name, behind.norm) for name, behind in known.items() if name in chosen):
        scale = model.get_submodule(norm).weight if norm else None
        if isinstance(scale, Tensor):
            scores[name] = scale.abs()
        elif layers is not None:
            raise ValueError(f"layer {name!r} must have a batch norm with scale behind it, got {norm or 'none'}")
    if not scores:
        raise ValueError("no convolution of the model has a batch norm with scale behind it")
    return as_scores(scores)
