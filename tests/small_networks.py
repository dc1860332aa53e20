"""Small networks, their inputs and captures, a data set that remembers, and the plain table of a measure."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from repgraph import capture

N = 24
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Sequential):
    def __init__(self, seed=0, widths=(6, 8, 5)):
        generator = torch.Generator().manual_seed(seed)
        layers = [nn.Linear(before, after) for before, after in pairwise(widths)]
        for layer in layers:
            nn.init.normal_(layer.weight, generator=generator)
            nn.init.normal_(layer.bias, generator=generator)
        super().__init__(*(part for layer in layers for part in (layer, nn.Tanh())))


class Through(nn.Module):
    """Gives what a function makes of its input."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Wired(nn.Module):
    """Parts by name and what the forward does with them."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


class Deeper(Net):
    def __init__(self):
        super().__init__(1, (6, 4, 4, 3))


class Loaded(TensorDataset):
    """Remembers which samples were loaded."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.loaded = []

    def __getitem__(self, i):
        self.loaded.append(i)
        return super().__getitem__(i)


def take(model, data=X, layers="leaves", **options):
    return capture(model, data, layers, progress=False, **options)


def by_pairs(similarity, a, b, **options):
    """The definition: the measure called on every pair."""
    return np.array([[similarity(x, y, **options) for y in b.values()] for x in a.values()])
