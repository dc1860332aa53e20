"""Sensitivity of layers and the rates that follow from it: by hand, against a plain bisection, and no trace."""

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from repgraph.demo import digits, digits_resnet
from repgraph.demo.network import DigitsResNet
from repgraph.prune.sensitivity import layer_sensitivity, rates_from_sensitivity, tolerated_ratios

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = digits()
X, Y = X[:40], Y[:40]
LAYERS = ["conv1", "layer2.1.conv1", "layer3.0.conv2"]


@torch.no_grad()
def goodness(model):
    return -float(F.cross_entropy(model(X), Y))


def network():
    torch.manual_seed(0)
    return DigitsResNet((1, 3, 1)).eval()


def sensitivity(model, layers=LAYERS, evaluate=goodness, **options):
    return layer_sensitivity(model, layers, evaluate, **{"example": X[:2], "progress": False, "repeats": 3, **options})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], value) for name, value in before.items())


# Damage


def chain():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 10, 1, bias=False),
        nn.Flatten(),
        nn.Linear(640, 3),
    )
    nn.init.uniform_(model[1].weight, 0.5, 1)
    nn.init.uniform_(model[1].bias, 0.5, 1)
    return model


def seen_damages(model, layers, **options):
    """The states of the model in each evaluation after the first."""
    states = []

    def look(net):
        assert not any(module.training for module in net.modules())
        states.append(state(net))
        return 0.0

    sensitivity(model, layers, look, **options)
    return states[1:]


@pytest.mark.parametrize(("name", "count"), [("0", 3), ("3", 2), ("5", 5), ("7", 1)])
def test_drop_zeroes_half_of_the_filters_and_nothing_else(name, count):
    model = chain().eval()
    x, layer = X[:5], model.get_submodule(name)
    for damaged in seen_damages(model, name, example=x, repeats=5):
        net = deepcopy(model)
        net.load_state_dict(damaged)
        place = 1 if name == "0" else int(name)  # behind the batch norm
        before, after = model[: place + 1](x), net[: place + 1](x)
        gone = (after == 0).transpose(0, 1).flatten(1).all(1)
        assert gone.sum() == count
        assert torch.equal(after[:, ~gone], before[:, ~gone])
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, damaged[key])}
        assert changed == {f"{place}.weight", *([f"{place}.bias"] if name != "5" else [])}
    assert layer is model.get_submodule(name)


def test_noise_by_hand():
    model = chain()
    w, draws = model[0].weight.detach().clone(), []
    for damaged in seen_damages(model, "0", damage="noise", strength=0.7, example=None, repeats=100):
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, damaged[key])}
        assert changed == {"0.weight"}
        draws.append((damaged["0.weight"] - w) / (0.7 * w.std(correction=0)))
    z = torch.stack(draws)
    assert z.mean() == pytest.approx(0, abs=0.05)
    assert z.std() == pytest.approx(1, abs=0.05)


def test_noise_on_equal_weights_is_none():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 3, 1))
    nn.init.ones_(model[1].weight)
    for damaged in seen_damages(model, ["0", "1"], damage="noise"):
        assert all(torch.equal(value, damaged[key]) for key, value in model.state_dict().items())


def test_damage_of_your_own():
    def flip(module, generator):
        module.weight = nn.Parameter(-module.weight)
        module.bias.data = torch.rand(6, generator=generator)

    model = chain()
    weight, bias = model[0].weight, model[0].bias
    before, pointer = state(model), bias.data_ptr()
    damaged = seen_damages(model, "0", damage=flip, example=None)
    assert all(torch.equal(one["0.weight"], -before["0.weight"]) for one in damaged)
    assert len({tuple(one["0.bias"].tolist()) for one in damaged}) == 3
    assert same(model, before)
    assert model[0].weight is weight
    assert (model[0].bias is bias, bias.data_ptr()) == (True, pointer)


