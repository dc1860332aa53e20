"""The commands do what the functions do, and every mistake is one clear line and exit code 2."""

import base64
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from repgraph import capture, compare_layers, plot, profile
from repgraph.loading import ImageFolder, load_data, load_model
from repgraph.metrics.similarity import gbs, linear_cka, mutual_knn

MODEL = """
import torch
from torch import nn

def net(width=4, channels=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3))

def tensor():
    return torch.zeros(3)

def data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(40, 1, 8, 8, generator=generator), torch.arange(40) % 2
"""


def run(*commands, cwd):
    """The real commands, one after the other in one process of their own, which takes seconds to start."""
    code = "import sys; from repgraph.cli import main\nfor sys.argv in map(str.split, sys.stdin): main()"
    lines = "\n".join(f"repgraph {command}" for command in commands)
    return subprocess.run(
        [sys.executable, "-c", code], input=lines, capture_output=True, text=True, cwd=cwd, timeout=300
    )


def call(monkeypatch, *arguments):
    """The command in this process."""
    from repgraph.cli import main

    monkeypatch.setattr(sys, "argv", ["repgraph", *map(str, arguments)])
    main()


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.random((40, 1, 8, 8), dtype=np.float32), y=np.arange(40) % 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("no_pictures")
def test_profile_command_gives_the_table_of_the_function(here, monkeypatch, capsys):
    options = ["--n", 20, "--repeats", 2, "--arg", "width=6", "--out", "out"]
    call(monkeypatch, "profile", "mine.py:net", "data.npz", *options)
    table = pd.read_csv(here / "out/profile.csv", index_col="layer", dtype={"layer": str})
    expected = profile(
        load_model("mine.py:net", None, ["width=6"]), load_data("data.npz"), n=20, repeats=2, progress=False
    )
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert "wrote out/profile.csv" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_profile_command_goes_on_from_its_folder(here, monkeypatch):
    arguments = ["profile", "mine.py:net", "data.npz", "--n", 20, "--repeats", 2, "--folder", "run", "--out"]
    call(monkeypatch, *arguments, "first")
    files = {path: path.stat().st_mtime_ns for path in (here / "run").iterdir()}
    assert len(files) > 1
    call(monkeypatch, *arguments, "second")
    assert files == {path: path.stat().st_mtime_ns for path in (here / "run").iterdir()}
    assert (here / "first/profile.csv").read_text() == (here / "second/profile.csv").read_text()


def test_layers_command_lists_names_and_shapes(here, monkeypatch, capsys):
    call(monkeypatch, "layers", "mine.py:net", "--input", "1,8,8")
    assert "8 x 4 x 4" in capsys.readouterr().out


def test_callables_of_packages_work(here, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "layers", "torch.nn:Sequential", "--layers", "leaves")
    assert stop.value.code == 2
    assert "Sequential has no submodules" in capsys.readouterr().err
    assert isinstance(load_model("repgraph.demo:digits_resnet"), nn.Module)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_loaded_without_prefix(here, suffix):
    state = {
        f"module.{name}": torch.full_like(value, 0.5) for name, value in load_model("mine.py:net").state_dict().items()
    }
    path = here / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    assert all((value == 0.5).all() for value in load_model("mine.py:net", str(path)).state_dict().values())


def test_weights_that_run_code_are_refused(here):
    torch.save({"bad": print}, here / "evil.pt")
    with pytest.raises(ValueError, match=r"--weights evil.pt cannot be read"):
        load_model("mine.py:net", "evil.pt")


