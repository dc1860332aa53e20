"""Central Filter by hand, against the authors' bisection and visit written out, and its repair against the network."""

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import nn
from torch._subclasses import FakeTensorMode

from repgraph.scores import central_filter as module
from repgraph.scores.central_filter import (
    _map_similarity,
    absorb_columns_,
    central_filter_scores,
    central_filters,
    distinctness,
    map_coefficients,
    map_similarity,
)

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
MAPS = torch.tensor([[[0.0, 1, 2, 3], [0, 1, 2, 4], [1, 1, 3, 3], [3, 0, 1, 0], [0, 0, 0, 0]]])
S = torch.eye(3)
PLAN = central_filters(S, 1)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_similarity(seed, c, ties=False):
    """Correlations in groups of filters, all different or on a grid of eighths."""
    x = draw(seed, c, 7) + 2 * draw(seed + 1, 3, 7)[torch.arange(c) % 3]
    s = torch.corrcoef(x)
    s = (s * 8).round() / 8 if ties else s
    return ((s + s.T) / 2).fill_diagonal_(1)


def plain_similarity(maps):
    n, c = maps.shape[:2]
    out = np.eye(c)
    for i in range(c):
        for j in range(c):
            if i != j:
                out[i, j] = np.mean([plain_pair(maps[k, i].flatten(), maps[k, j].flatten()) for k in range(n)])
    return out


def plain_pair(x, y):
    x, y = x.numpy(), y.numpy()
    constant = len(set(x)) == 1, len(set(y)) == 1
    zero = x.sum() == 0, y.sum() == 0
    if all(constant) or all(zero):
        return 1.0
    if any(zero):
        return -1.0
    return 0.0 if any(constant) else np.corrcoef(x, y)[0, 1]


def graph_above(s, t):
    c = len(s)
    graph = nx.Graph((i, j, {"weight": s[i, j]}) for i in range(c) for j in range(i) if s[i, j] > t)
    graph.add_nodes_from(range(c))
    return graph


def plain_central(s, k):
    """Kept filters by bisection on the graph itself and by visiting it, as the note has them."""
    low, high, t = s.min() - 1e-7, s.max() + 1e-7, s.min() - 1e-7
    while low < high:
        middle = (low + high) / 2
        removable = len(s) - nx.number_connected_components(graph_above(s, middle))
        if removable == k:
            t = middle
            break
        if removable > k:
            t, low = middle, middle + 1e-7
        else:
            high = middle - 1e-7
    graph = graph_above(s, t)
    close = [
        graph.degree(i) / sum(1024 - s[i, j] for j in sorted(graph[i])) if graph.degree(i) else 0 for i in range(len(s))
    ]
    central, gone = {}, []
    for i in sorted(range(len(s)), key=lambda i: (close[i], i), reverse=True):
        component = frozenset(nx.node_connected_component(graph, i))
        central.setdefault(component, i)
        for j in sorted(graph[i]):
            if j not in central.values() and j not in gone and len(gone) < k:
                gone.append(j)
    assigned = {p: next(c for component, c in central.items() if p in component) for p in sorted(gone)}
    return tuple(sorted(set(range(len(s))) - set(gone))), assigned, close


def test_similarity_by_hand():
    d = map_similarity(MAPS)
    expected = {(0, 1): 0.982708, (0, 2): 2 / 5**0.5, (1, 2): 0.845154, (0, 3): -0.730297, (1, 3): -0.690066}
    for (i, j), value in {**expected, (2, 3): -0.408248}.items():
        assert float(d[i, j]) == pytest.approx(value, abs=5e-7)
    assert (d[4, :4] == -1).all()
    assert (d.diag() == 1).all()


def test_threshold_graphs_by_hand():
    d = map_similarity(MAPS)
    one = central_filters(d, 1)
    assert list(one.graph.to_networkx().edges) == [(0, 1)]
    assert (one.keep, one.assigned) == ((1, 2, 3, 4), {0: 1})  # both tie
    assert one.centrality[0] == one.centrality[1]
    two = central_filters(d, 2)
    assert sorted(two.graph.to_networkx().edges) == [(0, 1), (0, 2), (1, 2)]
    assert (two.keep, two.assigned) == ((0, 3, 4), {1: 0, 2: 0})
    assert two.centrality.tolist() == pytest.approx([9.774584e-4, 9.774349e-4, 9.773927e-4, 0, 0], abs=5e-11)
    assert (1024 - 1 / two.centrality[:3]).tolist() == pytest.approx([0.938567, 0.913931, 0.869791], abs=5e-7)
    assert central_filters(d, 0).keep == (0, 1, 2, 3, 4)


