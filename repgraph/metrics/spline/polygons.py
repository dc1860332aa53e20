"""Convex polygons cut by lines, compiled: the cells of a plane, their areas and their neighbours.

Polygon p has the vertices vertices[offsets[p]:offsets[p + 1]], counterclockwise; label i is that of the edge from
vertex i to the next: the number of the cut that made it, -1 on the border of the domain, whose size is about 1.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ON = 1e-12  # of the size of the domain: nearer than this is on the line
_NOISE = 1e-14  # of the largest value met: rounding
_SAME = 1e-9  # of the size of the domain: two lines nearer than this are one
_VANISHES = 1e-12  # of the largest value met: a function no larger than this is 0 but for rounding


@njit(cache=True, nogil=True)
def cut_by_signs(
    vertices: np.ndarray,
    labels: np.ndarray,
    offsets: np.ndarray,
    z: np.ndarray,
    size: np.ndarray,
    label: int,
    limit: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Cut each polygon by the zeros of its affine functions.

    z (3, polygons, units) are their values at u = (0, 0), (1, 0) and (0, 1); size (polygons,) the largest absolute
    values met so far. Returns the pieces (vertices, labels, offsets), their
    parents, their bits (pieces, units), and the next free label; more than `limit` pieces end it early.
    """
    units = z.shape[2]
    count = len(offsets) - 1
    starts, lengths, parents = offsets[:-1].copy(), np.diff(offsets), np.arange(count)
    bits = np.zeros((count, units), np.bool_)
    filled = len(vertices)
    for p in range(z.shape[1]):
        fresh = count  # the pieces of this polygon are itself and those from here on
        for k in range(units):
            c, s, t = z[0, p, k], z[1, p, k] - z[0, p, k], z[2, p, k] - z[0, p, k]
            if max(abs(c), abs(c + s), abs(c + t)) <= _VANISHES * size[p]:
                continue
            on = _ON * (abs(s) + abs(t)) + _NOISE * size[p]
            for number in range(1 + count - fresh):
                piece = p if number == 0 else fresh + number - 1
                first, length = starts[piece], lengths[piece]
                above, below = _sides(vertices, first, length, c, s, t, on)
                bits[piece, k] = above
                if not (above and below):
                    continue
                while filled + 2 * length + 4 > len(vertices):
                    vertices, labels = _longer(vertices), _longer(labels)
                if count == len(starts):
                    starts, lengths, parents, bits = _longer(starts), _longer(lengths), _longer(parents), _longer(bits)
                starts[piece] = filled
                lengths[piece] = _side(vertices, labels, first, length, c, s, t, on, label, filled)
                filled += lengths[piece]
                starts[count] = filled
                lengths[count] = _side(vertices, labels, first, length, -c, -s, -t, on, label, filled)
                filled += lengths[count]
                parents[count] = p
                bits[count] = bits[piece]
                bits[count, k] = False
                count += 1
                label += 1
            if count > limit:
                break
    vertices, labels, offsets = _gathered(vertices, labels, starts[:count], lengths[:count])
    return vertices, labels, offsets, parents[:count], bits[:count], label


