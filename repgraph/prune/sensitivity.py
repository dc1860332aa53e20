"""Which layers can afford to lose filters: damage one at a time, see what it costs, and share out a budget."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations.forward import untouched
from repgraph.activations.layers import Select, unwrap
from repgraph.scores.weight_norm import Layer, layers_with_filters, num_filters
from repgraph.surgery.channels import output_channels

Damage = Callable[[nn.Module, torch.Generator], object]
"""The user's own damage to a layer: ``damage(module, generator)`` changes its parameters in place."""

_SLACK = 1e-9  # as in every floor of a ratio


def layer_sensitivity(
    model: nn.Module,
    layers: Select,
    evaluate: Callable[[nn.Module], float],
    *,
    example: object = None,
    damage: Literal["drop", "noise"] | Damage = "drop",
    strength: float = 0.5,
    repeats: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Accuracy lost when one layer alone is damaged at random: evaluate(model) - evaluate(damaged model), high = keep.

    Damages: "drop" zeroes floor(strength C + 1e-9) of the layer's C filters, drawn at random, behind the batch norm
    (its weight and bias), or the filters' own weights and biases where no batch norm takes the layer's output alone.
    "noise" adds strength std(W) Z to the weights W, Z standard normal, std over all of W.

    Parameters
    ----------
    model
        Evaluated in eval mode; weights, buffers and modes come out as they were, bit for bit, also after an exception.
    layers
        Convolutions and linear layers, as `capture` chooses them.
    evaluate
        ``evaluate(model) -> float``: accuracy, or any other number, high = good (for a loss, minus the loss), on data
        of your choice, not those that the result is judged on. It is called once and then for each layer and repeat.
    example
        One batch, to see which batch norm follows which layer: needed by "drop".
    damage
        "drop", "noise", or ``damage(module, generator)``, which changes the layer's own parameters in place and draws
        from the generator, a `torch.Generator` on the CPU.
    strength
        In (0, 1) for "drop", positive for "noise"; not used by your own damage.
    repeats
        Random damages for each layer.
    seed
        At least 0. What is drawn depends on it, the layer's name and the repeat only. No global random state is read.
    progress
        Show a progress bar.

    Returns
    -------
    DataFrame
        Layer x repeat, in units of evaluate; negative where the damage helped. A layer's sensitivity is the mean over
        the repeats, ``table.mean(axis=1)``. `attrs`: "base" (of the whole model), "filters" (layer -> C, to read "drop"
        by: half of a wide layer is another damage than half of a narrow one), "damage", "strength", "seed".

    Raises
    ------
    ValueError
        If a layer has no filters, "drop" has no example, drops no filter of a layer or finds a norm without weight,
        strength or repeats is out of range, the weights are computed (parametrizations), evaluate gives no finite
        number.

    Notes
    -----
    On n images a mean below sqrt(2 a (1 - a) / n), a the accuracy, is noise: 0.006 for n = 540, a = 0.99.

    References
    ----------
    Lu et al., "SBPF: Sensitiveness Based Pruning Framework", arXiv 2208.04588. A reconstruction: the abstract says
    "extra damage", neither which nor how strong; it claims that the order of the layers is there early in training.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> x, y = digits()
    >>> accuracy = lambda model: (model(x[:200]).argmax(1) == y[:200]).double().mean().item()
    >>> layers = ["layer1.0.conv1", "layer3.3.conv1"]
    >>> table = layer_sensitivity(digits_resnet(), layers, accuracy, example=x[:2], repeats=3, progress=False)
    >>> table.mean(axis=1).idxmax(), table.shape
    ('layer1.0.conv1', (2, 3))
    """
    model = unwrap(model)
    chosen = layers_with_filters(model, layers)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats!r}")
    harm = _damages(model, chosen, example, damage, strength)
    losses: dict[str, list[float]] = {}
    with untouched(model):
        base = _evaluated(evaluate, model, "the whole model")
    for name in tqdm(chosen, desc="sensitivity", unit="layer", disable=not progress, delay=1, leave=False):
        entropy = np.random.SeedSequence([seed, *name.encode()]).generate_state(1, np.uint64)
        generator, (damaged, hurt) = torch.Generator("cpu").manual_seed(int(entropy[0])), harm[name]
        losses[name] = []
        for _ in range(repeats):
            with untouched(model), _restored(damaged):
                with torch.no_grad():
                    hurt(damaged, generator)
                losses[name].append(base - _evaluated(evaluate, model, f"damaged layer {name!r}"))
    table = pd.DataFrame(list(losses.values()), index=pd.Index(list(losses), name="layer"))
    table.attrs = {
        "base": base,
        "filters": {name: num_filters(module) for name, module in chosen.items()},
        "damage": damage if isinstance(damage, str) else getattr(damage, "__name__", type(damage).__name__),
        "strength": strength,
        "seed": seed,
    }
    return table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rates:
    """How much of each layer to remove."""

    rates: Tensor
    """Share of each layer's filters before rounding, (L,), float64."""
    remove: Tensor
    """Filters of each layer to remove, (L,), int64; they add up to the total."""


def rates_from_sensitivity(
    mean: Sequence[float] | np.ndarray | pd.Series | Tensor,
    sizes: Sequence[int] | np.ndarray | pd.Series | Tensor,
    total: int,
    *,
    rule: Literal["inverse", "threshold"] = "inverse",
    max_rate: float = 0.9,
) -> Rates:
    """Share out `total` filters over layers of N_l: p_l = min(max_rate, c a_l), with c such that sum_l N_l p_l = total.

    "inverse": a_l = 1 - s_l / sum_j s_j, s_l = max(mean_l, 0). "threshold": a_l = mean_l, the ratio that a layer
    tolerates. Then q_l = min(cap_l, floor(N_l p_l + 1e-9)) with cap_l = floor(max_rate N_l + 1e-9), less than N_l, or 0
    where a_l = 0; the filters still missing go one at a time to the layer with q_l < cap_l of the largest N_l p_l -
    q_l, of equal ones the first.

    Parameters
    ----------
    mean
        Of each layer (L,): the mean of `layer_sensitivity`, or the ratios of `tolerated_ratios`.
    sizes
        N_l >= 1, filters of each layer, or weights; layers whose channels are coupled are one entry.
    total
        How many of them to remove in all.
    rule
        "inverse" is nearly flat for many layers, whose shares s_l / sum_j s_j are all small; "threshold" is not.
    max_rate
        Largest share of a layer, in (0, 1).

    Returns
    -------
    Rates

    Raises
    ------
    ValueError
        If lengths differ, mean is not finite or negative for "threshold", a size is no positive integer, or total is
        negative or more than the sum of the caps.

    Warns
    -----
    UserWarning
        If no layer is sensitive ("inverse"): all get one rate.

    Notes
    -----
    A layer that alone is sensitive loses nothing; a layer alone loses all of total. For removal in several rounds,
    split total, and measure the sensitivity again after each fine-tune.

    References
    ----------
    Inverse: reconstructed from the abstract of arXiv 2208.04588, "proportional by the quantified sensitiveness".
    Threshold: the sensitivity pruner of NNI 2, r_l target sum w / sum r_l w_l with weight counts w_l. NNI shrinks all
    ratios together where one exceeds the cap and then removes less than its target; here the others make up for it.

    Examples
    --------
    >>> found = rates_from_sensitivity([0.30, 0.10, 0.02], [4, 8, 16], 14)
    >>> found.rates.numpy().round(4).tolist(), found.remove.tolist()
    ([0.178, 0.4746, 0.5932], [1, 4, 9])
    """
    s, n = np.asarray(mean, dtype=float), np.asarray(sizes, dtype=float)
    if s.ndim != 1 or s.shape != n.shape or not len(s):
        raise ValueError(f"mean and sizes must have one entry for each layer, got shapes {s.shape} and {n.shape}")
    if rule not in ("inverse", "threshold"):
        raise ValueError(f"rule must be 'inverse' or 'threshold', got {rule!r}")
    if not np.isfinite(s).all() or (rule == "threshold" and (s < 0).any()):
        raise ValueError(f"mean must be finite{', and at least 0' if rule == 'threshold' else ''}, got {s.tolist()}")
    if not ((n >= 1) & (n == n.round())).all():
        raise ValueError(f"sizes must be positive integers, got {n.tolist()}")
    if not 0 < max_rate < 1:
        raise ValueError(f"max_rate must be in (0, 1), got {max_rate!r}")
    a = s if rule == "threshold" else _inverse(s.clip(0))
    cap = np.where(a > 0, np.minimum(np.floor(max_rate * n + _SLACK), n - 1), 0)
    if isinstance(total, bool) or not isinstance(total, Integral) or not 0 <= total <= cap.sum():
        raise ValueError(f"total must be an integer from 0 to the {int(cap.sum())} that may go, got {total!r}")
    p = np.minimum(max_rate, _factor(a, n, total, max_rate) * a)
    q = np.minimum(cap, np.floor(n * p + _SLACK))
    while q.sum() < total:  # less than once for each layer
        q[np.where(q < cap, (n * p - q).round(9), -np.inf).argmax()] += 1
    return Rates(rates=torch.from_numpy(p), remove=torch.from_numpy(q.astype(np.int64)))


def tolerated_ratios(drops: pd.DataFrame, *, threshold: float = 0.05) -> pd.Series:
    """Largest tested ratio of each layer before the first that costs more than the threshold; 0 if the first does.

    Parameters
    ----------
    drops
        Layer x ratio, ratios rising: accuracy lost when that share of the layer alone is removed, as the mean of
        `layer_sensitivity` at that strength.
    threshold
        Accuracy that may be lost, at least 0.

    Returns
    -------
    Series
        Layer -> ratio, for `rates_from_sensitivity` with the rule "threshold".

    Raises
    ------
    ValueError
        If ratios do not rise within (0, 1), a loss is not finite, or the threshold is negative.

    References
    ----------
    NNI 2's sensitivity pruner documents this ratio, but its code takes the first that costs too much: 0.3 in place of
    0.2 below.

    Examples
    --------
    >>> tolerated_ratios(pd.DataFrame({0.1: [0.01], 0.2: [0.04], 0.3: [0.10]}, index=["conv"]))["conv"]
    np.float64(0.2)
    """
    ratios, lost = np.asarray(drops.columns, dtype=float), drops.to_numpy(float)
    if not len(ratios) or not ((np.diff(ratios, prepend=0) > 0) & (ratios < 1)).all():
        raise ValueError(f"columns of drops must be ratios that rise within (0, 1), got {list(drops.columns)}")
    if not np.isfinite(lost).all():
        raise ValueError("drops must be finite, got NaN or infinite values")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold!r}")
    passed = (lost <= threshold + _SLACK).cumprod(axis=1).sum(axis=1)
    return pd.Series(np.concatenate([[0.0], ratios])[passed], index=drops.index, name="tolerated_ratio")


