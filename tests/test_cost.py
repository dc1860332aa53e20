"""Costs against hand counts, other counters and what is left after a module is taken out; no trace in the model."""

import copy
import warnings

import pytest
import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st
from small_networks import Through
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from benchmarks import shared_data
from repgraph.cost import Cost, Latency, cost_by_module, latency, model_cost

pytestmark = pytest.mark.usefixtures("one_thread")

torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

COLUMNS = ["calls", "macs", "parameters", "activation_bytes"]


class Block(nn.Module):
    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Sequential()
        if before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.short(x)).relu()


class Toy(nn.Module):
    """The residual network of check 5 in the notes on filter surgery."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b1, self.b2 = Block(8, 8), Block(8, 16, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc(self.b2(self.b1(x)).mean((2, 3)))


def images(n=1, side=16):
    return random(n, 3, side, side)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


def macs(f, x):
    return model_cost(Through(f), x).macs


def counted_by_torch(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops()


# Whole networks


def test_toy_by_hand():
    stem, block1 = 27 * 8 * 256, 2 * (72 * 8 * 256)
    block2, head = (72 * 16 + 144 * 16 + 8 * 16) * 64, 16 * 5
    assert stem + block1 + block2 + head == 579_664
    cost = model_cost(Toy(), images())
    assert (cost.macs, cost.parameters, cost.flops) == (579_664, 5_181, 1_159_328)
    maps = (3 + 7) * 8 * 256 + (7 + 2) * 16 * 64  # stem, bn, relu; a block gives 7, its projection 2
    assert cost.activation_bytes == 4 * (maps + 16 + 5)


def test_toy_of_torch_pruning():
    found, parameters = tp.utils.count_ops_and_params(Toy().eval(), images())
    cost = model_cost(Toy(), images())
    batch_norms = 2 * sum(c * p for c, p in [(8, 256)] * 3 + [(16, 64)] * 3)
    assert found == cost.macs + batch_norms + 5  # which counts batch norms and the bias
    assert parameters == cost.parameters


def test_conv_and_linear_layers_of_torch_pruning():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, bias=False), nn.Conv2d(8, 16, 3, groups=4, bias=False), nn.Flatten(),
        nn.Linear(16 * 4 * 4, 7, bias=False),
    )  # fmt: skip
    found, parameters = tp.utils.count_ops_and_params(model, images())
    assert (model_cost(model, images()).macs, model_cost(model, images()).parameters) == (found, parameters)


@pytest.mark.skipif(not shared_data.available(), reason="shared data absent (REPGRAPH_SHARED)")
def test_resnet56():
    cost = model_cost(shared_data.cifar_network(56), torch.zeros(1, 3, 32, 32))
    stem, stages = 27 * 16 * 1024, [18 * 9 * 16 * 16 * 1024]
    for width, side in ((32, 16), (64, 8)):
        stages.append(9 * width * (width // 2 + 17 * width) * side * side)
    assert cost.macs == stem + sum(stages) + 64 * 10
    assert f"{cost.macs / 1e6:.3f}" == "125.486"


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_parity_with_flop_counter(name):
    model, x = getattr(torchvision.models, name)(weights=None), images(2, 64)
    assert model_cost(model, x).flops == counted_by_torch(model, x) > 0


def test_vision_transformer_by_hand():
    model = torchvision.models.vit_b_16(weights=None, image_size=32, num_classes=10)
    t, d = 5, 768
    layer = t * d * 3 * d + 2 * t * t * d + t * d * d + 2 * t * d * 4 * d
    assert model_cost(model, images(1, 32)).macs == 4 * (3 * 16 * 16) * d + 12 * layer + d * 10


# Kinds of operations


CONVS = {
    "2-D": (nn.Conv2d(3, 6, 3, padding=1), (2, 3, 8, 8), 2 * 6 * 64 * 27),
    "stride and dilation": (nn.Conv2d(3, 6, 3, stride=2, dilation=2), (1, 3, 9, 9), 6 * 9 * 27),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 6 * 9 * 9 * 2),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 5, 5), 8 * 9 * 9),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 4 * 25 * 9 * 6),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 4 * 25 * 9 * 3),
    "1-D": (nn.Conv1d(3, 5, 4), (2, 3, 10), 2 * 5 * 7 * 12),
    "3-D": (nn.Conv3d(2, 3, (1, 2, 3)), (1, 2, 4, 4, 4), 3 * (4 * 3 * 2) * (2 * 6)),
    "unbatched channels": (nn.Conv2d(1, 1, 1), (7, 1, 1, 1), 7),
}


@pytest.mark.parametrize("kind", CONVS)
def test_convolutions(kind):
    model, shape, expected = CONVS[kind]
    assert model_cost(model, random(*shape)).macs == expected


W, V = random(6, 4), random(4)
PRODUCTS = {
    "linear": (lambda x: F.linear(x, W.T[:, :4]), 2 * 5 * 4 * 4),
    "matmul": (lambda x: x @ W.T, 2 * 5 * 4 * 6),
    "bmm": (lambda x: torch.bmm(x, x.mT), 2 * 5 * 4 * 5),
    "einsum": (lambda x: torch.einsum("nij,nkj->nik", x, x), 2 * 5 * 4 * 5),
    "mm": (lambda x: x[0] @ W.T, 5 * 4 * 6),
    "mv": (lambda x: x[0] @ V, 5 * 4),
    "dot": (lambda x: x[0, 0] @ V, 4),
    "addmm": (lambda x: torch.addmm(torch.zeros(6), x[0], W.T), 5 * 4 * 6),
    "addmm_": (lambda x: torch.zeros(5, 6).addmm_(x[0], W.T), 5 * 4 * 6),
    "addmv": (lambda x: torch.addmv(torch.zeros(5), x[0], V), 5 * 4),
    "baddbmm_": (lambda x: torch.zeros(2, 5, 5).baddbmm_(x, x.mT), 2 * 5 * 4 * 5),
    "addbmm": (lambda x: torch.addbmm(torch.zeros(5, 5), x, x.mT), 2 * 5 * 4 * 5),
    "mm with out": (lambda x: torch.mm(x[0], W.T, out=torch.zeros(5, 6)), 5 * 4 * 6),
    "multi_dot": (lambda x: torch.linalg.multi_dot([x[0], W.T, W]), 6 * 4 * 4 + 5 * 4 * 4),
    "conv_tbc": (lambda x: torch.conv_tbc(x, random(2, 4, 3), torch.zeros(3)), 1 * 5 * 3 * 2 * 4),
    "conv2d": (lambda x: F.conv2d(x[:, None], torch.ones(3, 1, 2, 2)), 2 * 3 * 4 * 3 * 4),
    "checkpoint": (lambda x: torch.utils.checkpoint.checkpoint(lambda y: y @ V, x[0], use_reentrant=False), 5 * 4),
    "element-wise": (lambda x: (x * x + x).exp().softmax(-1), 0),
    "norms and pooling": (lambda x: torch.linalg.norm(F.avg_pool1d(F.layer_norm(x, (4,)), 2)), 0),
    "upsampling": (lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"), 0),
}


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("inference", [False, True])
def test_functional_products(kind, inference):
    f, expected = PRODUCTS[kind]
    with warnings.catch_warnings(), torch.inference_mode(inference):
        warnings.simplefilter("error")
        assert macs(f, random(2, 5, 4)) == expected


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_a_product_of_matrices(b, m, k, n):
    assert macs(lambda x: x @ torch.ones(k, n), torch.ones(b, m, k)) == b * m * k * n
    assert macs(lambda x: x @ torch.ones(b, k, n), torch.ones(b, m, k)) == b * m * k * n


# Attention


@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention(causal):
    q = random(2, 4, 5, 8)
    assert macs(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=causal), q) == 2 * 4 * 5 * 5 * 2 * 8


@pytest.mark.parametrize("mask", [None, torch.ones(5, 7, dtype=torch.bool)], ids=["no mask", "mask"])
def test_cross_attention_with_grouped_keys(mask):
    q, k = random(2, 4, 5, 8), random(2, 2, 7, 8)
    f = lambda x: F.scaled_dot_product_attention(x, k, k, attn_mask=mask, enable_gqa=True)  # noqa: E731
    assert macs(f, q) == 2 * 4 * 5 * 7 * 2 * 8


def test_attention_with_other_values():
    q, v = random(2, 4, 5, 8), random(2, 4, 5, 3)
    assert macs(lambda x: F.scaled_dot_product_attention(x, x, v), q) == 2 * 4 * 5 * 5 * (8 + 3)


class SelfAttention(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(12, 3, batch_first=True), weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention(weights):
    model, b, t, d = SelfAttention(weights), 2, 5, 12
    assert model_cost(model, random(b, t, d)).macs == b * (4 * t * d * d + 2 * t * t * d)
    assert model_cost(model, random(b, t, d)).parameters == 4 * (d * d + d)


def test_encoder_layers_without_the_fused_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 2)
    table = cost_by_module(model, random(2, 5, 12))
    attention, forward = 2 * (4 * 5 * 144 + 2 * 25 * 12), 2 * 2 * (5 * 12 * 20)
    assert table.loc["layers.0", "macs"] == attention + forward
    assert table.loc["layers", "macs"] == table.loc["", "macs"] == 2 * (attention + forward)
    assert table.loc["layers.1.self_attn", "macs"] == attention
    assert torch.backends.mha.get_fastpath_enabled()


def bert(implementation):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attn_implementation=implementation,
    )  # fmt: skip
    b, t, d = 3, 7, 16
    return transformers.BertModel(config), 2 * b * (4 * t * d * d + 2 * t * t * d + 2 * t * d * 32) + b * d * d


def llama(implementation):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, attn_implementation=implementation,
    )  # fmt: skip
    b, t, d = 3, 7, 16
    layer = t * d * (d + 8 + 8 + d) + 2 * t * t * d + 3 * t * d * 24
    return transformers.LlamaModel(config), 2 * b * layer


def tokens():
    ids = torch.arange(21).reshape(3, 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [bert, llama])
def test_language_models(make, implementation):
    model, expected = make(implementation)
    table = cost_by_module(model, tokens())
    angles = table["macs"].get("rotary_emb", 0)  # an outer product, in some versions written as a matrix product
    assert table.loc["", "macs"] - angles == expected


# Recurrent networks


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_networks(kind, gates, batch_first):
    model = kind(3, 5, 2, bidirectional=True, batch_first=batch_first)
    one_way = gates * 5 * (3 + 5) + gates * 5 * (10 + 5)
    assert model_cost(model, random(4, 6, 3)).macs == 4 * 6 * 2 * one_way


def test_lstm_with_projection_and_cell():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that oneDNN has none
        assert model_cost(nn.LSTM(3, 4, proj_size=2), random(4, 6, 3)).macs == 4 * 6 * (16 * (3 + 2) + 4 * 2)
    assert model_cost(nn.LSTMCell(3, 4), random(6, 3)).macs == 6 * 16 * (3 + 4)


def test_recurrent_kernel_of_cuda():
    def f(x):
        weights = [random(*s).to("meta") for s in ((16, 3), (16, 4), (16,), (16,), (16, 4), (16, 4), (16,), (16,))]
        h = torch.zeros(2, 6, 4, device="meta")
        return torch._cudnn_rnn(x.to("meta"), weights, 4, None, h, h, 2, 4, 0, 2, False, 0.0, False, False, [], None)

    assert macs(f, random(5, 6, 3)) == 5 * 6 * (16 * (3 + 4) + 16 * (4 + 4))


# What cannot be counted


def test_what_may_hold_products_is_named():
    with pytest.warns(UserWarning, match=r"macs leave out .* aten\.linalg_inv_ex\.default$"):
        assert macs(lambda x: torch.linalg.inv(x @ x.mT + 9 * torch.eye(3)), random(2, 3, 3)) == 2 * 27
    with pytest.warns(UserWarning, match=r"aten\._trilinear\.default"):
        model_cost(nn.Bilinear(3, 3, 2), {"input1": random(4, 3), "input2": random(4, 3)})


def test_operations_of_other_libraries_are_named_unless_they_have_a_formula():
    @torch.library.custom_op("repgraph_tests::gram", mutates_args=())
    def gram(x: torch.Tensor) -> torch.Tensor:
        return x @ x.mT

    with pytest.warns(UserWarning, match=r"repgraph_tests\.gram\.default"):
        assert macs(gram, random(3, 4)) == 0
    register_flop_formula(torch.ops.repgraph_tests.gram)(lambda x, **_: 2 * x[0] * x[0] * x[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert macs(gram, random(3, 4)) == 36


# Activation bytes


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: x.exp(), 4 * 24),
        (lambda x: x.double(), 8 * 24),
        (lambda x: x > 0, 24),
        (lambda x: x.T.flatten()[3:], 4 * 24),  # a copy, and a view of it
        (lambda x: x.view(-1).T[2:].unsqueeze(0).detach().expand(3, -1), 0),
        (lambda x: x.relu_().add_(1), 0),
        (lambda x: torch.add(x, 1, out=x), 0),
        (lambda x: x.chunk(2), 0),
        (lambda x: x.max(0), (4 + 8) * 6),
        (lambda x: [torch.empty(5, 2), x.new_zeros(3, dtype=torch.int8)], 40 + 3),
        (lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]), 4 * (24 + 4)),
    ],
)
def test_activation_bytes(f, expected):
    assert model_cost(Through(f), random(4, 6)).activation_bytes == expected


def test_half_the_bytes_in_half_the_precision():
    cost, half = (model_cost(Toy().to(dtype), images()) for dtype in (torch.float32, torch.bfloat16))
    assert (half.macs, 2 * half.activation_bytes) == (cost.macs, cost.activation_bytes)


# Parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids))) * self.scale[0]


def test_shared_parameters_count_once():
    model, ids = Tied(), torch.zeros(2, 6, dtype=torch.long)
    assert model_cost(model, ids).parameters == 40 + 20 + 10 + 3 == sum(p.numel() for p in model.parameters())
    table = cost_by_module(model, ids)
    assert table["parameters"].to_dict() == {"": 73, "embedding": 0, "inner": 20, "head": 10}
    assert table.loc["head", "macs"] == 2 * 6 * 4 * 10


# By module


def test_table():
    table = cost_by_module(Toy(), images(2))
    names = ["", "stem", "bn", "b1", *(f"b1.{n}" for n in ("conv1", "bn1", "conv2", "bn2", "short")), "b2"]
    names += [f"b2.{n}" for n in ("conv1", "bn1", "conv2", "bn2", "short", "short.0", "short.1")] + ["fc"]
    assert (list(table.index), list(table), table.index.name) == (names, COLUMNS, "module")
    assert (table.dtypes == "int64").all()
    assert (table["calls"] == 1).all()
    assert table.attrs == {"example": (2, 3, 16, 16), "dtype": "float32"}
    cost = model_cost(Toy(), images(2))
    assert tuple(table.loc["", COLUMNS[1:]]) == (cost.macs, cost.parameters, cost.activation_bytes)
    assert table.loc["b2.short"].tolist() == [1, 2 * 8 * 16 * 64, 128 + 32, 2 * 2 * 4 * 16 * 64]


@pytest.mark.parametrize("make", [Toy, lambda: torchvision.models.resnet18(weights=None)])
def test_a_parent_is_the_sum_of_what_is_inside_and_its_own(make):
    model = make()
    table = cost_by_module(model, images(1, 32))
    for name, module in model.named_modules():
        children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        if children:
            inside = table.loc[[child for child in children if child in table.index]].sum()
            assert (inside["macs"], inside["parameters"]) == (table.loc[name, "macs"], table.loc[name, "parameters"])
            assert inside["activation_bytes"] <= table.loc[name, "activation_bytes"]


def without(model, name):
    model = copy.deepcopy(model)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model


class Looped(nn.Module):
    """A module that runs three times, one under two names, one that never runs, a list, and parts called past it."""

    def __init__(self):
        super().__init__()
        self.loop, self.twin = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)
        self.same = nn.Sequential(self.twin, nn.Tanh())
        self.idle = nn.Linear(9, 9)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.bypassed = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        for _ in range(3):
            x = self.loop(x)
        x = self.same(self.twin(x))
        for layer in self.layers:
            x = layer(x)
        return x + (self.bypassed[0](x) if isinstance(self.bypassed, nn.Sequential) else 0)


def test_modules_that_run_several_times_or_never():
    table = cost_by_module(Looped(), random(5, 4))
    linear = 5 * 16
    expected = {
        "": (1, 7 * linear, 4 * 20 + 90), "loop": (3, 3 * linear, 20), "loop.0": (3, 3 * linear, 20),
        "loop.1": (3, 0, 0), "twin": (2, 2 * linear, 20), "same": (1, linear, 0), "same.1": (1, 0, 0),
        "idle": (0, 0, 90), "layers": (0, linear, 20), "layers.0": (1, linear, 20), "layers.1": (1, 0, 0),
        "bypassed": (0, linear, 20), "bypassed.0": (1, linear, 20),
    }  # fmt: skip
    assert {name: tuple(row) for name, row in table[COLUMNS[:3]].iterrows()} == expected


PREDICTED = {
    "toy": (Toy, images(2), ["b1", "b2.bn1", "b1.conv2", "bn", "b1.short"]),
    "tied": (Tied, torch.zeros(2, 6, dtype=torch.long), ["inner"]),
    "looped": (Looped, random(5, 4), ["loop", "loop.0", "same", "idle", "bypassed.0"]),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)),
        random(3, 4),
        ["0"],
    ),
    "spectral norm, by a hook": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)),
        random(3, 4),
        ["0"],
    ),
    "resnet18": (
        lambda: torchvision.models.resnet18(weights=None),
        images(1, 32),
        ["layer1.1", "layer3.1", "layer4.1.relu", "layer2.0.bn2"],
    ),
    "bert": (lambda: bert("sdpa")[0], tokens(), ["encoder.layer.0.intermediate.intermediate_act_fn", "pooler.dense"]),
}


@pytest.mark.parametrize("what", PREDICTED)
def test_a_row_predicts_what_dropping_the_module_saves(what):
    make, x, names = PREDICTED[what]
    model = make()
    table = cost_by_module(model, x)
    for name in names:
        left = model_cost(without(model, name), x)
        saved = table.loc[""] - table.loc[name]
        assert (left.macs, left.parameters, left.activation_bytes) == tuple(saved[COLUMNS[1:]]), name


@given(st.integers(1, 6))
def test_batches_scale(n):
    one, many = cost_by_module(Toy(), images(1)), cost_by_module(Toy(), images(n))
    assert (many[["macs", "activation_bytes"]] == n * one[["macs", "activation_bytes"]]).all(axis=None)
    assert (many[["calls", "parameters"]] == one[["calls", "parameters"]]).all(axis=None)


def test_scripted_parts_count_where_they_are_held():
    model = nn.Sequential(nn.Sequential(torch.jit.script(nn.Linear(4, 4))), nn.Linear(4, 2))
    table = cost_by_module(model, random(3, 4))
    assert table["macs"].to_dict() == {"": 3 * 24, "0": 3 * 16, "1": 3 * 8}
    assert table["parameters"].to_dict() == {"": 30, "0": 20, "1": 10}


# Forms of models and examples


def test_forms_of_an_example():
    x, labels, expected = images(3), torch.arange(3), model_cost(Toy(), images(3))
    for example in ((x, labels), [(x, labels), (x, labels)], x.numpy(), x.double(), {"x": x, "labels": labels}):
        assert model_cost(Toy(), example) == expected
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat((x, x)), labels.repeat(2)), 3)
    assert model_cost(Toy(), loader) == expected


def test_wrapped_models_are_read_inside():
    expected = cost_by_module(Toy(), images())
    for model in (nn.DataParallel(Toy()), torch.compile(Toy(), backend="eager")):
        assert cost_by_module(model, images()).equals(expected)


def test_parts_that_are_compiled_are_counted():
    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 2))
    model(random(3, 4))
    assert model_cost(model, random(3, 4)).macs == 3 * 24


NETWORKS = {
    "toy": (Toy, lambda: (images(2), torch.arange(2))),
    "attention": (lambda: SelfAttention(False), lambda: random(2, 5, 12)),
    "encoder": (lambda: nn.TransformerEncoderLayer(12, 3, 20), lambda: random(2, 5, 12)),
    "looped": (Looped, lambda: random(5, 4)),
    "tied": (Tied, lambda: torch.zeros(2, 6, dtype=torch.long)),
    "lstm": (lambda: nn.LSTM(3, 4, 2, bidirectional=True), lambda: random(5, 2, 3)),
    "bert": (lambda: bert("sdpa")[0], tokens),
    "llama": (lambda: llama("sdpa")[0], tokens),
    "llama, eager": (lambda: llama("eager")[0], tokens),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_without_data_the_counts_are_the_same(what):
    make, data = NETWORKS[what]
    own_ways = what.startswith(("bert", "llama"))  # they build their masks in another way without data
    columns = COLUMNS[:3] if own_ways else COLUMNS
    real = cost_by_module(make(), data())[columns]

    def state(model):
        return {name: (id(t), t.device) for name, t in model.state_dict(keep_vars=True).items()}, model.training

    def same(model, example):
        before = state(model)
        assert cost_by_module(model, example)[columns].equals(real)
        assert state(model) == before

    meta = tree_map(lambda t: t.to("meta"), data())
    with torch.device("meta"):
        model = make()
    same(model, meta)
    same(model, data())
    same(make(), meta)
    for device in ("cpu", "cuda") if what != "lstm" else ("cpu",):  # which asks the driver
        with FakeTensorMode(), torch.device(device):
            model, x = make(), data()
            same(model, x)
        same(model, x)


# No trace


class Unsteady(nn.Module):
    """Everything that could be left changed; fails on inputs above 90."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.bn.training = False

    def forward(self, x):
        self.calls += 1
        self.new = torch.rand(1)
        if (x > 90).any():
            raise ZeroDivisionError("in forward")
        return self.drop(self.bn(self.fc(x.abs_())))


