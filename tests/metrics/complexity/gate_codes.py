"""Random gates, and the definitions of their entropies as double loops."""

import math

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

seeds = st.integers(0, 2**32 - 1)
samples = st.integers(2, 20)
widths = st.integers(1, 20)
lams = st.floats(1e-3, 10)

FOUR = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
PAIR = torch.tensor([[0, 0], [0, 1]])
ESTIMATORS = ["kde", "kde_lower", "plugin"]


def codes(seed, n=16, d=9, copies=True):
    """Hard gates, some rows twice, some gates constant."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.rand(d, generator=generator)
    s = torch.rand(n, d, generator=generator) < rate
    if copies:
        s = s[torch.randint(0, n, (n,), generator=generator)]
    return s, generator


def soft(seed, n=16, d=9):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_entropy(s, lam, d=None):
    s = np.asarray(s, dtype=np.float64)
    n, d = len(s), d or s.shape[1]
    total = 0.0
    for i in range(n):
        mean = sum(math.exp(-((s[i] - s[j]) ** 2).sum() / (2 * lam * d)) for j in range(n)) / n
        total -= math.log2(mean) / n
    return total


def plain_plugin(s):
    return scipy_entropy(np.unique(np.asarray(s), axis=0, return_counts=True)[1], base=2)


def plain(s, lam, estimator, d=None):
    if estimator == "plugin":
        return plain_plugin(s)
    return plain_entropy(s, lam if estimator == "kde" else 4 * lam, d)


def plain_information(s, y, lam, estimator):
    s, y = np.asarray(s), np.asarray(y)
    within = sum((y == c).mean() * plain(s[y == c], lam, estimator) for c in set(y.tolist()))
    return plain(s, lam, estimator) - within


def single(rates):
    return sum(scipy_entropy([a, 1 - a], base=2) for a in np.asarray(rates, dtype=np.float64))
