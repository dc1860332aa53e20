"""Central Filter: which filters of a layer another one stands for, and how the next layer takes that up."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform
from torch import Tensor, nn
from torch.nn.functional import normalize

from repgraph.activations.forward import Forward
from repgraph.graph import Graph
from repgraph.scores.maps import stream_maps

CHUNK = 2**21  # numbers in float64 at a time

# Similarity by kind of map: ordinary, sums to 0, constant, all 0; two ordinary ones have their correlation instead.
_RULES = ((0, -1, 0, -1), (-1, 1, -1, 1), (0, -1, 1, 1), (-1, 1, 1, 1))


def map_similarity(maps: Tensor) -> Tensor:
    """Mean correlation of the maps of each two channels over the images, in [-1, 1]; 1 = one pattern.

    D_ij = (1/n) sum over images of: 1 if both maps are constant or both sum to 0; else -1 if one of them sums to 0;
    else 0 if one of them is constant; else their Pearson correlation over the positions.

    Parameters
    ----------
    maps
        Feature maps behind the activation, (n, C, ...) with at least one axis of positions.

    Returns
    -------
    Tensor
        Shape (C, C), float64, symmetric, diagonal 1, on the device of the maps.

    Raises
    ------
    ValueError
        If maps are not finite or not of shape (n, C, ...).

    Notes
    -----
    Ignores amplitude: a factor > 0 and an offset per channel change no correlation. Dead channels have similarity 1
    with each other and -1 with the others. Maps of one position are constant: all similarities are 1. In float64.

    References
    ----------
    Duan et al., "Network Compression via Central Filter", arXiv 2112.05493. A constant map that is not 0 beside an
    ordinary one gives NaN in the authors' code and 0 here.

    Examples
    --------
    >>> map_similarity(torch.tensor([[[0.0, 1, 2, 3], [1, 1, 3, 3], [0, 0, 0, 0]]]))[0]
    tensor([ 1.0000,  0.8944, -1.0000], dtype=torch.float64)
    """
    return _map_similarity(_checked_maps(maps))


def _checked_maps(maps: Tensor) -> Tensor:
    """Maps as (n, C, positions)."""
    if maps.ndim < 3 or maps.numel() == 0:
        raise ValueError(f"maps must have shape (n, channels, ...) with positions, got {tuple(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError("maps must be finite, got NaN or infinite values")
    return maps.detach().flatten(2)


def _map_similarity(maps: Tensor) -> Tensor:
    total = torch.zeros(maps.shape[1], maps.shape[1], dtype=torch.float64, device=maps.device)
    for part in torch.split(maps, max(1, CHUNK // maps[0].numel())):
        total += _similarity_sum(part.double())
    return ((total + total.T) / (2 * len(maps))).clamp(-1, 1).fill_diagonal_(1)


def _similarity_sum(x: Tensor) -> Tensor:
    """Sum over the images of x (n, C, m) of the similarities of their channels, (C, C)."""
    kind = (x.sum(2) == 0) + 2 * (x.amax(2) == x.amin(2))
    z = normalize(x - x.mean(2, keepdim=True), dim=2, eps=1e-300).masked_fill(kind[..., None] > 0, 0)
    z = z.transpose(0, 1).flatten(1)  # (C, n m): one product for all images
    member = torch.eye(4, dtype=x.dtype, device=x.device)[kind]  # (n, C, 4)
    ruled = member @ torch.tensor(_RULES, dtype=x.dtype, device=x.device)
    return z @ z.T + ruled.transpose(0, 1).flatten(1) @ member.transpose(0, 1).flatten(1).T


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CentralPlan:
    """Which filters of a layer go, and which one stands for each of them."""

    keep: tuple[int, ...]
    """Filters that stay, ascending."""
    assigned: dict[int, int]
    """Filter that goes -> the kept filter of its component."""
    threshold: float
    """Edges join filters of similarity above it."""
    centrality: Tensor
    """Closeness of each filter to its neighbours, (C,), float64; 0 without neighbours."""
    graph: Graph
    """The threshold graph over the C filters; weight = similarity."""


def central_filters(similarity: Tensor, n_remove: int) -> CentralPlan:
    """Filters that the most central filter of their component of the threshold graph can stand for.

    Filters of D_ij > t are joined, with t such that the filters are `n_remove` more than the components. Of each
    component the filter of the highest closeness deg_i / (sum over neighbours of 1024 - D_ij) stays, which orders by
    mean similarity to the neighbours; the others go.

    Parameters
    ----------
    similarity
        D of `map_similarity`, (C, C), in [-1, 1].
    n_remove
        How many filters go, 0 <= n_remove < C.

    Returns
    -------
    CentralPlan
        Exactly `n_remove` filters go, each assigned to a filter that stays.

    Raises
    ------
    ValueError
        If similarity is not square, not symmetric to 1e-6 or not finite, or n_remove is out of range.

    Notes
    -----
    t is where the authors' bisection of [min D, max D] in steps of 1e-7 stops: any t between two merges of single
    linkage gives the same components, but which further pairs it joins moves the closeness. Where ties leave no t with
    the exact count, it is the last one seen that would remove more, and the neighbours of the filters of the highest
    closeness go until they are `n_remove`. Of equal closeness, as that of two filters joined to each other only, the
    highest index stays. Kept sets are not nested in n_remove; `distinctness` is one score per filter. Dead channels
    form a component: one of them stays.

    References
    ----------
    Duan et al., arXiv 2112.05493. The authors remove ceil(C p) filters and assign each to the first neighbour visited,
    which often goes itself: its weights are then lost. Here each is assigned to the one that stays.

    Examples
    --------
    >>> similarity = torch.tensor([[1.0, 0.98, 0.89, -1], [0.98, 1, 0.85, -1], [0.89, 0.85, 1, -1], [-1, -1, -1, 1]])
    >>> plan = central_filters(similarity, 2)
    >>> plan.keep, plan.assigned, plan.graph.num_edges
    ((0, 3), {1: 0, 2: 0}, 3)
    """
    s = _checked_similarity(similarity)
    n_remove, c = operator.index(n_remove), len(s)
    if not 0 <= n_remove < c:
        raise ValueError(f"n_remove must lie in 0..{c - 1} for {c} filters, got {n_remove}")
    threshold = _threshold(s, n_remove)
    edge = s > threshold
    np.fill_diagonal(edge, False)
    degree = edge.sum(1)
    closeness = degree / (1024 - s).sum(1, where=edge, initial=1e-300)  # 0 without neighbours
    component = connected_components(edge, directed=False)[1]

    last_first = np.argsort(closeness, kind="stable")
    visit, central = np.empty(c, dtype=int), np.empty(c, dtype=int)
    visit[last_first] = np.arange(c)[::-1]
    central[component[last_first]] = last_first  # the first one visited is written last
    central = central[component]
    others = np.flatnonzero(central != np.arange(c))
    reached = np.where(edge, visit, c).min(1)[others]  # when the first neighbour of each is visited
    gone = np.sort(others[np.argsort(reached, kind="stable")][:n_remove])

    row, col = np.nonzero(np.triu(edge))
    settings = {"threshold": threshold, "n_remove": n_remove}
    return CentralPlan(
        keep=tuple(np.delete(np.arange(c), gone).tolist()),
        assigned=dict(zip(gone.tolist(), central[gone].tolist(), strict=True)),
        threshold=threshold,
        centrality=torch.from_numpy(closeness),
        graph=Graph.from_edges(c, row, col, s[row, col], settings=settings),
    )


def distinctness(similarity: Tensor) -> Tensor:
    """1 - the similarity at which another filter of the layer takes over from each, in [0, 2]; high = keep.

    Clusters of filters merge by single linkage, the most similar first. At each merge the two clusters' representatives
    meet: the one of the lower mean similarity to the merged cluster goes, with the score 1 - the similarity of the
    merge. The last one standing has 3, above all.

    Parameters
    ----------
    similarity
        D of `map_similarity`, (C, C), in [-1, 1].

    Returns
    -------
    Tensor
        Shape (C,), float64, on the CPU.

    Raises
    ------
    ValueError
        If similarity is not square, not symmetric to 1e-6 or not finite.

    Notes
    -----
    Without the number of filters to remove that `central_filters` needs, and nested: what goes at a low ratio goes at
    a high one. Of equal means (always in a cluster of two) the highest index stays, as there. Filters that merge at
    one similarity tie.

    References
    ----------
    Ours, after Duan et al., arXiv 2112.05493, who have no score per filter.

    Examples
    --------
    >>> distinctness(torch.tensor([[1.0, 0.75, 0.25], [0.75, 1, 0.5], [0.25, 0.5, 1]])).tolist()
    [0.25, 3.0, 0.5]
    """
    s = _checked_similarity(similarity)
    merges = _merges(s)
    np.fill_diagonal(s, 0)
    scores = np.full(len(s), 3.0)
    standing = {i: i for i in range(len(s))}  # cluster -> representative
    total = dict(enumerate(s))  # cluster -> similarity of each filter to its members, summed
    for cluster, (a, b, negative, _) in enumerate(merges, len(s)):
        total[cluster] = joint = total.pop(a) + total.pop(b)
        goes, standing[cluster] = sorted((standing.pop(a), standing.pop(b)), key=lambda i: (joint[i], i))
        scores[goes] = 1 + negative
    return torch.from_numpy(scores)


def central_filter_scores(
    model: nn.Module,
    data: object,
    layers: Sequence[str] | None = None,
    *,
    samples: int | None = 128,
    batch_size: int = 64,
    forward: Forward | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """`distinctness` of the filters of each layer, from their maps of some images; high = keep.

    Parameters
    ----------
    model, data, layers, batch_size, forward, progress
        As in `repgraph.scores.maps.stream_maps`; None is every convolution.
    samples
        Number of images; the authors take one batch of 128.

    Returns
    -------
    dict of str to Tensor
        Layer -> (C,), float64, on the CPU.

    Raises
    ------
    ValueError
        As `stream_maps` and `map_similarity`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> central_filter_scores(model, torch.randn(8, 1, 6, 6), samples=8, progress=False)["0"].shape
    torch.Size([4])
    """
    similarity = stream_maps(
        model,
        data,
        map_similarity,
        layers,
        combine="mean",
        samples=samples,
        batch_size=batch_size,
        forward=forward,
        progress=progress,
    )
    return {name: distinctness(d) for name, d in similarity.items()}


def map_coefficients(maps: Tensor, plan: CentralPlan) -> Tensor:
    """Factor that brings the map of the kept filter c closest to that of the removed p: <X_c, X_p> / <X_c, X_c>.

    Parameters
    ----------
    maps
        Feature maps (n, C, ...).
    plan
        Which filter goes where.

    Returns
    -------
    Tensor
        Shape (C,), float64, on the device of the maps: the factor of each removed filter (0 where the kept one is
        dead), 1 for the kept ones.

    Raises
    ------
    ValueError
        If maps are not finite, not (n, C, ...), or of another number of channels than the plan.

    References
    ----------
    Ours: similarity ignores amplitude, which the authors' sum of weights does not.

    Examples
    --------
    >>> plan = central_filters(torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), 1)
    >>> plan.assigned, map_coefficients(torch.tensor([[[3.0, 6], [1, 2], [2, 0]]]), plan).tolist()
    ({0: 1}, [3.0, 1.0, 1.0])
    """
    x = _checked_maps(maps)
    if x.shape[1] != len(plan.centrality):
        raise ValueError(f"maps must have {len(plan.centrality)} channels as the plan, got {x.shape[1]}")
    gone, kept = list(plan.assigned), list(plan.assigned.values())
    central = x[:, kept].double()
    norm = central.square().sum((0, 2))
    factors = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    factors[gone] = torch.where(norm > 0, (central * x[:, gone]).sum((0, 2)) / norm, 0)
    return factors


def absorb_columns_(
    module: nn.Module,
    plan: CentralPlan,
    *,
    offset: int | Tensor = 0,
    coefficients: Tensor | None = None,
    repeat: int = 1,
) -> None:
    """Let the kept filters do the work of the removed ones in the layer that reads them, in place.

    W[:, c] += a_p W[:, p], W[:, p] = 0, for each removed p assigned to c.

    Parameters
    ----------
    module
        Linear layer or convolution without groups that reads the C filters.
    plan
        Which filter goes where.
    offset
        Channel of module's input at which the C filters start, as behind a concatenation; or the input columns of each
        filter, int64, (C, r).
    coefficients
        a_p, (C,), as `map_coefficients` gives them; read at removed filters only. None is 1, as the authors do.
    repeat
        Columns per filter: positions of a map that a Linear reads flattened.

    Raises
    ------
    ValueError
        If module is of another kind or grouped, has no such columns, or coefficients are of another shape.

    Notes
    -----
    Changes module's output by sum over p of W[:, p] (a_p X_c - X_p): none where X_p = a_p X_c. The columns of
    the removed filters become 0, so that dropping them changes nothing further, and neither does a second call.

    References
    ----------
    Duan et al., arXiv 2112.05493, whose code keeps the change only if the accuracy on test data does not fall.

    Examples
    --------
    >>> plan = central_filters(torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), 1)
    >>> layer = nn.Linear(3, 1)
    >>> layer.weight.data = torch.tensor([[2.0, -1, 5]])
    >>> absorb_columns_(layer, plan)
    >>> layer.weight.tolist()
    [[0.0, 1.0, 5.0]]
    """
    c = len(plan.centrality)
    columns = input_columns(module, offset, c, repeat)
    if getattr(module, "groups", 1) != 1:
        raise ValueError(f"module must have no groups, got {module.groups}")
    if coefficients is not None and coefficients.shape != (c,):
        raise ValueError(f"coefficients must have shape ({c},), got {tuple(coefficients.shape)}")
    weight = module.get_parameter("weight")
    columns = columns.to(weight.device)
    factor = torch.ones(c) if coefficients is None else coefficients.detach()
    gone, kept = list(plan.assigned), list(plan.assigned.values())
    with torch.no_grad():
        source = columns[gone].flatten()
        scale = factor[gone].to(weight).repeat_interleave(columns.shape[1])
        moved = weight[:, source] * scale.view(-1, *[1] * (weight.ndim - 2))
        weight.index_add_(1, columns[kept].flatten(), moved)
        weight.index_fill_(1, source, 0)


def input_columns(module: nn.Module, where: int | Tensor, channels: int, repeat: int = 1) -> Tensor:
    """Input columns of a Linear or convolution that read each of some channels, (channels, r), int64.

    `where` is the channel of its input at which they start, each `repeat` columns wide, or the columns themselves.

    Raises
    ------
    ValueError
        If module is of another kind, or has no such columns.
    """
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise ValueError(f"module must be a Linear or Conv layer, got {type(module).__name__}")
    width = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    if not isinstance(where, Tensor):
        where = where * repeat + torch.arange(channels * repeat).view(channels, repeat)
    elif where.dtype != torch.int64 or where.ndim != 2 or len(where) != channels:
        raise ValueError(
            f"columns must be int64 of shape ({channels}, r), one row per channel, "
            f"got {where.dtype} of shape {tuple(where.shape)}"
        )
    if where.numel() and not 0 <= int(where.min()) <= int(where.max()) < width:
        raise ValueError(f"{module} has input columns 0..{width - 1}, got {int(where.min())}..{int(where.max())}")
    return where


def _checked_similarity(similarity: Tensor) -> np.ndarray:
    """The similarity as a symmetric array of its own."""
    s = torch.as_tensor(similarity).detach().cpu().double().numpy()
    if s.ndim != 2 or s.shape[0] != s.shape[1] or not len(s):
        raise ValueError(f"similarity must have shape (C, C), got {s.shape}")
    if not np.isfinite(s).all():
        raise ValueError("similarity must be finite, got NaN or infinite values")
    if (gap := np.abs(s - s.T).max()) > 1e-6:
        raise ValueError(f"similarity must be symmetric, got entries that differ by {gap:.3g} from their mirror image")
    return np.asarray((s + s.T) / 2)


def _merges(s: np.ndarray) -> np.ndarray:
    """Single linkage, the most similar clusters first: rows of both clusters, minus their similarity, size."""
    if len(s) == 1:
        return np.empty((0, 4))
    return np.asarray(linkage(-squareform(s, checks=False), "single"))


def _threshold(s: np.ndarray, n_remove: int) -> float:
    distances = _merges(s)[:, 2]
    step = 1e-7 * max(1.0, float(np.abs(s).max()))
    low, high = float(s.min()) - step, float(s.max()) + step
    last = low
    while low < high:
        t = (low + high) / 2
        removable = np.searchsorted(distances, -t)  # merges above t
        if removable == n_remove:
            return t
        if removable > n_remove:
            last, low = t, t + step
        else:
            high = t - step
    return last
