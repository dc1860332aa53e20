"""`repgraph profile` with families side by side: their columns, their explanations, and one panel for each."""

import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from repgraph import plot, profile
from repgraph.loading import load_data, load_model

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )

def smooth():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh())
"""
FOUR = ("modularity", "feature_entropy", "complexity", "spline")
SETS = ["--n", 20, "--repeats", 2, "--layers", "1,3,5"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    x = np.random.default_rng(0).random((40, 1, 8, 8), dtype=np.float32) - 0.5
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(40) % 2)
    np.savez(tmp_path / "plain.npz", x=x)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, *arguments):
    from repgraph.cli import main

    monkeypatch.setattr(sys, "argv", ["repgraph", *map(str, arguments)])
    main()


def profiled(monkeypatch, metrics, *options, data="data.npz", out="out"):
    call(monkeypatch, "profile", "mine.py:net", data, *SETS, "--metrics", metrics, *options, "--out", out)
    return pd.read_csv(f"{out}/profile.csv", index_col="layer", dtype={"layer": str})


def expected(metrics, data="data.npz", **options):
    options = {"layers": ["1", "3", "5"], "n": 20, "repeats": 2, "progress": False} | options
    return profile(load_model("mine.py:net"), load_data(data), metrics=metrics, **options)


@pytest.mark.usefixtures("no_pictures")
def test_families_are_those_of_the_function(here, monkeypatch, capsys):
    table = profiled(monkeypatch, ",".join(FOUR), "--lam", 0.04, "--radius", 0.2)
    pd.testing.assert_frame_equal(table, expected(FOUR, lam=0.04, radius=0.2), check_dtype=False)
    other = expected(FOUR)
    for column in ("complexity", "local_complexity"):  # the options were heard
        assert not np.allclose(table[column].iloc[:2], other[column].iloc[:2])
    assert table.loc["5", ["feature_entropy", "complexity", "regions", "local_complexity"]].isna().all()
    printed = capsys.readouterr().out
    assert "local_complexity" in printed
    assert printed.splitlines()[-1] == "wrote out/profile.csv, out/curve.png, out/graphs.png, out/index.html"


@pytest.mark.usefixtures("no_pictures")
def test_defaults_and_seed_are_those_of_the_function(here, monkeypatch):
    table = profiled(monkeypatch, "spline , complexity", "--seed", 3, "--memory", "40 kB")
    pd.testing.assert_frame_equal(table, expected(("complexity", "spline"), seed=3), check_dtype=False)


@pytest.mark.usefixtures("no_pictures")
def test_page_explains_every_column_and_setting(here, monkeypatch):
    table = profiled(monkeypatch, f"gbs,cka,{','.join(FOUR)}", "--lam", 0.04, "--radius", 0.2)
    page = (here / "out/index.html").read_text()
    explained = [column for column in table if not column.endswith("_std")]
    assert len(explained) == 22
    assert [column for column in explained if f"<li><b>{column}</b>: " not in page] == []
    assert [column for column in table if f"<th>{column}</th>" not in page] == []
    for setting in ("lam = 0.04", "radius = 0.2", "around = 20", "n = 20", "repeats = 2"):
        assert setting in page


@pytest.mark.usefixtures("no_pictures")
def test_page_explains_every_column_without_labels(here, monkeypatch):
    table = profiled(monkeypatch, "modularity,complexity,spline", data="plain.npz")
    page = (here / "out/index.html").read_text()
    assert {"community_modularity", "complexity", "regions"} < set(table)
    assert not {"modularity", "label_information"} & set(table)
    missing = [column for column in table if not column.endswith("_std") and f"<li><b>{column}</b>: " not in page]
    assert missing == []


def test_curve_has_one_panel_per_family(here, monkeypatch):
    heights = {}
    for metrics in ("modularity", "modularity,complexity,spline", f"gbs,{','.join(FOUR)}"):
        profiled(monkeypatch, metrics)
        picture = Image.open(here / "out/curve.png")
        heights[metrics] = picture.size[1]
        dark = np.asarray(picture.convert("L")) < 60
        longest = [max(map(len, "".join("#" if on else " " for on in row).split()), default=0) for row in dark]
        axes = [y for y, length in enumerate(longest) if length > 0.5 * picture.size[0]]
        panels = 1 + sum(b - a > 5 for a, b in pairwise(axes))  # one x axis each
        assert panels == metrics.count(",") + 1
    one, three, five = heights.values()
    assert one < three < five


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("metric", "main"),
    [
        ("feature_entropy", "feature_entropy"),
        ("complexity", "complexity"),
        ("spline", "local_complexity"),
        ("gbs,spline", "gbs_previous"),
    ],
)
def test_titles_use_the_main_column_where_there_is_no_modularity(here, monkeypatch, metric, main):
    titles = []

    drawn = plot.graphs

    def watched(graphs, labels, **options):
        titles.append(options["titles"])
        return drawn(graphs, labels, **options)

    monkeypatch.setattr(plot, "graphs", watched)
    table = profiled(monkeypatch, metric)
    assert "modularity" not in table
    assert titles == [{layer: f"{layer}: {table.loc[layer, main]:.2f}" for layer in table.index}]
    page = (here / "out/index.html").read_text()
    assert f'alt="{main} against the layers"' in page
    assert f"above each panel the\n{main.replace('_', ' ')} from the table" in page


MISTAKES = {
    "unknown family": (["data.npz", "--metrics", "modularity,entropy"], "metrics must be a sequence of names from"),
    "empty family": (["data.npz", "--metrics", "complexity,,spline"], "metrics must be a sequence of names from"),
    "no family": (["data.npz", "--metrics", ""], "metrics must be a sequence of names from"),
    "bad lam": (["data.npz", "--metrics", "complexity", "--lam", "0"], "lam must be positive, got 0.0"),
    "bad radius": (["data.npz", "--metrics", "spline", "--radius", "-1"], "radius must be positive, got -1.0"),
    "no number": (["data.npz", "--metrics", "complexity", "--lam", "small"], "'small' is not a valid float"),
    "no labels": (["plain.npz", "--metrics", "feature_entropy"], "'feature_entropy' needs labels"),
    "no maps": (["data.npz", "--metrics", "feature_entropy", "--reduce", "mean"], "needs layers with square maps"),
    "no layer but gates": (["data.npz", "--metrics", "complexity", "--layers", "gates"], "layer"),
}


def refused(capsys, monkeypatch, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("Error")]
    return stop.value.code, line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(here, mistake, monkeypatch, capsys):
    arguments, message = MISTAKES[mistake]
    code, line = refused(capsys, monkeypatch, "profile", "mine.py:net", *SETS, *arguments, "--out", "out")
    assert code == 2
    assert message in line
    assert not (here / "out").exists()


def test_a_model_without_gates_is_one_line_and_exit_code_2(here, monkeypatch, capsys):
    code, line = refused(capsys, monkeypatch, "profile", "mine.py:smooth", "data.npz", "--n", 20, "--metrics", "spline")
    assert code == 2
    assert line.startswith("Error: no gate in the model")
