"""What stands in the place of a module that was left out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Skip(nn.Module):
    """Gives one of its arguments back, or zeros of its shape, in the form in which the module gave its result.

    Parameters
    ----------
    passed
        Position or keyword of the argument.
    add_nothing
        Give zeros, for a module whose result is only added to something.
    parts, place
        Where the module gave a tuple: its length, and the place of the result in it; the rest is None.
    like
        A tensor of the type and on the device of the result.
    own
        Give zeros of their own memory, which may be written to.
    also
        Other places of the tuple -> the argument that is handed on there.
    """

    def __init__(
        self,
        passed: int | str,
        add_nothing: bool,
        parts: int | None,
        place: int,
        like: Tensor,
        own: bool = False,
        also: Mapping[int, int | str] | None = None,
    ) -> None:
        super().__init__()
        self.passed, self.add_nothing, self.parts, self.place, self.own = passed, add_nothing, parts, place, own
        self.also = dict(also or {})
        self.zero: Tensor
        self.register_buffer("zero", like.new_zeros(()), persistent=False)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The argument or zeros."""
        return self._as_given(self._base(_argument(self.passed, args, kwargs)), args, kwargs)

    def _base(self, x: Tensor) -> Tensor:
        if not self.add_nothing:
            return x
        return torch.zeros_like(x) if self.own else self.zero.expand(x.shape)

    def _as_given(self, result: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if self.parts is None:
            return result
        values: list[object] = [None] * self.parts
        values[self.place] = result
        for i, key in self.also.items():
            values[i] = _argument(key, args, kwargs)
        return tuple(values)

    def extra_repr(self) -> str:
        """What it does, for the model's printed form."""
        return "adds nothing" if self.add_nothing else f"gives back argument {self.passed!r}"


def _argument(key: int | str, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    x = args[key] if isinstance(key, int) else kwargs[key]
    assert isinstance(x, Tensor)
    return x


class Affine(Skip):
    """A `Skip` plus W x + b, one linear map of the channels at every position; W and b start at 0.

    Parameters
    ----------
    axis
        The channel axis of x.

    Other parameters as of `Skip`, `like` being the result itself.
    """

    def __init__(
        self,
        passed: int | str,
        add_nothing: bool,
        parts: int | None,
        place: int,
        like: Tensor,
        axis: int,
        also: Mapping[int, int | str] | None = None,
    ) -> None:
        super().__init__(passed, add_nothing, parts, place, like, also=also)
        channels = like.shape[axis]
        self.axis = axis
        self.taken = nn.Identity()
        """Sees x, so that it can be captured."""
        self.weight = nn.Parameter(like.new_zeros(channels, channels))
        self.bias = nn.Parameter(like.new_zeros(channels))

    def forward(self, *args: object, **kwargs: object) -> object:
        """The argument or zeros, plus the map of the argument."""
        x = self.taken(_argument(self.passed, args, kwargs))
        if self.axis == x.ndim - 1:
            change = F.linear(x, self.weight, self.bias)
        else:
            positions = x.movedim(self.axis, 1).flatten(2)  # (n, c, positions)
            flat = torch.matmul(self.weight, positions) + self.bias[:, None]
            change = flat.view(x.movedim(self.axis, 1).shape).movedim(1, self.axis)
        return self._as_given(self._base(x) + change, args, kwargs)

    def extra_repr(self) -> str:
        """What it does, for the model's printed form."""
        return f"{super().extra_repr()}, {len(self.bias)} channels on axis {self.axis}"
