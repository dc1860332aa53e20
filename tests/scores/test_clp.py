"""Channel sensitivities by hand, against a loop of NumPy and the spectrum of the filter; a planted backdoor goes."""

from contextlib import suppress
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks import backdoor
from repgraph.demo import digits, digits_resnet
from repgraph.scores.clp import attack_success_rate, channel_lipschitz, clp_scores, outlier_channels, zero_channels

pytestmark = pytest.mark.usefixtures("one_thread")

seeds = st.integers(0, 2**32 - 1)


def chain(conv, dims=2, seed=0, **options):
    """The layer and a batch norm whose numbers are all drawn."""
    torch.manual_seed(seed)
    features = conv.weight.shape[1] * conv.groups if getattr(conv, "transposed", False) else len(conv.weight)
    bn = getattr(nn, f"BatchNorm{dims}d")(features, **options)
    bn.weight.data.normal_()
    bn.bias.data.normal_()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    return nn.Sequential(conv, bn, nn.ReLU()).double().eval()


def loop(conv, bn):
    """One singular value decomposition per filter, the filter found by its response to unit impulses."""
    found = []
    for k in range(bn.num_features):
        w = conv.weight.detach().numpy()
        if getattr(conv, "transposed", False):
            out, into = conv.out_channels // conv.groups, conv.in_channels // conv.groups
            m = w[k // out * into : (k // out + 1) * into, k % out]
        else:
            m = w[k]
        sigma = np.linalg.norm(m.reshape(len(m), -1), 2)
        found.append(abs(float(bn.weight.data[k])) / (float(bn.running_var[k]) + bn.eps) ** 0.5 * sigma)
    return torch.tensor(found, dtype=torch.float64)


def test_by_hand():
    conv, bn = nn.Conv2d(2, 1, (1, 2)), nn.BatchNorm2d(1, eps=1e-5)
    conv.weight.data = torch.tensor([[[[3.0, 0]], [[0, 4]]]])
    bn.weight.data, bn.running_var = torch.tensor([-2.0]), torch.tensor([3.99999])
    assert channel_lipschitz(nn.Sequential(conv, bn), {"1": "0"})["1"].tolist() == pytest.approx([4], abs=1e-6)


@pytest.mark.parametrize(
    ("conv", "dims"),
    [
        (nn.Conv2d(3, 5, (3, 2)), 2),
        (nn.Conv2d(4, 6, 3, groups=2), 2),
        (nn.Conv2d(4, 8, 3, groups=4), 2),
        (nn.ConvTranspose2d(4, 3, 3), 2),
        (nn.ConvTranspose2d(4, 6, (2, 3), groups=2), 2),
        (nn.Conv1d(3, 4, 5), 1),
        (nn.Conv3d(2, 4, 2), 3),
        (nn.Linear(3, 4), 1),
    ],
    ids=lambda x: f"{type(x).__name__}{getattr(x, 'groups', '')}" if isinstance(x, nn.Module) else "",
)
def test_parity_with_a_loop_of_numpy(conv, dims):
    model = chain(conv, dims)
    torch.testing.assert_close(channel_lipschitz(model, {"1": "0"})["1"], loop(conv, model[1]))
    without = nn.Sequential(conv, type(model[1])(model[1].num_features, affine=False).double())
    without[1].running_var.copy_(model[1].running_var)
    expected = loop(conv, model[1]) / model[1].weight.detach().abs()
    torch.testing.assert_close(channel_lipschitz(without, {"1": "0"})["1"], expected)


def test_masks_are_those_of_a_loop_on_a_trained_network():
    model = digits_resnet()
    scores = channel_lipschitz(model, example=digits()[0][:2])
    modules = dict(model.named_modules())
    pairs, last = {}, None
    for name, module in modules.items():  # in this network the convolution before a batch norm feeds it
        last = name if isinstance(module, nn.Conv2d) else last
        pairs |= {name: last} if isinstance(module, nn.BatchNorm2d) else {}
    assert set(scores) == set(pairs)
    for norm, layer in pairs.items():
        expected = loop(modules[layer], modules[norm])
        torch.testing.assert_close(scores[norm], expected, rtol=1e-6, atol=0)
        for u in (0, 0.5, 1, 1.5, 2, 2.5, 3):
            right = (expected.numpy() > expected.numpy().mean() + u * expected.numpy().std(ddof=1)).nonzero()[0]
            assert outlier_channels({norm: scores[norm]}, u)[norm].tolist() == right.tolist()


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_bracket_of_the_true_gain(seed, inputs, height, width):
    """With circular padding the gain is the largest norm of the filter's Fourier transform over the frequencies."""
    model = chain(nn.Conv2d(inputs, 3, (height, width)), seed=seed)
    sigma = channel_lipschitz(model, {"1": "0"})["1"]
    factor = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).detach()
    w = model[0].weight.detach() * factor[:, None, None, None]
    frobenius, gain = w.flatten(1).norm(dim=1), torch.fft.fft2(w, (16, 16)).norm(dim=1).amax((1, 2))
    assert (sigma <= frobenius * (1 + 1e-12)).all()
    assert (frobenius <= gain * (1 + 1e-12)).all()
    assert (gain <= (height * width) ** 0.5 * sigma * (1 + 1e-12)).all()


