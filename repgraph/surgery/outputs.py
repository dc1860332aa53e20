"""Whether two models gave the same: every tensor of their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor


def agree(found: object, expected: object, *, rtol: float = 1e-5) -> bool:
    """Whether all tensors agree to a relative `rtol`, and NaN and infinite entries stand in the same places.

    Compared are tensors in tuples, lists, dicts and dataclasses of the same make; a list whose length differs (one
    state for each layer) and other objects (a cache) are not. A tenth of `rtol` is relative to the
    median size of the entries of a row that are not 0.
    """
    pairs = list(_pairs(found, expected))
    return bool(pairs) and all(_alike(a, b, rtol) for a, b in pairs)


def _pairs(a: object, b: object) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield a, b
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in a:
            if key in b:
                yield from _pairs(a[key], b[key])
    elif isinstance(a, tuple | list) and isinstance(b, tuple | list):
        if len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                yield from _pairs(x, y)
    elif is_dataclass(a) and is_dataclass(b):
        for item in fields(a):
            yield from _pairs(getattr(a, item.name), getattr(b, item.name, None))


def _alike(a: Tensor, b: Tensor, rtol: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if (
        not torch.equal(a[~finite].nan_to_num(nan=0.5), b[~finite].nan_to_num(nan=0.5))
        or not a[finite].isfinite().all()
    ):
        return False
    rows = b.masked_fill(~finite | (b == 0), torch.nan).reshape(-1, b.shape[-1] if b.ndim else 1)
    scale = rows.abs().nanmedian(1, keepdim=True).values.nan_to_num(0).expand(rows.shape).reshape(b.shape)
    close = (a - b).abs() <= rtol * b.abs() + rtol / 10 * scale
    return bool(close[finite].all())
