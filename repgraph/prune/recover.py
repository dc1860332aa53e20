"""What a cut needs and training does not give: batch norm's statistics anew, and a linear map over the gap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from repgraph.activations import capture
from repgraph.activations.batches import Source, model_device, model_dtype, read_batches, to_device
from repgraph.activations.forward import first_tensor, kept_random_state, run_example
from repgraph.activations.layers import unwrap
from repgraph.activations.reduce import channel_axis_of
from repgraph.cost import model_cost
from repgraph.prune.calls import AVERAGE, SHAPE, Call, observe
from repgraph.prune.layers import drop_layers, dropped_calls
from repgraph.prune.pruned import Pruned, new_name
from repgraph.prune.stand_ins import Affine

_ROWS = 2**15  # positions in float64 at a time
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Reader = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@kept_random_state()
def reestimate_batch_norm_(
    model: nn.Module, data: object, *, samples: int | None = None, batch_size: int = 128, progress: bool = True
) -> nn.Module:
    """Compute the running mean and variance of all batch norms anew, in place: a cut changes what reaches them.

    The model runs in training mode without gradients; each batch norm takes the plain mean of its batches' statistics
    (`torch.optim.swa_utils.update_bn`). Weights are untouched, modes are restored.

    Parameters
    ----------
    model
        With or without batch norm; without, nothing happens.
    data
        As in `capture`, inputs that are tensors. A few hundred samples will do; the last, smaller batch counts as much
        as the others.
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
        If the inputs are no tensors, or there are fewer than 2 samples in a batch.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> pruned = drop_layers(digits_resnet(), ["layer2.1"], digits()[0][:2])
    >>> _ = reestimate_batch_norm_(pruned.model, digits("train"), progress=False)
    """
    model = unwrap(model)
    source = Source(data, batch_size, samples)
    device, dtype = model_device(model), model_dtype(model)

    def batches() -> Iterator[object]:
        for batch in tqdm(source, desc="batch norm", unit="batch", disable=not progress, delay=1, leave=False):
            if not isinstance(batch.inputs, Tensor):
                raise ValueError(f"data must give inputs that are tensors, got {type(batch.inputs).__name__}")
            if batch.size < 2:
                raise ValueError(f"every batch must hold at least 2 samples, got {batch.size}: drop the last one")
            yield to_device(batch.inputs, device, dtype, copy=True)

    modes = {module: module.training for module in model.modules()}
    try:
        update_bn(batches(), model)
    finally:
        for module, mode in modes.items():
            module.training = mode
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
    memory: int | str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Pruned:
    r"""Close every cut by the linear map of the channels that comes nearest to what was dropped, in closed form.

    A run of dropped layers took x to y in the whole model. Its place takes x + W x + b, the same map at every position
    or token, with W, b = argmin sum \|y - x - W x - b\|^2 + lambda \|W\|^2 over all samples and positions, lambda =
    ridge times the mean squared channel of x; b is not penalised. x is taken in the smaller model, whose earlier cuts
    are repaired already, y in the whole one. Of a part that only adds to a residual stream, y is what it added and the
    map W x + b of its own input. For ridge -> infinity nothing but a shift is left.

    Parameters
    ----------
    model
        The whole model; untouched.
    pruned
        What `drop_layers` made of it; untouched.
    data
        As in `capture`, not those that the result is judged on. Labels are not used.
    samples
        How many samples to take, or their positions, as in `capture`.
    ridge
        At least 0.
    absorb
        Where the map's result goes into one convolution or linear layer and nothing else, directly or through a mean
        over all positions, multiply it into that layer instead: exactly the same function, at no cost. A convolution
        that pads with zeros takes W alone, fitted without b.
    channel_axis
        Of maps whose channels cannot be told, as in `capture`.
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
    if not pruned.plan.layers:
        raise ValueError("pruned has lost no layers: there is nothing to repair")
    if not ridge >= 0:
        raise ValueError(f"ridge must be at least 0, got {ridge!r}")
    if isinstance(data, Iterator):
        data = read_batches(data, samples if isinstance(samples, int) else None)[0]
    example = next(iter(Source(data, batch_size, 2))).inputs
    calls = dropped_calls(model, pruned.plan.layers, example)
    axes = {}
    for name in _ends_of_runs(calls):
        result = calls[name].result
        assert result is not None
        axes[name] = channel_axis_of(result, model.get_submodule(name), name, channel_axis) if result.ndim > 2 else 1
    smaller = _with_maps(model, pruned, axes, example)
    take = partial(capture, data=data, samples=samples, memory=memory, batch_size=batch_size, progress=progress)
    targets = take(model, layers=list(axes))
    absorbed: dict[str, str] = {}
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
        if reader is not None and _absorbed(smaller.model, gap, reader, example):
            absorbed[name] = next(key for key, module in smaller.model.named_modules() if module is reader)
    settings = {**pruned.plan.settings, "repair": {"samples": len(targets[name]), "ridge": ridge, "absorbed": absorbed}}
    left = {name: axis for name, axis in axes.items() if name not in absorbed}
    done = _with_maps(model, smaller, left, example)
    return replace(done, plan=replace(done.plan, settings=settings), after=model_cost(done.model, example))


