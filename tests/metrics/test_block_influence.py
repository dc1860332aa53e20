"""Block Influence by hand, against torch's cosine, with masks, and as theorems."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cosine_similarity

from repgraph.metrics import block_influence as module
from repgraph.metrics.block_influence import _block_influence, block_influence

seeds = st.integers(0, 2**32 - 1)
X = torch.tensor([[1.0, 0], [0, 2]])
Y = torch.tensor([[1.0, 1], [0, 1]])
NAN = float("nan")


def pair(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(*shape, generator=generator, dtype=torch.float64), generator


def random_mask(generator, n, t):
    mask = torch.rand(n, t, generator=generator) > 0.5
    mask[:, 0] |= ~mask.any(1)
    return mask


def test_by_hand():
    assert block_influence(X, Y) == pytest.approx(0.146446609, abs=1e-9)
    assert block_influence(X[None], Y[None]) == block_influence(X, Y)
    assert block_influence(X, X) == 0
    assert block_influence(X, -X) == pytest.approx(2, abs=1e-12)


@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(1, 9))
def test_parity_with_torch(seed, n, t, d):
    x, y, generator = pair(seed, n, t, d)
    gap = 1 - cosine_similarity(x, y, dim=-1)
    assert block_influence(x, y) == pytest.approx(float(gap.mean()), abs=1e-12)
    mask = random_mask(generator, n, t)
    assert block_influence(x, y, mask) == pytest.approx(float(gap[mask].mean()), abs=1e-12)
    assert block_influence(x, y, mask.long()) == block_influence(x, y, mask.float()) == block_influence(x, y, mask)


@given(seeds)
def test_invariances(seed):
    x, y, generator = pair(seed, 6, 4, 5)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    scales = 0.1 + torch.rand(2, 6, 4, 1, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    expected = pytest.approx(block_influence(x, y), abs=1e-12)
    assert 0 <= block_influence(x, y) <= 2
    assert block_influence(y, x) == expected
    assert block_influence(x @ turn, y @ turn) == expected
    assert block_influence(x * scales[0], y * scales[1]) == expected
    assert block_influence(x[order], y[order]) == expected
    assert block_influence(1e200 * x, 1e-3 * y) == expected


def test_translation_changes_it():
    assert block_influence(X + 3, Y + 3) < 0.05


def test_conv_maps_are_one_row_per_sample_or_one_per_position():
    x, y, _ = pair(0, 3, 4, 5, 5)
    assert block_influence(x, y) == pytest.approx(block_influence(x.flatten(1), y.flatten(1)), abs=1e-15)
    positions = float((1 - cosine_similarity(x, y, dim=1)).mean())
    assert block_influence(x.flatten(2).mT, y.flatten(2).mT) == pytest.approx(positions, abs=1e-12)
    assert abs(block_influence(x, y) - positions) > 1e-3


@given(seeds, st.sampled_from([1e-1, 1e-3, 1e-5]))
def test_nearly_equal_in_float32(seed, size):
    x, y, _ = pair(seed, 20, 300)
    x = x.float()
    y = (x + size * y.float()).float()
    a, b = x.double(), y.double()
    u, v = (z / z.norm(dim=1, keepdim=True) for z in (a, b))
    expected = float((u - v).square().sum(1).mean() / 2)
    assert block_influence(x, y) == pytest.approx(expected, rel=1e-9)
    assert block_influence(x, y) > 0


def test_zero_and_tiny_vectors():
    zero = torch.zeros(1, 2)
    assert block_influence(zero, X[:1]) == block_influence(X[:1], zero) == block_influence(zero, zero) == 1
    tiny = X[:1].double() * 1e-9
    assert block_influence(tiny, X[:1].double()) == pytest.approx(0.9, abs=1e-12)
    assert block_influence(tiny, tiny) == pytest.approx(1 - 0.01, abs=1e-12)
    assert block_influence(tiny * 10, X[:1].double()) == pytest.approx(0, abs=1e-12)
    assert float(1 - cosine_similarity(tiny, X[:1].double())) == pytest.approx(0.9, abs=1e-12)


def test_hidden_tokens_may_hold_anything():
    x, y, generator = pair(0, 3, 4, 5)
    mask = random_mask(generator, 3, 4)
    expected = block_influence(x, y, mask)
    x[~mask], y[~mask] = NAN, float("inf")
    assert block_influence(x, y, mask) == expected
    with pytest.raises(ValueError, match="x must be finite"):
        block_influence(x, y)


def test_every_token_weighs_the_same():
    x, y, _ = pair(0, 2, 3, 4)
    mask = torch.tensor([[True, True, True], [False, True, False]])
    parts = [block_influence(x[:1], y[:1]), block_influence(x[1:, 1], y[1:, 1])]
    assert block_influence(x, y, mask) == pytest.approx((3 * parts[0] + parts[1]) / 4, abs=1e-12)


@pytest.mark.parametrize("numbers", [1, 7, 40])
def test_chunks(monkeypatch, numbers):
    x, y, generator = pair(0, 5, 4, 6)
    mask = random_mask(generator, 5, 4)
    expected = block_influence(x, y, mask)
    monkeypatch.setattr(module, "CHUNK", numbers)
    assert block_influence(x, y, mask) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
def test_types(dtype):
    x, y, _ = pair(0, 20, 6)
    x, y = ((3 * z).round().to(dtype) for z in (x, y))
    assert block_influence(x, y) == pytest.approx(block_influence(x.double(), y.double()), abs=1e-15)


def test_inputs_are_not_modified():
    x, y, _ = pair(0, 4, 3)
    before = x.clone()
    assert isinstance(block_influence(x.requires_grad_(), y), float)
    assert torch.equal(x, before)


TOKENS = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("x", "y", "mask", "message"),
    [
        (X, Y[:, :1], None, r"one shape, got \(2, 2\) and \(2, 1\)"),
        (X, None, None, "y must be a real torch tensor, got NoneType"),
        (X.to(torch.complex64), Y, None, "x must be a real torch tensor"),
        (X[0], Y[0], None, r"x must have shape \(n, ...\) .* got \(2,\)"),
        (X[:0], Y[:0], None, r"got \(0, 2\)"),
        (X, torch.tensor([[NAN, 1], [1, 1]]), None, "y must be finite.* in 1 of 2 samples"),
        (X * float("inf"), Y, None, "x must be finite.* in 2 of 2 samples"),
        (X, Y, torch.ones(2, 2), r"mask needs tokens \(n, t, d\), got x of shape \(2, 2\)"),
        (TOKENS, TOKENS, torch.ones(2, 4), r"mask must be a tensor of shape \(2, 3\).* got \(2, 4\)"),
        (TOKENS, TOKENS, [[1, 1, 1]] * 2, "got list"),
        (TOKENS, TOKENS, torch.tensor([[0.0, -1e9, 0.0]] * 2), "mask must be bool or 0 and 1"),
        (TOKENS, TOKENS, torch.tensor([[1, 0, 0], [0, 0, 0]]), "a token, got none in 1 of 2 samples"),
    ],
)
def test_refusals(x, y, mask, message):
    with pytest.raises(ValueError, match=message):
        block_influence(x, y, mask)


@pytest.mark.parametrize("shape", [(8, 5), (4, 6, 5), (3, 2, 4, 4)])
def test_kernel_stays_on_cuda(monkeypatch, shape):
    monkeypatch.setattr(module, "CHUNK", 20)
    with FakeTensorMode():
        x = torch.empty(shape, device="cuda")
        masks = [None, torch.ones(shape[:2], dtype=torch.bool, device="cuda")] if len(shape) == 3 else [None]
        for mask in masks:
            value = _block_influence(x, x, mask)
            assert (value.device.type, value.shape, value.dtype) == ("cuda", (), torch.float64)
