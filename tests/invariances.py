"""Which metric is invariant to what: the table of docs/invariances.md, every cell of which is tested.

A measure of two layers has one of them changed; a metric of one layer and labels has its layer changed; metrics of a
block's input and output, of feature maps and of gates have changes of their own.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import repgraph
from repgraph.metrics import complexity as c
from repgraph.metrics import similarity as s
from repgraph.metrics.angular_distance import angular_distance
from repgraph.metrics.block_influence import block_influence
from repgraph.metrics.feature_entropy import feature_birth, feature_entropy
from repgraph.metrics.redundancy import redundancy
from repgraph.metrics.relative_residual import relative_residual
from repgraph.scores.chip import channel_independence

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


def _common_order(x, generator):
    order = torch.randperm(x.shape[-1], generator=generator)
    return x[..., order, :][..., order]


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


def _both(change):
    """One change, the same for what enters and what leaves a block."""
    return lambda x, y, generator: change(torch.cat((x, y)), generator).chunk(2)


def _row_scales(x, generator):
    """Mild ones: neighbours in the last representation must stay nearer to each other than other samples."""
    return torch.exp(0.3 * _normal(generator, len(x), 1))


def _row_scale_of_both(x, y, generator):
    scale = _row_scales(x, generator)
    return scale * x, scale * y


BLOCK_CHANGES: dict[str, tuple[str, Callable]] = {
    "O": ("orthogonal map of the features, the same for input and output", _both(_orthogonal)),
    "S": ("isotropic scale of both", _both(CHANGES["S"][1])),
    "S1": ("isotropic scale of the output alone", lambda x, y, generator: (x, CHANGES["S"][1](y, generator))),
    "R": ("positive scale per sample, the same for both", _row_scale_of_both),
    "R1": ("positive scale per sample of the output alone", lambda x, y, g: (x, _row_scales(y, g) * y)),
    "T": ("translation, the same for both", _both(_translation)),
    "L": ("invertible linear map of the features, the same for both", _both(_linear)),
    "P": ("order of the samples of both, and of the last representation", None),
}  # fmt: skip

BLOCKS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], float], str]] = {
    "block_influence": (lambda x, y, z: block_influence(x, y), "O S S1 R R1 P"),
    "angular_distance": (lambda x, y, z: angular_distance(x, y), "O S S1 R R1 P"),
    "relative_residual": (lambda x, y, z: relative_residual(x, y), "O S R P"),
    "redundancy": (redundancy, "O S P"),
}


MAP_CHANGES: dict[str, tuple[str, Change]] = {
    "S": ("positive scale", lambda x, generator: 3.7 * x),
    "M": ("increasing function of the values", lambda x, generator: torch.exp(x)),
    "T": ("transpose", lambda x, generator: x.mT),
    "C": ("one order of rows and columns", _common_order),
    "D": ("values on the diagonal", lambda x, g: x + torch.diag_embed(_normal(g, *x.shape[:-1]))),
    "F": ("horizontal flip", lambda x, generator: x.flip(-1)),
    "H": ("shift by one pixel, cyclic", lambda x, generator: x.roll(1, -1)),
    "P": ("order of the samples", lambda x, g: x[torch.randperm(len(x), generator=g)]),
}  # fmt: skip

MAPS: dict[str, tuple[Callable[[Tensor], float], str]] = {
    "feature_birth, mean": (lambda x: float(feature_birth(x).double().mean()), "S M T C D P"),
    "feature_entropy": (lambda x: float(feature_entropy(feature_birth(x)).entropy), "S M T C D P"),
    "channel_independence, sum (maps as channels)": (lambda x: float(channel_independence(x[None]).sum()), "T C F H P"),
}

GATE_CHANGES: dict[str, tuple[str, Change]] = {
    "P": ("order of the gates", lambda x, g: x[:, torch.randperm(x.shape[1], generator=g)]),
    "F": ("some gates the other way round", lambda x, g: x ^ (torch.rand(x.shape[1], generator=g) > 0.5)),
    "R": ("every gate three times", lambda x, generator: x.repeat(1, 3)),
    "C": ("constant gates added", lambda x, generator: torch.cat((x, torch.ones_like(x)), 1)),
    "I": ("an independent gate added", lambda x, g: torch.cat((x, torch.rand(len(x), 4, generator=g) > 0.5), 1)),
    "O": ("order of the samples and labels", None),
}

GATES: dict[str, tuple[Callable[[Tensor, Tensor], float], str]] = {
    "gate_entropy": (lambda x, y: c.gate_entropy(x, lam=0.05), "P F R O"),
    "gate_entropy, width=active": (lambda x, y: c.gate_entropy(x, lam=0.05, width="active"), "P F R C O"),
    "gate_entropy, estimator=plugin": (lambda x, y: c.gate_entropy(x, estimator="plugin"), "P F R C O"),
    "gate_label_information": (lambda x, y: c.gate_label_information(x, y, lam=0.05), "P F R O"),
    "activation_cross_entropy": (lambda x, y: c.activation_cross_entropy(x), "P F C O"),
    "total_correlation, estimator=plugin": (lambda x, y: c.total_correlation(x, estimator="plugin"), "P F C O"),
}

GROUPS: dict[str, tuple[dict, dict]] = {
    "of two layers": (CHANGES, PAIRS),
    "of one layer and labels": (CHANGES, LAYERS),
    "of a block's input and output": (BLOCK_CHANGES, BLOCKS),
    "of feature maps": (MAP_CHANGES, MAPS),
    "of gates": (GATE_CHANGES, GATES),
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
    if name in MAPS:
        maps = torch.relu(_normal(generator, 30, 8, 8))
        return MAPS[name][0](maps), MAPS[name][0](MAP_CHANGES[change][1](maps, generator))
    if name in BLOCKS:
        y = x + 0.5 * torch.tanh(x @ _normal(generator, 5, 5))
        z = y + 0.5 * torch.tanh(y @ _normal(generator, 5, 5))
        before = BLOCKS[name][0](x, y, z)
        if change == "P":
            order = torch.randperm(len(x), generator=generator)
            return before, BLOCKS[name][0](x[order], y[order], z[order])
        return before, BLOCKS[name][0](*BLOCK_CHANGES[change][1](x, y, generator), z)
    if name in GATES:
        x, generator = x > 0, torch.Generator().manual_seed(seed)
    pair = name in PAIRS
    metric = (PAIRS | LAYERS | GATES)[name][0]
    first, second = (x, y) if pair else (y, labels)
    if name in GATES:
        first = x
    before = metric(first, second)
    if change == ("O" if name in GATES else "P"):
        order = torch.randperm(len(x), generator=generator)
        return before, metric(first[order], second[order])
    if name in GATES:
        return before, metric(GATE_CHANGES[change][1](first, generator), labels)
    changed = CHANGES[change][1](y, generator)
    return before, metric(first, changed) if pair else metric(changed, second)


def invariant(name: str, change: str) -> bool:
    """What the table says."""
    return change in (PAIRS | LAYERS | BLOCKS | MAPS | GATES)[name][1].split()
