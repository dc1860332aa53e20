"""Channel independence by hand, against NumPy's nuclear norm, as theorems, and streamed over a network."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from repgraph.scores import chip as module
from repgraph.scores.chip import (
    _independence,
    channel_independence,
    channel_independence_by_sample,
    chip_scores,
)

pytestmark = pytest.mark.usefixtures("one_thread")

seeds = st.integers(0, 2**32 - 1)
METHODS = ["auto", "gram", "qr", "svd"]
PRECISION = {"auto": 1e-13, "qr": 1e-13, "svd": 1e-13, "gram": 1e-6}  # relative to the largest singular value
NAN = float("nan")


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_numpy(rows):
    """(C,) of one sample (C, M)."""
    rows, found = rows.numpy(), []
    for j in range(len(rows)):
        masked = rows.copy()
        masked[j] = 0
        found.append(np.linalg.norm(rows, "nuc") - np.linalg.norm(masked, "nuc"))
    return torch.tensor(np.array(found))


def close(found, rows, precision):
    top = torch.linalg.matrix_norm(rows, 2)
    return ((found - torch.stack([by_numpy(a) for a in rows])).abs().amax(1) <= precision * top).all()


# By hand


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[3, 0], [0, 4]], [3, 4]),
        ([[1, 0], [1, 0]], [0.4142135624, 0.4142135624]),
        ([[1, 0], [3, 0]], [0.1622776602, 2.1622776602]),
        ([[1, 0], [0, 1], [1, 1]], [0.4959828301, 0.4959828301, 0.7320508076]),
        ([[1, 2], [0, 0]], [2.2360679775, 0]),
        ([[1, 0, 0], [1, 0, 0], [0, 0, 2]], [0.4142135624, 0.4142135624, 2]),
        ([[3, 4]], [5]),
        ([[2], [0], [0]], [2, 0, 0]),
        ([[0, 0], [0, 0]], [0, 0]),
    ],
)
def test_by_hand(rows, expected, method):
    maps = torch.tensor([rows], dtype=torch.float64)
    assert channel_independence(maps, method=method).tolist() == pytest.approx(expected, abs=1e-7)
    if method != "gram":
        assert channel_independence(maps, method=method).tolist() == pytest.approx(expected, abs=1e-10)


def test_mean_over_samples():
    maps = torch.tensor([[[3.0, 0], [0, 4]], [[1, 0], [3, 0]]])
    expected = [[3, 4], [10**0.5 - 3, 10**0.5 - 1]]
    assert torch.allclose(channel_independence_by_sample(maps), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert channel_independence(maps).tolist() == pytest.approx(np.mean(expected, 0), abs=1e-12)


def test_normalized_rows_forget_the_amplitude():
    maps = torch.tensor([[[1.0, 0, 0], [3, 0, 0], [0, 0, 0], [0, 0.1, 0]]])
    expected = [2**0.5 - 1, 2**0.5 - 1, 0, 1]
    assert channel_independence(maps, normalize_rows=True).tolist() == pytest.approx(expected, abs=1e-7)


# Parity


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 1024), (64, 64), (128, 16), (5, 4), (4, 5)], ids=str)
def test_parity_with_numpy(shape, method):
    rows = normal(0, 1, *shape).relu()
    rows[:, 0], rows[:, 1], rows[:, 3] = 0, rows[:, 2], 2 * rows[:, 2]
    assert close(channel_independence_by_sample(rows, method=method), rows, PRECISION[method])


@pytest.mark.parametrize("shape", [(12, 40), (12, 12), (40, 12), (13, 12)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_rank_deficient_and_graded_maps(shape, method):
    c, m = shape
    dense = normal(0, 1, *shape)
    low = normal(1, 1, c, 3) @ normal(2, 1, 3, m)
    alone = dense.clone()  # a row that no other touches: all of it is lost, though it may be tiny beside the others
    alone[:, :, 0], alone[:, 3] = 0, 0
    alone[:, 3, 0] = 1e-3
    diagonal = torch.zeros(1, c, m, dtype=torch.float64)
    diagonal[0].fill_diagonal_(3.0)
    graded = dense * torch.logspace(0, -14, c, dtype=torch.float64)[:, None]
    for rows in (low, low.relu(), alone, diagonal, diagonal + 1e-9 * dense, diagonal + 1e-5 * dense, graded):
        assert close(channel_independence_by_sample(rows, method=method), rows, PRECISION[method])
    if method != "gram":
        assert channel_independence(alone, method=method)[3] == pytest.approx(1e-3, abs=1e-12)


# Theorems


@given(seeds, st.integers(1, 9), st.integers(1, 12), st.floats(0.01, 100))
def test_invariances(seed, c, m, scale):
    maps = normal(seed, 2, c, m).relu()
    top = float(torch.linalg.matrix_norm(maps, 2).max())
    found = channel_independence_by_sample(maps)
    turn = torch.linalg.qr(normal(seed + 1, m, m)).Q
    signs = normal(seed + 2, c, 1).sign()
    order, places = torch.randperm(c), torch.randperm(m)
    same = {"atol": 1e-12 * top, "rtol": 0}
    assert torch.allclose(channel_independence_by_sample(maps @ turn), found, **same)
    assert torch.allclose(channel_independence_by_sample(maps[..., places]), found, **same)
    assert torch.allclose(channel_independence_by_sample(maps * signs), found, **same)
    assert torch.allclose(channel_independence_by_sample(maps[:, order]), found[:, order], **same)
    assert torch.allclose(channel_independence_by_sample(-scale * maps) / scale, found, **same)
    norms = maps.norm(dim=2)
    assert (found >= 0).all()
    assert (found <= norms + 1e-12 * top).all()
    assert (found[norms == 0] == 0).all()


def test_not_invariant_to_one_channels_amplitude_or_to_a_shift():
    maps = normal(0, 1, 4, 6).relu()
    assert not torch.allclose(
        channel_independence(maps * torch.tensor([[2.0], [1], [1], [1]])), channel_independence(maps)
    )
    assert not torch.allclose(channel_independence(maps + 1), channel_independence(maps))
    louder = channel_independence(maps * torch.tensor([[2.0], [1], [1], [1]]), normalize_rows=True)
    assert torch.allclose(louder, channel_independence(maps, normalize_rows=True))


@given(seeds, st.sampled_from([1e-150, 1e-30, 1e30, 1e150]))
def test_scale_does_not_matter_to_the_precision(seed, scale):
    maps = normal(seed, 1, 5, 7).relu()
    assert torch.allclose(channel_independence(scale * maps) / scale, channel_independence(maps), rtol=0, atol=1e-11)


# Over a network


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten())
    model[1].bias.data = torch.tensor([0.5, -9, 0, 0, 1, 0])  # the second filter is dead
    return model.train()


def test_scores_of_a_network():
    model, images = network(), normal(1, 12, 1, 8, 8).float()
    found = chip_scores(model, images, batch_size=5, progress=False)
    assert model.training
    with torch.no_grad():
        first = model.eval()[:3](images)
        expected = {"0": channel_independence(first), "3": channel_independence(model[3](first))}
    assert list(found) == ["0", "3"]
    for name, scores in expected.items():
        assert found[name].dtype == torch.float64
        assert torch.allclose(found[name], scores, rtol=1e-5, atol=0)
    assert found["0"][1] == 0
    fewer = chip_scores(model, images, ["0"], samples=7, normalize_rows=True, method="svd", progress=False)
    assert list(fewer) == ["0"]
    expected = channel_independence(first[:7], normalize_rows=True)
    assert torch.allclose(fewer["0"], expected, rtol=1e-5, atol=1e-12)


# Input


@pytest.mark.parametrize("numbers", [1, 100, 3000])
@pytest.mark.parametrize("method", METHODS)
def test_chunks(monkeypatch, numbers, method):
    maps = normal(0, 3, 5, 2, 4).relu()
    expected = channel_independence_by_sample(maps, method=method)
    monkeypatch.setattr(module, "_CHUNK", numbers)
    assert torch.allclose(channel_independence_by_sample(maps, method=method), expected, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 3, 10), (2, 3, 2, 5), (2, 3, 1, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
def test_types_and_positions(dtype, shape):
    maps = (3 * normal(0, 2, 3, 10)).round().to(dtype)
    before = maps.clone()
    found = channel_independence(maps.reshape(shape))
    assert (found.shape, found.dtype) == ((3,), torch.float64)
    assert torch.allclose(found, channel_independence(maps.double()), rtol=0, atol=1e-12)
    assert torch.equal(maps, before)


ONES = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (ONES[0], {}, r"maps must have shape \(n, C, ...\) .* got \(3, 4\)"),
        (ONES[:0], {}, r"got \(0, 3, 4\)"),
        (ONES[:, :, :0], {}, r"at least one position, got \(2, 3, 0\)"),
        (ONES.numpy(), {}, "maps must be a real torch tensor, got ndarray"),
        (ONES + 0j, {}, "got torch.complex64"),
        (torch.where(torch.arange(2)[:, None, None] > 0, NAN, ONES), {}, "maps must be finite.* in 1 of 2 samples"),
        (ONES, {"method": "fast"}, "method must be .* got 'fast'"),
    ],
)
def test_refusals(maps, options, message):
    with pytest.raises(ValueError, match=message):
        channel_independence(maps, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 5, 5), (2, 9, 2, 2)])
def test_kernel_stays_on_cuda(shape, method):
    with FakeTensorMode():
        value = _independence(torch.empty(shape, device="cuda"), method, True)
        assert (value.device.type, value.shape, value.dtype) == ("cuda", shape[:2], torch.float64)