def test_the_table():
    model = network()
    table = sensitivity(model, repeats=4)
    assert (list(table.index), list(table.columns), table.index.name) == (LAYERS, [0, 1, 2, 3], "layer")
    assert table.attrs == {
        "base": goodness(model),
        "filters": {"conv1": 8, "layer2.1.conv1": 16, "layer3.0.conv2": 32},
        "damage": "drop",
        "strength": 0.5,
        "seed": 0,
    }
    damaged = seen_damages(model, LAYERS, repeats=4)
    for value, one in zip(table.to_numpy().ravel(), damaged, strict=True):
        net = network()
        net.load_state_dict(one)
        assert value == table.attrs["base"] - goodness(net)


def test_dead_branch_costs_nothing():
    """Check 4: what is zeroed was zero."""
    model = network()
    model.layer2[2].bn2.weight.data.zero_()
    model.layer2[2].bn2.bias.data.zero_()
    table = sensitivity(model, ["layer2.2.conv2", "conv1"], lambda net: float(net(X).detach().double().square().sum()))
    assert (table.loc["layer2.2.conv2"] == 0).all()
    assert (table.loc["conv1"] != 0).all()


@pytest.mark.parametrize("damage", ["drop", "noise"])
def test_seeds(damage):
    """Check 6."""
    model = network()
    first, other = sensitivity(model, damage=damage), sensitivity(model, damage=damage, seed=1)
    pd.testing.assert_frame_equal(first, sensitivity(model, damage=damage))
    assert not np.array_equal(first, other)
    fewer = sensitivity(model, LAYERS[1:2], damage=damage, repeats=2)
    assert fewer.to_numpy().tolist() == first.loc[LAYERS[1:2], [0, 1]].to_numpy().tolist()


@pytest.mark.parametrize("damage", ["drop", "noise", lambda module, generator: module.weight.data.fill_(torch.nan)])
@pytest.mark.parametrize("fails", [None, 0, 2])
def test_model_is_restored(damage, fails):
    """Check 5, and modes, flags and identities."""
    model = network().train()
    model.layer1[0].bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv1.weight.data[0, 0, 0, 0] = -0.0
    model.bn1.weight.grad = torch.ones(8)
    calls = []

    def evaluate(net):
        assert not any(module.training for module in net.modules())  # also after an evaluation that trained
        assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
        calls.append(net)
        if len(calls) - 1 == fails:
            raise ZeroDivisionError
        net.train()
        net(X[:8])  # moves the statistics
        return 1.0

    def rest():
        return [
            (id(p), p.data_ptr(), p.requires_grad, None if p.grad is None else id(p.grad)) for p in model.parameters()
        ], [m.training for m in model.modules()]

    before, other = state(model), rest()
    if fails is None:
        sensitivity(model, evaluate=evaluate, damage=damage)
    else:
        with pytest.raises(ZeroDivisionError):
            sensitivity(model, evaluate=evaluate, damage=damage)
    assert same(model, before)
    assert model.conv1.weight[0, 0, 0, 0].signbit()
    assert rest() == other
    assert all(net is model for net in calls)


def test_refusals():
    model = network()
    for options, message in [
        ({"layers": ["conv1", "layer9"]}, "'layer9' matches no layer"),
        ({"layers": "bn1"}, "layer 'bn1' must be a convolution or a linear layer"),
        ({"strength": 0}, r"strength must be in \(0, 1\) for 'drop', got 0"),
        ({"strength": 1}, r"strength must be in \(0, 1\) for 'drop', got 1"),
        ({"strength": -1, "damage": "noise"}, "strength must be positive for 'noise', got -1"),
        ({"strength": 0.1}, r"strength 0.1 drops none of the 8 filters of layer 'conv1'"),
        ({"damage": "scale"}, "damage must be 'drop', 'noise' or a function, got 'scale'"),
        ({"example": None}, "example must be one batch for damage='drop'"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"evaluate": lambda net: torch.nan}, "evaluate must give a finite number, got nan for the whole model"),
    ]:
        with pytest.raises(ValueError, match=message):
            sensitivity(model, **options)
    before, results = state(model), iter([1.0, np.inf])
    with pytest.raises(ValueError, match="got inf for damaged layer 'conv1'"):
        sensitivity(model, evaluate=lambda net: next(results))
    assert same(model, before)
    norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))
    with pytest.raises(ValueError, match=r"layer '0' cannot be damaged: .* has no weight of its own"):
        sensitivity(nn.Sequential(norm), "0", damage="noise")
    bare = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    with pytest.raises(ValueError, match=r"layer '0' cannot be damaged: BatchNorm2d has no weight of its own"):
        sensitivity(bare, "0")


