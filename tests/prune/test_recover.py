"""Batch norm anew and the repair of the cut, against statistics and least squares by hand."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from small_networks import Through
from torch import nn

from repgraph.cost import model_cost
from repgraph.demo import digits
from repgraph.demo.network import DigitsResNet
from repgraph.prune import Plan, drop_layers, load_pruned, reestimate_batch_norm_, repair
from repgraph.prune.pruned import new_name
from repgraph.surgery.stand_ins import Affine, Skip

pytestmark = pytest.mark.usefixtures("one_thread")

X = digits("train")[0][:64]


def network(blocks=(2, 3, 3)):
    torch.manual_seed(0)
    return DigitsResNet(blocks).eval()


def mend(model, pruned, data, **options):
    return repair(model, pruned, data, **{"progress": False, "ridge": 0.0} | options)


def out(model, x):
    with torch.no_grad():
        return model(x)


def maps(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Affine)}


def entering_and_leaving(model, name, x):
    kept = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.update(x=args[0].clone())),
        model.get_submodule(name).register_forward_hook(lambda _, __, y: kept.update(y=y.clone())),
    ]
    out(model, x)
    for handle in handles:
        handle.remove()
    return kept["x"], kept["y"]


# Repair: blocks that are affine


class Add(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x + self.f(x)


class Flow(nn.Module):
    """A stem, blocks, and a tail, which other classes put together otherwise."""

    def __init__(self, stem, blocks, tail):
        super().__init__()
        self.stem, self.blocks, self.tail = stem, nn.ModuleList(blocks), tail

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.tail(x)


def convs(*kinds, tail=None, c=5):
    """On images of 2 channels: "linear" blocks are affine in their channels, "deep" ones are not."""
    torch.manual_seed(0)
    made = {
        "linear": lambda: Add(nn.Conv2d(c, c, 1)),
        "deep": lambda: Add(nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 1))),
    }
    tail = tail or nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(c * 16, 3))
    return Flow(nn.Conv2d(2, c, 3, padding=1), [made[kind]() for kind in kinds], tail).eval()


def tokens_net(*kinds, c=5):
    torch.manual_seed(0)
    made = {
        "linear": lambda: Add(nn.Linear(c, c)),
        "deep": lambda: Add(nn.Sequential(nn.Linear(c, 9), nn.GELU(), nn.Linear(9, c))),
    }
    return Flow(nn.Linear(2, c), [made[k]() for k in kinds], nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 3))).eval()


IMAGES = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(40, 6, 2, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
AFFINE = [(convs, IMAGES), (tokens_net, TOKENS), (tokens_net, ROWS)]


@pytest.mark.parametrize(("make", "data"), AFFINE, ids=["images", "tokens", "rows"])
@pytest.mark.parametrize(
    ("names", "ridge"),
    [
        (["blocks.1"], 0.0),
        (["blocks.1", "blocks.2"], 0.0),
        (["blocks.1", "blocks.4"], 0.0),
        (["blocks.1", "blocks.4"], 1e-10),
    ],
)
def test_an_affine_block_is_given_back(make, data, names, ridge):
    model = make("deep", "linear", "linear", "deep", "linear")
    pruned = drop_layers(model, names, data[:1])
    found = mend(model, pruned, data, ridge=ridge)
    fresh = 2 * torch.randn_like(data)
    assert (out(pruned.model, fresh) - out(model, fresh)).abs().max() > 0.05
    torch.testing.assert_close(out(found.model, fresh), out(model, fresh), atol=1e-4, rtol=1e-4)
    runs = 1 if names != ["blocks.1", "blocks.4"] else 2
    absorbed = found.plan.settings["repair"]["absorbed"]
    assert len(maps(found.model)) + len(absorbed) == runs  # layers in a row get one map
    assert list(found.plan.repairs) == [name for name in names if name not in absorbed][-runs:]


def test_a_branch_adds_the_map_of_its_own_input():
    class Block(nn.Module):
        def __init__(self, branch):
            super().__init__()
            self.norm, self.part, self.mlp = nn.LayerNorm(5), branch, nn.Sequential(nn.Linear(5, 5), nn.Tanh())

        def forward(self, x):
            x = x + 0.5 * self.part(self.norm(x))
            return x + self.mlp(x)

    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 5)) for _ in range(3)]
    model = Flow(nn.Linear(2, 5), [Block(branch) for branch in branches], nn.Linear(5, 3)).eval()
    pruned = drop_layers(model, ["blocks.0.part", "blocks.2.part"], TOKENS[:1])
    found = mend(model, pruned, TOKENS, absorb=False)
    torch.testing.assert_close(out(found.model, 2 * TOKENS), out(model, 2 * TOKENS), atol=1e-4, rtol=1e-4)


# Repair: least squares by hand


def fitted_by_hand(x, y, ridge, bias=True):
    """W, b for y - x on rows, by scikit-learn or least squares in float64."""
    x, y = (z.reshape(-1, z.shape[-1]).double().numpy() for z in (x, y))
    if ridge:
        alpha = ridge * (x**2).sum() / x.shape[1]
        fit = Ridge(alpha=alpha, fit_intercept=bias, solver="cholesky").fit(x, y - x)
        return fit.coef_, fit.intercept_ if bias else np.zeros(x.shape[1])
    columns = np.hstack([x, np.full((len(x), 1), float(bias))])
    both = np.linalg.lstsq(columns, y - x, rcond=None)[0]
    return both[:-1].T, both[-1]


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize(("make", "data"), AFFINE, ids=["images", "tokens", "rows"])
def test_map_is_that_of_least_squares(make, data, ridge):
    model = make("deep", "deep", "deep").double()
    data = data.double()
    pruned = drop_layers(model, ["blocks.1"], data[:1])
    gap = mend(model, pruned, data, ridge=ridge, absorb=False).model.blocks[1]
    x, y = entering_and_leaving(model, "blocks.1", data)
    w, b = fitted_by_hand(*(z.movedim(gap.axis, -1) for z in (x, y)), ridge)
    np.testing.assert_allclose(gap.weight.detach(), w, atol=1e-8)
    np.testing.assert_allclose(gap.bias.detach(), b, atol=1e-8)


def test_a_huge_penalty_leaves_a_shift():
    model = convs("deep", "deep", "deep")
    pruned = drop_layers(model, ["blocks.1"], IMAGES[:1])
    x, y = entering_and_leaving(model, "blocks.1", IMAGES)
    gap = mend(model, pruned, IMAGES, ridge=1e12, absorb=False).model.blocks[1]
    torch.testing.assert_close(gap.weight.detach(), torch.zeros(5, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(gap.bias.detach(), (y - x).mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="ridge must be a finite number of at least 0, got inf"):
        mend(model, pruned, IMAGES, ridge=math.inf)


@pytest.mark.parametrize("ridge", [0.0, 10.0])
def test_the_error_on_the_fitting_data_never_grows(ridge):
    model = network()
    reestimate_batch_norm_(model, X, progress=False)
    pruned = drop_layers(model, ["layer2.1", "layer2.2", "layer3.1"], X[:1])
    found = mend(model, pruned, X, ridge=ridge, absorb=False).model
    _, y = entering_and_leaving(model, "layer2.2", X)
    x, mapped = entering_and_leaving(found, "layer2.1", X)
    assert isinstance(found.layer2[1], Affine)
    assert (mapped - y).square().sum() <= (x - y).square().sum()
    _, y = entering_and_leaving(model, "layer3.1", X)
    x, mapped = entering_and_leaving(found, "layer3.1", X)  # behind the first cut, which is closed
    assert (mapped - y).square().sum() <= (x - y).square().sum()
    w, b = fitted_by_hand(x.movedim(1, -1), y.movedim(1, -1), ridge)
    np.testing.assert_allclose(found.layer3[1].weight.detach(), w, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.layer3[1].bias.detach(), b, rtol=1e-3, atol=1e-3)


def test_dead_channels_at_ridge_0():
    model = convs("deep", "deep", "deep")
    with torch.no_grad():
        for parameter in (model.stem.weight, model.stem.bias, model.blocks[0].f[2].weight, model.blocks[0].f[2].bias):
            parameter[2:4] = 0
    found = mend(model, drop_layers(model, ["blocks.1"], IMAGES[:1]), IMAGES, absorb=False)
    gap = found.model.blocks[1]
    assert gap.weight.abs().max() < 10
    torch.testing.assert_close(gap.weight[:, 2:4].detach(), torch.zeros(5, 2), atol=1e-6, rtol=0)


# Repair: absorbed into the next layer


def readers():
    """Tail of a network of 5 channels -> whether it can take the map in, and whether with b."""

    def conv(**options):
        return nn.Conv2d(5, options.pop("out", 6), options.pop("size", 3), **options)

    return {
        "valid": (conv(), True, True),
        "same": (conv(padding="same"), True, False),
        "zeros": (conv(padding=1), True, False),
        "reflect": (conv(padding=1, padding_mode="reflect"), True, True),
        "circular": (conv(padding=1, padding_mode="circular"), True, True),
        "no bias": (conv(bias=False), True, False),
        "strided": (conv(stride=2), True, True),
        "dilated": (conv(dilation=2, size=2), True, True),
        "pooled": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)), True, True),
        "mean": (nn.Sequential(Through(lambda x: x.mean((2, 3))), nn.Linear(5, 3)), True, True),
        "last": (nn.Sequential(Through(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(5, 3)), True, True),
        "grouped": (nn.Conv2d(5, 5, 3, groups=5), False, True),
        "flattened": (nn.Sequential(nn.Flatten(), nn.Linear(80, 3)), False, True),
        "max": (nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(5, 3)), False, True),
        "relu": (nn.Sequential(nn.ReLU(), conv()), False, True),
        "norm": (nn.Sequential(nn.BatchNorm2d(5), conv()), False, True),
        "transposed": (nn.ConvTranspose2d(5, 5, 2), False, True),
        "normed weight": (nn.utils.parametrizations.weight_norm(conv()), False, True),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(readers()))
def test_absorbed_where_the_result_goes_into_one_layer_alone(kind):
    torch.manual_seed(3)
    tail, can, with_bias = readers()[kind]
    model = convs("deep", "deep", tail=tail)
    pruned = drop_layers(model, ["blocks.1"], IMAGES[:1])
    found, beside = (mend(model, pruned, IMAGES, ridge=1e-3, absorb=absorb) for absorb in (True, False))
    assert set(maps(beside.model)) == {"blocks.1"}
    assert beside.plan.settings["repair"] == {"samples": 40, "ridge": 1e-3, "absorbed": {}}
    absorbed = found.plan.settings["repair"]["absorbed"]
    assert bool(absorbed) == can
    assert bool(maps(found.model)) == (not can)
    if not can:
        torch.testing.assert_close(out(found.model, IMAGES), out(beside.model, IMAGES))
        return
    assert not any(isinstance(module, Skip) for module in found.model.modules())
    assert (found.after.macs, found.after.parameters) == (
        model_cost(pruned.model, IMAGES[:2]).macs,
        pruned.after.parameters,
    )
    assert found.plan.repairs == {}
    if not with_bias:  # the same function as the map that was fitted without b, put in by hand
        x, y = entering_and_leaving(model, "blocks.1", IMAGES)
        w, _ = fitted_by_hand(x.movedim(1, -1), y.movedim(1, -1), 1e-3, bias=False)
        with torch.no_grad():
            beside.model.blocks[1].weight.copy_(torch.as_tensor(w))
            beside.model.blocks[1].bias.zero_()
    fresh = torch.randn_like(IMAGES)
    torch.testing.assert_close(out(found.model, fresh), out(beside.model, fresh), atol=1e-5, rtol=1e-4)
    (reader,) = absorbed.values()
    assert isinstance(found.model.get_submodule(reader), nn.Conv2d | nn.Linear)


def test_the_layer_that_took_the_map_in_is_named_as_in_the_whole_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 5, 3, padding=1), Add(nn.Conv2d(5, 5, 1)), Add(nn.Conv2d(5, 5, 1)), nn.Conv2d(5, 4, 3)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    found = mend(model, drop_layers(model, ["2"], IMAGES[:1]), IMAGES)
    (reader,) = found.plan.settings["repair"]["absorbed"].values()
    changed = {n for n, m in found.model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)} - {
        "0"
    }
    assert {new_name(reader, found.plan.renamed)} == changed
    assert reader == "3"
    torch.testing.assert_close(out(found.model, IMAGES), out(model, IMAGES), atol=1e-4, rtol=1e-4)


class Two(nn.Module):
    """Two readers, or one that also sees something else, or a result that is given away beside it."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)

    def forward(self, x):
        if self.kind == "two convs":
            return self.a(x) + self.b(x)
        if self.kind == "a function":
            return self.a(x) + x.sin()
        if self.kind == "twice":
            return self.a(self.a(x))
        if self.kind == "also returned":
            return self.a(x), x
        if self.kind == "mean also returned":
            x = x.mean((2, 3), keepdim=True)
            return {"scores": self.a(x), "features": x}
        if self.kind == "relu in place":
            return self.a(x) + x.relu_()
        return self.a(x.roll(1, 1))  # "rolled": channels in another order


