"""Class separation of a layer's outputs (R^2 with cosine distance)."""

from __future__ import annotations

import torch
from torch import Tensor

from repgraph.labels import Labels, class_codes
from repgraph.neighbors import as_samples, row_norms


def class_separation(x: Tensor, labels: Labels) -> float:
    r"""Share of the mean cosine distance between samples that lies between the classes, R^2 = 1 - within / total.

    With unit rows u_i and class means m_c = mean of u_i in c: R^2 = 1 - mean_c(1 - \|m_c\|^2) /
    (1 - \|mean_c m_c\|^2). Equal to averaging 1 - cos over all n_c^2 ordered pairs of each class, over all C^2
    pairs of classes for the total. Unitless, at most 1 (each class one direction); 0 for one class.

    Parameters
    ----------
    x
        Samples, shape (n, ...); trailing axes are flattened.
    labels
        Class of each sample.

    Returns
    -------
    float
        R^2; nan if all samples point the same way.

    Raises
    ------
    ValueError
        If x is not a finite (n, ...) tensor or the labels do not fit.

    Notes
    -----
    Memory beyond x: C d numbers in float64 and one chunk of features. A zero row has distance 1 to everybody, itself
    included. Public codes that sum each pair once but divide by n_c^2 halve the distance within.

    References
    ----------
    Kornblith et al., "Why Do Better Loss Functions Lead to Less Transferable Features?", NeurIPS 2021, arXiv
    2010.16402. That the modularity paper's class separation is this one is a reconstruction: its formula was not
    read.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-5 / 13, 12 / 13]], dtype=torch.float64)
    >>> round(class_separation(x, [0, 0, 1, 1]), 6)
    0.731602
    """
    x = as_samples(x)
    codes, classes = class_codes(labels, len(x))
    within, total = _distances(x, codes.to(x.device), len(classes)).tolist()
    return 1 - within / total if total > 1e-12 else float("nan")


def _distances(x: Tensor, codes: Tensor, classes: int) -> Tensor:
    """Mean cosine distance within classes, and over all pairs of classes: (2,) in float64."""
    one_hot = torch.zeros((classes, len(x)), dtype=torch.float64, device=x.device)
    one_hot.scatter_(0, codes[None], 1.0)
    # (C, n): row c averages the unit rows of class c
    average = one_hot / one_hot.sum(1, keepdim=True) / row_norms(x).clamp_min(1e-8)
    own, overall = torch.zeros((2,), dtype=torch.float64, device=x.device)
    for f in range(0, x.shape[1], 1024):
        mean = average @ x[:, f : f + 1024].double()  # (C, f)
        own += mean.square().sum() / classes
        overall += mean.mean(0).square().sum()
    return torch.stack((1 - own, 1 - overall))
