"""Births of holes in feature maps: by hand, against Rips complexes, on known surfaces, as theorems, refusals."""

import math
import warnings
from itertools import combinations

import gudhi
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ripser import ripser

from repgraph.metrics.feature_entropy import feature_birth

seeds = st.integers(0, 2**32 - 1)
KINDS = ["gaussian", "relu", "sparse", "rounded", "saturated", "binary"]
BACKENDS = ["unionfind", "gudhi"]
SQUARE = {(0, 1): 9, (1, 2): 8, (2, 3): 7, (0, 3): 6, (1, 3): 2, (0, 2): 1}


def graph(m, weights):
    u = torch.zeros(m, m)
    for (i, j), weight in weights.items():
        u[i, j] = weight
    return u


def tied(edges):
    """Map of a graph on 0..m-1 all of whose edges enter together."""
    return graph(1 + max(map(max, edges)), dict.fromkeys(edges, 1.0))


def random_maps(seed, m, kind, count=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, m, m), np.float32)
    if kind == "relu":
        return x.clip(0)
    if kind == "sparse":
        return x.clip(0) * (rng.random(x.shape) < 2 / m)
    if kind == "rounded":
        return x.round()
    if kind == "saturated":
        return (4 * x).round().clip(0, 6)
    if kind == "binary":
        return (rng.random(x.shape) < rng.random((count, 1, 1)) * 0.6).astype(np.float32)
    return x


def ranks(u):
    """Distance matrix: place of an edge's weight among the distinct weights, from 1 for the largest."""
    w = np.maximum(u, u.T)
    off = ~np.eye(len(u), dtype=bool)
    place = {level: i for i, level in enumerate(sorted(set(w[off].tolist()), reverse=True), 1)}
    d = np.zeros(w.shape)
    d[off] = [place[value] for value in w[off].tolist()]
    return d


def by_rips(u):
    tree = gudhi.RipsComplex(distance_matrix=ranks(u)).create_simplex_tree(max_dimension=2)
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=True)
    return int(min(tree.persistence_intervals_in_dimension(1)[:, 0], default=0))


def by_sparse_rips(u):
    """Without the last frame, which completes the graph."""
    d = ranks(u)
    tree = gudhi.RipsComplex(distance_matrix=d, max_edge_length=d.max() - 0.5).create_simplex_tree(max_dimension=2)
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=True)
    return int(min(tree.persistence_intervals_in_dimension(1)[:, 0], default=0))


def ring(m, k):
    """A map whose strongest k edges are a cycle, all others tied."""
    return graph(m, {(i, (i + 1) % k): 2 * k - i for i in range(k)})


def by_ripser(u):
    return int(min(ripser(ranks(u), maxdim=1, coeff=2, distance_matrix=True)["dgms"][1][:, 0], default=0))


def births(maps, **options):
    return feature_birth(maps, density=1, **options).tolist()


# By hand


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("m", "weights", "expected"),
    [
        (4, SQUARE, 4),
        (4, SQUARE | {(0, 2): 6.5}, 0),
        (4, {(0, 1): 4, (3, 2): 3, (1, 3): 2, (2, 0): 1}, 4),
        (4, dict.fromkeys([(0, 1), (1, 2), (2, 3), (0, 3)], 5), 1),
        (4, {(0, 1): 9, (1, 2): 8, (2, 3): 8, (0, 3): 8}, 2),
        (5, dict.fromkeys([(0, 1), (1, 2), (2, 3), (0, 3), (0, 2)], 9) | {(3, 4): 7, (1, 4): 6}, 3),
    ],
    ids=["square", "chord first", "figure of the paper", "tied", "first edge alone", "filled in its frame"],
)
def test_births_by_hand(m, weights, expected, backend):
    u = graph(m, weights)
    assert feature_birth(u, backend=backend).item() == expected
    assert feature_birth(u - 100, backend=backend).item() == expected


def test_first_interval_of_the_square():
    tree = gudhi.RipsComplex(distance_matrix=ranks(graph(4, SQUARE).numpy())).create_simplex_tree(max_dimension=2)
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=True)
    assert tree.persistence_intervals_in_dimension(1).tolist() == [[4, 5]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [4, 7, 65])
def test_maps_without_a_birth(m, backend):
    for u in (torch.zeros(m, m), torch.ones(m, m), torch.eye(m), -torch.ones(m, m), torch.triu(torch.ones(m, m), 1)):
        assert feature_birth(u, backend=backend).item() == 0


def test_the_weight_of_an_edge_is_the_larger_of_both_entries():
    u = graph(4, SQUARE)
    u[2, 0] = 6.5
    assert feature_birth(u).item() == 0
    u[2, 0] = 6
    assert feature_birth(u).item() == 0  # enters with the closing edge


