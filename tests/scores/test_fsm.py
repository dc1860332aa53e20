"""Feature shift by hand, against scipy's integrals and simulated maps, and as theorems."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import nn

from repgraph.scores.fsm import feature_shift_scores, relu_gaussian_mean, shift_batchnorm_

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-20, 20, allow_subnormal=False)


def batch_norm(beta, gamma, kind=nn.BatchNorm2d):
    bn = kind(len(beta))
    bn.bias.data, bn.weight.data = torch.as_tensor(beta).double(), torch.as_tensor(gamma).double()
    return bn


def conv_of(weight):
    weight = torch.as_tensor(weight).double()
    conv = nn.Conv2d(weight.shape[1], len(weight), weight.shape[2:]).double()
    conv.weight.data = weight.clone()
    return conv


def mean_of(beta, gamma):
    beta, gamma = (torch.tensor(x, dtype=torch.float64) for x in (beta, gamma))
    return float(relu_gaussian_mean(beta, gamma))


def norm_pdf(z):
    return np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


V = [[[[1.0, -1], [2, 0]], [[1, 1], [1, 1]]], [[[0, 0], [0, -3]], [[1, 0], [0, 0]]]]
BN = batch_norm([0.0, 1.0], [1.0, 1.0])
EXPECTED = relu_gaussian_mean(BN.bias, BN.weight)


@pytest.mark.parametrize(
    ("beta", "gamma", "expected"),
    [
        (0, 1, 0.3989422804),
        (1, 1, 1.0833154706),
        (-1, 1, 0.0833154706),
        (0.5, 2, 1.0726893964),
        (0.3, 0, 0.3),
        (-0.3, 0, 0),
        (0, 0, 0),
        (0.3, 1e-5, 0.3),
        (0, 1e-5, 3.989422804e-6),
    ],
)
def test_mean_by_hand(beta, gamma, expected):
    assert mean_of(beta, gamma) == pytest.approx(expected, abs=1e-10)


@few
@given(numbers, st.floats(0.01, 10), st.floats(0.1, 10))
def test_mean_against_scipy(beta, gamma, factor):
    found = mean_of(beta, gamma)
    integral = quad(lambda z: (beta + gamma * z) * norm_pdf(z), -beta / gamma, max(-beta / gamma, 0) + 12)[0]
    assert found == pytest.approx(integral, abs=1e-8)
    assert found - mean_of(-beta, gamma) == pytest.approx(beta, abs=1e-12)
    assert mean_of(factor * beta, factor * gamma) == pytest.approx(factor * found, rel=1e-9, abs=1e-12)
    assert mean_of(beta, -gamma) == found >= 0


def test_scores_by_hand():
    consumers = [(conv_of(V), 0)]
    assert feature_shift_scores(BN, consumers).tolist() == pytest.approx([0.9973557010, 2.7082886765], abs=1e-10)
    largest = feature_shift_scores(BN, consumers, reduce="max")
    assert largest.tolist() == pytest.approx([3 * 0.3989422804, 4 * 1.0833154706], abs=1e-9)
    assert feature_shift_scores(BN, []).tolist() == EXPECTED.tolist()


@pytest.mark.parametrize(("mode", "mean"), [("ratio", [4.2225085, 9.5436736]), ("additive", [4.2021154, 0.1968268])])
@pytest.mark.parametrize("keep", [[1], torch.tensor([1]), torch.tensor([False, True])], ids=str)
def test_shift_by_hand(mode, mean, keep):
    following = nn.BatchNorm2d(2).double()
    following.running_mean.copy_(torch.tensor([5.0, -1]))
    before = {name: value.clone() for name, value in following.state_dict().items()}
    old = shift_batchnorm_(following, conv_of(V), EXPECTED, keep, mode=mode, var_scale=0.5)
    assert following.running_mean.tolist() == pytest.approx(mean, abs=1e-7)
    assert following.running_var.tolist() == [0.5, 0.5]
    following.load_state_dict(old, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in following.state_dict().items())


def test_ratio_moves_only_means_of_the_sign_of_the_shift():
    following = nn.BatchNorm2d(2).double()
    following.running_mean.copy_(torch.tensor([-5.0, -1]))
    shift_batchnorm_(following, (conv_of(V), 0), EXPECTED, [1], mode="ratio", var_scale=0.5)
    assert following.running_mean.tolist() == pytest.approx([-5, 9.5436736], abs=1e-7)
    assert following.running_var.tolist() == [1, 0.5]


@few
@given(seeds, st.sampled_from(["ratio", "additive"]))
def test_keeping_all_moves_nothing(seed, mode):
    following = nn.BatchNorm2d(4)
    following.running_mean.copy_(draw(seed, 4))
    old = shift_batchnorm_(following, conv_of(draw(seed, 4, 3, 2, 2)), draw(seed + 1, 3).abs(), [0, 1, 2], mode=mode)
    torch.testing.assert_close(following.running_mean, old["running_mean"], rtol=1e-7, atol=0)
    assert torch.equal(following.running_var, old["running_var"])


@few
@given(seeds)
def test_theorems(seed):
    bn, weight = batch_norm(draw(seed, 4), draw(seed + 1, 4)), draw(seed + 2, 5, 4, 3, 3)
    scores = feature_shift_scores(bn, [(conv_of(weight), 0)])
    generator = torch.Generator().manual_seed(seed)
    order, shuffled = torch.randperm(4, generator=generator), torch.randperm(9, generator=generator)
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(feature_shift_scores(bn, [(conv_of(-2 * weight), 0)]), 2 * scores, **close)
    torch.testing.assert_close(
        feature_shift_scores(batch_norm(bn.bias[order], bn.weight[order]), [(conv_of(weight[:, order]), 0)]),
        scores[order],
        **close,
    )
    kernel = weight.flatten(2)[:, :, shuffled].view_as(weight)
    torch.testing.assert_close(feature_shift_scores(bn, [(conv_of(kernel), 0)]), scores, **close)
    weight[:, 2] = 0
    assert feature_shift_scores(bn, [(conv_of(weight), 0)])[2] == 0
    assert not torch.allclose(feature_shift_scores(batch_norm(bn.bias + 1, bn.weight), [(conv_of(weight), 0)]), scores)


@pytest.mark.parametrize(("activation", "f"), [("relu", torch.relu), ("relu6", nn.functional.relu6)])
def test_simulated_maps_shift_as_expected(activation, f):
    beta, gamma = torch.tensor([0.5, -1.0, 5.0]).double(), torch.tensor([1.0, -2.0, 3.0]).double()
    conv = conv_of(draw(0, 2, 3, 3, 3))
    maps = f(beta[:, None, None] + gamma[:, None, None] * draw(1, 4000, 3, 5, 5))
    scores = feature_shift_scores(batch_norm(beta, gamma), [(conv, 0)], activation=activation)
    with torch.no_grad():
        for i in range(3):
            without = maps.clone()
            without[:, i] = 0
            change = (conv(without) - conv(maps)).mean((2, 3))  # (samples, outputs)
            error = change.std(0) / len(change) ** 0.5
            expected = -conv.weight[:, i].sum((1, 2)) * maps[:, i].mean()
            assert ((change.mean(0) - expected).abs() < 4 * error).all()
            assert float(scores[i]) == pytest.approx(float(change.mean(0).abs().mean()), abs=4 * float(error.mean()))


def test_relu6_against_scipy():
    beta, gamma = np.array([-3.0, 0.5, 5.0, 9.0]), np.array([1.0, 2.0, 3.0, 0.5])
    found = feature_shift_scores(batch_norm(beta, gamma), [], activation="relu6")
    expected = [
        quad(lambda z, b=b, g=g: np.clip(b + g * z, 0, 6) * norm_pdf(z), -12, 12, points=(-b / g, (6 - b) / g))[0]
        for b, g in zip(beta, gamma, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-8)


def test_consumers():
    bn, weight = batch_norm([0.1, -0.2, 0.3], [1.0, 2.0, 0.5]), draw(0, 4, 5, 3, 3)
    expected = relu_gaussian_mean(bn.bias, bn.weight)
    inner = feature_shift_scores(bn, [(conv_of(weight), 2)])
    torch.testing.assert_close(inner, feature_shift_scores(bn, [(conv_of(weight[:, 2:]), 0)]))
    linear = nn.Linear(12, 4).double()
    flat = feature_shift_scores(bn, [(linear, torch.arange(12).view(3, 4))])
    as_kernel = conv_of(linear.weight.detach().view(4, 3, 2, 2))
    torch.testing.assert_close(flat, feature_shift_scores(bn, [(as_kernel, 0)]))
    both = feature_shift_scores(bn, [(conv_of(weight), 2), (linear, torch.arange(12).view(3, 4))])
    torch.testing.assert_close(both, (inner + flat) / 2)
    depthwise = nn.Conv2d(3, 6, 3, groups=3).double()
    own = depthwise.weight.detach().sum((1, 2, 3)).view(3, 2)
    torch.testing.assert_close(feature_shift_scores(bn, [(depthwise, 0)]), own.abs().mean(1) * expected)
    torch.testing.assert_close(feature_shift_scores(bn, [(depthwise, 0)], reduce="max"), own.abs().amax(1) * expected)


def test_parameters_stay_as_they_are():
    bn, conv = batch_norm([0.5, -1.0], [-1.0, 1e-9]), conv_of(V)
    before = [x.clone() for module in (bn, conv) for x in module.state_dict().values()]
    scores = feature_shift_scores(bn, [(conv, 0)])
    after = [x for module in (bn, conv) for x in module.state_dict().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not scores.requires_grad


CONV = conv_of(V)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relu_gaussian_mean(torch.ones(2), torch.ones(3)), r"one shape, got \(2,\) and \(3,\)"),
        (lambda: feature_shift_scores(nn.BatchNorm2d(2, affine=False), []), "BatchNorm2d without parameters"),
        (lambda: feature_shift_scores(nn.GroupNorm(1, 2), []), "bn must be a batch norm .* got GroupNorm"),
        (lambda: feature_shift_scores(BN, [(CONV, 0)], reduce="sum"), "reduce must be 'mean' or 'max', got 'sum'"),
        (lambda: feature_shift_scores(BN, [(CONV, 0)], activation="gelu"), "'relu' or 'relu6', got 'gelu'"),
        (lambda: feature_shift_scores(nn.BatchNorm2d(3), [(CONV, 0)]), r"input columns 0..1, got 0..2"),
        (lambda: feature_shift_scores(BN, [(CONV, torch.tensor([0, 1]))]), r"int64 of shape \(2, r\)"),
        (lambda: feature_shift_scores(BN, [(nn.ReLU(), 0)]), "Linear or Conv layer, got ReLU"),
        (lambda: feature_shift_scores(nn.BatchNorm2d(4), [(nn.Conv2d(4, 4, 1, groups=2), 0)]), "1 group or one per"),
        (lambda: shift_batchnorm_(nn.BatchNorm2d(3), CONV, EXPECTED, [0]), "2 channels as the consumer, got 3"),
        (lambda: shift_batchnorm_(nn.BatchNorm2d(2, track_running_stats=False), CONV, EXPECTED, [0]), "running stat"),
        (lambda: shift_batchnorm_(BN, CONV, EXPECTED, [2]), r"channels of 0..1 or 2 bools, got \[2\]"),
        (lambda: shift_batchnorm_(BN, CONV, EXPECTED, [True]), "or 2 bools"),
        (lambda: shift_batchnorm_(BN, CONV, EXPECTED, [0], mode="both"), "got 'both'"),
        (lambda: shift_batchnorm_(BN, CONV, EXPECTED, [0], var_scale=0), "var_scale must be positive, got 0"),
        (lambda: shift_batchnorm_(BN, nn.Conv2d(2, 2, 1, groups=2), EXPECTED, [0]), "no groups, got 2"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
