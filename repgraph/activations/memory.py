"""Layers within a memory budget: kept, or made again in several passes over the data when they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from threading import Lock

import psutil
import torch
from torch import Tensor, nn

from repgraph.activations.copies import Copies
from repgraph.activations.forward import kept_random_state
from repgraph.activations.hashes import digest_of
from repgraph.activations.recording import Recording
from repgraph.activations.spec import Spec, readable


class Passes(Mapping[str, Tensor]):
    """Layers made when they are read: one pass over the data for each group of layers that fits the memory."""

    def __init__(self, recording: Recording, groups: list[list[str]]) -> None:
        self.recording, self.groups = recording, groups
        self.held: dict[str, Tensor] = {}
        self.lock = Lock()
        self.state = fingerprint(recording.model) if len(groups) > 1 else ""

    @kept_random_state()
    def read(self, number: int) -> None:
        """Run the pass for one group; the group that was held is let go first."""
        recording, n = self.recording, self.recording.source.n
        self.held = {}
        if recording.passes and fingerprint(recording.model) != self.state:
            raise ValueError(
                "the model has changed since capture, and these layers are made when they are read: capture again, "
                "raise memory= to keep all layers, or pass folder="
            )
        held = {
            name: torch.empty((n, *recording.specs[name].shape), dtype=recording.specs[name].dtype, device="cpu")
            for name in self.groups[number]
        }
        filled = dict.fromkeys(held, 0)

        def keep(name: str, x: Tensor) -> None:
            held[name][filled[name] : filled[name] + len(x)] = x
            filled[name] += len(x)

        label = f"capture {number + 1}/{len(self.groups)}" if len(self.groups) > 1 else "capture"
        with Copies(keep) as copies:
            recording.run(self.groups[number], copies, label)
        self.held = held

    def __getitem__(self, name: str) -> Tensor:
        with self.lock:  # threads take turns
            if name not in self.held:
                self.read(next(i for i, group in enumerate(self.groups) if name in group))
            return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.groups)

    def __len__(self) -> int:
        return sum(map(len, self.groups))


def groups_within(specs: Mapping[str, Spec], n: int, budget: int) -> list[list[str]]:
    """Runs of consecutive layers that fit the budget, as few as possible.

    Each run takes all that fit, so by induction no cut into runs is ever farther after as many of them. Groups that
    are no runs may be fewer, but one group is held at a time and readers go through the layers in execution order: each
    change of group costs a pass, and what lies between two changes is a run.
    """
    largest = max(specs, key=lambda name: specs[name].nbytes)
    if n * specs[largest].nbytes > budget:
        raise ValueError(
            f"memory is {readable(budget)}, but layer {largest!r} alone needs {n * specs[largest].nbytes} bytes "
            f"({readable(n * specs[largest].nbytes)}) for {n} samples: raise memory= to that, or pass folder=, "
            "reduce= or fewer samples"
        )
    groups: list[list[str]] = [[]]
    room = budget
    for name, spec in specs.items():
        if n * spec.nbytes > room:
            groups.append([])
            room = budget
        groups[-1].append(name)
        room -= n * spec.nbytes
    return groups


def as_bytes(memory: int | str | None) -> int:
    """A memory budget in bytes; half of what is free by default."""
    if memory is None:
        free = psutil.virtual_memory().available
        limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
        if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":  # a container's share
            free = min(free, int(text) - int(used.read_text()))
        return max(free // 2, 1)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kMGT]?)(i?)B?\s*", memory, re.IGNORECASE)
        if not match:
            raise ValueError(f"memory must be a number of bytes or text like '2 GB', got {memory!r}")
        step = 1024 if match[3] else 1000
        return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))
    if isinstance(memory, bool) or not memory >= 1:
        raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
    return int(memory)


def fingerprint(model: nn.Module) -> str:
    """Digest of all parameters and buffers."""
    return digest_of(*model.parameters(), *model.buffers())
