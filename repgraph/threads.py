"""Parts of one piece of work, shared among threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

Part = TypeVar("Part")


def share(parts: deque[Part], work: Callable[[Iterator[Part]], None], threads: int) -> None:
    """Have `work` done by this thread and others, each of which is given parts until none is left.

    All of them have ended at the end, after an error or an interrupt, too; from then on no part is begun.
    """

    def some() -> None:
        try:
            work(_taken(parts))
        finally:
            parts.clear()

    others: list[Future[None]] = [_pool(threads - 1).submit(some) for _ in range(threads - 1)]
    try:
        some()
        _wait(others)
    finally:
        _wait(others)  # an interrupt may have ended the first wait
    for other in others:
        if not other.cancelled():
            other.result()


def share_range(start: int, stop: int, work: Callable[[int, int], None], least: int = 16) -> None:
    """Do start to stop in equal parts, one for each of torch's threads, none for much less than the least."""
    threads = min(torch.get_num_threads(), -(-(stop - start) // least))
    if threads <= 1:
        work(start, stop)
        return
    bounds = np.linspace(start, stop, threads + 1).astype(int).tolist()

    def some(parts: Iterator[tuple[int, int]]) -> None:
        for part in parts:
            work(*part)

    share(deque(pairwise(bounds)), some, threads)


def _taken(parts: deque[Part]) -> Iterator[Part]:
    while True:
        try:
            part = parts.popleft()
        except IndexError:
            return
        yield part


def _wait(others: list[Future[None]]) -> None:
    """For those that have begun: a pool may be busy with other work for long."""
    wait([other for other in others if not other.cancel()])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept, since new threads tend to start on the core that is busy with starting them."""
    return ThreadPoolExecutor(threads, "repgraph")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not come along
