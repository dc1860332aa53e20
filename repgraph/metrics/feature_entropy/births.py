"""When the first hole appears in a feature map read as a weighted graph (feature_birth)."""

from __future__ import annotations

from numbers import Integral
from typing import Literal

import numpy as np
import torch
from numba import njit
from torch import Tensor

from repgraph.threads import share_range

Preset = Literal["zhao2022"]

_DENSITY = 0.8
_ZHAO_MAX_RANK = 51  # the authors' 0-based index 50


def feature_birth(
    maps: Tensor | np.ndarray,
    *,
    max_rank: int | None = None,
    density: float = _DENSITY,
    preset: Preset | None = None,
    backend: Literal["unionfind", "gudhi"] = "unionfind",
) -> Tensor:
    """Birth of the first hole of each square feature map: the rank of the edge weight at which it appears, 0 if none.

    Row i and column i of a map are the same vertex. Edge {i, j}, i < j, has weight max(U[i, j], U[j, i]); the diagonal
    gives none. Edges enter strongest first, equal weights together: frame v adds all edges of the v-th largest
    distinct weight. The birth is min{v : beta_1(v) > 0}, beta_1 the first Betti number over Z/2 of the clique complex
    at the end of frame v.

    Parameters
    ----------
    maps
        Feature maps, shape (..., m, m), m >= 4, finite. Compared as they are: half precision makes ties, which move
        births.
    max_rank
        A birth later than this counts as none; no limit by default.
    density
        Frames after the ceil(density m (m - 1) / 2)-th are ignored, in (0, 1]. It counts distinct weights, not edges.
    preset
        "zhao2022": the authors' limits, max_rank=51 and density=0.8. They suit m = 14: larger maps are born later.
    backend
        "unionfind" (compiled) or "gudhi" (one simplex tree for each map, slow: the reference).

    Returns
    -------
    Tensor
        Births, shape (...), int64, on the CPU, where the maps are moved: 1-based rank, 0 where there is no birth.

    Raises
    ------
    ValueError
        If the maps are not square, smaller than 4 x 4 or not finite, density is outside (0, 1], max_rank is below 1,
        or backend or preset is unknown.

    Notes
    -----
    The birth is the first edge that joins two vertices that are connected already and have no common neighbour: with
    one, the edge is filled in along the suspension of a non-empty set, and no cycle appears. This takes union-find and
    one bit mask per edge. Where several edges of one frame are tied and one of them triggers, the Betti number
    at the end of the frame decides, by elimination over Z/2. Edges come from a heap, so that few are ordered. Time
    about m^2 per map, on all threads that torch uses; memory m^2 numbers per thread (and up to m^4 / 4 bits where ties
    are decided).

    Unchanged by increasing functions of the values, by transposing, and by one permutation of rows and columns
    together; changed by flips and shifts.

    References
    ----------
    Zhao, Zhang, "Quantitative Performance Assessment of CNN Units via Topological Entropy Calculation", ICLR 2022,
    arXiv 2103.09716. Ranks follow the authors' code (distinct off-diagonal values); it returns the rank less 1 and
    uses 0 for "none" too, which loses births in the first frame. Here ranks start at 1.

    Examples
    --------
    A square closes with its fourth edge, before a chord does:

    >>> u = torch.zeros(4, 4)
    >>> u[0, 1], u[1, 2], u[2, 3], u[0, 3], u[1, 3], u[0, 2] = 9, 8, 7, 6, 2, 1
    >>> feature_birth(u)
    tensor(4)
    """
    x = _checked(maps)
    max_rank, density = limits(max_rank, density, preset)
    if backend not in ("unionfind", "gudhi"):
        raise ValueError(f"backend must be 'unionfind' or 'gudhi', got {backend!r}")
    last = int(np.ceil(density * (x.shape[-1] * (x.shape[-1] - 1) // 2)))
    last = last if max_rank is None else min(last, max_rank)
    shape, flat = x.shape[:-2], x.reshape(-1, *x.shape[-2:])
    births = np.zeros(len(flat), np.int64)
    if backend == "gudhi":
        for number, one in enumerate(flat):
            births[number] = _birth_by_gudhi(one, last)
    else:
        share_range(0, len(flat), lambda a, b: _births(flat[a:b], last, births[a:b]), 64)
    return torch.from_numpy(births.reshape(shape))


def limits(max_rank: int | None, density: float, preset: Preset | None) -> tuple[int | None, float]:
    """The limits that a preset stands for, or those given.

    Raises
    ------
    ValueError
        If one is out of range, or both a preset and other limits are given.
    """
    if preset not in (None, "zhao2022"):
        raise ValueError(f"preset must be 'zhao2022' or None, got {preset!r}")
    if isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, Integral) or max_rank < 1):
        raise ValueError(f"max_rank must be an integer of at least 1, got {max_rank!r}")
    if preset is None:
        return max_rank, density
    if max_rank not in (None, _ZHAO_MAX_RANK) or density != _DENSITY:
        raise ValueError(f"preset={preset!r} sets max_rank and density: pass either the preset or these")
    return _ZHAO_MAX_RANK, _DENSITY


def _checked(maps: Tensor | np.ndarray) -> np.ndarray:
    """The maps as a C-ordered array of float32, float64 or int64 that tells apart what they tell apart."""
    if isinstance(maps, Tensor):
        x = maps.detach().cpu()
        array = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
    else:
        array = np.asarray(maps)
    if array.ndim < 2 or array.shape[-1] != array.shape[-2]:
        raise ValueError(
            f"maps must be square, (..., m, m), got shape {array.shape}: rows and columns are the same vertices; "
            "resize or crop rectangular maps to a square first, and say so"
        )
    if array.shape[-1] < 4:
        raise ValueError(f"maps must be at least 4 x 4 (no smaller graph has a hole), got shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"maps must be real numbers, got {array.dtype}")
    if array.dtype.kind == "f":
        array = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32, copy=False)
        if not np.isfinite(array).all():
            raise ValueError("maps must be finite, got NaN or infinite values")
    elif array.dtype.kind == "u" and array.dtype.itemsize == 8:
        array = (array.astype(np.uint64, copy=False) ^ np.uint64(2**63)).view(np.int64)  # in the same order
    else:
        array = array.astype(np.int64)
    return np.require(array, requirements=["C", "W"])


@njit(cache=True, nogil=True)
def _births(maps: np.ndarray, last: int, births: np.ndarray) -> None:
    count, m = maps.shape[0], maps.shape[1]
    edges = m * (m - 1) // 2
    words = (m + 63) // 64
    weight = np.empty(edges, maps.dtype)
    order = np.empty(edges, np.int32)  # a heap of edges, the strongest on top
    first, second = np.empty(edges, np.int32), np.empty(edges, np.int32)
    e = 0
    for j in range(m):
        for i in range(j):
            first[e], second[e] = i, j
            e += 1
    parent = np.empty(m, np.int32)
    near = np.empty((m, words), np.uint64)
    for number in range(count):
        u = maps[number]
        for e in range(edges):
            i, j = first[e], second[e]
            weight[e] = max(u[i, j], u[j, i])
            order[e] = e
        for e in range(edges // 2 - 1, -1, -1):
            _sift(order, weight, e, edges)
        parent[:] = np.arange(m)
        near[:] = 0
        left, components, entered, frame, birth = edges, m, 0, 0, 0
        while left > 0 and frame < last and birth == 0:
            frame += 1
            value = weight[order[0]]
            triggers, in_frame = 0, 0
            while left > 0 and weight[order[0]] == value:
                e = order[0]
                left -= 1
                order[0] = order[left]
                _sift(order, weight, 0, left)
                i, j = first[e], second[e]
                a, b = _root(parent, i), _root(parent, j)
                if a != b:
                    parent[a] = b
                    components -= 1
                else:
                    common = False
                    for word in range(words):
                        common |= (near[i, word] & near[j, word]) != 0
                    triggers += not common
                near[i, j >> 6] |= np.uint64(1) << np.uint64(j & 63)
                near[j, i >> 6] |= np.uint64(1) << np.uint64(i & 63)
                in_frame += 1
            entered += in_frame
            # The complete graph has no hole.
            if triggers > 0 and left > 0 and (in_frame == 1 or _has_hole(near.copy(), m, first, second)):
                birth = frame
        births[number] = birth


@njit(cache=True, nogil=True)
def _sift(order: np.ndarray, weight: np.ndarray, at: int, size: int) -> None:
    """Let an edge sink in the heap to its place."""
    edge = order[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and weight[order[child + 1]] > weight[order[child]]:
            child += 1
        if weight[order[child]] <= weight[edge]:
            break
        order[at] = order[child]
        at = child
    if size > 0:
        order[at] = edge


@njit(cache=True, nogil=True)
def _root(parent: np.ndarray, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def _has_hole(near: np.ndarray, m: int, first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the clique complex of a graph has a first Betti number above 0 over Z/2.

    Dominated vertices, whose closed neighbourhood lies in another's, go first: that changes no homology. What is left
    has a hole unless the boundaries of its triangles span its cycles.
    """
    words = near.shape[1]
    one = np.uint64(1)
    alive = np.ones(m, np.bool_)
    again = True
    while again:
        again = False
        for v in range(m):
            if not alive[v]:
                continue
            for w in range(m):
                if w == v or not alive[w] or not (near[v, w >> 6] >> np.uint64(w & 63)) & one:
                    continue
                inside = True
                for word in range(words):
                    others = near[v, word] & ~near[w, word]
                    if word == w >> 6:
                        others &= ~(one << np.uint64(w & 63))
                    inside = inside and others == 0
                if inside:
                    alive[v] = False
                    again = True
                    for word in range(words):
                        near[v, word] = 0
                    for x in range(m):
                        near[x, v >> 6] &= ~(one << np.uint64(v & 63))
                    break
    number = np.full((m, m), -1, np.int32)  # of each edge that is left
    parent = np.arange(m).astype(np.int32)
    edges, joins = 0, 0
    for e in range(len(first)):
        i, j = first[e], second[e]
        if (near[i, j >> 6] >> np.uint64(j & 63)) & one:
            number[i, j] = number[j, i] = edges
            edges += 1
            a, b = _root(parent, i), _root(parent, j)
            if a != b:
                parent[a] = b
                joins += 1
    cycles = edges - joins
    if cycles == 0:
        return False
    wide = (edges + 63) // 64
    pivots = np.zeros((edges, wide), np.uint64)  # row e: a reduced boundary whose lowest edge is e
    taken = np.zeros(edges, np.bool_)
    row = np.empty(wide, np.uint64)
    for k in range(m):
        for j in range(k):
            if number[j, k] < 0:
                continue
            for i in range(j):
                if number[i, j] < 0 or number[i, k] < 0:
                    continue
                row[:] = 0
                for e in (number[i, j], number[i, k], number[j, k]):
                    row[e >> 6] ^= one << np.uint64(e & 63)
                word = 0
                while word < wide:
                    if row[word] == 0:
                        word += 1
                        continue
                    e = word * 64 + _lowest(row[word])
                    if not taken[e]:
                        pivots[e] = row
                        taken[e] = True
                        cycles -= 1
                        break
                    for rest in range(word, wide):
                        row[rest] ^= pivots[e, rest]
                if cycles == 0:
                    return False
    return True


@njit(cache=True, nogil=True)
def _lowest(word: int) -> int:
    """Place of the lowest bit of a word that has one."""
    at = 0
    while not (word >> np.uint64(at)) & np.uint64(1):
        at += 1
    return at


def _birth_by_gudhi(u: np.ndarray, last: int) -> int:
    import gudhi

    m = len(u)
    i, j = np.triu_indices(m, 1)
    weight = np.maximum(u, u.T)[i, j]
    rank = np.unique(-weight, return_inverse=True)[1] + 1
    tree = gudhi.SimplexTree()
    for vertex in range(m):
        tree.insert([vertex], 0)
    for a, b, frame in zip(i, j, rank, strict=True):
        if frame <= last:
            tree.insert([int(a), int(b)], float(frame))
    tree.expansion(2)
    # Without it gudhi skips the homology of the top dimension: of dimension 1 where no triangle exists.
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=True)
    births = tree.persistence_intervals_in_dimension(1)
    return int(births[:, 0].min()) if len(births) else 0
