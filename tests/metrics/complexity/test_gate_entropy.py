"""Entropy of gates by hand, against double loops and other definitions of the same bound, and as theorems."""

import itertools
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
    plain,
    plain_entropy,
    plain_information,
    plain_plugin,
    samples,
    seeds,
    single,
    soft,
    widths,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from repgraph.metrics.complexity import (
    activation_cross_entropy,
    gate_entropy,
    gate_label_information,
    total_correlation,
)

COPIES = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]])
THREE = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]])


def kl_upper_bound(s, variance):
    """Kolchinsky and Tracey: entropy of a mixture of equal Gaussians at the rows, in nats, minus that of one."""
    s = np.asarray(s, dtype=np.float64)
    n, d = s.shape
    divergence = ((s[:, None] - s) ** 2).sum(2) / (2 * variance)
    one = d / 2 * math.log(2 * math.pi * math.e * variance)
    return one - (logsumexp(-divergence, axis=1) - math.log(n)).mean() - one


def bhattacharyya_lower_bound(s, variance):
    """The same with the Bhattacharyya distance of two Gaussians, a quarter of their divergence."""
    s = np.asarray(s, dtype=np.float64)
    distance = ((s[:, None] - s) ** 2).sum(2) / (8 * variance)
    return -np.log(np.exp(-distance).mean(1)).mean()


# By hand


def test_two_pairs_of_equal_rows_have_one_bit():
    assert gate_entropy(COPIES) == pytest.approx(1.0, abs=1e-12)
    assert gate_label_information(COPIES, [0, 0, 1, 1]) == pytest.approx(1.0, abs=1e-12)
    assert gate_label_information(COPIES, [0, 1, 0, 1]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("lam", "expected"), [(0.01, 0.99999999998), (0.04, 0.9972176281)])
def test_two_rows_one_gate_apart(lam, expected):
    assert gate_entropy(PAIR, lam=lam) == pytest.approx(expected, abs=1e-10)
    assert gate_entropy(PAIR, lam=lam) == pytest.approx(1 - math.log2(1 + math.exp(-1 / (4 * lam))), abs=1e-12)


@pytest.mark.parametrize(
    ("lam", "expected", "told"),
    [
        (0.01, 1.9999946236, 0.9999973118),
        (0.04, 1.9358502234, 0.9682586885),
        (0.25, 0.9056658590, 0.4736106576),
    ],
)
def test_four_rows(lam, expected, told):
    assert gate_entropy(FOUR, lam=lam) == pytest.approx(expected, abs=1e-10)
    assert gate_label_information(FOUR, [0, 0, 1, 1], lam=lam) == pytest.approx(told, abs=1e-10)


def test_entropy_and_total_correlation_add_up_to_the_sum_of_single_gates():
    assert gate_entropy(THREE, estimator="plugin") == pytest.approx(1.5, abs=1e-12)
    assert activation_cross_entropy(THREE) == pytest.approx(1.8112781245, abs=1e-10)
    assert total_correlation(THREE, estimator="plugin") == pytest.approx(0.3112781245, abs=1e-10)


def test_two_layers_by_hand():
    first, second = torch.tensor([[0], [0], [1], [1]]), torch.tensor([[0], [1], [1], [1]])
    both, y = torch.cat((first, second), 1), [0, 0, 1, 1]
    found = [gate_entropy(s, estimator="plugin") for s in (first, second, both)]
    assert found == pytest.approx([1, 0.8112781245, 1.5], abs=1e-10)
    told = [gate_label_information(s, y, estimator="plugin") for s in (first, second, both)]
    assert told == pytest.approx([1, 0.3112781245, 1], abs=1e-10)


def test_random_gates_and_labels_saturate():
    s = torch.rand(400, 1000, generator=torch.Generator().manual_seed(0)) < 0.5
    assert gate_entropy(s) == pytest.approx(8.643856, abs=1e-6)
    assert gate_label_information(s, torch.arange(400) % 10) == pytest.approx(3.321928, abs=1e-6)


