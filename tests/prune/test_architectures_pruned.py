"""Layers dropped from networks of many kinds against the identity by hand; no trace; configs; generate."""

import hashlib
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
from architectures import (
    ARCHITECTURES,
    LLAMA,
    CifarResNet,
    bert,
    by_hand,
    examine,
    gpt2,
    ids,
    image,
    llama,
    pairs,
    result,
    t5,
    tokens,
    vision,
)
from torch import nn

from repgraph.demo import digits, digits_resnet
from repgraph.prune import drop_layers, droppable_layers, predict_cost
from repgraph.prune.pruned import new_name

DIGITS = digits()[0][:2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_dropped_equals_the_identity_by_hand(name):
    row = examine(name)
    assert row.largest == dict.fromkeys(row.largest, pytest.approx(0, abs=1e-6))
    assert bool(row.largest) == bool(row.droppable)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_predicted_cost_is_the_measured_one(name):
    row = examine(name)
    assert [cut for cut, equal in row.predicted.items() if not equal] == []


COUNTS = {  # droppable blocks, halves
    "demo network": (5 + 4 + 3, 0),
    "ResNet-56, zero-padded shortcuts": (9 + 8 + 8, 0),
    "resnet50": (2 + 3 + 5 + 2, 0),
    "resnet152": (2 + 7 + 35 + 2, 0),
    "vgg19_bn": (1 + 1 + 3 + 3 + 4, 0),
    "densenet121": (0, 0),
    "mobilenet_v2": (1 + 2 + 3 + 2 + 2, 0),
    "convnext_tiny": (3 + 3 + 9 + 3, 0),
    "vit_b_16": (12, 24),
    "swin_t": (2 + 2 + 6 + 2, 24),
    "BERT": (4, 8),
    "GPT-2": (4, 8),
    "Llama": (4, 8),
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_what_can_go(name):
    """Counted from the architectures' papers: blocks that keep shape, two halves for each block of a transformer."""
    row = examine(name)
    assert (len(row.droppable), len(row.halves)) == COUNTS[name]


@pytest.mark.parametrize("name", ["Bart", "OPT"])
def test_a_half_is_found_also_where_the_other_is_no_module(name):
    """The MLP of Bart and OPT is two linear layers of the block."""
    make, example, start = {
        "Bart": (bart, pairs, "model.encoder.layers.0."),
        "OPT": (opt, tokens, "model.decoder.layers.0."),
    }[name]
    assert any(half.startswith(start) for half in droppable_layers(make(), example(), "halves"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_refusals_say_what_comes_in_and_goes_out_and_what_to_do_instead(name):
    refusal = examine(name).refusal
    if not ARCHITECTURES[name].refused:
        assert refusal == "names hold all 4 blocks of the model: keep at least one"
    elif name == "T5":
        assert "the rest of the model uses more of what it gives than its first tensor" in refusal
        assert refusal.endswith("can become the identity; beside it 'encoder.block.1', 'encoder.block.2' can go")
    else:
        assert refusal.startswith(f"{ARCHITECTURES[name].refused[0]!r} cannot be left out, because it turns (")
        assert " can go" in refusal or refusal.endswith("make it thinner by pruning filters")


# the cut of the note


@pytest.fixture(scope="module")
def resnet56():
    torch.manual_seed(0)
    return CifarResNet((9, 9, 9)).eval()


def test_cut_of_the_published_pair(resnet56):
    """Note 01: [2, 3, 6] of [9, 9, 9] blocks, -42.9% parameters and -60.2% MACs.

    By hand, without batch norm and linear layer: a block of c channels has 18 c^2 weights (the first of a stage 13.5)
    and the same MACs at 32, 16, 8 pixels a side, as c^2 side^2 is constant.
    """
    names = [f"layer{stage}.{i}" for stage, gone in ((1, (3, 8)), (2, (2, 5)), (3, (1, 4, 7))) for i in gone]
    names += [f"layer1.{i}" for i in (0, 2, 4, 6, 7)] + [f"layer2.{i}" for i in (1, 4, 6, 8)]
    pruned = drop_layers(resnet56, names, image())

    small = CifarResNet((2, 3, 6)).eval()
    kept = {1: (1, 5), 2: (0, 3, 7), 3: (0, 2, 3, 5, 6, 8)}
    weights = {name: value for name, value in resnet56.state_dict().items() if not name.startswith("layer")}
    for stage, numbers in kept.items():
        for new, old in enumerate(numbers):
            block = getattr(resnet56, f"layer{stage}")[old]
            weights |= {f"layer{stage}.{new}.{name}": value for name, value in block.state_dict().items()}
    small.load_state_dict(weights, strict=True)
    assert list(pruned.model.state_dict()) == list(small.state_dict())
    assert torch.equal(pruned.model(image()), small(image()))

    change = pruned.table()["change_percent"]
    assert change["parameters"] == pytest.approx(-42.9, abs=0.05)
    assert change["macs"] == pytest.approx(-60.2, abs=0.05)
    assert change["flops"] == change["macs"]
    macs = [(3 * 9 * 16 + sum(18 * 16**2 * n for n in counts) - 2 * 4.5 * 16**2) * 1024 + 640
            for counts in ((9, 9, 9), (2, 3, 6))]  # fmt: skip
    assert [pruned.before.macs, pruned.after.macs] == macs
    conv = [3 * 9 * 16 + sum(18 * (16 * 2**i) ** 2 * n for i, n in enumerate(counts)) - 4.5 * (32**2 + 64**2) + 650
            for counts in ((9, 9, 9), (2, 3, 6))]  # fmt: skip
    norms = [2 * 16 + sum(4 * 16 * 2**i * n for i, n in enumerate(counts)) for counts in ((9, 9, 9), (2, 3, 6))]
    assert [pruned.before.parameters, pruned.after.parameters] == [a + b for a, b in zip(conv, norms, strict=True)]


# names


def test_every_kept_weight_has_its_new_name(resnet56):
    names = ["layer1.0", "layer1.4", "layer1.5", "layer2.8", "layer3.1"]
    pruned = drop_layers(resnet56, names, image(16))
    whole, small = resnet56.state_dict(), pruned.model.state_dict()
    kept = {old for old in whole if not any(old.startswith(f"{name}.") for name in names)}
    assert {new_name(old, pruned.plan.renamed) for old in kept} == set(small)
    assert all(torch.equal(whole[old], small[new_name(old, pruned.plan.renamed)]) for old in kept)


@pytest.mark.parametrize(
    ("names", "moved"),
    [
        (["features.5.0", "features.1.1"], {f"features.5.{i}": f"features.5.{i - 1}" for i in range(1, 9)}),
        (["features.3", "features.5.0"], None),
        (["features.1", "features.5.8", "features.7.0"], None),
    ],
)
def test_lists_inside_lists(convnext, names, moved):
    """A stage of features goes whole, together with blocks of stages whose own name changes with it."""
    whole = dict(convnext.named_modules())
    if any(name.count(".") == 1 for name in names):
        convnext = deepcopy(convnext)  # its stages keep shape where the convolution between them does
        for stage in (2, 4, 6):
            convnext.features[stage] = nn.Identity()
        blocks = [torch_block(96) for _ in range(4)]
        convnext.features[1], convnext.features[3] = nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:])
        convnext.features[5] = nn.Sequential(*(torch_block(96) for _ in range(9)))
        convnext.features[7] = nn.Sequential(*(torch_block(96) for _ in range(3)))
        convnext.classifier = nn.Sequential(nn.Flatten(), nn.Linear(96, 4))
        convnext.eval()
        whole = dict(convnext.named_modules())
    x = image()
    pruned = drop_layers(convnext, names, x)
    reference = deepcopy(convnext)
    for name in names:
        parent, _, key = name.rpartition(".")
        reference.get_submodule(parent)[int(key)] = nn.Identity()
    assert torch.equal(pruned.model(x), reference(x))
    if moved is not None:
        assert pruned.plan.renamed == moved | {"features.1.2": "features.1.1"}
    weights = pruned.model.state_dict()
    for name, module in whole.items():
        if name and not any(name == other or name.startswith(f"{other}.") for other in names):
            for own, value in module.named_parameters(recurse=False):
                assert torch.equal(weights[f"{new_name(name, pruned.plan.renamed)}.{own}"], value)


def torch_block(width):
    from torchvision.models.convnext import CNBlock

    return CNBlock(width, 0.5, 0.0)


@pytest.fixture(scope="module")
def convnext():
    torch.manual_seed(0)
    return vision("convnext_tiny").eval()


# no trace


def state(model):
    digest = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    modes = [module.training for module in model.modules()]
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith("_hooks")]
    hooks = [(kind, list(getattr(module, kind))) for module in model.modules() for kind in kinds]
    flags = [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()]
    config = getattr(model, "config", None)
    numbers = [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    return digest.hexdigest(), modes, hooks, flags, None if config is None else config.to_json_string(False), numbers


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


SMALL = {
    "demo": (digits_resnet, lambda: DIGITS, ["layer1.1", "layer2.3"], "layer2.0"),
    "BERT": (bert, tokens, ["encoder.layer.0", "encoder.layer.2.output"], "embeddings"),
    "GPT-2": (gpt2, tokens, ["transformer.h.0", "transformer.h.2.attn"], "lm_head"),
    "Llama": (llama, tokens, ["model.layers.3", "model.layers.1.mlp"], "lm_head"),
    "T5": (t5, pairs, ["encoder.block.1", "decoder.block.2"], "encoder.block.0"),
}


@pytest.mark.parametrize("case", SMALL)
def test_the_model_is_as_it_was(case):
    make, example, names, refused = SMALL[case]
    torch.manual_seed(0)
    model, example = make().train(), example()
    next(model.children()).eval()  # mixed modes
    next(model.parameters()).requires_grad_(False)
    list(model.modules())[3].register_forward_hook(lambda *_: None)
    before, numbers = state(model), random_states()
    inputs = deepcopy(example)

    pruned = drop_layers(model, names, example)
    predict_cost(model, names, example)
    droppable_layers(model, example, "halves")
    with pytest.raises(ValueError, match="cannot"):
        drop_layers(model, refused, example)

    assert state(model) == before
    assert random_states() == numbers
    assert str(inputs) == str(example)
    assert not {id(p) for p in pruned.model.parameters()} & {id(p) for p in model.parameters()}
    kept = {name: module for name, module in model.named_modules() if not name.startswith(pruned.plan.layers)}
    smaller = dict(pruned.model.named_modules())
    for name, module in kept.items():
        assert smaller[new_name(name, pruned.plan.renamed)].training == module.training


@pytest.mark.parametrize("case", SMALL)
def test_dropping_nothing_is_nothing(case):
    make, example, _, _ = SMALL[case]
    torch.manual_seed(0)
    model, example = make(), example()
    pruned = drop_layers(model, [], example)
    assert pruned.model is not model
    assert state(pruned.model)[0] == state(model)[0]
    assert str(pruned.model) == str(model)
    assert torch.equal(result(pruned.model, example), result(model, example))
    assert pruned.before == pruned.after == predict_cost(model, [], example)
    assert (pruned.plan.layers, pruned.plan.renamed) == ((), {})
    assert (pruned.table()["change_percent"] == 0).all()


@pytest.mark.parametrize("names", [["layer1.1"], ["layer1.0.conv1"], ["layer1.0.relu1", "layer2.1"]])
def test_a_model_in_eval_mode_stays_so_in_every_module(names):
    assert not any(module.training for module in drop_layers(digits_resnet(), names, DIGITS).model.modules())


def test_dropout_is_off_in_the_check_of_a_model_in_training_mode():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 4)) for _ in range(4))).train()
    x = torch.randn(8, 4)
    pruned = drop_layers(net, ["1"], x)
    assert all(module.training for module in pruned.model.modules())
    assert torch.equal(pruned.model.eval()(x), net.eval()[3](net[2](net[0](x))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_types_and_layouts(dtype, layout):
    model = digits_resnet().to(dtype=dtype, memory_format=layout)
    x = DIGITS.to(dtype=dtype, memory_format=layout)
    pruned = drop_layers(model, ["layer1.1", "layer3.2"], x)
    reference = deepcopy(model)
    reference.layer1[1] = reference.layer3[2] = nn.Identity()
    assert torch.equal(pruned.model(x), reference(x))
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}
    assert predict_cost(model, ["layer1.1", "layer3.2"], x) == pruned.after


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_looked_through(wrap):
    wrapped = wrap(digits_resnet())
    pruned = drop_layers(wrapped, ["layer1.1"], DIGITS)
    assert pruned.plan == drop_layers(digits_resnet(), ["layer1.1"], DIGITS).plan
    assert torch.equal(pruned.model(DIGITS), drop_layers(digits_resnet(), ["layer1.1"], DIGITS).model(DIGITS))


# Hugging Face: configs, caches, numbers


def bart(encoder=3, decoder=3):
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=encoder, decoder_layers=decoder, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def opt():
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def layered(kind, **options):
    config = getattr(transformers, f"{kind}{'TextConfig' if kind == 'Gemma3' else 'Config'}")
    return getattr(transformers, f"{kind}ForCausalLM")(config(**LLAMA, head_dim=8, **options))


def pixels():
    return {"pixel_values": image()}


def swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 4], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)


