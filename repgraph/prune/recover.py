"""What a cut needs and training does not give: batch norm's statistics anew, and a linear map over the gap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations import capture
from repgraph.activations.batches import Source, model_device, model_dtype, read_batches, to_device
from repgraph.activations.forward import call_model, kept_random_state, run_example
from repgraph.activations.layers import unwrap
from repgraph.activations.reduce import channel_axis_of
from repgraph.cost import model_cost
from repgraph.prune.layers import drop_layers, dropped_calls
from repgraph.prune.pruned import Pruned, new_name
from repgraph.prune.refit import refit_readers
from repgraph.surgery.calls import AVERAGE, SHAPE, Call, observe
from repgraph.surgery.outputs import agree
from repgraph.surgery.stand_ins import Affine, Skip

_ROWS = 2**15  # positions in float64 at a time
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Reader = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@kept_random_state()
def reestimate_batch_norm_(
    model: nn.Module, data: object, *, samples: int | None = None, batch_size: int = 128, progress: bool = True
) -> nn.Module:
    """Compute the running mean and variance of all batch norms anew, in place: a cut changes what reaches them.

    The model runs with its batch norms in training mode and all else in eval mode, without gradients; each batch norm
    takes the plain mean of its batches' statistics. Weights are untouched, modes are restored; after an exception the
    statistics too.

    Parameters
    ----------
    model
        With or without batch norm; without, nothing happens.
    data
        As in `capture`. A few hundred samples will do; a last, smaller batch counts as much as the others.
    samples
        How many samples to take: the first ones; all by default.
    batch_size
        Samples per forward pass, where the data come unbatched; at least 2.
    progress
        Show a progress bar.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        If a batch has fewer than 2 samples.

    References
    ----------
    The statistics are those of `torch.optim.swa_utils.update_bn`, which puts the whole model in training mode.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> pruned = drop_layers(digits_resnet(), ["layer2.1"], digits()[0][:2])
    >>> _ = reestimate_batch_norm_(pruned.model, digits("train"), progress=False)
    """
    model = unwrap(model)
    source = Source(data, batch_size, samples)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    kept = {norm: {name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms}
    device, dtype = model_device(model), model_dtype(model)
    try:
        for module in modes:
            module.training = module in momenta
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean
        for batch in tqdm(source, desc="batch norm", unit="batch", disable=not progress, delay=1, leave=False):
            if batch.size < 2:
                raise ValueError(f"every batch must hold at least 2 samples, got {batch.size}: drop the last one")
            with torch.no_grad():
                call_model(model, to_device(batch.inputs, device, dtype, copy=True))
    except BaseException:
        for norm, buffers in kept.items():
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    return model


def repair(
    model: nn.Module,
    pruned: Pruned,
    data: object,
    *,
    samples: int | Sequence[int] | Tensor = 500,
    ridge: float = 1e-3,
    absorb: bool = True,
    channel_axis: int | None = None,
    example: object = None,
    memory: int | str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Pruned:
    r"""Close every cut by the linear map of the channels that comes nearest to what was dropped, in closed form.

    A run of dropped layers took x to y in the whole model. Its place takes x + W x + b, the same map at every position
    or token, with W, b = argmin sum \|y - x - W x - b\|^2 + lambda \|W\|^2 over all samples and positions, lambda =
    ridge times the sum of squares of x over them, mean over the channels; b is not penalised. x is taken in the smaller
    model, whose earlier cuts are repaired already, y in the whole one. Of a part that only adds to a residual stream, y
    is what it added and the map W x + b of its own input. For ridge -> infinity nothing but a shift is left. Where
    filters were cut, the layers that read them are refitted instead (`refit_readers`, with this ridge).

    Parameters
    ----------
    model
        The whole model; untouched.
    pruned
        What `drop_layers` or `prune_filters` made of it, fine-tuned or not; untouched. Cuts whose map was absorbed
        before stay as they are.
    data
        As in `capture`, not those that the result is judged on. Labels are not used.
    samples
        How many samples to take, or their positions, as in `capture`.
    ridge
        At least 0.
    absorb
        Where the map's result goes into one convolution or linear layer and nothing else, directly or through a mean
        over all positions, multiply it into that layer instead: exactly the same function, at no cost. A layer without
        bias, or a convolution that pads with zeros, takes W alone, fitted without b.
    channel_axis
        Of maps whose channels cannot be told, as in `capture`.
    example
        On which the costs are counted, as in `drop_layers`; the first two samples by default.
    memory, batch_size
        As in `capture`.
    progress
        Show progress bars.

    Returns
    -------
    Pruned
        A smaller model with linear maps, which the plan calls repairs, or with other weights where they were absorbed;
        both are in the plan's settings. `after` is measured.

    Raises
    ------
    ValueError
        As `capture` and `drop_layers`; if nothing was dropped, pruned is not of this model, or ridge is negative.

    Notes
    -----
    A map costs c^2 multiply-adds a position for c channels; a block of two 3 x 3 convolutions 18 c^2. Channels are the
    second axis of maps and the last of tokens. The sums are float64, of c^2 numbers.

    References
    ----------
    Ours. LinearPatch (arXiv 2505.24680, abstract read) inserts a scaling in the Hadamard basis at the cut; this is
    the least-squares map itself.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> model, (x, y), train = digits_resnet(), digits(), digits("train")
    >>> pruned = drop_layers(model, ["layer2.1", "layer2.2"], x[:2])
    >>> repaired = repair(model, pruned, train, progress=False)
    >>> loss = lambda net: float(nn.functional.cross_entropy(net(x), y))
    >>> with torch.no_grad():
    ...     loss(repaired.model) < loss(pruned.model)
    True
    """
    model = unwrap(model)
    if pruned.plan.filters and not pruned.plan.layers:
        return refit_readers(
            model, pruned, data, samples=samples, ridge=ridge, batch_size=batch_size, progress=progress
        )
    if not pruned.plan.layers or pruned.plan.filters:
        raise ValueError("pruned must have lost layers, or filters, and not both: repair each cut on its own")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be a finite number of at least 0, got {ridge!r}")
    if isinstance(data, Iterator):
        data = read_batches(data, samples if isinstance(samples, int) else None)[0]
    if example is None:
        example = next(iter(Source(data, batch_size, 2))).inputs
    calls = dropped_calls(model, pruned.plan.layers, example)
    absorbed = _absorbed_before(pruned)
    axes = {}
    for name, run in _runs(calls).items():
        result = calls[name].result
        assert result is not None
        layers = nn.ModuleList(model.get_submodule(layer) for layer in run)  # any of them may tell the channels
        if name not in absorbed:
            axes[name] = channel_axis_of(result, layers, name, channel_axis) if result.ndim > 2 else 1
    if not axes:
        return pruned
    smaller = _with_maps(model, pruned, axes, example)
    take = partial(capture, data=data, samples=samples, memory=memory, batch_size=batch_size, progress=progress)
    targets = take(model, layers=list(axes))
    for name, axis in tqdm(axes.items(), desc="repair", unit="cut", disable=not progress, delay=1, leave=False):
        place = new_name(name, smaller.plan.renamed)
        gap = smaller.model.get_submodule(place)
        assert isinstance(gap, Affine)
        x, y = take(smaller.model, layers=f"{place}.taken")[f"{place}.taken"], targets[name]
        if x.shape != y.shape:
            raise ValueError(f"layer {name!r} gives shape {tuple(y.shape)}, in pruned it is {tuple(x.shape)}")
        reader = _only_reader(smaller.model, place, example) if absorb else None
        with_bias = reader is None or (reader.bias is not None and not _pads_zeros(reader))
        base = not calls[name].branch
        weight, bias = _fitted(x.movedim(axis, -1), y.movedim(axis, -1), base, ridge, with_bias)
        with torch.no_grad():
            gap.weight.copy_(weight)
            gap.bias.copy_(bias)
        if reader is not None:
            _absorb(gap, reader)
            here = next(key for key, module in smaller.model.named_modules() if module is reader)
            names = (key for key, _ in model.named_modules() if new_name(key, smaller.plan.renamed) == here)
            absorbed[name] = next(key for key in names if not _inside(key, pruned.plan.layers))
    settings = {**pruned.plan.settings, "repair": {"samples": len(targets[name]), "ridge": ridge, "absorbed": absorbed}}
    left = {name: axis for name, axis in axes.items() if name not in absorbed}
    done = _with_maps(model, smaller, left, example)
    return replace(done, plan=replace(done.plan, settings=settings), after=model_cost(done.model, example))


def _absorbed_before(pruned: Pruned) -> dict[str, str]:
    """Cuts whose maps are in the weights already, and the layers that took them in, by their first names."""
    done = pruned.plan.settings.get("repair")
    return dict(done["absorbed"]) if isinstance(done, dict) else {}


def _runs(calls: Mapping[str, Call]) -> dict[str, list[str]]:
    """Runs of dropped layers that follow one another, in order: the last of each -> all of them."""
    runs: list[list[str]] = []
    for name, call in calls.items():
        if call.passed is None:  # fed another one that went
            continue
        before = calls[runs[-1][-1]] if runs else None
        if before is not None and not call.branch and not before.branch and call.before == before.after:
            runs[-1].append(name)
        else:
            runs.append([name])
    return {run[-1]: run for run in runs}


def _inside(name: str, layers: Sequence[str]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def _with_maps(model: nn.Module, pruned: Pruned, axes: Mapping[str, int], example: object) -> Pruned:
    """The same smaller model with maps at these places, and no others."""
    found = drop_layers(model, replace(pruned.plan, repairs=dict(axes), renamed={}), example)
    places = {
        new_name(key, pruned.plan.renamed): new_name(key, found.plan.renamed)
        for key in model.state_dict()
        if not _inside(key, pruned.plan.layers)
    }
    for name in axes:
        if name in pruned.plan.repairs:
            before, after = new_name(name, pruned.plan.renamed), new_name(name, found.plan.renamed)
            places |= {f"{before}.{part}": f"{after}.{part}" for part in ("weight", "bias")}
    given, state = pruned.model.state_dict(), found.model.state_dict()
    for old, new in places.items():
        if old not in given or new not in state or given[old].shape != state[new].shape:
            got = tuple(given[old].shape) if old in given else "nothing"
            expected = tuple(state[new].shape) if new in state else "nothing"
            raise ValueError(f"pruned is no cut of this model: {old!r} must have shape {expected}, got {got}")
    if extra := [key for key in given if key not in places and not _inside(key, _stand_ins(pruned))]:
        raise ValueError(f"pruned is no cut of this model: it has {extra[0]!r}, which the model has not")
    with torch.no_grad():
        for old, new in places.items():
            state[new].copy_(given[old])
    return found


def _stand_ins(pruned: Pruned) -> list[str]:
    return [name for name, module in pruned.model.named_modules() if isinstance(module, Skip)]


def _fitted(x: Tensor, y: Tensor, residual: bool, ridge: float, with_bias: bool) -> tuple[Tensor, Tensor]:
    """W (c, c) and b (c,) of the least squares over rows x, y (..., c), in float64 sums."""
    c = x.shape[-1]
    inner, outer = (torch.zeros(c + 1, width, dtype=torch.float64, device=x.device) for width in (c + 1, c))
    step = max(1, _ROWS * len(x) // max(1, x.numel() // c))
    for i in range(0, len(x), step):
        rows = x[i : i + step].reshape(-1, c).double()
        to = y[i : i + step].reshape(-1, c).double()
        ones = rows.new_full((len(rows), 1), float(with_bias))
        columns = torch.cat([rows, ones], 1)
        inner += columns.T @ columns
        outer += columns.T @ (to - rows if residual else to)
    penalty = torch.full((c + 1,), float(ridge) * float(inner.diagonal()[:c].mean()), dtype=torch.float64)
    penalty[c] = 0 if with_bias else 1
    # dead channels make the system singular where ridge is 0: least squares of the least norm
    both = torch.linalg.lstsq(inner.cpu() + penalty.diag(), outer.cpu(), driver="gelsd").solution
    return both[:c].T, both[c]


def _only_reader(model: nn.Module, place: str, example: object) -> _Reader | None:
    """The convolution or linear layer that alone takes the result of a map, directly or averaged over positions."""
    gap = model.get_submodule(place)
    assert isinstance(gap, Affine)
    c = len(gap.bias)
    modules: dict[str, _Reader] = {}
    for name, module in model.named_modules():
        if (isinstance(module, _CONVS) and module.in_channels == c and module.groups == 1) or (
            isinstance(module, nn.Linear) and module.in_features == c
        ):
            modules[name] = module
    call = observe(model, example, [place, *modules])[place]
    if len(call.taken_by) != 1 or call.used_in != {call.taken_by[0]} or call.followed - {*AVERAGE, *SHAPE}:
        return None
    reader = modules[call.taken_by[0]]
    return reader if _is_exact(model, gap, reader, example) else None


def _pads_zeros(reader: nn.Module) -> bool:
    """Whether a constant added to the input would not reach the border."""
    if not isinstance(reader, _CONVS):
        return False
    return reader.padding_mode == "zeros" and reader.padding != "valid" and any(map(bool, reader.padding))


def _is_exact(model: nn.Module, gap: Affine, reader: _Reader, example: object) -> bool:
    """Whether any map can go into the layer that reads it: tried with a random one, which is taken out again."""
    kept = [(tensor, tensor.detach().clone()) for tensor in (*gap.parameters(), *reader.parameters())]
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        with torch.no_grad():
            for tensor in (gap.weight, gap.bias):
                noise = torch.randn(tensor.shape, generator=generator, device="cpu", dtype=torch.float64)
                tensor.copy_(noise / len(gap.bias) ** 0.5)
            if reader.bias is None or _pads_zeros(reader):
                gap.bias.zero_()
        before = run_example(model, example)
        _absorb(gap, reader)
        return agree(run_example(model, example), before, rtol=1e-3)
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


@torch.no_grad()
def _absorb(gap: Affine, reader: _Reader) -> None:
    """Multiply a map into the layer that reads it, and set it to nothing."""
    weight = reader.weight.double()
    whole = gap.weight.double() + torch.eye(len(gap.bias), dtype=torch.float64, device=weight.device)
    if reader.bias is not None:
        reader.bias += torch.einsum("oi...,i->o", weight, gap.bias.double()).to(reader.bias.dtype)
    reader.weight.copy_(torch.einsum("oi...,ij->oj...", weight, whole))
    gap.weight.zero_()
    gap.bias.zero_()
