"""Transformation complexity of a network: its gates' entropy by layer, accumulated and remaining."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repgraph.activations import capture
from repgraph.activations.batches import model_device
from repgraph.activations.forward import Forward
from repgraph.activations.gates import GATES, gate_choice, unpack
from repgraph.activations.layers import unwrap
from repgraph.labels import Labels
from repgraph.metrics.complexity.entropy import (
    Estimator,
    Width,
    check_options,
    checked_labels,
    cross_entropy,
    entropy_of,
    pairs_of,
)

_SATURATED = 0.97


def gating_states(
    model: nn.Module,
    inputs: object,
    layers: str | Sequence[str] | None = None,
    *,
    forward: Forward | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Gates of every ReLU-like call of a model over a data set: which units are above their kink.

    Parameters
    ----------
    model
        Any nn.Module; it runs in eval mode and comes out as it went in.
    inputs
        Data as in `capture`.
    layers
        Names or wildcards of gates, as this function names them; all by default.
    forward, batch_size, progress
        As in `capture`.

    Returns
    -------
    dict of str to Tensor
        Name -> bool (N, D_l), in execution order: True where the pre-activation is above the kink (0; a zero counts
        as False). Channels and positions of a convolution are gates each. A call inside a ReLU-like module of
        torch has the module's name ("name#1" for its second call), a call of a function "name#relu0", "name#relu1",
        ..., after the module that makes it ("#relu0" in the model itself). Hardtanh and ReLU6 have two kinks: the
        gates of the upper one follow as "name/upper".

    Raises
    ------
    ValueError
        If there is no such gate; else as `capture`.

    Notes
    -----
    One byte per gate. ``capture(model, inputs, "gates")`` keeps them packed, eight to a byte, within a memory budget.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> {name: gates.shape for name, gates in gating_states(net, torch.ones(5, 3)).items()}
    {'1': torch.Size([5, 4])}
    """
    found = capture(
        model, inputs, gate_choice(layers), forward=forward, batch_size=batch_size, memory=2**62, progress=progress
    )
    return {name.removeprefix(GATES): unpack(found[name], found.specs[name].gates or 0) for name in found}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ComplexityReport:
    """Transformation complexity of a network over N samples, in bits."""

    layers: pd.DataFrame
    """Indexed by gated layer, in execution order. gates (D), constant (share of gates that never change), entropy
    (H of the layer), plugin (entropy of distinct rows), cross_entropy (C, sum of single gates' entropies),
    total_correlation (C - plugin), cumulative (H of the layers so far), cumulative_plugin, remaining (H of this and
    all later layers); with labels also label_information, cumulative_label_information and
    remaining_label_information."""
    rates: dict[str, Tensor]
    """Layer -> activation rate of each gate, (D,), float64."""
    total: float
    """H of all gates."""
    label_information: float
    """I(X; Sigma; Y) of all gates; nan without labels."""
    ceiling: float
    """log2 N, which no entropy exceeds."""
    label_ceiling: float
    """H(Y), which no label information exceeds; nan without labels."""
    n: int
    gates: int
    lam: float
    estimator: Estimator
    width: Width
    warnings: tuple[str, ...]
    """What makes the numbers say little: saturation at the ceiling."""

    def __repr__(self) -> str:
        return "\n".join([self._head(), self.layers.round(3).to_string(), *self.warnings])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{note}</p>" for note in self.warnings)
        return f"<p>{self._head()}</p>{self.layers.round(3).to_html()}{notes}"

    def _head(self) -> str:
        told = "" if math.isnan(self.label_information) else f", {self._share('label_information', 'label_ceiling')}"
        return f"ComplexityReport: {self.gates} gates, {self.n} samples; {self._share('total', 'ceiling')}{told}"

    def _share(self, value: str, ceiling: str) -> str:
        return f"{value.replace('_', ' ')} {getattr(self, value):.3f} of {getattr(self, ceiling):.3f} bits"