def hf_resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3], layer_type="basic")
    return transformers.ResNetModel(config)


def hf_convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[2, 3], num_stages=2, patch_size=2, layer_scale_init_value=0.5
    )
    return transformers.ConvNextModel(config)


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=4, n_heads=2, hidden_dim=32)
    return transformers.DistilBertModel(config)


def qwen2_moe():
    config = transformers.Qwen2MoeConfig(
        **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        mlp_only_layers=[1],
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def random_everywhere(make):
    """Nothing at 0 or 1, where an order of layers would not matter."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


HF = {  # model, example, cut, what the config says afterwards
    "BERT": (bert, tokens, ["encoder.layer.0", "encoder.layer.3"], {"num_hidden_layers": 2}),
    "DistilBERT": (distilbert, tokens, ["transformer.layer.1"], {"n_layers": 3}),
    "GPT-2 first": (gpt2, tokens, ["transformer.h.0"], {"n_layer": 3, "num_hidden_layers": 3}),
    "GPT-2 two": (gpt2, tokens, ["transformer.h.1", "transformer.h.2"], {"n_layer": 2}),
    "Llama first": (llama, tokens, ["model.layers.0"], {"num_hidden_layers": 3}),
    "Llama spread": (llama, tokens, ["model.layers.1", "model.layers.3"], {"num_hidden_layers": 2}),
    "Gemma 2": (lambda: layered("Gemma2", sliding_window=3), tokens, ["model.layers.1"],
        {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "Gemma 3": (lambda: layered("Gemma3", sliding_window=3, layer_types=["full_attention", *["sliding_attention"] * 3]),
        tokens, ["model.layers.0"], {"layer_types": ["sliding_attention"] * 3}),
    "Qwen 2": (lambda: layered("Qwen2", sliding_window=3, use_sliding_window=True, max_window_layers=2), tokens,
        ["model.layers.0"], {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    "SmolLM 3": (lambda: transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**LLAMA)), tokens,
        ["model.layers.1"], {"no_rope_layers": [1, 1, 0]}),
    "Qwen 2 MoE": (qwen2_moe, tokens, ["model.layers.0"], {"mlp_only_layers": [0]}),
    "OPT": (opt, tokens, ["model.decoder.layers.0"], {"num_hidden_layers": 3}),
    "Bart encoder": (bart, pairs, ["model.encoder.layers.1"], {"encoder_layers": 2, "decoder_layers": 3}),
    "Bart decoder": (bart, pairs, ["model.decoder.layers.0"], {"encoder_layers": 3, "decoder_layers": 2}),
    "T5 encoder": (t5, pairs, ["encoder.block.1"], {"num_layers": 2, "num_decoder_layers": 3}),
    "T5 decoder": (t5, pairs, ["decoder.block.1", "decoder.block.2"], {"num_layers": 3, "num_decoder_layers": 1}),
    "Swin last": (swin, pixels, ["encoder.layers.1.blocks.3"], {"depths": [2, 3]}),
    "ConvNeXt": (hf_convnext, pixels, ["encoder.stages.1.layers.0"], {"depths": [2, 2]}),
    "ResNet": (hf_resnet, pixels, ["encoder.stages.1.layers.1"], {"depths": [2, 2]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:macs leave out")
@pytest.mark.parametrize("case", HF)
def test_config_describes_what_is_left(case, tmp_path):
    """A fresh model made from the config takes the weights and gives the same; so does one that was saved."""
    make, example, names, expected = HF[case]
    model, example = random_everywhere(make), example()
    pruned = drop_layers(model, names, example).model
    reference = result(by_hand(model, names, {}), example)
    assert torch.allclose(result(pruned, example), reference, rtol=1e-6, atol=1e-6)
    assert {name: getattr(pruned.config, name) for name in expected} == expected

    fresh = type(pruned)(deepcopy(pruned.config))
    fresh.load_state_dict(pruned.state_dict(), strict=True)
    assert torch.equal(result(fresh, example), result(pruned, example))
    pruned.save_pretrained(tmp_path)
    assert torch.equal(result(type(pruned).from_pretrained(tmp_path), example), result(pruned, example))


def test_layers_that_go_by_number_keep_what_they_do():
    """GPT-2 can scale the attention of layer i by 1 / (i + 1): those that move up keep their scale."""
    model, example = random_everywhere(lambda: gpt2(scale_attn_by_inverse_layer_idx=True)), tokens()
    pruned = drop_layers(model, ["transformer.h.1"], example).model
    reference = result(by_hand(model, ["transformer.h.1"], {}), example)
    assert torch.allclose(result(pruned, example), reference, rtol=1e-6, atol=1e-6)


CUTS = {
    "GPT-2": (gpt2, "transformer.h", "attn"),
    "Llama": (llama, "model.layers", "self_attn"),
    "Gemma 2": (lambda: layered("Gemma2", sliding_window=3), "model.layers", None),
    "Mistral": (lambda: layered("Mistral", sliding_window=3), "model.layers", "self_attn"),
}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("which", ["0", "1 2", "3", "0a", "2a", "0 1a", "0a 1a 2a 3a", "0a 0m"])
def test_generate_keeps_its_cache(case, which):
    make, blocks, attention = CUTS[case]
    if attention is None and "a" in which:
        return
    ends = {"a": f".{attention}", "m": ".mlp"}
    names = [f"{blocks}.{part[0]}{ends.get(part[1:], '')}" for part in which.split()]
    model = random_everywhere(make)
    pruned = drop_layers(model, names, tokens()).model
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids())
    with_cache, without = (pruned.generate(ids(), attention_mask=mask, use_cache=on, **options) for on in (True, False))
    assert with_cache.shape == (2, 13)
    assert torch.equal(with_cache, without)

    step = ids()  # greedy by hand, from the identity by hand, without a cache
    hand = by_hand(model, names, {"attn": None, "self_attn": None, "mlp": None})
    for _ in range(6):
        scores = result(hand, {"input_ids": step, "use_cache": False})[:, -1]
        step = torch.cat((step, scores.argmax(1, keepdim=True)), 1)
    assert torch.equal(with_cache, step)
    numbers = sorted({module.layer_idx for module in pruned.modules() if type(getattr(module, "layer_idx", "")) is int})
    assert numbers == list(range(len(numbers)))


def test_bart_generates_without_a_layer():
    model = random_everywhere(bart)
    pruned = drop_layers(model, ["model.encoder.layers.0", "model.decoder.layers.0"], pairs()).model
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    found = [pruned.generate(ids(), use_cache=on, **options) for on in (True, False)]
    assert torch.equal(*found)


def test_halves_of_layers_of_several_kinds_are_refused_with_what_to_do():
    model = layered("Gemma2", sliding_window=3)
    with pytest.raises(ValueError, match=r"attention layers are of several kinds.*drop whole layers instead"):
        drop_layers(model, ["model.layers.0.self_attn"], tokens())
    assert len(drop_layers(model, ["model.layers.0.mlp"], tokens()).model.model.layers) == 4


def test_one_layer_that_runs_several_times_goes_from_all_of_them():
    """ALBERT: the layers are one. Without its attention, by hand the layer's result of every pass is its input."""
    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = random_everywhere(lambda: transformers.AlbertModel(config))
    name = "encoder.albert_layer_groups.0.albert_layers.0"
    try:
        found = drop_layers(model, [name], tokens())
    except ValueError as error:
        assert "keep at least one" in str(error) or "rest uses more" in str(error)  # noqa: PT017
        return
    assert torch.equal(result(found.model, tokens()), result(by_hand(model, [name], {}), tokens()))
