"""First-order Taylor expansion of the loss: how much it would change without a filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from repgraph.activations.batches import Source, model_device, model_dtype, to_device
from repgraph.activations.forward import call_model, kept_random_state, untouched
from repgraph.activations.layers import Select, unwrap
from repgraph.labels import Labels
from repgraph.scores.weight_norm import Layer, as_scores, layers_with_filters, num_filters

Loss = Callable[..., Tensor]
"""The user's own ``loss(output, labels)``: the mean over the samples of a batch, as torch's losses are."""


def taylor_scores(
    model: nn.Module,
    data: object,
    layers: Select | None = None,
    *,
    labels: Labels | None = None,
    loss: Loss | None = None,
    samples: int | Sequence[int] | Tensor | None = 640,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Squared first-order change of the loss without a filter, mean over the samples, >= 0, high = keep.

    (1/n) sum_i (sum_w w dL_i/dw)^2 over the weights w that make one output channel, without the bias; L_i is the loss
    of sample i, in eval mode. The inner sum is the derivative of L_i to a factor on the filter.

    Parameters
    ----------
    model
        Untouched: parameters, their flags and gradients, modes, buffers and random states are as before, also after an
        exception. Frozen parameters do not matter.
    data, labels, samples, batch_size
        As in `capture`. The result does not depend on the batch size.
    layers
        Convolutions and linear layers, as `capture` chooses them; by default all convolutions that the loss depends on.
    loss
        ``loss(output, labels) -> scalar``, the mean over the samples of a batch, of which each has a term of its own.
        Default: cross-entropy of the output, or of its first tensor, a row of class scores (b, classes) per sample;
        labels are the classes' places. Without labels a loss is given None.
    progress
        Show a progress bar.

    Returns
    -------
    dict
        Layer -> (C,), float64 on the CPU, in squared units of the loss.

    Raises
    ------
    ValueError
        If there are no labels for cross-entropy or they are no places of classes; if the loss is no finite scalar, or
        does not depend on a layer of the choice; if the first axis of a layer's output is not the batch.

    Notes
    -----
    Memory is that of a training step and one more copy of the layers' outputs.

    References
    ----------
    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv 1906.10771, equation 8 summed
    within the filter before it is squared. The authors take w dL/dw of the mean loss of a minibatch and average
    the squares over minibatches, while they train: near a minimum that falls with the size of the batch. The two agree
    at batches of one sample. Their "gate" behind batch norm, which they prefer, is another score.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> scores = taylor_scores(digits_resnet(), digits("train"), "layer1.*.conv1", samples=100, progress=False)
    >>> len(scores), scores["layer1.0.conv1"].shape
    (5, torch.Size([8]))
    """
    rows = taylor_by_sample(
        model,
        data,
        layers,
        labels=labels,
        loss=loss,
        samples=samples,
        batch_size=batch_size,
        progress=progress,
    )
    return {name: values.mean(0) for name, values in rows.items()}


@kept_random_state()
def taylor_by_sample(
    model: nn.Module,
    data: object,
    layers: Select | None = None,
    *,
    labels: Labels | None = None,
    loss: Loss | None = None,
    samples: int | Sequence[int] | Tensor | None = 640,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The terms of `taylor_scores`, layer -> (n, C): (sum_w w dL_i/dw)^2 for each sample i.

    Parameters, errors and model as in `taylor_scores`.
    """
    model = unwrap(model)
    chosen = layers_with_filters(model, layers)
    source = Source(data, batch_size, samples)
    own = None if labels is None else source.pick(labels, "labels")
    device, dtype = model_device(model), model_dtype(model)
    factors: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        size = 0

        def scaled(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
            return lambda module, _, z: _scaled(name, module, z, size, factors)

        for name, module in chosen.items():
            stack.callback(module.register_forward_hook(scaled(name)).remove)
        for batch in tqdm(
            source, desc="taylor", unit="batch", total=source.num_batches, disable=not progress, delay=1, leave=False
        ):
            factors.clear()
            size, rows = batch.size, slice(batch.start, batch.start + batch.size)
            target = batch.labels if own is None else own[rows]
            target = target.to(device) if isinstance(target, Tensor) else target
            output = call_model(model, to_device(batch.inputs, device, dtype, copy=True))
            value = (loss or _cross_entropy)(output, target)
            if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite()):
                raise ValueError(f"loss must give one finite number, the mean over the samples, got {value!r}")
            leaves = [*factors.values()] if value.requires_grad else []
            slopes = torch.autograd.grad(value.squeeze(), leaves, allow_unused=True) if leaves else ()
            for name, slope in zip(factors, slopes, strict=False):
                if slope is not None:
                    new = (source.n, num_filters(chosen[name]))
                    into = found.setdefault(name, torch.zeros(new, dtype=torch.float64, device="cpu"))
                    into[rows] = (size * slope.cpu().double()).square()
    if without := [name for name in chosen if name not in found and (layers is not None or not found)]:
        raise ValueError(f"the loss does not depend on layer {without[0]!r}")
    return as_scores({name: found[name] for name in chosen if name in found})


def _scaled(name: str, module: Layer, z: Tensor, size: int, factors: dict[str, Tensor]) -> Tensor:
    """The output z as it is, with a gradient to factors (b, C) on the filters of each sample."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    if z.ndim < 2 or len(z) != size:
        raise ValueError(
            f"layer {name!r} gives shape {tuple(z.shape)} for a batch of {size} samples: its first axis must be the "
            "batch"
        )
    shape = [1] * z.ndim
    shape[axis] = z.shape[axis]
    part = z.detach() if module.bias is None else z.detach() - module.bias.detach().view(shape)
    if name not in factors:  # a layer that runs twice has one filter
        factors[name] = torch.ones(size, z.shape[axis], dtype=z.dtype, device=z.device, requires_grad=True)
    shape[0] = size
    return z + (factors[name].view(shape) - 1) * part


def _cross_entropy(output: object, labels: Tensor | np.ndarray | None) -> Tensor:
    scores = next((value for value in tree_leaves(output) if isinstance(value, Tensor)), None)
    if labels is None:
        raise ValueError("data must have labels: pass (inputs, labels), labels= or a loss without them")
    if scores is None or scores.ndim != 2 or len(scores) != len(labels):
        got = type(output).__name__ if scores is None else tuple(scores.shape)
        raise ValueError(f"the model must give one row of class scores per sample, or pass loss=; got {got}")
    places = labels if isinstance(labels, Tensor) and labels.ndim == 1 else None
    if places is None or places.is_floating_point() or int(places.min()) < 0 or int(places.max()) >= scores.shape[1]:
        raise ValueError(f"labels must be integers from 0 to {scores.shape[1] - 1}, the places of the classes")
    return F.cross_entropy(scores, places.long())
