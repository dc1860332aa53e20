"""The same call of profile on networks of many kinds, with random weights and tiny inputs."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

from repgraph import profile

torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

N, REPEATS, K = 12, 2, 3
LABELS = torch.arange(N * REPEATS) % 2


pytestmark = pytest.mark.usefixtures("one_thread")


def images():
    return torch.randn(N * REPEATS, 3, 32, 32, generator=torch.Generator().manual_seed(0)), LABELS


def tokens():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(0, 50, (N * REPEATS, 7), generator=generator),
        "attention_mask": torch.ones(N * REPEATS, 7, dtype=torch.long),
        "labels": LABELS,
    }


def vision(name):
    return getattr(torchvision.models, name)(weights=None, num_classes=4)


def vgg():
    """VGG-16 with a small classifier in place of its 120 million weights, none of which is a layer of the table."""
    parts = torchvision.models.vgg
    with torch.device("meta"):
        model = parts.VGG(nn.Identity(), num_classes=4, init_weights=False)
    model.features = parts.make_layers(parts.cfgs["D"], batch_norm=True)
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 4))
    return model


def vit():
    """The blocks of ViT-B/16, 64 wide."""
    return torchvision.models.VisionTransformer(32, 16, 12, 4, 64, 256, num_classes=4)


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2Model(config)


def numbered(*stages):
    """("a", 2) -> a.0, a.1; a name alone stays."""
    return [n for s in stages for n in ([s] if isinstance(s, str) else [f"{s[0]}.{i}" for i in range(s[1])])]


RESNET = numbered("conv1", ("layer1", 3), ("layer2", 4), ("layer3", 6), ("layer4", 3))
VGG = [f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)]
DENSENET = ["features.conv0", *(f"features.{n}{i}" for i in (1, 2, 3) for n in ("denseblock", "transition"))]
MOBILENET = numbered("features.0.0", ("features", 13))
VIT = ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(12))]
SWIN = numbered(
    "features.0.0", ("features.1", 2), "features.2", ("features.3", 2), "features.4", ("features.5", 6), "features.6",
    ("features.7", 2),
)  # fmt: skip
CONVNEXT = numbered("features.0.0", ("features.1", 3), ("features.3", 3), ("features.5", 9), ("features.7", 3))

CASES = {
    "resnet50": (lambda: vision("resnet50"), images, RESNET),
    "vgg16_bn": (vgg, images, VGG),
    "densenet121": (lambda: vision("densenet121"), images, [*DENSENET, "features.denseblock4"]),
    "mobilenet_v3_small": (lambda: vision("mobilenet_v3_small"), images, MOBILENET),
    "vit_b_16": (vit, images, VIT),
    "swin_t": (lambda: vision("swin_t"), images, SWIN),
    "convnext_tiny": (lambda: vision("convnext_tiny"), images, CONVNEXT),
    "BertModel": (bert, tokens, numbered(("encoder.layer", 3))),
    "GPT2Model": (gpt2, tokens, numbered(("h", 3))),
}


def state(model):
    """Copies of the bits of the state dict, and modes and hooks."""
    bits = {
        name: tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
        for name, tensor in model.state_dict().items()
    }
    modes = [module.training for module in model.modules()]
    hooks = [
        (kind, list(getattr(module, kind)))
        for module in model.modules()
        for kind in vars(nn.Module())
        if kind.endswith("_hooks")
    ]
    return bits, modes, hooks


def outputs(model, data, names):
    """The named layers' outputs, by hooks set by hand."""
    found = {}

    def hook(name):
        return lambda module, args, output: found.update({name: output if torch.is_tensor(output) else output[0]})

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    inputs = {k: v for k, v in data.items() if k != "labels"} if isinstance(data, dict) else data[0]
    with torch.no_grad():
        model.eval()(**inputs) if isinstance(data, dict) else model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return found


def reference(x, y):
    """Modularity of one set by dense NumPy and networkx, from the definition; signed where weights are negative."""
    f = x.flatten(1).double().numpy()
    unit = f / np.linalg.norm(f, axis=1, keepdims=True).clip(1e-8)
    s = unit @ unit.T
    np.fill_diagonal(s, -np.inf)
    a = np.zeros_like(s)
    for i, row in enumerate(s):
        nearest = np.argsort(-row)[:K]
        a[i, nearest] = row[nearest]
    u = (a + a.T) / 2
    total, classes = np.abs(u).sum(), [set(np.flatnonzero(y == c)) for c in np.unique(y)]
    q = 0.0
    for sign in (1, -1):
        part = (sign * u).clip(0)
        if part.any():
            q += sign * part.sum() / total * nx.community.modularity(nx.from_numpy_array(part), classes)
    return q


@pytest.mark.parametrize("case", CASES)
def test_profile_runs_unchanged_on(case):
    make, data, names = CASES[case]
    torch.manual_seed(0)
    model, data = make(), data()
    model.train()
    next(model.children()).eval()  # mixed modes must come back mixed
    before = state(model)

    table = profile(model, data, n=12, repeats=2, progress=False)

    bits, *rest = state(model)
    assert list(bits) == list(before[0])
    assert all(torch.equal(bits[name], before[0][name]) for name in bits)
    assert rest == list(before[1:])
    assert table.index.tolist() == names
    assert np.isfinite(table["modularity"]).all()
    assert table["modularity"].between(-1, 1).all()
    found = outputs(model, data, names)
    assert table["features"].tolist() == [math.prod(found[name].shape[1:]) for name in names]
    middle = names[len(names) // 2]
    values = [reference(found[middle][r : r + N], LABELS[r : r + N].numpy()) for r in (0, N)]
    assert table.loc[middle, "modularity"] == pytest.approx(np.mean(values), abs=1e-6)
    assert table.loc[middle, "modularity_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
