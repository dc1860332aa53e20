"""Redundancy of a block, read off the graph of the last representation: how far it moves like samples apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repgraph.graph import Graph, knn_graph
from repgraph.metrics.block_influence import CHUNK, block_influence, check_known, pair_of


def redundancy(x: Tensor, y: Tensor, z: Tensor | Graph, *, k: int = 5) -> float:
    r"""How much a block's change concerns what the network ends up treating alike; at least 0, low = redundant.

    With r = y - x and the k nearest neighbours of every sample in the last representation z, W_u is the mean of \|u_i -
    u_j\|^2 over the edges i -> j of that graph, D_y the mean of \|y_i - y_j\|^2 over all other pairs, and BI the
    `block_influence`, the mean of 1 - cos(x_i, y_i):

    sqrt(BI * W_r / sqrt(W_y (D_y - W_y))).

    The second factor is the geometric mean of W_r / W_y, the change against the spread among neighbours of z, and
    W_r / (D_y - W_y), the change against what sets them apart from all others at that depth.

    Parameters
    ----------
    x, y
        Input and output of the block, of one shape (n, ...): rows are samples, or tokens (n_tokens, d) of any samples.
        Trailing axes are flattened.
    z
        The last representation of the same rows, (n, ...), or its graph ``knn_graph(z, k, symmetrize="none")``.
    k
        Neighbours per row in the graph of z.

    Returns
    -------
    float
        At least 0, without unit; 0 if the block changes nothing.

    Raises
    ------
    ValueError
        If x and y differ in shape, are not finite, or have other rows than z; if k is out of range or the graph
        undirected; if neighbours of z are all equal at y, or further apart than other pairs: then y does not show yet
        what z tells apart.

    Notes
    -----
    Invariant to one orthogonal map and one scale of x and y, and to the order of the samples. Nothing of the model
    runs: one capture gives it for all blocks. Time O(n k d), float64, memory bounded.

    References
    ----------
    Ours, not from a paper; docs/layer_scores.md has the evidence.

    Examples
    --------
    >>> z = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    >>> x, y = z, z * torch.tensor([1.0, 0.5])  # W_r = 0.01, W_y = 0.01, D_y = 4.005, BI = 0.001235
    >>> redundancy(y, y, z, k=1), round(redundancy(x, y, z, k=1), 6)
    (0.0, 0.007862)
    """
    x, y = pair_of(x, y)
    graph = z if isinstance(z, Graph) else knn_graph(z, k, symmetrize="none")
    if not graph.directed:
        raise ValueError(f"z must be features or a graph of knn_graph(z, k, symmetrize='none'), got {graph!r}")
    if graph.n != len(x):
        raise ValueError(f"z must have the rows of x and y, expected {len(x)}, got {graph.n}")
    i, j, _ = graph.edges()
    ends = (torch.tensor(end, dtype=torch.int64, device=x.device) for end in (i, j))
    moved, near, far = (float(part) for part in _redundancy(x.flatten(1), y.flatten(1), *ends))
    check_known(moved + near + far, x, y, None)
    if not 0 < near < far < math.inf:
        raise ValueError(
            "neighbours of z must differ at y and be nearer to each other than other pairs, got mean squared distances "
            f"{near:.3g} and {far:.3g}"
        )
    turned = block_influence(x.flatten(1), y.flatten(1))
    return math.sqrt(turned * moved / (math.sqrt(near) * math.sqrt(far - near)))


def _redundancy(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W_r, W_y and D_y over the edges i -> j, in float64."""
    n, m = len(x), len(i)
    moved = torch.zeros((), dtype=torch.float64, device=x.device)
    near, spread = moved.clone(), moved.clone()
    step = max(1, CHUNK // x.shape[1])
    for start in range(0, m, step):
        a, b = i[start : start + step], j[start : start + step]
        at_y = y[a].double() - y[b].double()
        near += at_y.square().sum()
        moved += (at_y - (x[a].double() - x[b].double())).square().sum()
    mean = y.mean(0, dtype=torch.float64)
    for start in range(0, n, step):
        spread += (y[start : start + step].double() - mean).square().sum()
    return moved / m, near / m, (2 * n * spread - near) / (n * (n - 1) - m)
