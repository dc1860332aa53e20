"""What goes into a module, against pre-hooks set by hand, and beside outputs and gates."""

import pytest
import torch
from small_networks import Through, take
from torch import nn

from repgraph import Activations, layer_names

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(9, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Starts with an in-place ReLU, which changes what it was given."""

    def __init__(self, width):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(self.relu(x)) + x


class Net(nn.Module):
    """The mixing layer runs twice, the blocks get their input by keyword as well as by position."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        x = self.blocks[1](x=x).mean((2, 3))
        return self.head(self.mix(self.mix(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def by_pre_hooks(net, x, names):
    """Copies of what enters each call of the modules, made before the modules see it."""
    kept, handles = {}, []
    for name in names:

        def hook(_, args, kwargs, name=name):
            calls = sum(key.split("#")[0] == name for key in kept)
            value = next(iter([*args, *kwargs.values()]))
            kept[f"{name}#{calls}" if calls else name] = value.clone()

        handles.append(net.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return {f"inputs:{name}": value for name, value in kept.items()}


def check_equal(acts, expected):
    assert sorted(acts) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(acts[name], value, msg=lambda text, name=name: f"{name}: {text}")


NAMES = ["stem", "blocks.0", "blocks.0.relu", "blocks.0.conv", "blocks.1", "blocks.1.relu", "mix", "head"]


@pytest.mark.parametrize("batch_size", [2, 9])
def test_values_are_those_of_pre_hooks_set_by_hand(net, batch_size):
    acts = take(net, X, [f"inputs:{name}" for name in NAMES], batch_size=batch_size)
    check_equal(acts, by_pre_hooks(net, X, NAMES))
    assert torch.equal(acts["inputs:stem"], X)


def test_a_relu_in_place_does_not_change_what_was_recorded(net):
    acts = take(net, X, ["stem", "inputs:blocks.0", "inputs:blocks.0.conv"])
    assert torch.equal(acts["inputs:blocks.0"], acts["stem"])
    assert (acts["inputs:blocks.0"] < 0).any()
    assert torch.equal(acts["inputs:blocks.0.conv"], acts["stem"].relu())


def test_inputs_by_keyword_and_the_first_tensor_among_arguments():
    class Inner(nn.Module):
        def forward(self, scale, *parts, x, bias=None):
            return scale * x + sum(part["a"] for part in parts)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(2.0, x=x) + self.inner(3.0, {"a": x + 1}, x=x)

    acts = take(Outer(), X, "inputs:inner")
    check_equal(acts, {"inputs:inner": X, "inputs:inner#1": X + 1})


def test_module_called_twice(net):
    expected = by_pre_hooks(net, X, ["mix"])
    check_equal(take(net, X, "inputs:mix"), expected)
    for select in ("inputs:mix#1", ["inputs:mix#1"], ["inputs:mix#1", "inputs:mix#1"]):
        check_equal(take(net, X, select), {"inputs:mix#1": expected["inputs:mix#1"]})
    acts = take(net, X, ["mix", "inputs:mix#1"])
    assert list(acts) == ["mix", "inputs:mix#1", "mix#1"]
    assert torch.equal(acts["mix"], acts["inputs:mix#1"])
    with pytest.raises(ValueError, match="layer 'inputs:mix#2' does not run"):
        take(net, X, "inputs:mix#2")


def test_a_call_of_the_inputs_leaves_the_outputs_of_the_module_alone(net):
    assert list(take(net, X, ["inputs:mix#1", "mix#1"])) == ["inputs:mix#1", "mix#1"]
    assert list(take(net, X, ["inputs:mix", "mix#1"])) == ["inputs:mix", "inputs:mix#1", "mix#1"]


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (
            "inputs:blocks.*",
            ["blocks.0", "blocks.0.relu", "blocks.0.conv", "blocks.1", "blocks.1.relu", "blocks.1.conv"],
        ),
        ("inputs:blocks.?", ["blocks.0", "blocks.1"]),
        ("inputs:blocks", ["stem", "blocks.0", "blocks.1"]),
        ("inputs:leaves", ["stem", "blocks.0.relu", "blocks.0.conv", "blocks.1.relu", "blocks.1.conv", "mix", "head"]),
        (["inputs:head", "inputs:stem"], ["stem", "head"]),
    ],
)
def test_choices(net, select, names):
    acts = take(net, X, select)
    check_equal(acts, by_pre_hooks(net, X, names))
    assert [name for name in acts if "#" not in name] == [f"inputs:{name}" for name in names]
    assert list(layer_names(net, select, X)) == list(acts)


def test_types_beside_inputs(net):
    acts = take(net, X, [nn.Linear, "inputs:head"])
    assert list(acts) == ["mix", "mix#1", "inputs:head", "head"]
    assert torch.equal(acts["inputs:head"], acts["mix#1"])


def test_layer_names_for_an_assumed_input():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3))
    names = layer_names(net, "inputs:blocks")
    assert list(names) == ["inputs:0", "inputs:2"]
    assert names.kinds == {"inputs:0": "Conv2d", "inputs:2": "Conv2d"}
    assert [names.specs[name].shape for name in names] == [(3, 224, 224), (4, 222, 222)]
    assert list(layer_names(net, ["inputs:2", "0"])) == ["0", "inputs:2"]


def test_layer_names_of_later_calls(net):
    names = layer_names(net, "inputs:mix", X)
    assert list(names) == ["inputs:mix", "inputs:mix#1"]
    assert set(names.kinds.values()) == {"Linear"}


def test_gates_outputs_and_inputs_in_several_passes_and_in_a_folder(net, tmp_path):
    select = ["gates", "inputs:blocks", "leaves"]
    whole = take(net, X, select, batch_size=2)
    expected = by_pre_hooks(net, X, ["stem", "blocks.0", "blocks.1"])
    check_equal({name: whole[name] for name in whole if name.startswith("inputs:")}, expected)
    assert {"gates:blocks.0.relu", "gates:blocks.1.relu", "mix#1"} <= set(whole)
    largest = max(x.numel() * x.element_size() for x in whole.values())
    parts = take(net, X, select, batch_size=2, memory=largest + 100)
    assert "passes" in repr(parts)
    kept = take(net, X, select, batch_size=2, folder=tmp_path / "acts")
    for other in (parts, kept, Activations.load(tmp_path / "acts")):
        assert list(other) == list(whole)
        for name in whole:
            assert torch.equal(other[name], whole[name]), name


def test_gates_of_a_choice_do_not_take_inputs(net):
    assert list(take(net, X, ["gates:blocks.0.*", "inputs:head"])) == ["gates:blocks.0.relu", "inputs:head"]


def test_reduced(net):
    acts, whole = (take(net, X, "inputs:blocks.?", reduce=how) for how in ("mean", None))
    for name in acts:
        torch.testing.assert_close(acts[name], whole[name].mean((2, 3)))


def test_prefix_of_data_parallel(net):
    expected = by_pre_hooks(net, X, ["stem", "head"])
    wrapped = nn.DataParallel(net)
    check_equal(take(wrapped, X, ["inputs:module.stem", "inputs:head"]), expected)
    assert list(layer_names(wrapped, "inputs:module.mix", X)) == ["inputs:mix", "inputs:mix#1"]


def test_no_hooks_are_left(net):
    take(net, X, ["inputs:leaves", "gates"])
    with pytest.raises(RuntimeError):
        take(net, X[:, :2], "inputs:leaves")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("inputs:heat", "layers: 'heat' matches no layer; close names are 'head'"),
        ("inputs:", "layers: '' matches no layer"),
        ("inputs:block?.x", "matches no layer"),
        (["stem", "inputs:nothing.*"], "layers: 'nothing"),
    ],
)
def test_unknown_names(net, select, message):
    with pytest.raises(ValueError, match=message):
        take(net, X, select)