@njit(cache=True, nogil=True)
def cut_by_largest(
    vertices: np.ndarray,
    labels: np.ndarray,
    offsets: np.ndarray,
    z: np.ndarray,
    size: np.ndarray,
    label: int,
    limit: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Cut each polygon so that in each window one entry is the largest on all of a piece.

    z (3, polygons, windows, entries), -inf outside the image; else as `cut_by_signs`, with one bit per entry.
    """
    windows, entries = z.shape[2], z.shape[3]
    count = len(offsets) - 1
    starts, lengths, parents = offsets[:-1].copy(), np.diff(offsets), np.arange(count)
    bits = np.zeros((count, windows * entries), np.bool_)
    lines = np.empty((entries * entries, 3))
    filled = len(vertices)
    for p in range(z.shape[1]):
        fresh = count
        for w in range(windows):
            known = 0  # lines that cut in this window: pairs of entries that tie on one line make one cut
            for number in range(1 + count - fresh):
                piece = p if number == 0 else fresh + number - 1
                start, length = starts[piece], lengths[piece]
                best = _largest_on_all(z[:, p, w], vertices, start, length, size[p])
                if best >= 0:
                    bits[piece, w * entries + best] = True
                    continue
                found = 0
                for j in range(entries):
                    while filled + (entries + 1) * (length + entries + 2) > len(vertices):
                        vertices, labels = _longer(vertices), _longer(labels)
                    first, got, at = start, length, filled
                    for i in range(entries):
                        if got == 0 or z[0, p, w, j] == -np.inf:
                            got = 0
                        elif i != j and z[0, p, w, i] != -np.inf:
                            c = z[0, p, w, j] - z[0, p, w, i]
                            s, t = z[1, p, w, j] - z[1, p, w, i] - c, z[2, p, w, j] - z[2, p, w, i] - c
                            if max(abs(c), abs(c + s), abs(c + t)) <= _VANISHES * size[p]:
                                got = 0 if i < j else got  # of equal entries the first one wins
                                continue
                            on = _ON * (abs(s) + abs(t)) + _NOISE * size[p]
                            above, below = _sides(vertices, first, got, c, s, t, on)
                            if not above:
                                got = 0
                            elif below:
                                line, known = _line(lines, known, c, s, t)
                                got = _side(vertices, labels, first, got, c, s, t, on, label + line, at)
                                first = at
                                at += got
                    if got < 3:
                        continue
                    target = piece
                    if found:
                        if count == len(starts):
                            starts, lengths, parents = _longer(starts), _longer(lengths), _longer(parents)
                            bits = _longer(bits)
                        target = count
                        parents[target] = p
                        bits[target] = bits[piece]
                        bits[target, w * entries : (w + 1) * entries] = False
                        count += 1
                    starts[target], lengths[target], bits[target, w * entries + j] = first, got, True
                    filled = at
                    found += 1
                if found == 0:  # a sliver that no entry claims beyond rounding
                    bits[piece, w * entries + np.argmax(z[0, p, w])] = True
            label += known
            if count > limit:
                break
    vertices, labels, offsets = _gathered(vertices, labels, starts[:count], lengths[:count])
    return vertices, labels, offsets, parents[:count], bits[:count], label


@njit(cache=True, nogil=True)
def _line(lines: np.ndarray, known: int, c: float, s: float, t: float) -> tuple[int, int]:
    """Number of the line c + s u1 + t u2 = 0 among those known, and how many there are with it."""
    norm = np.sqrt(s * s + t * t) * (1 if s > 0 or (s == 0 and t > 0) else -1)
    a, b, d = s / norm, t / norm, c / norm
    for k in range(known):
        # of opposite sign where the first slope is rounding
        if min(abs(lines[k, 0] - a) + abs(lines[k, 1] - b) + abs(lines[k, 2] - d),
               abs(lines[k, 0] + a) + abs(lines[k, 1] + b) + abs(lines[k, 2] + d)) < _SAME:  # fmt: skip
            return k, known
    lines[known] = a, b, d
    return known, known + 1


@njit(cache=True, nogil=True)
def _gathered(
    vertices: np.ndarray, labels: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The polygons that start at these places, one behind the other."""
    offsets = np.zeros(len(starts) + 1, np.int64)
    offsets[1:] = np.cumsum(lengths)
    out_v, out_l = np.empty((offsets[-1], 2)), np.empty(offsets[-1], np.int64)
    for p in range(len(starts)):
        out_v[offsets[p] : offsets[p + 1]] = vertices[starts[p] : starts[p] + lengths[p]]
        out_l[offsets[p] : offsets[p + 1]] = labels[starts[p] : starts[p] + lengths[p]]
    return out_v, out_l, offsets


@njit(cache=True, nogil=True)
def _sides(vertices: np.ndarray, first: int, length: int, c: float, s: float, t: float, on: float) -> tuple[bool, bool]:
    """Whether a polygon has vertices above and below the line c + s u1 + t u2 = 0."""
    above, below = False, False
    for i in range(first, first + length):
        value = c + s * vertices[i, 0] + t * vertices[i, 1]
        above |= value > on
        below |= value < -on
    return above, below


@njit(cache=True, nogil=True)
def _largest_on_all(z: np.ndarray, vertices: np.ndarray, first: int, length: int, size: float) -> int:
    """The first entry that is the largest at every corner, ties within rounding allowed; -1 if there is none."""
    for j in range(z.shape[1]):
        if z[0, j] == -np.inf:
            continue
        holds = True
        for i in range(z.shape[1]):
            if i != j and holds and z[0, i] != -np.inf:
                c = z[0, j] - z[0, i]
                s, t = z[1, j] - z[1, i] - c, z[2, j] - z[2, i] - c
                on = _ON * (abs(s) + abs(t)) + _NOISE * size
                if max(abs(c), abs(c + s), abs(c + t)) > _VANISHES * size:
                    holds = not _sides(vertices, first, length, c, s, t, on)[1]
        if holds:
            return j
    return -1


@njit(cache=True, nogil=True)
def _side(
    vertices: np.ndarray,
    labels: np.ndarray,
    first: int,
    length: int,
    c: float,
    s: float,
    t: float,
    on: float,
    label: int,
    at: int,
) -> int:
    """Write the part of a polygon where c + s u1 + t u2 >= 0 to place `at` and return its number of vertices."""
    got = 0
    for number in range(length):
        i = first + number
        j = first + (number + 1) % length
        here = c + s * vertices[i, 0] + t * vertices[i, 1]
        there = c + s * vertices[j, 0] + t * vertices[j, 1]
        inside, next_inside = here >= -on, there >= -on
        if inside:
            vertices[at + got] = vertices[i]
            # What leaves a vertex on the line to the outside runs along the line.
            labels[at + got] = label if not next_inside and here <= on else labels[i]
            got += 1
        if (here > on and there < -on) or (here < -on and there > on):
            share = here / (here - there)
            vertices[at + got, 0] = vertices[i, 0] + share * (vertices[j, 0] - vertices[i, 0])
            vertices[at + got, 1] = vertices[i, 1] + share * (vertices[j, 1] - vertices[i, 1])
            labels[at + got] = label if inside else labels[i]
            got += 1
    return got


@njit(cache=True, nogil=True)
def _longer(x: np.ndarray) -> np.ndarray:
    """The same with as much room again, and some more."""
    out = np.zeros((2 * len(x) + 16, *x.shape[1:]), x.dtype)
    out[: len(x)] = x
    return out


@njit(cache=True, nogil=True)
def areas(vertices: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Area of each polygon."""
    out = np.zeros(len(offsets) - 1)
    for p in range(len(out)):
        a = offsets[p]
        for i in range(a + 1, offsets[p + 1] - 1):
            dx, dy = vertices[i, 0] - vertices[a, 0], vertices[i, 1] - vertices[a, 1]
            ex, ey = vertices[i + 1, 0] - vertices[a, 0], vertices[i + 1, 1] - vertices[a, 1]
            out[p] += (dx * ey - dy * ex) / 2
    return out


def neighbours(vertices: np.ndarray, labels: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of polygons that share an edge of positive length, (edges, 2), and the ends of that edge, (edges, 2, 2).

    Two polygons were parted by one cut, and share a border on its segment only: the edges of one cut's label, those of
    both its sides laid over each other.
    """
    cell = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    after = np.arange(1, len(vertices) + 1)
    after[offsets[1:] - 1] = offsets[:-1]
    inner = np.flatnonzero(labels >= 0)
    inner = inner[np.argsort(labels[inner], kind="stable")]
    groups = np.append(np.flatnonzero(np.diff(labels[inner], prepend=-1)), len(inner))
    return _overlaps(vertices[inner], vertices[after[inner]], cell[inner], groups)


@njit(cache=True, nogil=True)
def _overlaps(
    start: np.ndarray, end: np.ndarray, cell: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    pairs, borders = np.empty((len(cell) + 1, 2), np.int64), np.empty((len(cell) + 1, 2, 2))
    found = 0
    direction = np.empty(2)
    for g in range(len(groups) - 1):
        a, b = groups[g], groups[g + 1]
        longest = -1.0
        for i in range(a, b):  # the longest edge of a cut tells its direction best
            length = np.sum((end[i] - start[i]) ** 2)
            if length > longest:
                longest = length
                direction[:] = end[i] - start[i]
        if longest == 0:
            continue
        direction /= np.sqrt(longest)
        low, high = np.empty(b - a), np.empty(b - a)
        same = np.empty(b - a, np.bool_)
        for i in range(a, b):
            t0, t1 = np.sum(start[i] * direction), np.sum(end[i] * direction)
            same[i - a] = t1 > t0
            low[i - a], high[i - a] = min(t0, t1), max(t0, t1)
        order = np.argsort(low)
        one, other = order[same[order]], order[~same[order]]
        i, j = 0, 0
        while i < len(one) and j < len(other):
            x, y = one[i], other[j]
            t0, t1 = max(low[x], low[y]), min(high[x], high[y])
            if t1 - t0 > _ON:
                if found == len(pairs):
                    pairs, borders = _longer(pairs), _longer(borders)
                pairs[found, 0], pairs[found, 1] = cell[a + x], cell[a + y]
                borders[found, 0] = start[a + x] + (t0 - low[x]) * direction
                borders[found, 1] = start[a + x] + (t1 - low[x]) * direction
                found += 1
            if high[x] < high[y]:
                i += 1
            else:
                j += 1
    return pairs[:found], borders[:found]
