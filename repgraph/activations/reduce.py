"""From a layer's output to what is kept of it: everything, a mean, one token, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Reduce: TypeAlias = Literal["mean", "cls", "last"] | Callable[[Tensor], Tensor] | None
"""None keeps the output's shape; "mean" averages over positions or tokens; "cls" and "last" take one token."""

ChannelAxis: TypeAlias = int | Mapping[str, int] | None
"""Axis of the channels, for all layers or by layer name or wildcard; None tells it from the layer."""

_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def check_choice(reduce: Reduce) -> None:
    """Refuse a reduction that is none, before any forward pass."""
    if reduce is not None and not callable(reduce) and reduce not in ("mean", "cls", "last"):
        raise ValueError(f"reduce must be None, 'mean', 'cls', 'last' or a callable, got {reduce!r}")


def reduced(
    x: Tensor, how: Reduce, *, mask: Tensor | None, channel_axis: ChannelAxis, key: str, module: nn.Module
) -> Tensor:
    """What is kept of one batch of a layer's output, (b, ...).

    "mean": over all axes but the batch and the channels, in float32 for half precision; tokens that the attention mask
    (b, T) hides do not count. "cls": the first token that the mask shows, "last": the last one, whichever side the
    padding is on. Outputs (b, d) stay as they are under all three.

    Raises
    ------
    ValueError
        If the channel axis cannot be told, the mask does not fit the tokens, a token is asked of an image, or a
        callable returns something that is not one row per sample.
    """
    if how is None:
        return x
    if callable(how):
        value = how(x)
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(x):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"layer {key!r}: reduce must return one row per sample, expected {len(x)} rows, got {got}")
        return value
    if x.ndim <= 2:
        return x
    axis = channel_axis_of(x, module, key, channel_axis)
    if how == "mean":
        x = x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x
        if mask is not None and x.ndim == 3 and axis == 2:
            shown = _fitting(mask, x, key).to(x.dtype)
            return torch.einsum("btd,bt->bd", x, shown) / shown.sum(1, keepdim=True).clamp_min(1)
        return x.mean(
            [a for a in range(1, x.ndim) if a != axis], dtype=None if x.is_floating_point() else torch.float32
        )
    if x.ndim != 3 or axis != 2:
        raise ValueError(f"layer {key!r}: reduce={how!r} needs tokens (n, T, d), got shape {tuple(x.shape)}")
    if mask is None:
        return x[:, 0] if how == "cls" else x[:, -1]
    shown = _fitting(mask, x, key)
    place = torch.arange(1, x.shape[1] + 1, device=x.device) * shown  # 0 where hidden
    index = place.argmax(1) if how == "last" else shown.to(torch.int8).argmax(1)
    return x[torch.arange(len(x), device=x.device), index]


def _fitting(mask: Tensor, x: Tensor, key: str) -> Tensor:
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"layer {key!r}: attention_mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])}: "
            "pass reduce= as a callable for this layer"
        )
    return mask.to(x.device) != 0


def channel_axis_of(x: Tensor, module: nn.Module, key: str, given: ChannelAxis) -> int:
    """Channel axis, positive. Tokens (n, T, d) have it last, images (n, c, h, w) first, unless its widths differ."""
    if isinstance(module, _FIRST):
        return 1  # torch fixes the layout of these
    if isinstance(given, Mapping):
        given = next((axis for name, axis in given.items() if fnmatchcase(key, name)), None)
    if given is not None:
        if not -x.ndim < given < x.ndim or given == 0 or given == -x.ndim:
            raise ValueError(
                f"layer {key!r}: channel_axis must be an axis of {tuple(x.shape)} other than 0, got {given}"
            )
        return given % x.ndim
    first, last = _widths(module)
    looks_first, looks_last = x.shape[1] in first, x.shape[-1] in last
    usual = 1 if x.ndim > 3 else 2
    if looks_first == looks_last and not looks_first:
        return usual
    if (looks_first and looks_last) or (looks_last and usual == 1):
        raise ValueError(
            f"layer {key!r}: cannot tell the channels of an output of shape {tuple(x.shape)}"
            f"{' (the last axis looks like them)' if not looks_first else ''}: pass channel_axis=1 or channel_axis=-1, "
            "for all layers or by name"
        )
    return 1 if looks_first else x.ndim - 1


def _widths(module: nn.Module) -> tuple[set[int], set[int]]:
    """Widths that modules inside give to axis 1, and those they give to the last axis."""
    first: set[int] = set()
    last: set[int] = set()
    for m in module.modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            first.add(m.out_channels)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            first.add(m.num_features)
        elif isinstance(m, nn.GroupNorm):
            first.add(m.num_channels)
        elif isinstance(m, nn.Linear):
            last.add(m.out_features)
        elif isinstance(m, nn.LayerNorm):
            last.add(m.normalized_shape[-1])
    return first, last
