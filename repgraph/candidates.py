"""Candidates for the nearest neighbours of each row, taken from tiles of similarities as these are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, uint64
from torch import Tensor

from repgraph.threads import share_range

_CROWD = 80  # candidates beyond k that a row may have
_RUN = 32  # entries compared with the threshold before any is looked at
_STRIP = 512  # columns whose candidates stay in a cache
_FEW, _PART = 1024, 2048  # up to so many samples so many features of all of them stay in a cache
_WORTH = 2**24  # products of numbers that a thread is worth, while those of torch still wait for work
_ENTRIES = 2**19  # to be looked at that a thread is worth


class Candidates:
    """For each of n rows the entries that may be among its k largest, as far as is known from the entries so far.

    The entry of row o and column c is e_oc = f_o f_c s_oc - h_o - h_c, where f is 1 or h is 0. What it stands for is at
    most half the row's margin above e_oc, and at most that + rounding |s_oc| below. An entry stays while it is within
    the margin of the k-th largest of e - rounding |s|. A row where too many do gives up; it is to be compared with all
    others.

    Parameters
    ----------
    k
        How many of each row are wanted.
    factor, half
        f and h, (n,), of the type of s, on the CPU.
    margin
        (n,): twice the error of a row's entries.
    rounding
        How much s may be too large, as a part of it; f is 1 where this is not 0.
    """

    def __init__(self, k: int, factor: Tensor, half: Tensor, margin: Tensor, rounding: float = 0.0) -> None:
        self.k, self.factor, self.half, self.rounding = k, factor.numpy(), half.numpy(), rounding
        n, size = len(factor), min(2 * k + _CROWD + 16, max(len(factor) - 1, k))
        self.margin = (margin / factor).numpy().astype(self.factor.dtype)
        self.keys = np.empty((n, size), self.factor.dtype)  # without the row's own f and h, which change no order
        self.columns = np.full((n, size), -1, np.int32)
        self.counts = np.zeros(n, np.int64)
        self.lowest = np.full(n, -np.inf, self.factor.dtype)
        best = np.full((n, k), -np.inf, self.factor.dtype)  # of e - rounding |s|
        lost = np.full(n, -np.inf, self.factor.dtype)  # no entry that was left out for want of room is larger
        arrays = (self.factor, self.half, self.margin, self.keys, self.columns, self.counts, self.lowest, best, lost)
        self.own = (*arrays, self.factor.dtype.type(rounding))

    def crowded(self, s: Tensor, rows: Tensor) -> bool:
        """Whether many of a few rows, whose s with all columns is (r, n), would keep too many candidates."""
        keys = s * torch.from_numpy(self.factor) - torch.from_numpy(self.half)
        keys[torch.arange(len(rows)), rows] = -torch.inf
        kth = (keys - self.rounding * s.abs()).topk(self.k, dim=1).values[:, -1:]
        near = keys >= kth - torch.from_numpy(self.margin)[rows, None]
        return bool((near.sum(1) > self.k + _CROWD).double().mean() > 0.1)

    def skip(self, rows: Tensor) -> None:
        """Rows (n,) bool that want no candidates."""
        self.counts[rows.numpy()] = -1
        self.lowest[rows.numpy()] = np.inf

    def add_rows(self, s: Tensor, i: int, j: int) -> None:
        """Let the entries of a tile compete: s holds rows from i on with columns from j on, right of the diagonal.

        Tiles of different rows may be added at the same time, here as well as in `add_columns`.
        """
        _as_rows(s.numpy(), i, j, self.own)

    def add_columns(self, s: Tensor, i: int, j: int) -> None:
        """As `add_rows`, for the columns as rows: they compete with rows from i on."""
        values = s.numpy()
        if i < j and len(values) >= self.k and (self.lowest[j : j + values.shape[1]] == -np.inf).all():
            _seed(values, i, j, np.empty((2, values.shape[1]), values.dtype), self.own)
        _as_columns(values, i, j, self.own)

    def found(self) -> tuple[Tensor, Tensor]:
        """Columns (n, m), -1 where there are fewer, and which rows gave up."""
        share_range(0, len(self.keys), lambda a, b: _last(a, b, self.own), _ENTRIES // self.keys.shape[1])
        m = max(self.k, int(self.counts.max()))
        return torch.from_numpy(self.columns[:, :m]).long(), torch.from_numpy(self.counts) < 0


def pair_sums(x: Tensor, rows: Tensor, others: Tensor, metric: str) -> Tensor:
    """Dot products, or squared distances, of rows (r,) of x with others (r, m), -1 = nobody, in float64: (r, m)."""
    sums = np.zeros(others.shape)
    values, of, to = x.numpy(), rows.numpy(), others.numpy()
    kernel = _dots if metric == "cosine" else _squares
    least = _WORTH * len(of) // (values.shape[1] * max(1, int((to >= 0).sum())))
    part = _PART if len(values) <= _FEW else values.shape[1]
    share_range(0, len(of), lambda a, b: kernel(values, of, to, sums, part, a, b), max(16, least))
    return torch.from_numpy(sums)


def _kernel(fastmath: bool | set[str] = False) -> Any:
    """Compiled without counts of references to arrays, at each of which threads would wait for one another."""
    return njit(cache=True, nogil=True, _nrt=False, fastmath=fastmath)  # type: ignore[call-overload]


@_kernel()
def _as_rows(s, i, j, own):  # type: ignore[no-untyped-def]
    factor, half, margin, keys, columns, counts, lowest, best, lost, rounding = own
    end = j + s.shape[1]
    for o in range(i, i + s.shape[0]):
        for start in range(max(j, o + 1), end, _RUN):
            stop = min(start + _RUN, end)
            hits = 0
            for c in range(uint64(start), uint64(stop)):  # unsigned, or a look for negative ones takes longer than this
                hits += s[uint64(o - i), c - uint64(j)] * factor[c] - half[c] >= lowest[o]
            if hits:
                for c in range(start, stop):
                    key = s[o - i, c - j] * factor[c] - half[c]
                    if key >= lowest[o]:
                        _push(o, key, c, half, margin, keys, columns, counts, lowest, best, lost, rounding)


@_kernel()
def _as_columns(s, i, j, own):  # type: ignore[no-untyped-def]
    factor, half, margin, keys, columns, counts, lowest, best, lost, rounding = own
    end = j + s.shape[1]
    for left in range(j, end, _STRIP):
        right = min(left + _STRIP, end)
        for r in range(s.shape[0]):
            f, h = factor[i + r], half[i + r]
            for start in range(max(left, i + r + 1), right, _RUN):
                stop = min(start + _RUN, right)
                hits = 0
                for c in range(uint64(start), uint64(stop)):
                    hits += s[uint64(r), c - uint64(j)] * f - h >= lowest[c]
                if hits:
                    for c in range(start, stop):
                        key = s[r, c - j] * f - h
                        if key >= lowest[c]:
                            _push(c, key, i + r, half, margin, keys, columns, counts, lowest, best, lost, rounding)


@_kernel()
def _seed(s, i, j, room, own):  # type: ignore[no-untyped-def]
    """Thresholds of columns: of the largest entries in k parts of the rows, the least has k entries no less than it."""
    factor, half, margin, _, _, _, lowest, best, _, rounding = own
    k, m = best.shape[1], s.shape[0]
    least, peak = room
    least[:] = np.inf
    for g in range(k):
        peak[:] = -np.inf
        for r in range(g * m // k, (g + 1) * m // k):
            f, h = factor[i + r], half[i + r]
            for c in range(uint64(s.shape[1])):
                key = s[uint64(r), c] * f - h
                key -= rounding * abs(key + half[c + uint64(j)])
                peak[c] = key if key > peak[c] else peak[c]
        for c in range(len(peak)):
            least[c] = min(least[c], peak[c])
    for c in range(len(peak)):
        lowest[j + c] = max(lowest[j + c], least[c] - margin[j + c])


@_kernel()
def _push(o, key, column, half, margin, keys, columns, counts, lowest, best, lost, rounding):  # type: ignore[no-untyped-def]
    k = best.shape[1]
    if counts[o] == keys.shape[1]:
        _thin(o, lowest[o], keys, columns, counts)
        if counts[o] > k + _CROWD and lost[o] < lowest[o]:  # the k-th largest may yet leave what ties with it behind
            lost[o] = best[o, 0]
            _thin(o, np.nextafter(lost[o], np.inf), keys, columns, counts)
        if counts[o] > k + _CROWD:
            counts[o], lowest[o] = -1, np.inf
            return
    keys[o, counts[o]] = key
    columns[o, counts[o]] = column
    counts[o] += 1
    least = key - rounding * abs(key + half[column])
    if least > best[o, 0]:  # a heap: the first is the lowest
        place = 0
        while 2 * place + 1 < k:
            lower = 2 * place + 1
            lower += lower + 1 < k and best[o, lower + 1] < best[o, lower]
            if best[o, lower] >= least:
                break
            best[o, place] = best[o, lower]
            place = lower
        best[o, place] = least
        lowest[o] = max(lowest[o], best[o, 0] - margin[o])


@_kernel()
def _thin(o, least, keys, columns, counts):  # type: ignore[no-untyped-def]
    kept = 0
    for t in range(counts[o]):
        if keys[o, t] >= least:
            keys[o, kept] = keys[o, t]
            columns[o, kept] = columns[o, t]
            kept += 1
    if counts[o] >= 0:
        columns[o, kept : counts[o]] = -1
        counts[o] = kept


@_kernel()
def _last(a, b, own):  # type: ignore[no-untyped-def]
    _, _, _, keys, columns, counts, lowest, _, lost, _ = own
    for o in range(a, b):
        if counts[o] >= 0 and lost[o] >= lowest[o]:
            counts[o] = -1
        _thin(o, lowest[o], keys, columns, counts)


@_kernel(fastmath={"reassoc", "contract", "nsz"})
def _dots(x, rows, others, sums, part, a, b):  # type: ignore[no-untyped-def]
    for start in range(0, x.shape[1], part):
        for r in range(a, b):
            own = x[rows[r], start : start + part]
            for t in range(others.shape[1]):
                if others[r, t] < 0:
                    continue
                total, other = 0.0, x[others[r, t], start : start + part]
                for f in range(len(own)):
                    total += np.float64(own[f]) * np.float64(other[f])
                sums[r, t] += total


@_kernel(fastmath={"reassoc", "contract", "nsz"})
def _squares(x, rows, others, sums, part, a, b):  # type: ignore[no-untyped-def]
    for start in range(0, x.shape[1], part):
        for r in range(a, b):
            own = x[rows[r], start : start + part]
            for t in range(others.shape[1]):
                if others[r, t] < 0:
                    continue
                total, other = 0.0, x[others[r, t], start : start + part]
                for f in range(len(own)):
                    gap = np.float64(own[f]) - np.float64(other[f])
                    total += gap * gap
                sums[r, t] += total
