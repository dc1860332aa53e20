"""Entropy of the gates of a layer over a data set, what of it tells the label, and how entangled the gates are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from repgraph.activations.gates import unpack
from repgraph.labels import Labels, class_codes
from repgraph.metrics.similarity.gram import add_gram_, mirror_
from repgraph.precision import full_precision

Estimator = Literal["kde", "kde_lower", "plugin"]
Width = Literal["total", "active"]

_CHUNK = 32 * 2**20  # bytes of unpacked gates held at once
_ROWS = 256  # rows of kernel values held at once


def gate_entropy(
    S: Tensor | np.ndarray, *, lam: float = 0.01, estimator: Estimator = "kde", width: Width = "total"
) -> float:
    r"""Transformation complexity H(Sigma): entropy of the gate vector over N samples, in bits, 0 = one linear map.

    "kde": H = -(1/N) sum_i log2[(1/N) sum_j exp(-\|S_i - S_j\|^2 / (2 lam D))], D the number of gates. For hard gates
    the squared distance is the number of gates that differ. "kde_lower": the same with 4 lam, the Bhattacharyya lower
    bound that belongs to the upper bound "kde". "plugin": entropy of the distinct rows.
    0 <= kde_lower <= kde <= plugin <= log2 N.

    Parameters
    ----------
    S
        Gates, shape (N, D), N >= 2: bool, 0 and 1, or soft gates in [0, 1].
    lam
        Kernel width as a share of D, > 0. The authors use 0.01 where all gated layers are fully connected and 0.04 as
        soon as one is convolutional. Towards 0 it gives the plug-in entropy, towards infinity 0.
    estimator
        "kde", "kde_lower" or "plugin".
    width
        "total": D counts all gates. "active": only those that are not the same for all samples; constant gates
        widen the kernel otherwise (200 random codes of 40 gates: 7.64 bits; with 400 constant gates added 3.13).

    Returns
    -------
    float
        Bits, in [0, log2 N].

    Raises
    ------
    ValueError
        If S is not (N, D) with N >= 2, D >= 1 and values in [0, 1], lam is not positive, or an option is unknown.

    Notes
    -----
    Compare at equal N, lam and similar D only; where all rows are far apart the value is log2 N whatever the network.
    Time N^2 D / 2 multiply-adds on the device of S, memory N^2 numbers, a block of rows in float64 and at
    most 32 MiB of gates in float32. Unchanged by the order of gates and samples, by flipping a gate, and by repeating
    all gates.

    References
    ----------
    Ren, Li, Zhou, Chan, Zhang, "Towards Theoretical Analysis of Transformation Complexity of ReLU DNNs", ICML 2022,
    arXiv 2205.01940, with the estimator of Kolchinsky and Tracey (2017). Its code calls the value `local_IXT`.

    Examples
    --------
    >>> gate_entropy(torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]]))
    1.0
    """
    rows = _checked(S, lam, estimator, width)
    pairs = pairs_of(rows)
    return pairs.entropy(lam, estimator, width)


def gate_label_information(
    S: Tensor | np.ndarray,
    y: Labels,
    *,
    lam: float = 0.01,
    estimator: Estimator = "kde",
    width: Width = "total",
) -> float:
    """Complexity used for inference I(X; Sigma; Y) = H(Sigma) - sum_c (N_c / N) H(Sigma | Y = c), in bits.

    For a deterministic network it is I(Sigma; Y), in [0, H(Y)]. All entropies use the same lam and D.

    Parameters
    ----------
    S, lam, estimator, width
        As in `gate_entropy`.
    y
        Class of each sample, (N,); every class has at least 2 samples.

    Returns
    -------
    float
        Bits.

    Raises
    ------
    ValueError
        As `gate_entropy`, or if the labels do not fit or a class has one sample only.

    References
    ----------
    As for `gate_entropy`; its code calls the value `local_ITY`.

    Examples
    --------
    >>> gate_label_information(torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]]), [0, 0, 1, 1])
    1.0
    """
    rows = _checked(S, lam, estimator, width)
    codes = checked_labels(y, len(rows)).to(rows.device)
    pairs = pairs_of(rows)
    return pairs.entropy(lam, estimator, width) - pairs.entropy(lam, estimator, width, codes)


def activation_cross_entropy(S: Tensor | np.ndarray) -> float:
    """Sum of the entropies of single gates, C = sum_d h2(a_d), in bits; a_d is the activation rate of gate d.

    h2(a) = -a log2 a - (1 - a) log2(1 - a). For every distribution, H(Sigma) + TC(Sigma) = C.

    Parameters
    ----------
    S
        Gates as in `gate_entropy`.

    Returns
    -------
    float
        Bits, in [0, D].

    Raises
    ------
    ValueError
        If S is not (N, D) with N >= 2, D >= 1 and values in [0, 1].

    References
    ----------
    As for `gate_entropy`. The sum in its code takes -log2 a_d only, which is another quantity.

    Examples
    --------
    >>> round(activation_cross_entropy(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]])), 6)
    1.811278
    """
    rows = _checked(S, 1.0, "kde", "total")
    return cross_entropy(rows.double().mean(0))


def total_correlation(
    S: Tensor | np.ndarray,
    *,
    lam: float = 0.01,
    seed: int = 0,
    draws: int = 8,
    estimator: Literal["kde", "plugin"] = "kde",
) -> float:
    """Entanglement of the gates, TC(Sigma) = KL(p(sigma) || prod_d p(sigma_d)), in bits, 0 = independent.

    "kde": (1/N) sum_i log2[sum_j K(S_i, S_j) / sum_j K(S_i, S'_j)], K the kernel of `gate_entropy` and S' N rows of
    independent gates with the activation rates of S; the sum over S' is the mean over several draws of N rows.
    "plugin": C - H of the plug-in estimate.

    Parameters
    ----------
    S, lam
        As in `gate_entropy`.
    seed
        Of the independent rows.
    draws
        How often N independent rows are drawn; 1 is the paper's, and varies by half a bit from seed to seed where few
        of them come near a sample.
    estimator
        "kde" (the paper's) or "plugin".

    Returns
    -------
    float
        Bits.

    Raises
    ------
    ValueError
        As `gate_entropy`.

    Notes
    -----
    The paper calls the kernel's value an upper bound; the kernel smooths and the rows are random, so that it also falls
    below: for six copies of a fair coin (5 bits), N = 2000, it gives about 5 at lam 0.01 and 4 at 0.04.

    References
    ----------
    As for `gate_entropy`.

    Examples
    --------
    >>> S = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]])
    >>> round(total_correlation(S, estimator="plugin"), 6)
    0.311278
    """
    if estimator not in ("kde", "plugin"):
        raise ValueError(f"estimator must be 'kde' or 'plugin', got {estimator!r}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws!r}")
    rows = _checked(S, lam, "kde", "total")
    pairs = pairs_of(rows)
    if estimator == "plugin":
        return cross_entropy(pairs.rates) - pairs.entropy(lam, "plugin", "total")
    generator = torch.Generator("cpu").manual_seed(seed)
    others = []
    for _ in range(draws):
        fakes = torch.rand(rows.shape, generator=generator, device="cpu").to(rows.device) < pairs.rates
        others.append(_log_means(_squares_to(rows, fakes), lam * pairs.gates))
    mean = torch.logsumexp(torch.stack(others) * math.log(2), 0) / math.log(2) - math.log2(draws)
    return float((_log_means(pairs.squares, lam * pairs.gates) - mean).mean())


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """What all pairs of N samples have to do with each other in a set of gates; sets add up."""

    squares: Tensor
    """Squared distances, (N, N): for hard gates the number of gates that differ."""
    rates: Tensor
    """Activation rate of each gate, (D,), float64."""
    gates: int
    active: int
    """Gates that are not the same for all samples."""

    def entropy(self, lam: float, estimator: Estimator, width: Width, codes: Tensor | None = None) -> float:
        """H, or with class codes (N,) its mean over the classes, weighted by their size."""
        return entropy_of(self.squares, self.gates if width == "total" else self.active, lam, estimator, codes)


def entropy_of(squares: Tensor, gates: int, lam: float, estimator: Estimator, codes: Tensor | None = None) -> float:
    """Entropy in bits from the squared distances (N, N) of the samples in D gates; within classes with codes (N,)."""
    spread = {"kde": lam, "kde_lower": 4 * lam, "plugin": 0.0}[estimator] * gates
    return max(0.0, -float(_log_means(squares, spread, codes).mean()))


def _log_means(squares: Tensor, spread: float, codes: Tensor | None = None) -> Tensor:
    """log2 of the mean over j (of i's class) of exp(-d_ij / (2 spread)); spread 0 counts equal rows. (N,) float64."""
    found = []
    for i in range(0, len(squares), _ROWS):
        block = squares[i : i + _ROWS].double()
        nearest = block.amin(1, keepdim=True)  # 0 but for other samples' rows, from which the kernel may underflow
        values = ((nearest - block) / (2 * spread)).exp_() if spread else (block == 0).double()
        if codes is None:
            mean = values.mean(1)
        else:
            same = codes[i : i + _ROWS, None] == codes
            mean = (values * same).sum(1) / same.sum(1)
        found.append(mean.log2() - (nearest[:, 0] / (2 * spread * math.log(2)) if spread else 0))
    return torch.cat(found)


def pairs_of(S: Tensor, gates: int | None = None) -> Pairs:
    """Pairs of the rows of gates (N, D), or of packed bits (N, ceil(D / 8)) of so many gates."""
    squares, rates, changing = _compared(S, gates)
    if S.is_floating_point():  # distances of soft gates are rounded: rows are equal or not
        rows = torch.unique(S, dim=0, return_inverse=True)[1]
        least = torch.finfo(squares.dtype).tiny
        squares = torch.where(rows[:, None] == rows, 0, squares.clamp_min(least))
    return Pairs(squares, rates, len(rates), int(changing.sum()))


def _compared(S: Tensor, gates: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances (N, N), activation rates (D,), and which gates are not constant (D,)."""
    hard = gates is not None or not S.is_floating_point()
    dtype = torch.float32 if hard else torch.float64
    # float32 counts up to 2^24 are exact
    exact = dtype if (gates or S.shape[1]) < 2**24 else torch.float64
    products = torch.zeros((len(S), len(S)), dtype=exact, device=S.device)
    own = torch.zeros(len(S), dtype=torch.float64, device=S.device)
    rates, changing = [], []
    with full_precision(S.device):
        for chunk in _chunks(S, gates, dtype):
            if exact == dtype:
                add_gram_(products, chunk)
            else:
                part = torch.zeros_like(products, dtype=dtype)
                add_gram_(part, chunk)
                products += part
            own += (chunk if hard else chunk.square()).sum(1, dtype=torch.float64)
            rates.append(chunk.mean(0, dtype=torch.float64))
            changing.append((rates[-1] > 0) & (rates[-1] < 1) if hard else chunk.amax(0) > chunk.amin(0))
    mirror_(products)
    own = own.to(exact)
    squares = products.mul_(-2).add_(own).add_(own[:, None]).clamp_min_(0).fill_diagonal_(0)
    return squares, torch.cat(rates), torch.cat(changing)


def _chunks(S: Tensor, gates: int | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """The gates as numbers, a few columns at a time, in one piece of memory."""
    total = S.shape[1] if gates is None else gates
    step = min(total, max(8, _CHUNK // (dtype.itemsize * len(S)) // 8 * 8))
    workspace = torch.empty(len(S) * step, dtype=dtype, device=S.device)
    for f in range(0, total, step):
        width = min(step, total - f)
        part = S[:, f : f + width] if gates is None else unpack(S[:, f // 8 : (f + width + 7) // 8], width)
        yield workspace[: len(S) * width].view(len(S), width).copy_(part)


def _squares_to(S: Tensor, others: Tensor) -> Tensor:
    """Squared distances between the rows of two sets of gates."""
    dtype = torch.float64 if S.is_floating_point() else torch.float32
    total = torch.zeros((len(S), len(others)), dtype=torch.float64, device=S.device)
    with full_precision(S.device):
        for a, b in zip(_chunks(S, None, dtype), _chunks(others, None, dtype), strict=True):
            products = a @ b.T
            total += a.square().sum(1)[:, None] + b.square().sum(1) - 2 * products
    return total.clamp_min_(0)


def cross_entropy(rates: Tensor) -> float:
    """Sum of the entropies of gates with these activation rates, in bits."""
    return float((torch.special.entr(rates) + torch.special.entr(1 - rates)).sum() / math.log(2))


def checked_labels(y: Labels, n: int) -> Tensor:
    """Class codes (N,), refused where a class has one sample.

    Raises
    ------
    ValueError
        If the labels do not fit or a class has fewer than 2 samples.
    """
    codes, classes = class_codes(y, n)
    sizes = torch.bincount(codes, minlength=len(classes))
    if int(sizes.min()) < 2:
        raise ValueError(f"labels: class {classes[int(sizes.argmin())]!r} must have at least 2 samples, got 1")
    return codes


def check_options(lam: float, estimator: str, width: str) -> None:
    """Refuse what the estimators do not know.

    Raises
    ------
    ValueError
        If lam is not positive, or estimator or width is unknown.
    """
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam!r}")
    if estimator not in ("kde", "kde_lower", "plugin"):
        raise ValueError(f"estimator must be 'kde', 'kde_lower' or 'plugin', got {estimator!r}")
    if width not in ("total", "active"):
        raise ValueError(f"width must be 'total' or 'active', got {width!r}")


def _checked(S: Tensor | np.ndarray, lam: float, estimator: str, width: str) -> Tensor:
    check_options(lam, estimator, width)
    x = torch.as_tensor(S).detach()
    if x.ndim != 2:
        raise ValueError(f"S must have shape (N, D), got {tuple(x.shape)}")
    if len(x) < 2 or x.shape[1] < 1:
        raise ValueError(f"S must have at least 2 samples and 1 gate, got shape {tuple(x.shape)}")
    if x.dtype == torch.bool:
        return x
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"S must have values in [0, 1], got {float(low):.4g} to {float(high):.4g}")
    return x
