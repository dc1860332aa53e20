"""What drop_layers, predict_cost and droppable_layers refuse, with which sentence; and nothing wrong slips through."""

import re
from collections import namedtuple
from copy import deepcopy

import numpy as np
import pytest
import torch
from architectures import gpt2, t5
from architectures import pairs as t5_example
from architectures import tokens as gpt2_example
from torch import nn

from repgraph.demo import digits, digits_resnet
from repgraph.prune import Plan, drop_layers, droppable_layers, predict_cost

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = digits()[0][:2]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
BLOCKS = [f"layer{stage}.{i}" for stage, number in ((1, 5), (2, 5), (3, 4)) for i in range(number)]


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Net(nn.Module):
    """Four blocks, whose outputs a function joins."""

    def __init__(self, forward, block=Block):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.head = nn.Linear(8, 5)
        self.function = forward
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        return self.function(self, x)


def chain(net, x):
    for block in net.blocks:
        x = block(x)
    return net.head(x)


def zipped(net, x):
    for block, norm in zip(net.blocks, net.norms, strict=False):
        x = norm(block(x))
    return net.head(x)


def without(net, i):
    copy = deepcopy(net)
    copy.blocks[i] = nn.Identity()
    return copy


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("layer1.9", "the model has no module 'layer1.9'; close names are 'layer1.4', 'layer1.3'"),
        ("layr1", "the model has no module 'layr1'; close names are 'layer1'"),
        ("zzzz", "the model has no module 'zzzz'; close names are 'conv1', 'bn1'"),
        (["layer1.1", "module.layer1.2"], "the model has no module 'module.layer1.2'"),
        ("", "names must be names of modules, got ''"),
        (["layer1.1", ""], "names must be names of modules, got ''"),
        ([1], "names must be names of modules, got 1"),
        ([None], "names must be names of modules, got None"),
        ([("layer1.1",)], "names must be names of modules, got ('layer1.1',)"),
        ([nn.ReLU()], "names must be names of modules, got ReLU()"),
        (["layer1.1", "layer2.1", "layer1.1"], "names hold 'layer1.1' twice"),
        (["layer1", "layer1.1"], "'layer1.1' is inside 'layer1', which goes as a whole: name one of them"),
        (["layer1.1.conv1", "layer1.1"], "'layer1.1.conv1' is inside 'layer1.1', which goes as a whole"),
        (BLOCKS, "'layer2.0' cannot be left out, because it turns (2, 8, 8, 8) into (2, 16, 4, 4): only a layer whose "
            "input and output agree can become the identity; make it thinner by pruning filters"),
        ("layer2.0", "beside it 'layer2.1', 'layer2.2', 'layer2.3', 'layer2.4' can go"),
        ("linear", "'linear' cannot be left out, because it turns (2, 32) into (2, 10)"),
        ("conv1", "'conv1' cannot be left out, because it turns (2, 1, 8, 8) into (2, 8, 8, 8)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("refuse", [drop_layers, predict_cost])
def test_names_that_are_refused(refuse, names, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        refuse(digits_resnet(), names, IMAGES)


@pytest.mark.parametrize("names", [None, 5, 0.5])
@pytest.mark.parametrize("refuse", [drop_layers, predict_cost])
def test_names_that_are_no_names_are_told_so(refuse, names):
    with pytest.raises((TypeError, ValueError), match="names must be"):
        refuse(digits_resnet(), names, IMAGES)


def test_names_of_a_plan_are_checked_like_others():
    with pytest.raises(ValueError, match="the model has no module 'layer9'"):
        drop_layers(digits_resnet(), Plan(layers=("layer9",)), IMAGES)
    with pytest.raises(ValueError, match=r"'layer1\.1' is inside 'layer1'"):
        drop_layers(digits_resnet(), Plan(layers=("layer1", "layer1.1")), IMAGES)


def test_a_prefix_of_a_name_is_no_parent():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(11)))
    assert drop_layers(net, ["1", "10"], X).plan.layers == ("1", "10")


def test_all_blocks_are_refused():
    blocks = [f"transformer.h.{i}" for i in range(4)]
    for names in (blocks, blocks[::-1]):
        with pytest.raises(ValueError, match="names hold all 4 blocks of the model: keep at least one"):
            drop_layers(gpt2(), names, gpt2_example())
    assert len(drop_layers(gpt2(), blocks[1:], gpt2_example()).model.transformer.h) == 1


def test_all_layers_of_a_plain_chain_are_refused():
    chained = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(ValueError, match="keep at least one"):
        drop_layers(chained, ["0", "2"], X)


