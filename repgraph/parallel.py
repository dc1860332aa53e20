"""Work on layers through joblib: here, or wherever `joblib.parallel_config` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, Generic, TypeVar

from joblib import Parallel, delayed
from tqdm import tqdm

from repgraph.activations import Activations
from repgraph.messages import Note, heard, tell

T = TypeVar("T")


class Item(Generic[T]):
    """One entry of a mapping, read where it is used; sent elsewhere, files are opened there and all else travels."""

    def __init__(self, items: Mapping[str, T], name: str) -> None:
        self.items, self.name = items, name

    def read(self) -> T:
        """The entry."""
        return self.items[self.name]

    def __reduce__(self) -> tuple[type[Item[Any]], tuple[object, str]]:
        if isinstance(self.items, Activations) and self.items.in_files:
            return Item, (self.items, self.name)
        return Item, ({self.name: self.read()}, self.name)


def each(
    work: Callable[..., T], tasks: Iterable[tuple[Any, ...]], total: int, desc: str, unit: str, progress: bool
) -> Iterator[T]:
    """What work(*task) gives for each task, as it is done, with a progress bar.

    In this process, one after the other, a task is taken from `tasks` when the one before is done.
    """
    results = Parallel(return_as="generator_unordered")(delayed(_with_notes)(work, task) for task in tasks)
    with closing(results):
        for result, notes in tqdm(
            results, total=total, desc=desc, unit=unit, disable=not progress, delay=1, leave=False
        ):
            for note in notes:
                tell(*note)
            yield result


def _with_notes(work: Callable[..., T], task: tuple[Any, ...]) -> tuple[T, list[Note]]:
    """What the work gives, and its warnings, which other processes would keep to themselves."""
    with heard() as notes:
        return work(*task), notes