# Rates


def test_rates_by_hand():
    """Check 1."""
    s = 0.90 - np.array([0.60, 0.80, 0.88])
    found = rates_from_sensitivity(s, [4, 8, 16], 14)
    shares = s / s.sum()
    assert shares == pytest.approx([0.714286, 0.238095, 0.047619], abs=1e-6)
    assert found.rates.numpy() / (1 - shares) == pytest.approx([0.622881] * 3, abs=1e-6)
    assert found.rates.tolist() == pytest.approx([0.177966, 0.474576, 0.593220], abs=1e-6)
    assert (found.rates * torch.tensor([4, 8, 16])).tolist() == pytest.approx([0.7119, 3.7966, 9.4915], abs=1e-4)
    assert found.remove.tolist() == [1, 4, 9]
    assert (found.rates.dtype, found.remove.dtype) == (torch.float64, torch.int64)


cases = st.integers(1, 8).flatmap(
    lambda layers: st.tuples(
        st.lists(st.floats(-0.2, 1), min_size=layers, max_size=layers),
        st.lists(st.integers(1, 70), min_size=layers, max_size=layers),
        st.floats(0, 1),
        st.sampled_from([0.3, 0.5, 0.9, 0.99]),
    )
)


@pytest.mark.filterwarnings("ignore:no layer is sensitive")
@given(cases)
def test_invariances(case):
    """Check 2."""
    s, n, share, max_rate = case
    s = np.round(s, 3)  # a sum of subnormal numbers has no shares
    caps = np.floor(np.array(n) * max_rate + 1e-9)
    alone = len(s) > 1 and (s > 0).sum() == 1
    total = int(share * (caps * ~(alone & (s > 0))).sum())
    found = rates_from_sensitivity(s, n, total, max_rate=max_rate)
    scaled = rates_from_sensitivity(3.7 * s, n, total, max_rate=max_rate)
    order = np.random.default_rng(0).permutation(len(s))
    moved = rates_from_sensitivity(s[order], np.array(n)[order], total, max_rate=max_rate)
    torch.testing.assert_close(scaled.rates, found.rates)
    torch.testing.assert_close(moved.rates, found.rates[order])
    for i in range(len(s)):
        for j in range(i):
            if s[i] == s[j]:
                assert found.rates[i] == found.rates[j]
            elif s[i] > s[j]:
                assert found.rates[i] <= found.rates[j] + 1e-12


def plain_rates(s, n, total, max_rate):
    """The rule with a root finder, and one filter at a time."""
    s = np.clip(s, 0, None)
    a = np.ones(len(s)) if len(s) == 1 or s.sum() == 0 else 1 - s / s.sum()
    caps = np.where(a > 0, np.floor(max_rate * n + 1e-9), 0)
    rates = lambda c: np.minimum(max_rate, c * a)  # noqa: E731
    p = rates(brentq(lambda c: rates(c) @ n - total + 1e-12, 0, 1e9, xtol=1e-15, maxiter=500)) if total else 0 * a
    q = np.minimum(caps, np.floor(n * p + 1e-6))
    while q.sum() < total:
        room = [(round(-(n[i] * p[i] - q[i]), 6), i) for i in range(len(n)) if q[i] < caps[i]]
        q[min(room)[1]] += 1
    return p, q


