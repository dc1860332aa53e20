"""Which filters can be cut from which architecture: a table of docs/architectures.md, whose rows are also tests.

The reference is made by hand: filters set to zero in a copy, without repgraph's own masks (`zeroed`).
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache, partial

import torch
import torchvision
from architectures import (
    CifarResNet,
    PaddedBlock,
    apart,
    bert,
    digit,
    filter_scores,
    gpt2,
    image,
    lively,
    llama,
    pairs,
    t5,
    tokens,
    vision,
)
from small_networks import Through
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

from repgraph.demo.network import DigitsResNet
from repgraph.prune import prune_filters


class Block(PaddedBlock):
    """As Akamaster's: option A in a module around a lambda."""

    def __init__(self, before, after):
        super().__init__(before, after)
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut = Through(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, after // 4, after // 4), "constant")
            )

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet20():
    widths = [(16, 16)] * 3 + [(16, 32)] + [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *(Block(*both) for both in widths), *head)


def bottlenecks(**options):
    return torchvision.models.ResNet(Bottleneck, [2, 1, 1, 1], num_classes=4, **options)


def vgg():
    """Its own classifier has 120 million weights, which tell nothing more."""
    model = vision("vgg11_bn", init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4))
    return model


def vit():
    return torchvision.models.VisionTransformer(16, 8, 2, 4, 16, 24, num_classes=4)


def swin():
    return torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [3, 6], [7, 7], num_classes=4)


def convnext():
    return torchvision.models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], 0.5, 0.5, num_classes=4)


def autoencoder():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(12, 10, 2, 2), nn.BatchNorm2d(10), nn.ReLU(), nn.ConvTranspose2d(10, 6, 2, 2), nn.ReLU(),
        nn.Conv2d(6, 3, 3, 1, 1),
    )  # fmt: skip


def flattened():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5),
    )  # fmt: skip


def one_dimension():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.ConvTranspose1d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 12, 5),
    )  # fmt: skip


def three_dimensions():
    return nn.Sequential(
        nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.ConvTranspose3d(8, 6, 3), nn.ReLU(), nn.Conv3d(6, 2, 1)
    )


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CASES = {  # network, example, how many layers lose filters of how many
    "demo network": (DigitsResNet, digit, 31, 32),
    "resnet18": (partial(vision, "resnet18"), partial(image, 64), 20, 21),
    "bottlenecks": (bottlenecks, partial(image, 64), 20, 21),
    "bottlenecks, grouped": (partial(bottlenecks, groups=32, width_per_group=4), partial(image, 64), 20, 21),
    "DenseNet": (partial(torchvision.models.DenseNet, 8, (2, 3, 2), 16, num_classes=4), image, 17, 18),
    "VGG with batch norm": (vgg, image, 9, 10),
    "GoogLeNet": (partial(vision, "googlenet", init_weights=False, aux_logits=False), partial(image, 64), 57, 58),
    "GoogLeNet, with auxiliary heads": (
        partial(vision, "googlenet", init_weights=False, aux_logits=True), partial(image, 64), 61, 64),
    "mobilenet_v2": (partial(vision, "mobilenet_v2"), partial(image, 64), 52, 53),
    "mobilenet_v3_small (squeeze-excite)": (partial(vision, "mobilenet_v3_small"), partial(image, 64), 53, 54),
    "ResNet-20, padded by lambdas": (resnet20, partial(image, 16), 19, 20),
    "ResNet-20, padded in the forward": (partial(CifarResNet, (3, 3, 3)), partial(image, 16), 9, 20),
    "flattened": (flattened, partial(noise, 4, 3, 16, 16), 3, 4),
    "autoencoder": (autoencoder, partial(image, 16), 4, 5),
    "one dimension": (one_dimension, partial(noise, 2, 3, 12), 2, 3),
    "three dimensions": (three_dimensions, partial(noise, 2, 3, 5, 5, 5), 2, 3),
    "vision transformer": (vit, partial(image, 16), 2, 8),
    "Swin": (swin, partial(image, 32), 4, 19),
    "ConvNeXt": (convnext, partial(image, 32), 3, 12),
    "BERT": (partial(bert, 2), tokens, 2 * 4, 2 * 6 + 1),
    "Llama": (partial(llama, num_hidden_layers=2), tokens, 2 * 2, 2 * 7 + 1),
    "GPT-2": (gpt2, tokens, 0, 1),
    "T5": (partial(t5, 1, 1), pairs, 5, 17),
    "shufflenet_v2_x1_0": (partial(vision, "shufflenet_v2_x1_0"), partial(image, 64), 0, 57),
}  # fmt: skip


@dataclass(frozen=True)
class FilterRow:
    layers: int
    """Convolutions and linear layers that lost filters."""
    total: int
    left: str
    """Why the others stay; of a network that is refused, the sentence."""
    from_zeros: float = 0.0
    from_whole: float = 1.0
    macs: float = 1.0
    """Share that is left when half of the units of every group went, by random scores."""
    foretold: bool = True


@cache
def examine_filters(name: str) -> FilterRow:
    """Cut half of the filters and compare with zeros set by hand, in float64."""
    make, example, *_ = CASES[name]
    torch.manual_seed(0)
    model, x = lively(make()), example()
    scores = filter_scores(model)
    try:
        pruned = prune_filters(model, x, scores, 0.5)
    except ValueError as error:
        return FilterRow(0, len(scores), str(error).split(":")[0])
    settings = pruned.plan.settings
    reasons = Counter(
        "a norm mixes them" if "mixes" in why else why.split(" (")[0] for why in settings["left"].values()
    )
    left = "; ".join(f"{count}: {why}" for why, count in sorted(reasons.items()))
    foretold = settings["macs"] == [pruned.before.macs, pruned.after.macs]
    share = pruned.after.macs / pruned.before.macs
    return FilterRow(len(pruned.plan.filters), len(scores), left, *apart(model, pruned, x), share, foretold)
