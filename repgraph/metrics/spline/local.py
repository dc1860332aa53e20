"""How many borders pass near a sample (local complexity)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from repgraph.activations import stream
from repgraph.activations.batches import model_dtype
from repgraph.activations.gates import GATES, unpack
from repgraph.activations.layers import unwrap
from repgraph.metrics.spline.codes import refuse_training

_BATCH = 256  # vertices per forward pass, at least those of one sample


def local_complexity(
    model: nn.Module,
    x: Tensor,
    *,
    radius: float,
    n_dirs: int = 20,
    directions: Tensor | None = None,
    seed: int = 0,
    batch_size: int = _BATCH,
    progress: bool = True,
) -> Tensor:
    """Local complexity: for each sample and layer, the number of units whose sign changes within a cross-polytope.

    The vertices are x + r v_p and x - r v_p for P orthonormal directions v_p, the same for all samples. LC_l counts the
    units of layer l whose gate is not the same at all 2 P vertices. Sum over layers and average over samples for the
    published number.

    Parameters
    ----------
    model
        In eval mode, with ReLU-like units.
    x
        Samples (N, ...).
    radius
        r, in the units of x, > 0. The authors use 0.005 for CIFAR-10 and 0.05 to 5 for MNIST.
    n_dirs
        P, at most the input dimension. The published 40 vertices are P = 20.
    directions
        Given directions (P, ...) or (P, d), in place of random ones; used as they are.
    seed
        Of the random directions.
    batch_size
        Vertices per forward pass.
    progress
        Show a progress bar.

    Returns
    -------
    Tensor
        Shape (N, layers), int64, on the CPU; layers in execution order as `gating_states` names them.

    Raises
    ------
    ValueError
        If the model is in train mode or has no gates, radius is not positive, n_dirs is below 1 or above the input
        dimension, or directions have another shape.

    Notes
    -----
    Exact for the first layer: unit k counts if r max_p |<w_k, v_p>| > |w_k x + b_k|. Deeper it is a lower bound on the
    units whose sign varies within the hull of the vertices. 2 N P forward passes of one sample.

    References
    ----------
    Humayun, Balestriero, Baraniuk, "Deep Networks Always Grok and Here is Why", ICML 2024, arXiv 2402.15555. Their code
    gives the sign three values, leaves out the last incomplete batch and, in one script, counts the logits.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    >>> net[0].weight.data, net[0].bias.data = torch.eye(2), torch.tensor([-0.5, -2.0])
    >>> local_complexity(net, torch.zeros(1, 2), radius=1.0, directions=torch.eye(2))
    tensor([[1]])
    """
    found = _by_layer(model, x, radius, n_dirs, directions, seed, batch_size, progress)
    return torch.stack(list(found.values()), 1)


def local_complexity_by_layer(
    model: nn.Module,
    x: Tensor,
    *,
    radius: float,
    n_dirs: int = 20,
    directions: Tensor | None = None,
    seed: int = 0,
    batch_size: int = _BATCH,
    progress: bool = True,
) -> pd.Series:
    """Mean `local_complexity` of the samples, by gated layer.

    Parameters, errors and source as there.

    Returns
    -------
    Series
        Indexed by layer.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 5), nn.ReLU()).eval()
    >>> local_complexity_by_layer(net, torch.zeros(3, 2), radius=1.0, n_dirs=2).index.tolist()
    ['1']
    """
    found = _by_layer(model, x, radius, n_dirs, directions, seed, batch_size, progress)
    means = {name: float(counts.double().mean()) for name, counts in found.items()}
    return pd.Series(means, name="local_complexity").rename_axis("layer")


class _Vertices(Dataset[Tensor]):
    """The vertices x_i + r v_1, ..., x_i + r v_P, x_i - r v_1, ..., of one sample after the other."""

    def __init__(self, x: Tensor, offsets: Tensor) -> None:
        self.x, self.offsets = x, torch.cat((offsets, -offsets))

    def __len__(self) -> int:
        return len(self.x) * len(self.offsets)

    def __getitems__(self, rows: Sequence[int]) -> Tensor:
        at = torch.as_tensor(rows, device="cpu")
        return self.x[at // len(self.offsets)] + self.offsets[at % len(self.offsets)]


def _by_layer(
    model: nn.Module,
    x: Tensor,
    radius: float,
    n_dirs: int,
    directions: Tensor | None,
    seed: int,
    batch_size: int,
    progress: bool,
) -> dict[str, Tensor]:
    refuse_training(model)
    x = torch.as_tensor(x).detach().cpu()
    x = x if x.is_floating_point() else x.float()
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius!r}")
    if x.ndim < 2 or not len(x):
        raise ValueError(f"x must be samples (N, ...), got shape {tuple(x.shape)}")
    d = x[0].numel()
    if directions is None:
        if not 1 <= n_dirs <= d:
            raise ValueError(f"n_dirs must be between 1 and the input dimension {d}, got {n_dirs}")
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(d, n_dirs, generator=generator, dtype=torch.float64, device="cpu")
        directions = torch.linalg.qr(drawn).Q.T
    else:
        directions = torch.as_tensor(directions).detach().cpu()
        if directions.ndim < 2 or not len(directions) or directions[0].numel() != d:
            raise ValueError(
                f"directions must have shape (P, {', '.join(map(str, x.shape[1:]))}), got {tuple(directions.shape)}"
            )
    dtype = model_dtype(unwrap(model)) or x.dtype
    offsets = (radius * directions.double()).to(dtype).reshape(-1, *x.shape[1:])
    vertices = 2 * len(offsets)
    loader = DataLoader(
        _Vertices(x.to(dtype), offsets), max(1, batch_size // vertices) * vertices, collate_fn=lambda batch: batch
    )
    found = stream(model, loader, partial(_changes, vertices=vertices), "gates", progress=progress)
    return {name.removeprefix(GATES): counts.cpu() for name, counts in found.items()}


def _changes(packed: Tensor, vertices: int) -> Tensor:
    """Number of gates that differ among the vertices of each sample, (b / vertices,), from packed gates (b, bytes)."""
    by_sample = packed.reshape(-1, vertices, packed.shape[1])
    first = by_sample[:, :1]
    differs = by_sample[:, 1] ^ first[:, 0]
    for number in range(2, vertices):
        differs |= by_sample[:, number] ^ first[:, 0]
    return unpack(differs, 8 * packed.shape[1]).sum(1)
