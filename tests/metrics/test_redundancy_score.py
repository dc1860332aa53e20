"""Redundancy by hand, against a slow double loop, as theorems, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch._subclasses import FakeTensorMode

from repgraph import Graph, knn_graph
from repgraph.metrics import redundancy as module
from repgraph.metrics.block_influence import block_influence
from repgraph.metrics.redundancy import _redundancy, redundancy

seeds = st.integers(0, 2**32 - 1)
Z = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
Y = Z * torch.tensor([1.0, 0.5])
NAN, INF = float("nan"), float("inf")
GENERAL = "neighbours of z must differ at y and be nearer to each other than other pairs"


def draw(seed, n=12, d=4):
    """Input and output of a block and the last representation, in which neighbours are near at the output too."""
    generator = torch.Generator().manual_seed(seed)
    classes = 3 * torch.randn(3, d, generator=generator, dtype=torch.float64)[torch.arange(n) % 3]
    x = classes + torch.randn(n, d, generator=generator, dtype=torch.float64)
    y, z = (x + size * torch.randn(n, d, generator=generator, dtype=torch.float64) for size in (0.5, 0.3))
    return x, y, z, generator


def neighbors(z, k):
    """k most similar rows by cosine, one pair at a time."""
    found = []
    for i in range(len(z)):
        cosines = {j: float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) for j in range(len(z)) if j != i}
        found.append(sorted(cosines, key=lambda j: (-cosines[j], j))[:k])
    return found


def slow(x, y, near):
    """The definition, one ordered pair at a time; None where it has no value."""
    moved, at_y, others = [], [], []
    for i in range(len(x)):
        for j in range(len(x)):
            distance = float((y[i] - y[j]).square().sum())
            if j in near[i]:
                moved.append(float(((y[i] - x[i]) - (y[j] - x[j])).square().sum()))
                at_y.append(distance)
            elif j != i:
                others.append(distance)
    gap = sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True)) / len(x)
    w_r, w_y, d_y = (sum(values) / len(values) for values in (moved, at_y, others))
    return math.sqrt(gap * w_r / math.sqrt(w_y * (d_y - w_y))) if d_y > w_y else None


def test_by_hand():
    """Edges 0-1 and 2-3 at y: 0.1 apart, the change 0.1 apart; the other pairs 4 and 4.01."""
    gap = 1 - 1.005 / math.sqrt(1.01 * 1.0025)  # of z = (1, 0.1) and y = (1, 0.05)
    spread = (4 + 4.01) / 2
    expected = math.sqrt(gap * 0.01 / math.sqrt(0.01 * (spread - 0.01)))
    assert redundancy(Z, Y, Z, k=1) == pytest.approx(expected, rel=1e-6)
    assert redundancy(Z.double(), Y.double(), Z, k=1) == pytest.approx(0.007862, abs=5e-7)


@given(seeds, st.integers(6, 14), st.integers(2, 6), st.integers(1, 4))
def test_against_a_slow_double_loop(seed, n, d, k):
    x, y, z, _ = draw(seed, n, d)
    expected = slow(x, y, neighbors(z, k))
    if expected is None:
        with pytest.raises(ValueError, match=GENERAL):
            redundancy(x, y, z, k=k)
    else:
        assert redundancy(x, y, z, k=k) == pytest.approx(expected, rel=1e-9)


@given(seeds)
def test_invariances(seed):
    x, y, z, generator = draw(seed)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(12, generator=generator)
    value = redundancy(x, y, z, k=2)
    expected = pytest.approx(value, rel=1e-9)
    assert value >= 0
    assert redundancy(x @ turn, y @ turn, z, k=2) == expected
    assert redundancy(x, y, z @ turn, k=2) == expected
    assert redundancy(3.7 * x, 3.7 * y, 0.2 * z, k=2) == expected
    assert redundancy(-x, -y, z, k=2) == expected
    assert redundancy(x[order], y[order], z[order], k=2) == expected


@given(seeds)
def test_translation_changes_it_through_block_influence_alone(seed):
    x, y, z, _ = draw(seed)
    moved = redundancy(x + 50, y + 50, z, k=2)
    assert moved < 0.5 * redundancy(x, y, z, k=2)
    factors = [value**2 / block_influence(a, b) for value, a, b in (
        (moved, x + 50, y + 50), (redundancy(x, y, z, k=2), x, y))]  # fmt: skip
    assert factors[0] == pytest.approx(factors[1], rel=1e-6)


def test_scale_of_the_output_alone_changes_it():
    x, y, z, _ = draw(0)
    assert redundancy(x, 3 * y, z) > 1.5 * redundancy(x, y, z)


@given(seeds)
def test_identity_is_0_and_so_is_what_neighbours_share(seed):
    x, y, z, generator = draw(seed)
    assert redundancy(x, x, z, k=2) == 0
    shift = torch.randn(4, generator=generator, dtype=torch.float64)
    assert redundancy(y - shift, y, z, k=2) < 1e-6  # the change is the same everywhere
    classes = 3 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    pairs = torch.arange(12) // 2  # neighbours of z come in pairs, which the change moves together
    far = torch.eye(6, dtype=torch.float64)[pairs] + 1e-3 * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    y = 9 * far
    alike, apart = (torch.zeros_like(y), 3 * torch.randn(12, 6, generator=generator, dtype=torch.float64))
    alike[:, :4] = classes[pairs % 2]
    assert redundancy(y - alike, y, far, k=1) < 1e-6 < redundancy(y - apart, y, far, k=1)


def test_a_graph_in_place_of_z():
    x, y, z, _ = draw(0)
    graph = knn_graph(z, 3, symmetrize="none")
    assert redundancy(x, y, graph) == redundancy(x, y, z, k=3) != redundancy(x, y, z)
    assert redundancy(x, y, graph, k=1) == redundancy(x, y, graph)  # the graph has its own
    assert redundancy(x, y, z, k=5) == redundancy(x, y, z)


def test_every_edge_weighs_the_same_whatever_its_cosine_and_rows_may_differ_in_degree():
    x, y, z, _ = draw(1)
    near = [found[: 1 + i % 3] for i, found in enumerate(neighbors(z, 3))]
    rows, columns = zip(*((i, j) for i, found in enumerate(near) for j in found), strict=True)
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)) + 0.1
    graph = Graph(csr_array((weights.numpy(), (rows, columns)), shape=(12, 12)), directed=True)
    assert redundancy(x, y, graph) == pytest.approx(slow(x, y, near), rel=1e-9)


@pytest.mark.parametrize(
    "shape",
    [
        (4, 1, 2),
        (2, 2, 2, 1),
        (2, 4),
    ],
)
def test_trailing_axes_are_flattened(shape):
    x, y, z, _ = draw(0, d=8)
    assert redundancy(*(u.unflatten(1, shape) for u in (x, y, z))) == pytest.approx(redundancy(x, y, z), rel=1e-12)


@pytest.mark.parametrize("numbers", [1, 7, 40])
def test_chunks(monkeypatch, numbers):
    x, y, z, _ = draw(0)
    expected = redundancy(x, y, z)
    monkeypatch.setattr(module, "CHUNK", numbers)
    assert redundancy(x, y, z) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_types(dtype):
    x, y, z, _ = draw(0)
    x, y = ((3 * u).round().to(dtype) for u in (x, y))
    assert redundancy(x, y, z) == pytest.approx(redundancy(x.double(), y.double(), z), rel=1e-12)


def test_far_from_the_origin_in_float32():
    """D_y is taken from deviations from the mean, in float64."""
    x, y, z, _ = draw(0)
    x, y = (u.float() + 1000 for u in (x, y))
    assert redundancy(x, y, z, k=2) == pytest.approx(slow(x.double(), y.double(), neighbors(z, 2)), rel=1e-6)


def test_inputs_are_not_modified():
    x, y, z, _ = draw(0)
    before = [u.clone() for u in (x, y, z)]
    assert isinstance(redundancy(x.requires_grad_(), y, z.requires_grad_()), float)
    assert all(map(torch.equal, (x, y, z), before))


X12, Y12, Z12, _ = draw(0)
BAD = X12.clone()
BAD[3, 1] = NAN


@pytest.mark.parametrize(
    ("x", "y", "z", "k", "message"),
    [
        (X12, Y12[:, :3], Z12, 5, r"x and y must have one shape, got \(12, 4\) and \(12, 3\)"),
        (X12, Y12[:11], Z12, 5, r"x and y must have one shape"),
        (X12, Y12.tolist(), Z12, 5, "y must be a real torch tensor, got list"),
        (X12.to(torch.complex64), Y12, Z12, 5, "x must be a real torch tensor"),
        (X12[0], Y12[0], Z12, 5, r"x must have shape \(n, ...\) .* got \(4,\)"),
        (X12, Y12, Z12[:9], 5, "z must have the rows of x and y, expected 12, got 9"),
        (X12, Y12, knn_graph(Z12[:9], 3, symmetrize="none"), 5, "z must have the rows .* expected 12, got 9"),
        (X12, Y12, knn_graph(Z12, 5), 5, r"z must be features or a graph of knn_graph\(z, k, symmetrize='none'\), got"),
        (X12, Y12, Z12, 0, "1 <= k < n, got k = 0"),
        (X12, Y12, Z12, 12, "1 <= k < n, got k = 12 with n = 12 samples"),
        (X12, Y12, Z12, 2.5, "k must be an integer"),
        (BAD, Y12, Z12, 5, "x must be finite, got NaN or infinite values in 1 of 12 samples"),
        (X12, BAD, Z12, 5, "y must be finite.* in 1 of 12 samples"),
        (X12, INF * Y12, Z12, 5, "y must be finite.* in 12 of 12 samples"),
        (X12, Y12, BAD, 5, "must be finite.* in 1 of 12 samples"),
        (X12, torch.ones_like(Y12), Z12, 5, f"{GENERAL}, got mean squared distances 0 and 0"),
        (Z, Z.flip(1), Z * torch.tensor([0.1, 10.0]), 1, f"{GENERAL}, got mean squared distances 4 and 2.04"),
    ],
)
def test_refusals(x, y, z, k, message):
    with pytest.raises(ValueError, match=message):
        redundancy(x, y, z, k=k)


def test_no_other_pairs_are_refused():
    for n in range(2, 9):
        x, y, z, _ = draw(0, n)
        with pytest.raises(ValueError, match=GENERAL):
            redundancy(x, y, z, k=n - 1)


def test_graph_without_edges_is_refused():
    with pytest.raises(ValueError, match=GENERAL):
        redundancy(X12, Y12, Graph(csr_array((12, 12)), directed=True))


@pytest.mark.parametrize("scale", [1e-82, 1e100])
def test_scale_far_out(scale):
    x, y = (scale * u for u in (X12, Y12))
    turned = block_influence(X12, Y12) / block_influence(x, y)  # norms below 1e-8 count as 1e-8
    assert redundancy(x, y, Z12) * math.sqrt(turned) == pytest.approx(redundancy(X12, Y12, Z12), rel=1e-9)


@pytest.mark.parametrize("shape", [(8, 5), (6, 40)])
def test_kernel_stays_on_cuda(monkeypatch, shape):
    monkeypatch.setattr(module, "CHUNK", 20)
    with FakeTensorMode():
        x = torch.empty(shape, device="cuda")
        i, j = torch.zeros(2, 24, dtype=torch.int64, device="cuda")
        for value in _redundancy(x, x, i, j):
            assert (value.device.type, value.shape, value.dtype) == ("cuda", (), torch.float64)
