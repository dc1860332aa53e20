"""Which metric is invariant to what: the table of docs/invariances.md, every cell of which is tested.

A measure of two layers has one of them changed; a metric of one layer and labels has its layer changed.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import repgraph
from repgraph.metrics import similarity as s

Change = Callable[[Tensor, torch.Generator], Tensor]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _orthogonal(x, generator):
    return x @ torch.linalg.qr(_normal(generator, x.shape[1], x.shape[1])).Q


def _linear(x, generator):
    d = x.shape[1]
    turn = torch.linalg.qr(_normal(generator, d, d)).Q
    return x @ turn @ torch.diag(torch.logspace(-0.5, 0.5, d, dtype=torch.float64)) @ turn.T


def _translation(x, generator):
    return x + x.std() * (1 + _normal(generator, x.shape[1]).abs())


def _offset(x, generator):
    return x + x.std() * (1 + torch.rand(1, generator=generator, dtype=torch.float64))


def _row_scale(x, generator):
    return x * torch.exp(_normal(generator, len(x), 1))


CHANGES: dict[str, tuple[str, Change]] = {
    "O": ("orthogonal map of the features", _orthogonal),
    "S": ("isotropic scale", lambda x, generator: x * (0.5 + 3 * torch.rand(1, generator=generator).item())),
    "T": ("translation", _translation),
    "T1": ("translation, the same for all features", _offset),
    "R": ("positive scale per sample", _row_scale),
    "L": ("invertible linear map of the features", _linear),
    "P": ("order of the samples, of both layers or of the layer and its labels", None),
}  # fmt: skip

PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], float], str]] = {
    "gbs": (s.gbs, "O S R P"),
    "gbs, k=None (dense)": (partial(s.gbs, k=None), "O S R P"),
    "gbs, weighted=False": (partial(s.gbs, weighted=False), "O S R P"),
    "mutual_knn": (s.mutual_knn, "O S R P"),
    "linear_cka": (s.linear_cka, "O S T T1 P"),
    "linear_cka, unbiased": (partial(s.linear_cka, unbiased=True), "O S T T1 P"),
    "minibatch_cka": (partial(s.minibatch_cka, batch_size=8), "O S T T1"),
    "rbf_cka": (s.rbf_cka, "O S T T1 P"),
    "cknna": (s.cknna, "O S P"),
    "procrustes": (s.procrustes, "O S T T1 P"),
    "svcca": (s.svcca, "O S T T1 P"),
    "svcca, variance=1 (CCA)": (partial(s.svcca, variance=1), "O S T T1 L P"),
    "rsa": (s.rsa, "O S T T1 P"),
    "rsa, rdm=correlation": (partial(s.rsa, rdm="correlation"), "S T1 R P"),
    "rsa, rdm=cosine": (partial(s.rsa, rdm="cosine"), "O S R P"),
    "rtd": (s.rtd, "O S T T1 P"),
    "hsic": (s.hsic, "O T T1 P"),
}

LAYERS: dict[str, tuple[Callable[[Tensor, Tensor], float], str]] = {
    "modularity": (lambda x, y: repgraph.modularity(repgraph.knn_graph(x), y, negative="signed"), "O S R P"),
    "modularity, Euclidean graph": (
        lambda x, y: repgraph.modularity(repgraph.knn_graph(x, metric="euclidean"), y),
        "O S T T1 P",
    ),
    "class_separation": (repgraph.class_separation, "O S R P"),
    "motif_ratio": (lambda x, y: s.motif_ratio(repgraph.knn_graph(x, 5), y), "O S R P"),
}


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """Two related layers (32, 5) and (32, 6), labels in three classes, and the generator for what follows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(32) % 3
    x = _normal(generator, 32, 5) + _normal(generator, 3, 5)[labels]
    y = torch.tanh(x @ _normal(generator, 5, 6)) + 0.3 * _normal(generator, 32, 6)
    return x, y, labels, generator


def before_and_after(name: str, change: str, seed: int) -> tuple[float, float]:
    """A metric's value before and after the change."""
    x, y, labels, generator = draw(seed)
    pair = name in PAIRS
    metric = (PAIRS if pair else LAYERS)[name][0]
    first, second = (x, y) if pair else (y, labels)
    before = metric(first, second)
    if change == "P":
        order = torch.randperm(len(x), generator=generator)
        return before, metric(first[order], second[order])
    changed = CHANGES[change][1](y, generator)
    return before, metric(first, changed) if pair else metric(changed, second)


def invariant(name: str, change: str) -> bool:
    """What the table says."""
    return change in (PAIRS | LAYERS)[name][1].split()
