"""The CIFAR-10 images and trained networks that some benchmarks, figures and tests use where they are present.

They are looked for in the folder that REPGRAPH_SHARED names, by default ../shared beside the project.
"""

import importlib.util
import io
import os
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from repgraph.demo import digits, digits_resnet

SHARED = Path(os.environ.get("REPGRAPH_SHARED", Path(__file__).parents[2] / "shared"))


def available() -> bool:
    """Whether the images and networks are there."""
    return (SHARED / "data/models/definitions.py").is_file() and (SHARED / "data/cifar10/test.npz").is_file()


def cifar_network(depth: int, suffix: str = "") -> nn.Module:
    """The trained CIFAR-10 ResNet of depth 20, 32, 44 or 56, in eval mode."""
    return definitions().cifar_resnet(SHARED / f"data/models/cifar10_resnet{depth}{suffix}.safetensors", depth)


def cifar_images(n: int) -> tuple[Tensor, Tensor]:
    """The first n test images, normalised, (n, 3, 32, 32), and their labels; ten in a row are of ten classes."""
    with np.load(SHARED / "data/cifar10/test.npz") as file:
        raw, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"][:n]
    images = [np.asarray(Image.open(io.BytesIO(raw[a:b]))) for a, b in pairwise(offsets[: n + 1])]
    return definitions().cifar_input(np.stack(images)), torch.from_numpy(labels)


def definitions() -> ModuleType:
    """The module of the shared networks."""
    spec = importlib.util.spec_from_file_location("definitions", SHARED / "data/models/definitions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(n: int) -> tuple[str, nn.Module, Tensor, Tensor]:
    """ResNet-56 and n CIFAR-10 images with labels; where they are absent the demo network and its digits, at most n."""
    if available():
        return "ResNet-56, CIFAR-10", cifar_network(56), *cifar_images(n)
    x, y = digits()
    return "demo network, digits", digits_resnet(), x[:n], y[:n]
