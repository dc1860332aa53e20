"""Files of activations: damage is found, a full disk and a killed capture leave nothing half done."""

import errno
import json
import resource
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import Net, take

from repgraph import Activations
from repgraph.activations.files import Writer

pytestmark = pytest.mark.usefixtures("one_thread")

NET = Net()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "acts"
    take(NET, folder=folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    take(NET, folder=tmp_path / "acts")
    return tmp_path / "acts"


def index_of(folder):
    return json.loads((folder / "activations.json").read_text())


def file_of(folder, name):
    return folder / next(item["file"] for item in index_of(folder)["layers"] if item["name"] == name)


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_the_index_holds_the_crc32_of_every_file(folder):
    index = index_of(folder)
    for item in index["layers"]:
        assert item["crc32"] == zlib.crc32((folder / item["file"]).read_bytes())
    own = index.pop("crc32")
    assert own == zlib.crc32(json.dumps(index).encode())
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["activations.json", *(item["file"] for item in index["layers"])]
    )


@given(data=st.data())
def test_any_flipped_bit_is_found_and_the_other_layers_stay(written, data):
    path = file_of(written, "2")
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    bit = data.draw(st.integers(0, 7))
    acts = Activations.load(written)
    flip(path, place, bit)
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"layer '2': .*{path.name} is damaged: its checksum is .* expected"):
                acts["2"]
        assert torch.equal(acts["1"], take(NET)["1"])
    finally:
        flip(path, place, bit)
    assert torch.equal(acts["2"], take(NET)["2"])


@given(data=st.data())
def test_a_flipped_bit_of_the_index_never_passes(written, data):
    path = written / "activations.json"
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    bit = data.draw(st.integers(0, 7))
    flip(path, place, bit)
    try:
        with pytest.raises(ValueError, match=f"{written} holds no complete activations"):
            Activations.load(written)
    finally:
        flip(path, place, bit)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_file_that_was_cut_short_is_damaged(folder, left):
    path = file_of(folder, "0")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"layer '0': .*{path.name} is damaged: .* it was cut short or changed"):
        Activations.load(folder)["0"]
    assert torch.equal(Activations.load(folder)["1"], take(NET)["1"])


def test_a_layer_is_checked_once_or_not_at_all(folder):
    acts, unchecked = Activations.load(folder), Activations.load(folder, verify=False)
    before = acts["0"].clone()
    path = file_of(folder, "0")
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.unlink()  # a file of its own: the old one may still be mapped
    path.write_bytes(data)
    expected = before.clone()
    expected[-1, -1] *= -1
    assert torch.equal(unchecked["0"], expected)
    assert torch.equal(acts["0"], expected)
    with pytest.raises(ValueError, match="is damaged"):
        Activations.load(folder)["0"]


def test_folders_of_earlier_versions_have_no_checksums(folder):
    index = index_of(folder)
    del index["crc32"]
    for item in index["layers"]:
        del item["crc32"]
    (folder / "activations.json").write_text(json.dumps(index))
    found, expected = Activations.load(folder), take(NET)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def small_disk():
    """No file may grow beyond so many bytes, as if the disk were full; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [50, 300, 600])
@pytest.mark.parametrize("how", ["capture", "save"])
def test_a_full_disk_names_layer_and_file_and_leaves_all_else(folder, tmp_path, small_disk, how, size):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    acts, target = take(NET), tmp_path / "deep" / "full"
    small_disk(size)
    with pytest.raises(
        OSError, match=r"layer '\d': cannot write .*full/00\d-\d\.safetensors\.part \(File too"
    ) as error:
        take(NET, folder=target) if how == "capture" else acts.save(target)
    small_disk(resource.RLIM_INFINITY)
    assert error.value.errno == errno.EFBIG
    assert "free space or choose another folder" in str(error.value)
    assert list(target.iterdir()) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    acts.save(target)
    assert torch.equal(Activations.load(target)["3"], acts["3"])


def test_a_disk_that_is_full_when_the_index_comes(tmp_path, small_disk):
    acts = take(NET)
    small_disk(1000)  # the largest layer takes 888 bytes, the index more
    with pytest.raises(OSError, match=r"cannot write .*activations\.json\.part") as error:
        acts.save(tmp_path / "full")
    assert error.value.errno == errno.EFBIG
    assert list((tmp_path / "full").iterdir()) == []


def killed(folder, acts):
    """What is left of a capture whose process died: open files are closed by the system, nothing else is done."""
    writer = Writer(folder, acts.specs, acts.n)
    for name in ("0", "1"):
        writer.append(name, acts[name][:7])
    return writer


def test_what_a_killed_capture_left_is_replaced(tmp_path):
    acts = take(NET)
    writer = killed(tmp_path, acts)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["000-0.safetensors.part", "001-1.safetensors.part"]
    with pytest.raises(ValueError, match="is being written by another capture: choose a folder for each"):
        take(NET, folder=tmp_path)
    for file in writer._open.values():
        file.close()
    with pytest.raises(ValueError, match="holds no complete activations"):
        Activations.load(tmp_path)
    found = take(NET, folder=tmp_path)
    assert all(torch.equal(found[name], acts[name]) for name in acts)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("foreign", ["film.part", "000-0.safetensors", "notes/000-0.safetensors.part", "x.json.part"])
def test_files_of_others_are_never_removed(tmp_path, foreign):
    acts = take(NET)
    for file in killed(tmp_path, acts)._open.values():
        file.close()
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("do not touch")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="must be empty or new"):
        take(NET, folder=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / foreign).read_text() == "do not touch"


def test_two_captures_that_begin_at_once_do_not_mix(tmp_path):
    acts = take(NET)
    one, other = Writer(tmp_path, acts.specs, acts.n), Writer(tmp_path, acts.specs, acts.n)
    with one:
        one.append("0", acts["0"])
        with pytest.raises(ValueError, match="is being written by another capture"), other:
            other.append("0", acts["0"])
        for name in ("1", "2", "3"):
            one.append(name, acts[name])
        one.finish(None, acts.sample_ids, acts.input_hashes, {})
    assert torch.equal(Activations.load(tmp_path)["0"], acts["0"])
