"""Which layers are meant, and what layer_names shows of them."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from repgraph import capture, layer_names
from repgraph.activations import LayerNames


class Block(nn.Module):
    """A residual block of two convs."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))


class ResNet(nn.Module):
    """Stem, two stages in a Sequential each, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Stage(nn.Module):
    """A stage of its own class that only holds a list of blocks and a norm."""

    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Feed(nn.Module):
    """A transformer-like block of two linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """A T5-like stack, once as encoder and once as decoder."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleList([Feed(), Feed(), Feed()])

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return x


class TwoStacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(10, 6)
        self.encoder, self.decoder = Stack(), Stack()

    def forward(self, ids):
        return self.decoder(self.encoder(self.shared(ids)))


class OtherOrder(nn.Module):
    """Runs its layers in another order than it registers them, one of them twice."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 2)
        self.middle = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.middle(self.middle(self.first(x))))


def names(model, layers, shape=(2, 3, 8, 8)):
    """Names that capture really takes."""
    return list(capture(model, torch.randn(shape), layers, progress=False))


BLOCKS = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]


def test_blocks_are_the_stem_and_the_residual_blocks():
    assert names(ResNet(), "blocks") == ["stem", *BLOCKS]


def test_blocks_of_a_plain_conv_chain_are_its_convs():
    units = [nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Sequential(*units), nn.Flatten(), nn.Linear(12, 2))
    assert names(model, "blocks") == ["0.0.0", "0.1.0", "0.2.0"]


def test_blocks_of_an_mlp_are_its_linear_layers():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    assert names(model, "blocks", (3, 6)) == ["0", "2", "4"]


def test_blocks_go_into_encoder_and_decoder_stacks():
    expected = [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3)]
    acts = capture(TwoStacks(), torch.randint(0, 10, (4, 5)), progress=False)
    assert list(acts) == expected


def test_blocks_go_into_stages_also_where_one_stage_has_one_block():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Stage(2), Stage(1), Stage(3))
    expected = ["0", "1.blocks.0", "1.blocks.1", "2.blocks.0", "3.blocks.0", "3.blocks.1", "3.blocks.2"]
    assert names(model, "blocks") == expected


def test_blocks_are_the_outermost_ones():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Block(), Feed()

        def forward(self, x):
            return self.two(self.one(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Twice(), Twice())
    assert names(model, "blocks") == ["0", "1", "2"]


def test_blocks_ignore_the_parametrizations_of_weight_norm():
    model = nn.Sequential(*(weight_norm(nn.Conv2d(3, 3, 3)) for _ in range(3)))
    assert names(model, "blocks") == ["0", "1", "2"]


def test_leaves_ignore_the_parametrizations_of_weight_norm():
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    assert "1" in names(model, "leaves")
    assert not any("parametrizations" in name for name in names(model, "leaves"))


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("stem", ["stem"]),
        ("layer1.1.conv2", ["layer1.1.conv2"]),
        ("layer1.?", ["layer1.0", "layer1.1"]),
        ("layer[12].0", ["layer1.0", "layer2.0"]),
        ("*.conv1", [f"{name}.conv1" for name in BLOCKS]),
        (nn.Linear, ["fc"]),
        (Block, BLOCKS),
        (lambda name, module: isinstance(module, nn.Conv2d) and "2" in name.split(".")[0], None),
        (["fc", "stem"], ["stem", "fc"]),
        (["stem", "stem", "st*"], ["stem"]),
        (("layer1.*2", nn.Linear), ["layer1.0.conv2", "layer1.1.conv2", "fc"]),
        (["blocks", "fc"], ["stem", *BLOCKS, "fc"]),
    ],
)
def test_ways_to_choose(select, expected):
    expected = expected or [f"layer2.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    assert names(ResNet(), select) == expected


def test_leaves_have_no_children_and_repeat_where_they_run_twice():
    assert names(nn.Sequential(Block()), "leaves", (2, 4, 5, 5)) == ["0.conv1", "0.relu", "0.conv2", "0.relu#1"]


def test_wildcard_takes_everything_below():
    found = names(ResNet(), "layer2.*")
    assert found[-1] == "layer2.1"
    assert set(found) >= {"layer2.0", "layer2.0.conv1", "layer2.1.conv2"}


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))])
def test_wrappers_are_looked_through(wrap):
    model, x = ResNet(), torch.randn(2, 3, 8, 8)
    plain, wrapped = (capture(m, x, progress=False) for m in (model, wrap(model)))
    assert list(wrapped) == list(plain) == list(layer_names(wrap(model)))
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("module.stem", ["stem"]),
        (["module.fc", "module.layer1.0"], ["layer1.0", "fc"]),
        ("module.layer1.?", ["layer1.0", "layer1.1"]),
    ],
)
def test_names_with_the_prefix_of_data_parallel(select, expected):
    assert names(nn.DataParallel(ResNet()), select) == expected