@few
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_similarity_against_numpy(seed, n, c, positions):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(-1, 3, (n, c, positions, 1), generator=generator).float()
    maps = maps * torch.randint(0, 2, (n, c, 1, 1), generator=generator)  # some all 0
    found = map_similarity(maps)
    np.testing.assert_allclose(found, plain_similarity(maps.double()), atol=1e-12)
    assert torch.equal(found, found.T)


@few
@given(seeds)
def test_similarity_is_invariant_to_scale_offset_and_order(seed):
    maps = draw(seed, 3, 5, 4, 4)
    expected = map_similarity(maps)
    scale, offset = 0.1 + draw(seed + 1, 5, 1, 1).abs(), draw(seed + 2, 5, 1, 1)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(map_similarity(maps * scale + offset), expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(map_similarity(maps[:, order]), expected[order][:, order], atol=1e-14, rtol=0)
    flipped = map_similarity(maps * torch.tensor([-1.0, 1, 1, 1, 1])[:, None, None])
    torch.testing.assert_close(flipped[0, 1:], -expected[0, 1:], atol=1e-14, rtol=0)


def test_similarity_in_chunks(monkeypatch):
    maps = draw(0, 5, 4, 3, 3).relu()
    expected = map_similarity(maps)
    monkeypatch.setattr(module, "CHUNK", 80)
    torch.testing.assert_close(map_similarity(maps), expected, atol=1e-15, rtol=0)
    torch.testing.assert_close((2 * map_similarity(maps[:2]) + 3 * map_similarity(maps[2:])) / 5, expected)


@few
@given(seeds, st.integers(2, 12), st.booleans(), st.data())
def test_kept_filters_are_those_of_the_bisection_and_the_visit(seed, c, ties, data):
    s = random_similarity(seed, c, ties)
    k = data.draw(st.integers(0, c - 1))
    plan = central_filters(s, k)
    keep, assigned, close = plain_central(s.numpy(), k)
    assert (plan.keep, plan.assigned) == (keep, assigned)
    np.testing.assert_allclose(plan.centrality, close, rtol=1e-14)
    expected = graph_above(s.numpy(), plan.threshold)
    assert nx.utils.graphs_equal(plan.graph.to_networkx(), nx.Graph(expected))
    assert len(plan.keep) == c - k == c - len(plan.assigned)
    for gone, kept in plan.assigned.items():
        assert kept in plan.keep
        assert nx.has_path(plan.graph.to_networkx(), gone, kept)


@few
@given(seeds)
def test_order_of_the_filters_does_not_matter_without_ties(seed):
    s = random_similarity(seed, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    plan, moved = central_filters(s, 3), central_filters(s[order][:, order], 3)
    pairs = {(p, c) for p, c in plan.assigned.items() if (plan.centrality == plan.centrality[c]).sum() == 1}
    assert pairs <= {(int(order[p]), int(order[c])) for p, c in moved.assigned.items()}
    scores = distinctness(s)[order]
    assert sorted(distinctness(s[order][:, order]).tolist()) == pytest.approx(sorted(scores.tolist()), abs=1e-14)


def test_a_removed_filter_stands_for_none():
    s = torch.full((4, 4), -0.5)
    for i, value in enumerate((0.95, 0.8, 0.9)):
        s[i, i + 1] = s[i + 1, i] = value
    plan = central_filters(s.fill_diagonal_(1), 3)
    assert (plan.keep, plan.assigned) == ((0,), {1: 0, 2: 0, 3: 0})


def test_distinctness_by_hand():
    # b and c meet at 0.9 (a tie: c stays), a joins at 0.8 and is closer to both on the whole; d is alone
    s = torch.tensor([[1.0, 0.8, 0.8, 0], [0.8, 1, 0.9, 0], [0.8, 0.9, 1, -0.5], [0, 0, -0.5, 1]])
    assert distinctness(s).tolist() == pytest.approx([0.2, 0.1, 3, 1])
    assert distinctness(torch.ones(1, 1)).tolist() == [3]


@few
@given(seeds, st.integers(2, 12))
def test_distinctness_keeps_one_filter_of_each_cluster(seed, c):
    s = random_similarity(seed, c)
    scores = distinctness(s)
    tree = linkage(squareform(1 - s.numpy(), checks=False), "single")
    assert sorted(scores.tolist())[:-1] == pytest.approx(tree[:, 2].tolist(), abs=1e-12)
    assert scores.max() == 3
    for k in range(1, c):
        kept = scores.argsort()[c - k :]
        assert len(np.unique(fcluster(tree, k, "maxclust")[kept])) == k
    affine = distinctness((s + 1) / 2)
    assert affine[scores < 3].tolist() == pytest.approx((scores[scores < 3] / 2).tolist(), abs=1e-12)


def columns_of(weight, plan):
    return weight[:, list(plan.keep)]


@pytest.mark.parametrize(
    ("coefficients", "weights", "features", "output"),
    [(None, [7, -1], [1, 2, 1], 5), (None, [7, -1], [1, 2, 1.5], 5), ([1, 1, 1.5], [9.5, -1], [1, 2, 1.5], 7.5)],
)
def test_absorbing_by_hand(coefficients, weights, features, output):
    plan = replace(PLAN, keep=(0, 1), assigned={2: 0})
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0, -1, 5]])
    before = float(layer(torch.tensor(features).float()).detach())
    assert before == (5 if features[2] == 1 else 7.5)
    absorb_columns_(layer, plan, coefficients=None if coefficients is None else torch.tensor(coefficients))
    assert columns_of(layer.weight, plan).tolist() == [weights]
    assert float(layer(torch.tensor(features).float()).detach()) == output
    assert layer.weight[:, 2].tolist() == [0]
    absorb_columns_(layer, plan)
    assert columns_of(layer.weight, plan).tolist() == [weights]


