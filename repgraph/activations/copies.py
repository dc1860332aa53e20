"""Results on their way from a GPU to the CPU, while the model goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

_ON_THE_WAY = 2**28  # bytes of pinned memory that copies may take


class Arrival(Protocol):
    """Tells when a copy is complete, as `torch.cuda.Event` does."""

    def query(self) -> bool:
        """Whether it is."""

    def synchronize(self) -> None:
        """Wait until it is."""


def sent(x: Tensor) -> tuple[Tensor, Arrival]:
    """A copy of x to pinned memory, which is under way, and the event of its arrival.

    It takes its turn in the stream that computed x, before whatever changes x in place later.
    """
    copy = x.to("cpu", non_blocking=True)
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrival.record(torch.cuda.current_stream(x.device))
    return copy, arrival


class Copies:
    """Hands each result to `keep` on the CPU, in order, once its copy is complete; those that are there at once.

    All have been handed on when the context is left without an exception.
    """

    def __init__(
        self,
        keep: Callable[[str, Tensor], None],
        send: Callable[[Tensor], tuple[Tensor, Arrival]] = sent,
        most: int = _ON_THE_WAY,
    ) -> None:
        self.keep, self.send, self.most = keep, send, most
        self.coming: deque[tuple[str, Tensor, Arrival]] = deque()
        self.nbytes = 0

    def __call__(self, name: str, x: Tensor) -> None:
        """Take the next result of a layer."""
        if x.device.type != "cuda":
            self.keep(name, x)
            return
        copy, arrival = self.send(x.detach())
        self.coming.append((name, copy, arrival))
        self.nbytes += copy.nbytes
        while self.coming and (self.nbytes > self.most or self.coming[0][2].query()):
            self._next()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        while self.coming and kind is None:
            self._next()

    def _next(self) -> None:
        name, copy, arrival = self.coming.popleft()
        arrival.synchronize()
        self.nbytes -= copy.nbytes
        self.keep(name, copy)