def _damages(
    model: nn.Module, chosen: dict[str, Layer], example: object, damage: str | Damage, strength: float
) -> dict[str, tuple[nn.Module, Damage]]:
    """What is damaged for each layer, the layer or the batch norm behind it, and how."""
    if callable(damage):
        return {name: (module, damage) for name, module in chosen.items()}
    if damage not in ("drop", "noise"):
        raise ValueError(f"damage must be 'drop', 'noise' or a function, got {damage!r}")
    if not 0 < strength < (1 if damage == "drop" else math.inf):
        limits = "in (0, 1) for 'drop'" if damage == "drop" else "positive for 'noise'"
        raise ValueError(f"strength must be {limits}, got {strength!r}")
    targets: dict[str, nn.Module] = {**chosen}
    if damage == "drop":
        if example is None:
            raise ValueError("example must be one batch for damage='drop', to find the batch norms, got None")
        behind = output_channels(model, example, [*chosen])
        targets = {name: model.get_submodule(behind[name].norm or name) for name in chosen}
    for name, module in targets.items():
        if not isinstance(module._parameters.get("weight"), Tensor):
            raise ValueError(f"layer {name!r} cannot be damaged: {type(module).__name__} has no weight of its own")
        if damage == "drop" and int(strength * num_filters(chosen[name]) + _SLACK) < 1:
            count = num_filters(chosen[name])
            raise ValueError(f"strength {strength!r} drops none of the {count} filters of layer {name!r}")
    if damage == "noise":
        return {name: (module, partial(_noise, strength=strength)) for name, module in targets.items()}
    counts = {name: num_filters(module) for name, module in chosen.items()}
    return {name: (m, partial(_drop, c=counts[name], strength=strength)) for name, m in targets.items()}


