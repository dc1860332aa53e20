"""Accuracy and cross-entropy against a hand loop, torch and scikit-learn; models side by side; no trace, refusals."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from repgraph.cost import model_cost
from repgraph.demo import digits, digits_resnet
from repgraph.prune import compare_models, drop_layers, evaluate_classifier

pytestmark = pytest.mark.usefixtures("one_thread")

generator = torch.Generator().manual_seed(0)
X = torch.randn(30, 4, generator=generator)
Y = torch.arange(30) * 7 % 3
WORDS = np.array(["ant", "bee", "cat"])
NAMES = WORDS[Y.numpy()]


class Net(nn.Module):
    """Batch norm, dropout, and a tuple whose first tensor are the scores."""

    def __init__(self, classes=3):
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, classes)

    def forward(self, x):
        scores = self.linear(self.drop(self.norm(x)))
        return scores, torch.zeros(len(x), 2)


def net(classes=3):
    torch.manual_seed(0)
    return Net(classes).eval()


def scores_of(model, x=X):
    with torch.no_grad():
        return model(x)[0]


def evaluate(model, data, **options):
    return evaluate_classifier(model, data, progress=False, **options)


def by_loop(scores, y):
    """One sample at a time."""
    loss = hits = 0.0
    for row, label in zip(scores.double(), y.tolist(), strict=True):
        loss += float(row.exp().sum().log() - row[label])
        hits += max(range(len(row)), key=row.__getitem__) == label
    return {"cross_entropy": loss / len(y), "accuracy": hits / len(y), "samples": len(y)}


# Values


@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.integers(1, 9), st.integers(2, 6))
def test_parity(seed, n, batch_size, classes):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    y = torch.randint(0, classes, (n,), generator=generator)
    model = net(classes)
    found, scores = evaluate(model, (x, y), batch_size=batch_size), scores_of(model, x)
    assert found.index.tolist() == ["cross_entropy", "accuracy", "samples"]
    assert found.to_dict() == pytest.approx(by_loop(scores, y), rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(float(F.cross_entropy(scores, y)), rel=1e-5)
    probabilities = scores.double().softmax(1).numpy()
    assert found["cross_entropy"] == pytest.approx(log_loss(y, probabilities, labels=range(classes)), rel=1e-5)
    assert found["accuracy"] == accuracy_score(y, scores.argmax(1))


def test_demo_network():
    x, y = digits()
    model = digits_resnet()
    with torch.no_grad():
        scores = model(x)
    found = evaluate(model, (x, y))
    assert found["accuracy"] == accuracy_score(y, scores.argmax(1))
    assert found["cross_entropy"] == pytest.approx(float(F.cross_entropy(scores, y)), rel=1e-5)
    assert found["samples"] == 1000


def test_every_form_of_the_data():
    expected = evaluate(net(), (X, Y))
    batches = [(X[:8], Y[:8]), (X[8:11], Y[8:11]), (X[11:], Y[11:])]
    forms = [
        (X.numpy(), Y.numpy()),
        {"x": X, "labels": Y},
        batches,
        iter(batches),
        (batch for batch in batches),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), 7),
    ]
    for data in forms:
        pd.testing.assert_series_equal(evaluate(net(), data), expected, rtol=1e-6)


def test_string_labels_are_sorted():
    expected = evaluate(net(), (X, Y))
    pd.testing.assert_series_equal(evaluate(net(), (X, NAMES)), expected)
    pd.testing.assert_series_equal(evaluate(net(), X, labels=list(NAMES)), expected)
    pd.testing.assert_series_equal(evaluate(net(), X, labels=pd.Series(NAMES)), expected)
    other = np.array(["c", "b", "a"])[Y.numpy()]  # the last class comes first
    assert evaluate(net(), (X, other))["accuracy"] == accuracy_score(2 - Y, scores_of(net()).argmax(1))


@pytest.mark.parametrize("own", [True, False])
def test_string_labels_of_samples_without_one_of_the_classes(own):
    """Right numbers, or a refusal, but no wrong numbers."""
    rows = (Y > 0).nonzero()[:, 0]
    options = {"data": (X, NAMES)} if own else {"data": X, "labels": NAMES}
    expected = evaluate(net(), (X, Y), samples=rows)
    try:
        found = evaluate(net(), **options, samples=rows)
    except ValueError:
        return
    pd.testing.assert_series_equal(found, expected)


def test_integer_labels_are_places_also_where_classes_are_absent():
    rows = (Y > 0).nonzero()[:, 0]
    assert evaluate(net(), (X, Y), samples=rows).to_dict() == pytest.approx(
        by_loop(scores_of(net())[rows], Y[rows]), rel=1e-5
    )
    assert evaluate(net(5), (X, Y)).to_dict() == pytest.approx(by_loop(scores_of(net(5)), Y), rel=1e-5)


def test_bool_labels():
    expected = by_loop(scores_of(net(2)), (Y > 0).long())
    assert evaluate(net(2), (X, Y > 0)).to_dict() == pytest.approx(expected, rel=1e-5)


def test_labels_replace_those_of_the_data():
    other = (Y + 1) % 3
    expected = evaluate(net(), (X, other))
    assert not expected.equals(evaluate(net(), (X, Y)))
    for labels in (other, other.numpy(), other.tolist()):
        pd.testing.assert_series_equal(evaluate(net(), (X, Y), labels=labels), expected)
        pd.testing.assert_series_equal(evaluate(net(), X, labels=labels), expected)
    pd.testing.assert_series_equal(evaluate(net(), iter([X[:8], X[8:]]), labels=other), expected)


@pytest.mark.parametrize("samples", [1, 11, [3, 4, 28], torch.tensor([28, 4, 3]), None])
@pytest.mark.parametrize("kind", ["tuple", "labels", "iterator"])
def test_samples(samples, kind):
    rows = torch.arange(30) if samples is None else torch.arange(30)[samples if np.ndim(samples) else slice(samples)]
    expected = by_loop(scores_of(net())[rows], Y[rows])
    data = {"tuple": (X, Y), "labels": X, "iterator": iter([(X[:8], Y[:8]), (X[8:], Y[8:])])}[kind]
    labels = Y if kind == "labels" else None
    found = evaluate(net(), data, labels=labels, samples=samples, batch_size=4)
    assert found.to_dict() == pytest.approx(expected, rel=1e-5)


def test_labels_of_the_wanted_samples_only():
    rows = [3, 4, 28]
    assert evaluate(net(), X, labels=Y[rows], samples=rows).equals(evaluate(net(), (X, Y), samples=rows))


def test_low_precision_scores_are_compared_in_float32():
    model = nn.Linear(4, 3).bfloat16().eval()
    with torch.no_grad():
        scores = model(X.bfloat16()).float()
    assert evaluate(model, (X, Y)).to_dict() == pytest.approx(by_loop(scores, Y), rel=1e-5)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_looked_through(wrap):
    assert evaluate(wrap(net()), (X, Y)).equals(evaluate(net(), (X, Y)))


# No trace


def state(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return weights, modes, hooks, flags


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


class Restless(Net):
    """Counts its calls in a buffer and draws random numbers."""

    def __init__(self, fail=False):
        super().__init__()
        self.fail = fail
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        if self.fail and self.calls > 1:
            raise RuntimeError("second batch")
        return super().forward(x)


@pytest.mark.parametrize("fail", [False, True])
def test_model_and_random_numbers_are_as_they_were(fail):
    torch.manual_seed(0)
    model = Restless(fail).train()
    model.drop.eval()  # mixed modes
    model.linear.bias.requires_grad_(False)
    before, numbers, data = state(model), random_states(), (X.clone(), Y.clone())
    if fail:
        with pytest.raises(RuntimeError, match="second batch"):
            evaluate(model, data, batch_size=8)
    else:
        evaluate(model, data, batch_size=8)
    after = state(model)
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:] == before[1:]
    assert random_states() == numbers
    assert torch.equal(data[0], X)
    assert torch.equal(data[1], Y)


def test_a_model_in_training_mode_is_judged_in_eval_mode():
    assert evaluate(net().train(), (X, Y)).equals(evaluate(net(), (X, Y)))


# Refusals


class Shaped(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.new_zeros([len(x) if side is None else side for side in self.shape])


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (net(), X, {}, r"data must have labels: pass \(inputs, labels\), or labels="),
        (net(), (X, torch.zeros(30, 3, 3)), {}, "data must have labels"),
        (net(), (X, Y - 1), {}, "labels must be classes 0 to 2 of the model, got -1 to 1"),
        (net(), (X, Y + 1), {}, "labels must be classes 0 to 2 of the model, got 1 to 3"),
        (net(2), (X, NAMES), {}, "labels.* of the model, got 0 to 2|labels.* 3 classes"),
        (net(), (X, Y / 2), {}, "labels must be integers, bools or strings, got torch.float"),
        (net(), (X, F.one_hot(Y)), {}, r"shape \(30,\), got shape \(30, 3\)"),
        (net(), X, {"labels": Y[:7]}, "labels must have one entry per sample: expected 30, got 7"),
        (net(), (X, Y), {"samples": [30]}, r"samples must be positions in 0..29"),
        (net(), (X, Y), {"samples": [1, 1]}, "samples must be distinct"),
        (net(), (X, Y), {"batch_size": 0}, "batch_size must be at least 1"),
        (Shaped((None,)), (X, Y), {}, r"one row of class scores per sample, got \(30,\)"),
        (Shaped((None, 3, 2)), (X, Y), {}, r"one row of class scores per sample, got \(30, 3, 2\)"),
        (Shaped((5, 3)), (X, Y), {}, r"one row of class scores per sample, got \(5, 3\)"),
    ],
)
def test_refusals(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, **options)


# Models side by side


def compare(models, data, **options):
    return compare_models(models, data, seconds=0.001, **options)


COST = ["macs", "parameters", "milliseconds", "batch"]


def test_columns_with_and_without_labels():
    models = {"three": net(), "five": net(5)}
    table = compare(models, (X, Y))
    assert table.columns.tolist() == ["accuracy", "cross_entropy", *COST]
    assert table.index.tolist() == ["three", "five"]
    assert table.index.name == "model"
    for name, model in models.items():
        expected = evaluate(model, (X, Y))
        assert (
            table.loc[name, ["accuracy", "cross_entropy"]].to_dict()
            == expected[["accuracy", "cross_entropy"]].to_dict()
        )
    plain = compare(models, X)
    assert plain.columns.tolist() == COST
    assert plain[COST[:2]].equals(table[COST[:2]])
    assert (table["milliseconds"] > 0).all()
    assert compare(models, X, labels=Y)["accuracy"].equals(table["accuracy"])
    assert compare(models, (X, Y), labels=(Y + 1) % 3)["accuracy"].equals(compare(models, (X, (Y + 1) % 3))["accuracy"])


def test_costs_are_those_of_one_sample():
    model, (x, y) = digits_resnet(), digits()
    cut = drop_layers(model, ["layer1.1", "layer3.2"], x[:2])
    table = compare({"whole": model, "cut": cut.model}, (x, y), samples=50, batch_size=20)
    for name, each in (("whole", model), ("cut", cut.model)):
        cost = model_cost(each, x[:1])
        assert table.loc[name, COST[:2]].tolist() == [cost.macs, cost.parameters]
    assert [table[name].dtype.kind for name in COST] == ["i", "i", "f", "i"]
    assert table.loc["cut", "macs"] < table.loc["whole", "macs"]
    assert table.attrs == {"samples": 50}
    assert set(table["batch"]) == {20}


@pytest.mark.parametrize(("samples", "batch"), [(11, 8), ([3, 4, 28], 2), (5, 5)])
def test_compare_models_on_samples(samples, batch):
    """Timed on the wanted samples of the first batch."""
    table = compare({"net": net()}, (X, Y), samples=samples, batch_size=8)
    expected = evaluate(net(), (X, Y), samples=samples)
    assert table.loc["net", "accuracy"] == expected["accuracy"]
    assert table.loc["net", "cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-6)
    assert table.attrs == {"samples": int(expected["samples"])}
    assert set(table["batch"]) == {batch}


def test_compare_models_leaves_no_trace():
    torch.manual_seed(0)
    model = Restless().train()
    before = state(model)
    compare({"restless": model}, (X, Y), batch_size=8)
    after = state(model)
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:] == before[1:]


def test_compare_models_reads_an_iterator():
    table = compare({"a": net(), "b": net(5)}, iter([(X[:8], Y[:8]), (X[8:], Y[8:])]))
    assert table[["accuracy", *COST[:2]]].equals(compare({"a": net(), "b": net(5)}, (X, Y))[["accuracy", *COST[:2]]])


def test_compare_models_of_no_models():
    with pytest.raises(ValueError, match="models"):
        compare({}, (X, Y))


def test_compare_models_refuses_what_evaluation_refuses():
    with pytest.raises(ValueError, match="labels must be classes 0 to 2 of the model, got 1 to 3"):
        compare({"net": net()}, (X, Y + 1))
    with pytest.raises(ValueError, match="one row of class scores per sample"):
        compare({"net": net(), "shaped": Shaped((None, 3, 2))}, (X, Y))
