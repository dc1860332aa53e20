"""Entropy of soft gates, of gates of every type and layout, of many gates and rows, and what is refused."""

import math

import numpy as np
import pytest
import torch
from gate_codes import (
    ESTIMATORS,
    FOUR,
    PAIR,
    codes,
    lams,
    plain_entropy,
    plain_information,
    plain_plugin,
    samples,
    seeds,
    soft,
    widths,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from repgraph.activations.gates import pack
from repgraph.metrics.complexity import (
    activation_cross_entropy,
    gate_entropy,
    gate_label_information,
    total_correlation,
)
from repgraph.metrics.complexity import entropy as kernels
from repgraph.metrics.complexity.entropy import pairs_of

# Soft gates


@given(seeds, st.integers(1, 60))
def test_plugin_entropy_of_repeated_soft_rows_counts_distinct_rows(seed, d):
    s = soft(seed, 4, d).repeat(3, 1)
    assert gate_entropy(s, estimator="plugin") == pytest.approx(2, abs=1e-12)
    assert gate_entropy(s.float(), estimator="plugin") == pytest.approx(2, abs=1e-12)


def test_soft_rows_that_differ_by_little_are_distinct():
    s = torch.tensor([[0.5, 0.5], [0.5, 0.5 + 1e-9]], dtype=torch.float64)
    assert gate_entropy(s, estimator="plugin") == 1.0


@given(seeds, samples, widths, lams)
def test_soft_gates_at_0_and_1_are_hard(seed, n, d, lam):
    s, _ = codes(seed, n, d)
    for estimator in ESTIMATORS:
        found = gate_entropy(s.double(), lam=lam, estimator=estimator)
        assert found == pytest.approx(gate_entropy(s, lam=lam, estimator=estimator), abs=1e-12)


def test_soft_gates_come_closer_together_as_they_soften():
    z = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    found = [gate_entropy(torch.sigmoid(beta * z), lam=0.05) for beta in (0.1, 1, 10, 1e6)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(gate_entropy(z > 0, lam=0.05), abs=1e-9)


# Input


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32],
)
def test_types(dtype):
    s, _ = codes(0)
    y = torch.arange(16) % 2
    same = s.to(dtype)
    assert gate_entropy(same, lam=0.04) == pytest.approx(plain_entropy(s, 0.04), abs=1e-12)
    assert gate_label_information(same, y, lam=0.3) == pytest.approx(plain_information(s, y, 0.3, "kde"), abs=1e-12)
    assert activation_cross_entropy(same) == pytest.approx(activation_cross_entropy(s), abs=1e-12)
    assert total_correlation(same, seed=1) == pytest.approx(total_correlation(s, seed=1), abs=1e-12)


def test_numpy_and_lists():
    s, _ = codes(0)
    for given_as in (s.numpy(), s.numpy().astype(float), np.asfortranarray(s.numpy()), s.int().tolist()):
        assert gate_entropy(given_as) == gate_entropy(s)
        assert gate_label_information(given_as, np.arange(16) % 2) == gate_label_information(s, np.arange(16) % 2)


def test_strided_and_expanded_gates():
    s, _ = codes(0, 16, 20)
    assert gate_entropy(s.T.contiguous().T) == gate_entropy(s)
    assert gate_entropy(s[::2, 1::3]) == gate_entropy(s[::2, 1::3].clone())
    assert gate_entropy(s[:, :1].expand(-1, 7)) == pytest.approx(gate_entropy(s[:, :1]), abs=1e-12)


def test_input_is_left_as_it_was_and_needs_no_gradient():
    s = soft(0).requires_grad_()
    before = s.detach().clone()
    assert isinstance(gate_entropy(s), float)
    assert isinstance(total_correlation(s), float)
    assert torch.equal(s.detach(), before)
    assert s.grad is None


@pytest.mark.parametrize(("gate", "expected"), [([0, 1], 1), ([1, 1], 0), ([0, 0, 1, 1], 1)])
def test_a_single_gate(gate, expected):
    assert gate_entropy(torch.tensor(gate)[:, None], lam=1e-3) == pytest.approx(expected, abs=1e-12)


# Many gates and rows


@pytest.mark.parametrize("d", [1, 7, 8, 9, 40, 61])
@pytest.mark.parametrize("size", [1, 4 * 16 * 16, 2**20])
def test_gates_in_chunks_and_packed(monkeypatch, d, size):
    s, _ = codes(d, 16, d)
    expected = (s[:, None] != s).sum(2).float()
    monkeypatch.setattr(kernels, "_CHUNK", size)
    for pairs in (pairs_of(s), pairs_of(pack(s), d)):
        assert torch.equal(pairs.squares.float(), expected)
        torch.testing.assert_close(pairs.rates, s.double().mean(0), atol=0, rtol=0)
        assert pairs.gates == d
        assert pairs.active == int((s.any(0) & ~s.all(0)).sum())
    z = soft(d, 16, d)
    torch.testing.assert_close(pairs_of(z).squares, (z[:, None] - z).square().sum(2), atol=1e-12, rtol=0)
    assert total_correlation(s, lam=0.3, draws=30) == pytest.approx(_correlation_whole(s), abs=1e-9)