@pytest.mark.filterwarnings("ignore:no layer is sensitive")
def test_a_thousand_budgets_are_met_exactly():
    """Check 3, and parity of every tenth with a root finder."""
    generator = np.random.default_rng(0)
    for case in range(1000):
        layers = generator.integers(1, 9)
        s = generator.normal(0.1, 0.2, layers).round(2)
        n = generator.integers(1, 65, layers)
        max_rate = float(generator.choice([0.3, 0.5, 0.7, 0.9, 0.99]))
        caps = np.floor(n * max_rate + 1e-9)
        if layers > 1 and (s > 0).sum() == 1:
            caps[s > 0] = 0
        total = int(generator.integers(0, caps.sum() + 1))
        found = rates_from_sensitivity(s, n, total, max_rate=max_rate)
        remove = found.remove.numpy()
        assert remove.sum() == total
        assert (remove <= caps).all()
        assert (remove >= 0).all()
        assert (remove < n).all()
        if case % 10 == 0:
            p, q = plain_rates(s, n, total, max_rate)
            assert found.rates.numpy() == pytest.approx(p, abs=1e-6)
            assert remove.tolist() == q.tolist()


def test_caps_ties_and_layers_that_keep_all():
    assert rates_from_sensitivity([0.1, 0.1, 0.1], [3, 3, 3], 4).remove.tolist() == [2, 1, 1]  # ties: the earlier
    assert rates_from_sensitivity([0.1, 0.1], [3, 15], 3).remove.tolist() == [1, 2]  # 0.5 and 2.5, but for rounding
    assert rates_from_sensitivity([0.1, 0.1], [100, 100], 58, max_rate=0.29).remove.tolist() == [29, 29]  # so 28.99...
    assert rates_from_sensitivity([0.5], [10], 7).remove.tolist() == [7]  # a layer alone
    assert rates_from_sensitivity([0.5], [10], 7).rates.tolist() == pytest.approx([0.7])
    alone = rates_from_sensitivity([0.4, 0, -0.3], [10, 10, 10], 18)
    assert alone.rates.tolist() == pytest.approx([0, 0.9, 0.9])
    assert alone.remove.tolist() == [0, 9, 9]
    small = rates_from_sensitivity([0.0, 0.2, 0.2], [5, 100, 100], 100)
    assert small.rates[0] == 0.9  # 4.5 of 5 filters
    assert small.remove.tolist() == [4, 48, 48]
    with pytest.warns(UserWarning, match="no layer is sensitive"):
        flat = rates_from_sensitivity([0, -0.1], [10, 30], 20)
    assert flat.rates.tolist() == pytest.approx([0.5, 0.5])
    assert flat.remove.tolist() == [5, 15]
    assert rates_from_sensitivity([0.2, 0.1], [1, 1], 0).remove.tolist() == [0, 0]


def test_threshold_by_hand():
    """Check 7: 5% of 400 weights."""
    found = rates_from_sensitivity([0.2, 0.1], [100, 300], 20, rule="threshold")
    assert found.rates.tolist() == pytest.approx([0.08, 0.04])
    assert found.remove.tolist() == [8, 12]
    assert rates_from_sensitivity([0.2, 0], [100, 300], 20, rule="threshold").remove.tolist() == [20, 0]


def test_tolerated_ratios():
    """The last before the first that costs too much; the pitfall of the note is the first row."""
    drops = pd.DataFrame(
        {0.1: [0.01, 0.06, 0, 0.01], 0.2: [0.04, 0, 0, 0.08], 0.3: [0.10, 0, 0.05, 0.01]}, index=list("abcd")
    )
    assert tolerated_ratios(drops).to_dict() == {"a": 0.2, "b": 0, "c": 0.3, "d": 0.1}
    lost = pd.DataFrame({0.1: [0.90 - 0.89], 0.2: [0.90 - 0.85], 0.3: [0.90 - 0.80]}, index=["conv"])
    assert tolerated_ratios(lost, threshold=0.05)["conv"] == 0.2  # 0.05 but for rounding
    for columns in ([0.2, 0.1, 0.3], [0, 0.1, 0.2], [0.1, 0.5, 1]):
        with pytest.raises(ValueError, match="columns of drops must be ratios that rise"):
            tolerated_ratios(drops.set_axis(columns, axis=1))
    with pytest.raises(ValueError, match="drops must be finite"):
        tolerated_ratios(drops * np.nan)
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        tolerated_ratios(drops, threshold=-1)


