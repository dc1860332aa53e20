"""Plans as plain data: JSON without loss, refusals, replay; pruned models on disk without code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import gpt2, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repgraph.demo import digits, digits_resnet
from repgraph.demo.network import DigitsResNet
from repgraph.prune import Plan, drop_layers, load_pruned

pytestmark = pytest.mark.usefixtures("one_thread")

X = digits()[0][:4]
NAMES = st.text(min_size=1, max_size=8)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def plans(draw):
    layers = draw(st.lists(NAMES, unique=True, max_size=4))
    return Plan(
        layers=tuple(layers),
        by=draw(st.text(max_size=8)),
        scores=draw(st.dictionaries(NAMES, NUMBERS | st.integers(-99, 99) | NUMBERS.map(np.float64), max_size=4)),
        threshold=draw(st.none() | NUMBERS),
        settings=draw(st.dictionaries(NAMES, PLAIN, max_size=3)),
        model=draw(st.text(max_size=8)),
        renamed=draw(st.dictionaries(NAMES, NAMES, max_size=3)),
        repairs={name: draw(st.integers(1, 4)) for name in layers[:1]},
    )


@given(plans())
def test_a_plan_goes_through_json_without_loss(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert list(again.scores) == list(plan.scores)  # the order is that of execution
    assert repr(again) == repr(plan)


@given(plans())
def test_what_json_holds_is_what_the_plan_holds(plan):
    data = json.loads(plan.to_json())
    assert data.pop("repgraph_plan") == 1
    assert data.pop("layers") == list(plan.layers)
    assert {name: getattr(plan, name) for name in data} == data


@pytest.mark.parametrize(
    "change",
    [
        {"layers": ("b", "a")}, {"by": "y"}, {"scores": {"a": 2.0}}, {"threshold": 0.0}, {"settings": {"k": [1, 3]}},
        {"model": "M"}, {"renamed": {"b": "c"}}, {"repairs": {"a": 1}},
    ],
)  # fmt: skip
def test_plans_differ_in_every_field(change):
    fields = {"layers": ("a", "b"), "by": "x", "scores": {"a": 1.0}, "settings": {"k": [1, 2]}}
    assert Plan(**fields) == Plan(**fields)
    assert Plan(**(fields | change)) != Plan(**fields)


def test_tuples_in_settings_are_lists_at_once():
    assert Plan(layers=("a",), settings={"k": (1, (2,))}).settings == {"k": [1, [2]]}


def test_a_plan_does_not_change_with_what_it_was_made_from():
    scores, settings = {"a": 1.0}, {"k": [1]}
    plan = Plan(layers=["a"], scores=scores, settings=settings)
    scores["a"] = 9.0
    settings["k"].append(2)
    assert plan == Plan(layers=("a",), scores={"a": 1.0}, settings={"k": [1]})


def test_printed_table():
    plan = Plan(
        layers=("l.2", "long.name", "x"), by="gbs", scores={"l.1": 0.5, "l.2": 1234.5678, "long.name": 1e-9},
        threshold=0.25, settings={"n": 5}, repairs={"long.name": 1},
    )  # fmt: skip
    assert repr(plan).splitlines() == [
        "Plan: drop 3 of 4 layers, by gbs, threshold 0.25, n = 5",
        "               score",
        "  l.1            0.5",
        "  l.2        1.23e+03  drop",
        "  long.name    1e-09  repair",
        "  x                   drop",
    ]


def test_printed_table_without_scores():
    assert repr(Plan(layers=("a", "b"))).splitlines() == [
        "Plan: drop 2 layers, by choice",
        "  a           drop",
        "  b           drop",
    ]


def test_html_shows_names_as_text():
    html = Plan(layers=("<b>&",), by="<script>", scores={"<b>&": 0.5}, settings={"<i>": "<u>"})._repr_html_()
    assert "<td>&lt;b&gt;&amp;</td><td>0.5</td><td>drop</td>" in html
    assert not any(tag in html for tag in ("<script>", "<b>", "<i>", "<u>"))


CIRCLE: list = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"layers": "abc"}, "layers must be names of layers, got 'abc'"),
        ({"layers": ("",)}, "layers must be names"),
        ({"layers": (1,)}, "layers must be names"),
        ({"layers": None}, "layers must be names"),
        ({"layers": 5}, "layers must be names"),
        ({"layers": ("a", "b", "a")}, "layers name 'a' twice"),
        ({"by": None}, "by must be text, got None"),
        ({"model": nn.ReLU}, "model must be text"),
        ({"scores": [1.0]}, "scores must be a mapping from names"),
        ({"scores": {1: 1.0}}, "scores must be a mapping from names"),
        ({"settings": "k=1"}, "settings must be a mapping from names"),
        ({"scores": {"a": float("nan")}}, "score of 'a' must be a finite number, got nan"),
        ({"scores": {"a": float("-inf")}}, "score of 'a' must be a finite number"),
        ({"scores": {"a": "0.5"}}, "score of 'a' must be a finite number, got '0.5'"),
        ({"scores": {"a": True}}, "score of 'a' must be a finite number, got True"),
        ({"scores": {"a": None}}, "score of 'a' must be a finite number, got None"),
        ({"scores": {"threshold": None}}, "score of 'threshold' must be a finite number, got None"),
        ({"scores": {"a": 10**400}}, "score of 'a' must be a finite number"),
        ({"scores": {"a": torch.tensor(0.5)}}, "score of 'a' must be a finite number"),
        ({"threshold": float("inf")}, "threshold must be a finite number"),
        ({"threshold": "0.1"}, "threshold must be a finite number"),
        ({"renamed": {"a": 1}}, "renamed must be a mapping from names to names, got 1 for 'a'"),
        ({"repairs": {"c": 1}}, "repairs name 'c', which is not dropped"),
        ({"repairs": {"a": 0}}, "got 0 for 'a'"),
        ({"repairs": {"a": True}}, "got True for 'a'"),
        ({"repairs": {"a": 1.0}}, "got 1.0 for 'a'"),
        ({"settings": {"k": {1, 2}}}, "settings must be plain data that JSON can hold"),
        ({"settings": {"k": torch.zeros(2)}}, "settings must be plain data"),
        ({"settings": {"k": [float("nan")]}}, "settings must be plain data"),
        ({"settings": {"k": Path("a")}}, "settings must be plain data"),
        ({"settings": {"k": CIRCLE}}, "settings must be plain data"),
    ],
)  # fmt: skip
def test_refused_fields(fields, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        Plan(**({"layers": ("a", "b")} | fields))


def test_names_from_a_generator_are_kept():
    assert Plan(layers=(name for name in ("a", "b"))).layers == ("a", "b")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must be JSON text"),
        ("{", "must be JSON text"),
        (None, "must be JSON text"),
        ("[]", "not that of a plan"),
        ("null", "not that of a plan"),
        ('{"layers": []}', "expected an object with repgraph_plan = 1"),
        ('{"repgraph_plan": 2, "layers": []}', "expected an object with repgraph_plan = 1"),
        ('{"repgraph_plan": "1", "layers": []}', "expected an object with repgraph_plan = 1"),
        ('{"repgraph_plan": 1}', "no entry 'layers'"),
        ('{"repgraph_plan": 1, "layers": "abc"}', "must be a list of names, got 'abc'"),
        ('{"repgraph_plan": 1, "layers": {"a": 1}}', "must be a list of names"),
        ('{"repgraph_plan": 1, "layers": [1]}', "must be names of layers"),
        ('{"repgraph_plan": 1, "layers": ["a", "a"]}', "'a' twice"),
        ('{"repgraph_plan": 1, "layers": [], "layer": []}', "unknown entry 'layer'; known are by, filters, layers"),
        ('{"repgraph_plan": 1, "layers": [], "scores": {"a": NaN}}', "finite number, got nan"),
        ('{"repgraph_plan": 1, "layers": [], "scores": null}', "scores must be a mapping"),
        ('{"repgraph_plan": 1, "layers": [], "settings": {"a": Infinity}}', "settings must be plain data"),
    ],
)
def test_refused_texts(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan.from_json(text)


def test_files_of_plans(tmp_path):
    plan = Plan(layers=("Schicht 1.ü", "層"), scores={"層": 0.1}, settings={"größe": {"é": [1, None]}})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(str(tmp_path / "plan.json")) == plan
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"bad\.json: .*codec"):
        Plan.load(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Plan.load(tmp_path / "none.json")


def test_replay_on_an_equal_model_is_equal():
    pruned = drop_layers(digits_resnet(), ["layer3.2", "layer1.1", "layer1.3"], X)
    plan = Plan.from_json(pruned.plan.to_json())
    again = drop_layers(digits_resnet(), plan, X)
    assert again.plan == plan
    assert (again.before, again.after) == (pruned.before, pruned.after)
    assert torch.equal(again.model(X), pruned.model(X))
    assert plan.layers == ("layer1.1", "layer1.3", "layer3.2")  # in execution order
    assert plan.renamed == {"layer1.2": "layer1.1", "layer1.4": "layer1.2", "layer3.3": "layer3.2"}
    assert plan.model == "DigitsResNet"


def test_what_chose_the_layers_stays_in_the_plan():
    plan = Plan(layers=("layer1.2",), by="gbs", scores={"layer1.2": 0.5}, threshold=0.5, settings={"seed": 3})
    found = drop_layers(digits_resnet(), plan, X).plan
    assert (found.by, found.scores, found.threshold, found.settings) == ("gbs", {"layer1.2": 0.5}, 0.5, {"seed": 3})
    assert plan.model == ""  # the plan that went in is as it was


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "new" / "cut"
    drop_layers(digits_resnet(), ["layer1.1", "layer2.2"], X).save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "cut"))


def test_files_are_json_and_safetensors(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "weights.safetensors"]
    assert json.loads((folder / "plan.json").read_text())["layers"] == ["layer1.1", "layer2.2"]
    data = (folder / "weights.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    kept = drop_layers(digits_resnet(), ["layer1.1", "layer2.2"], X).model.state_dict()
    assert set(header) - {"__metadata__"} == set(kept)
    sizes = {name: value["shape"] for name, value in header.items() if name != "__metadata__"}
    assert sizes == {name: list(value.shape) for name, value in kept.items()}


def test_loads_into_a_model_of_other_weights(folder):
    fresh = digits_resnet(1)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    loaded = load_pruned(fresh, folder, X)
    assert torch.equal(loaded.model(X), drop_layers(digits_resnet(), ["layer1.1", "layer2.2"], X).model(X))
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_loads_what_fine_tuning_made(tmp_path):
    pruned = drop_layers(digits_resnet(), ["layer1.1"], X)
    optimizer = torch.optim.SGD(pruned.model.train().parameters(), 0.01)
    for _ in range(2):
        nn.functional.cross_entropy(pruned.model(X), torch.arange(4)).backward()
        optimizer.step()
    pruned.save(tmp_path)
    pruned.model.eval()
    loaded = load_pruned(DigitsResNet().eval(), tmp_path, X)
    assert torch.equal(loaded.model(X), pruned.model(X))
    assert not torch.equal(loaded.model(X), drop_layers(digits_resnet(), ["layer1.1"], X).model(X))


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model, example = gpt2().eval(), tokens()
    pruned = drop_layers(model, ["transformer.h.0", "transformer.h.1.attn"], example)
    assert pruned.model.lm_head.weight is pruned.model.transformer.wte.weight
    pruned.save(tmp_path)
    loaded = load_pruned(gpt2().eval(), tmp_path, example)
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert torch.equal(loaded.model(**example).logits, pruned.model(**example).logits)


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_damaged_weights_are_named(folder, keep):
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load_pruned(digits_resnet(), folder, X)


@pytest.mark.parametrize("name", ["plan.json", "weights.safetensors"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_pruned(digits_resnet(), folder, X)


def test_damaged_plans_are_named(folder):
    (folder / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json: a plan must be JSON text"):
        load_pruned(digits_resnet(), folder, X)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: DigitsResNet((5, 5, 6)), "does not fit DigitsResNet without what the plan removes.*layer3.4"),
        (lambda: DigitsResNet((3, 5, 4)), "does not fit DigitsResNet without what the plan removes.*layer1.2"),
        (lambda: DigitsResNet((1, 5, 4)), "the model has no module 'layer1.1'"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)), "the model has no module 'layer1.1'"),
    ],
)
def test_another_architecture_is_refused(folder, model, sentence):
    with pytest.raises(ValueError, match=f"(?s){sentence}"):
        load_pruned(model(), folder, X)
