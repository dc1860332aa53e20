"""Gates and complexity of small networks against their pre-activations and sums over all pairs of samples."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repgraph.metrics.complexity import gating_states, transformation_complexity

seeds = st.integers(0, 2**32 - 1)
N = 24
ESTIMATORS = ["kde", "kde_lower", "plugin"]


def data(seed=0, n=N, d=6):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


X = data()
Y = torch.arange(N) % 3


def drawn(model, seed):
    """The model with weights drawn from the seed, in eval mode but for one part."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    model.eval()
    return model


def chain(seed=0, widths=(6, 5, 4, 3)):
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return drawn(nn.Sequential(*(part for pair in layers for part in pair), nn.Linear(widths[-1], 2)), seed)


class Mixed(nn.Module):
    """A ReLU used twice, one of ReLU6 and a function."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.act, self.six = nn.ReLU(), nn.ReLU6()

    def steps(self, x):
        a = self.first(x)
        b = self.second(a.relu())
        c = 3 * self.second(b.relu())
        d = self.second(c.clamp(0, 6))
        return a, b, c, d

    def forward(self, x):
        b = self.second(self.act(self.first(x)))
        c = 3 * self.second(self.act(b))
        return self.last(F.relu(self.second(self.six(c))))


def traces(model):
    hooks = (len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return [m.training for m in model.modules()], sum(hooks), weights


def assert_untouched(model, before):
    training, hooks, weights = traces(model)
    assert (training, hooks) == before[:2]
    assert all(torch.equal(value, before[2][name]) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def entropy(s, lam, estimator, d):
    """The definition over all pairs; d gates in the width."""
    s = np.asarray(s, dtype=np.float64)
    apart = ((s[:, None] - s) ** 2).sum(2)
    if estimator == "plugin" or d == 0:
        return -np.log2((apart == 0).mean(1)).mean()
    return -np.log2(np.exp(-apart / (2 * lam * d * (4 if estimator == "kde_lower" else 1))).mean(1)).mean()


def information(s, y, lam, estimator, d):
    y = np.asarray(y)
    within = sum((y == c).mean() * entropy(s[y == c], lam, estimator, d) for c in np.unique(y))
    return entropy(s, lam, estimator, d) - within


def single(rates):
    a = np.clip(np.asarray(rates, dtype=np.float64), 1e-300, 1)
    b = np.clip(1 - a, 1e-300, 1)
    return -(a * np.log2(a) + b * np.log2(b)).sum()


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformation_complexity(*args, progress=False, **options)


def by_hand(states, y, lam=0.01, estimator="kde", width="total"):
    """The whole table from the gates."""
    names, parts = list(states), list(states.values())
    counts = [s.shape[1] if width == "total" else int((s.any(0) & ~s.all(0)).sum()) for s in parts]
    rows = {}
    for i, name in enumerate(names):
        s, so_far, left = parts[i], torch.cat(parts[: i + 1], 1), torch.cat(parts[i:], 1)
        plugin, alone = entropy(s, lam, "plugin", 1), single(s.double().mean(0))
        row = {
            "gates": s.shape[1],
            "constant": float((s.all(0) | ~s.any(0)).double().mean()),
            "plugin": plugin,
            "cross_entropy": alone,
            "total_correlation": alone - plugin,
            "cumulative_plugin": entropy(so_far, lam, "plugin", 1),
        }
        for key, gates, d in (
            ("", s, counts[i]), ("cumulative", so_far, sum(counts[: i + 1])), ("remaining", left, sum(counts[i:])),
        ):  # fmt: skip
            row[key or "entropy"] = entropy(gates, lam, estimator, d)
            if y is not None:
                told = f"{key}_label_information" if key else "label_information"
                row[told] = information(gates, y, lam, estimator, d)
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


# Gates


def test_gates_are_the_signs_of_the_preactivations():
    model = chain()
    states = gating_states(model, X, progress=False)
    assert list(states) == ["1", "3", "5"]
    with torch.no_grad():
        for name in states:
            assert torch.equal(states[name], model[: int(name)](X) > 0)
            assert states[name].dtype == torch.bool


def test_a_preactivation_of_0_is_closed():
    states = gating_states(nn.Sequential(nn.ReLU()), torch.tensor([[0.0, -0.0, 1e-30], [1.0, -1.0, 0.0]]))
    assert states["0"].tolist() == [[False, False, True], [True, False, False]]


def test_functions_second_calls_and_upper_kinks():
    model = drawn(Mixed(), 0)
    states = gating_states(model, X, batch_size=7, progress=False)
    assert list(states) == ["act", "act#1", "six", "six/upper", "#relu0"]
    with torch.no_grad():
        a, b, c, d = model.steps(X)
    for found, expected in zip(states.values(), (a > 0, b > 0, c > 0, c > 6, d > 0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_batches_change_nothing(size):
    model = drawn(Mixed(), 1)
    whole = gating_states(model, X, progress=False)
    for name, found in gating_states(model, X, batch_size=size, progress=False).items():
        assert torch.equal(found, whole[name])
    expected = quiet(model, X, Y).layers
    pd.testing.assert_frame_equal(quiet(model, X, Y, batch_size=size).layers, expected, check_like=False)


def test_gates_of_channels_and_positions():
    model = drawn(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2)), 0)
    x = data(0, 5, 2 * 5 * 4).reshape(5, 2, 5, 4)
    states = gating_states(model, x, progress=False)
    with torch.no_grad():
        assert torch.equal(states["1"], (model[0](x) > 0).flatten(1))
    assert quiet(model, x).gates == 3 * 4 * 3


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("act", ["act"]),
        ("act*", ["act", "act#1"]),
        (["six/upper", "act"], ["act", "six/upper"]),
        ("*relu*", ["#relu0"]),
        ("*", ["act", "act#1", "six", "six/upper", "#relu0"]),
    ],
)
def test_layers_by_name_or_wildcard(layers, expected):
    model = drawn(Mixed(), 0)
    whole = gating_states(model, X, progress=False)
    states = gating_states(model, X, layers, progress=False)
    assert list(states) == expected
    assert all(torch.equal(states[name], whole[name]) for name in expected)
    report = quiet(model, X, Y, layers=layers)
    assert list(report.layers.index) == list(report.rates) == expected
    assert report.gates == 5 * len(expected)


# Table


@given(seeds, st.sampled_from(ESTIMATORS), st.sampled_from(["total", "active"]), st.sampled_from([0.01, 0.04, 0.3]))
@settings(max_examples=12)
def test_table_from_the_gates(seed, estimator, width, lam):
    model = drawn(Mixed() if seed % 2 else chain(), seed)
    x = data(seed)
    report = quiet(model, x, Y, lam=lam, estimator=estimator, width=width)
    states = gating_states(model, x, progress=False)
    expected = by_hand(states, Y, lam, estimator, width)
    found = report.layers
    assert set(found.columns) == set(expected.columns)
    assert found.index.name == "layer"
    pd.testing.assert_frame_equal(
        found[expected.columns], expected, check_dtype=False, check_names=False, atol=1e-9, rtol=0
    )
    last = expected.iloc[-1]
    assert report.total == pytest.approx(last["cumulative"], abs=1e-9)
    assert report.total == pytest.approx(found["remaining"].iloc[0], abs=1e-9)
    assert report.label_information == pytest.approx(last["cumulative_label_information"], abs=1e-9)
    assert (report.n, report.gates) == (N, sum(s.shape[1] for s in states.values()))
    assert (report.lam, report.estimator, report.width) == (lam, estimator, width)
    for name, rates in report.rates.items():
        torch.testing.assert_close(rates.cpu(), states[name].double().mean(0), atol=1e-12, rtol=0)


@given(seeds)
@settings(max_examples=8)
def test_plugin_theorems(seed):
    model, x = chain(seed), data(seed)
    table = quiet(model, x, Y, estimator="plugin").layers
    assert table["cumulative_plugin"].is_monotonic_increasing
    assert (table["remaining"].diff().dropna() <= 1e-9).all()
    np.testing.assert_allclose(table["entropy"] + table["total_correlation"], table["cross_entropy"], atol=1e-9)
    np.testing.assert_allclose(table["cumulative"], table["cumulative_plugin"], atol=1e-12)
    assert (table["entropy"] <= table["cumulative"] + 1e-9).all()
    assert (table["label_information"] <= math.log2(3) + 1e-9).all()
    assert (quiet(model, x, Y).layers["cumulative"] <= table["cumulative"] + 1e-9).all()


def test_ceilings():
    y = torch.tensor([0] * 12 + [1] * 6 + [2] * 6)
    report = quiet(chain(), X, y)
    assert report.ceiling == pytest.approx(math.log2(24), abs=1e-12)
    assert report.label_ceiling == pytest.approx(1.5, abs=1e-12)
    assert report.layers.attrs["ceiling"] == report.ceiling
    assert report.layers.attrs["label_ceiling"] == report.label_ceiling
    assert report.layers.attrs["n"] == 24


def test_labels_from_the_data_or_by_argument():
    model = chain()
    names = [f"class {c}" for c in Y.tolist()]
    expected = quiet(model, X, Y).layers
    for report in (quiet(model, (X, Y)), quiet(model, X, names), quiet(model, (X, torch.zeros(N).long()), Y.tolist())):
        pd.testing.assert_frame_equal(report.layers, expected)


def test_without_labels():
    report = quiet(chain(), X)
    assert math.isnan(report.label_information)
    assert math.isnan(report.label_ceiling)
    assert not [name for name in report.layers if "label" in name]
    expected = quiet(chain(), X, Y)
    assert report.total == expected.total
    pd.testing.assert_frame_equal(report.layers, expected.layers[report.layers.columns], check_names=False)


def test_one_class_tells_nothing():
    report = quiet(chain(), X, [0] * N)
    assert report.label_information == pytest.approx(0, abs=1e-12)
    assert report.label_ceiling == 0
    assert "-0.000" not in repr(report)


def test_constant_gates_widen_the_kernel_of_all_layers_so_far():
    """Four gates that never change after two that do: 0.99722 bits fall to 0.93797."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.zero_()
        for layer, bias in ((model[0], 0.0), (model[2], 1.0)):
            layer.bias.fill_(bias)
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0]])
    table = quiet(model, x, lam=0.04).layers
    assert table["constant"].tolist() == [0.5, 1]
    assert table["cumulative"].tolist() == pytest.approx([0.99722, 0.93797], abs=1e-5)
    assert table["entropy"].tolist() == pytest.approx([0.99722, 0], abs=1e-5)
    active = quiet(model, x, lam=0.04, width="active").layers
    expected = 1 - math.log2(1 + math.exp(-1 / 0.08))
    assert active["cumulative"].tolist() == pytest.approx([expected, expected], abs=1e-9)
    assert active["remaining"].tolist() == pytest.approx([expected, 0], abs=1e-9)