def _drop(module: nn.Module, generator: torch.Generator, *, c: int, strength: float) -> None:
    """Zero filters of a layer, or channels of a batch norm."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    gone = torch.randperm(c, generator=generator)[: int(strength * c + _SLACK)].to(weight.device)
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        each = c // module.groups
        weight.view(module.groups, -1, *weight.shape[1:])[gone // each, :, gone % each] = 0
    else:
        weight[gone] = 0
    if isinstance(bias, Tensor):
        bias[gone] = 0


def _noise(module: nn.Module, generator: torch.Generator, *, strength: float) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    z = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device="cpu")
    weight.add_(strength * weight.std(correction=0) * z.to(weight.device))


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Afterwards parameters are the objects and hold the values that they did, also after an exception."""
    kept = [(part, dict(part._parameters)) for part in module.modules()]
    data = [(p, p.data, p.data.clone()) for _, own in kept for p in own.values() if p is not None]
    try:
        yield
    finally:
        for part, own in kept:
            part._parameters.clear()
            part._parameters.update(own)
        for parameter, storage, value in data:
            parameter.data = storage.copy_(value)


def _evaluated(evaluate: Callable[[nn.Module], float], model: nn.Module, what: str) -> float:
    value = float(evaluate(model))
    if not math.isfinite(value):
        raise ValueError(f"evaluate must give a finite number, got {value} for {what}")
    return value


def _inverse(s: np.ndarray) -> np.ndarray:
    """Share of all sensitivity that lies in the other layers."""
    if len(s) == 1:
        return np.ones(1)
    if s.sum() == 0:
        warnings.warn("no layer is sensitive: all layers get one rate", stacklevel=3)
        return np.ones(len(s))
    elsewhere: np.ndarray = 1 - s / s.sum()
    return elsewhere


def _factor(a: np.ndarray, n: np.ndarray, total: int, max_rate: float) -> float:
    """The c with sum_l n_l min(max_rate, c a_l) = total: that sum is linear between the c at which layers are full."""
    full = np.unique(max_rate / a[a > 0])
    removed = np.minimum(max_rate, full[:, None] * a) @ n
    return float(np.interp(total, [0, *removed], [0, *full]))