def test_module_without_a_tensor_among_its_arguments():
    class Text(nn.Module):
        def forward(self, x):
            return self.inner("text", scale=2.0) + x

        def __init__(self):
            super().__init__()
            self.inner = Inner()

    class Inner(nn.Module):
        def forward(self, *_, **__):
            return 1.0

    with pytest.raises(ValueError, match=r"layer 'inputs:inner' gives no tensor but tuple"):
        take(Text(), X, "inputs:inner")


def test_module_that_never_runs(net):
    net.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layer 'inputs:unused' does not run"):
        take(net, X, ["stem", "inputs:unused"])
    assert "inputs:unused" not in take(net, X, "inputs:leaves")


def test_first_axis_that_is_not_the_batch_and_nan():
    turned = nn.Sequential(Through(lambda x: x.movedim(0, 1)), Through(lambda x: x.movedim(0, 1)))
    with pytest.raises(ValueError, match=r"layer 'inputs:1' gives shape \(3, 9, 6, 6\) for a batch of 9 samples"):
        take(turned, X, "inputs:1")
    broken = nn.Sequential(Through(lambda x: x / 0), Through(torch.nan_to_num))
    with pytest.raises(ValueError, match="layer 'inputs:1' gives NaN or infinite values"):
        take(broken, X, "inputs:1")
