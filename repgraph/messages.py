"""What errors and warnings are about, and where warnings go."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Note = tuple[str, type[Warning]]

_subjects: ContextVar[tuple[str, ...]] = ContextVar("subjects", default=())
_notes: ContextVar[list[Note] | None] = ContextVar("notes", default=None)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Let errors, and warnings given by `tell`, say which argument or layer they are about."""
    token = _subjects.set((*_subjects.get(), name))
    try:
        yield
    except ValueError as error:
        text = str(error)
        subject = f"{name}{text[1:]}" if text.startswith("x must") else f"{name}: {text}"
        raise ValueError(subject) from error
    finally:
        _subjects.reset(token)


@contextmanager
def heard() -> Iterator[list[Note]]:
    """Collect the warnings given by `tell` instead."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def tell(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called into repgraph, however deep in it we are."""
    message = "".join(f"{name}: " for name in _subjects.get()) + message
    notes = _notes.get()
    if notes is not None:
        notes.append((message, category))
        return
    level, outermost, frame = 1, 1, sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] == "repgraph":
            outermost = level
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=outermost + 1)
