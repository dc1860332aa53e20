"""Whether two captures are over the same samples in the same order."""

from __future__ import annotations

import numpy as np

from repgraph.activations.container import Activations


def check_paired(a: Activations, b: Activations) -> None:
    """Refuse to compare two captures sample by sample unless their ids, and the hashes of their inputs, agree.

    Raises
    ------
    ValueError
        If the numbers of samples, the ids or, where both have them, the input hashes differ. The message names the
        first sample that does.
    """
    if a.n != b.n:
        raise ValueError(f"a and b must be over the same samples, got {a.n} and {b.n}")
    differ = np.flatnonzero(a.sample_ids.astype(str) != b.sample_ids.astype(str))
    if len(differ):
        same = set(a.sample_ids.astype(str)) == set(b.sample_ids.astype(str))
        what = "the same samples in another order" if same else "different samples"
        raise ValueError(
            f"a and b hold {what}: at position {differ[0]} a has sample id {a.sample_ids[differ[0]]} and b has "
            f"{b.sample_ids[differ[0]]}" + ("; put b in order with b.subset()" if same else "")
        )
    if a.input_hashes is None or b.input_hashes is None:
        return
    differ = np.flatnonzero((a.input_hashes != b.input_hashes).numpy())
    if len(differ):
        raise ValueError(
            f"a and b were given different inputs for {len(differ)} of {a.n} samples, the first at position "
            f"{differ[0]}: the data were shuffled, augmented at random or preprocessed in another way; inputs that "
            "belong together all the same (clean and altered) are declared by sample_ids= in both captures"
        )
