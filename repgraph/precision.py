"""Products as exact as their types allow, whatever a user has set for speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, TF32 or bfloat16 in place of float32 inside: they would break the bounds on errors."""
    matmuls = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    matmuls = [matmul for matmul in matmuls if hasattr(matmul, "fp32_precision")]
    before = [matmul.fp32_precision for matmul in matmuls]  # type: ignore[union-attr]
    legacy = None if matmuls else torch.get_float32_matmul_precision()
    try:
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"  # type: ignore[union-attr]
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for matmul, value in zip(matmuls, before, strict=True):
            matmul.fp32_precision = value  # type: ignore[union-attr]
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
