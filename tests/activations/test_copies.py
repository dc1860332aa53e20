"""Results that come from a GPU: in order, never before they are there, bounded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

import repgraph
from repgraph.activations.copies import Copies, sent


class Arrival:
    """Of a copy that is complete after so many questions, or when it is waited for."""

    def __init__(self, questions):
        self.questions = questions

    def query(self):
        self.questions -= 1
        return self.questions < 0

    def synchronize(self):
        self.questions = -1


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=30), st.integers(0, 400))
def test_each_is_handed_on_once_in_order_and_complete_and_memory_is_bounded(items, most):
    arrivals, handed = [], []

    def send(x):
        arrivals.append(Arrival(items[len(arrivals)][1]))
        return x.to("cpu", non_blocking=True), arrivals[-1]

    def keep(name, x):
        assert x.device.type == "cpu"
        assert arrivals[int(name)].questions < 0
        handed.append((int(name), len(x)))

    with FakeTensorMode(), Copies(keep, send, most) as copies:
        for number, (size, _) in enumerate(items):
            copies(str(number), torch.empty(size, device="cuda"))
            on_the_way = sum(4 * length for length, _ in items[len(handed) : number + 1])
            assert on_the_way <= most
            assert on_the_way == copies.nbytes
    assert handed == [(number, size) for number, (size, _) in enumerate(items)]


def test_copies_go_on_while_there_is_room_and_nothing_waits():
    waits = []

    class Slow(Arrival):
        def synchronize(self):
            waits.append(self)
            super().synchronize()

    with FakeTensorMode(), Copies(lambda *_: None, lambda x: (x.cpu(), Slow(100)), most=1000) as copies:
        for _ in range(10):
            copies("a", torch.empty(25, device="cuda"))
        assert not waits
        copies("a", torch.empty(25, device="cuda"))
        assert len(waits) == 1
    assert len(waits) == 11


def test_an_exception_hands_nothing_more_on():
    handed = []
    with (  # noqa: PT012
        FakeTensorMode(),
        pytest.raises(RuntimeError, match="stop"),
        Copies(lambda name, _: handed.append(name), lambda x: (x.cpu(), Arrival(9))) as copies,
    ):
        copies("a", torch.empty(2, device="cuda"))
        raise RuntimeError("stop")
    assert handed == []


def test_what_is_on_the_cpu_is_handed_on_as_it_is():
    handed, x = [], torch.ones(2)
    with Copies(lambda *item: handed.append(item)) as copies:
        copies("a", x)
        assert handed[0][1] is x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_later_changes_in_place_do_not_reach_the_copy():
    x = torch.ones(2**22, device="cuda")
    copy, arrival = sent(x)
    x.zero_()
    arrival.synchronize()
    assert copy.is_pinned()
    assert bool((copy == 1).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_capture_gives_what_it_gives_here():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 3), nn.ReLU(inplace=True))
    x = torch.randn(300, 3, 16, 16)
    here = repgraph.capture(model, x, "leaves", batch_size=16)
    there = repgraph.capture(model.cuda(), x, "leaves", batch_size=16)
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=1e-3, atol=1e-3)