def test_all_gates_constant():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    for width in ("total", "active"):
        report = quiet(model, X, Y, width=width)
        row = report.layers.loc["1"]
        assert row.drop(["gates", "constant"]).abs().max() == 0
        assert (row["constant"], report.total) == (1, 0)


@pytest.mark.parametrize("d", [32767, 32768, 40000])
def test_many_gates_in_one_layer_are_counted_exactly(d):
    """Distances of 2^15 and more do not wrap around."""
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.ReLU())
    x = torch.ones(4, d)
    x[0] = -1
    x[1, 10:] = -1
    table = quiet(model, x, lam=0.2).layers
    states = gating_states(model, x, progress=False)
    expected = by_hand(states, None, lam=0.2)
    for column in ("entropy", "cumulative", "remaining"):
        assert table[column].tolist() == pytest.approx(expected[column].tolist(), abs=1e-12)


# Warnings


def saturated():
    """Wide random layers: all rows far apart."""
    return drawn(nn.Sequential(nn.Linear(6, 600), nn.ReLU(), nn.Linear(600, 2)), 0)


def test_saturation_warns_and_is_told():
    with pytest.warns(UserWarning, match=r"above 97% of its ceiling log2 N = 4\.58 bits at 1") as caught:
        report = transformation_complexity(saturated(), X, Y, lam=0.001, progress=False)
    assert len(caught) == 2
    assert report.warnings == tuple(str(warning.message) for warning in caught)
    assert {warning.filename for warning in caught} == {__file__}
    assert report.total > 0.97 * report.ceiling
    for note in report.warnings:
        assert note in repr(report)
        assert note in report._repr_html_()


