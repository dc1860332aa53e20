"""Costs against hand counts, other counters and what is left after a module is taken out; no trace in the model."""

import warnings

import pytest
import torch
import torch_pruning as tp
from cost_networks import (
    SelfAttention,
    Tied,
    Toy,
    bert,
    counted_by_torch,
    images,
    llama,
    macs,
    random,
    tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from small_networks import Through
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from benchmarks import shared_data
from repgraph.cost import cost_by_module, model_cost

pytestmark = pytest.mark.usefixtures("one_thread")

torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

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


def test_shared_parameters_count_once():
    model, ids = Tied(), torch.zeros(2, 6, dtype=torch.long)
    assert model_cost(model, ids).parameters == 40 + 20 + 10 + 3 == sum(p.numel() for p in model.parameters())
    table = cost_by_module(model, ids)
    assert table["parameters"].to_dict() == {"": 73, "embedding": 0, "inner": 20, "head": 10}
    assert table.loc["head", "macs"] == 2 * 6 * 4 * 10