def tensors(result):
    return (
        list(result.values()) if isinstance(result, dict) else list(result) if isinstance(result, tuple) else [result]
    )


@pytest.mark.parametrize(
    "kind",
    ["two convs", "a function", "twice", "also returned", "mean also returned", "relu in place", "rolled"],
)
def test_not_absorbed_where_something_else_sees_the_result(kind):
    model = convs("deep", "linear", tail=Two(kind))
    found = mend(model, drop_layers(model, ["blocks.1"], IMAGES[:1]), IMAGES)
    for ours, whole in zip(tensors(out(found.model, IMAGES)), tensors(out(model, IMAGES)), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-4)
    assert set(maps(found.model)) == {"blocks.1"}


def test_a_small_map_is_not_absorbed_along_the_wrong_axis():
    """As many positions as channels, mixed over positions: a small map changes the result too little to be noticed."""
    torch.manual_seed(0)
    small = nn.Conv1d(6, 6, 1)
    with torch.no_grad():
        small.weight.mul_(1e-4)
        small.bias.mul_(1e-4)
    model = Flow(nn.Conv1d(2, 6, 1), [Add(nn.Conv1d(6, 6, 1)), Add(small)], nn.Linear(6, 3)).eval()
    x = torch.randn(40, 2, 6)
    found = mend(model, drop_layers(model, ["blocks.1"], x[:1]), x, channel_axis=1)
    assert found.plan.settings["repair"]["absorbed"] == {}
    torch.testing.assert_close(out(found.model, x), out(model, x), atol=1e-6, rtol=1e-6)