def test_no_warning_below_the_ceiling():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = transformation_complexity(saturated(), X, Y, lam=1.0, progress=False)
    assert report.warnings == ()
    assert report.total < 0.97 * report.ceiling


def test_only_the_saturated_layers_are_named():
    model = chain(0, (6, 600, 2))
    report = quiet(model, X, lam=0.001)
    share = report.layers["entropy"] / report.ceiling
    assert (share["1"] > 0.97, share["3"] < 0.97) == (True, True)
    assert "at 1:" in report.warnings[0]


# Text


def test_repr_tells_totals_ceilings_and_layers():
    report = quiet(chain(), X, Y)
    first = repr(report).splitlines()[0]
    assert first == (
        f"ComplexityReport: 12 gates, 24 samples; total {report.total:.3f} of 4.585 bits, "
        f"label information {report.label_information:.3f} of 1.585 bits"
    )
    assert f"{report.layers['entropy'].iloc[0]:.3f}".rstrip("0") in repr(report)
    html = report._repr_html_()
    assert html.startswith(f"<p>{first}</p>")
    assert "<table" in html
    assert "label" not in repr(quiet(chain(), X))


# No trace


@pytest.mark.parametrize("f", [gating_states, transformation_complexity])
def test_the_model_is_left_as_it_was(f):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU())
    model.train()
    model[1].eval()
    before = traces(model)
    x = X.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = (f(model, x, progress=False) for _ in range(2))
    assert_untouched(model, before)
    assert torch.equal(x, X)
    a, b = (found if f is gating_states else found.rates for found in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


class Fails(nn.Sequential):
    def forward(self, x):
        out = super().forward(x)
        if (x > 100).any():
            raise RuntimeError("too large")
        return out


@pytest.mark.parametrize("f", [gating_states, transformation_complexity])
def test_the_model_is_left_as_it_was_when_it_raises(f):
    model = Fails(nn.Linear(6, 4), nn.ReLU(), nn.Dropout())
    model[2].eval()
    before = traces(model)
    x = X.clone()
    x[20] = 1000
    with pytest.raises(RuntimeError, match="too large"):
        f(model, x, batch_size=8, progress=False)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="class 1 must have at least 2 samples"):
        transformation_complexity(model, X, [0] * 23 + [1], progress=False)
    assert_untouched(model, before)


