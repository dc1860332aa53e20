"""Trains the two demo networks and writes their weights: ``python -m repgraph.demo.train`` (six minutes on a CPU)."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from repgraph.demo.network import DigitsResNet, digits


def train(epochs: int = 80, batch: int = 64, seed: int = 0) -> DigitsResNet:
    """SGD with Nesterov momentum and a one-cycle schedule on the training digits, shifted by at most one pixel."""
    torch.manual_seed(seed)
    x, y = digits("train")
    model = DigitsResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * steps)
    for epoch in range(epochs):
        for rows in torch.split(torch.randperm(len(x)), batch):
            padded = F.pad(x[rows], (1, 1, 1, 1), value=-1.0)
            i, j = torch.randint(0, 3, (2,)).tolist()
            loss = F.cross_entropy(model(padded[:, :, i : i + 8, j : j + 8]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, held-out accuracy {accuracy(model):.3f}")
    return model.eval()


def fine_tuned(model: nn.Module, epochs: int = 3, seed: int = 0) -> nn.Module:
    """A copy of a trained model after a few more passes over the training digits, in eval mode."""
    x, y = digits("train")
    model = deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=generator), 64):
            loss = F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitsResNet) -> float:
    """Share of the held-out digits that the model names correctly."""
    x, y = digits("held out")
    model.eval()
    right = float((model(x).argmax(1) == y).float().mean())
    model.train()
    return right


if __name__ == "__main__":
    for seed in (0, 1):
        trained = train(seed=seed)
        path = Path(__file__).with_name(f"digits_resnet_{seed}.safetensors")
        save_file({name: tensor for name, tensor in trained.state_dict().items() if tensor.is_floating_point()}, path)
        print(f"{path.name}: {path.stat().st_size} bytes, held-out accuracy {accuracy(trained):.4f}")
