"""Activations: a read-only mapping, its subsets, and its files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repgraph import Activations, capture

N = 12
X = torch.randn(N, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2))


def take(model, data=(X, Y), **options):
    return capture(model, data, "leaves", batch_size=5, progress=False, **options)


def assert_same(a, b):
    """Bit for bit, with everything that belongs to them."""
    assert list(a) == list(b)
    assert a.specs == b.specs
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name])
    assert np.array_equal(np.asarray(a.labels), np.asarray(b.labels))
    assert getattr(a.labels, "dtype", None) == getattr(b.labels, "dtype", None)
    assert a.sample_ids.tolist() == b.sample_ids.tolist()
    assert a.settings == b.settings
    assert (a.input_hashes is None) == (b.input_hashes is None)
    assert a.input_hashes is None or torch.equal(a.input_hashes, b.input_hashes)


def by_hand(**options):
    layers = {"stem": torch.arange(24.0).reshape(4, 2, 3), "head": torch.ones(4, 2)}
    return Activations(layers, **options)


def test_mapping_over_the_layers():
    acts = by_hand(labels=["a", "b", "a", "b"])
    assert list(acts) == list(acts.keys()) == ["stem", "head"]
    assert (len(acts), acts.n, acts.nbytes) == (2, 4, 4 * 8 * 4)
    assert "stem" in acts
    assert "fc" not in acts
    assert acts.get("fc") is None
    assert acts["stem"].shape == (4, 2, 3)
    assert acts.labels.tolist() == ["a", "b", "a", "b"]
    assert acts.sample_ids.tolist() == [0, 1, 2, 3]
    assert acts.specs["stem"].shape == (2, 3)
    with pytest.raises(KeyError, match="no layer 'fc'; the layers are stem, head"):
        acts["fc"]
    with pytest.raises(TypeError):
        acts["stem"] = torch.zeros(4)


def test_asking_for_names_reads_no_layer():
    class Unread(dict):
        def __getitem__(self, name):
            raise AssertionError(f"layer {name} was read")

    whole = by_hand()
    acts = Activations(Unread(stem=1, head=2), specs=whole.specs, n=4)
    assert "stem" in acts
    assert list(acts.subset([1, 2], ["head"])) == ["head"]
    assert "2 x 3" in repr(acts) + acts._repr_html_()


def test_what_it_shows():
    acts = by_hand()
    assert repr(acts).splitlines() == [
        "Activations(n=4, layers=2, 128 B in memory)",
        "  stem  2 x 3  float32",
        "  head  2  float32",
    ]
    assert "<td>stem</td><td>2 x 3</td><td>float32</td><td>96 B</td>" in acts._repr_html_()
    assert "&lt;x&gt;" in Activations({"<x>": torch.zeros(2, 1)})._repr_html_()
    many = Activations({f"layer{i}": torch.zeros(2, 1) for i in range(152)})
    assert "... 112 more ..." in repr(many)
    assert len(repr(many).splitlines()) == 42


def test_sizes_are_readable_at_the_edge_of_a_unit():
    assert "Activations(n=2499, layers=1, 1 MB in memory)" in repr(Activations({"a": torch.zeros(2499, 100)}))


def test_equality_is_identity():
    acts = by_hand()
    assert acts == acts
    assert acts != by_hand()
    assert len({acts, by_hand()}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Activations({}), "layers is empty"),
        (
            lambda: Activations({"a": torch.zeros(4, 2), "b": torch.zeros(3, 5)}),
            r"'a' has shape \(4, 2\), 'b' has \(3, 5\)",
        ),
        (lambda: by_hand(labels=[0, 1]), "labels must have one entry per sample: expected 4, got 2"),
        (lambda: by_hand(sample_ids=[0, 1]), "sample_ids must have one entry per sample: expected 4, got 2"),
        (lambda: by_hand(sample_ids=[0, 1, 1, 2]), "sample_ids must be distinct"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("samples", "rows"),
    [
        ([5, 2, 9], [5, 2, 9]),
        (np.array([1, 0]), [1, 0]),
        (torch.tensor([3, -1]), [3, 11]),
        (Y == 1, [1, 4, 7, 10]),
        ((Y == 1).numpy(), [1, 4, 7, 10]),
        (slice(2, 9, 3), [2, 5, 8]),
        (slice(None, None, -1), list(range(N))[::-1]),
        (range(3), [0, 1, 2]),
        (None, list(range(N))),
    ],
)
def test_subset_of_samples(model, samples, rows):
    acts = take(model)
    part = acts.subset(samples)
    assert part.n == len(rows)
    assert all(torch.equal(part[name], acts[name][rows]) for name in acts)
    assert part.labels.tolist() == Y[rows].tolist()
    assert part.sample_ids.tolist() == rows
    assert torch.equal(part.input_hashes, acts.input_hashes[rows])
    assert part.settings == acts.settings


def test_subset_of_layers_keeps_the_given_order(model):
    acts = take(model)
    part = acts.subset(layers=["3", "0"])
    assert list(part) == ["3", "0"]
    assert part.nbytes == N * (2 + 64) * 4
    assert torch.equal(part["3"], acts["3"])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), strings=st.booleans())
def test_subset_commutes_with_reading(data, strings):
    layers = {"a": torch.arange(60).reshape(10, 3, 2), "b": torch.arange(10.0)}
    labels = [f"class {i % 3}" for i in range(10)] if strings else torch.arange(10) % 3
    acts = Activations(layers, labels, [f"image {i}" for i in range(10)])
    rows = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True))
    again = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True))
    part = acts.subset(rows)
    both, expected = part.subset(again), [rows[i] for i in again]
    for name, x in layers.items():
        assert torch.equal(part[name], x[rows])
        assert torch.equal(both[name], x[expected])
    assert both.sample_ids.tolist() == [f"image {i}" for i in expected]
    assert both.labels.tolist() == [labels[i] for i in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": [30]}, "samples must select from 12 samples"),
        ({"samples": np.zeros(5, bool)}, "samples must select from 12 samples"),
        ({"samples": [0.5]}, "samples must select from 12 samples"),
        ({"samples": Y > 5}, "samples selects no sample"),
        ({"samples": []}, "samples"),
        ({"samples": [1, 1]}, "distinct"),
        ({"samples": 3}, "samples"),
        ({"layers": ["conv"]}, "layers: no layer 'conv'; the layers are 0, 1, 2, 3"),
        ({"layers": []}, "layers is empty"),
    ],
)
def test_bad_subsets_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        take(model).subset(**options)


LABELS = {
    "int64": Y,
    "int32": Y.int(),
    "bool": Y > 1,
    "float": Y / 3,
    "multi-label": torch.eye(3)[Y],
    "strings": ["cat", "straße", ""] * 4,
    "none": None,
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("ids", [None, range(100, 112), [f"image {i}" for i in range(N)]], ids=["no", "int", "str"])
def test_folder_and_save_give_the_same_back(model, tmp_path, labels, ids):
    acts = take(model, X, labels=labels, sample_ids=ids)
    acts.save(tmp_path / "saved")
    written = take(model, X, labels=labels, sample_ids=ids, folder=tmp_path / "deep" / "written")
    for found in (Activations.load(tmp_path / "saved"), Activations.load(str(tmp_path / "deep" / "written")), written):
        assert_same(found, acts)


def test_folder_says_where_it_is(model, tmp_path):
    assert f"in {tmp_path / 'acts'}" in repr(take(model, folder=tmp_path / "acts"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_of_layers_survive_the_folder(model, tmp_path, dtype):
    model = model.to(dtype)
    found = take(model, folder=tmp_path / "acts")
    assert found["3"].dtype == dtype
    assert_same(found, take(model))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_other_types_survive_saving(tmp_path, dtype):
    acts = Activations({"a": (torch.arange(12).reshape(4, 3) % 2).to(dtype), "one each": torch.arange(4).to(dtype)})
    acts.save(tmp_path)
    assert_same(Activations.load(tmp_path), acts)


def test_type_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layer 'spectrum'.*complex64"):
        Activations({"spectrum": torch.zeros(4, 3, dtype=torch.complex64)}).save(tmp_path)


def test_names_that_no_file_could_have(tmp_path):
    layers = {name: torch.full((2, 1), float(i)) for i, name in enumerate(["a/b", "a:b", "..", "x" * 300, "ü", "a_b"])}
    Activations(layers).save(tmp_path)
    assert_same(Activations.load(tmp_path), Activations(layers))


def test_subset_of_a_folder_saved_again(model, tmp_path):
    acts = take(model)
    take(model, folder=tmp_path / "all").subset([4, 1], ["3", "0"]).save(tmp_path / "part")
    assert_same(Activations.load(tmp_path / "part"), acts.subset([4, 1], ["3", "0"]))


def test_folder_needs_one_pass_only_and_no_memory(model, tmp_path):
    batches = ((X[i : i + 5], Y[i : i + 5]) for i in range(0, N, 5))
    assert_same(take(model, batches, folder=tmp_path / "acts", memory=1), take(model))


def test_folder_with_files_in_it_is_refused(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ValueError, match=r"folder .* must be empty or new"):
        take(model, folder=tmp_path)
    with pytest.raises(ValueError, match=r"folder .* must be empty or new"):
        take(model).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_folder_without_activations_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{folder} holds no complete activations"):
            Activations.load(folder)


def test_capture_that_broke_off_leaves_nothing_to_load(model, tmp_path):
    x = X.clone()
    x[8] = torch.nan
    with pytest.raises(ValueError, match="layer '0' gives NaN"):
        take(model, x, folder=tmp_path / "acts")
    with pytest.raises(ValueError, match="holds no complete activations"):
        Activations.load(tmp_path / "acts")


def layer_file(folder, name):
    index = json.loads((folder / "activations.json").read_text())
    return folder / next(item["file"] for item in index["layers"] if item["name"] == name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 500),
        lambda path: path.write_bytes(layer_file(path.parent, "3").read_bytes()),
    ],
    ids=["missing", "truncated", "cut in its header", "empty", "zeros", "that of another layer"],
)
def test_damaged_layer_is_refused_with_its_file(model, tmp_path, damage):
    take(model, folder=tmp_path / "acts")
    path = layer_file(tmp_path / "acts", "0")
    damage(path)
    with pytest.raises(ValueError, match=f"layer '0'.*{path.name}"):
        Activations.load(tmp_path / "acts")["0"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "{}",
        lambda text: "[]",
        lambda text: text.replace('"F32"', '"F31"'),
        lambda text: text.replace('"n": 12', '"n": 13'),
        lambda text: text.replace("{", "\xff", 1),
    ],
    ids=["half", "empty", "no entries", "a list", "unknown type", "another n", "no text"],
)
def test_damaged_index_is_refused_with_its_folder(model, tmp_path, damage):
    take(model, folder=tmp_path / "acts")
    index = tmp_path / "acts" / "activations.json"
    index.write_bytes(damage(index.read_text()).encode("latin-1"))
    with pytest.raises(ValueError, match=str(tmp_path / "acts")):
        Activations.load(tmp_path / "acts")


def test_a_file_replaced_by_one_of_another_type_is_refused(model, tmp_path):
    take(model, folder=tmp_path / "single")
    take(model.double(), folder=tmp_path / "double")
    layer_file(tmp_path / "single", "0").write_bytes(layer_file(tmp_path / "double", "0").read_bytes())
    with pytest.raises(ValueError, match="layer '0'"):
        Activations.load(tmp_path / "single")["0"]
