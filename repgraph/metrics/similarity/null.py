"""What chance gives: a measure of similarity after the samples of one layer are shuffled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repgraph.graph import Graph


def similarity_null(
    similarity: Callable[..., float],
    x: object,
    y: object,
    *,
    permutations: int = 20,
    seed: int = 0,
    **options: object,
) -> Tensor:
    """A similarity of two layers after random permutations of the samples of the second: what unrelated layers give.

    Both layers keep their own structure (hubs, widths, scales); only who is who is lost.

    Parameters
    ----------
    similarity
        A measure of `repgraph.metrics.similarity`, or any function of two tensors or graphs.
    x, y
        Features (n, ...), graphs or Gram matrices over the same samples.
    permutations
        How many permutations.
    seed
        Seed of the permutations.
    **options
        Passed to the measure.

    Returns
    -------
    Tensor
        Shape (permutations,), float64.

    Raises
    ------
    ValueError
        As the measure, or if permutations < 1.

    Examples
    --------
    >>> from repgraph.metrics.similarity import mutual_knn
    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> bool((similarity_null(mutual_knn, x, x, k=5) < 0.3).all())
    True
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.tensor(
        [similarity(x, permuted(y, generator), **options) for _ in range(permutations)],
        dtype=torch.float64,
        device="cpu",
    )


def can_permute(layer: object) -> bool:
    """Whether `permuted` is defined for a layer."""
    return isinstance(layer, Tensor | Graph) or hasattr(layer, "permuted")


def permuted(layer: object, generator: torch.Generator) -> object:
    """The layer with its samples in random order.

    Raises
    ------
    ValueError
        If the samples of such an object cannot be permuted.
    """
    if not can_permute(layer):
        raise ValueError(f"samples of a {type(layer).__name__} cannot be permuted")
    n = len(layer) if isinstance(layer, Tensor) else layer.n  # type: ignore[attr-defined]
    order = torch.randperm(n, generator=generator, device="cpu")
    if isinstance(layer, Graph):
        return layer.subgraph(order.numpy())
    if isinstance(layer, Tensor):
        return layer[order.to(layer.device)]
    return layer.permuted(order)  # type: ignore[attr-defined]
