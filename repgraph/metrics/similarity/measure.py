"""What every measure of similarity shares: each layer is prepared once, and pairs of prepared layers are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from repgraph.messages import named, tell


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
    symmetric: bool


F = TypeVar("F", bound=Callable[..., float])
L = TypeVar("L", bound=Layer)


def measure(
    prepare: Callable[..., L],
    pair: Callable[..., Tensor | float],
    *,
    base: Callable[..., Layer] | None = None,
    distance: bool = False,
    symmetric: bool = True,
) -> Callable[[F], F]:
    """Let a measure name its own preparation, so that `repgraph.between_layers` prepares each layer once.

    The measure gets attributes: `prepare` turns features (n, ...), or what is prepared already, into what `pair`
    compares; `pair` is the measure of two prepared layers; `base` makes of features what several measures can start
    from (their Gram matrix), where `prepare` has no options; `distance` says that the measure falls with likeness,
    `symmetric` that x and y can change places.
    """

    def attach(f: F) -> F:
        vars(f).update(prepare=prepare, pair=pair, base=base, distance=distance, symmetric=symmetric)
        return f

    return attach


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
        tell("the similarity is undefined (nan): the features of a layer are constant, or its samples too few")
    return number
