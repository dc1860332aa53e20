"""Soft cluster pruning (ASCP-style): make filters alike during training, then merge those that coincide.

A reconstruction from the abstract of Niu et al., "ASCP: Asymptotic Soft Cluster Pruning for Deep Neural Networks",
arXiv 2206.08186, without public code; its results are not the paper's. From there: similar filters are clustered and
rebuilt to be redundant, at a rate that grows, then merged by channel addition. K-means, means and merge are as in Ding
et al., "Centripetal SGD", CVPR 2019, the exponential schedule as in He et al., "Asymptotic Soft Filter Pruning", 2018.

A training loop does this at the start of epoch t of T in every layer of c filters that is to lose a share p of them:

    k = c - int(c * rate_schedule("exponential", t, T, p) + 1e-9)
    reconstruct_(layer, cluster_filters(layer.weight, k), norm)

and once more at the end, t = T, with `merge_clusters` directly behind it: in between, gradients draw filters apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Literal, TypeAlias

import torch
from scipy.optimize import brentq
from sklearn.cluster import KMeans
from torch import Tensor, nn

from repgraph.activations.layers import unwrap

Columns: TypeAlias = str | Sequence[str] | Mapping[str, int | Tensor]
Side: TypeAlias = Literal["out", "in"]

_CONV = nn.modules.conv._ConvNd
_NORM = nn.modules.batchnorm._BatchNorm


def cluster_filters(weight: Tensor, n_clusters: int, *, seed: int = 0, init: Tensor | None = None) -> Tensor:
    """Clusters of similar filters: k-means of the flattened filters, by squared Euclidean distance.

    Parameters
    ----------
    weight
        (C, ...), filters first. Small filters share a cluster whatever their direction; at unit norm, direction alone
        counts.
    n_clusters
        1 to C; C means each filter alone, also where some are equal.
    seed
        Of the 10 k-means++ starts, of which the best counts.
    init
        Earlier labels (C,) of n_clusters clusters, whose means are the only start instead.

    Returns
    -------
    Tensor
        Labels (C,), int64 on the CPU, numbered by the clusters' lowest members. Fewer than n_clusters, with a warning
        of scikit-learn, where fewer filters are distinct.

    Raises
    ------
    ValueError
        If n_clusters is out of range, weight is not finite, or init has other labels.

    Examples
    --------
    >>> cluster_filters(torch.tensor([[0.0, 0], [0, 1], [10, 0], [10, 2]]), 2)
    tensor([0, 0, 1, 1])
    """
    if weight.ndim < 2 or not weight.numel() or not bool(weight.isfinite().all()):
        raise ValueError(f"weight must be finite, of shape (C, ...), got shape {tuple(weight.shape)}")
    x = weight.detach().cpu().double().flatten(1)
    if not 1 <= n_clusters <= len(x):
        raise ValueError(f"n_clusters must be 1 to {len(x)}, the number of filters, got {n_clusters}")
    if n_clusters == len(x):
        return torch.arange(len(x))
    if init is None:
        kmeans = KMeans(n_clusters, n_init=10, random_state=seed)
    else:
        lead = _leaders(init, len(x))
        starts = _cluster_means(x, lead)[lead == torch.arange(len(x))]
        if len(starts) != n_clusters:
            raise ValueError(f"init must have {n_clusters} distinct labels, as n_clusters, got {len(starts)}")
        kmeans = KMeans(n_clusters, n_init=1, init=starts.numpy())
    lead = _leaders(torch.from_numpy(kmeans.fit_predict(x.numpy())), len(x))
    return (lead == torch.arange(len(x))).cumsum(0)[lead] - 1


@torch.no_grad()
def reconstruct_(module: nn.Module, labels: Tensor, norm: nn.Module | None = None) -> None:
    """Set every filter, in place, to the mean of its cluster, which changes them least: by the inertia of the clusters.

    Parameters
    ----------
    module
        Linear layer or ungrouped convolution with C filters. A bias takes part.
    labels
        Cluster of each filter, (C,) integers.
    norm
        Batch norm of C channels behind it; running statistics are averaged too. Of these the mean is then exact, the
        variance is not: `reestimate_batch_norm_` measures it anew.

    Raises
    ------
    ValueError
        If a module is grouped or of another kind, or the sizes differ.

    Examples
    --------
    >>> layer = nn.Linear(2, 4, bias=False)
    >>> layer.weight.data = torch.tensor([[0.0, 0], [0, 1], [10, 0], [10, 2]])
    >>> reconstruct_(layer, torch.tensor([0, 0, 1, 1]))
    >>> layer.weight.tolist()
    [[0.0, 0.5], [0.0, 0.5], [10.0, 1.0], [10.0, 1.0]]
    """
    parts = _state(module, "module", "out") + ([] if norm is None else _state(norm, "norm", "out"))
    leads = [_leaders(labels, len(rows)) for _, rows, _ in parts]  # before anything has changed
    for (_, rows, _), lead in zip(parts, leads, strict=True):
        rows.copy_(_cluster_means(rows, lead.to(rows.device)))


def rate_schedule(
    kind: Literal["linear", "exponential", "cosine"],
    t: float,
    T: float,
    goal: float,
    *,
    D: float = 0.125,
    q: float = 0.75,
) -> float:
    """Share of the filters to be without at time t of T, rising from 0 to the goal.

    linear: goal t / T; cosine: goal (1 - cos(pi t / T)) / 2; exponential: goal (1 - exp(-k t)) / (1 - exp(-k T)), where
    k is such that it is q goal at t = D T.

    Parameters
    ----------
    kind
        Which schedule.
    t, T
        Time so far and in all, 0 <= t <= T, in epochs or any other unit.
    goal
        Share at the end, in [0, 1).
    D, q
        0 < D < q < 1, of the exponential schedule.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> round(rate_schedule("exponential", 25, 200, 0.4), 9)
    0.3
    """
    if not (0 <= t <= T and T > 0 and 0 <= goal < 1 and 0 < D < q < 1):
        raise ValueError(
            f"must be 0 <= t <= T, T > 0, 0 <= goal < 1 and 0 < D < q < 1, got t={t}, T={T}, goal={goal}, D={D}, q={q}"
        )
    if kind == "linear":
        return goal * (t / T)
    if kind == "cosine":
        return goal * (1 - math.cos(math.pi * t / T)) / 2
    if kind != "exponential":
        raise ValueError(f"kind must be 'linear', 'exponential' or 'cosine', got {kind!r}")

    def risen(time: float, x: float) -> float:
        """Share of the goal at this share of the time, for x = k T."""
        return math.expm1(-x * time) / math.expm1(-x) if x else time

    return goal * risen(t / T, brentq(lambda x: risen(D, x) - q, 0, -2 * math.log1p(-q) / D))


@torch.no_grad()
def merge_clusters(
    model: nn.Module,
    layer: str | Sequence[str],
    labels: Tensor,
    consumers: Columns,
    *,
    norm: Columns = (),
    tol: float = 1e-6,
) -> nn.Module:
    """A smaller copy that keeps one filter of each cluster of equal ones; the others' columns are added to its own.

    Where filters i and j give the same for every input, V[:, i] <- V[:, i] + V[:, j] in each consumer V, then j goes:
    exact if what lies between treats each channel alone and alike (batch norm, activation, pooling).

    Parameters
    ----------
    model
        Untouched.
    layer
        Linear layer or ungrouped convolution with C filters; or all those whose outputs are added, by the same labels.
    labels
        Cluster of each filter, (C,) integers. Its lowest member stays.
    consumers
        All that reads these filters, linear or ungrouped. A name where it reads nothing else; linear layers may have a
        block of columns per filter (flatten). Otherwise name -> column of filter 0, or name -> columns (C, r) of each.
    norm
        Batch norms in between, in the same forms.
    tol
        How far apart numbers of a cluster's members may be, in layer and norm.

    Raises
    ------
    ValueError
        If members differ by more than tol, a layer or consumer is grouped or of another kind, or columns do not fit.

    Notes
    -----
    Readers that are not named go unnoticed until the copy runs: compare its outputs with the model's.

    Examples
    --------
    >>> model, labels = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.tensor([0, 1, 0])
    >>> reconstruct_(model[0], labels)
    >>> smaller, x = merge_clusters(model, "0", labels, "2"), torch.rand(5, 2)
    >>> smaller[0], torch.allclose(smaller(x), model(x), atol=1e-6)
    (Linear(in_features=2, out_features=2, bias=True), True)
    """
    smaller = deepcopy(unwrap(model))
    lead = _leaders(labels, len(labels))
    gone = lead != torch.arange(len(lead))
    for given in (layer, norm):
        for module, name, columns in _columns(smaller, given, len(lead), "out"):
            for key, rows, _ in _state(module, name, "out"):
                gap = float((rows[columns] - rows[columns[lead]]).abs().max())
                if not gap <= tol:
                    raise ValueError(f"{name!r}: members of a cluster must agree to {tol}, {key} is {gap:.3g} apart")
            _leave_out(module, name, "out", columns[gone])
    for module, name, columns in _columns(smaller, consumers, len(lead), "in"):
        [(_, rows, _)] = _state(module, name, "in")
        rows.index_add_(0, columns[lead[gone]].flatten().to(rows.device), rows[columns[gone].flatten()])
        _leave_out(module, name, "in", columns[gone])
    return smaller


def _leaders(labels: Tensor, c: int) -> Tensor:
    """The lowest member of each filter's cluster, (c,) on the CPU."""
    if labels.shape != (c,) or labels.is_floating_point():
        raise ValueError(f"labels must be {c} integers, one per filter, got {labels.dtype} {tuple(labels.shape)}")
    return (labels[:, None] == labels).byte().argmax(1).cpu()