def test_a_list_is_no_layer():
    with pytest.raises(
        ValueError, match=r"'transformer\.h' does not run in a forward pass on the example, or is a list"
    ):
        drop_layers(gpt2(), "transformer.h", gpt2_example())


def test_a_layer_that_does_not_run():
    net = Net(lambda net, x: net.head(net.blocks[0](x)))
    with pytest.raises(ValueError, match=r"'blocks\.2' does not run in a forward pass on the example"):
        drop_layers(net, ["blocks.2"], X)


@pytest.mark.parametrize("example", [None, "abc", 5, [], {}, {"x": 1}])
@pytest.mark.parametrize("refuse", [drop_layers, predict_cost])
def test_examples_that_are_none(refuse, example):
    with pytest.raises(TypeError, match="example must be one batch: a tensor, a tuple \\(inputs, labels\\) or a dict"):
        refuse(digits_resnet(), ["layer1.1"], example)


@pytest.mark.parametrize("model", ["resnet50", None, Block])
@pytest.mark.parametrize("refuse", [drop_layers, predict_cost])
def test_models_that_are_none(refuse, model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        refuse(model, ["blocks.0"], X)


@pytest.mark.parametrize("refuse", [drop_layers, predict_cost])
def test_scripted_models_are_refused(refuse):
    scripted = torch.jit.trace(Net(chain), X)
    with pytest.raises(ValueError, match="scripted or traced module"):
        refuse(scripted, ["blocks.1"], X)


@pytest.mark.parametrize("refuse", [drop_layers, predict_cost, lambda model, _, x: droppable_layers(model, x)])
def test_lazy_models_are_refused_and_stay_lazy(refuse):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="lazy parameters"):
        refuse(net, ["0"], X)
    assert isinstance(net[2], nn.LazyLinear)


def test_models_without_data_are_refused():
    net = Net(chain).to("meta")
    with pytest.raises(ValueError, match=r"meta|data"):
        drop_layers(net, ["blocks.1"], X.to("meta"))


def test_an_empty_example_checks_nothing_and_is_refused():
    with pytest.raises(ValueError, match="example"):
        drop_layers(Net(zipped), ["blocks.1"], X[:0])


def test_an_example_of_another_shape_keeps_its_own_error():
    with pytest.raises(RuntimeError, match="expected input"):
        drop_layers(digits_resnet(), ["layer1.1"], torch.zeros(2, 3, 8, 8))


def test_a_block_whose_other_results_are_needed():
    with pytest.raises(
        ValueError,
        match=r"'encoder.block.0' cannot be left out, because the rest of the model uses more of what it gives",
    ):
        drop_layers(t5(), ["encoder.block.0"], t5_example())


def test_what_is_offered_can_be_dropped():
    model = t5()
    for name in droppable_layers(model, t5_example()):
        assert drop_layers(model, [name], t5_example()).plan.layers == (name,)


def test_a_block_that_gives_a_dict():
    class Named(Block):
        def forward(self, x):
            return {"h": super().forward(x)}

    def taken(net, x):
        for block in net.blocks:
            x = block(x)["h"]
        return net.head(x)

    with pytest.raises(ValueError, match=r"it turns \(3, 8\) into no tensor"):
        drop_layers(Net(taken, Named), ["blocks.1"], X)


Pair = namedtuple("Pair", "h extra")


def test_a_block_that_gives_a_named_tuple():
    class Named(Block):
        def forward(self, x):
            return Pair(super().forward(x), None)

    def taken(net, x):
        for block in net.blocks:
            x = block(x).h
        return net.head(x)

    net = Net(taken, Named)
    try:
        found = drop_layers(net, ["blocks.1"], X).model(X)
    except ValueError:
        return  # a refusal with a sentence
    assert torch.equal(found, net.head(Block.forward(net.blocks[3], Block.forward(net.blocks[2], net.blocks[0](X).h))))


def infinite(net, x):
    y = zipped(net, x)
    y[:, 0] = -torch.inf
    return y


def undefined(net, x):
    y = zipped(net, x)
    y[:, 0] = torch.nan
    return y


def huge(net, x):
    return torch.cat((zipped(net, x), torch.full((len(x), 1), 1e30)), 1)


def yes_or_no(net, x):
    return zipped(net, x) > 0


def chosen_class(net, x):
    return zipped(net, x).argmax(1)


def indexed(net, x):
    return net.head(net.blocks[3](net.blocks[2](net.blocks[1](net.blocks[0](x)))))


def counted(net, x):
    for i in range(len(net.blocks)):
        x = net.blocks[i](x) * (i + 1)
    return net.head(x)