# Repair: on networks of other kinds


def test_chains_of_conv_norm_and_relu():
    torch.manual_seed(0)

    def unit(a, b):
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]

    model = nn.Sequential(
        *unit(2, 6), *unit(6, 6), *unit(6, 6), *unit(6, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    )
    model = reestimate_batch_norm_(model, IMAGES, progress=False).eval()
    pruned = drop_layers(model, ["3", "6"], IMAGES[:1])
    assert pruned.plan.layers == ("3", "4", "5", "6", "7", "8")
    found = mend(model, pruned, IMAGES, absorb=False)
    assert found.plan.repairs == {"8": 1}
    _, y = entering_and_leaving(model, "8", IMAGES)
    (name,) = maps(found.model)
    x, mapped = entering_and_leaving(found.model, name, IMAGES)
    w, b = fitted_by_hand(x.movedim(1, -1), y.movedim(1, -1), 0)
    expected = (
        x + torch.einsum("ij,njhw->nihw", torch.as_tensor(w).float(), x) + torch.as_tensor(b).float()[:, None, None]
    )
    torch.testing.assert_close(mapped, expected, atol=1e-4, rtol=1e-4)
    absorbed = mend(model, pruned, IMAGES)
    assert absorbed.plan.settings["repair"]["absorbed"].keys() == {"8"}
    assert len(absorbed.model) == len(pruned.model)


def test_chain_of_one_dimensional_convs_is_mapped_over_its_channels():
    torch.manual_seed(0)
    units = [layer for c in (2, 6, 6) for layer in (nn.Conv1d(c, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU())]
    model, x = (
        nn.Sequential(*units, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3)).eval(),
        torch.randn(30, 2, 9),
    )
    found = mend(model, drop_layers(model, ["3"], x[:1]), x, absorb=False)
    assert found.plan.repairs == {"5": 1}


def test_runs_and_halves_of_a_llama_and_its_cache(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = {"input_ids": torch.randint(1, 50, (24, 9))}
    for names, places in (
        (["model.layers.1", "model.layers.2"], ["model.layers.2"]),
        (["model.layers.1.self_attn", "model.layers.2.mlp"], None),
    ):
        pruned = drop_layers(model, names, ids)
        found = repair(model, pruned, ids, progress=False)
        assert list(found.plan.repairs) == (places or names)
        text = {
            cached: found.model.generate(ids["input_ids"][:2], max_new_tokens=5, do_sample=False, use_cache=cached)
            for cached in (True, False)
        }
        assert text[True].shape == (2, 14)
        assert torch.equal(text[True], text[False])
        found.save(tmp_path)
        again = load_pruned(model, tmp_path, ids)
        with torch.no_grad():
            before, after, whole, cut = (
                net(**ids, use_cache=False).logits for net in (found.model, again.model, model, pruned.model)
            )
        assert torch.equal(before, after)
        assert (before - whole).square().mean() < (cut - whole).square().mean()


def test_half_of_a_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    model, ids = transformers.BertModel(config).eval(), {"input_ids": torch.randint(0, 50, (24, 9))}
    pruned = drop_layers(model, ["encoder.layer.1.output"], ids)
    found = mend(model, pruned, ids, absorb=False, ridge=1e-3)
    assert found.plan.repairs == {"encoder.layer.1.output": 2}
    kept = []
    attention = model.encoder.layer[1].attention.register_forward_hook(lambda _, __, y: kept.append(y[0]))
    output = model.encoder.layer[1].output.register_forward_hook(lambda _, __, y: kept.append(y))
    with torch.no_grad():
        model(**ids)
    attention.remove()
    output.remove()
    w, b = fitted_by_hand(*kept, 1e-3)
    gap = found.model.encoder.layer[1].output
    np.testing.assert_allclose(gap.weight.detach(), w, atol=1e-3)
    np.testing.assert_allclose(gap.bias.detach(), b, atol=1e-3)


def test_swin_has_its_channels_last():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([2, 2], 16, [2, 2], [2, 2], [2, 2], num_classes=4).eval()
    x = torch.randn(10, 3, 16, 16)
    pruned = drop_layers(model, ["features.3.1"], x[:1])
    found = mend(model, pruned, x, channel_axis=-1, ridge=1e-3)
    assert found.plan.repairs == {"features.3.1": 3}
    before, after = entering_and_leaving(model, "features.3.1", x)
    w, _ = fitted_by_hand(before, after, 1e-3)
    (gap,) = maps(found.model).values()
    np.testing.assert_allclose(gap.weight.detach(), w, atol=1e-4)


# Repair: what comes back


def test_saved_loaded_and_replayed(tmp_path):
    model = network()
    found = repair(model, drop_layers(model, ["layer2.1", "layer3.1", "layer3.2"], X[:1]), X, progress=False)
    found.save(tmp_path)
    torch.manual_seed(5)
    again = load_pruned(DigitsResNet((2, 3, 3)).eval(), tmp_path, X[:1])
    assert again.plan == found.plan == Plan.from_json(found.plan.to_json())
    assert torch.equal(out(again.model, X), out(found.model, X))
    assert "repair" in repr(found.plan)
    empty = drop_layers(model, found.plan, X[:1])  # the plan alone: maps that do nothing yet
    assert list(maps(empty.model)) == list(maps(found.model))
    dropped = drop_layers(model, found.plan.layers, X[:1])
    assert torch.equal(out(empty.model, X), out(dropped.model, X))


def test_costs_are_measured_and_models_untouched():
    model = network()
    pruned = drop_layers(model, ["layer2.1", "layer3.1", "layer3.2"], X[:2])
    states = [{k: v.clone() for k, v in net.state_dict().items()} for net in (model, pruned.model)]
    plan = pruned.plan
    found = mend(model.train(), pruned, X)
    assert found.after == model_cost(found.model, X[:2])
    assert found.before == pruned.before
    # 16 channels at 4 x 4 and 32 at 2 x 2 positions, two samples
    assert found.after.parameters - pruned.after.parameters == 16 * 17 + (0 if len(maps(found.model)) == 1 else 32 * 33)
    assert found.after.macs - pruned.after.macs == 2 * sum(
        m.weight.numel() * (16 if len(m.bias) == 16 else 4) for m in maps(found.model).values()
    )
    assert model.training
    assert pruned.plan == plan
    for net, state in zip((model, pruned.model), states, strict=True):
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_fine_tuned_weights_stay():
    model = network()
    pruned = drop_layers(model, ["layer2.1", "layer3.1"], X[:1])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in pruned.model.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
    tuned = deepcopy(pruned.model)
    found = mend(model, pruned, X, absorb=False)
    assert set(maps(found.model)) == {"layer2.1", "layer3.1"}
    with torch.no_grad():
        for gap in maps(found.model).values():
            gap.weight.zero_()
            gap.bias.zero_()
    assert torch.equal(out(found.model, X), out(tuned, X))
    assert not torch.equal(out(found.model, X), out(drop_layers(model, pruned.plan.layers, X[:1]).model, X))


@pytest.mark.parametrize("absorb", [True, False])
def test_repairing_twice_changes_nothing(absorb):
    model = convs("deep", "linear", "deep", "linear", tail=nn.Conv2d(5, 4, 3))
    once = mend(model, drop_layers(model, ["blocks.1", "blocks.3"], IMAGES[:1]), IMAGES, absorb=absorb)
    twice = mend(model, once, IMAGES, absorb=absorb)
    torch.testing.assert_close(out(once.model, IMAGES), out(model, IMAGES), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out(twice.model, IMAGES), out(once.model, IMAGES), atol=1e-4, rtol=1e-4)
    assert list(twice.plan.repairs) == list(once.plan.repairs)


def test_data_in_every_form():
    model = network((1, 2, 1))
    pruned = drop_layers(model, ["layer2.1"], X[:1])
    expected = mend(model, pruned, X[:50], absorb=False).model.layer2[1].weight
    labels = torch.zeros(64)
    for data in ((X, labels), list(zip(X.split(20), labels.split(20), strict=True)), iter(X.split(20))):
        found = mend(nn.DataParallel(model), pruned, data, samples=50, absorb=False, batch_size=20)
        torch.testing.assert_close(found.model.layer2[1].weight, expected, atol=1e-4, rtol=1e-3)
        assert found.plan.settings["repair"]["samples"] == 50