def _correlation_whole(s):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_CHUNK", 2**26)
        return total_correlation(s, lam=0.3, draws=30)


@pytest.mark.parametrize("n", [255, 256, 257, 300, 513])
def test_more_rows_than_one_block(n):
    s, _ = codes(n, n, 5)
    y = torch.arange(n) % 3
    x = s.double().numpy()
    kernel = np.exp(-np.abs(x[:, None] - x).sum(2) / (2 * 0.04 * 5))
    assert gate_entropy(s, lam=0.04) == pytest.approx(-np.log2(kernel.mean(1)).mean(), abs=1e-10)
    assert gate_entropy(s, estimator="plugin") == pytest.approx(plain_plugin(s), abs=1e-10)
    same = (y[:, None] == y).numpy()
    within = -np.log2((kernel * same).sum(1) / same.sum(1)).mean()
    expected = gate_entropy(s, lam=0.04) - within
    assert gate_label_information(s, y, lam=0.04) == pytest.approx(expected, abs=1e-10)


# Bad input

FUNCTIONS = [gate_entropy, activation_cross_entropy, total_correlation, lambda s: gate_label_information(s, [0, 0])]


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize(
    ("s", "message"),
    [
        (torch.zeros(4), r"S must have shape \(N, D\), got \(4,\)"),
        (torch.zeros(2, 3, 3), r"S must have shape \(N, D\)"),
        (torch.zeros(1, 3), "at least 2 samples and 1 gate"),
        (torch.zeros(2, 0), "at least 2 samples and 1 gate"),
        (torch.zeros(1, 3).bool(), "at least 2 samples and 1 gate"),
        (torch.tensor([[0.0], [1.01]]), r"S must have values in \[0, 1\]"),
        (torch.tensor([[-0.1], [1.0]]), r"S must have values in \[0, 1\]"),
        (torch.tensor([[0], [2]]), r"S must have values in \[0, 1\], got 0 to 2"),
        (torch.tensor([[0.0], [math.nan]]), r"S must have values in \[0, 1\]"),
        (torch.tensor([[0.0], [math.inf]]), r"S must have values in \[0, 1\]"),
    ],
)
def test_bad_gates(f, s, message):
    with pytest.raises(ValueError, match=message):
        f(s)


@pytest.mark.parametrize("f", [gate_entropy, total_correlation, lambda s, **o: gate_label_information(s, [0, 0], **o)])
@pytest.mark.parametrize("lam", [0, -0.01, math.nan])
def test_bad_kernel_width(f, lam):
    with pytest.raises(ValueError, match="lam must be positive"):
        f(PAIR, lam=lam)


def test_unknown_choices():
    with pytest.raises(ValueError, match="estimator must be 'kde', 'kde_lower' or 'plugin', got 'knn'"):
        gate_entropy(PAIR, estimator="knn")
    with pytest.raises(ValueError, match="width must be 'total' or 'active', got 'all'"):
        gate_label_information(PAIR, [0, 0], width="all")
    with pytest.raises(ValueError, match="estimator must be 'kde' or 'plugin', got 'kde_lower'"):
        total_correlation(PAIR, estimator="kde_lower")
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        total_correlation(PAIR, draws=0)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 1], "labels must have one entry per sample: expected 4, got 2"),
        ([0, 0, 0, 1], "class 1 must have at least 2 samples, got 1"),
        (["a", "b", "b", "b"], "class 'a' must have at least 2 samples"),
        (torch.ones(4), "labels must be integers, bools or strings"),
    ],
)
def test_bad_labels(y, message):
    with pytest.raises(ValueError, match=message):
        gate_label_information(FOUR, y)


def test_kernels_stay_on_cuda():
    with FakeTensorMode():
        for s, gates in (
            (torch.empty(6, 20, dtype=torch.bool, device="cuda"), None),
            (torch.empty(6, 20, dtype=torch.float64, device="cuda"), None),
            (torch.empty(6, 3, dtype=torch.uint8, device="cuda"), 20),
        ):
            squares, rates, changing = kernels._compared(s, gates)
            assert {x.device.type for x in (squares, rates, changing)} == {"cuda"}
            assert (squares.shape, rates.shape, changing.shape) == ((6, 6), (20,), (20,))
            assert rates.dtype == torch.float64
            y = torch.zeros(6, dtype=torch.int64, device="cuda")
            for found in (kernels._log_means(squares, 0.2), kernels._log_means(squares, 0.0, y)):
                assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.float64, (6,))
        s = torch.empty(6, 20, dtype=torch.bool, device="cuda")
        assert kernels._squares_to(s, s[:4]).device.type == "cuda"
