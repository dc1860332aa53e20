"""Region codes: which cell of a network's partition each sample lies in, and when the partition has settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from repgraph.activations import capture
from repgraph.activations.forward import Forward
from repgraph.activations.gates import GATES, gate_choice, unpack


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RegionCodes:
    """Codes of N samples in D gates, layer after layer in execution order."""

    bits: Tensor
    """(N, D) uint8 of 0 and 1, or packed: each layer's gates eight to a byte, (N, sum_l ceil(D_l / 8)) uint8."""
    layers: dict[str, slice]
    """Gate layer -> its columns among the D gates."""
    packed: bool = False

    @property
    def gates(self) -> int:
        """Number of gates D."""
        return max((columns.stop for columns in self.layers.values()), default=0)

    @property
    def unpacked(self) -> Tensor:
        """The bits (N, D), uint8, whether packed or not."""
        return torch.cat([self.layer(name) for name in self.layers], 1) if self.packed else self.bits

    @property
    def n_unique(self) -> int:
        """Number of distinct codes: cells that hold a sample."""
        return len(np.unique(self.bits.cpu().numpy(), axis=0))

    def layer(self, name: str) -> Tensor:
        """The gates of one layer, (N, D_l) uint8.

        Raises
        ------
        KeyError
            If there is no such layer.
        """
        columns = self.layers[name]
        if not self.packed:
            return self.bits[:, columns]
        start = 0
        for other, own in self.layers.items():
            width = -(-(own.stop - own.start) // 8)
            if other == name:
                return unpack(self.bits[:, start : start + width], own.stop - own.start).to(torch.uint8)
            start += width
        raise KeyError(name)

    def subset(self, samples: Tensor) -> RegionCodes:
        """The codes of some samples, by position."""
        return RegionCodes(self.bits[samples], self.layers, self.packed)

    def __len__(self) -> int:
        return len(self.bits)

    def __repr__(self) -> str:
        kept = ", packed" if self.packed else ""
        return f"RegionCodes(n={len(self)}, gates={self.gates}, layers={len(self.layers)}, cells={self.n_unique}{kept})"


def region_codes(
    model: nn.Module,
    x: object,
    *,
    layers: str | Sequence[str] | None = None,
    packed: bool = False,
    forward: Forward | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> RegionCodes:
    """Region code of each sample: q(x) = concat_l 1[z_l(x) > 0], for every ReLU-like call of the model.

    Two samples with one code lie in one cell, on which the network is affine.

    Parameters
    ----------
    model
        In eval mode.
    x
        Samples, as `data` in `capture`.
    layers
        Names or wildcards of gates, as in `gating_states`; all by default.
    packed
        Keep eight gates to a byte.
    forward, batch_size, progress
        As in `capture`.

    Returns
    -------
    RegionCodes
        Bits, the layers' columns, and the number of distinct codes.

    Raises
    ------
    ValueError
        If the model is in train mode or has no gates; else as `capture`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU()).eval()
    >>> net[0].weight.data, net[0].bias.data = torch.ones(2, 1), torch.tensor([0.0, -1.0])
    >>> region_codes(net, torch.tensor([[-1.0], [0.5], [0.6], [2.0]]))
    RegionCodes(n=4, gates=2, layers=1, cells=3)
    """
    refuse_training(model)
    found = capture(
        model, x, gate_choice(layers), forward=forward, batch_size=batch_size, memory=2**62, progress=progress
    )
    columns: dict[str, slice] = {}
    parts, start = [], 0
    for key in found:
        gates = found.specs[key].gates or 0
        columns[key.removeprefix(GATES)] = slice(start, start + gates)
        parts.append(found[key] if packed else unpack(found[key], gates).to(torch.uint8))
        start += gates
    return RegionCodes(torch.cat(parts, 1), columns, packed)


def partition_distance(codes_a: RegionCodes | Tensor, codes_b: RegionCodes | Tensor) -> float:
    """Distance of two partitions on the same probe inputs: share of gates that differ, mean over layers.

    Per layer the mean over probes and gates of |q_a - q_b|, then the plain mean over layers.

    Parameters
    ----------
    codes_a, codes_b
        Codes of two networks, or of one at two epochs, for the same probes; or bits (N, D), taken as one layer.

    Returns
    -------
    float
        In [0, 1]: 0 = identical, 1 = complementary.

    Raises
    ------
    ValueError
        If they differ in samples, layers or gates.

    References
    ----------
    You et al., "Max-Affine Spline Insights Into Deep Network Pruning", TMLR 2022, arXiv 2101.02338. The mean over
    layers weighs small layers like large ones. Their code takes the outputs of all BatchNorm layers as gates; here
    gates are where the network really has a ReLU.

    Examples
    --------
    >>> partition_distance(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1]]))
    0.25
    """
    return float(partition_distance_by_layer(codes_a, codes_b).mean())


def partition_distance_by_layer(codes_a: RegionCodes | Tensor, codes_b: RegionCodes | Tensor) -> pd.Series:
    """The parts of `partition_distance`: share of gates that differ, one value for each layer.

    Parameters, errors and source as there.

    Examples
    --------
    >>> partition_distance_by_layer(torch.tensor([[0, 1]]), torch.tensor([[1, 1]])).tolist()
    [0.5]
    """
    a, b = _as_codes(codes_a), _as_codes(codes_b)
    if len(a) != len(b):
        raise ValueError(f"codes must be of the same samples: codes_a has {len(a)}, codes_b has {len(b)}")
    if a.layers != b.layers:
        odd = next((name for name in a.layers if a.layers[name] != b.layers.get(name)), None)
        where = f"; they differ first at {odd!r}" if odd is not None else ""
        raise ValueError(
            f"codes must have the same gates: codes_a has {a.gates} in {len(a.layers)} layers, codes_b {b.gates} in "
            f"{len(b.layers)}{where}"
        )
    differ = {name: float((a.layer(name) != b.layer(name)).double().mean()) for name in a.layers}
    return pd.Series(differ, name="partition_distance").rename_axis("layer")


class EarlyBird:
    """Tells during training when the partition has settled: the largest distance to the last epochs' is small.

    Parameters
    ----------
    threshold
        Distance below which the partition counts as settled.
    lookback
        Number of earlier epochs that are compared.
    distance
        Distance of two codes; `partition_distance` by default.

    Attributes
    ----------
    distances : list of float
        For every epoch so far the largest distance to the `lookback` epochs before it; nan while there are fewer.

    Raises
    ------
    ValueError
        If threshold or lookback is not positive.

    References
    ----------
    You et al., TMLR 2022: threshold 0.16 and three epochs are their code's. Each detector has its own history; their
    code shares one among all runs.

    Examples
    --------
    >>> bird = EarlyBird(lookback=2)
    >>> [bird.update(torch.tensor([[0, 1, 1, last]])) for last in (0, 1, 1, 1)]
    [False, False, False, True]
    """

    def __init__(
        self,
        threshold: float = 0.16,
        lookback: int = 3,
        distance: Callable[[RegionCodes | Tensor, RegionCodes | Tensor], float] = partition_distance,
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold!r}")
        if lookback < 1:
            raise ValueError(f"lookback must be at least 1, got {lookback!r}")
        self.threshold, self.lookback, self.distance = threshold, lookback, distance
        self.distances: list[float] = []
        self._before: deque[RegionCodes | Tensor] = deque(maxlen=lookback)

    def update(self, codes: RegionCodes | Tensor) -> bool:
        """Take the codes of one more epoch, on the same probes; True once the partition has settled."""
        distances = [self.distance(before, codes) for before in self._before]
        full = len(distances) == self.lookback
        self.distances.append(max(distances) if full else float("nan"))
        self._before.append(codes)
        return full and self.distances[-1] < self.threshold


def refuse_training(model: nn.Module) -> None:
    """Cells are those of the network in eval mode.

    Raises
    ------
    ValueError
        If the model or a module in it is in train mode.
    """
    if isinstance(model, nn.Module):
        found = next((name for name, module in model.named_modules() if module.training), None)
        if found is not None:
            where = f"its module {found!r} is" if found else "it is"
            raise ValueError(
                f"model must be in eval mode, {where} in train mode: batch statistics and dropout have no cells; call "
                "model.eval()"
            )


def _as_codes(codes: RegionCodes | Tensor) -> RegionCodes:
    if isinstance(codes, RegionCodes):
        return codes
    bits = torch.as_tensor(codes)
    if bits.ndim != 2:
        raise ValueError(f"codes must have shape (N, D), got {tuple(bits.shape)}")
    return RegionCodes(bits.to(torch.uint8), {"": slice(0, bits.shape[1])})