# Bad input


@pytest.mark.parametrize("f", [gating_states, transformation_complexity])
@pytest.mark.parametrize(
    "model", [nn.Linear(6, 2), nn.Sequential(nn.Linear(6, 2), nn.GELU(), nn.SiLU(), nn.Softmax(1))]
)
def test_models_without_gates_are_refused(f, model):
    before = traces(model)
    with pytest.raises(ValueError, match="no gate in the model"):
        f(model, X, progress=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("f", [gating_states, transformation_complexity])
def test_unknown_and_no_layers_are_refused(f):
    with pytest.raises(ValueError, match="no gate '9' in the model"):
        f(chain(), X, layers="9", progress=False)
    with pytest.raises(ValueError, match="layers is empty"):
        f(chain(), X, layers=[], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 0}, "lam must be positive, got 0"),
        ({"lam": -1.0}, "lam must be positive"),
        ({"estimator": "knn"}, "estimator must be 'kde', 'kde_lower' or 'plugin'"),
        ({"width": "all"}, "width must be 'total' or 'active'"),
        ({"labels": [0, 1]}, "labels must have one entry per sample: expected 24, got 2"),
        ({"labels": [0] * 23 + [1]}, "class 1 must have at least 2 samples, got 1"),
        ({"labels": torch.rand(24)}, "labels must be integers, bools or strings"),
    ],
)
def test_bad_input(options, message):
    model = chain()
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        transformation_complexity(model, X, progress=False, **options)
    assert_untouched(model, before)


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        transformation_complexity(chain(), X[:1], progress=False)