@pytest.mark.parametrize(("constant", "expected"), [(0, 7.644), (160, 6.14), (400, 3.13)])
def test_dead_gates_dilute_unless_only_active_ones_count(constant, expected):
    s = torch.rand(200, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    more = torch.cat((s, torch.ones(200, constant // 2).bool(), torch.zeros(200, constant - constant // 2).bool()), 1)
    assert gate_entropy(more) == pytest.approx(expected, abs=0.05)
    assert gate_entropy(more, width="active") == pytest.approx(gate_entropy(s), abs=1e-12)
    assert gate_entropy(more, estimator="plugin") == pytest.approx(math.log2(200), abs=1e-12)


def test_more_gates_may_lower_the_kernel_entropy():
    more = torch.cat((PAIR, torch.ones(2, 2)), 1)
    assert gate_entropy(PAIR, lam=0.04) == pytest.approx(0.99722, abs=1e-5)
    assert gate_entropy(more, lam=0.04) == pytest.approx(0.93797, abs=1e-5)


def test_one_hot_codes_look_alike():
    assert gate_entropy(torch.eye(64)) == pytest.approx(2.17, abs=0.005)
    assert gate_entropy(torch.eye(64), estimator="plugin") == pytest.approx(6, abs=1e-12)


@pytest.mark.parametrize(("lam", "share"), [(0.01, 0.152), (0.04, 0.608)])
def test_kernel_is_1_over_n_at_a_distance_of_2_lam_ln_n(lam, share):
    apart = torch.arange(1000) < 1000 * share
    mean = 2 ** -gate_entropy(torch.stack((apart, torch.zeros(1000).bool())), lam=lam)
    assert 2 * mean - 1 == pytest.approx(1 / 2000, rel=0.03)


def test_six_copies_of_a_fair_coin_have_5_bits_of_total_correlation():
    s = (torch.arange(2000) % 2)[:, None].expand(-1, 6)
    assert total_correlation(s, estimator="plugin") == pytest.approx(5, abs=1e-12)
    for seed in range(2):
        assert 4.7 < total_correlation(s, lam=0.01, seed=seed, draws=1) < 5.3
        assert 3.85 < total_correlation(s, lam=0.04, seed=seed, draws=1) < 4.15
    apart = math.exp(-1 / (2 * 0.04 * 6))
    assert total_correlation(s[:400], lam=0.04, draws=100) == pytest.approx(5 - 6 * math.log2(1 + apart), abs=0.03)


# Parity


@given(seeds, samples, widths, lams, st.sampled_from(ESTIMATORS))
def test_parity_with_a_double_loop(seed, n, d, lam, estimator):
    s, _ = codes(seed, n, d)
    assert gate_entropy(s, lam=lam, estimator=estimator) == pytest.approx(plain(s, lam, estimator), abs=1e-10)


@given(seeds, samples, widths, lams, st.sampled_from(ESTIMATORS))
def test_parity_of_soft_gates(seed, n, d, lam, estimator):
    s = soft(seed, n, d)
    assert gate_entropy(s, lam=lam, estimator=estimator) == pytest.approx(plain(s, lam, estimator), abs=1e-9)


@given(seeds, samples, widths, lams)
def test_active_gates_are_those_that_change(seed, n, d, lam):
    s, _ = codes(seed, n, d)
    active = int((s.any(0) & ~s.all(0)).sum())
    found = gate_entropy(s, lam=lam, width="active")
    assert found == pytest.approx(plain_entropy(s, lam, active) if active else 0, abs=1e-10)


@given(seeds, st.integers(1, 5), widths, lams, st.sampled_from(ESTIMATORS))
def test_parity_of_label_information(seed, classes, d, lam, estimator):
    s, generator = codes(seed, 5 * classes, d)
    y = torch.cat((torch.arange(classes).repeat(2), torch.randint(0, classes, (3 * classes,), generator=generator)))
    found = gate_label_information(s, y, lam=lam, estimator=estimator)
    assert found == pytest.approx(plain_information(s, y, lam, estimator), abs=1e-10)
    names = [f"class {c}" for c in y.tolist()]
    assert gate_label_information(s, names, lam=lam, estimator=estimator) == pytest.approx(found, abs=1e-12)


@given(seeds, samples, widths, st.floats(1e-2, 10))
def test_parity_with_the_bounds_of_kolchinsky_and_tracey(seed, n, d, lam):
    for s in (codes(seed, n, d)[0], soft(seed, n, d)):
        upper = gate_entropy(s, lam=lam) * math.log(2)
        lower = gate_entropy(s, lam=lam, estimator="kde_lower") * math.log(2)
        assert upper == pytest.approx(kl_upper_bound(s, lam * d), abs=1e-9)
        assert lower == pytest.approx(bhattacharyya_lower_bound(s, lam * d), abs=1e-9)


def test_entropy_with_lam_004_is_the_lower_bound_of_001():
    s, _ = codes(0)
    assert gate_entropy(s, lam=0.04) == pytest.approx(gate_entropy(s, lam=0.01, estimator="kde_lower"), abs=1e-12)


@given(seeds, samples, widths)
def test_parity_of_single_gates(seed, n, d):
    s, _ = codes(seed, n, d)
    assert activation_cross_entropy(s) == pytest.approx(single(s.double().mean(0)), abs=1e-10)
    s = soft(seed, n, d)
    assert activation_cross_entropy(s) == pytest.approx(single(s.mean(0)), abs=1e-10)


@given(seeds)
@settings(max_examples=4)
def test_total_correlation_tends_to_the_exact_mean_over_independent_rows(seed):
    """The mean of the kernel over independent gates is a product over the gates."""
    s, _ = codes(seed, 12, 5)
    lam = 0.2
    x, a = s.double().numpy(), s.double().numpy().mean(0)
    far = math.exp(-1 / (2 * lam * 5))
    independent = np.prod(np.where(x == 1, a + (1 - a) * far, 1 - a + a * far), axis=1)
    own = np.array([np.mean([far ** (p != q).sum() for q in x]) for p in x])
    assert total_correlation(s, lam=lam, draws=500) == pytest.approx(np.log2(own / independent).mean(), abs=0.04)


@given(seeds, samples, widths)
@settings(max_examples=20)
def test_total_correlation_of_constant_gates_is_0(seed, n, d):
    s = codes(seed, 1, d)[0].repeat(n, 1)
    assert total_correlation(s) == pytest.approx(0, abs=1e-12)
    assert total_correlation(s, estimator="plugin") == pytest.approx(0, abs=1e-12)


# Theorems


@given(seeds, samples, widths, lams)
def test_bounds(seed, n, d, lam):
    s, _ = codes(seed, n, d)
    kde, lower, plugin = (gate_entropy(s, lam=lam, estimator=estimator) for estimator in ESTIMATORS)
    assert 0 <= lower <= kde + 1e-12
    assert kde <= plugin + 1e-12
    assert plugin <= min(math.log2(n), activation_cross_entropy(s)) + 1e-12
    assert activation_cross_entropy(s) <= d + 1e-9


@given(seeds, st.integers(1, 5), st.floats(0.01, 0.3))
def test_label_information_is_at_most_the_entropy_of_the_labels(seed, classes, lam):
    s, _ = codes(seed, 4 * classes)
    y = torch.arange(4 * classes) % classes
    for estimator in ESTIMATORS:
        assert gate_label_information(s, y, lam=lam, estimator=estimator) <= math.log2(classes) + 1e-12
    assert gate_label_information(s, y, estimator="plugin") >= -1e-12


@given(seeds, samples, widths)
def test_a_narrow_kernel_is_the_plugin_and_a_wide_one_gives_0(seed, n, d):
    s, _ = codes(seed, n, d)
    assert gate_entropy(s, lam=1e-6) == pytest.approx(plain_plugin(s), abs=1e-12)
    assert gate_entropy(s, lam=1e9) == pytest.approx(0, abs=1e-8)
    assert gate_entropy(s, lam=math.inf) == 0


@given(seeds, samples, widths, lams, st.sampled_from(ESTIMATORS), st.sampled_from(["total", "active"]))
def test_invariances(seed, n, d, lam, estimator, width):
    s, generator = codes(seed, n, d)
    order, gates = torch.randperm(n, generator=generator), torch.randperm(d, generator=generator)
    flip = torch.rand(d, generator=generator) < 0.5
    options = {"lam": lam, "estimator": estimator, "width": width}
    expected = pytest.approx(gate_entropy(s, **options), abs=1e-10)
    for other in (s[order], s[:, gates], s ^ flip, s.repeat(1, 3), s.repeat_interleave(2, 1), s.repeat(2, 1)):
        assert gate_entropy(other, **options) == expected


@given(seeds, lams, st.integers(1, 6))
def test_constant_gates_change_nothing_but_the_width(seed, lam, constant):
    s, _ = codes(seed, 12, 9, copies=False)
    more = torch.cat((s, torch.ones(12, constant).bool()), 1)
    assert gate_entropy(more, lam=lam, width="active") == pytest.approx(
        gate_entropy(s, lam=lam, width="active"), abs=1e-12
    )
    assert gate_entropy(more, estimator="plugin") == gate_entropy(s, estimator="plugin")
    assert gate_entropy(more, lam=lam) == pytest.approx(plain_entropy(s, lam, 9 + constant), abs=1e-10)
    assert activation_cross_entropy(more) == pytest.approx(activation_cross_entropy(s), abs=1e-12)


def test_constant_gates_widen_the_kernel():
    s, _ = codes(0, 12, 9, copies=False)
    assert gate_entropy(torch.cat((s, torch.ones(12, 50).bool()), 1)) < gate_entropy(s) - 0.1


@given(seeds, samples, widths)
def test_plugin_entropy_and_total_correlation_add_up(seed, n, d):
    s, _ = codes(seed, n, d)
    correlation = total_correlation(s, estimator="plugin")
    assert correlation >= -1e-12
    assert gate_entropy(s, estimator="plugin") + correlation == pytest.approx(activation_cross_entropy(s), abs=1e-10)


@given(seeds, st.integers(2, 4))
def test_label_information_from_single_gates_and_total_correlation(seed, classes):
    s, _ = codes(seed, 6 * classes, 6)
    y = torch.arange(6 * classes) % classes
    alone = activation_cross_entropy(s) - sum(activation_cross_entropy(s[y == c]) for c in range(classes)) / classes
    entangled = total_correlation(s, estimator="plugin")
    entangled -= sum(total_correlation(s[y == c], estimator="plugin") for c in range(classes)) / classes
    assert gate_label_information(s, y, estimator="plugin") == pytest.approx(alone - entangled, abs=1e-10)


@given(seeds, samples, st.integers(2, 12))
def test_plugin_entropy_grows_with_every_gate(seed, n, d):
    s, _ = codes(seed, n, d)
    found = [gate_entropy(s[:, :k], estimator="plugin") for k in range(1, d + 1)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    left = [gate_entropy(s[:, k:], estimator="plugin") for k in range(d)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(left))


@given(seeds, samples, widths, lams, st.sampled_from(ESTIMATORS))
def test_one_class_tells_nothing(seed, n, d, lam, estimator):
    s, _ = codes(seed, n, d)
    assert gate_label_information(s, [5] * n, lam=lam, estimator=estimator) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("width", ["total", "active"])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_gates_have_no_entropy(estimator, width, value):
    s = torch.full((7, 5), value, dtype=torch.float64)
    assert gate_entropy(s, estimator=estimator, width=width) == pytest.approx(0, abs=1e-12)
    assert gate_label_information(s, [0, 0, 1, 1, 1, 0, 0], estimator=estimator, width=width) == pytest.approx(0)


@given(seeds)
@settings(max_examples=15)
def test_total_correlation_of_independent_and_of_copied_gates(seed):
    s = torch.rand(500, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert total_correlation(s, lam=0.05) == pytest.approx(0, abs=0.05)
    copied = torch.cat((s, s), 1)
    assert total_correlation(copied, estimator="plugin") == pytest.approx(
        total_correlation(s, estimator="plugin") + activation_cross_entropy(s), abs=1e-9
    )


def test_total_correlation_depends_on_the_seed_alone():
    s, _ = codes(0)
    state = torch.get_rng_state()
    assert total_correlation(s, seed=3) == total_correlation(s, seed=3)
    assert total_correlation(s, seed=3) != total_correlation(s, seed=4)
    assert torch.equal(state, torch.get_rng_state())


def test_total_correlation_is_finite_where_the_kernel_underflows():
    """Each row's nearest independent row is at least one gate away, which costs 1 / (2 lam D) nats, not infinity."""
    s = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    lam = 1e-5
    assert math.isfinite(total_correlation(s, lam=lam))
    assert total_correlation(s, lam=lam) <= 1 / (2 * lam) / math.log(2)