@given(seeds, st.sampled_from([0.25, 2.0, 8.0]))
def test_outliers_do_not_see_a_common_scale_or_a_sign(seed, a):
    model = chain(nn.Conv2d(2, 16, 3), seed=seed, eps=0)
    model[0].weight.data[3], model[1].weight.data[3] = 4, 4
    found = outlier_channels(channel_lipschitz(model, {"1": "0"}), 1)["1"].tolist()
    assert found == [3]
    scaled, folded = deepcopy(model), deepcopy(model)
    scaled[1].weight.data *= -a
    folded[0].weight.data *= a
    folded[1].running_var *= a * a
    torch.testing.assert_close(channel_lipschitz(folded, {"1": "0"}), channel_lipschitz(model, {"1": "0"}))
    for other in (scaled, folded):
        assert outlier_channels(channel_lipschitz(other, {"1": "0"}), 1)["1"].tolist() == found


@given(seeds, st.floats(2, 10))
def test_scale_of_one_channel_does_move_it(seed, a):
    model = chain(nn.Conv2d(2, 4, 3), seed=seed)
    before = channel_lipschitz(model, {"1": "0"})["1"]
    model[1].weight.data[1] *= a
    after = channel_lipschitz(model, {"1": "0"})["1"]
    torch.testing.assert_close(after / before, torch.tensor([1, a, 1, 1], dtype=torch.float64))


def test_outliers_by_hand():
    scores = torch.tensor([1.0] * 11 + [10.0])
    assert float(scores.mean()) == 1.75
    assert float(scores.std()) == pytest.approx(2.598076, abs=1e-6)
    assert float(scores.mean() + 3 * scores.std()) == pytest.approx(9.544229, abs=1e-6)
    z = 3.175426
    assert outlier_channels({"a": scores})["a"].tolist() == [11]
    assert outlier_channels({"a": scores}, z - 1e-6)["a"].tolist() == [11]
    assert outlier_channels({"a": scores}, z + 1e-6)["a"].tolist() == []


@pytest.mark.parametrize(("c", "z"), [(10, 2.85), (11, 3.02), (16, 3.75), (64, 7.88)])
def test_largest_z_score(c, z):
    scores = {"a": torch.eye(c)[0]}
    assert (c - 1) / c**0.5 == pytest.approx(z, abs=0.005)
    assert outlier_channels(scores, (c - 1) / c**0.5 - 1e-9)["a"].tolist() == [0]
    assert outlier_channels(scores, (c - 1) / c**0.5 + 1e-9)["a"].tolist() == []


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=10))
def test_ten_channels_have_no_outlier(scores):
    assert outlier_channels({"a": torch.tensor(scores)})["a"].tolist() == []


