"""Gate entropy of 2000 samples x 50,000 gates: ``python -m benchmarks.complexity`` (a minute).

The peers compute the pairwise Hamming distances of the same gates, from which the estimator is one line.
"""

import numpy as np
import torch
from sklearn.metrics import pairwise_distances

from benchmarks.rss import measured
from repgraph.activations.gates import pack
from repgraph.metrics.complexity import gate_entropy
from repgraph.metrics.complexity.entropy import pairs_of

N, D = 2000, 50_000


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(20, D, generator=generator) < 0.4
    gates = base[torch.arange(N) % 20] ^ (torch.rand(N, D, generator=generator) < 0.1)
    packed = pack(gates)
    print(f"{N} samples x {D} gates: {gates.nbytes / 1e6:.0f} MB as bool, {packed.nbytes / 1e6:.1f} MB packed")
    own, grown, value = measured(lambda: gate_entropy(gates))
    print(f"gate_entropy of bools     {own:6.2f} s, peak growth {grown / 1e6:4.0f} MB, {value:.4f} bits")
    seconds, grown, again = measured(lambda: pairs_of(packed, D).entropy(0.01, "kde", "total"))
    print(f"the same, packed          {seconds:6.2f} s, peak growth {grown / 1e6:4.0f} MB")
    assert again == value

    def peer():
        distances = pairwise_distances(gates.numpy(), metric="hamming", n_jobs=-1)
        return float(-np.log2(np.exp(-distances / (2 * 0.01)).mean(1)).mean())

    seconds, grown, reference = measured(peer)
    print(f"scikit-learn's distances  {seconds:6.2f} s, peak growth {grown / 1e6:4.0f} MB, {seconds / own:.0f}x")
    assert abs(reference - value) < 1e-9


if __name__ == "__main__":
    main()