# Known spaces: all edges of a clique complex in the first frame


def subdivided(triangles):
    """Barycentric subdivision, a clique complex of the same space: inclusions among vertices, edges and triangles."""
    faces = sorted({face for t in triangles for k in (1, 2, 3) for face in combinations(sorted(t), k)})
    return [(i, j) for (i, a), (j, b) in combinations(enumerate(faces), 2) if set(a) < set(b) or set(b) < set(a)]


PROJECTIVE_PLANE = [(i, (i + 1) % 5, k) for i in range(5) for k in (5, (i + 3) % 5)]
TORUS = [(i, (i + a) % 7, (i + 3) % 7) for i in range(7) for a in (1, 2)]
SPHERE = list(combinations(range(4), 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        (subdivided(PROJECTIVE_PLANE), 1),  # no hole over the rationals, one over Z/2
        (subdivided(TORUS), 1),
        (subdivided(SPHERE), 0),
        (list(nx.icosahedral_graph().edges), 0),
        (list(nx.octahedral_graph().edges), 0),
        (list(nx.dodecahedral_graph().edges), 1),
        (list(nx.cycle_graph(70).edges), 1),
        (list(nx.wheel_graph(70).edges), 0),
        (list(nx.random_labeled_tree(70, seed=0).edges), 0),
        (list(nx.complete_bipartite_graph(2, 2).edges), 1),
        (list(nx.complete_multipartite_graph(2, 2, 40).edges), 0),
    ],
)
def test_births_on_known_spaces(edges, expected, backend):
    u = tied(edges)
    assert feature_birth(u, backend=backend).item() == expected
    order = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))
    assert feature_birth(u[order][:, order], backend=backend).item() == expected


def test_a_hole_beside_other_components_counts():
    far = nx.disjoint_union(nx.octahedral_graph(), nx.cycle_graph(66))
    assert feature_birth(tied(list(far.edges))).item() == 1
    assert feature_birth(tied(list(nx.disjoint_union(nx.octahedral_graph(), nx.wheel_graph(66)).edges))).item() == 0


@pytest.mark.parametrize("k", [2, 10, 40])
def test_density_counts_distinct_weights_and_not_edges(k):
    sizes = k, k, 1, 1
    ring = [[sum(sizes[:p]) + i for i in range(sizes[p])] for p in range(4)]
    near = [(0, 1), (1, 2), (2, 3), (0, 3), *((p, p) for p in range(4))]
    edges = {tuple(sorted((i, j))) for p, q in near for i in ring[p] for j in ring[q] if i != j}
    m = sum(sizes)
    if k > 2:
        assert len(edges) > 0.8 * m * (m - 1) / 2
    assert feature_birth(tied(sorted(edges)), density=0.001).item() == 1


# Parity


@given(seeds, st.integers(4, 16), st.sampled_from(KINDS))
@settings(max_examples=120)
def test_parity_with_rips_complexes(seed, m, kind):
    u = random_maps(seed, m, kind)
    expected = [by_rips(u[0])]
    assert births(u) == expected
    assert births(u, backend="gudhi") == expected


@given(seeds, st.integers(4, 20), st.sampled_from(KINDS))
@settings(max_examples=120)
def test_parity_with_ripser(seed, m, kind):
    u = random_maps(seed, m, kind)
    assert births(u) == [by_ripser(u[0])]


@pytest.mark.parametrize(
    ("m", "kind"), [*((m, kind) for m in (63, 64, 65, 70) for kind in KINDS), (130, "sparse"), (130, "binary")]
)
def test_parity_with_more_than_one_word(m, kind):
    u = random_maps(m, m, kind, 3 if m < 100 else 1)
    assert births(u) == [by_ripser(one) for one in u]


@given(seeds, st.sampled_from([65, 70]), st.floats(0.5, 8))
@settings(max_examples=15)
def test_parity_where_ties_are_decided_on_large_graphs(seed, m, degree):
    rng = np.random.default_rng(seed)
    u = (rng.random((m, m)) < degree / m) * rng.integers(1, 3, (m, m))
    assert births(u[None]) == [by_sparse_rips(u)]


@given(seeds, st.integers(5, 12))
def test_two_frames_of_which_the_first_has_filled_holes_only(seed, m):
    points = np.random.default_rng(seed).standard_normal((m, 2))
    near = -np.linalg.norm(points[:, None] - points, axis=2)
    u = np.digitize(near, np.quantile(near, [0.3, 0.5, 0.7, 0.9])).astype(np.float32)
    assert births(u[None]) == [by_rips(u)]


