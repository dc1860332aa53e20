"""How many cells a ReLU network can have."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, prod


def max_regions_bound(widths: Sequence[int], n0: int) -> int:
    """Upper bound on the cells of a ReLU network: prod_l sum_{j <= m_l} C(n_l, j), m_l = min(n_0, ..., n_{l-1}).

    Parameters
    ----------
    widths
        Units of each hidden layer, n_1 to n_L.
    n0
        Input dimension; 2 for the cells in a plane, 1 on a segment.

    Returns
    -------
    int
        Equal to the number of cells of one layer in general position.

    Raises
    ------
    ValueError
        If a width or n0 is below 1.

    References
    ----------
    Serra, Tjandraatmadja, Ramalingam, "Bounding and Counting Linear Regions of Deep Neural Networks", ICML 2018, for
    tighter ones; Zaslavsky's theorem for one layer.

    Examples
    --------
    >>> max_regions_bound([8, 8], 2)
    1369
    """
    _check(widths, n0)
    least = [min(n0, *widths[:number]) for number in range(1, len(widths))]
    return prod(sum(comb(n, j) for j in range(m + 1)) for n, m in zip(widths, [n0, *least], strict=True))


def reachable_regions(widths: Sequence[int], n0: int) -> int:
    """Cells that some weights reach: prod_{l < L} floor(n_l / n_0)^{n_0} sum_{j <= n_0} C(n_L, j).

    Parameters
    ----------
    widths, n0
        As in `max_regions_bound`.

    Returns
    -------
    int
        At most `max_regions_bound`; 0 where a layer but the last has fewer than n_0 units, for which the formula says
        nothing. At random weights counts grow about linearly in the number of units instead.

    Raises
    ------
    ValueError
        If a width or n0 is below 1.

    References
    ----------
    Montufar, Pascanu, Cho, Bengio, "On the Number of Linear Regions of Deep Neural Networks", NeurIPS 2014.

    Examples
    --------
    >>> reachable_regions([8, 8], 2)
    592
    """
    _check(widths, n0)
    before: int = prod((n // n0) ** n0 for n in widths[:-1])
    return before * sum(comb(widths[-1], j) for j in range(n0 + 1))


def _check(widths: Sequence[int], n0: int) -> None:
    if not len(widths) or min(widths) < 1:
        raise ValueError(f"widths must be at least one positive number of units, got {list(widths)}")
    if n0 < 1:
        raise ValueError(f"n0 must be at least 1, got {n0}")
