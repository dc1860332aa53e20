"""Products of rows with one another, added to a matrix, each in the thread that asks for it.

On a CPU they are those of SciPy's BLAS. Its own threads are not used: they wait for more work for tens of milliseconds
after each product, and whatever comes next has one core less.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import Lock

import torch
from numba.extending import get_cython_function_address
from threadpoolctl import ThreadpoolController
from torch import Tensor


def _blas(routine: str, arguments: int) -> Callable[..., None]:
    """Of the BLAS that SciPy brings: torch has no routine for half of a symmetric product."""
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)
    return kind(get_cython_function_address("scipy.linalg.cython_blas", routine))


_SYRK = {torch.float32: _blas("ssyrk", 10), torch.float64: _blas("dsyrk", 10)}
_GEMM = {torch.float32: _blas("sgemm", 13), torch.float64: _blas("dgemm", 13)}
_NUMBER = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def add_products_(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0) -> Tensor:
    """Set `out` (m, n) to beta times itself plus the products of the rows of a (m, d) with those of b (n, d)."""
    if out.device.type != "cpu":
        return out.addmm_(a, b.T, beta=beta)
    if out.shape != (len(a), len(b)) or a.shape[1] != b.shape[1] or not a.dtype == b.dtype == out.dtype:
        shapes = ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in (a, b, out))
        raise ValueError(f"a (m, d), b (n, d) and out (m, n) must be of one type, got {shapes}")
    a, b = _with_rows(a), _with_rows(b)
    sizes = _integer(len(b)), _integer(len(a)), _integer(a.shape[1])
    # What is a row here is a column to BLAS.
    _GEMM[out.dtype](b"T", b"N", *sizes, _number(out, 1), *_matrix(b), *_matrix(a), _number(out, beta), *_matrix(out))
    return out


def add_upper_products_(out: Tensor, x: Tensor, *, beta: float = 1.0) -> Tensor:
    """As `add_products_`, to `out` (n, n), of the rows of x (n, d) with one another; on a CPU.

    What is on the diagonal and right of it is set, the rest may be.
    """
    if out.shape != (len(x), len(x)) or out.dtype != x.dtype:
        shapes = f"{tuple(x.shape)} of {x.dtype} and {tuple(out.shape)} of {out.dtype}"
        raise ValueError(f"rows (n, d) and out (n, n) must be of one type, got {shapes}")
    x = _with_rows(x)
    sizes = _integer(len(x)), _integer(x.shape[1])
    _SYRK[out.dtype](b"L", b"T", *sizes, _number(out, 1), *_matrix(x), _number(out, beta), *_matrix(out))
    return out


class _Alone:
    """Limits BLAS to the calling thread while anybody wants that."""

    def __init__(self) -> None:
        self.lock, self.users, self.limits = Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if self.users == 0:
                self.limits.enter_context(_controller().limit(limits=1, user_api="blas"))
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    self.limits.close()


alone = _Alone()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _with_rows(x: Tensor) -> Tensor:
    """x, or a copy where its rows do not lie one behind the other."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.clone(memory_format=torch.contiguous_format)


def _matrix(x: Tensor) -> tuple[int, object]:
    return x.data_ptr(), _integer(x.stride(0))


def _integer(value: int) -> object:
    return ctypes.byref(ctypes.c_int(value))


def _number(like: Tensor, value: float) -> object:
    return ctypes.byref(_NUMBER[like.dtype](value))