def test_prefix_of_data_parallel_on_a_later_call():
    assert names(nn.DataParallel(OtherOrder()), "module.middle#1", (2, 6)) == ["middle#1"]


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("layer1.0.conv3", r"'layer1.0.conv3' matches no layer; close names are 'layer1.0.conv[12]'"),
        (["stem", "fcc"], "'fcc' matches no layer; close names are 'fc'"),
        ("block*", r"'block\*' matches no layer"),
        (nn.LSTM, "type LSTM matches no layer"),
        (lambda name, module: False, "predicate matches no layer"),
        ([], "layers is empty"),
    ],
)
def test_choice_that_matches_nothing_is_refused(select, message):
    with pytest.raises(ValueError, match=message):
        capture(ResNet(), torch.randn(2, 3, 8, 8), select, progress=False)
    with pytest.raises(ValueError, match=message):
        layer_names(ResNet(), select)


def test_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no submodules"):
        layer_names(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="'blocks' finds no repeated block, conv or linear layer"):
        layer_names(nn.Sequential(nn.ReLU(), nn.Flatten()))


@pytest.mark.filterwarnings("ignore")
def test_scripted_and_traced_models_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    for frozen in (torch.jit.script(model), torch.jit.trace(model, torch.zeros(1, 4))):
        with pytest.raises(ValueError, match="model is a scripted or traced module"):
            capture(frozen, torch.zeros(2, 4), progress=False)


def test_something_else_than_a_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        capture("resnet18", torch.zeros(2, 4), progress=False)


def test_layer_names_is_a_list_that_prints_shapes():
    found = layer_names(ResNet(), data=torch.randn(5, 3, 10, 12))
    assert isinstance(found, LayerNames)
    assert found == ["stem", *BLOCKS]
    assert found[1:3] == BLOCKS[:2]
    assert repr(found).splitlines()[:3] == [
        "5 layers, for the given data",
        "  stem      Conv2d  4 x 8 x 10",
        "  layer1.0  Block   4 x 8 x 10",
    ]
    assert "<td>layer1.0</td><td>Block</td><td>4 x 8 x 10</td>" in found._repr_html_()
    assert found.kinds["stem"] == "Conv2d"
    assert found.specs["layer2.1"].shape == (4, 8, 10)


def test_layer_names_without_data_assumes_an_input():
    found = layer_names(ResNet(), ["stem", "fc"])
    assert found == ["stem", "fc"]
    assert found.given == "for an assumed input of 3 x 224 x 224"
    assert found.specs["stem"].shape == (4, 222, 222)


def test_layer_names_takes_the_input_size_a_model_declares():
    model = ResNet()
    model.default_cfg = {"input_size": (3, 20, 16)}
    assert layer_names(model, "stem").specs["stem"].shape == (4, 18, 14)


@pytest.mark.parametrize("data", [None, torch.randn(3, 6)])
def test_layer_names_stand_in_execution_order_with_repeated_calls(data):
    found = layer_names(OtherOrder(), "leaves", data)
    assert found == ["first", "middle", "middle#1", "last"]
    assert [found.specs[name].shape for name in found] == [(6,), (6,), (6,), (2,)]
    assert found == names(OtherOrder(), "leaves", (3, 6))


def test_layer_names_of_token_models_are_told_from_the_embedding():
    found = layer_names(TwoStacks())
    assert found[0] == "encoder.block.0"
    assert found.given == "for an assumed input of 8 token ids"
    assert found.specs["decoder.block.2"].shape == (8, 6)


def test_layer_names_where_no_input_can_be_assumed():
    class Odd(OtherOrder):
        def forward(self, x, y):
            return super().forward(x + y)

    found = layer_names(Odd())
    assert found == ["last", "middle", "first"]
    assert repr(found).splitlines()[:2] == ["3 layers, in order of registration", "  last    Linear  ?"]


def test_layer_names_for_loaders_takes_one_small_batch():
    seen = []

    class Watched(ResNet):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 3, 8, 8)), 20)
    assert layer_names(Watched(), data=loader) == ["stem", *BLOCKS]
    assert sum(seen) <= 20


def test_names_shown_are_the_names_taken():
    for select in ("blocks", "leaves", "layer1.*"):
        assert layer_names(ResNet(), select) == names(ResNet(), select)
