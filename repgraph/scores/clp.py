"""CLP: how strongly a channel can react, from weights alone, and the outliers that a backdoor may use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from repgraph.activations.forward import first_tensor, run_example
from repgraph.activations.layers import Select, unwrap
from repgraph.scores.weight_norm import Layer, filter_rows, layers_with_filters, num_filters
from repgraph.surgery.channels import output_channels

_CONV = nn.modules.conv._ConvNd
_NORM = nn.modules.batchnorm._BatchNorm


def channel_lipschitz(
    model: nn.Module, pairs: Mapping[str, str] | None = None, *, example: object = None, eps: float | None = None
) -> dict[str, Tensor]:
    r"""Sensitivity of every channel of a convolution with its batch norm, in [0, inf); a very large one is suspect.

    sigma_k = \|gamma_k\| / sqrt(v_k + eps) \|M_k\|, with gamma the scale and v the running variance of the batch norm,
    M_k the filter's weights as a matrix (inputs, kernel positions), \|M_k\| its largest singular value.

    Parameters
    ----------
    model
        Only its parameters and running variances count.
    pairs
        Batch norm name -> name of the layer that feeds it: added to the traced pairs, in place of those of one name.
    example
        One batch, as `capture` reads it, on which the pairs are traced. Without it `pairs` are all there is.
    eps
        Added to v; by default each batch norm's own.

    Returns
    -------
    dict of str to Tensor
        Batch norm name -> sigma (C,), output per input, float64 on the CPU. High = remove: as a score see `clp_scores`.

    Raises
    ------
    ValueError
        If nothing is paired, a pair is of other modules or of different channels, a weight is not finite, or v + eps is
        not above 0.

    Notes
    -----
    No upper bound of the filter's gain L on whole images: sigma <= \|W_k\|_F <= L <= sqrt(kernel size) sigma, where W_k
    has the factor of the batch norm (strided transposed convolutions excepted). What all channels of a layer have in
    common moves no outlier. Filters of a group have its inputs only: of a depthwise one M_k is a row.

    References
    ----------
    Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, arXiv 2208.03111. The authors'
    code leaves out eps and pairs a BatchNorm2d with the Conv2d registered before it; here convolutions of all kinds are
    traced, and `pairs` may name linear layers (1 x 1).

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(2, 1, (1, 2)), nn.BatchNorm2d(1, eps=0))
    >>> model[0].weight.data, model[1].weight.data = torch.tensor([[[[3.0, 0]], [[0, 4]]]]), torch.tensor([-2.0])
    >>> channel_lipschitz(model, {"1": "0"})
    {'1': tensor([8.], dtype=torch.float64)}
    """
    model = unwrap(model)
    if example is None and pairs is None:
        raise ValueError("example must be one batch, to trace which layer feeds which batch norm; or pass pairs")
    traced = {} if example is None else {norm: layer for layer, norm in _traced(model, example, None).items()}
    chosen = traced | dict(pairs or {})
    if not chosen:
        raise ValueError("model must have a convolution that a batch norm follows, found none: pass pairs")
    return {norm: _sigma(model, norm, layer, eps) for norm, layer in chosen.items()}


def clp_scores(model: nn.Module, example: object, layers: Select | None = None) -> dict[str, Tensor]:
    """`channel_lipschitz` as a score of filters: -sigma in (-inf, 0], high = keep, since CLP removes the largest sigma.

    No criterion of compression: dead filters (gamma = 0) score highest.

    Parameters
    ----------
    model, example
        As in `channel_lipschitz`.
    layers
        Convolutions and linear layers, as `capture` chooses them; by default all convolutions with a batch norm.

    Returns
    -------
    dict of str to Tensor
        Layer -> (C,), float64 on the CPU.

    Raises
    ------
    ValueError
        If no batch norm follows one of the layers asked for, and as `channel_lipschitz`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> torch.equal(clp_scores(model, torch.rand(2, 1, 8, 8))["0"], -channel_lipschitz(model, {"1": "0"})["1"])
    True
    """
    model = unwrap(model)
    return {layer: -_sigma(model, norm, layer, None) for layer, norm in _traced(model, example, layers).items()}


def outlier_channels(scores: Mapping[str, Tensor], u: float = 3.0) -> dict[str, Tensor]:
    """Channels more than u standard deviations above the mean of their layer: sigma_k > mean + u s, s with C - 1.

    Parameters
    ----------
    scores
        From `channel_lipschitz`: name -> (C,).
    u
        At least 0. 3, the paper's, never fires for C <= 10, as no z-score exceeds (C - 1) / sqrt(C); lower values may
        cost most of the accuracy: show a sweep.

    Returns
    -------
    dict of str to Tensor
        Name -> channels in rising order, int64; none where all are equal or C = 1.

    Raises
    ------
    ValueError
        If u is negative or NaN, or the scores of a layer are not a finite vector.

    Examples
    --------
    >>> outlier_channels({"bn": torch.tensor([1.0] * 11 + [10.0])})
    {'bn': tensor([11])}
    """
    if not u >= 0:
        raise ValueError(f"u must be at least 0, got {u!r}")
    found = {}
    for name, score in scores.items():
        if score.ndim != 1 or not len(score) or not bool(score.isfinite().all()):
            raise ValueError(f"scores of {name!r} must be a finite vector (C,), got {score}")
        gap = score.double() - score.min()  # exactly 0 where all are equal
        found[name] = (gap > gap.mean() + u * gap.std(correction=min(1, len(gap) - 1))).nonzero()[:, 0]
    return found


class ZeroedChannels(AbstractContextManager["ZeroedChannels"]):
    """What `zero_channels` did: `undo()`, or the end of a with statement, puts the old values back, once."""

    def __init__(self, kept: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._kept = kept

    @torch.no_grad()
    def undo(self) -> None:
        """Put the old values back; other channels stay as they are by now."""
        while self._kept:
            parameter, rows, values = self._kept.pop()
            parameter[rows] = values

    def __exit__(self, *_: object) -> None:
        self.undo()


@torch.no_grad()
def zero_channels(model: nn.Module, channels: Mapping[str, Tensor | Sequence[int]]) -> ZeroedChannels:
    """Set weight and bias of batch norm channels to 0, in place, so that 0 leaves them for every input.

    In a residual block this silences the branch, not the skip path.

    Parameters
    ----------
    model
        Changed, until undone.
    channels
        Batch norm name -> channels, as from `outlier_channels`.

    Returns
    -------
    ZeroedChannels
        Its `undo()` restores the model, and so does the end of ``with zero_channels(...):``.

    Raises
    ------
    ValueError
        If a name is not that of a batch norm with weight and bias, or a channel is no integer in 0..C-1; nothing has
        changed then.

    Examples
    --------
    >>> bn = nn.BatchNorm2d(3)
    >>> with zero_channels(nn.Sequential(bn), {"0": [2]}):
    ...     bn.weight.tolist()
    [1.0, 1.0, 0.0]
    >>> bn.weight.tolist()
    [1.0, 1.0, 1.0]
    """
    modules = dict(unwrap(model).named_modules())
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, channel in channels.items():
        norm, rows = modules.get(name), torch.as_tensor(channel)
        if not isinstance(norm, _NORM) or not norm.affine:
            raise ValueError(f"channels: {name!r} must be a batch norm with weight and bias, is {type(norm).__name__}")
        whole = not (rows.is_floating_point() or rows.dtype == torch.bool) or not rows.numel()
        if not whole or not bool(((rows >= 0) & (rows < norm.num_features)).all()):
            raise ValueError(f"channels of {name!r} must be integers in 0..{norm.num_features - 1}, got {channel}")
        kept += [(p, rows.long(), p[rows.long()].clone()) for p in (norm.weight, norm.bias)]
    for parameter, rows, _ in kept:
        parameter[rows] = 0
    return ZeroedChannels(kept)


def attack_success_rate(
    model: nn.Module, x_triggered: Tensor, y_true: Tensor, target: int, *, batch_size: int = 256
) -> float:
    """Share of triggered samples of other classes that the model takes for the target class, in [0, 1].

    Parameters
    ----------
    model
        Gives class scores (n, classes); runs in eval mode and comes out as it went in.
    x_triggered, y_true
        Inputs (n, ...) that carry the trigger, and their right classes (n,). Samples of the target class do not count.
    target
        The class that the attacker wants.
    batch_size
        Samples per forward pass.

    Raises
    ------
    ValueError
        If the lengths differ, no sample is of another class than the target, or the class scores are not finite.

    Examples
    --------
    >>> attack_success_rate(nn.Identity(), torch.eye(3), torch.tensor([0, 2, 0]), 2)
    0.5
    """
    if y_true.shape != x_triggered.shape[:1]:
        raise ValueError(f"y_true must have shape ({len(x_triggered)},) as x_triggered, got {tuple(y_true.shape)}")
    others = (y_true != target).to(x_triggered.device)
    if not bool(others.any()):
        raise ValueError(f"y_true must have samples of other classes than the target {target}, got none")
    x = x_triggered[others]
    parts = [run_example(model, x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
    scores = torch.cat([first_tensor(part, "model") for part in parts])
    if scores.ndim != 2 or not bool(scores.isfinite().all()):
        raise ValueError(f"model must give finite class scores (n, classes), got {scores}")
    return float((scores.argmax(1) == target).double().mean())


def _traced(model: nn.Module, example: object, layers: Select | None) -> dict[str, str]:
    """Layer -> the batch norm that follows it.

    Raises
    ------
    ValueError
        If none follows a layer that was asked for, or one follows several layers.
    """
    names = None if layers is None else [*layers_with_filters(model, layers)]
    found = {layer: channels.norm for layer, channels in output_channels(model, example, names).items()}
    pairs = {layer: norm for layer, norm in found.items() if norm is not None}
    if names is None:
        pairs = {layer: norm for layer, norm in pairs.items() if isinstance(model.get_submodule(layer), _CONV)}
    elif bare := found.keys() - pairs.keys():
        raise ValueError(f"layers must have a batch norm of their own behind them, got {sorted(bare)} without")
    if len(set(pairs.values())) < len(pairs):
        raise ValueError(f"a batch norm must follow one layer only, got {pairs}")
    return pairs


def _sigma(model: nn.Module, norm: str, layer: str, eps: float | None) -> Tensor:
    modules = dict(model.named_modules())
    conv, bn = modules.get(layer), modules.get(norm)
    if not isinstance(conv, Layer):
        raise ValueError(f"pairs: {layer!r} must be a convolution or linear layer, is {type(conv).__name__}")
    if not isinstance(bn, _NORM) or bn.running_var is None:
        raise ValueError(f"pairs: {norm!r} must be a batch norm with running statistics, is {type(bn).__name__}")
    if bn.num_features != num_filters(conv):
        raise ValueError(f"{norm!r} must have {num_filters(conv)} channels as {layer!r}, has {bn.num_features}")
    rows = filter_rows(conv).double()
    factor = (bn.running_var.double() + (bn.eps if eps is None else eps)).rsqrt()
    if bn.affine:
        factor = factor * bn.weight.detach().double().abs()
    if not bool(rows.isfinite().all() & factor.isfinite().all()):
        raise ValueError(f"{layer!r} and {norm!r} must have finite weights and a variance + eps above 0")
    kernel = math.prod(conv.kernel_size) if isinstance(conv, _CONV) else 1
    matrices = rows.view(len(rows), -1, kernel)
    return torch.as_tensor(factor * torch.linalg.matrix_norm(matrices, 2), device="cpu")
