"""`repgraph prune --filters` does what the functions do, and what it wrote loads again."""

import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from repgraph import cli
from repgraph.loading import load_model
from repgraph.prune import (
    Plan,
    compare_models,
    evaluate_classifier,
    load_pruned,
    plan_filters,
    prune_filters,
    repair,
    search_widths,
)
from repgraph.scores.by_name import filter_scores

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3),
    )
"""
SEEN = 48


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "compare_models", partial(compare_models, seconds=0.001))  # its latencies are no test
    x = torch.randn(80, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = load_model("mine.py:net")(x).argmax(1)
    y[::7] = torch.arange(len(y[::7])) % 3
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    return x, y


def call(monkeypatch, *options):
    arguments = ["repgraph", "prune", "mine.py:net", "data.npz", "--samples", SEEN, *options]
    monkeypatch.setattr(sys, "argv", [str(value) for value in arguments])
    cli.main()
    return Plan.load("repgraph-prune/plan.json")


def cross_entropy(model, x, y):
    return float(evaluate_classifier(model, (x[:SEEN], y[:SEEN]), progress=False)["cross_entropy"])


@pytest.mark.parametrize("budget", ["uniform", "global", "macs", "search"])
def test_filters_by_score_and_budget(here, monkeypatch, budget):
    x, y = here
    plan = call(monkeypatch, "--filters", 0.4, "--score", "hrank", "--budget", budget)
    model = load_model("mine.py:net").eval()
    scores = filter_scores(model, (x, y), "hrank", samples=torch.arange(SEEN), progress=False)
    if budget == "search":
        loss = partial(cross_entropy, x=x, y=y)
        expected = search_widths(model, x[:2], scores, loss, 0.4, by="hrank", progress=False)
    else:
        rule = {"uniform": {}, "global": {"budget": "global"}, "macs": {"of": "macs"}}[budget]
        expected = plan_filters(model, x[:2], scores, 0.4, by="hrank", **rule)
    assert plan.filters == expected.filters
    assert plan.by == "hrank"
    if budget in ("macs", "search"):
        assert plan.settings["macs"][1] <= 0.6 * plan.settings["macs"][0]
    table = pd.read_csv("repgraph-prune/results.csv", index_col="model")
    assert table.index.tolist() == ["before", "cut", "repaired"]
    assert table.loc["cut", "macs"] == plan.settings["macs"][1] // 2  # of one sample, where the example has two
    cut = prune_filters(model, x[:2], expected)
    mended = repair(model, cut, (x, y), samples=torch.arange(SEEN), progress=False)
    judged = evaluate_classifier(mended.model, (x[SEEN:], y[SEEN:]), progress=False)
    assert table.loc["repaired", "cross_entropy"] == pytest.approx(judged["cross_entropy"], rel=1e-4)
    loaded = load_pruned(load_model("mine.py:net"), "repgraph-prune", x[:2])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(x), mended.model(x), rtol=1e-4, atol=1e-5)


def test_linear_layers_by_name(here, monkeypatch):
    plan = call(monkeypatch, "--filters", 0.5, "--among", "7", "--score", "l1", "--no-repair")
    assert {name: len(own) for name, own in plan.filters.items()} == {"7": 6}
    assert pd.read_csv("repgraph-prune/results.csv", index_col="model").index.tolist() == ["before", "cut"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--filters", 0.5, "--layers", 1], "pass one of"),
        (["--filters", 1.0], "ratio must be"),
        (["--filters", 0.01], "nothing would be cut"),
        (["--filters", 0.5, "--score", "beauty"], "'beauty' is not one of"),
        (["--filters", 0.999, "--budget", "macs"], "cannot come down"),
        (["--filters", 0.5, "--among", "2"], "must be a convolution or a linear layer"),
    ],
)
def test_mistakes(here, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        call(monkeypatch, *options)
    assert message in capsys.readouterr().err
