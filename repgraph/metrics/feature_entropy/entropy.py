"""How consistently a unit lays out its activations over the images of a class (feature entropy)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from repgraph.activations import Activations
from repgraph.labels import Labels, class_codes
from repgraph.metrics.feature_entropy.births import Preset, feature_birth, limits

Rare = Literal["one_minus", "max", "printed", "nan"]

_FEW = 20  # samples of a class below which its entropy says little


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureEntropy:
    """Feature entropy of c units over n samples of one class."""

    entropy: Tensor
    """H of each unit, (c,), float64, in nats, within [0, ln n]."""
    birth_rate: Tensor
    """Share of the samples whose map has a birth, (c,), within [0, 1] (the paper's selective rate)."""
    ineffectiveness: Tensor
    """H / birth rate, (c,), 0 where there is no birth (the authors' early code)."""
    n: int
    """Number of samples."""


def feature_entropy(
    births: Tensor | np.ndarray | Sequence[int], *, min_rate: float = 0.1, rare: Rare = "one_minus"
) -> FeatureEntropy:
    """Feature entropy of units: the entropy of their births over the samples of one class, in nats, low = consistent.

    With h the births of a unit that exist, eps = len(h) / n and P(x) the share of h equal to x:
    H = -sum_x P(x) ln P(x), in [0, ln len(h)]. Where eps < min_rate, H is replaced, so that a silent unit does not look
    perfect.

    Parameters
    ----------
    births
        Births from `feature_birth` of the samples of ONE class, shape (n,) or (n, c); 0 = none. n >= 2.
    min_rate
        Least birth rate at which H counts, in [0, 1]; with 0 a silent unit has H = 0.
    rare
        What replaces H below it: "one_minus" (1 - eps) ln n; "max" ln n; "printed" eps ln n; "nan".

    Returns
    -------
    FeatureEntropy
        With entropy, birth_rate and ineffectiveness of shape (c,), c = 1 for births of shape (n,).

    Raises
    ------
    ValueError
        If births are not of shape (n,) or (n, c) with n >= 2, negative or not integers, or an option is out of range.

    References
    ----------
    Zhao, Zhang, "Quantitative Performance Assessment of CNN Units via Topological Entropy Calculation", ICLR 2022,
    arXiv 2103.09716. The paper prints eps ln n for rare births, which is small and contradicts its own sentence (assign
    the maximum) and its figure; "one_minus" is our reading. Its code's "selective rate" is the share without a birth.

    Examples
    --------
    >>> found = feature_entropy([3, 3, 5, 5, 0])
    >>> round(float(found.entropy), 7), float(found.birth_rate), round(float(found.ineffectiveness), 6)
    (0.6931472, 0.8, 0.866434)
    """
    x = torch.as_tensor(births).detach()
    if x.ndim not in (1, 2):
        raise ValueError(f"births must have shape (n,) or (n, c), got {tuple(x.shape)}")
    if len(x) < 2:
        raise ValueError(f"births must be of at least 2 samples, got {len(x)}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"births must be integers, as feature_birth gives them, got {x.dtype}")
    x = x.long()
    if bool((x < 0).any()):
        raise ValueError(f"births must be 0 (none) or more, as feature_birth gives them, got {int(x.min())}")
    _check_options(min_rate, rare)
    entropy, rate = _entropy(x.reshape(len(x), -1), min_rate, rare)
    ineffective = torch.where(rate > 0, entropy / rate, 0.0)
    return FeatureEntropy(entropy=entropy, birth_rate=rate, ineffectiveness=ineffective, n=len(x))


def _check_options(min_rate: float, rare: str) -> None:
    if not 0 <= min_rate <= 1:
        raise ValueError(f"min_rate must be in [0, 1], got {min_rate!r}")
    if rare not in ("one_minus", "max", "printed", "nan"):
        raise ValueError(f"rare must be 'one_minus', 'max', 'printed' or 'nan', got {rare!r}")


def _entropy(births: Tensor, min_rate: float, rare: Rare) -> tuple[Tensor, Tensor]:
    """H and birth rate of each column of births (n, c)."""
    n = len(births)
    exists = births > 0
    count = exists.sum(0).double()
    rate = count / n
    # H = ln k - (1/k) sum_i ln(number of births equal to the i-th): ranks in sorted order give the run lengths.
    ordered = births.T.contiguous().sort(1).values  # (c, n)
    run = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    equal = torch.where(ordered > 0, run.double(), 1.0)
    at_least = count.clamp_min(1)
    entropy = (at_least.log() - equal.log().sum(1) / at_least).clamp_min(0)
    whole = math.log(n)
    instead = {"one_minus": (1 - rate) * whole, "max": torch.full_like(rate, whole), "printed": rate * whole}
    return torch.where(rate < min_rate, instead.get(rare, torch.full_like(rate, torch.nan)), entropy), rate


@lru_cache(maxsize=256)
def feature_entropy_floor(
    m: int, n: int, *, max_rank: int | None = None, density: float = 0.8, units: int = 20, seed: int = 0
) -> float:
    """Mean feature entropy of pure noise: n maps of side m, independent Gaussian values after a ReLU, in nats.

    What a layer with maps of this size gives without any structure at all; it grows with m, so that part of a fall
    over depth is the size of the maps.

    Parameters
    ----------
    m, n
        Side of the maps, number of samples.
    max_rank, density
        As in `feature_birth`.
    units
        Units over which the mean is taken.
    seed
        Of the noise.

    Returns
    -------
    float
        In [0, ln n].

    Raises
    ------
    ValueError
        As `feature_birth` and `feature_entropy`.

    Examples
    --------
    >>> round(feature_entropy_floor(14, 100), 1)
    2.2
    """
    if units < 1:
        raise ValueError(f"units must be at least 1, got {units!r}")
    noise = np.random.default_rng(seed)
    births = [
        feature_birth(noise.standard_normal((n, m, m), np.float32).clip(0), max_rank=max_rank, density=density)
        for _ in range(units)
    ]
    return float(feature_entropy(torch.stack(births, 1)).entropy.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFeatureEntropy:
    """Feature entropy of every unit of every layer, for every class."""

    units: pd.DataFrame
    """Indexed by layer, class and unit; columns entropy, birth_rate, ineffectiveness."""
    layers: pd.DataFrame
    """Indexed by layer; means over units and classes beside the floor: entropy, birth_rate, floor (noise), ceiling (ln
    n), units, map_size, n (samples per class; floor and ceiling are means over the classes' sizes)."""

    def __repr__(self) -> str:
        return f"UnitFeatureEntropy: {len(self.units)} units x classes; by layer\n{self.layers.round(3).to_string()}"

    def _repr_html_(self) -> str:
        html: str = self.layers.round(3).to_html()
        return html


def unit_feature_entropy(
    activations: Mapping[str, Tensor],
    labels: Labels | None = None,
    *,
    classes: Sequence[object] | None = None,
    max_rank: int | None = None,
    density: float = 0.8,
    preset: Preset | None = None,
    min_rate: float = 0.1,
    rare: Rare = "one_minus",
    progress: bool = True,
) -> UnitFeatureEntropy:
    """Feature entropy per layer, class and unit, with the layers' means, noise floors and ceilings.

    Births are distributed within one class, never over a mix; a layer's value is the plain mean over units, then over
    classes.

    Parameters
    ----------
    activations
        Layer name -> maps (n, c, m, m) after the ReLU, m >= 4: `Activations`, or any mapping. Read one at a time.
    labels
        Class of each sample; by default those of the activations.
    classes
        Which classes; all by default.
    max_rank, density, preset
        As in `feature_birth`.
    min_rate, rare
        As in `feature_entropy`.
    progress
        Show a progress bar.

    Returns
    -------
    UnitFeatureEntropy
        `units` (layer x class x unit) and `layers`.

    Raises
    ------
    ValueError
        If there is no layer, or a layer's maps are not square, at least 4 x 4 and finite, or not one per label (the
        message names the layer); if labels are missing
        or do not fit, a class is not there or has one sample only; or an option is out of range.

    Warns
    -----
    UserWarning
        If a class has fewer than 20 samples, or a layer has negative values: captured before its ReLU.

    Notes
    -----
    Entropies compare at equal n only: H cannot exceed ln n. Where the map sizes differ, compare with the floor. Do not
    mix in flipped images: flips move births.

    Examples
    --------
    >>> maps = torch.rand(40, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    >>> found = unit_feature_entropy({"conv": maps}, torch.arange(40) % 2)
    >>> found.units.shape, found.layers["units"].tolist()
    ((6, 3), [3])
    """
    if labels is None:
        labels = getattr(activations, "labels", None)
        if labels is None:
            raise ValueError("labels are missing: births are distributed within one class; pass labels=")
    max_rank, density = limits(max_rank, density, preset)
    _check_options(min_rate, rare)
    if not len(activations):
        raise ValueError("activations must hold at least one layer, got none")
    codes, names, rows = _classes(activations, labels, classes)
    units: list[pd.DataFrame] = []
    layers: dict[str, dict[str, float]] = {}
    before: list[str] = []
    for layer in tqdm(activations, desc="feature entropy", unit="layer", disable=not progress, delay=1, leave=False):
        births, m, negative = layer_births(layer, activations[layer], max_rank, density)
        if len(births) != len(codes):
            raise ValueError(f"layer {layer!r} must have one map per label: expected {len(codes)}, got {len(births)}")
        if negative:
            before.append(layer)
        found = [feature_entropy(births[codes == code], min_rate=min_rate, rare=rare) for code in rows]
        index = pd.MultiIndex.from_product([[layer], names, range(births.shape[1])], names=["layer", "class", "unit"])
        columns = ("entropy", "birth_rate", "ineffectiveness")
        units.append(
            pd.DataFrame({c: torch.cat([getattr(one, c) for one in found]).numpy() for c in columns}, index=index)
        )
        by_class = units[-1].groupby(level="class")
        layers[layer] = {c: float(by_class[c].mean().mean()) for c in columns[:2]}
        sizes = [one.n for one in found]
        layers[layer] |= floor_and_ceiling(m, sizes, max_rank, density)
        layers[layer] |= {"units": births.shape[1], "map_size": m, "n": float(np.mean(sizes))}
    if before:
        warn_before_relu(before, stacklevel=3)
    table = pd.DataFrame.from_dict(layers, orient="index").rename_axis("layer").astype({"units": int, "map_size": int})
    return UnitFeatureEntropy(units=pd.concat(units), layers=table)


def layer_births(
    name: str, maps: Tensor, max_rank: int | None = None, density: float = 0.8
) -> tuple[Tensor, int, bool]:
    """Births (n, c) of a layer's maps, their side, and whether there are negative values; errors name the layer."""
    if maps.ndim != 4:
        raise ValueError(
            f"layer {name!r} must give maps (n, c, m, m), got shape {tuple(maps.shape)}: choose convolutional layers, "
            "captured without reduce="
        )
    try:
        births = feature_birth(maps, max_rank=max_rank, density=density)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    return births, maps.shape[-1], bool((maps < 0).any())


def floor_and_ceiling(
    m: int, sizes: Sequence[int], max_rank: int | None = None, density: float = 0.8
) -> dict[str, float]:
    """Noise floor and ln n, averaged over classes of these sizes; for the floor they are taken as equal."""
    floor = feature_entropy_floor(m, round(float(np.mean(sizes))), max_rank=max_rank, density=density)
    return {"floor": floor, "ceiling": float(np.log(sizes).mean())}


def warn_before_relu(layers: Sequence[str], *, stacklevel: int) -> None:
    """Tell that feature entropy is meant for maps after the ReLU."""
    warnings.warn(
        f"negative values in {', '.join(layers[:4])}{' ...' if len(layers) > 4 else ''}: feature entropy is meant for "
        "maps after the ReLU; capture the ReLU's output (or a block's)",
        stacklevel=stacklevel,
    )


def _classes(
    activations: Mapping[str, Tensor], labels: Labels, classes: Sequence[object] | None
) -> tuple[Tensor, list[object], list[int]]:
    """Class number of each sample, and names and numbers of the wanted classes."""
    n = activations.n if isinstance(activations, Activations) else len(next(iter(activations.values())))
    codes, names = class_codes(labels, n)
    wanted = list(names if classes is None else dict.fromkeys(classes))
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        raise ValueError(
            f"classes: no class {missing[0]!r}; the classes are {names}" if missing else "classes is empty"
        )
    sizes = torch.bincount(codes, minlength=len(names))
    rows = [names.index(name) for name in wanted]
    small = {name: int(sizes[row]) for name, row in zip(wanted, rows, strict=True) if sizes[row] < _FEW}
    alone = [name for name, size in small.items() if size < 2]
    if alone:
        raise ValueError(f"labels: class {alone[0]!r} must have at least 2 samples, got {small[alone[0]]}")
    if small:
        least = min(small, key=lambda name: small[name])
        warnings.warn(
            f"class {least!r} has {small[least]} samples, fewer than {_FEW}: its entropy cannot exceed ln n and says "
            "little",
            stacklevel=3,
        )
    return codes, wanted, rows
