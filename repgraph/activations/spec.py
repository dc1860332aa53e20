"""Shape and type of what is kept of a layer, without the layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape of one sample's entry in a layer, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gates: int | None = None
    """Number of gates, where the entry is gates packed eight to a byte."""

    @property
    def text(self) -> str:
        """The shape as people read it."""
        if self.gates is not None:
            return f"{self.gates} gates"
        return " x ".join(map(str, self.shape)) or "scalar"

    @property
    def nbytes(self) -> int:
        """Bytes per sample."""
        return math.prod(self.shape) * self.dtype.itemsize


def readable(nbytes: float) -> str:
    """A number of bytes as people read it: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