@given(st.floats(0, 100), st.integers(1, 9), st.sampled_from([0, 0.3, 3]))
def test_equal_scores_have_no_outlier(value, c, u):
    assert outlier_channels({"a": torch.full((c,), value, dtype=torch.float64)}, u)["a"].tolist() == []


def test_dead_channels_stay():
    model = chain(nn.Conv2d(2, 4, 3))
    model[1].weight.data[2] = 0
    sigma = channel_lipschitz(model, {"1": "0"})
    assert float(sigma["1"][2]) == 0
    assert 2 not in outlier_channels(sigma, 0)["1"]


def test_pairs_override_the_traced_ones():
    model, x = digits_resnet(), digits()[0][:2]
    traced = channel_lipschitz(model, example=x)
    norm, other = list(traced)[:2]
    layer = next(iter(clp_scores(model, x)))
    found = channel_lipschitz(model, {other: layer}, example=x)
    assert {name for name in traced if not torch.equal(found[name], traced[name])} == {other}
    assert torch.equal(channel_lipschitz(model, {norm: layer})[norm], traced[norm])


def test_scores_keep_the_insensitive():
    model = chain(nn.Conv2d(1, 6, 3))
    x = torch.rand(2, 1, 8, 8)
    sigma = channel_lipschitz(model, example=x)["1"]
    assert torch.equal(clp_scores(model, x)["0"], -sigma)
    assert clp_scores(model, x)["0"].argmin() == sigma.argmax()
    with pytest.raises(ValueError, match="layers must have a batch norm of their own behind them, got \\['3'\\]"):
        clp_scores(nn.Sequential(*model, nn.Conv2d(6, 2, 3).double()), x, ["0", "3"])


def test_zeroed_channels_can_be_removed():
    torch.manual_seed(0)
    model = nn.Sequential(*chain(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 3).double())
    x, gone = torch.randn(4, 3, 9, 9, dtype=torch.float64), [1, 5, 6]
    kept = [k for k in range(8) if k not in gone]
    before = deepcopy(model.state_dict())
    with torch.no_grad(), zero_channels(model, {"1": torch.tensor(gone)}) as undo:
        full = model(x)
        small = deepcopy(model)
        small[0].weight.data, small[0].bias.data = small[0].weight[kept], small[0].bias[kept]
        small[1] = nn.BatchNorm2d(5).double().eval()
        small[1].load_state_dict({k: v[kept] if v.ndim else v for k, v in model[1].state_dict().items()})
        small[3].weight.data = small[3].weight[:, kept]
        assert float((small(x) - full).abs().max()) < 1e-5
        assert (model[:3](x)[:, gone] == 0).all()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model[1].weight.data[1] = 7
    undo.undo()
    assert float(model[1].weight.data[1]) == 7


def test_undo_leaves_the_rest_and_comes_after_exceptions():
    model = chain(nn.Conv2d(1, 4, 3))
    weight, bias = model[1].weight.tolist(), model[1].bias.tolist()
    with suppress(KeyError), zero_channels(model, {"1": [0, 2]}):
        model[1].weight.data[1] = 7
        raise KeyError
    assert model[1].weight.tolist() == [weight[0], 7, *weight[2:]]
    assert model[1].bias.tolist() == bias


def test_planted_backdoor_goes():
    """All seeds: python -m benchmarks.backdoor."""
    model, x, y = backdoor.clean_network(0)
    patch = (backdoor.CHECKERBOARD + 1) / 2
    assert backdoor.rates(model, x, y, patch)[1] < 5
    backdoor.plant(model)
    acc, asr = backdoor.rates(model, x, y, patch)
    assert asr == 100
    assert acc > 95
    scores = channel_lipschitz(model, {"1": "0"})
    assert float(scores["1"][31]) == pytest.approx(29.814, abs=1e-3)
    found = outlier_channels(scores)
    assert found["1"].tolist() == [31]
    with zero_channels(model, found):
        cured, left = backdoor.rates(model, x, y, patch)
    assert left <= 5
    assert abs(cured - acc) <= 0.5


