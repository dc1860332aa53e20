"""Feature shift (FSM): how far the next layer's mean response moves when a filter goes, from weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repgraph.activations.layers import unwrap
from repgraph.scores.central_filter import input_columns
from repgraph.surgery.channels import OutputChannels, output_channels
from repgraph.surgery.coupling import channel_groups

Consumer = tuple[nn.Module, int | Tensor]


def relu_gaussian_mean(beta: Tensor, gamma: Tensor) -> Tensor:
    r"""Mean of relu(x) for x normal with mean beta and standard deviation \|gamma\|, >= 0, in the unit of beta.

    E = beta Phi(beta / g) + g phi(beta / g) with g = \|gamma\|, Phi and phi the standard normal cdf and pdf;
    max(0, beta) where g = 0. Of the shape and device of beta and gamma, float64.

    Raises
    ------
    ValueError
        If beta and gamma differ in shape.

    References
    ----------
    Duan et al., "Network Pruning via Feature Shift Minimization", ACCV 2022, arXiv 2207.02632. The authors integrate
    numerically, and take 1e-5 for gamma < 0, where this takes \|gamma\| (a normal is symmetric).

    Examples
    --------
    >>> relu_gaussian_mean(torch.tensor([0.0, 1.0, -0.3]), torch.tensor([1.0, -1.0, 0.0]))
    tensor([0.3989, 1.0833, 0.0000], dtype=torch.float64)
    """
    beta, gamma = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (beta, gamma))
    if beta.shape != gamma.shape:
        raise ValueError(f"beta and gamma must have one shape, got {tuple(beta.shape)} and {tuple(gamma.shape)}")
    g = gamma.abs()
    z = beta / g
    pdf = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    mean = (beta * torch.special.ndtr(z) + g * pdf).clamp_min(0)
    return torch.where(g > 0, mean, beta.clamp_min(0))


def feature_shift_scores(
    bn: nn.Module,
    consumers: Sequence[Consumer],
    *,
    reduce: Literal["mean", "max"] = "mean",
    activation: Literal["relu", "relu6"] = "relu",
) -> Tensor:
    r"""Expected change of the next layer's outputs when each filter vanishes, >= 0; high = keep. Needs no data.

    score_i = mean over outputs o of \|S_oi E_i\|, with S_oi the sum of the weights from channel i to o over the kernel,
    and E_i = E[relu(N(beta_i, gamma_i^2))] the mean of the channel by its batch norm's parameters.

    Parameters
    ----------
    bn
        Batch norm behind the layer to score, C channels, affine.
    consumers
        (module, offset) of each Linear or convolution that reads the channels: offset is the channel of its input at
        which they start, or the input columns of each channel, int64, (C, r), as for a Linear behind a flatten.
        Several: the plain mean of their scores. None: score_i = E_i.
    reduce
        "max" takes the largest over the outputs.
    activation
        What follows bn. For "relu6", E = E[relu(N(beta, .))] - E[relu(N(beta - 6, .))] (ours).

    Returns
    -------
    Tensor
        Shape (C,), float64, on the device of bn.

    Raises
    ------
    ValueError
        If bn is no batch norm or not affine, a consumer is of another kind, grouped but not depthwise, or without such
        columns, or the activation is another.

    Notes
    -----
    In a depthwise consumer a channel reaches its own outputs only, and the mean is over these. Padding and pooling
    between the layers are ignored. Linear in the consumer's weights, whose scale its batch norm cancels: do not compare
    layers without normalisation.

    References
    ----------
    Duan et al., arXiv 2207.02632, by their code, which sets negative gammas of the model itself to 1e-5 (here nothing
    changes) and sums over the two consumers of a ResNet-50 stage.

    Examples
    --------
    >>> bn, conv = nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)
    >>> conv.weight.data = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    >>> feature_shift_scores(bn, [(conv, 0)])
    tensor([0.3989, 0.7979], dtype=torch.float64)
    """
    if not isinstance(bn, _BatchNorm) or not bn.affine:
        kind = f"{type(bn).__name__} without parameters" if isinstance(bn, _BatchNorm) else type(bn).__name__
        raise ValueError(f"bn must be a batch norm with weight and bias, got {kind}")
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce must be 'mean' or 'max', got {reduce!r}")
    if activation not in ("relu", "relu6"):
        raise ValueError(f"activation must be 'relu' or 'relu6', got {activation!r}")
    expected = relu_gaussian_mean(bn.bias, bn.weight)
    if activation == "relu6":
        expected = (expected - relu_gaussian_mean(bn.bias - 6, bn.weight)).clamp_min(0)
    if not consumers:
        return expected
    reach = [_reach(module, where, len(expected)).to(expected).abs() for module, where in consumers]
    return expected * torch.stack([r.mean(1) if reduce == "mean" else r.amax(1) for r in reach]).mean(0)


def fsm_scores(model: nn.Module, example: object, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """`feature_shift_scores` of the layers to which it applies; high = keep.

    These are the layers with a batch norm and ReLU or ReLU6 behind them whose channels nothing else shares (no writer
    of a residual stream, no depthwise convolution, no second norm): inner convolutions, as the authors cut them.

    Parameters
    ----------
    model, example
        As in `repgraph.surgery.coupling.channel_groups`, which finds what reads the channels.
    layers
        Names of layers; by default all to which the score applies.

    Returns
    -------
    dict of str to Tensor
        Layer -> (C,), float64, on the CPU.

    Raises
    ------
    ValueError
        If the score does not apply to a named layer.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> {name: tuple(score.shape) for name, score in fsm_scores(model, torch.zeros(1, 1, 8, 8)).items()}
    {'0': (4,)}
    """
    model = unwrap(model)
    found = {}
    places = output_channels(model, example)
    for name, where in shift_readers(model, example, places).items():
        consumers = [(model.get_submodule(reader), columns) for reader, columns in where.items()]
        kind: Literal["relu", "relu6"] = "relu" if places[name].activation == "relu" else "relu6"
        norm = model.get_submodule(places[name].norm or "")
        found[name] = feature_shift_scores(norm, consumers, activation=kind).cpu()
    if missing := [name for name in layers or () if name not in found]:
        raise ValueError(
            f"feature shift does not apply to {missing[0]!r}: it needs a batch norm and ReLU of its own, and readers "
            "without groups"
        )
    return {name: score for name, score in found.items() if layers is None or name in layers}


def shift_readers(
    model: nn.Module, example: object, places: Mapping[str, OutputChannels]
) -> dict[str, dict[str, Tensor]]:
    """What reads the channels of each layer to which feature shift applies: layer -> reader -> its columns (C, r)."""
    found = {}
    for group in channel_groups(model, example):
        name = group.layers[0]
        place = places.get(name)
        out = {other for other, side in group.places if side == "out"}
        if place is None or place.activation not in ("relu", "hardtanh") or out != {name, place.norm} or group.blocked:
            continue
        if place.activation == "hardtanh" and float(place.activate(torch.tensor(9.0))) != 6:
            continue
        readers = group.readers(name)
        if readers and all(getattr(model.get_submodule(reader), "groups", 1) == 1 for reader in readers):
            found[name] = readers
    return found


def shift_batchnorm_(
    bn_next: nn.Module,
    consumer: nn.Module | Consumer,
    expected: Tensor,
    keep: Sequence[int] | Tensor,
    *,
    mode: Literal["additive", "ratio"] = "additive",
    var_scale: float | None = None,
) -> dict[str, Tensor]:
    r"""Move the running mean of the next batch norm to where removing filters moves its input, in place.

    With P_o = sum of S_oi E_i over all channels and Q_o over the kept ones: "additive" mean_o - (P_o - Q_o); "ratio"
    mean_o Q_o / P_o where P_o and mean_o have one sign, else unchanged.

    Parameters
    ----------
    bn_next
        Batch norm behind the consumer, with running statistics.
    consumer
        The Linear or convolution that reads the channels, or (module, offset) as for `feature_shift_scores`.
    expected
        E of `relu_gaussian_mean` for the channels, (C,).
    keep
        Channels that stay: indices, or C bools.
    mode
        "ratio" is the authors' formula, which explodes where P is near 0, and is off by a bias of the consumer: part of
        the mean, not of P. "additive" is ours.
    var_scale
        Factor > 0 of the running variance ("ratio": where the mean moves). None leaves it. The authors take 1 - p, p
        the share of channels removed, as if channels were equal and independent.

    Returns
    -------
    dict of str to Tensor
        The statistics before: ``bn_next.load_state_dict(old, strict=False)`` takes the change back.

    Raises
    ------
    ValueError
        If bn_next has no running statistics or another width, the consumer is of another kind, grouped, or without such
        columns, keep has no such channels, mode is unknown or var_scale not positive.

    Notes
    -----
    The consumer has its weights from before the cut. Where data are at hand, statistics estimated anew are better.

    References
    ----------
    Duan et al., arXiv 2207.02632, who keep the change only if the accuracy on test data does not fall.

    Examples
    --------
    >>> conv, bn = nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1)
    >>> conv.weight.data = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    >>> old = shift_batchnorm_(bn, conv, torch.tensor([0.5, 1.0]), keep=[0])
    >>> bn.running_mean, old["running_mean"]
    (tensor([2.]), tensor([0.]))
    """
    module, where = consumer if isinstance(consumer, tuple) else (consumer, 0)
    if not isinstance(bn_next, _BatchNorm) or bn_next.running_mean is None or bn_next.running_var is None:
        raise ValueError(f"bn_next must be a batch norm with running statistics, got {type(bn_next).__name__}")
    if mode not in ("additive", "ratio"):
        raise ValueError(f"mode must be 'additive' or 'ratio', got {mode!r}")
    if var_scale is not None and not var_scale > 0:
        raise ValueError(f"var_scale must be positive, got {var_scale!r}")
    if getattr(module, "groups", 1) != 1:
        raise ValueError(f"consumer must have no groups, got {module.groups}")
    reach = _reach(module, where, len(expected))
    if reach.shape[1] != bn_next.num_features:
        raise ValueError(f"bn_next must have {reach.shape[1]} channels as the consumer, got {bn_next.num_features}")
    shift = reach * expected.detach().to(reach)[:, None]
    mean, var = bn_next.running_mean, bn_next.running_var
    old = {"running_mean": mean.clone(), "running_var": var.clone()}
    total = shift.sum(0).to(mean.device)
    lost = shift[~_mask(keep, len(expected)).to(shift.device)].sum(0).to(mean.device)
    before = mean.double()
    moves = total * before > 0 if mode == "ratio" else torch.ones_like(mean, dtype=torch.bool)
    after = before * (total - lost) / total if mode == "ratio" else before - lost
    mean.copy_(torch.where(moves, after, before))
    if var_scale is not None:
        var.copy_(torch.where(moves, var * var_scale, var))
    return old


def _reach(module: nn.Module, where: int | Tensor, channels: int) -> Tensor:
    """Weights from each channel to the outputs that it reaches, summed over the kernel, (channels, outputs)."""
    columns = input_columns(module, where, channels)
    weight = module.get_parameter("weight").detach().double()
    columns = columns.to(weight.device)
    summed = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return summed.T[columns].sum(1)
    if groups != module.in_channels:
        raise ValueError(f"consumers may have 1 group or one per channel, got {module}")
    return summed.view(groups, -1)[columns].flatten(1)


def _mask(keep: Sequence[int] | Tensor, channels: int) -> Tensor:
    index, every = torch.as_tensor(keep).detach().cpu(), torch.arange(channels)
    if index.dtype == torch.bool and index.shape == (channels,):
        return index
    if index.dtype == torch.bool or index.ndim != 1 or not torch.isin(index, every).all():
        raise ValueError(f"keep must hold channels of 0..{channels - 1} or {channels} bools, got {keep}")
    return torch.isin(every, index)