# Theorems


@given(seeds, st.integers(4, 14), st.sampled_from(KINDS))
@settings(max_examples=100)
def test_only_the_order_of_edges_matters(seed, m, kind):
    u = torch.from_numpy(random_maps(seed, m, kind, 3)).double()
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    expected = births(u)
    assert births(3.7 * u) == expected
    assert births(u.exp()) == expected
    assert births(u - 50) == expected
    assert births(u.mT) == expected
    assert births(torch.maximum(u, u.mT)) == expected
    assert births(u[:, order][:, :, order]) == expected
    assert births(u.roll((2, 2), (1, 2))) == expected
    assert births(u + torch.diag(1e3 * torch.randn(m, generator=torch.Generator().manual_seed(seed)))) == expected


def test_flips_and_shifts_move_births():
    u = graph(4, SQUARE)
    assert [feature_birth(v).item() for v in (u, u.flip(1), u.flip(0))] == [4, 0, 0]
    many = torch.from_numpy(random_maps(0, 14, "gaussian", 200))
    changed = [
        (feature_birth(v) != feature_birth(many)).double().mean().item() for v in (many.flip(2), many.roll(1, 2))
    ]
    assert changed == pytest.approx([0.89, 0.83], abs=0.08)


@given(seeds, st.integers(4, 12), st.sampled_from(KINDS), st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.5, 0.8, 1]))
@settings(max_examples=100)
def test_limits_drop_later_births(seed, m, kind, max_rank, density):
    u = random_maps(seed, m, kind, 4)
    unlimited = [by_rips(one) for one in u]
    edges, tenths = m * (m - 1) // 2, round(density * 20)
    frames = -(-edges * tenths // 20)  # the ceiling, in whole numbers
    for backend in BACKENDS:
        options = {"density": density, "backend": backend}
        assert feature_birth(u, **options).tolist() == [b * (b <= frames) for b in unlimited]
        limited = feature_birth(u, max_rank=max_rank, **options).tolist()
        assert limited == [b * (b <= min(frames, max_rank)) for b in unlimited]


def test_the_limits_keep_the_last_frame_that_they_allow():
    u = graph(4, SQUARE)
    assert [feature_birth(u, max_rank=rank).item() for rank in (3, 4, 5)] == [0, 4, 4]
    assert [feature_birth(u, density=d).item() for d in (0.5, 0.51, 2 / 3)] == [0, 4, 4]


def test_preset_is_rank_51_and_density_08():
    u = torch.stack([ring(60, k) for k in (4, 50, 51, 52, 60)])
    assert feature_birth(u).tolist() == [4, 50, 51, 52, 60]
    assert feature_birth(u, preset="zhao2022").tolist() == [4, 50, 51, 0, 0]
    assert feature_birth(u, preset="zhao2022", max_rank=51, density=0.8, backend="gudhi").tolist() == [4, 50, 51, 0, 0]
    small = torch.stack([ring(5, 5), ring(6, 6)[[0, 5, 1, 2, 3]][:, [0, 5, 1, 2, 3]], graph(5, {(0, 1): 1})])
    assert feature_birth(small, preset="zhao2022").tolist() == feature_birth(small).tolist()


@pytest.mark.parametrize(("count", "birth", "expected"), [(5, 35, 35), (6, 36, 36), (7, 37, 0)])
def test_default_density_is_08(count, birth, expected):
    spokes = [(j, 8) for j in range(count)]  # beside a clique of 8 vertices, then the way 8-9-7 closes a cycle
    edges = [*combinations(range(8), 2), *spokes, (8, 9), (7, 9)]
    u = graph(10, {edge: 500.0 - k for k, edge in enumerate(edges)})
    assert feature_birth(u, density=1).item() == by_rips(u.numpy()) == birth
    assert feature_birth(u).item() == feature_birth(u, density=0.8).item() == expected  # of 0.8 x 45 = 36 frames


# Types and shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_ties_are_ties(dtype):
    u = torch.from_numpy(random_maps(1, 14, "relu", 80)).to(dtype)
    assert births(u) == [by_rips(one) for one in u.double().numpy()]
    v = 64 + graph(4, SQUARE) / 16  # in bfloat16 64.5 and 64
    assert feature_birth(v.to(dtype)).item() == (4 if dtype == torch.float16 else 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
def test_integers(dtype):
    u = torch.from_numpy(random_maps(2, 9, "saturated", 40)).to(dtype)
    assert births(u) == births(u.double()) == [by_rips(one) for one in u.double().numpy()]


@pytest.mark.parametrize("top", [2**24, 2**31 - 10, 2**40])
def test_large_integers_are_told_apart(top):
    u = top + graph(4, SQUARE).numpy().astype(np.int64)
    assert feature_birth(u).item() == 4
    if top < 2**31:
        assert feature_birth(u.astype(np.int32)).item() == 4


def test_large_unsigned_integers_are_told_apart():
    u = graph(4, SQUARE).numpy().astype(np.uint32)
    assert feature_birth(u + np.uint32(2**31)).item() == 4


def test_float64_is_not_rounded():
    assert feature_birth(1 + 1e-12 * graph(4, SQUARE).double()).item() == 4
    assert feature_birth(1 + 1e-12 * graph(4, SQUARE)).item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_zero_is_zero(backend):
    u = graph(5, {(0, 1): 3, (1, 2): 2, (2, 3): 1})
    v = torch.where(torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.5, -0.0, u)
    v = torch.where(u > 0, u, v)
    assert (torch.signbit(v) & (v == 0)).any()
    for one in (v, v.double()):
        assert feature_birth(one, backend=backend).item() == feature_birth(u, backend=backend).item() == 0
    u[0, 3], u[3, 0] = 0.0, -0.0
    u[1, 3] = u[0, 2] = u[4] = -1
    u[:, 4] = -1
    assert feature_birth(u, backend=backend).item() == 0  # 03 is tied with entries that are 0 below the diagonal


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3), (2, 1, 3), (130,)])
def test_leading_axes(shape):
    count = math.prod(shape)
    u = torch.from_numpy(random_maps(3, 6, "gaussian", count)).reshape(*shape, 6, 6)
    found = feature_birth(u)
    assert (tuple(found.shape), found.dtype, found.device.type) == (shape, torch.int64, "cpu")
    assert found.flatten().tolist() == [feature_birth(one).item() for one in u.reshape(-1, 6, 6)] if count else True
    assert feature_birth(u, backend="gudhi").tolist() == found.tolist()


