"""What can be dropped from which architecture: the rows of docs/architectures.md, each also a test.

The reference is made by hand: in a deep copy the module's forward is exchanged, and nothing of repgraph takes part.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial

import torch
import torchvision
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from repgraph.activations.layers import choose
from repgraph.demo import digits_resnet
from repgraph.prune import drop_layers, droppable_layers, predict_cost


class PaddedBlock(nn.Module):
    """Two 3 x 3 convolutions; where the shape changes, the shortcut takes every second pixel and pads with zeros."""

    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, after // before, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if y.shape != x.shape:
            missing = y.shape[1] - x.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing // 2, missing // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2, option A: 6n + 2 layers for n blocks in each of three stages."""

    def __init__(self, blocks=(9, 9, 9)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, number in enumerate(blocks):
            after = 16 * 2**i
            first = PaddedBlock(after // 2 if i else 16, after)
            stage = nn.Sequential(first, *(PaddedBlock(after, after) for _ in range(number - 1)))
            self.add_module(f"layer{i + 1}", stage)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@dataclass(frozen=True)
class Architecture:
    make: Callable[[], nn.Module]
    example: Callable[[], object]
    refused: tuple[str, ...]
    """Blocks that cannot go, among others; empty if every block can: then all of them together are refused."""
    stands_in: dict[str, int] = field(default_factory=dict)
    """How a half that has its own residual connection ends -> the argument that it gives back; others add nothing."""
    small: bool = False
    """Whether every block and half is dropped in turn, not a few."""


@dataclass(frozen=True)
class Row:
    blocks: int
    droppable: tuple[str, ...]
    halves: tuple[str, ...]
    listed: tuple[str, ...]
    """What became of the lists: moved up or replaced."""
    refusal: str
    largest: dict[tuple[str, ...], float]
    """What was dropped -> largest difference from the identity by hand."""
    predicted: dict[tuple[str, ...], bool]
    """What was dropped -> whether the predicted cost was the measured one."""


def by_hand(model, names, stands_in):
    """A copy in eval mode whose named blocks give their first argument back, whose halves add nothing."""
    model = deepcopy(model).eval()
    for name in names:
        module = model.get_submodule(name)
        end = name.rpartition(".")[2]
        module.forward = partial(
            _instead, module.forward, stands_in.get(end, 0 if end.isdigit() or "_" in end else None)
        )
    return model


def _instead(forward, place, *args, **kwargs):
    given = [*args, *kwargs.values()]
    output = forward(*(value.clone() if torch.is_tensor(value) else value for value in args), **kwargs)
    first = output if torch.is_tensor(output) else output[0]
    instead = torch.zeros_like(first) if place is None else given[place]
    assert instead.shape == first.shape
    return instead if torch.is_tensor(output) else (instead, *output[1:])


def result(model, example):
    """The first tensor that the model gives in eval mode."""
    with torch.no_grad():
        output = model.eval()(**example) if isinstance(example, dict) else model.eval()(example)
    return output if torch.is_tensor(output) else output[0]


def _chosen(names, small):
    """Each in turn, and neighbours and every second; of many, the first, and two in a row with the last."""
    if small:
        return [*((name,) for name in names), tuple(names[:2]), tuple(names[1::2])]
    middle = len(names) // 2
    return [(names[0],), (*names[middle - 1 : middle + 1], names[-1])]


def _sentence(model, names, example):
    try:
        drop_layers(model, names, example)
    except ValueError as error:
        return str(error)
    return ""


@cache
def examine(name: str) -> Row:
    """Drop blocks and halves of the architecture and compare with what is made by hand."""
    architecture = ARCHITECTURES[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, example = architecture.make().eval(), architecture.example()
    _randomize(model)
    blocks = list(choose(model))
    droppable = [name for name in droppable_layers(model, example) if name not in architecture.refused]
    halves = droppable_layers(model, example, "halves")
    largest, predicted, listed = {}, {}, set()
    cuts = [cut for names in (droppable, halves) if names for cut in _chosen(names, architecture.small)]
    for cut in cuts:
        pruned = drop_layers(model, cut, example)
        reference = result(by_hand(model, _with_conv(model, cut), architecture.stands_in), example)
        largest[cut] = float((result(pruned.model, example) - reference).abs().max() / reference.abs().max())
        predicted[cut] = predict_cost(model, cut, example) == pruned.after
        if cut[0] in droppable:
            parent = cut[0].rpartition(".")[0]
            shorter = len(pruned.model.get_submodule(parent)) < len(model.get_submodule(parent))
            listed.add("moves up" if shorter else "replaced")
    refusal = _sentence(model, architecture.refused[:1] or droppable, example)
    torch.set_num_threads(threads)
    return Row(len(blocks), tuple(droppable), tuple(halves), tuple(sorted(listed)), refusal, largest, predicted)


def _randomize(model):
    """Norms and scales that start at 1 or 0 hide what is wrong."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, float("bias" not in name), 0.2, generator)
        elif name.endswith("layer_scale"):
            nn.init.normal_(parameter, 0.5, 0.2, generator)


def _with_conv(model, cut):
    """A convolution of a chain goes with its norm and ReLU."""
    return [
        f"{name.rpartition('.')[0]}.{int(name.rpartition('.')[2]) + i}"
        if isinstance(model.get_submodule(name), nn.Conv2d)
        else name
        for name in cut
        for i in range(3 if isinstance(model.get_submodule(name), nn.Conv2d) else 1)
    ]


def image(side=32):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def ids(length=7):
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(0))


def tokens():
    return {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def vision(name, **options):
    return getattr(torchvision.models, name)(weights=None, num_classes=4, **options)


def bert(layers=4, kind="BertModel"):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32
    )
    return getattr(transformers, kind)(config)


def gpt2(layers=4, **options):
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=None, **options
    )
    return transformers.GPT2LMHeadModel(config)


LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | options)))


def t5(encoder=3, decoder=3):
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=encoder, num_decoder_layers=decoder, num_heads=2,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def pairs():
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def digit():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


BERT_HALVES = {"attention": 0, "output": 1}
ARCHITECTURES = {
    "demo network": Architecture(digits_resnet, digit, ("layer2.0",), small=True),
    "ResNet-56, zero-padded shortcuts": Architecture(CifarResNet, partial(image, 16), ("layer2.0",)),
    "resnet50": Architecture(partial(vision, "resnet50"), image, ("layer1.0",)),
    "resnet152": Architecture(partial(vision, "resnet152"), image, ("layer3.0",)),
    "vgg19_bn": Architecture(partial(vision, "vgg19_bn", init_weights=False), image, ("features.7",)),
    "densenet121": Architecture(partial(vision, "densenet121"), image, ("features.denseblock1",)),
    "mobilenet_v2": Architecture(partial(vision, "mobilenet_v2"), image, ("features.4",)),
    "convnext_tiny": Architecture(partial(vision, "convnext_tiny"), image, ("features.0.0",)),
    "vit_b_16": Architecture(
        partial(vision, "vit_b_16", image_size=32), image, ("conv_proj",), {"self_attention": None}
    ),
    "swin_t": Architecture(partial(vision, "swin_t"), partial(image, 64), ("features.2",)),
    "BERT": Architecture(bert, tokens, (), BERT_HALVES, small=True),
    "GPT-2": Architecture(gpt2, tokens, (), small=True),
    "Llama": Architecture(llama, tokens, (), {"self_attn": None}, small=True),
    "T5": Architecture(t5, pairs, ("encoder.block.0", "decoder.block.0"), small=True),
}


# filters


@torch.no_grad()
def lively(model, seed=1):
    """In eval mode, with norms, biases and heads of their own: what starts at 0 or 1 hides what is wrong."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, float("bias" not in name), 0.2, generator)
        elif not parameter.any():
            nn.init.normal_(parameter, 0.0, 0.2, generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return model.eval()


def filter_scores(model, seed=0, names=None):
    """A random number for each output channel of each convolution and linear layer."""
    generator = torch.Generator().manual_seed(seed)
    weighted = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear) and n}
    widths = {n: m.out_features if isinstance(m, nn.Linear) else m.out_channels for n, m in weighted.items()}
    return {n: torch.rand(width, generator=generator) for n, width in widths.items() if names is None or n in names}


@torch.no_grad()
def zeroed(model, example, filters):
    """By hand: a copy whose filters are zero, with their biases, and of each norm the channels that get nothing else.

    Which these are shows in a second copy, in which all that is not cut is positive.
    """
    model = deepcopy(model).eval()
    for name, channels in filters.items():
        layer, channels = model.get_submodule(name), list(channels)
        if getattr(layer, "transposed", False):
            each = layer.weight.shape[1]  # (in, out / groups, ...)
            inputs = layer.in_channels // layer.groups
            for c in channels:
                layer.weight[c // each * inputs : (c // each + 1) * inputs, c % each] = 0
        else:
            layer.weight[channels] = 0
        if layer.bias is not None:
            layer.bias[channels] = 0
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    positive = deepcopy(model)
    for parameter in positive.parameters():
        parameter.copy_((parameter != 0) / parameter[0].numel())

    def silence(norm, here, args):
        dead = ~args[0].transpose(0, 1).flatten(1).any(1)
        for module in (norm, here):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor[dead] = 0

    for name, norm in norms.items():
        here = positive.get_submodule(name)
        if here.running_mean is not None:
            here.running_mean.zero_()
            here.running_var.fill_(1)
        here.register_forward_pre_hook(partial(silence, norm))
    if norms:
        given = example if isinstance(example, dict) else {"x": example}
        given = {key: x.abs() + 1 if x.is_floating_point() else x for key, x in given.items()}
        positive(**given) if isinstance(example, dict) else positive(given["x"])
    return model


def tensors(model, example):
    """All floating tensors that the model gives in eval mode."""
    with torch.no_grad():
        output = model.eval()(**example) if isinstance(example, dict) else model.eval()(example)
    leaves = tree_leaves(dict(output) if hasattr(output, "items") else output)
    return [leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.is_floating_point()]


def apart(model, pruned, example):
    """Largest difference in float64, relative to the largest output: (from the model with zeros, from the model)."""
    model, smaller = deepcopy(model).double(), deepcopy(pruned.model).double()
    given = example if isinstance(example, dict) else {"x": example}
    given = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
    example = given if isinstance(example, dict) else given["x"]
    found = tensors(smaller, example)
    differences = []
    for other in (zeroed(model, example, pruned.plan.filters), model):
        expected = tensors(other, example)
        assert [a.shape for a in expected] == [b.shape for b in found]
        differences.append(
            max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True))
        )
    return tuple(differences)
