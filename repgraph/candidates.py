"""Candidates for the nearest neighbours of each row, taken from blocks of similarities as these are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

_CROWD = 80  # candidates beyond k that a row may have
_RUN = 32  # entries compared with the threshold before any is looked at
_FEW, _PART = 1024, 2048  # up to so many samples so many features of all of them stay in a cache
_WORTH = 2**24  # products of numbers that a thread is worth, while those of torch still wait for work
_FRESH = 24  # entries that a row takes before its threshold rises


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
        self.columns = np.empty((n, size), np.int32)
        self.counts = np.zeros(n, np.int64)
        self.lowest = np.full(n, -np.inf, self.factor.dtype)
        self.full = np.full(n, min(k + _FRESH, size))  # entries at which the threshold rises
        arrays = (self.factor, self.half, self.margin, self.keys, self.columns, self.counts, self.lowest, self.full)
        self.own = (*arrays, self.factor.dtype.type(rounding), k)

    def crowded(self, s: Tensor, rows: Tensor) -> bool:
        """Whether many of a few rows, whose s with all columns is (r, n), would keep too many candidates."""
        keys = s * torch.from_numpy(self.factor) - torch.from_numpy(self.half)
        kth = self._kth(s, keys, rows, 1)
        near = keys >= (kth - torch.from_numpy(self.margin)[rows])[:, None]
        return bool((near.sum(1) > self.k + _CROWD).double().mean() > 0.1)

    def begin(self, s: Tensor, rows: Tensor) -> None:
        """Start the thresholds at the k-th largest among a few rows, whose s with all columns is (r, n)."""
        if len(rows) <= self.k + 1 or len(rows) * 8 > len(self.keys):
            return
        keys = s * torch.from_numpy(self.factor)[rows, None] - torch.from_numpy(self.half)[rows, None]
        self.lowest[:] = self._kth(s, keys, rows, 0).numpy() - self.margin

    def _kth(self, s: Tensor, keys: Tensor, rows: Tensor, dim: int) -> Tensor:
        """The k-th largest along dim of what the entries of rows (r,), with all columns, stand for at least."""
        keys[torch.arange(len(rows)), rows] = -torch.inf
        return (keys - self.rounding * s.abs()).topk(self.k, dim=dim).values.select(dim, -1)

    def skip(self, rows: Tensor) -> None:
        """Rows (n,) bool that want no candidates."""
        self.counts[rows.numpy()] = -1
        self.lowest[rows.numpy()] = np.inf

    def add(self, blocks: Sequence[tuple[Tensor, int, int]]) -> None:
        """Let blocks (s, i, j) compete: s (j - i, n - i) holds rows i to j with columns i to n, and these as rows.

        Several at a time, since torch's threads still wait for work for a while after each product.
        """
        own, n, (_, first, _) = self.own, len(self.keys), blocks[0]
        several = [(s.numpy(), i, j) for s, i, j in blocks]

        def rows(a: int, b: int) -> None:
            for s, i, j in several:
                if max(a, i) < min(b, j):
                    _as_rows(s, max(a, i) - i, min(b, j) - i, i, own)

        def columns(a: int, b: int) -> None:
            for s, i, j in several:
                if max(a, j) < b:
                    _as_columns(s, max(a, j) - j, b - j, i, j, own)

        _shared(first, several[-1][2], rows)
        _shared(several[0][2], n, columns)

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, falling, and columns (n, m), -inf and -1 where there are fewer; and which rows gave up."""
        _shared(0, len(self.keys), lambda a, b: _last(a, b, self.own))
        counts = torch.from_numpy(self.counts)
        m = max(self.k, int(counts.max()))
        keys, columns = torch.from_numpy(self.keys[:, :m]), torch.from_numpy(self.columns[:, :m])
        none = torch.arange(m) >= counts[:, None]
        keys, order = keys.masked_fill(none, -torch.inf).sort(dim=1, descending=True)
        columns = columns.masked_fill(none, -1)
        values = keys * torch.from_numpy(self.factor)[:, None] - torch.from_numpy(self.half)[:, None]
        return values, columns.gather(1, order).long(), counts < 0


