"""Rank of feature maps by hand, against NumPy, as theorems, and streamed over a network."""

import warnings
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from benchmarks import shared_data
from repgraph.scores import hrank as module
from repgraph.scores.agreement import score_stability
from repgraph.scores.chip import chip_scores
from repgraph.scores.hrank import _ranks, feature_rank, feature_rank_by_sample, hrank_scores
from repgraph.scores.maps import stream_maps

pytestmark = pytest.mark.usefixtures("one_thread")

seeds = st.integers(0, 2**32 - 1)
NAN = float("nan")


def low_rank(seed, n, c, h, w):
    """Maps (n, c, h, w) in float64 of ranks 0 to min(h, w), some after a ReLU."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((n, c, h, w))
    for i in np.ndindex(n, c):
        k = rng.integers(0, min(h, w) + 1)
        maps[i] = rng.standard_normal((h, k)) @ rng.standard_normal((k, w))
        if rng.random() < 0.3:
            maps[i] = maps[i].clip(0)
    return torch.from_numpy(maps)


# By hand


def test_by_hand():
    one, ones, zeros = torch.eye(2), torch.ones(2, 2), torch.zeros(2, 2)
    first, second = torch.stack([one, ones, one]), torch.stack([ones, zeros, torch.tensor([[1.0, 2], [3, 4]])])
    with pytest.warns(UserWarning, match="at most 3 levels"):
        found = feature_rank(torch.stack([first, second]))
    assert found.dtype == torch.float64
    assert found.tolist() == [1.5, 0.5, 2]
    assert found.argsort().tolist() == [1, 0, 2]
    assert feature_rank_by_sample(torch.stack([first, second])).tolist() == [[2, 1, 2], [1, 0, 2]]


@pytest.mark.parametrize(("small", "single", "double"), [(1e-8, 1, 2), (1e-6, 2, 2), (1e-17, 1, 1)])
def test_the_type_sets_the_tolerance(small, single, double):
    maps = torch.diag(torch.tensor([1, small], dtype=torch.float64))[None, None]
    assert feature_rank_by_sample(maps.float()).item() == single
    assert feature_rank_by_sample(maps).item() == double
    assert feature_rank_by_sample(maps, tol=small / 2).item() == 2
    assert feature_rank_by_sample(maps, tol=2 * small).item() == 1


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_known_ranks(k):
    outer = torch.arange(1.0, k + 1)[:, None] * torch.arange(1.0, k + 1)
    maps = torch.stack([torch.zeros(k, k), torch.full((k, k), -3.0), outer, torch.eye(k)])[None]
    assert feature_rank_by_sample(maps).tolist() == [[0, 1, 1, k]]


def test_relu_can_raise_the_rank():
    maps = torch.tensor([[[[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]]]])
    assert feature_rank(maps).item() == 1
    assert feature_rank(maps.relu()).item() == 2


# Parity and theorems


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_parity_with_numpy(seed, n, c, h, w):
    maps = low_rank(seed, n, c, h, w)
    assert feature_rank_by_sample(maps).tolist() == np.linalg.matrix_rank(maps.numpy()).tolist()
    assert feature_rank_by_sample(maps.float()).tolist() == np.linalg.matrix_rank(maps.float().numpy()).tolist()
    assert feature_rank_by_sample(maps, tol=0.5).tolist() == np.linalg.matrix_rank(maps.numpy(), tol=0.5).tolist()


@given(seeds, st.floats(1e-3, 1e3), st.integers(3, 9), st.integers(3, 9))
def test_invariances(seed, scale, h, w):
    maps = low_rank(seed, 4, 3, h, w)
    expected = feature_rank(maps).tolist()
    rng = np.random.default_rng(seed)
    samples, rows, columns, channels = (rng.permutation(size) for size in (4, h, w, 3))
    assert feature_rank(-scale * maps).tolist() == expected
    assert feature_rank(maps.mT).tolist() == expected
    assert feature_rank(maps[samples]).tolist() == expected
    assert feature_rank(maps[:, :, rows][..., columns]).tolist() == expected
    assert feature_rank(maps[:, channels]).tolist() == [expected[j] for j in channels]
    assert all(0 <= rank <= min(h, w) for rank in expected)


def test_not_invariant_to_a_shift():
    assert feature_rank(torch.zeros(1, 1, 3, 3) + 1).item() != feature_rank(torch.zeros(1, 1, 3, 3)).item()


# Over a network


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten())
    model[1].bias.data = torch.tensor([0.5, -9, 0, 0, 1, 0])  # the second filter is dead
    return model.train()


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_scores_of_a_network(batch_size):
    model, images = network(), torch.randn(12, 1, 8, 8)
    found = hrank_scores(model, images, batch_size=batch_size, progress=False)
    assert model.training
    with torch.no_grad():
        first = model.eval()[:3](images)
        expected = {"0": feature_rank(first), "3": feature_rank(model[3](first))}
    assert list(found) == ["0", "3"]
    assert all(torch.equal(found[name], scores) for name, scores in expected.items())
    assert found["0"][1] == 0
    few = hrank_scores(model, images, ["0"], samples=7, batch_size=batch_size, dtype=torch.float64, progress=False)
    assert few["0"].tolist() == feature_rank(first[:7].double()).tolist()


def test_network_warnings_and_refusals():
    model, images = network(), torch.randn(4, 1, 6, 6)
    with pytest.warns(UserWarning, match="rank.*: 3$"):
        hrank_scores(model, images, progress=False)
    with pytest.raises(ValueError, match=r"dtype must be .* got torch.float16"):
        hrank_scores(model, images, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"\(n, C, H, W\), as of a 2-D convolution, got \(4, 2, 5\)"):
        hrank_scores(nn.Sequential(nn.Conv1d(1, 2, 2)), torch.randn(4, 1, 6), progress=False)


@pytest.fixture(scope="module")
def trained():
    """ResNet-20, the convolutions inside its blocks, images and labels."""
    if not shared_data.available():
        pytest.skip("shared data absent (REPGRAPH_SHARED)")
    model = shared_data.cifar_network(20)
    inner = [name for name, _ in model.named_modules() if name.startswith("layer") and name.endswith("conv1")]
    return model, inner, *shared_data.cifar_images(128)


@pytest.mark.parametrize("scores", [hrank_scores, chip_scores])
def test_removing_low_scores_hurts_less(trained, scores):
    """A quarter of the inner filters, without fine-tuning; on 400 images it is 0.46 and 0.10 to 0.11."""
    model, inner, images, labels = trained
    found = scores(model, images, inner, samples=32, progress=False)

    def accuracy(highest):
        with ExitStack() as stack:
            for name, values in found.items():
                out = values.argsort(descending=highest, stable=True)[: len(values) // 4]
                norm = model.get_submodule(name.replace("conv", "bn"))
                hook = norm.register_forward_hook(lambda m, i, x, out=out: x.index_fill(1, out, 0))
                stack.callback(hook.remove)
            with torch.no_grad():
                return (model(images[:96]).argmax(1) == labels[:96]).double().mean()

    assert accuracy(highest=False) > 0.3
    assert accuracy(highest=True) < 0.2


def test_few_images_rank_the_filters_alike(trained):
    """Spearman of disjoint sets of 16 and 64 images; one draw of the note has 0.929 and 0.970."""
    model, inner, images, _ = trained
    ranks = stream_maps(model, images, feature_rank_by_sample, inner[3:], progress=False)  # maps up to 16 x 16
    few, more = score_stability(ranks, sizes=(16, 64)).mean()
    assert 0.85 < few < more
    assert more > 0.93


# Input


@pytest.mark.parametrize("numbers", [1, 50, 1000])
def test_chunks(monkeypatch, numbers):
    maps = low_rank(0, 7, 3, 4, 5)
    expected = feature_rank_by_sample(maps)
    monkeypatch.setattr(module, "_CHUNK", numbers)
    assert torch.equal(feature_rank_by_sample(maps), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_types(dtype):
    maps = (3 * low_rank(0, 2, 3, 4, 5)).round().to(dtype)
    before = maps.clone()
    assert torch.equal(feature_rank(maps), feature_rank(maps.float()))
    assert torch.equal(maps, before)


ONES = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (ONES[0], {}, r"maps must have shape \(n, C, H, W\).* got \(3, 4, 4\)"),
        (ONES[..., None], {}, r"got \(2, 3, 4, 4, 1\)"),
        (ONES[:0], {}, r"got \(0, 3, 4, 4\)"),
        (ONES.numpy(), {}, "maps must be a real torch tensor, got ndarray"),
        (ONES + 0j, {}, "got torch.complex64"),
        (torch.where(torch.arange(4) > 2, NAN, ONES), {}, "maps must be finite.* in 2 of 2 samples"),
        (ONES, {"tol": -1}, "tol must be at least 0, got -1"),
        (ONES, {"tol": NAN}, "tol must be at least 0, got nan"),
    ],
)
def test_refusals(maps, options, message):
    with pytest.raises(ValueError, match=message):
        feature_rank(maps, **options)


def test_warns_of_small_maps_only():
    with pytest.warns(UserWarning, match=r"maps of 1 x 7.*at most 2 levels"):
        feature_rank(torch.ones(1, 1, 1, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feature_rank(torch.ones(1, 1, 3, 3))


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_kernel_stays_on_cuda(tol):
    with FakeTensorMode():
        value = _ranks(torch.empty(2, 3, 4, 5, device="cuda"), tol)
        assert (value.device.type, value.shape, value.dtype) == ("cuda", (2, 3), torch.int64)
