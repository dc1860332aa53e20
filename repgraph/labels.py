"""What counts as a class label: one integer, bool or string per sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

Labels: TypeAlias = Tensor | np.ndarray | pd.Series | Iterable[object]
"""Labels as users hold them: tensor, array, list or Series."""


def as_labels(labels: Labels) -> Tensor | np.ndarray:
    """Labels of any accepted kind as a CPU tensor (numbers, bools) or a NumPy array of strings.

    Nothing is refused for its meaning here: float and multi-label targets pass through, one row per
    sample. `class_codes` decides whether they are classes.

    Raises
    ------
    ValueError
        If the labels hold missing values or mixed types.

    Examples
    --------
    >>> as_labels([0, 1, 1])
    tensor([0, 1, 1])
    """
    if isinstance(labels, Tensor):
        return labels.detach().cpu()
    if isinstance(labels, pd.DataFrame):
        labels = labels.to_numpy()
    if not isinstance(labels, np.ndarray | pd.Series):
        items = [item.item() if isinstance(item, Tensor) and item.ndim == 0 else item for item in labels]
        scalar = not any(hasattr(item, "__len__") and not isinstance(item, str) for item in items)
        labels = np.array(items, dtype=object) if scalar else np.array(items)
    array = np.asarray(labels)
    if array.dtype.kind == "O":
        kinds = {_kind(item) for item in array.ravel()}
        if len(kinds) > 1 or not kinds <= {"bool", "int", "float", "str"}:
            raise ValueError(
                f"labels must be all integers, all bools or all strings, got a mix of {', '.join(sorted(kinds))}"
            )
        array = array.astype(kinds.pop() if kinds else int)
    if array.dtype.kind in "US":
        return array.astype(str)
    if array.dtype.kind == "u":
        array = array.astype(np.int64)
    if array.dtype.kind not in "bif":
        raise ValueError(f"labels must be integers, bools or strings, got dtype {array.dtype}")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))  # pandas gives read-only views


def _kind(item: object) -> str:
    for name, kinds in (("bool", bool | np.bool_), ("int", int | np.integer), ("float", float | np.floating)):
        if isinstance(item, kinds):
            return name
    return "str" if isinstance(item, str) else type(item).__name__


def class_codes(labels: Labels, n: int) -> tuple[Tensor, list[object]]:
    """Number the classes 0..C-1 in sorted order.

    Parameters
    ----------
    labels
        One integer, bool or string per sample.
    n
        Number of samples that the labels must cover.

    Returns
    -------
    codes : Tensor
        Shape (n,), int64, in 0..C-1, on the CPU.
    classes : list
        The C distinct labels, sorted; ``classes[codes[i]]`` is the label of sample i.

    Raises
    ------
    ValueError
        If the labels are floats (bin them first), have more than one column (choose one), or their number
        is not n.

    Examples
    --------
    >>> class_codes(["dog", "cat", "dog"], 3)
    (tensor([1, 0, 1]), ['cat', 'dog'])
    """
    values = as_labels(labels)
    if values.ndim != 1:
        raise ValueError(
            f"labels must be one class per sample, shape ({n},), got shape {tuple(values.shape)}: choose one "
            "column of a multi-label target, or labels.argmax(1) if it is one-hot"
        )
    if len(values) != n:
        raise ValueError(f"labels must have one entry per sample: expected {n}, got {len(values)}")
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex():
            raise ValueError(
                f"labels must be integers, bools or strings, got {values.dtype}: bin a continuous target first, "
                "for example with pandas.qcut(y, 10).codes"
            )
        values = values.numpy()
    classes, codes = np.unique(values, return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), classes.tolist()
