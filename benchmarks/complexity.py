"""Gate entropy of many samples and gates.

    python -m benchmarks.complexity [--full]

The peer computes the pairwise Hamming distances of the same gates with scikit-learn, from which the estimator is one
line. "Packed" starts from eight gates a byte, as `capture` keeps them. The difference is in bits.
"""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.metrics import pairwise_distances

from benchmarks.rows import Row, Target, main, measure
from repgraph.activations.gates import pack
from repgraph.metrics.complexity import gate_entropy
from repgraph.metrics.complexity.entropy import pairs_of

SMALL, FULL = (500, 10_000), (2000, 50_000)


def by_sklearn(gates: np.ndarray) -> float:
    distances = pairwise_distances(gates, metric="hamming", n_jobs=-1)
    return float(-np.log2(np.exp(-distances / (2 * 0.01)).mean(1)).mean())


def rows(full: bool) -> Iterator[Row]:
    n, d = FULL if full else SMALL
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(20, d, generator=generator) < 0.4
    gates = base[torch.arange(n) % 20] ^ (torch.rand(n, d, generator=generator) < 0.1)
    packed = pack(gates)
    gate_entropy(gates[:100])  # libraries allocate on first use
    yield measure(
        "gate entropy",
        f"{n:,} samples x {d:,} gates",
        lambda: gate_entropy(gates),
        peers={"scikit-learn": lambda: by_sklearn(gates.numpy())},
        difference=lambda found, others: abs(found - others["scikit-learn"]),
        target=Target(peer=1 / 22 if full else None, difference=1e-9),
        note=f"bools: {gates.nbytes / 1e6:.0f} MB",
    )
    yield measure(
        "gate entropy, packed",
        f"{n:,} samples x {d:,} gates",
        lambda: pairs_of(packed, d).entropy(0.01, "kde", "total"),
        difference=lambda found, _: abs(found - gate_entropy(gates)),
        target=Target(difference=0),
        note=f"packed: {packed.nbytes / 1e6:.1f} MB",
    )


if __name__ == "__main__":
    main(rows)
