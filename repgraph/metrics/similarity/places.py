"""Entries of sparse n x n matrices by place: i n + j, in rising order."""

from __future__ import annotations

import torch
from torch import Tensor


def located(places: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Index in `places` (m > 0, rising) of each wanted place, and whether it is there at all."""
    at = torch.searchsorted(places, wanted).clamp_max(len(places) - 1)
    return at, places[at] == wanted


def reordered(places: Tensor, order: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The places after the samples were put in another order (n,), rising, and which entry each of them holds."""
    new = torch.empty_like(order)
    new[order] = torch.arange(n, device=order.device)
    found: tuple[Tensor, Tensor] = torch.sort(new[places // n] * n + new[places % n])
    return found
