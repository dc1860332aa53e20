"""Layers that the tests of similarity share: the six samples of the published checks, and random related ones."""

import torch

X = torch.tensor([[1, 0], [0, 1], [1, 1], [2, 1], [0, 2], [3, 1]], dtype=torch.float64)
Y = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 1], [1, 1, 3], [3, 0, 1], [1, 2, 2]], dtype=torch.float64)


def layers(seed, n=24, d=5, noise=2.0):
    """Two layers that share a part, and the generator."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(d, d + 2, generator=generator, dtype=torch.float64)
    return x, y + noise * torch.randn(n, d + 2, generator=generator, dtype=torch.float64), generator