def sliced(net, x):
    early = nn.Sequential(*net.blocks)[:2](x)
    return net.head(nn.Sequential(*net.blocks)[2:](early) - 2 * early)


def two_results(net, x):
    for i, block in enumerate(net.blocks):
        x = block(x)
        if i == 2:
            middle = x
    return net.head(x), middle


def named_results(net, x):
    scores, middle = two_results(net, x)
    return {"scores": scores, "middle": middle}


@pytest.mark.parametrize(
    "function",
    [
        chain,
        zipped,
        indexed,
        counted,
        sliced,
        infinite,
        undefined,
        huge,
        yes_or_no,
        chosen_class,
        two_results,
        named_results,
    ],
)
def test_what_comes_back_is_the_identity_in_every_result(function):
    """Where a list is walked together with another one, or counted, taking a member out makes another network."""
    net = Net(function)
    found, reference = drop_layers(net, ["blocks.1"], X).model(X), without(net, 1)(X)
    if isinstance(found, dict):
        found, reference = tuple(found.values()), tuple(reference.values())
    found, reference = (value if isinstance(value, tuple) else (value,) for value in (found, reference))
    for a, b in zip(found, reference, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-6, equal_nan=True)


def test_results_that_are_not_numbers_do_not_hinder():
    net = Net(lambda net, x: chain(net, x) * torch.nan)
    assert len(drop_layers(net, ["blocks.1"], X).model.blocks) == 3
    assert torch.isnan(drop_layers(net, [], X).model(X)).all()


def test_the_stream_is_passed_on_not_another_argument_of_its_shape():
    class Conditioned(Block):
        def forward(self, *, condition, hidden_states):
            return super().forward(hidden_states) + 0.1 * condition

    def conditioned(net, x):
        condition = torch.ones_like(x)
        for block in net.blocks:
            x = block(condition=condition, hidden_states=x)
        return net.head(x)

    net = Net(conditioned, Conditioned)
    reference = deepcopy(net)
    reference.blocks[1].forward = lambda condition, hidden_states: hidden_states
    try:
        found = drop_layers(net, ["blocks.1"], X).model(X)
    except ValueError:
        return  # a refusal with a sentence
    assert torch.equal(found, reference(X))


def test_the_last_softmax_stays():
    chained = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Softmax(1))
    found = drop_layers(chained, ["2"], X).model(X)
    assert torch.allclose(found.sum(1), torch.ones(3))


def test_one_module_under_two_names_goes_from_both_places_or_is_refused_for_that():
    torch.manual_seed(0)
    shared, other, head = Block(), Block(), nn.Linear(8, 5)
    net = nn.Sequential(shared, other, shared, head)
    try:
        found = drop_layers(net, ["0"], X).model(X)
    except ValueError as error:
        assert "'2'" in str(error) or "shared" in str(error) or "twice" in str(error)  # noqa: PT017
        return
    assert torch.equal(found, head(other(X)))


def test_an_addition_in_place_to_what_is_nothing():
    class Falcon(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = (nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x):
            y = self.mlp(x)
            y += self.attention(x)
            return y + x

    net = Net(chain, Falcon)
    reference = deepcopy(net)
    reference.blocks[1].mlp.forward = torch.zeros_like
    assert torch.equal(drop_layers(net, ["blocks.1.mlp"], X).model(X), reference(X))


def test_a_block_that_changes_its_input_in_place():
    """Its input is needed again further on: without the block it stays as it is."""

    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.a = nn.ReLU(inplace=True), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(self.relu(x))

    def around(net, x):
        start = net.norms[0](x)
        return net.head(net.norms[1](net.blocks[0](start)) + 3 * start)

    net = Net(around, Early)
    assert torch.equal(drop_layers(net, ["blocks.0"], X).model(X), without(net, 0)(X))


def test_a_block_that_runs_twice_becomes_the_identity_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = Block(), Block(), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.a(self.b(self.a(x))))

    net = Twice()
    pruned = drop_layers(net, ["a"], X)
    assert torch.equal(pruned.model(X), net.head(net.b(X)))
    assert predict_cost(net, ["a"], X) == pruned.after


def test_cost_of_a_plan_with_repairs_is_not_foretold():
    with pytest.raises(ValueError, match="plan with repairs"):
        predict_cost(Net(chain), Plan(layers=("blocks.1",), repairs={"blocks.1": 1}), X)


def test_an_array_is_an_example():
    assert drop_layers(digits_resnet(), ["layer1.1"], np.asarray(IMAGES)).plan.layers == ("layer1.1",)