def _ends_of_runs(calls: Mapping[str, Call]) -> list[str]:
    """The last layer of each run of dropped layers that follow one another, in order."""
    ends: list[str] = []
    for name, call in calls.items():
        if call.passed is None:  # fed another one that went
            continue
        if ends and not call.branch and not calls[ends[-1]].branch and call.before == calls[ends[-1]].after:
            ends.pop()
        ends.append(name)
    return ends


def _with_maps(model: nn.Module, pruned: Pruned, axes: Mapping[str, int], example: object) -> Pruned:
    """The same smaller model with maps at these places, and no others."""
    found = drop_layers(model, replace(pruned.plan, repairs=dict(axes), renamed={}), example)
    places = {new_name(key, pruned.plan.renamed): new_name(key, found.plan.renamed) for key in model.state_dict()}
    for name in axes:
        if name in pruned.plan.repairs:
            before, after = new_name(name, pruned.plan.renamed), new_name(name, found.plan.renamed)
            places |= {f"{before}.{part}": f"{after}.{part}" for part in ("weight", "bias")}
    state = found.model.state_dict()
    with torch.no_grad():
        for key, value in pruned.model.state_dict().items():
            if places.get(key) in state:
                state[places[key]].copy_(value)
    return found


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
    products = ("convolution", "addmm", "mm", "linear", "bmm")
    seen_through = call.followed - {*AVERAGE, *SHAPE}
    if len(call.taken_by) != 1 or len(call.uses) != 1 or call.uses[0] not in products or seen_through:
        return None
    return modules[call.taken_by[0]]


def _pads_zeros(reader: nn.Module) -> bool:
    """Whether a constant added to the input would not reach the border."""
    if not isinstance(reader, _CONVS):
        return False
    return reader.padding_mode == "zeros" and reader.padding != "valid" and any(map(bool, reader.padding))


def _absorbed(model: nn.Module, gap: Affine, reader: _Reader, example: object) -> bool:
    """Multiply a map into the layer that reads it and set it to nothing, if that leaves the model's result the same."""
    before = first_tensor(run_example(model, example), "of the model")
    kept = [(tensor, tensor.detach().clone()) for tensor in (*gap.parameters(), *reader.parameters())]
    with torch.no_grad():
        weight = reader.weight.double()
        bias, whole = gap.bias.double(), gap.weight.double() + torch.eye(len(gap.bias), device=weight.device)
        if reader.bias is not None:
            reader.bias += torch.einsum("oi...,i->o", weight, bias).to(reader.bias.dtype)
        reader.weight.copy_(torch.einsum("oi...,ij->oj...", weight, whole))
        gap.weight.zero_()
        gap.bias.zero_()
    after = first_tensor(run_example(model, example), "of the model")
    if torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max())):
        return True
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)
    return False