def test_strided_maps_and_gradients():
    u = torch.from_numpy(random_maps(4, 12, "gaussian", 30)).requires_grad_()
    before = u.detach().clone()
    for view in (u[:, ::2, ::2], u.mT, u.permute(2, 1, 0)[:, :12, :12], u[:1].expand(5, 12, 12)):
        assert births(view) == births(view.detach().clone(memory_format=torch.contiguous_format))
        assert births(view.detach().numpy()) == births(view)
    assert torch.equal(u, before)


@pytest.mark.parametrize("change", [lambda u: u[:, ::-1, ::-1], lambda u: u.astype(">f4")], ids=["flipped", "swapped"])
def test_arrays_in_any_memory_layout(change):
    u = random_maps(5, 6, "gaussian", 20)
    assert births(change(u)) == births(change(u).astype(np.float32).copy())


def test_read_only_arrays_give_no_warning():
    u = random_maps(5, 6, "gaussian", 20)
    expected = births(u)
    u.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)
        try:
            assert births(u) == expected
        finally:
            torch.set_warn_always(False)


def test_threads_change_nothing():
    u = random_maps(6, 8, "rounded", 300)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(births(u))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2] == [births(one) for one in u]


# Refused


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 4), (4,), (), (0, 4, 6)])
def test_maps_that_are_not_square_are_refused(shape):
    with pytest.raises(ValueError, match="maps must be square"):
        feature_birth(torch.zeros(shape))


@pytest.mark.parametrize("m", [0, 1, 2, 3])
def test_maps_too_small_for_a_hole_are_refused(m):
    with pytest.raises(ValueError, match="at least 4 x 4"):
        feature_birth(torch.zeros(2, m, m))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 1), (2, 2), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_are_refused(bad, place, dtype):
    u = torch.zeros(3, 4, 4, dtype=dtype)
    u[(1, *place)] = bad
    with pytest.raises(ValueError, match="finite"):
        feature_birth(u)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"density": -0.1}, "density"),
        ({"density": 1.01}, "density"),
        ({"density": math.nan}, "density"),
        ({"max_rank": 0}, "max_rank"),
        ({"max_rank": -3}, "max_rank"),
        ({"max_rank": True}, "max_rank"),
        ({"backend": "cubical"}, "backend"),
        ({"backend": None}, "backend"),
        ({"preset": "zhao"}, "preset"),
        ({"preset": "zhao2022", "max_rank": 40}, "preset"),
        ({"preset": "zhao2022", "density": 0.5}, "preset"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        feature_birth(torch.zeros(4, 4), **options)


def test_complex_maps_are_refused():
    with pytest.raises(ValueError, match="real"):
        feature_birth(torch.zeros(4, 4, dtype=torch.complex64))