def _cluster_means(x: Tensor, lead: Tensor) -> Tensor:
    """The cluster mean for each row of x, float64; equal rows stay as they are, to the last bit."""
    base = x.double()[lead]
    change = torch.zeros_like(base).index_add_(0, lead, x - base)
    return base + (change / lead.bincount(minlength=len(x)).view(-1, *[1] * (x.ndim - 1)))[lead]


def _state(module: nn.Module, name: str, side: Side) -> list[tuple[str, Tensor, int]]:
    """What a module holds for each output (or input) channel: attribute, a view with the channels first, their axis.

    Raises
    ------
    ValueError
        If it is grouped or of a kind that cannot be merged.
    """
    weighted = isinstance(module, nn.Linear) or (isinstance(module, _CONV) and module.groups == 1)
    keys = ("weight", "bias", "running_mean", "running_var") if side == "out" else ("weight",)
    own = [(key, values) for key in keys if (values := getattr(module, key, None)) is not None]
    if not own or not (weighted or (isinstance(module, _NORM) and side == "out")):
        kinds = "linear layer, ungrouped convolution" + " or batch norm" * (side == "out")
        raise ValueError(f"{name!r} must be a {kinds}, is {module}")
    swapped = isinstance(module, _CONV) and module.transposed  # weight (in, out, ...) in place of (out, in, ...)
    axis = int((side == "in") != swapped)
    return [(key, v.movedim(axis, 0), axis) if v.ndim > 1 else (key, v, 0) for key, v in own]