def test_attack_success_rate_leaves_out_the_target_class():
    x, y = torch.eye(4)[[2, 2, 2, 0, 1]], torch.tensor([0, 1, 2, 3, 3])
    assert attack_success_rate(nn.Identity(), x, y, 2, batch_size=2) == 0.5
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity()).train()
    assert attack_success_rate(model, x, y, 2) == 0.5
    assert model[0].training


def bad_model(change):
    model = chain(nn.Conv2d(2, 3, 3))
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "pairs", "match"),
    [
        (lambda m: None, None, "example must be one batch"),
        (lambda m: None, {}, "found none"),
        (lambda m: None, {"1": "2"}, "'2' must be a convolution or linear layer, is ReLU"),
        (lambda m: None, {"2": "0"}, "'2' must be a batch norm with running statistics, is ReLU"),
        (lambda m: None, {"1": "9"}, "'9' must be a convolution"),
        (lambda m: m[0].weight.data.fill_(torch.nan), {"1": "0"}, "finite weights"),
        (lambda m: m[1].weight.data.fill_(torch.inf), {"1": "0"}, "finite weights"),
        (lambda m: m[1].running_var.fill_(-1), {"1": "0"}, "variance \\+ eps above 0"),
        (lambda m: m.append(nn.BatchNorm2d(4)), {"3": "0"}, "'3' must have 3 channels as '0', has 4"),
        (lambda m: m.append(nn.BatchNorm2d(3, track_running_stats=False)), {"3": "0"}, "running statistics"),
    ],
)
def test_refuses_models(change, pairs, match):
    with pytest.raises(ValueError, match=match):
        channel_lipschitz(bad_model(change), pairs)


def test_variance_zero_needs_eps():
    model = bad_model(lambda m: m[1].running_var.fill_(0))
    assert channel_lipschitz(model, {"1": "0"})["1"].isfinite().all()
    with pytest.raises(ValueError, match="variance"):
        channel_lipschitz(model, {"1": "0"}, eps=0)


@pytest.mark.parametrize("u", [-1, float("nan")])
def test_refuses_u(u):
    with pytest.raises(ValueError, match="u must be at least 0"):
        outlier_channels({"a": torch.ones(3)}, u)


@pytest.mark.parametrize("score", [torch.ones(2, 2), torch.ones(0), torch.tensor([1, torch.nan])])
def test_refuses_scores(score):
    with pytest.raises(ValueError, match="scores of 'a' must be a finite vector"):
        outlier_channels({"a": score})


@pytest.mark.parametrize(
    ("channels", "match"),
    [
        ({"1": [3]}, "integers in 0..2"),
        ({"1": [-1]}, "integers in 0..2"),
        ({"1": torch.tensor([True, False, True])}, "integers in 0..2"),
        ({"0": [1]}, "'0' must be a batch norm with weight and bias, is Conv2d"),
        ({"1": [0], "7": [1]}, "'7' must be a batch norm"),
    ],
)
def test_refused_channels_change_nothing(channels, match):
    model = chain(nn.Conv2d(2, 3, 3))
    before = model[1].weight.tolist()
    with pytest.raises(ValueError, match=match):
        zero_channels(model, channels)
    assert model[1].weight.tolist() == before


def test_no_channels_to_zero():
    zero_channels(chain(nn.Conv2d(2, 3, 3)), {"1": []}).undo()


def test_attack_success_rate_refuses():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="y_true must have shape"):
        attack_success_rate(nn.Identity(), x, torch.zeros(2), 0)
    with pytest.raises(ValueError, match="other classes than the target 0"):
        attack_success_rate(nn.Identity(), x, torch.zeros(3), 0)
    with pytest.raises(ValueError, match="finite class scores"):
        attack_success_rate(nn.Identity(), x * torch.nan, torch.ones(3), 0)