def transformation_complexity(
    model: nn.Module,
    inputs: object,
    labels: Labels | None = None,
    *,
    layers: str | Sequence[str] | None = None,
    lam: float = 0.01,
    estimator: Estimator = "kde",
    width: Width = "total",
    forward: Forward | None = None,
    memory: int | str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> ComplexityReport:
    """Transformation complexity of a network: by gated layer, of the layers so far, of those to come, and in all.

    Parameters
    ----------
    model, inputs, forward, memory, batch_size
        As in `capture`; draw the samples balanced over the classes (the authors take 200 of each).
    labels
        Class of each sample; by default those that come with the inputs.
    layers
        As in `gating_states`.
    lam, estimator, width
        As in `gate_entropy`.
    progress
        Show progress bars.

    Returns
    -------
    ComplexityReport
        Table by layer, totals and ceilings.

    Raises
    ------
    ValueError
        If the model calls no ReLU-like function; as `gate_entropy`, `gate_label_information` and `capture`.

    Warns
    -----
    UserWarning
        If an entropy is above 97 % of log2 N: then it tells the number of samples, not the network.

    Notes
    -----
    The plug-in entropy grows with every layer; the kernel's need not, since its width grows with the number of gates.
    One layer's entropy need not grow with depth. Squared distances add up over the layers, so that each layer is read
    once. Memory: packed gates within `memory`, and N^2 numbers for each layer (2 bytes where it has fewer than 32,768
    gates, else 4).

    References
    ----------
    As for `gate_entropy`.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = transformation_complexity(net, torch.randn(64, 3), torch.arange(64) % 2)
    >>> report.ceiling, report.label_ceiling, report.total <= report.ceiling
    (6.0, 1.0, True)
    """
    check_options(lam, estimator, width)
    activations = capture(
        model, inputs, gate_choice(layers), labels=labels, forward=forward, memory=memory, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    n = activations.n
    if n < 2:
        raise ValueError(f"inputs must hold at least 2 samples, got {n}")
    device = model_device(unwrap(model)) or torch.device("cpu")
    codes = None if activations.labels is None else checked_labels(activations.labels, n).to(device)
    rows: dict[str, dict[str, float]] = {}
    rates: dict[str, Tensor] = {}
    kept: list[tuple[Tensor, int]] = []  # distances of each layer, and the gates in the kernel's width

    def entropies(name: str, squares: Tensor, gates: int) -> dict[str, float]:
        found = {name: entropy_of(squares, gates, lam, estimator)}
        if codes is not None:
            told = "label_information" if name == "entropy" else f"{name}_label_information"
            found[told] = found[name] - entropy_of(squares, gates, lam, estimator, codes)
        return found

    so_far, width_so_far = torch.zeros((n, n), device=device, dtype=torch.float64), 0
    for key in tqdm(activations, desc="complexity", unit="layer", disable=not progress, delay=1, leave=False):
        gates = activations.specs[key].gates
        assert gates is not None
        pairs = pairs_of(activations[key].to(device), gates)
        counted = gates if width == "total" else pairs.active
        kept.append((pairs.squares.to(torch.int16 if gates < 2**15 else torch.int32), counted))
        so_far += pairs.squares
        width_so_far += counted
        name = key.removeprefix(GATES)
        rates[name] = pairs.rates
        plugin, single = pairs.entropy(lam, "plugin", width), cross_entropy(pairs.rates)
        rows[name] = {
            "gates": gates,
            "constant": 1 - pairs.active / gates,
            **entropies("entropy", pairs.squares, counted),
            "plugin": plugin,
            "cross_entropy": single,
            "total_correlation": single - plugin,
            **entropies("cumulative", so_far, width_so_far),
            "cumulative_plugin": entropy_of(so_far, 1, lam, "plugin"),
        }
    for row, (squares, counted) in zip(rows.values(), kept, strict=True):
        row |= entropies("remaining", so_far, width_so_far)
        so_far -= squares
        width_so_far -= counted
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer").astype({"gates": int})
    last = table.iloc[-1]
    ceiling = math.log2(n)
    notes = _saturation(table, ceiling)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    table.attrs = {
        **{str(key): value for key, value in activations.settings.items() if key != "layers"},
        "n": n, "lam": lam, "estimator": estimator, "width": width,
        "ceiling": ceiling, "label_ceiling": label_entropy(codes),
    }  # fmt: skip
    return ComplexityReport(
        layers=table,
        rates=rates,
        total=float(last["cumulative"]),
        label_information=float(last.get("cumulative_label_information", math.nan)),
        ceiling=ceiling,
        label_ceiling=label_entropy(codes),
        n=n,
        gates=int(table["gates"].sum()),
        lam=lam,
        estimator=estimator,
        width=width,
        warnings=notes,
    )


def label_entropy(codes: Tensor | None) -> float:
    """H(Y) in bits; nan without labels."""
    if codes is None:
        return math.nan
    share = torch.bincount(codes).double() / len(codes)
    return float(torch.special.entr(share).sum() / math.log(2))


def _saturation(table: pd.DataFrame, ceiling: float) -> tuple[str, ...]:
    notes = []
    for column, what in (("entropy", "entropy of the layer"), ("cumulative", "entropy of the layers so far")):
        full = [str(name) for name in table.index if table[column][name] > _SATURATED * ceiling]
        if full:
            some = f"{', '.join(full[:4])}{f' and {len(full) - 4} more' if len(full) > 4 else ''}"
            notes.append(
                f"{what} above {_SATURATED:.0%} of its ceiling log2 N = {ceiling:.2f} bits at {some}: it tells the "
                "number of samples rather than the network; take more samples or a larger lam"
            )
    return tuple(notes)
