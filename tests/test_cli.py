"""The commands do what the functions do, and every mistake is one clear line and exit code 2."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from repgraph import profile
from repgraph.loading import ImageFolder, load_data, load_model

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


def run(*arguments, cwd):
    """The real command in a process of its own."""
    code = "import sys; from repgraph.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.random((40, 1, 8, 8), dtype=np.float32), y=np.arange(40) % 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_profile_command_gives_the_table_of_the_function(here):
    done = run(
        "profile", "mine.py:net", "data.npz", "--n", 20, "--repeats", 2, "--arg", "width=6", "--out", "out", cwd=here
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(here / "out/profile.csv", index_col="layer", dtype={"layer": str})
    expected = profile(
        load_model("mine.py:net", None, ["width=6"]), load_data("data.npz"), n=20, repeats=2, progress=False
    )
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert "wrote out/profile.csv" in done.stdout


def test_layers_command_lists_names_and_shapes(here):
    done = run("layers", "mine.py:net", "--input", "1,8,8", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "8 x 4 x 4" in done.stdout


def test_callables_of_packages_work(here):
    done = run("layers", "torch.nn:Sequential", "--layers", "leaves", cwd=here)
    assert done.returncode == 2
    assert "Sequential has no submodules" in done.stderr
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
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(here, mistake, monkeypatch, capsys):
    from repgraph.cli import main

    (here / "empty").mkdir()
    np.savez(here / "sorted.npz", x=np.random.default_rng(0).random((40, 1, 8, 8), np.float32), y=np.arange(40) // 20)
    arguments, message = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["repgraph", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    stderr = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("Error")]) == 1


def test_a_mistake_leaves_no_traceback_in_a_real_process(here):
    done = run("profile", "mine.py:net", "none.npz", cwd=here)
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
