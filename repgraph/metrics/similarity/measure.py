"""What every measure of similarity shares: each layer is prepared once, and pairs of prepared layers are compared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from torch import Tensor


class Layer(Protocol):
    """A prepared layer: a graph, a Gram matrix, ranks, ..."""

    @property
    def n(self) -> int:
        """Number of samples."""


class Measure(Protocol):
    """A measure of similarity as `measure` leaves it."""

    prepare: Callable[..., Layer]
    pair: Callable[..., Tensor | float]
    base: Callable[..., Layer] | None
    distance: bool


F = TypeVar("F", bound=Callable[..., float])
L = TypeVar("L", bound=Layer)


def measure(
    prepare: Callable[..., L],
    pair: Callable[..., Tensor | float],
    *,
    base: Callable[..., Layer] | None = None,
    distance: bool = False,
) -> Callable[[F], F]:
    """Let a measure name its own preparation, so that `repgraph.between_layers` prepares each layer once.

    The measure gets attributes: `prepare` turns features (n, ...), or what is prepared already, into what `pair`
    compares; `pair` is the measure of two prepared layers; `base` makes of features what several measures can start
    from (their Gram matrix), where `prepare` has no options; `distance` says that the measure falls with likeness.
    """

    def attach(f: F) -> F:
        vars(f).update(prepare=prepare, pair=pair, base=base, distance=distance)
        return f

    return attach


@contextmanager
def named(name: str) -> Iterator[None]:
    """Let errors and warnings say which argument or layer they are about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except ValueError as error:
            text = str(error)
            subject = f"{name}{text[1:]}" if text.startswith("x must") else f"{name}: {text}"
            raise ValueError(subject) from error
    for warning in caught:
        warnings.warn(f"{name}: {warning.message}", warning.category, stacklevel=5)


def both(prepare: Callable[..., L], x: object, y: object, **options: object) -> tuple[L, L]:
    """Both arguments of a measure, prepared; errors and warnings name the argument.

    Raises
    ------
    ValueError
        If one of them cannot be prepared, or their numbers of samples differ.
    """
    with named("x"):
        a = prepare(x, **options)
    with named("y"):
        b = prepare(y, **options)
    if a.n != b.n:
        raise ValueError(f"x and y must be over the same samples, got {a.n} and {b.n}")
    return a, b


def as_number(value: Tensor | float) -> float:
    """The value as a float, with a warning where it is undefined."""
    number = float(value)
    if math.isnan(number):
        warnings.warn(
            "the similarity is undefined (nan): the features of a layer are constant, or its samples too few",
            stacklevel=3,
        )
    return number