def test_from_a_model_to_rates():
    model = digits_resnet()
    layers = ["conv1", "layer2.1.conv1", "layer3.3.conv2"]
    drops = pd.DataFrame({r: sensitivity(model, layers, strength=r).mean(axis=1) for r in (0.25, 0.5, 0.75)})
    tolerated, sizes = tolerated_ratios(drops, threshold=0.5), [8, 16, 32]
    assert tolerated["conv1"] < tolerated["layer3.3.conv2"]
    for mean, rule in ((drops[0.5], "inverse"), (tolerated, "threshold")):
        found = rates_from_sensitivity(mean, sizes, 20, rule=rule)
        assert found.remove.sum() == 20
        assert found.rates[0] < found.rates[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, 0.2], [4], 1), "mean and sizes must have one entry for each layer"),
        (([], [], 0), "mean and sizes must have one entry for each layer"),
        (([0.1, np.nan], [4, 4], 1), "mean must be finite"),
        (([0.1, 0.2], [4, 0], 1), "sizes must be positive integers"),
        (([0.1, 0.2], [4, 2.5], 1), "sizes must be positive integers"),
        (([0.1, 0.2], [4, 4], -1), "total must be an integer from 0 to the 6 that may go, got -1"),
        (([0.1, 0.2], [4, 4], 7), "total must be an integer from 0 to the 6 that may go, got 7"),
        (([0.1, 0.2], [4, 4], 1.5), "total must be an integer"),
        (([0.1, 0], [4, 4], 4), "total must be an integer from 0 to the 3 that may go, got 4"),
        (([0.1], [4], 4), "total must be an integer from 0 to the 3 that may go, got 4"),
        (([0.1, 0.2], [1, 1], 1), "total must be an integer from 0 to the 0 that may go, got 1"),
    ],
)
def test_budgets_that_cannot_be_met(arguments, message):
    with pytest.raises(ValueError, match=message):
        rates_from_sensitivity(*arguments)


def test_rules_and_rates_out_of_range():
    with pytest.raises(ValueError, match="rule must be 'inverse' or 'threshold', got 'linear'"):
        rates_from_sensitivity([0.1], [4], 1, rule="linear")
    with pytest.raises(ValueError, match="mean must be finite, and at least 0"):
        rates_from_sensitivity([0.1, -0.1], [4, 4], 1, rule="threshold")
    for max_rate in (0, 1, np.nan):
        with pytest.raises(ValueError, match=r"max_rate must be in \(0, 1\)"):
            rates_from_sensitivity([0.1], [4], 1, max_rate=max_rate)


# Early in training


@pytest.mark.slow
def test_the_order_of_layers_is_there_early():
    """Check 8: Spearman correlation of 10 epochs with 30 epochs, noise, median of 3 seeds."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:-540], order[-540:]
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        widths = [1, 16, 32, 32, 48, 48]
        model = nn.Sequential()
        for i in range(5):
            model.extend(
                [nn.Conv2d(widths[i], widths[i + 1], 3, 1 + i % 2, 1), nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
            )
        model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)])
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        @torch.no_grad()
        def evaluate(net):
            return float((net(x[test]).argmax(1) == y[test]).double().mean())

        profiles = []
        for epoch in range(1, 31):
            model.train()
            for rows in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            if epoch in (10, 30):
                table = layer_sensitivity(model, nn.Conv2d, evaluate, damage="noise", strength=1.0, progress=False)
                profiles.append(table.mean(axis=1))
        found.append(spearmanr(*profiles).statistic)
    assert np.median(found) >= 0.7, found