def _columns(model: nn.Module, given: Columns, c: int, side: Side) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Modules, names and columns (c, r) of what `Columns` says."""
    modules = dict(model.named_modules())
    for name in [given] if isinstance(given, str) else given:
        if name not in modules:
            raise ValueError(f"model has no module {name!r}")
        module = modules[name]
        size = len(_state(module, name, side)[0][1])
        place = given[name] if isinstance(given, Mapping) else None
        if isinstance(place, Tensor):
            columns = place.cpu()
        elif place is not None:
            columns = torch.arange(place, place + c)[:, None]
        else:
            flat = isinstance(module, nn.BatchNorm1d) or (side == "in" and isinstance(module, nn.Linear))
            columns = torch.arange(size).view(c, -1) if size == c or (flat and size % c == 0) else torch.empty(0)
        fits = columns.ndim == 2 and len(columns) == c and not columns.is_floating_point()
        fits = fits and bool(((columns >= 0) & (columns < size)).all())
        if not fits or bool((columns.flatten().bincount() > 1).any()):
            raise ValueError(f"{name!r} must have columns of its own for {c} filters among its {size}, got {place}")
        yield module, name, columns


def _leave_out(module: nn.Module, name: str, side: Side, columns: Tensor) -> None:
    for key, rows, axis in _state(module, name, side):
        kept = torch.ones(len(rows), dtype=torch.bool).index_fill(0, columns.flatten(), False).to(rows.device)
        old, left = getattr(module, key), rows[kept].movedim(0, axis).contiguous()
        setattr(module, key, nn.Parameter(left, old.requires_grad) if isinstance(old, nn.Parameter) else left)
    size = next(key for key in (f"{side}_channels", f"{side}_features", "num_features") if hasattr(module, key))
    setattr(module, size, int(kept.sum()))
