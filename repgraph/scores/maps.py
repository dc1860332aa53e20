"""The maps that filters are judged by: the outputs of a layer behind its batch norm and activation, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from repgraph.activations import stream
from repgraph.activations.batches import Source, read_batches
from repgraph.activations.forward import Forward, kept_random_state
from repgraph.activations.layers import unwrap
from repgraph.surgery.channels import CONVS, OutputChannels, output_channels


@kept_random_state()
def stream_maps(
    model: nn.Module,
    data: object,
    f: Callable[[Tensor], Tensor],
    layers: Sequence[str] | None = None,
    *,
    combine: Literal["concat", "sum", "mean"] = "concat",
    samples: int | Sequence[int] | Tensor | None = None,
    batch_size: int = 64,
    forward: Forward | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Apply a function to each batch of each layer's maps inside the pass, and keep only what it returns.

    The maps of a layer are its output behind the batch norm and the activation that alone take it
    (`repgraph.surgery.channels.output_channels`): before an addition, unlike the scores of some authors, who read the
    sum of a residual block and credit it to the last convolution; before pooling, too.

    Parameters
    ----------
    model, data, samples, batch_size, forward, progress
        As in `capture`.
    f
        Called with maps (b, C, ...), channels at axis 1; returns a tensor.
    layers
        Names of convolutions and linear layers; all convolutions by default.
    combine
        As in `repgraph.activations.stream`.

    Returns
    -------
    dict of str to Tensor
        Layer -> combined result, in execution order.

    Raises
    ------
    ValueError
        As `capture` and `output_channels`; if the model has no convolution and no layers are named.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    >>> sizes = stream_maps(model, torch.randn(8, 1, 6, 6), lambda maps: maps.mean((2, 3)))["0"]
    >>> sizes.shape, bool((sizes >= 0).all())
    (torch.Size([8, 4]), True)
    """
    model = unwrap(model)
    if isinstance(data, Iterator):
        data = read_batches(data, samples if isinstance(samples, int) else None)[0]
    if layers is None:
        layers = [name for name, module in model.named_modules() if isinstance(module, CONVS)]
        if not layers:
            raise ValueError("the model has no convolution: name the layers")
        known = output_channels(model, _first_two(data, batch_size))
        places = {name: place for name, place in known.items() if name in layers}
    else:
        places = output_channels(model, _first_two(data, batch_size), layers)
    reads = {place.norm or place.layer: place for place in places.values()}
    found = stream(
        model,
        data,
        {key: partial(_behind, place, f) for key, place in reads.items()},
        list(reads),
        combine=combine,
        forward=forward,
        samples=samples,
        batch_size=batch_size,
        progress=progress,
    )
    return {place.layer: found[key] for key, place in reads.items()}


def _first_two(data: object, batch_size: int) -> object:
    return next(iter(Source(data, batch_size, 2))).inputs


def _behind(place: OutputChannels, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        return f(place.activate(x).movedim(place.axis, 1))
    except ValueError as error:
        raise ValueError(f"layer {place.layer!r}: {error}") from error
