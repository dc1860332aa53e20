"""Refit the layers that read cut channels: least squares of what they gave before, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations import stream
from repgraph.activations.batches import Source, model_device, model_dtype, read_batches, to_device
from repgraph.activations.forward import call_model, kept_random_state, untouched
from repgraph.activations.layers import unwrap
from repgraph.prune.filter_groups import prunable_filters
from repgraph.prune.filters import units_of
from repgraph.prune.pruned import Pruned
from repgraph.scores.weight_norm import num_filters
from repgraph.surgery.channels import output_channels


@kept_random_state()
def refit_readers(
    model: nn.Module,
    pruned: Pruned,
    data: object,
    *,
    samples: int | Sequence[int] | Tensor = 256,
    positions: int = 64,
    ridge: float = 1e-3,
    batch_size: int = 64,
    progress: bool = True,
) -> Pruned:
    r"""Let every layer that reads cut channels give what it gave before, as nearly as a linear map of the rest can.

    One after another in execution order, W, b = argmin sum \|y - W x - b\|^2 + lambda \|W - W_0\|^2 with x the patches
    that the layer reads in the smaller model, earlier layers refitted already, y what the layer gave in the whole
    model, W_0 the weights that the cut left, lambda = ridge times the sum of squares of x, mean over its entries.

    Parameters
    ----------
    model
        The whole model; untouched.
    pruned
        What `prune_filters` made of it; untouched.
    data
        As in `capture`, not those that the result is judged on. Labels are not used.
    samples
        How many samples to take, or their positions.
    positions
        Of a map, or of the tokens, so many positions of each sample enter the sums, the same of all samples, drawn
        once; all where there are no more.
    ridge
        At least 0.
    batch_size
        Samples per forward pass, where the data come unbatched.
    progress
        Show progress bars.

    Returns
    -------
    Pruned
        A smaller model of the same shapes; the plan's settings say which layers were refitted.

    Raises
    ------
    ValueError
        If pruned has no cut filters or is not of this model; if positions or ridge are out of range.

    Notes
    -----
    Without a bias of its own a layer's b goes into the running mean of the batch norm behind it; without either, W is
    fitted alone. Refitted are linear layers and convolutions without groups that pad with zeros or not at all; others
    stay as they are. Memory: two matrices of (c k^2)^2 numbers of float64 for a convolution of c channels with k^2
    weights each, and what all readers gave at the positions (samples x positions x outputs, float32).

    References
    ----------
    He, Zhang & Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1 (the second
    step, without the choice of channels); the ridge toward the old weights is ours.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> from repgraph.prune import prune_filters
    >>> from repgraph.scores.weight_norm import weight_norm_scores
    >>> model, (x, y) = digits_resnet(), digits()
    >>> pruned = prune_filters(model, x[:2], weight_norm_scores(model), 0.3)
    >>> refitted = refit_readers(model, pruned, digits("train"), progress=False)
    >>> loss = lambda net: float(nn.functional.cross_entropy(net(x), y))
    >>> with torch.no_grad():
    ...     loss(refitted.model) < loss(pruned.model)
    True
    """
    model = unwrap(model)
    if not pruned.plan.filters:
        raise ValueError("pruned has lost no filters: there is nothing to refit")
    if positions < 1 or not 0 <= ridge < math.inf:
        raise ValueError(f"positions must be at least 1 and ridge at least 0, got {positions} and {ridge}")
    if isinstance(data, Iterator):
        data = read_batches(data, samples if isinstance(samples, int) else None)[0]
    example = next(iter(Source(data, batch_size, 2))).inputs
    places = output_channels(model, example)
    groups = units_of(model, prunable_filters(model, example), pruned.plan)
    reading = {name for group, _ in groups for name, side in group.places if side == "in"}
    readers = [name for name in places if name in reading and _can_refit(model.get_submodule(name))]
    smaller = deepcopy(pruned.model)
    for name in readers:
        lost = len(pruned.plan.filters.get(name, ()))
        expected, got = num_filters(model.get_submodule(name)) - lost, num_filters(smaller.get_submodule(name))
        if expected != got:
            raise ValueError(f"pruned is no cut of this model: {name!r} must have {expected} outputs, got {got}")
    chosen: dict[str, Tensor] = {}

    def pick(name: str) -> Callable[[Tensor], Tensor]:
        module = model.get_submodule(name)
        keep = [i for i in range(num_filters(module)) if i not in set(pruned.plan.filters.get(name, ()))]

        def picked(y: Tensor) -> Tensor:
            rows = (
                y.flatten(2).movedim(1, -1)
                if isinstance(module, nn.Conv2d)
                else y.flatten(1, -2)
                if y.ndim > 2
                else y[:, None]
            )
            if name not in chosen:
                generator = torch.Generator().manual_seed(len(chosen))
                chosen[name] = torch.randperm(rows.shape[1], generator=generator)[:positions].sort().values
            return rows[:, chosen[name].to(y.device)][..., keep]

        return picked

    targets = stream(
        model,
        data,
        {name: pick(name) for name in readers},
        readers,
        samples=samples,
        batch_size=batch_size,
        progress=progress,
    )
    source = Source(data, batch_size, samples)
    for name in tqdm(readers, desc="refit", unit="layer", disable=not progress, delay=1, leave=False):
        module = smaller.get_submodule(name)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        rows = (_patches(module, x, chosen[name].to(x.device)) for x in _inputs(smaller, module, source))
        norm = places[name].norm
        _refit(module, _sums(rows, targets[name]), ridge, None if norm is None else smaller.get_submodule(norm))
    settings = {
        **pruned.plan.settings,
        "refit": {"samples": len(next(iter(targets.values()))), "ridge": ridge, "layers": readers},
    }
    return replace(pruned, model=smaller, plan=replace(pruned.plan, settings=settings))


def _can_refit(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


class _Reached(BaseException):  # no model may catch it
    """Ends a forward pass at the layer whose input was wanted."""


def _inputs(model: nn.Module, module: nn.Module, source: Source) -> Iterator[Tensor]:
    """What a layer reads, one batch after another; what comes behind it is not computed."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    device, dtype = model_device(model), model_dtype(model)
    handle = module.register_forward_pre_hook(stop)
    try:
        for batch in source:
            with untouched(model), torch.no_grad(), suppress(_Reached):
                call_model(model, to_device(batch.inputs, device, dtype, copy=True))
            yield found.pop()
    finally:
        handle.remove()


