"""Captures are paired by ids and by the content of their inputs; a refusal names the first sample that differs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repgraph import Activations, capture
from repgraph.activations.pairing import check_paired

N = 12
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))


def take(data=X, **options):
    return capture(nn.Sequential(nn.Linear(4, 3)), data, "leaves", progress=False, **options)


def held(ids=None, n=N):
    return Activations({"head": X[:n]}, sample_ids=ids)


def changed(*rows):
    """The inputs with other values in some rows."""
    x = X.clone()
    x[list(rows)] += 0.5
    return x


PAIRED = {
    "two models, one tensor": (take(), take(X.clone())),
    "other batches": (take(batch_size=5), take(DataLoader(TensorDataset(X), 7))),
    "the same chosen samples": (take(samples=[1, 5, 7]), take(samples=[1, 5, 7])),
    "the same subset": (take().subset([4, 0, 2]), take().subset([4, 0, 2])),
    "no hashes": (held(), held()),
    "hashes on one side": (take(), held()),
    "other inputs under given ids": (take(sample_ids=range(N)), take(changed(3), sample_ids=range(N))),
    "ids on one side only": (take(), take(changed(3), sample_ids=range(N))),
    "ids of other types": (held(range(N)), held([str(i) for i in range(N)])),
    "text ids": (held(list("abcdefghijkl")), held(np.array(list("abcdefghijkl")))),
}


@pytest.mark.parametrize("case", PAIRED)
def test_captures_of_the_same_samples_pass(case):
    a, b = PAIRED[case]
    assert check_paired(a, b) is None
    assert check_paired(b, a) is None


REFUSED = {
    "number": (held(), held(n=9), "a and b must be over the same samples, got 12 and 9"),
    "ids": (
        held(list("abcdefghijkl")),
        held(list("abcdXfghijkl")),
        "a and b hold different samples: at position 4 a has sample id e and b has X$",
    ),
    "order": (
        held(),
        held([0, 2, 1, *range(3, N)]),
        r"the same samples in another order: at position 1 a has sample id 1 and b has 2; .*b.subset\(\)",
    ),
    "positions": (
        take(samples=[1, 5, 7]),
        take(samples=[1, 6, 7]),
        "different samples: at position 1 .* 5 and b has 6",
    ),
    "one input": (take(), take(changed(7)), "different inputs for 1 of 12 samples, the first at position 7"),
    "some inputs": (take(), take(changed(9, 3)), "different inputs for 2 of 12 samples, the first at position 3"),
    "order of inputs": (take(), take(X.flip(0)), "different inputs for 12 of 12 samples.*shuffled.*sample_ids="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_samples_are_refused(case):
    a, b, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_paired(a, b)


def test_another_order_passes_after_subset():
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    a, b = take(), take().subset(order)
    with pytest.raises(ValueError, match="another order"):
        check_paired(a, b)
    back = b.subset(order.argsort())
    check_paired(a, back)
    assert torch.equal(back.input_hashes, a.input_hashes)


def test_shuffling_loader_is_refused_and_a_fixed_order_passes():
    loader = DataLoader(TensorDataset(X), 5, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="a and b were given different inputs"):
        check_paired(take(loader), take(loader))
    check_paired(take(list(loader.dataset.tensors)), take())


def test_captures_read_from_files_pair_too(tmp_path):
    take(folder=tmp_path / "a")
    saved = Activations.load(tmp_path / "a")
    check_paired(saved, take())
    with pytest.raises(ValueError, match="different inputs for 1 of 12 samples, the first at position 2"):
        check_paired(saved, take(changed(2)))
