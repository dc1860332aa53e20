"""The machine and the versions that a table was made with."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

PACKAGES = ("torch", "numpy", "scipy", "numba", "networkx", "scikit-learn", "faiss-cpu", "gudhi", "pytorch-cka")
_NOTED = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by instructions of its own."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def describe() -> list[str]:
    """One line each on processor, memory, Python and packages."""
    info = Path("/proc/cpuinfo")
    fields = dict(
        (part.strip() for part in text.split(":", 1))
        for text in (info.read_text().splitlines() if info.is_file() else [])
        if ":" in text
    )
    features = [name for name in _NOTED if name in fields.get("flags", "").split()]
    model = fields.get("model name") or platform.processor() or platform.machine()
    return [
        f"{model}, {os.cpu_count()} cores, {', '.join(features) or 'no features known'}; "
        f"bfloat16 instructions: {'yes' if fast_bfloat16() else 'no'}; {psutil.virtual_memory().total / 1e9:.0f} GB",
        f"{platform.system()}, Python {platform.python_version()}, {torch.get_num_threads()} threads",
        ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(absent)"
