"""What stands in the place of a module that was left out."""

from __future__ import annotations

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
    """

    def __init__(self, passed: int | str, add_nothing: bool, parts: int | None, place: int, like: Tensor) -> None:
        super().__init__()
        self.passed, self.add_nothing, self.parts, self.place = passed, add_nothing, parts, place
        self.zero: Tensor
        self.register_buffer("zero", like.new_zeros(()), persistent=False)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The argument or zeros."""
        return self._as_given(self._base(self._argument(args, kwargs)))

    def _argument(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        x = args[self.passed] if isinstance(self.passed, int) else kwargs[self.passed]
        assert isinstance(x, Tensor)
        return x

    def _base(self, x: Tensor) -> Tensor:
        return self.zero.expand(x.shape) if self.add_nothing else x

    def _as_given(self, result: Tensor) -> object:
        if self.parts is None:
            return result
        return tuple(result if i == self.place else None for i in range(self.parts))

    def extra_repr(self) -> str:
        """What it does, for the model's printed form."""
        return "adds nothing" if self.add_nothing else f"gives back argument {self.passed!r}"


class Affine(Skip):
    """A `Skip` plus W x + b, one linear map of the channels at every position; W and b start at 0.

    Parameters
    ----------
    axis
        The channel axis of x.

    Other parameters as of `Skip`, `like` being the result itself.
    """

    def __init__(
        self, passed: int | str, add_nothing: bool, parts: int | None, place: int, like: Tensor, axis: int
    ) -> None:
        super().__init__(passed, add_nothing, parts, place, like)
        channels = like.shape[axis]
        self.axis = axis
        self.taken = nn.Identity()
        """Sees x, so that it can be captured."""
        self.weight = nn.Parameter(like.new_zeros(channels, channels))
        self.bias = nn.Parameter(like.new_zeros(channels))

    def forward(self, *args: object, **kwargs: object) -> object:
        """The argument or zeros, plus the map of the argument."""
        x = self.taken(self._argument(args, kwargs))
        if self.axis == x.ndim - 1:
            change = F.linear(x, self.weight, self.bias)
        else:
            positions = x.movedim(self.axis, 1).flatten(2)  # (n, c, positions)
            flat = torch.matmul(self.weight, positions) + self.bias[:, None]
            change = flat.view(x.movedim(self.axis, 1).shape).movedim(1, self.axis)
        return self._as_given(self._base(x) + change)

    def extra_repr(self) -> str:
        """What it does, for the model's printed form."""
        return f"{super().extra_repr()}, {len(self.bias)} channels on axis {self.axis}"
