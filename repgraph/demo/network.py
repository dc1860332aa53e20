"""A residual network of 14 blocks for scikit-learn's 8 x 8 digits, with its trained weights."""

from __future__ import annotations

from importlib.resources import files

import torch
from safetensors.torch import load
from sklearn.datasets import load_digits
from torch import Tensor, nn

_TRAIN = 797  # samples that the shipped weights were trained on; the other 1000 are held out


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: a 1 x 1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(b, before, h, w) -> (b, after, h / stride, w / stride)."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class DigitsResNet(nn.Module):
    """Stem, stages of 5, 5 and 4 blocks with 8, 16 and 32 channels, mean over space, linear classifier."""

    def __init__(self, blocks: tuple[int, int, int] = (5, 5, 4)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.layer1 = _stage(8, 8, 1, blocks[0])
        self.layer2 = _stage(8, 16, 2, blocks[1])
        self.layer3 = _stage(16, 32, 2, blocks[2])
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 1, 8, 8) -> class scores (b, 10)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def _stage(before: int, after: int, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(Block(before, after, stride), *(Block(after, after, 1) for _ in range(blocks - 1)))


def digits_resnet(seed: int = 0) -> DigitsResNet:
    """The trained network, in eval mode. `python -m repgraph.demo.train` made its weights.

    Parameters
    ----------
    seed
        0 or 1: two networks that differ in their initial weights and the order of their training data only.

    Raises
    ------
    ValueError
        If the seed is neither.

    Examples
    --------
    >>> x, y = digits()
    >>> for seed in (0, 1):
    ...     bool((digits_resnet(seed)(x).argmax(1) == y).float().mean() > 0.97)
    True
    True
    """
    if seed not in (0, 1):
        raise ValueError(f"seed must be 0 or 1, the networks that come along, got {seed!r}")
    model = DigitsResNet()
    model.load_state_dict(load(files("repgraph.demo").joinpath(f"digits_resnet_{seed}.safetensors").read_bytes()))
    return model.eval()


def digits(split: str = "held out") -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [-1, 1] and labels (n,) of scikit-learn's digits, in a fixed random order.

    Parameters
    ----------
    split
        "held out" (1000 images that the shipped weights have not seen) or "train" (797).

    Raises
    ------
    ValueError
        If the split is neither.
    """
    if split not in ("held out", "train"):
        raise ValueError(f"split must be 'held out' or 'train', got {split!r}")
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    chosen = order[:_TRAIN] if split == "train" else order[_TRAIN:]
    images = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return images[chosen], torch.as_tensor(y)[chosen]
