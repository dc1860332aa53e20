"""Exact k nearest neighbours among the samples of one layer.

Half of the n x n similarities are computed, once, in float32 or bfloat16 with a proven bound on their error; what the
bound leaves as candidates is compared again in float64.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from numbers import Integral
from threading import Lock
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from repgraph.candidates import Candidates, pair_sums
from repgraph.precision import full_precision
from repgraph.products import add_products_, add_upper_products_, alone
from repgraph.threads import share

Metric = Literal["cosine", "euclidean"]
Screening = Literal["auto", "float32", "bfloat16"]

_FEATURES = 512  # features per product: bounds the rounding error of the sum over all of them
_ROWS = 256  # rows that become bfloat16 at once
_ROUNDING = 2.0**-8  # what bfloat16 may have rounded off a product, as a part of the rounded one
_SAMPLE = 128  # rows at most that tell how crowded the candidates are
_MANY, _NUMBERS = 1024, 2**19  # samples and numbers from which bfloat16 pays
_DEEP = 2**15  # features after which sums go on in float64
_FEW = 8  # rows that are compared with all others without a float64 copy of these
_SPARE = 6  # candidates kept beyond k, so that near ties rarely need the whole row again
_TIE = 2.0**-40  # similarities closer than this are ties; the lowest index wins
_BLOCK, _LEAST, _MOST = 2**25, 32, 2048  # similarities of a block on a GPU, and rows at least and at most
_SIDES = 128, 1024  # rows of a tile, at least and at most
_WORTH = 2**28  # multiply-adds that a thread is worth
_WORKSPACE = 64 * 2**20  # bytes of float64 numbers held at once
_NORM_FLOOR = 1e-8
_SMALL, _LARGE = 1e-15, 1e15  # sizes whose products float32 holds


def knn(
    x: Tensor, k: int, *, metric: Metric = "cosine", screening: Screening = "auto", progress: bool = False
) -> tuple[Tensor, Tensor]:
    r"""The k nearest neighbours of each sample, exact, on the device of x.

    cosine: s_ij = <x_i, x_j> / (max(\|x_i\|, 1e-8) max(\|x_j\|, 1e-8)), in [-1, 1], the k largest; a zero row
    has similarity 0 to everybody. euclidean: d_ij = \|x_i - x_j\|, the k smallest. A sample is never its own
    neighbour; ties with the k-th neighbour (closer than about 1e-12) go to the lowest index.

    Parameters
    ----------
    x
        Samples, shape (n, ...); trailing axes are flattened to d features. Other than floating types become
        float32, and so do float16 and bfloat16; float64 is used as it is.
    k
        Neighbours per sample, 1 <= k < n.
    metric
        "cosine" (default) or "euclidean".
    screening
        In what products are computed before candidates are compared in float64; the result is the same. "float32" (or
        float64, if x is); "bfloat16", of rows less their mean, on a CPU and for float32; "auto" takes it where the CPU
        has instructions that halve the time of a product, as measured once, from 1024 samples and 2^19 numbers on.
    progress
        Show a bar of the rows: each counts once, and again where it is compared with all others.

    Returns
    -------
    values : Tensor
        Shape (n, k): cosine similarities, falling, or distances, rising. float32, or float64 if x is.
    indices : Tensor
        Shape (n, k), int64.

    Raises
    ------
    ValueError
        If x has fewer than two axes, no features, or NaN or infinite values; if k is out of range or the
        metric unknown.

    Notes
    -----
    The neighbour sets are those of float64 arithmetic on the given features, for any size of tiles and number of
    threads; on a CPU the values are, too. Time: n^2 d / 2 multiply-adds in the type of x, plus the float64 comparisons
    of a few candidates of each row, but of a row with all others where too many of them are within the error of one
    another, as when every similarity agrees to about 1e-5 (a huge common offset). Memory beyond x: on a CPU
    1024 x 1024 similarities a thread, 2 k + 96 candidates of a row, and about 100 MiB: 0.2 GB for n = 50,000; on a GPU
    a block of 2^25 similarities (32 n for n > 2^20). A copy of x for distances, half a copy in bfloat16. An interrupt
    ends the search after the tiles at work.

    On a CPU each of torch's threads (`torch.set_num_threads`) computes one tile of similarities after the other, by
    SciPy's BLAS, which is kept to one thread meanwhile, or by torch in bfloat16; each row keeps what lies within twice
    the error of its k-th best so far, in a compiled pass over every tile. In bfloat16
    the error of <w_i, w_j>, w the rows less their mean m, is below e_i \|w_j\| + \|v_i\| e_j + d u \|v_i\| \|v_j\|,
    with v_i = w_i rounded and e_i = \|w_i - v_i\| as measured, before it is rounded to s_ij: that adds 2^-8 |s_ij| at
    most, so that j is left out where s_ij + 2^-8 |s_ij| is less than the k-th largest of s_ic - 2^-8 |s_ic| by twice
    the error. The terms <w, m> are kept in float32. Where many rows have more than k + 80 candidates (tight clusters),
    products are computed in float32 after all.

    The bound in float32: products are summed over chunks of 512 features and the chunks one after the other, so in any
    order inside a chunk the error of a cosine is below (min(512, d) + d/512 + 16) u, u = 2^-24 (2^-53 for float64);
    sums of more than 2^15 features go on in float64, so that d/512 is 64 at most.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    >>> values, indices = knn(x, 1)
    >>> indices.tolist()
    [[1], [2], [1]]
    >>> [round(v, 6) for v in values[:, 0].tolist()]
    [0.6, 0.8, 0.8]
    """
    x = checked(x, k, metric)
    low = _low(x, screening)
    nearest = _nearest_by_cosine if metric == "cosine" else _nearest_by_distance
    bar = tqdm(total=len(x), desc="neighbours", unit="row", disable=not progress, delay=1, leave=False)
    with bar, full_precision(x.device):
        values, indices = nearest(x, k, low, bar)
    return values.to(x.dtype), indices


def largest(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of s (n, n) off the diagonal, falling, and their columns: (n, k) twice.

    Ties go to the lowest index.

    Raises
    ------
    ValueError
        If s is not square or not finite, or k is out of range.
    """
    n = len(s := as_samples(checked(s, k, "cosine")))
    if s.shape[1] != n:
        raise ValueError(f"precomputed similarities must have shape (n, n), got {tuple(s.shape)}")
    values, indices = s.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=s.device)
    rows = max(1, _WORKSPACE // (16 * n))
    for i in range(0, n, rows):
        part = s[i : i + rows].clone()
        part.diagonal(i).fill_(-torch.inf)
        kth = part.topk(k, dim=1).values[:, -1:]
        above, ties = part > kth, part == kth
        ties &= ties.cumsum(1) <= k - above.sum(1, keepdim=True)
        columns = (above | ties).nonzero()[:, 1].view(len(part), k)
        values[i : i + rows], order = part.gather(1, columns).sort(dim=1, descending=True, stable=True)
        indices[i : i + rows] = columns.gather(1, order)
    return values, indices


def nearest_among(
    x: Tensor, others: Tensor, k: int, metric: Metric, some: Tensor, whole: Tensor
) -> tuple[Tensor, Tensor]:
    """As `knn`: of `some` rows the k nearest of the given others (n, m), -1 = nobody, of `whole` ones those of all."""
    given = x.dtype
    if metric == "cosine":
        x, scale, _ = _with_norms(x)
    else:
        x, power = _rescaled(x.reshape(1, -1))
        x = x.reshape(len(others), -1)
        scale = torch.ones_like(power).expand(len(x))
    nobody = others.new_full((len(x), max(0, k - others.shape[1])), -1)
    others = torch.cat((others, nobody), 1)
    bar = tqdm(disable=True)
    values, indices = _refined(x, scale, scale.new_zeros(others.shape), others, k, some, whole, metric, bar)
    return (values.clamp(-1, 1) if metric == "cosine" else -values / power).to(given), indices


def _with_norms(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose products stay in range, by what their products are divided by, (n,), and which rows are 0."""
    norm = row_norms(x)
    if not norm.isfinite().all():
        _refuse_infinite(x)
    zero = norm == 0
    power = torch.ones_like(norm)
    least, high = norm.aminmax()
    if high > _LARGE or (least < _SMALL and (x.dtype == torch.float64 or norm.masked_fill(zero, 1).min() < _SMALL)):
        x, power = _rescaled(x)
        norm = row_norms(x)
        zero = norm == 0
    return x, torch.maximum(norm, _NORM_FLOOR * power), zero


def _nearest_by_cosine(x: Tensor, k: int, low: bool, bar: tqdm[Any]) -> tuple[Tensor, Tensor]:
    n = len(x)
    x, scale, zero = _with_norms(x)
    factor = scale.reciprocal().to(x.dtype)
    found = _rough_candidates(x, factor, None, k, zero, bar) if low else None
    values, indices, some, whole = found or _candidates(x, factor, None, k, zero, bar)
    if zero.any():  # a zero row ties with everybody at 0: its neighbours are the first others
        first = torch.arange(k, device=x.device).expand(n, k)
        indices[zero, :k] = (first + (first >= torch.arange(n, device=x.device)[:, None]))[zero]
        values[zero] = 0
    values, nearest = _refined(x, scale, values, indices, k, some, whole, "cosine", bar)
    return values.clamp(-1, 1), nearest


def _nearest_by_distance(x: Tensor, k: int, low: bool, bar: tqdm[Any]) -> tuple[Tensor, Tensor]:
    n, d = x.shape
    x, power = _rescaled(x.reshape(1, -1))
    x = x.reshape(n, d)
    features = max(1, _WORKSPACE // (8 * n))  # the mean in float64 makes a copy
    z = x - torch.cat([part.mean(0, dtype=torch.float64) for part in torch.split(x, features, 1)]).to(x.dtype)
    largest = row_norms(z).amax().clamp_min(torch.finfo(x.dtype).tiny)
    if not largest.isfinite():
        _refuse_infinite(x)
    z /= largest  # rows within the unit ball, where the bound holds
    nobody = torch.zeros(n, dtype=torch.bool, device=x.device)
    half = row_norms(z).square().to(x.dtype) / 2
    found = _rough_candidates(z, None, half, k, nobody, bar) if low else None
    values, indices, _, whole = found or _candidates(z, None, half, k, nobody, bar)
    del z
    # Every row is refined: float32 loses the digits of distances to cancellation.
    values, nearest = _refined(x, torch.ones_like(power).expand(n), values, indices, k, ~whole, whole, "euclidean", bar)
    return -values / power, nearest


def _candidates(
    z: Tensor, factor: Tensor | None, half: Tensor | None, k: int, settled: Tensor, bar: tqdm[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_screen` compares, falling, and whose, (n, m); rows to compare among these, rows to compare with all."""
    n = len(z)
    if z.device.type == "cpu":
        factor = z.new_ones(n) if factor is None else factor
        half = z.new_zeros(n) if half is None else half
        found = Candidates(k, factor, half, torch.full((n,), 2 * _error(z), dtype=torch.float64))
        return _compared(found, settled, z, lambda rows, others, out: _tile(z, rows, others, out), alone, bar)
    m = min(k + _SPARE, n - 1)
    values, indices = _screen(z, factor, half, m, _block(n), bar)
    near = values[:, k - 1] - 2 * _error(z)
    whole = ~settled & (values[:, -1] >= near) if m < n - 1 else torch.zeros_like(settled)
    some = ~settled & ~whole & (values[:, k] >= near) if m > k else torch.zeros_like(settled)
    return values, indices, some, whole


def _rough_candidates(
    x: Tensor, factor: Tensor | None, half: Tensor | None, k: int, settled: Tensor, bar: tqdm[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """As `_candidates`, from products in bfloat16; None where these leave too many rows open."""
    n, d = x.shape
    total = torch.zeros(d, dtype=torch.float64)
    step = max(1, min(_ROWS, _WORKSPACE // (8 * d)))
    for i in range(0, n if factor is not None else 0, step):
        total += factor[i : i + step].double() @ x[i : i + step].double()  # type: ignore[index]
    mean = (total / n).float()
    rows = torch.empty(n, d, dtype=torch.bfloat16)
    shift, size, rounded, error = torch.empty(4, n, dtype=torch.float64)
    for i in range(0, n, step):
        part = slice(i, i + step)
        w = x[part] - mean if factor is None else x[part] * factor[part, None] - mean
        rows[part] = w.bfloat16()
        v = rows[part].float()
        shift[part] = w.double() @ mean.double()
        size[part], rounded[part], error[part] = (torch.linalg.vector_norm(y.double(), dim=1) for y in (w, v, w - v))
    u = torch.finfo(torch.float32).eps / 2
    # the last term: rounding of the scaled rows, of what is subtracted, of the sums of both, and of the thresholds
    bound = error * size.max() + rounded * (error.max() + (d + 8) * u * rounded.max()) + 48 * u
    away = -shift.float() if half is None else half
    some = torch.linspace(0, n - 1, max(1, min(n // 16, _SAMPLE))).long()
    s = _upper(rows[some] @ rows.T)
    found = Candidates(k, torch.ones(n), away, 2 * bound, 2 * _ROUNDING / (1 - _ROUNDING))
    if found.crowded(s, some):
        return None

    def product(some: slice, others: slice, out: Tensor) -> Tensor:
        return _upper(rows[some] @ rows[others].T, out)

    return _compared(found, settled, x, product, _one_thread, bar)


def _upper(s: Tensor, out: Tensor | None = None) -> Tensor:
    """The most that may have been rounded to s in bfloat16, in float32; s is used up."""
    out = s.float() if out is None else out.copy_(s)
    return out.add_(s.abs_(), alpha=_ROUNDING)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products by torch are computed in the thread that asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compared(
    found: Candidates,
    settled: Tensor,
    x: Tensor,
    product: Callable[[slice, slice, Tensor], Tensor],
    limit: Callable[[], AbstractContextManager[None]],
    bar: tqdm[Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_candidates` gives; `product` sets a tile of rows by rows.

    Each thread takes one tile after the other, computes it alone and lets it compete: at any time at most one of them
    adds to the candidates of a row.
    """
    n, d = x.shape
    threads = min(torch.get_num_threads(), -(-n * n * (d + 100) // _WORTH))
    side = max(_SIDES[0], min(_SIDES[1], -(-n // threads)))
    count = -(-n // side)
    tiles = deque((p, p + q) for q in (*range(1, count), 0) for p in range(count - q))
    locks, counting, done = [Lock() for _ in range(count)], Lock(), 0
    found.skip(settled)

    def work(parts: Iterator[tuple[int, int]]) -> None:
        nonlocal done
        space = x.new_empty(min(side, n) ** 2)
        with limit():
            for p, q in parts:
                rows, others = (slice(at * side, min((at + 1) * side, n)) for at in (p, q))
                shape = rows.stop - rows.start, others.stop - others.start
                s = product(rows, others, space[: shape[0] * shape[1]].view(shape))
                with locks[q]:
                    found.add_columns(s, rows.start, others.start)
                with locks[p]:
                    found.add_rows(s, rows.start, others.start)
                with counting:
                    done += s.numel() * (1 if p == q else 2)
                    bar.update(done // n - bar.n)

    share(tiles, work, threads)
    indices, whole = found.found()
    whole &= ~settled
    return x.new_zeros(indices.shape), indices, ~settled & ~whole, whole


def _refined(
    x: Tensor,
    scale: Tensor,
    values: Tensor,
    indices: Tensor,
    k: int,
    some: Tensor,
    whole: Tensor,
    metric: Metric,
    bar: tqdm[Any],
) -> tuple[Tensor, Tensor]:
    """The k best of each row, compared in float64: among its candidates for `some` rows, among all for `whole` ones."""
    n, d = x.shape
    best, nearest = values[:, :k].double(), indices[:, :k].clone()
    for rows in _parts(some, indices.shape[1] * min(d, _FEATURES)):
        others = indices.index_select(0, rows).sort(1).values
        scores, others = _best(_pair_scores(x, scale, rows, others, metric), others, k, metric)
        best.index_copy_(0, rows, scores)
        nearest.index_copy_(0, rows, others)
    bar.total = n + int(whole.sum())
    for rows in _parts(whole, 2 * n):
        others = torch.arange(n, device=x.device).expand(len(rows), n)
        best[rows], nearest[rows] = _best(_row_scores(x, scale, rows, metric), others, k, metric)
        bar.update(len(rows))
    nearest, order = nearest.sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, nearest.gather(1, order)


def _low(x: Tensor, screening: str) -> bool:
    """Whether products are computed in bfloat16."""
    if screening not in get_args(Screening):
        raise ValueError(f"screening must be one of {', '.join(get_args(Screening))}, got {screening!r}")
    possible = x.device.type == "cpu" and x.dtype == torch.float32
    if screening == "bfloat16" and not possible:
        raise ValueError(f"screening='bfloat16' needs float32 on a CPU, got {x.dtype} on {x.device}")
    if screening != "auto":
        return screening == "bfloat16"
    return possible and len(x) >= _MANY and x.numel() >= _NUMBERS and _bfloat16_is_fast()


@cache
def _bfloat16_is_fast() -> bool:
    """Whether products in bfloat16 take half the time of float32 at most: not with every CPU that has instructions."""
    if not any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")):
        return False
    seconds: dict[torch.dtype, float] = {}
    with _one_thread(), full_precision(torch.device("cpu")):
        for _ in range(3):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.ones(512, 512, dtype=dtype)
                start = time.perf_counter()
                x @ x.T
                seconds[dtype] = min(time.perf_counter() - start, seconds.get(dtype, math.inf))
    return seconds[torch.bfloat16] <= seconds[torch.float32] / 2


def checked(x: Tensor, k: int, metric: str) -> Tensor:
    """As `as_samples`, but for NaN and infinite values; ValueError if k is out of range or the metric unknown."""
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    x = _rows(x)
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k < len(x):
        raise ValueError(f"k must be an integer with 1 <= k < n, got k = {k!r} with n = {len(x)} samples")
    return x


def as_samples(x: Tensor) -> Tensor:
    """Features as a finite (n, d) tensor of float32, or float64 where x is; x itself where it is that already.

    Raises
    ------
    ValueError
        If x has fewer than two axes, no features, or NaN or infinite values.
    """
    x = _rows(x)
    if not x.sum().isfinite():  # the sum of finite numbers may overflow
        _refuse_infinite(x)
    return x


def _rows(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.is_complex():
        raise ValueError(f"x must be a real torch tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.ndim < 2 or x[:1].numel() == 0:
        raise ValueError(f"x must have shape (n, ...) with n samples of at least one feature, got {tuple(x.shape)}")
    x = x.detach().flatten(1)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _refuse_infinite(x: Tensor) -> None:
    if bad := int((~x.isfinite()).any(1).sum()):
        raise ValueError(f"x must be finite, got NaN or infinite values in {bad} of {len(x)} samples")


def _block(n: int) -> int:
    """Rows per block."""
    return min(_MOST, max(_LEAST, _BLOCK // n))


def _error(x: Tensor) -> float:
    """Bound on the error of what is compared, for rows of norm 1 at most; no less than the width of a tie."""
    d = x.shape[1]
    chunks = min(d, _DEEP) if x.dtype == torch.float32 else d
    return max((min(d, _FEATURES) + chunks / _FEATURES + 16) * torch.finfo(x.dtype).eps / 2, _TIE)


def row_norms(x: Tensor) -> Tensor:
    """Euclidean norms of the rows in float64, (n,), without a float64 copy of x."""
    if x.device.type == "cpu":
        rows = torch.arange(len(x))
        return pair_sums(x, rows, rows[:, None], "cosine")[:, 0].sqrt()
    squares = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    step = max(1, _WORKSPACE // (8 * _FEATURES))
    for i in range(0, len(x), step):
        for f in range(0, x.shape[1], _FEATURES):
            part = x[i : i + step, f : f + _FEATURES].double()
            squares[i : i + step] += torch.linalg.vector_norm(part, dim=1).square()
    return squares.sqrt()


def _rescaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row times a power of two, which changes no digit, where its products might leave the range of its type."""
    low, high = x.aminmax(dim=1)
    peak = torch.maximum(-low, high).double()
    outside = (peak > _LARGE) | ((peak < _SMALL) & (peak > 0))
    power = torch.exp2(-torch.frexp(peak).exponent.clamp(-1000, 1000).double()).masked_fill(~outside, 1)
    return ((x * power[:, None]).to(x.dtype) if outside.any() else x), power


def _products(a: Tensor, b: Tensor) -> Tensor:
    """The products of the rows of a with those of b."""
    out = a.new_empty(len(a), len(b))
    return _summed(out, a.shape[1], lambda part, beta: add_products_(out, a[:, part], b[:, part], beta=beta))


def _tile(x: Tensor, rows: slice, others: slice, out: Tensor) -> Tensor:
    """Products of rows of x with others, into `out`; of rows with themselves at least those right of the diagonal."""
    a, b = x[rows], x[others]
    if rows == others:
        return _summed(out, a.shape[1], lambda part, beta: add_upper_products_(out, a[:, part], beta=beta))
    return _summed(out, a.shape[1], lambda part, beta: add_products_(out, a[:, part], b[:, part], beta=beta))


def _summed(out: Tensor, d: int, add: Callable[[slice, float], object]) -> Tensor:
    """`out`, to which chunks of features are added; of many features, sums of several chunks in float64."""
    if d <= _DEEP or out.dtype == torch.float64:
        for f in range(0, d, _FEATURES):
            add(slice(f, f + _FEATURES), float(f > 0))
        return out
    total = torch.zeros_like(out, dtype=torch.float64)
    for f in range(0, d, _FEATURES):
        add(slice(f, f + _FEATURES), float(f % _DEEP > 0))
        if (f + _FEATURES) % _DEEP == 0 or f + _FEATURES >= d:
            total += out
    return out.copy_(total)


def _screen(
    z: Tensor, factor: Tensor | None, half: Tensor | None, m: int, block: int, bar: tqdm[Any]
) -> tuple[Tensor, Tensor]:
    """The m largest of each row of factor_i factor_j <z_i, z_j> - half_i - half_j, self excluded, and their columns.

    z is (n, d), factor and half are (n,); the result is (n, m) twice. Each pair is computed once.
    """
    n = len(z)
    values = z.new_full((n, m), -torch.inf)
    indices = torch.zeros((n, m), dtype=torch.int64, device=z.device)
    for i in range(0, n, block):
        j = min(i + block, n)
        s = _products(z[i:j], z[i:])  # (block, n - i)
        if factor is not None:
            s.mul_(factor[i:j, None]).mul_(factor[None, i:])
        if half is not None:
            s.sub_(half[i:j, None]).sub_(half[None, i:])
        s.fill_diagonal_(-torch.inf)
        _merge(values[i:j], indices[i:j], s, i)
        if j < n:
            _merge(values[j:], indices[j:], s[:, j - i :].T.contiguous(), i)
        bar.update(j - i)
    return values, indices


def _merge(values: Tensor, indices: Tensor, s: Tensor, offset: int) -> None:
    """Let the columns offset, offset + 1, ... of s compete with the best of each row so far; in place."""
    m = values.shape[1]
    best, column = s.topk(min(m, s.shape[1]), dim=1)
    if offset == 0 and best.shape[1] == m:  # the first columns have no competitors yet
        values.copy_(best)
        indices.copy_(column)
        return
    best, order = torch.cat((values, best), 1).topk(m, dim=1)
    indices.copy_(torch.cat((indices, column + offset), 1).gather(1, order))
    values.copy_(best)


def _parts(rows: Tensor, floats: int) -> tuple[Tensor, ...]:
    """The chosen rows, in parts that need at most the workspace at `floats` float64 numbers a row."""
    chosen = rows.nonzero()[:, 0]
    return torch.split(chosen, max(1, _WORKSPACE // (8 * floats))) if len(chosen) else ()


def _best(scores: Tensor, others: Tensor, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and whose they are; of those that tie with the k-th, the lowest indices."""
    kth = scores.topk(k, dim=1).values[:, -1:]
    tie = _TIE if metric == "cosine" else _TIE * kth.abs()
    group = (scores <= kth + tie).long() + (scores < kth - tie)  # 0 is in, 1 ties, 2 is out
    order = ((group << 32) + others).argsort(dim=1)[:, :k]
    return scores.gather(1, order), others.gather(1, order)


def _pair_scores(x: Tensor, scale: Tensor, rows: Tensor, others: Tensor, metric: Metric) -> Tensor:
    """Cosines, or minus distances, of rows (r,) with others (r, m) in float64: (r, m)."""
    if x.device.type == "cpu":
        sums = pair_sums(x, rows, others, metric)
        # Not scale[others], nor best[rows] = ...: for these torch starts threads, in the way of those of products.
        own, other = (scale.index_select(0, at.flatten().clamp_min(0)) for at in (rows, others))
        return _scores(sums, own[:, None], other.view_as(others), metric).masked_fill(others < 0, -torch.inf)
    scores = torch.zeros(others.shape, dtype=torch.float64, device=x.device)
    for f in range(0, x.shape[1], _FEATURES):
        part = x[:, f : f + _FEATURES]
        a = part[rows].double()  # (r, f)
        b = part[others].double()  # (r, m, f)
        scores += (b @ a[:, :, None])[:, :, 0] if metric == "cosine" else (b - a[:, None]).square().sum(2)
    return _scores(scores, scale[rows, None], scale[others], metric)


def _row_scores(x: Tensor, scale: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """As `_pair_scores`, of rows (r,) with every sample; self is -inf: (r, n)."""
    n, d = x.shape
    if x.device.type == "cpu" and len(rows) <= _FEW:
        others = torch.arange(n).expand(len(rows), n)
        return _pair_scores(x, scale, rows, others, metric).scatter_(1, rows[:, None], -torch.inf)
    scores = torch.zeros((len(rows), n), dtype=torch.float64, device=x.device)
    features = max(1, min(_FEATURES, _WORKSPACE // (8 * n)))
    for f in range(0, d, features):
        b = x[:, f : f + features].double()  # (n, f)
        if metric == "cosine":
            scores.addmm_(b[rows], b.T)
        else:
            scores += torch.cdist(b[rows], b, compute_mode="donot_use_mm_for_euclid_dist").square()
    return _scores(scores, scale[rows, None], scale, metric).scatter(1, rows[:, None], -torch.inf)


def _scores(sums: Tensor, scale_i: Tensor, scale_j: Tensor, metric: Metric) -> Tensor:
    return sums / scale_i / scale_j if metric == "cosine" else -sums.sqrt()