MISTAKES = {
    "no such file": (["profile", "none.py:net", "data.npz"], "MODEL none.py:net: no such file none.py"),
    "no such module": (["layers", "nowhere.models:net"], "MODEL nowhere.models:net: cannot import nowhere.models"),
    "no colon": (["layers", "mine.py"], "MODEL must be package.module:callable or file.py:callable, got 'mine.py'"),
    "no such callable": (["layers", "mine.py:nett"], "has no callable 'nett'; it has net"),
    "no model": (["layers", "mine.py:tensor"], "must give a torch.nn.Module, got Tensor"),
    "wrong argument": (["layers", "mine.py:net", "--arg", "depth=3"], "unexpected keyword argument 'depth'"),
    "malformed argument": (["layers", "mine.py:net", "--arg", "depth"], "--arg must be NAME=VALUE, got 'depth'"),
    "no such weights": (["layers", "mine.py:net", "--weights", "w.pt"], "--weights w.pt: no such file"),
    "no such data": (["profile", "mine.py:net", "none.npz"], "DATA none.npz: no such file"),
    "neither file nor callable": (["profile", "mine.py:net", "nothing"], "DATA nothing: no such .npz file or folder"),
    "empty folder": (["profile", "mine.py:net", "empty"], "DATA empty: no images"),
    "wrong shape": (["profile", "mine.py:net", "data.npz", "--arg", "channels=3"], "expected input"),
    "no such layer": (["profile", "mine.py:net", "data.npz", "--layers", "conv9"], "'conv9' matches no layer"),
    "bad input shape": (
        ["layers", "mine.py:net", "--input", "1,b"],
        "--input must be a shape like 3,224,224, got '1,b'",
    ),
    "bad numbers": (["profile", "mine.py:net", "data.npz", "--mean", "a"], "--mean must be numbers like"),
    "too many channels": (
        ["profile", "mine.py:net", "data.npz", "--mean", "1,2"],
        "--mean must have one number per channel",
    ),
    "bad memory": (["profile", "mine.py:net", "data.npz", "--memory", "much"], "memory must be a number of bytes"),
    "k too large": (["profile", "mine.py:net", "data.npz", "--n", "20", "--repeats", "2", "--k", "20"], "1 <= k < n"),
    "unknown command": (["profil"], "No such command 'profil'"),
    "unknown option": (["demo", "--outt", "x"], "No such option"),
    "sorted by class": (["profile", "mine.py:net", "sorted.npz", "--n", "20", "--repeats", "2"], "pass seed="),
    "unknown metric": (
        ["profile", "mine.py:net", "data.npz", "--metrics", "gbs,cca"],
        "'complexity', 'spline'), got",
    ),
    "unknown measure": (
        ["compare", "mine.py:net", "mine.py:net", "data.npz", "--measure", "gbs,cca"],
        "--measure must be of gbs, cka, biased_cka, rbf_cka, mutual_knn, cknna, procrustes, rsa, svcca, rtd, got 'cca'",
    ),
    "no second model": (
        ["compare", "mine.py:net", "mine.py:nett", "data.npz"],
        "MODEL mine.py:nett: mine.py has no callable 'nett'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(here, mistake, monkeypatch, capsys):
    (here / "empty").mkdir()
    np.savez(here / "sorted.npz", x=np.random.default_rng(0).random((40, 1, 8, 8), np.float32), y=np.arange(40) // 20)
    arguments, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("Error")]) == 1


def test_a_mistake_leaves_no_traceback_in_a_real_process(here):
    done = run("layers mine.py:net --input 1,8,8", "profile mine.py:net none.npz", cwd=here)
    assert "8 x 4 x 4" in done.stdout
    assert done.returncode == 2
    assert done.stderr.strip() == "Error: DATA none.npz: no such file"


def make_images(folder, sizes=((8, 8), (8, 8)), per_class=6):
    for number, (name, size) in enumerate(zip(("cat", "dog"), sizes, strict=True)):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", size, (200 * number, i, 0)).save(folder / name / f"{i}.png")


def test_image_folder_is_shuffled_scaled_and_labelled_by_folder(here):
    make_images(here / "images")
    data = load_data("images", mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    assert isinstance(data, ImageFolder)
    labels = [label for _, label in (data[i] for i in range(len(data)))]
    assert sorted(labels) == [0] * 6 + [1] * 6
    assert labels != sorted(labels)
    for i in range(len(data)):
        image, label = data[i]
        assert image.shape == (3, 8, 8)
        assert image[0, 0, 0] == pytest.approx((200 * label / 255 - 0.5) / 0.5)


def test_image_folder_resizes_and_crops(here):
    make_images(here / "images", sizes=((16, 8), (8, 24)))
    data = load_data("images", size=4)
    assert {tuple(data[i][0].shape) for i in range(len(data))} == {(3, 4, 4)}
    mixed = load_data("images")
    with pytest.raises(ValueError, match="pass --size"):
        [mixed[i] for i in range(len(mixed))]


def test_damaged_image_is_named(here):
    make_images(here / "images")
    (here / "images/cat/0.png").write_bytes(b"no image")
    data = load_data("images")
    with pytest.raises(ValueError, match=r"cannot read image images.cat.0\.png"):
        [data[i] for i in range(len(data))]


def test_npz_of_8_bit_images_becomes_channels_first_in_unit_range(here):
    np.savez(here / "bytes.npz", images=np.full((5, 8, 8, 3), 255, np.uint8), labels=np.array(list("abcab")))
    x, y = load_data("bytes.npz")
    assert x.shape == (5, 3, 8, 8)
    assert (x == 1).all()
    assert list(y) == list("abcab")


def expected_tables(measures, *, samples=40, **options):
    """What the functions give for the two models of the comparisons below."""
    a, b = (
        capture(load_model("mine.py:net", None, arguments), load_data("data.npz"), samples=samples, progress=False)
        for arguments in ([], ["width=6"])
    )
    return compare_layers(measures, a, b, progress=False, **options)


def read_table(path):
    table = pd.read_csv(path, index_col=0)
    return table.set_axis(table.index.astype(str), axis=0)


def assert_values(found, expected):
    assert (found.index.tolist(), found.columns.tolist()) == (expected.index.tolist(), expected.columns.tolist())
    np.testing.assert_allclose(found, expected, atol=1e-9)


TWO = ["compare", "mine.py:net", "mine.py:net", "data.npz", "--arg-b", "width=6"]


@pytest.mark.usefixtures("no_pictures")
def test_compare_command_gives_the_tables_of_the_function(here, monkeypatch, capsys):
    call(monkeypatch, *TWO, "--n", 30, "--name-a", "four", "--name-b", "six", "--out", "out")
    printed = capsys.readouterr().out
    tables = expected_tables({"gbs": gbs, "cka": partial(linear_cka, unbiased=True)}, samples=30)
    for name, expected in tables.items():
        found = read_table(here / f"out/{name}.csv")
        assert_values(found, expected)
        assert found.index.name == "four"
        assert f"{name}: {plot.caption(expected)}" in printed
    names = ["gbs.csv", "cka.csv", "heatmaps.png", "matches.csv", "index.html"]
    assert sorted(path.name for path in (here / "out").iterdir()) == sorted(names)
    assert printed.splitlines()[-1] == "wrote " + ", ".join(f"out/{name}" for name in names)
    matches = pd.read_csv(here / "out/matches.csv", index_col=0, dtype=str)
    assert matches.to_dict("list") == {name: table.idxmax(axis=1).tolist() for name, table in tables.items()}


def test_comparison_page_shows_figure_tables_and_names(here, monkeypatch):
    call(monkeypatch, *TWO, "--measure", "mutual_knn", "--name-b", "<six>", "--out", "out")
    page = (here / "out/index.html").read_text()
    picture = here / "out/heatmaps.png"
    assert Image.open(picture).format == "PNG"
    assert base64.b64encode(picture.read_bytes()).decode() in page
    assert "<h1>a: mine.py:net against &lt;six&gt; on data.npz</h1>" in page
    assert "<six>" not in page
    (expected,) = expected_tables([mutual_knn]).values()
    assert plot.caption(expected) in page
    numbers = page.split("<h2>mutual_knn</h2>")[1]
    assert re.findall(r"<td>(.*?)</td>", numbers) == [f"{value:.3f}" for value in expected.to_numpy().ravel()]
    assert [f"<th>{name}</th>" in numbers for name in ("a: mine.py:net", "&lt;six&gt;")] == [True, True]


@pytest.mark.usefixtures("no_pictures")
def test_compare_command_draws_its_samples_by_seed(here, monkeypatch):
    tables = {}
    for out, options in (("first", []), ("seeded", ["--seed", 3]), ("again", ["--seed", 3]), ("other", ["--seed", 4])):
        call(monkeypatch, *TWO, "--measure", "gbs", "--n", 20, *options, "--out", out)
        tables[out] = read_table(here / out / "gbs.csv")
    samples = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:20]
    assert_values(tables["seeded"], expected_tables([gbs], samples=samples)["gbs"])
    assert_values(tables["first"], expected_tables([gbs], samples=20)["gbs"])
    assert tables["seeded"].equals(tables["again"])
    assert not tables["seeded"].equals(tables["other"])


def test_compare_command_draws_distances_apart(here, monkeypatch):
    call(monkeypatch, *TWO, "--measure", "procrustes, gbs", "--reduce", "mean", "--out", "out")
    assert all((here / "out" / name).is_file() for name in ("procrustes.csv", "gbs.csv", "heatmaps.png"))
    assert Image.open(here / "out/distances.png").format == "PNG"
    table = read_table(here / "out/procrustes.csv")
    matches = pd.read_csv(here / "out/matches.csv", index_col=0, dtype=str)
    assert matches["procrustes"].tolist() == table.idxmin(axis=1).tolist()
    call(monkeypatch, *TWO, "--measure", "procrustes", "--out", "alone")
    names = ["distances.png", "index.html", "matches.csv", "procrustes.csv"]
    assert sorted(path.name for path in (here / "alone").iterdir()) == names


@pytest.mark.usefixtures("no_pictures")
def test_compare_command_takes_weights_and_layers_of_each_model(here, monkeypatch):
    state = {name: value * 0.5 + 0.1 for name, value in load_model("mine.py:net").state_dict().items()}
    save_file(state, here / "w.safetensors")
    both = ["--weights-a", "w.safetensors", "--weights-b", "w.safetensors"]
    options = ["--measure", "cka", "--layers", "0", "--layers-b", "leaves"]
    for out, weights in (("same", both), ("trained", both[:2])):
        call(monkeypatch, "compare", "mine.py:net", "mine.py:net", "data.npz", *weights, *options, "--out", out)
    same, trained = (read_table(here / out / "cka.csv") for out in ("same", "trained"))
    assert (same.index.tolist(), same.columns.tolist()) == (["0"], ["0", "1", "2"])
    assert same.loc["0", "0"] == pytest.approx(1)
    assert trained.loc["0", "0"] < 0.9999


@pytest.mark.usefixtures("no_pictures")
def test_profile_command_adds_the_similarity_to_the_previous_layer(here, monkeypatch):
    options = ["--metrics", "modularity, gbs", "--n", 20, "--repeats", 2, "--out", "out"]
    call(monkeypatch, "profile", "mine.py:net", "data.npz", *options)
    table = pd.read_csv(here / "out/profile.csv", index_col="layer", dtype={"layer": str})
    model, data = load_model("mine.py:net"), load_data("data.npz")
    expected = profile(model, data, n=20, repeats=2, metrics=("modularity", "gbs"), progress=False)
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert np.isnan(table.loc["0", "gbs_previous"])
    assert 0 < table.loc["2", "gbs_previous"] < 1
    assert "graph-based similarity to the previous layer" in (here / "out/index.html").read_text()