def snapshot(model):
    hooks = [name for name in vars(nn.Module()) if "hook" in name]
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": [list(getattr(m, kind)) for m in model.modules() for kind in hooks if getattr(m, kind) is not None],
        "tensors": [(id(t), t.tolist()) for t in (*model.parameters(), *model.buffers())],
        "random": torch.get_rng_state().tolist(),
        "fused": torch.backends.mha.get_fastpath_enabled(),
        "grad": (torch.is_grad_enabled(), [p.requires_grad for p in model.parameters()]),
        "threads": torch.get_num_threads(),
        "modules": torch.utils._python_dispatch._len_torch_dispatch_stack(),
    }


JOBS = {
    "model_cost": model_cost,
    "cost_by_module": cost_by_module,
    "latency": lambda model, x: latency(model, x, seconds=0.001),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("job", JOBS)
def test_nothing_is_left_behind(job, fused):
    model, x = Unsteady(), random(3, 4)
    model.fc.register_forward_hook(lambda *_: None)
    before_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        before, given_x = snapshot(model), x.clone()
        JOBS[job](model, x)
        assert snapshot(model) == before
        assert torch.equal(x, given_x)
        with pytest.raises(ZeroDivisionError):
            JOBS[job](model, x + 100)
        assert snapshot(model) == before
    finally:
        torch.backends.mha.set_fastpath_enabled(before_fused)


def test_the_error_of_a_model_tells_the_shape():
    with pytest.raises(RuntimeError) as caught:
        model_cost(Toy(), torch.zeros(2, 5, 8, 8))
    assert caught.value.__notes__ == ["repgraph: example of shape (2, 5, 8, 8)"]


# Refusals


@pytest.mark.parametrize("job", JOBS)
def test_refusals(job):
    run = JOBS[job]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        run(lambda x: x, images())
    for example in ("text", 3, {"x": "text"}, [], ()):
        with pytest.raises(TypeError, match=r"example must be one batch: a tensor, .* got \w+"):
            run(Toy(), example)
    with pytest.raises(ValueError, match="scripted"):
        run(torch.jit.script(nn.Linear(3, 2)), random(1, 3))
    for lazy, name in ((nn.LazyLinear(3), "0.weight"), (nn.LazyBatchNorm1d(affine=False), "0.running_mean")):
        with pytest.raises(ValueError, match=f"no lazy parameters, got '{name}' without a shape"):
            run(nn.Sequential(lazy), random(2, 3))


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_no_time(seconds):
    with pytest.raises(ValueError, match=f"seconds must be a positive number, got {seconds}"):
        latency(Toy(), images(), seconds=seconds)


def test_no_latency_without_data():
    with pytest.raises(ValueError, match="must hold data"):
        latency(Toy().to("meta"), images(), seconds=0.01)


# Results


def test_cost_prints_itself():
    cost = Cost(macs=579_664, parameters=5_181, activation_bytes=2_500_000)
    assert repr(cost) == "Cost(579,664 MACs, 5,181 parameters, 2.5 MB activations)"
    assert all(f"<td>{value}</td>" in cost._repr_html_() for value in ("579,664", "5,181", "2.5 MB"))
    assert cost == copy.deepcopy(cost)
    with pytest.raises(AttributeError):
        cost.macs = 1


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["eager", "compiled"])
def test_latency(wrap):
    found = latency(wrap(Toy()), (images(), torch.zeros(1)), seconds=0.02)
    assert 0 < found.lower <= found.median <= found.upper < 60
    assert found.runs >= 3
    assert (found.threads, found.device) == (torch.get_num_threads(), "cpu")


def test_latency_prints_itself():
    found = Latency(median=0.00123456, lower=0.0012, upper=0.0013, runs=1812, threads=1, device="cpu")
    assert repr(found) == "Latency(1.235 ms, quartiles 1.2 to 1.3 ms, 1,812 runs, cpu, 1 thread)"
    assert "4 threads" in repr(Latency(median=1, lower=1, upper=1, runs=1, threads=4, device="cuda:0"))
