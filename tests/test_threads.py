"""Work shared among threads: each part once, and nothing goes on behind the caller's back."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque

import pytest
import torch

from repgraph.threads import _pool, share, share_range


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_part_is_done_once(threads):
    done, names = [], set()

    def work(parts):
        names.add(threading.current_thread().name)
        done.extend(parts)

    share(deque(range(1000)), work, threads)
    assert Counter(done) == Counter(range(1000))
    assert threading.main_thread().name in names
    assert len(names) <= threads


@pytest.mark.parametrize(
    ("threads", "stop", "parts"), [(1, 97, 1), (3, 97, 3), (3, 20, 2), (3, 16, 1), (3, 0, 1)], ids=str
)
def test_a_range_falls_into_equal_parts_that_are_worth_a_thread(threads, stop, parts):
    before, done = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        share_range(5, 5 + stop, lambda a, b: done.append((a, b)), least=16)
    finally:
        torch.set_num_threads(before)
    assert [at for a, b in sorted(done) for at in range(a, b)] == list(range(5, 5 + stop))
    sizes = [b - a for a, b in done]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


def test_threads_work_at_the_same_time():
    both = threading.Barrier(2)

    def work(parts):
        for _ in parts:
            both.wait(10)  # for the other

    share(deque("ab"), work, 2)
    assert not both.broken


@pytest.mark.parametrize("fails", [0, 1], ids=["the caller", "the other"])
def test_an_error_ends_the_work_and_is_raised(fails):
    parts, both, done = deque(range(100)), threading.Barrier(2), []

    def work(taken):
        own = 0 if threading.current_thread() is threading.main_thread() else 1
        for part in taken:
            if part < 2:
                both.wait(10)
            if own == fails:
                raise OSError(part)
            done.append(part)
            while parts:  # until the other has failed
                threading.Event().wait(0.001)

    with pytest.raises(OSError, match=r"^[01]$"):
        share(parts, work, 2)
    assert len(done) == 1
    assert not parts


def test_an_interrupt_waits_for_the_work_of_others():
    both, done = threading.Barrier(2), []

    def work(parts):
        for _ in parts:
            both.wait(10)
            if threading.current_thread() is not threading.main_thread():
                threading.Event().wait(0.1)  # by now the caller waits for this
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(0.1)
                done.append(True)

    with pytest.raises(KeyboardInterrupt):
        share(deque("ab"), work, 2)
    assert done


def test_nobody_waits_for_threads_that_are_busy_with_other_work():
    free, begun, done = threading.Event(), threading.Event(), []

    def busy():
        begun.set()
        free.wait(10)

    other = _pool(1).submit(busy)
    begun.wait(10)
    share(deque(range(10)), done.extend, 2)
    free.set()
    other.result()
    assert done == list(range(10))


def _in_a_child(queue):
    done = []
    share(deque(range(50)), done.extend, 2)
    queue.put(sorted(done) == list(range(50)))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    share(deque(range(50)), lambda parts: list(parts), 2)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert queue.get()