def network(seed, scale):
    """Filters 1 and 4 alike up to a scale, behind them a conv and a Linear that reads the maps flattened."""
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
    with torch.no_grad():
        bn.weight.copy_(torch.rand(6) + 0.5)
        bn.bias.copy_(torch.randn(6))
        for parameter in (conv.weight, conv.bias, bn.weight, bn.bias):
            parameter[4] = parameter[1]
        bn.weight[4] *= scale
        bn.bias[4] *= scale
    return nn.Sequential(conv, bn, nn.ReLU()).eval(), nn.Conv2d(6, 3, 3), nn.Linear(6 * 16, 3)


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_a_filter_like_another_goes_without_loss(scale):
    front, conv, linear = network(0, scale)
    x = torch.randn(4, 2, 6, 6)
    with torch.no_grad():
        maps = front(x)
        expected = conv(maps), linear(maps.flatten(1))
        plan = central_filters(map_similarity(maps), 1)
        assert plan.assigned == {1: 4}
        coefficients = None if scale == 1 else map_coefficients(maps, plan)
        absorb_columns_(conv, plan, coefficients=coefficients)
        absorb_columns_(linear, plan, coefficients=coefficients, repeat=16)
        cut = maps.clone()
        cut[:, 1] = 1e3  # nothing reads it any more
        torch.testing.assert_close(conv(cut), expected[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(linear(cut.flatten(1)), expected[1], atol=1e-6, rtol=1e-6)


@few
@given(seeds)
def test_coefficients_are_least_squares(seed):
    maps = draw(seed, 3, 6, 5).relu()
    plan = central_filters(map_similarity(maps), 3)
    found = map_coefficients(maps, plan)
    rows = maps.transpose(0, 1).flatten(1).numpy()
    for p, c in plan.assigned.items():
        assert float(found[p]) == pytest.approx(np.linalg.lstsq(rows[c][:, None], rows[p], rcond=None)[0][0], abs=1e-12)
    assert (found[list(plan.keep)] == 1).all()
    assert (map_coefficients(0 * maps, plan)[list(plan.assigned)] == 0).all()


def test_columns_behind_a_concatenation():
    plan = central_filters(random_similarity(0, 4), 2)
    by_offset, by_columns, flat = nn.Conv2d(7, 2, 3), nn.Conv2d(7, 2, 3), nn.Linear(14, 2)
    before, flat_before = by_offset.weight.detach().clone(), flat.weight.detach().clone()
    by_columns.load_state_dict(by_offset.state_dict())
    absorb_columns_(by_offset, plan, offset=2)
    absorb_columns_(by_columns, plan, offset=torch.arange(2, 6)[:, None])
    absorb_columns_(flat, plan, offset=2, repeat=2)
    assert torch.equal(by_offset.weight, by_columns.weight)
    assert torch.equal(by_offset.weight[:, [0, 1, 6]], before[:, [0, 1, 6]])
    kept = plan.keep[-1]
    share = [kept, *(p for p, c in plan.assigned.items() if c == kept)]
    torch.testing.assert_close(by_offset.weight[:, 2 + kept], before[:, [2 + i for i in share]].sum(1))
    pixels, pixels_before = (weight.unflatten(1, (7, 2)) for weight in (flat.weight, flat_before))
    torch.testing.assert_close(pixels[:, 2 + kept], pixels_before[:, [2 + i for i in share]].sum(1))


def test_scores_of_a_model():
    front, conv, _ = network(0, 1.0)
    model = nn.Sequential(*front, conv).eval()
    x = torch.randn(10, 2, 6, 6)
    found = central_filter_scores(model, x, batch_size=4, progress=False)
    with torch.no_grad():
        expected = distinctness(map_similarity(front(x)))
    assert list(found) == ["0", "3"]
    torch.testing.assert_close(found["0"], expected, atol=1e-12, rtol=0)
    assert found["0"].argmin() == 1
    assert found["0"][1] == pytest.approx(0, abs=1e-12)
    few_images = central_filter_scores(model, x, ["0"], samples=3, progress=False)
    assert list(few_images) == ["0"]
    assert not torch.equal(few_images["0"], found["0"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: map_similarity(torch.ones(2, 3)), r"shape \(n, channels, ...\) with positions, got \(2, 3\)"),
        (lambda: map_similarity(torch.ones(0, 3, 2)), r"got \(0, 3, 2\)"),
        (lambda: map_similarity(torch.full((1, 2, 2), float("nan"))), "maps must be finite"),
        (lambda: central_filters(S[:2], 1), r"shape \(C, C\), got \(2, 3\)"),
        (lambda: central_filters(S + torch.eye(3).roll(1, 0) * 1e-5, 1), "symmetric, got entries that differ by 1e-05"),
        (lambda: central_filters(S / 0, 1), "similarity must be finite"),
        (lambda: distinctness(S / 0), "similarity must be finite"),
        (lambda: central_filters(S, -1), r"n_remove must lie in 0..2 for 3 filters, got -1"),
        (lambda: central_filters(S, 3), "got 3"),
        (lambda: map_coefficients(torch.ones(1, 2, 2), PLAN), "3 channels as the plan, got 2"),
        (lambda: absorb_columns_(nn.Conv2d(6, 6, 3, groups=3), PLAN), "no groups, got 3"),
        (lambda: absorb_columns_(nn.ConvTranspose2d(3, 3, 1), PLAN), "Linear or Conv layer, got ConvTranspose2d"),
        (lambda: absorb_columns_(nn.Linear(2, 1), PLAN), r"input columns 0..1, got 0..2"),
        (lambda: absorb_columns_(nn.Linear(3, 1), PLAN, offset=-1), r"got -1..1"),
        (lambda: absorb_columns_(nn.Linear(3, 1), PLAN, offset=torch.zeros(2, 1).long()), r"\(3, r\).* got .*\(2, 1\)"),
        (lambda: absorb_columns_(nn.Linear(3, 1), PLAN, coefficients=torch.ones(2)), r"shape \(3,\), got \(2,\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_kernel_stays_on_cuda():
    with FakeTensorMode():
        found = _map_similarity(torch.empty(5, 4, 9, device="cuda"))
        assert (found.device.type, found.shape, found.dtype) == ("cuda", (4, 4), torch.float64)