def _sums(batches: Iterator[Tensor], targets: Tensor) -> Tensor:
    """X^T (X, Y) in float64, with a column of ones in X."""
    total, start = torch.zeros((), dtype=torch.float64, device=targets.device), 0
    for batch in batches:
        rows = torch.cat([batch.double(), batch.new_ones(len(batch), 1, dtype=torch.float64)], 1)
        stop = start + len(rows) // targets.shape[1]
        total = total + rows.T @ torch.cat([rows, targets[start:stop].flatten(0, 1).double()], 1)
        start = stop
    return total


def _patches(module: nn.Conv2d | nn.Linear, x: Tensor, chosen: Tensor) -> Tensor:
    """What the layer reads at the chosen positions of its output: (samples x positions, entries of a weight row)."""
    if isinstance(module, nn.Linear):
        rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
        return rows[:, chosen].flatten(0, 1)
    (sh, sw), (dh, dw), (kh, kw) = module.stride, module.dilation, module.kernel_size
    ph, pw = (int(value) for value in module.padding)
    x = F.pad(x, (pw, pw, ph, ph))
    wide = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    top = (chosen // wide * sh)[:, None, None] + (torch.arange(kh, device=x.device) * dh)[:, None]
    left = (chosen % wide * sw)[:, None, None] + torch.arange(kw, device=x.device) * dw
    return x[:, :, top, left].movedim(1, 2).flatten(2).flatten(0, 1)


@torch.no_grad()
def _refit(module: nn.Conv2d | nn.Linear, sums: Tensor, ridge: float, norm: nn.Module | None) -> None:
    size = len(sums) - 1
    inner, outer = sums[:, : size + 1].cpu(), sums[:, size + 1 :].cpu()
    old = torch.zeros(size + 1, outer.shape[1], dtype=torch.float64)
    old[:size] = module.weight.detach().flatten(1).double().cpu().T
    mean = norm.running_mean if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None
    with_bias = module.bias is not None or mean is not None
    penalty = torch.full((size + 1,), ridge * float(inner.diagonal()[:size].mean()), dtype=torch.float64)
    penalty[size] = 0
    if not with_bias:
        inner, outer, penalty, old = inner[:size, :size], outer[:size], penalty[:size], old[:size]
    # dead channels make the system singular where ridge is 0: least squares of the least norm
    change = torch.linalg.lstsq(inner + penalty.diag(), outer - inner @ old, driver="gelsd").solution
    both = old + change
    module.weight.copy_(both[:size].T.reshape(module.weight.shape))
    if module.bias is not None:
        module.bias.copy_(both[size])
    elif mean is not None:
        mean -= both[size].to(mean)