def pair_sums(x: Tensor, rows: Tensor, others: Tensor, metric: str) -> Tensor:
    """Dot products, or squared distances, of rows (r,) of x with others (r, m), -1 = nobody, in float64: (r, m)."""
    sums = np.zeros(others.shape)
    values, of, to = x.numpy(), rows.numpy(), others.numpy()
    kernel = _dots if metric == "cosine" else _squares
    least = _WORTH * len(of) // (values.shape[1] * max(1, int((to >= 0).sum())))
    part = _PART if len(values) <= _FEW else values.shape[1]
    _shared(0, len(of), lambda a, b: kernel(values, of, to, sums, part, a, b), max(16, least))
    return torch.from_numpy(sums)


def _shared(start: int, stop: int, work: Callable[[int, int], None], least: int = 16) -> None:
    """Do start to stop in equal parts, one for each of torch's threads, none for much less than the least."""
    threads = min(torch.get_num_threads(), -(-(stop - start) // least))
    if threads <= 1:
        work(start, stop)
        return
    bounds = np.linspace(start, stop, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


@njit(cache=True, nogil=True)
def _as_rows(s, a, b, i, own):  # type: ignore[no-untyped-def]
    factor, half, margin, keys, columns, counts, lowest, full, rounding, k = own
    for r in range(a, b):
        o = i + r
        for start in range(0, s.shape[1], _RUN):
            run = s[r, start : start + _RUN]  # slices, since loops over them are vectorised
            f, h = factor[i + start : i + start + _RUN], half[i + start : i + start + _RUN]
            low, hits = lowest[o], 0
            for c in range(len(run)):
                hits += run[c] * f[c] - h[c] >= low
            if hits:
                for c in range(len(run)):
                    key = run[c] * f[c] - h[c]
                    if key >= lowest[o] and i + start + c != o:
                        _push(o, key, i + start + c, half, margin, keys, columns, counts, lowest, full, rounding, k)


@njit(cache=True, nogil=True)
def _as_columns(s, a, b, i, j, own):  # type: ignore[no-untyped-def]
    factor, half, margin, keys, columns, counts, lowest, full, rounding, k = own
    for r in range(s.shape[0]):
        f, h = factor[i + r], half[i + r]
        for start in range(a, b, _RUN):
            stop = min(start + _RUN, b)
            run, low = s[r, start + j - i : stop + j - i], lowest[start + j : stop + j]
            hits = 0
            for c in range(len(run)):
                hits += run[c] * f - h >= low[c]
            if hits:
                for c in range(len(run)):
                    key = run[c] * f - h
                    if key >= low[c]:
                        _push(start + j + c, key, i + r, half, margin, keys, columns, counts, lowest, full, rounding, k)


@njit(cache=True, nogil=True)
def _push(o, key, column, half, margin, keys, columns, counts, lowest, full, rounding, k):  # type: ignore[no-untyped-def]
    if counts[o] == full[o]:
        _thin(o, half, margin, keys, columns, counts, lowest, full, rounding, k)
        if counts[o] + _FRESH // 2 > keys.shape[1]:
            counts[o], lowest[o] = -1, np.inf
        if key < lowest[o]:
            return
    keys[o, counts[o]] = key
    columns[o, counts[o]] = column
    counts[o] += 1


@njit(cache=True, nogil=True)
def _thin(o, half, margin, keys, columns, counts, lowest, full, rounding, k):  # type: ignore[no-untyped-def]
    """Keep what is within the margin of the k-th largest."""
    least = keys[o, : counts[o]].copy()
    for t in range(counts[o]):
        least[t] -= rounding * abs(keys[o, t] + half[columns[o, t]])
    low = _kth_largest(least, k) - margin[o]
    kept = 0
    for t in range(counts[o]):
        if keys[o, t] >= low:
            keys[o, kept] = keys[o, t]
            columns[o, kept] = columns[o, t]
            kept += 1
    counts[o], lowest[o] = kept, low
    full[o] = min(kept + _FRESH, keys.shape[1])


@njit(cache=True, nogil=True)
def _last(a, b, own):  # type: ignore[no-untyped-def]
    _, half, margin, keys, columns, counts, lowest, full, rounding, k = own
    for o in range(a, b):
        if counts[o] >= k:
            _thin(o, half, margin, keys, columns, counts, lowest, full, rounding, k)


@njit(cache=True, nogil=True)
def _kth_largest(values, k):  # type: ignore[no-untyped-def]
    """Quickselect, in place."""
    low, high, place = 0, len(values) - 1, k - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if place <= j:
            high = j
        elif place >= i:
            low = i
        else:
            break
    return values[place]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
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


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
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
