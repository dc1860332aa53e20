"""A run that was killed goes on; what is damaged is named; what was finished is not lost."""

import json
import os
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch

import repgraph
from repgraph.activations.hashes import digest_of
from repgraph.checkpoint import Checkpoint

RUN = {"k": 3, "metrics": ["modularity"]}
N_LAYERS = 6


@pytest.fixture
def activations():
    generator = torch.Generator().manual_seed(0)
    layers = {f"block.{i}": torch.randn(40, 5, generator=generator) for i in range(N_LAYERS)}
    return repgraph.Activations(layers, labels=torch.arange(40) % 2)


def table_of(activations, folder=None, **options):
    options = {"n": 20, "repeats": 2, "metrics": ("modularity", "gbs", "cka")} | options
    return repgraph.profile_activations(activations, folder=folder, progress=False, **options)


def rows_in(folder):
    return sorted(folder.glob("*.row.json"))


def test_table_is_the_same_with_a_folder_and_read_from_it(activations, tmp_path):
    expected = table_of(activations)
    pd.testing.assert_frame_equal(table_of(activations, tmp_path / "run"), expected, check_exact=True)
    times = {path: path.stat().st_mtime_ns for path in rows_in(tmp_path / "run")}
    assert len(times) == N_LAYERS
    again = table_of(activations, tmp_path / "run")
    pd.testing.assert_frame_equal(again, expected, check_exact=True)
    assert again.attrs == expected.attrs
    assert times == {path: path.stat().st_mtime_ns for path in rows_in(tmp_path / "run")}


def test_a_row_that_is_kept_is_taken(activations, tmp_path):
    table_of(activations, tmp_path)
    checkpoint = Checkpoint(tmp_path, json.loads((tmp_path / "run.json").read_text())["content"])
    key, row = checkpoint.rows["block.2"]
    checkpoint.rows.clear()
    checkpoint.put("block.2", key, row | {"modularity": 7.0})
    assert table_of(activations, tmp_path)["modularity"].eq(7.0).tolist() == [i == 2 for i in range(N_LAYERS)]


@pytest.mark.parametrize("what", ["layer", "previous layer", "labels"])
def test_a_row_made_from_something_else_is_computed_again(activations, tmp_path, what):
    table_of(activations, tmp_path)
    layers = {name: activations[name].clone() for name in activations}
    labels = activations.labels.clone()
    if what == "labels":
        labels = labels.flip(0)
        labels[0], labels[1] = labels[1].clone(), labels[0].clone()
    else:
        layers["block.3" if what == "layer" else "block.2"][0, 0] += 1
    other = repgraph.Activations(layers, labels)
    pd.testing.assert_frame_equal(table_of(other, tmp_path), table_of(other), check_exact=True)


