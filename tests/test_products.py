"""Products of rows with one another, each pair once."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch._subclasses import FakeTensorMode

from repgraph import products
from repgraph.products import add_products_, add_upper_products_, alone

DTYPES = [torch.float32, torch.float64]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LAYOUTS = {
    "rows": lambda n, d, dtype: normal(n, d, dtype=dtype),
    "columns": lambda n, d, dtype: normal(d, n, dtype=dtype).T,
    "every second feature": lambda n, d, dtype: normal(n, 2 * d, dtype=dtype)[:, ::2],
    "a part of every second row": lambda n, d, dtype: normal(2 * n, d + 3, dtype=dtype)[::2, 1 : d + 1],
    "one row many times": lambda n, d, dtype: normal(1, d, dtype=dtype).expand(n, d),
    "one feature many times": lambda n, d, dtype: normal(n, 1, dtype=dtype).expand(n, d),
}
SIZES = [(1, 1), (6, 1), (1, 7), (9, 4), (150, 70)]


def close(found, expected, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_products_are_those_of_numpy(layout, n, d, dtype):
    x = LAYOUTS[layout](n, d, dtype)
    expected = x.double().numpy() @ x.double().numpy().T
    room = torch.full((n + 2, n + 3), torch.nan, dtype=dtype)
    upper = add_upper_products_(room[1 : n + 1, 2 : n + 2], x, beta=0)
    close(upper.triu(), np.triu(expected), dtype)
    close(add_upper_products_(upper, x).triu(), 2 * np.triu(expected), dtype)
    assert room.isnan().sum() >= room.numel() - upper.numel()  # nothing is written beside it
    assert room[0].isnan().all()
    assert room[:, :2].isnan().all()
    for i in {0, n // 2, n - 1}:
        general = torch.full((n - i, n), torch.nan, dtype=dtype)
        close(add_products_(general, x[i:], x, beta=0), expected[i:], dtype)
        close(add_products_(general, x[i:], x, beta=0.5), 1.5 * expected[i:], dtype)


def test_what_does_not_fit_is_refused():
    x = normal(4, 3)
    for a, b, out in [
        (x, normal(5, 2), normal(4, 5)),
        (x, x, normal(4, 5)),
        (x, x, normal(3, 4)),
        (x, x.float(), normal(4, 4)),
        (x, x, normal(4, 4).float()),
    ]:
        with pytest.raises(ValueError, match=r"must be of one type, got \(4, 3\) of torch.float64, "):
            add_products_(out, a, b)
    for out in (normal(4, 3), normal(2, 4).float()):
        with pytest.raises(ValueError, match=r"must be of one type, got \(4, 3\) of torch.float64 and \("):
            add_upper_products_(out, x)


def test_products_stay_on_cuda():
    with FakeTensorMode():
        x = torch.empty(600, 40, device="cuda")
        out = add_products_(torch.empty(600, 600, device="cuda"), x, x)
        assert (out.device.type, out.shape) == ("cuda", (600, 600))


def blas_threads():
    """Of the libraries loaded by the time of the first product, SciPy's among them."""
    return {pool.num_threads for pool in products._controller().select(user_api="blas").lib_controllers}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["nested", "overlapping"])
def test_blas_is_kept_to_one_thread_until_the_last_user_leaves(order):
    with threadpool_limits(3, user_api="blas"):
        users = alone(), alone()
        for user in users:
            user.__enter__()
        assert blas_threads() == {1}
        users[order[0]].__exit__(None, None, None)
        assert blas_threads() == {1}
        users[order[1]].__exit__(None, None, None)
        assert blas_threads() == {3}
        with pytest.raises(OSError, match="inside"), alone():
            raise OSError("inside")
        assert blas_threads() == {3}
