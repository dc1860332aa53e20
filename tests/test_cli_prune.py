"""`repgraph prune` does what the functions do, writes what it names, and says in one line what is wrong."""

import base64
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from repgraph import capture, cli, profile_activations
from repgraph.layerwise import set_order
from repgraph.loading import load_data, load_model
from repgraph.prune import (
    Plan,
    compare_models,
    drop_and_evaluate,
    drop_layers,
    droppable_layers,
    evaluate_classifier,
    layer_scores,
    load_pruned,
    plan_layers,
    redundant_blocks,
    repair,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down, self.size = nn.Linear(8, 16), nn.Linear(16, 8), size

    def forward(self, x):
        return x + self.size * self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self, sizes, classes):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.Sequential(*(Block(size) for size in sizes))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))

def net(seed=0, classes=3):
    torch.manual_seed(seed)
    return Net((2.0, 0.2, 1.0, 0.1, 1.5), classes)

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
"""
N, SEEN = 120, 60
FILES = ["plan.json", "weights.safetensors", "results.csv", "plan.png", "pruning.html"]
BLOCKS = [f"blocks.{i}" for i in range(5)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "compare_models", partial(compare_models, seconds=0.001))  # its latencies are no test
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(3, 6, generator=generator)[torch.arange(N) % 3] + torch.randn(N, 6, generator=generator)
    with torch.no_grad():
        y = load_model("mine.py:net")(x).argmax(1)  # what the network says, but for a few
    y[::9] = torch.arange(len(y[::9])) % 3
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    np.savez(tmp_path / "unlabelled.npz", x=x.numpy())
    np.savez(tmp_path / "words.npz", x=x.numpy(), y=np.array(["ant", "bee", "cat"])[y.numpy()])
    return tmp_path


@pytest.fixture
def here(drawn, no_pictures):
    return drawn


def call(monkeypatch, *arguments, data="data.npz", samples=SEEN):
    """The command in this process."""
    options = [] if samples is None else ["--samples", samples]
    monkeypatch.setattr(sys, "argv", ["repgraph", "prune", "mine.py:net", data, *map(str, [*options, *arguments])])
    cli.main()


def read(folder="repgraph-prune"):
    return Plan.load(f"{folder}/plan.json"), pd.read_csv(f"{folder}/results.csv", index_col="model")


def by_functions(plan_of, *, order=None, mend=True):
    """Plan and table, from the functions that the command calls."""
    model, data = load_model("mine.py:net"), load_data("data.npz")
    order = torch.arange(N) if order is None else order
    seen, rest = order[:SEEN], order[SEEN:]
    example = data[0][:2]
    pruned = drop_layers(model, plan_of(model, data, seen), example)
    models = {"before": model, "dropped": pruned.model}
    if mend and pruned.plan.layers:
        pruned = repair(model, pruned, data, samples=seen, progress=False)
        models["repaired"] = pruned.model
    return pruned.plan, compare_models(models, data, samples=rest, seconds=0.001)


def assert_same(found, expected):
    (plan, table), (expected_plan, expected_table) = found, expected
    assert (plan.layers, plan.by, plan.renamed, plan.repairs) == (
        expected_plan.layers, expected_plan.by, expected_plan.renamed, expected_plan.repairs)  # fmt: skip
    assert plan.scores == pytest.approx(expected_plan.scores)
    assert plan.threshold == expected_plan.threshold
    columns = ["accuracy", "cross_entropy", "macs", "parameters"]
    assert table.columns.tolist() == [*columns, "milliseconds", "batch"]
    pd.testing.assert_frame_equal(table[columns], expected_table[columns], rtol=1e-6)


def by_score(score, count, seed=None):
    def plan_of(model, data, seen):
        scores = layer_scores(model, data, by=[score], samples=SEEN, seed=seed, progress=False)[score]
        return plan_layers(scores, count)

    return plan_of


@pytest.mark.parametrize(
    ("by", "count"), [("redundancy", 1), ("redundancy", 3), ("modularity", 2), ("random", 2), ("tail", 2), ("cka", 1)]
)
def test_layers_by_score(here, monkeypatch, by, count):
    call(monkeypatch, "--layers", count, "--by", by)
    plan, table = read()
    assert len(plan.layers) == count
    assert list(plan.scores) == BLOCKS
    assert table.index.tolist() == ["before", "dropped", "repaired"]
    assert_same((plan, table), by_functions(by_score(by, count)))


def test_redundancy_is_the_default(here, monkeypatch):
    call(monkeypatch, "--layers", 2)
    assert read()[0].by == "redundancy"


def test_oracle_is_the_cross_entropy_on_the_samples_of_the_choice(here, monkeypatch):
    call(monkeypatch, "--layers", 2, "--by", "oracle")

    def loss(model, x, y):
        with torch.no_grad():
            return float(F.cross_entropy(model(x), y))

    def plan_of(model, data, seen):
        x, y = (each[seen] for each in data)
        rises = drop_and_evaluate(model, BLOCKS, lambda net: loss(net, x, y), data[0][:2], progress=False)
        return plan_layers(rises, 2)

    plan, table = read()
    expected, expected_table = by_functions(plan_of)
    assert plan.scores == pytest.approx(expected.scores, abs=1e-6)
    assert plan.layers == expected.layers
    assert table["accuracy"].tolist() == expected_table["accuracy"].tolist()


@pytest.mark.parametrize("tol", [0.0, 0.05])
def test_tol_is_the_rule_of_plateaus(here, monkeypatch, tol):
    call(monkeypatch, "--tol", tol)

    def plan_of(model, data, seen):
        acts = capture(model, data, samples=seen, progress=False)
        curve = profile_activations(acts, n=SEEN, repeats=1, progress=False)
        return redundant_blocks(curve, droppable_layers(model, data[0][:2]), tol=tol)

    found = read()
    assert_same(found, by_functions(plan_of))
    assert found[0].threshold == tol


def test_no_repair(here, monkeypatch):
    call(monkeypatch, "--layers", 2, "--no-repair")
    plan, table = read()
    assert table.index.tolist() == ["before", "dropped"]
    assert plan.repairs == {}
    assert "repair" not in plan.settings
    assert_same((plan, table), by_functions(by_score("redundancy", 2), mend=False))


def test_no_layers_are_no_cut(here, monkeypatch):
    call(monkeypatch, "--layers", 0)
    plan, table = read()
    assert plan.layers == ()
    assert table.index.tolist() == ["before", "dropped"]
    assert table.loc["dropped", "cross_entropy"] == table.loc["before", "cross_entropy"]


@pytest.mark.parametrize("by", ["redundancy", "random"])
def test_seed_draws_the_samples(here, monkeypatch, by):
    for out, seed in (("first", 3), ("again", 3), ("other", 4)):
        call(monkeypatch, "--layers", 2, "--by", by, "--seed", seed, "--out", out)
    order = set_order(load_data("data.npz"), 64, 3)
    assert_same(read("first"), by_functions(by_score(by, 2, 3), order=order))
    assert (here / "first/plan.json").read_text() == (here / "again/plan.json").read_text()
    one, other = read("first"), read("other")
    assert one[0].settings["seed"] == 3
    assert one[0].scores != other[0].scores
    assert one[1].loc["before", "cross_entropy"] != other[1].loc["before", "cross_entropy"]  # others judge


def test_judged_on_samples_that_the_choice_has_not_seen(here, monkeypatch):
    """Other labels behind --samples change the table and not the plan."""
    call(monkeypatch, "--layers", 2, "--by", "modularity", "--out", "one")
    with np.load("data.npz") as file:
        x, y = file["x"], file["y"].copy()
    y[SEEN:] = (y[SEEN:] + 1) % 3
    np.savez("data.npz", x=x, y=y)
    call(monkeypatch, "--layers", 2, "--by", "modularity", "--out", "other")
    assert (here / "one/plan.json").read_text() == (here / "other/plan.json").read_text()
    assert load_file("one/weights.safetensors").keys() == load_file("other/weights.safetensors").keys()
    assert (read("one")[1]["accuracy"] > read("other")[1]["accuracy"]).all()


def test_files_are_written_and_named(drawn, monkeypatch, capsys):
    call(monkeypatch, "--layers", 2, "--out", "deep/out")
    printed = capsys.readouterr().out
    assert sorted(path.name for path in (drawn / "deep/out").iterdir()) == sorted(FILES)
    assert printed.splitlines()[-1] == "wrote " + ", ".join(f"deep/out/{name}" for name in FILES)
    plan, table = read("deep/out")
    assert repr(plan) in printed
    assert all(name in printed for name in table.index)
    page, picture = (drawn / "deep/out/pruning.html").read_text(), drawn / "deep/out/plan.png"
    assert Image.open(picture).format == "PNG"
    assert base64.b64encode(picture.read_bytes()).decode() in page
    assert "<h1>mine.py:net without 2 layers</h1>" in page
    assert f"Results on {N - SEEN} samples that the choice has not seen." in page
    assert all(f"<td>{name}</td>" in page for name in BLOCKS)
    assert all(f"<th>{name}</th>" in page for name in table.index)


@pytest.mark.parametrize("options", [["--layers", 3], ["--layers", 2, "--no-repair"], ["--tol", 0.05], ["--layers", 0]])
def test_the_saved_model_is_that_of_the_last_row(here, monkeypatch, options):
    call(monkeypatch, *options)
    plan, table = read()
    data = load_data("data.npz")
    pruned = load_pruned(load_model("mine.py:net", None, ["seed=9"]), "repgraph-prune", data[0][:2])
    assert pruned.plan.layers == plan.layers
    found = evaluate_classifier(pruned.model, data, samples=range(SEEN, N), progress=False)
    assert found["accuracy"] == table["accuracy"].iloc[-1]
    assert found["cross_entropy"] == pytest.approx(table["cross_entropy"].iloc[-1], rel=1e-6)
    assert pruned.after.macs == 2 * table["macs"].iloc[-1]  # counted on two samples
    assert pruned.after.parameters == table["parameters"].iloc[-1]


def test_cuts_show_in_the_table(here, monkeypatch):
    call(monkeypatch, "--layers", 3)
    table = read()[1]
    assert table.loc["before", "accuracy"] > 0.85
    assert table.loc["dropped", "cross_entropy"] > table.loc["repaired", "cross_entropy"]
    block = 2 * 8 * 16
    assert table.loc["before", "macs"] - table.loc["dropped", "macs"] == 3 * block
    assert table.loc["before", "parameters"] - table.loc["dropped", "parameters"] == 3 * (block + 16 + 8)


def test_weights_arguments_and_choice(here, monkeypatch):
    state = load_model("mine.py:net", None, ["seed=5"]).state_dict()
    save_file(state, "w.safetensors")
    among = "blocks.1,blocks.3,blocks.4"
    call(monkeypatch, "--layers", 2, "--weights", "w.safetensors", "--among", among, "--out", "weights")
    call(monkeypatch, "--layers", 2, "--arg", "seed=5", "--among", among, "--out", "argument")
    plan, table = read("weights")
    assert list(plan.scores) == among.split(",")
    assert plan == read("argument")[0]
    assert table["accuracy"].equals(read("argument")[1]["accuracy"])


def test_without_labels_the_table_has_costs_only(here, monkeypatch):
    call(monkeypatch, "--layers", 2, data="unlabelled.npz")
    assert read()[1].columns.tolist() == ["macs", "parameters", "milliseconds", "batch"]


def test_string_labels(here, monkeypatch):
    call(monkeypatch, "--layers", 2, "--out", "numbers")
    call(monkeypatch, "--layers", 2, "--out", "words", data="words.npz")
    assert read("words")[1]["accuracy"].equals(read("numbers")[1]["accuracy"])
    assert read("words")[0] == read("numbers")[0]


DATA = "data.npz"
MISTAKES = {
    "neither": (DATA, [], "pass one of --layers, how many to drop, --tol"),
    "both": (DATA, ["--layers", 2, "--tol", 0.1], "pass one of --layers, how many to drop, --tol"),
    "unknown score": (
        DATA,
        ["--layers", 2, "--by", "cca"],
        "--by must be one of redundancy, modularity, block_influence, angular_distance, relative_residual, turnover, "
        "gbs, cka, tail, random, oracle, got 'cca'",
    ),
    "too many": (DATA, ["--layers", 6], "count must be an integer from 0 to the 5 droppable layers, got 6"),
    "all": (DATA, ["--layers", 5], "keep at least one"),
    "negative": (DATA, ["--layers", -1], "count must be an integer from 0 to the 5 droppable layers, got -1"),
    "no number": (DATA, ["--layers", "two"], "'two' is not a valid integer"),
    "negative tol": (DATA, ["--tol", -0.1], "tol must be at least 0"),
    "nothing left": (DATA, ["--layers", 2, "--samples", N], f"--samples {N} leaves none of the {N} samples to judge"),
    "fewer than that": (DATA, ["--layers", 2, "--samples", 500], f"--samples 500 leaves none of the {N} samples"),
    "no samples": (DATA, ["--layers", 2, "--samples", 0], "samples must be"),
    "modularity without labels": ("unlabelled.npz", ["--layers", 2, "--by", "modularity"], "needs labels"),
    "oracle without labels": ("unlabelled.npz", ["--layers", 2, "--by", "oracle"], "data must have labels"),
    "no such layer": (DATA, ["--layers", 1, "--among", "conv9"], "'conv9' matches no layer"),
    "none can go": (DATA, ["--layers", 1, "--among", "stem,head"], "no layer that can be dropped"),
    "none can go, oracle": (DATA, ["--layers", 1, "--among", "stem", "--by", "oracle"], "no layer that can be dropped"),
    "no such data": ("none.npz", ["--layers", 1], "DATA none.npz: no such file"),
    "too few classes": (DATA, ["--layers", 1, "--arg", "classes=2"], "labels must be classes 0 to 1 of the model"),
}


def mistake(monkeypatch, capsys, data, arguments):
    samples = None if "--samples" in arguments else SEEN
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments, data=data, samples=samples)
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("Error")]) == 1
    return stderr


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_leave_no_files(here, monkeypatch, capsys, case):
    data, arguments, message = MISTAKES[case]
    assert message in mistake(monkeypatch, capsys, data, arguments)
    assert not (here / "repgraph-prune").exists()


@pytest.mark.parametrize(
    "by",
    [
        ["--tol", 0.1],
        ["--layers", 1, "--by", "oracle"],
        ["--layers", 1],
    ],
)
def test_negative_samples_are_refused(here, monkeypatch, capsys, by):
    assert "samples must be" in mistake(monkeypatch, capsys, DATA, [*by, "--samples", -5])


def test_tol_where_no_layer_can_go_is_refused_before_anything_is_written(here, monkeypatch, capsys):
    stderr = mistake(monkeypatch, capsys, DATA, ["--tol", 0.1, "--among", "stem,head"])
    assert not (here / "repgraph-prune").exists()
    assert "can be dropped" in stderr


def test_tol_without_labels_says_so(here, monkeypatch, capsys):
    assert "labels" in mistake(monkeypatch, capsys, "unlabelled.npz", ["--tol", 0.1])


def test_tol_is_modularity_and_takes_no_other_score(here, monkeypatch, capsys):
    assert "--by" in mistake(monkeypatch, capsys, DATA, ["--tol", 0.1, "--by", "oracle"])