def test_profile_of_a_model_goes_on_with_the_rows_that_are_left(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    data = torch.randn(40, 1, 8, 8), torch.arange(40) % 2
    options = {"n": 20, "repeats": 2, "metrics": ("modularity", "gbs", "complexity"), "progress": False}
    expected = repgraph.profile(model, data, **options)
    repgraph.profile(model, data, folder=tmp_path, **options)
    rows_in(tmp_path)[1].unlink()
    pd.testing.assert_frame_equal(repgraph.profile(model, data, folder=tmp_path, **options), expected, check_exact=True)
    with torch.no_grad():
        model[2].weight.mul_(-1)
    changed = repgraph.profile(model, data, folder=tmp_path, **options)
    pd.testing.assert_frame_equal(changed, repgraph.profile(model, data, **options), check_exact=True)
    assert changed.loc["0"].equals(expected.loc["0"])
    assert not changed.loc["2"].equals(expected.loc["2"])


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch, repgraph

    def run(folder, out):
        torch.manual_seed(0)
        sizes = [8] * 6
        model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in sizes))
        data = torch.randn(400, 8), torch.arange(400) % 4
        names = [f"{i}.0" for i in range(len(sizes))]
        table = repgraph.profile(
            model, data, layers=names, n=200, repeats=2, metrics=("modularity", "gbs"), folder=folder, progress=False
        )
        table.to_pickle(out)

    def start(folder, out):
        child = os.fork()  # the parent computes nothing: no thread of it could hold a lock
        if child == 0:
            try:
                torch.set_num_threads(1)
                run(folder, out)
                os._exit(0)
            finally:
                os._exit(1)
        return child

    place, chance = Path(sys.argv[1]), random.Random(0)
    assert os.waitpid(start(None, place / "expected"), 0)[1] == 0
    for number in range(10):
        folder = place / f"run{number}"
        child = start(folder, place / f"killed{number}")
        rows = chance.randrange(6)  # the moment: when so many layers are finished, and a little later
        while len(list(folder.glob("*.row.json"))) < rows:
            time.sleep(0.0005)
        time.sleep(chance.random() * 0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(len(list(folder.glob("*.row.json"))), (place / f"killed{number}").exists())
        assert os.waitpid(start(folder, place / f"resumed{number}"), 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_ten_moments_every_resumed_run_gives_the_identical_table(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    finished = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert any(0 < rows < 6 for rows in finished)  # killed in the middle
    expected = pd.read_pickle(tmp_path / "expected")
    for number in range(10):
        resumed = pd.read_pickle(tmp_path / f"resumed{number}")
        pd.testing.assert_frame_equal(resumed, expected, check_exact=True)
        assert resumed.attrs == expected.attrs


@pytest.mark.parametrize("place", range(0, 400, 23))
def test_a_flipped_byte_is_named_and_the_layer_computed_again(activations, tmp_path, place):
    expected = table_of(activations, tmp_path)
    damaged = rows_in(tmp_path)[place % N_LAYERS]
    content = bytearray(damaged.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{damaged.name} is damaged.*computed again"):
        again = table_of(activations, tmp_path)
    pd.testing.assert_frame_equal(again, expected, check_exact=True)
    table_of(activations, tmp_path)  # mended: a warning would be an error


@pytest.mark.parametrize("length", [0, 1, 100, -1])
@pytest.mark.parametrize("which", ["row", "run"])
def test_a_truncated_file_is_named_and_mended(activations, tmp_path, length, which):
    expected = table_of(activations, tmp_path)
    damaged = rows_in(tmp_path)[0] if which == "row" else tmp_path / "run.json"
    damaged.write_bytes(damaged.read_bytes()[:length])
    with pytest.warns(UserWarning, match=rf"{damaged.name} is damaged"):
        pd.testing.assert_frame_equal(table_of(activations, tmp_path), expected, check_exact=True)
    table_of(activations, tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_and_loses_nothing(activations, tmp_path):
    expected = table_of(activations, tmp_path)
    lost, others = rows_in(tmp_path)[4], rows_in(tmp_path)[:4]
    before = [path.read_bytes() for path in others]
    lost.unlink()
    lost.with_suffix(".part").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=r"layer 'block.4' .*No space left on device.*goes on") as told:
        pd.testing.assert_frame_equal(table_of(activations, tmp_path), expected, check_exact=True)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert [path.read_bytes() for path in others] == before
    assert not lost.exists()
    assert not list(tmp_path.glob("*.part"))
    table_of(activations, tmp_path)
    assert lost.exists()


def test_what_a_killed_run_left_half_written_is_no_row(activations, tmp_path):
    expected = table_of(activations, tmp_path)
    for path in rows_in(tmp_path)[:3]:
        path.with_suffix(".part").write_bytes(path.read_bytes()[:50])
        path.unlink()
    pd.testing.assert_frame_equal(table_of(activations, tmp_path), expected, check_exact=True)
    assert len(rows_in(tmp_path)) == N_LAYERS
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 4}, r"of another run \(k was 3, is 4\): give another folder"),
        ({"seed": 1, "n": 10}, r"n was 20, is 10; seed was None, is 1"),
    ],
)
def test_a_folder_of_other_options_is_refused_and_left_alone(activations, tmp_path, options, message):
    table_of(activations, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        table_of(activations, tmp_path, **options)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_folder_with_other_things_is_refused(activations, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"must be new, empty or of an earlier call, got one with 'thesis.tex'"):
        table_of(activations, tmp_path)
    with pytest.raises(ValueError, match=r"thesis.tex cannot be used"):
        table_of(activations, tmp_path / "thesis.tex")


def test_names_that_look_alike_as_files_are_two_layers(tmp_path):
    checkpoint = Checkpoint(tmp_path, RUN)
    checkpoint.put("a/b", "1", {"modularity": 0.1})
    checkpoint.put("a_b", "2", {"modularity": float("nan"), "features": 3})
    rows = Checkpoint(tmp_path, RUN).rows
    assert rows["a/b"] == ("1", {"modularity": 0.1})
    assert rows["a_b"][1]["features"] == 3
    assert rows["a_b"][1]["modularity"] != rows["a_b"][1]["modularity"]


def test_digest_sees_type_shape_and_contents():
    x = torch.zeros(2, 3)
    others = [x.double(), x.reshape(3, 2), x.int(), torch.tensor([[0.0, 0, 0], [0, 0, -0.0]]), x[:1]]
    digests = {digest_of(one) for one in (x, *others)}
    assert len(digests) == 6
    assert digest_of(x.T.contiguous().T) == digest_of(x)
