"""Peak growth of resident memory during a piece of work."""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import psutil

T = TypeVar("T")


class Growth:
    """What `growth` yields: bytes over the start, known afterwards."""

    peak = 0


@contextmanager
def growth(every: float = 0.005) -> Iterator[Growth]:
    """Sample the resident memory in a thread; the peak is the largest growth over the moment of entry.

    What the C library kept of earlier work is given back first (Linux), or reuse of it would look like no growth.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    process, result, stop = psutil.Process(), Growth(), threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not stop.is_set():
            result.peak = max(result.peak, process.memory_info().rss - start)
            time.sleep(every)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()
        result.peak = max(result.peak, process.memory_info().rss - start)


def measured(f: Callable[[], T]) -> tuple[float, int, T]:
    """Seconds, peak growth in bytes, and the result of a piece of work."""
    with growth() as memory:
        start = time.perf_counter()
        found = f()
        seconds = time.perf_counter() - start
    return seconds, memory.peak, found
