"""Exact nearest neighbours against float64 and rational references, on inputs made to break them."""

import io
import os
import signal
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors
from torch._subclasses import FakeTensorMode
from tqdm import tqdm

from repgraph import neighbors
from repgraph.candidates import Candidates
from repgraph.neighbors import as_samples, knn
from repgraph.precision import full_precision

METRICS = ("cosine", "euclidean")
BAR = tqdm(disable=True)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(*shape, high=3, seed=0):
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def similarities(x, metric):
    """Cosines, or minus distances, of all pairs in float64; -inf for a sample with itself."""
    x = (x if x.dtype == torch.float64 else x.float()).flatten(1).double().numpy()
    if metric == "cosine":
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)
        s = x @ x.T
    else:
        s = -cdist(x, x)
    np.fill_diagonal(s, -np.inf)
    return s


def assert_exact(x, k, metric, screening="auto"):
    values, indices = knn(x, k, metric=metric, screening=screening)
    values, indices = values.double().numpy(), indices.numpy()
    s = similarities(x, metric)
    chosen = np.zeros(s.shape, dtype=bool)
    np.put_along_axis(chosen, indices, True, axis=1)
    assert (chosen.sum(1) == k).all()
    assert not chosen.diagonal().any()
    # Nobody left out is nearer than the k-th neighbour.
    kth = np.where(chosen, s, np.inf).min(1, keepdims=True)
    unit = 1 if metric == "cosine" else np.abs(kth)
    assert (np.where(chosen, -np.inf, s) <= kth + 2e-12 * unit).all()
    # Of those that tie with the k-th neighbour, the chosen ones come first.
    number = np.arange(len(s))
    tied = np.abs(s - kth) <= 1e-14 * unit
    assert (np.where(tied & chosen, number, -1).max(1) < np.where(tied & ~chosen, number, len(s)).min(1)).all()
    # The values are those of the neighbours, in order.
    true = np.take_along_axis(s, indices, 1)
    values = values if metric == "cosine" else -values
    precision = 1e-12 if x.dtype == torch.float64 else 1e-6
    assert (np.abs(values - true) <= precision * unit).all()
    assert (np.diff(values, axis=1) <= 2e-12 * unit).all()


def powers(low, high, n):
    return 10.0 ** torch.linspace(low, high, n, dtype=torch.float64)[:, None]


ADVERSARIAL = {
    "normal": normal(200, 20),
    "float64": normal(200, 20, dtype=torch.float64),
    "float16": normal(200, 20).half(),
    "bfloat16": normal(200, 20).bfloat16(),
    "int64": integers(200, 6).long(),
    "bool": integers(200, 6) > 0,
    "many features": normal(60, 1500).relu(),
    "strided": normal(20, 200).T,
    "duplicates": normal(20, 7).repeat(10, 1),
    "duplicates of many features": normal(20, 1100).repeat(5, 1),
    "near ties": torch.ones(200, 50) + 1e-5 * normal(200, 50),
    "near ties in float64": torch.ones(200, 50) + 1e-9 * normal(200, 50, dtype=torch.float64),
    "common offset": normal(200, 20) + 1e4,
    "common offset in float64": normal(200, 20, dtype=torch.float64) + 1e4,
    "all rows equal": torch.ones(50, 5),
    "all rows zero": torch.zeros(50, 5),
    "one row many times": normal(1, 6).expand(200, 6),
    "rows of one value": integers(200, 1).expand(200, 6),
    "dead rows": (normal(200, 5) - 1).relu(),
    "one hot": torch.eye(50),
    "integers": integers(200, 4),
    "tiny": normal(100, 10) * 1e-20,
    "huge": normal(100, 10) * 1e18,
    "norms from 1e-6 to 1e6": (normal(100, 10) * powers(-6, 6, 100)).float(),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_neighbours_are_exact(name, metric):
    x = ADVERSARIAL[name]
    for k in (1, 3, 12, len(x) - 1):
        assert_exact(x, k, metric)


CROWDED = {
    "clusters": normal(8, 40)[torch.arange(400) % 8] + 1e-3 * normal(400, 40),
    "one tight cluster": torch.cat((normal(300, 40), 1 + 1e-4 * normal(100, 40))),
    "a hundred duplicates": torch.cat((normal(300, 40), torch.ones(100, 40))),
    "behind a ReLU": (normal(400, 300) + 1).relu(),
    "huge offset": normal(400, 40) + 1e5,
    "steps of the rounding": 1 + torch.arange(400)[:, None] * torch.rand(1, 40) * 2.0**-12,
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [*ADVERSARIAL, *CROWDED])
def test_neighbours_are_exact_in_any_precision(name, metric):
    x = (ADVERSARIAL | CROWDED)[name]
    assert_exact(x.float(), 4, metric, "bfloat16")
    assert_exact(x, 4, metric, "float32")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [*ADVERSARIAL, *CROWDED])
def test_neighbours_are_exact_in_small_tiles_of_several_threads(name, metric, monkeypatch):
    x, before = (ADVERSARIAL | CROWDED)[name], torch.get_num_threads()
    monkeypatch.setattr(neighbors, "_SIDES", (1, 37))
    monkeypatch.setattr(neighbors, "_WORTH", 1)
    torch.set_num_threads(3)
    try:
        assert_exact(x.float(), 4, metric, "bfloat16")
        assert_exact(x, 4, metric, "float32")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


DECIDED = {
    "normal": lambda: normal(600, 300),
    "behind a ReLU": lambda: CROWDED["behind a ReLU"],
    "unrelated": lambda: normal(2000, 4096),  # the k-th best cosine is 0.05
}


@pytest.mark.parametrize("kind", DECIDED)
def test_products_in_bfloat16_decide_most_rows(kind, monkeypatch):
    """Or the check above would be one of the fallback."""
    x = DECIDED[kind]()
    compared, whole = [], neighbors._row_scores

    def counted(x, scale, rows, metric):
        compared.append(len(rows))
        return whole(x, scale, rows, metric)

    monkeypatch.setattr(neighbors, "_row_scores", counted)
    monkeypatch.setattr(neighbors, "add_upper_products_", None)  # those of float32
    knn(x, 5, screening="bfloat16")
    assert sum(compared) < len(x) / 10


def rough_errors(x, metric, monkeypatch):
    """The largest spread of the errors of a row, in margins: what rounding does not explain, and all.

    What a product stands for lies between it and `rounding` times it below, but for half the margin at most and what
    all products of a row have in common.
    """
    used = []

    class Recorded(Candidates):
        def add_rows(self, s, i, j):
            used.append((self, s.clone().double(), i, j))
            super().add_rows(s, i, j)

    with monkeypatch.context() as patch:
        patch.setattr(neighbors, "Candidates", Recorded)
        patch.setattr(Recorded, "crowded", lambda *_: False)
        knn(x, 5, metric=metric, screening="bfloat16")
    true = torch.from_numpy(similarities(x, metric))
    if metric == "euclidean":  # in the unit of rows within the unit ball
        largest = (x - x.mean(0)).double().norm(dim=1).max()
        true = -(true / largest).square() / 2
    shares = []
    for found, s, i, j in used:
        rows, others = slice(i, i + len(s)), slice(j, j + s.shape[1])
        off = s - torch.from_numpy(found.half)[others].double() - true[rows, others]  # infinite for a row with itself
        ends = off, off - found.rounding * s.abs(), off - found.rounding / 2 * s.abs()
        highest = [end.nan_to_num(posinf=-9).amax(1) for end in ends]
        lowest = [end.nan_to_num(posinf=9).amin(1) for end in ends]
        spread = torch.stack((highest[1] - lowest[0], highest[2] - lowest[2]))
        shares.append(spread / torch.from_numpy(found.margin)[rows])
    return torch.cat(shares, 1)[:, :-1].amax(1)  # the last row has nobody behind it


SIGNS = torch.sign(normal(100, 4096) + 0.7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "x",
    [normal(300, 40), normal(3, 500)[torch.arange(200) % 3] + 0.1 * normal(200, 500), torch.cat((SIGNS, -SIGNS))],
    ids=["normal", "clusters", "no digits are lost"],
)
def test_errors_in_bfloat16_keep_to_their_bound(x, metric, monkeypatch):
    """What orders a row differs from the true order by no more than the bound, and by a good part of it."""
    left, spread = rough_errors(x, metric, monkeypatch)
    assert left <= 1
    assert spread > (1 if x.shape == (200, 4096) else 0.05)  # rows that lose no digits have no margin for rounding


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("x", [normal(1500, 30), (normal(1500, 300) + 1).relu()], ids=["normal", "behind a ReLU"])
def test_values_do_not_depend_on_how_products_were_summed(x, metric, monkeypatch):
    expected = knn(x, 5, metric=metric, screening="float32")
    for change in ({"screening": "bfloat16"}, {"_SIDES": (1, 200)}, {"_FEATURES": 16}):
        with monkeypatch.context() as patch:
            for name in change.keys() - {"screening"}:
                patch.setattr(neighbors, name, change[name])
            found = knn(x, 5, metric=metric, screening=change.get("screening", "float32"))
        assert all(map(torch.equal, found, expected))


def add_tiles(found, s, side, shuffled=0):
    """In any order."""
    n = len(s)
    tiles = [(i, j) for i in range(0, n, side) for j in range(i, n, side)]
    for at in torch.randperm(len(tiles), generator=torch.Generator().manual_seed(shuffled)).tolist():
        i, j = tiles[at]
        tile = s[i : i + side, j : j + side].contiguous()
        found.add_columns(tile, i, j)
        found.add_rows(tile, i, j)


@given(st.integers(2, 60), st.integers(1, 12), st.floats(0, 0.5), st.sampled_from([0, 0.01, 0.2]), seeds)
def test_candidates_hold_all_within_the_margin(n, k, margin, rounding, seed):
    k = min(k, n - 1)
    s = normal(n, n, seed=seed)
    s = (s + s.T) / 2
    factor, half = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.5, normal(n, seed=seed + 1)
    factor, half = (torch.ones(n), half) if seed % 2 or rounding else (factor, torch.zeros(n))
    found = Candidates(k, factor, half, torch.full((n,), margin, dtype=torch.float64), rounding)
    add_tiles(found, s, 1 + seed % 70, shuffled=seed)
    columns, gave_up = found.found()
    entries = factor[:, None] * factor * s - half[:, None] - half
    entries.fill_diagonal_(-torch.inf)
    kth = (entries - rounding * s.abs()).topk(k, dim=1).values[:, -1]
    for o in range(n):
        own = columns[o][columns[o] >= 0]
        wanted = (entries[o] > kth[o] - margin + 1e-4).nonzero()[:, 0].tolist()
        allowed = (entries[o] > kth[o] - margin - 1e-4).nonzero()[:, 0].tolist()
        assert gave_up[o] or set(wanted) <= set(own.tolist()) <= set(allowed)
        assert len(set(own.tolist())) == len(own)


def test_a_row_with_too_many_candidates_gives_up():
    n, k = 300, 2
    s = torch.eye(n)
    s[0] = s[:, 0] = 0.5  # row 0 has 299 alike, each other row has one
    found = Candidates(k, torch.ones(n), torch.zeros(n), torch.full((n,), 0.1, dtype=torch.float64))
    add_tiles(found, s, n)
    columns, gave_up = found.found()
    assert gave_up.all()  # the others' second best is one of 298 zeros
    found = Candidates(1, torch.ones(n), torch.zeros(n), torch.full((n,), 0.1, dtype=torch.float64))
    add_tiles(found, s, n)
    columns, gave_up = found.found()
    assert gave_up.nonzero().flatten().tolist() == [0]
    assert (columns[1:, 0] == 0).all()


@pytest.mark.parametrize("rest", [1, 5])
def test_ties_of_the_first_entries_are_left_behind_by_larger_ones(rest):
    """A row finds no room for the zeros that tie at first; it gives up only if one of these may still be wanted."""
    n, k = 180, 3
    s = torch.zeros(n, n)
    s[:, n - rest :] = s[n - rest :] = 0.5
    found = Candidates(k, torch.ones(n), torch.zeros(n), torch.full((n,), 0.1, dtype=torch.float64))
    for i in range(0, n, 60):
        found.add_columns(s[i : i + 60, i:].contiguous(), i, i)
        found.add_rows(s[i : i + 60, i:].contiguous(), i, i)
    columns, gave_up = found.found()
    assert gave_up[: n - rest].tolist() == [rest < k] * (n - rest)
    assert gave_up[n - rest :].all()
    if rest > k:
        assert {tuple(c for c in row if c >= 0) for row in columns[: n - rest].tolist()} == {tuple(range(n - rest, n))}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [40, 300])
def test_few_samples_of_many_features(n, metric):
    assert_exact(normal(n, neighbors._DEEP, seed=n), 3, metric)
    assert_exact(normal(7, neighbors._DEEP)[torch.arange(n) % 7] + 1e-3 * normal(n, 1), 3, metric)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("n", [600, 1500])
def test_an_interrupt_ends_the_search_at_once(n, monkeypatch):
    x, products = normal(n, 900), neighbors.add_upper_products_
    made = []
    knn(x, 3, screening="float32")  # threads are kept
    threads = threading.active_count()

    def interrupted(*args, **options):
        made.append(args[0].shape)
        if len(made) == 2:
            interrupt()
        return products(*args, **options)

    precision = torch.get_float32_matmul_precision()
    with monkeypatch.context() as patch:
        patch.setattr(neighbors, "add_upper_products_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            knn(x, 3, screening="float32")
    assert len(made) == 2
    assert threading.active_count() == threads
    assert torch.get_float32_matmul_precision() == precision
    assert_exact(x, 3, "cosine")


@pytest.mark.parametrize(("n", "screening"), [(150, "float32"), (3000, "float32"), (300, "bfloat16")])
def test_the_bar_counts_rows_and_those_compared_with_all_others(n, screening, monkeypatch):
    counts = []

    class Shown(tqdm):
        def __init__(self, **choices):
            super().__init__(**choices | {"delay": 0, "file": io.StringIO()})

        def close(self):
            counts.append((self.n, self.total, self.disable))
            super().close()

    monkeypatch.setattr(neighbors, "tqdm", Shown)
    knn(normal(n, 900), 3, screening=screening, progress=True)
    knn(torch.ones(n, 900), 3, screening=screening, progress=True)  # every row is compared with all others
    knn(normal(n, 900), 3, screening=screening)
    assert set(counts[:1]) == {(n, n, False)}
    assert (2 * n, 2 * n, False) in counts
    assert counts[-1][2]


def test_screening_is_checked():
    with pytest.raises(ValueError, match="screening must be one of auto, float32, bfloat16, got 'half'"):
        knn(normal(9, 3), 2, screening="half")
    with pytest.raises(ValueError, match=r"needs float32 on a CPU, got torch\.float64 on cpu"):
        knn(normal(9, 3).double(), 2, screening="bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cosine_neighbours_are_exact_for_norms_from_1e_minus_20_to_1e20(dtype):
    x = (normal(120, 10, dtype=torch.float64) * powers(-20, 20, 120)).to(dtype)
    for k in (1, 3, 12):
        assert_exact(x[torch.from_numpy(np.random.default_rng(0).permutation(120))], k, "cosine")


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e6), (torch.float64, 1e9)])
def test_distances_are_exact_under_a_huge_common_offset(dtype, offset):
    assert_exact(normal(300, 20, dtype=dtype) + offset, 3, "euclidean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_distant_sample_leaves_the_distances_of_the_others_alone(dtype):
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0], [1e14]], dtype=dtype)
    assert knn(x, 1, metric="euclidean")[1][:4, 0].tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("metric", METRICS)
def test_float64_beyond_the_range_of_squares(metric):
    x = normal(20, 5, dtype=torch.float64)
    values, indices = knn(1e200 * x, 3, metric=metric)
    assert values.isfinite().all()
    assert torch.equal(indices, knn(x, 3, metric=metric)[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [255, 256, 257, 513, 1023, 1024, 1025, 1100])
def test_sizes_around_the_blocks(n, metric):
    assert_exact(integers(n, 3, high=4), 3, metric)
    assert_exact(normal(n, 8), 10, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d"), [(255, 513), (257, 511), (257, 513), (513, 512), (513, 513), (1025, 513)])
def test_sizes_around_the_blocks_with_features_around_theirs(n, d, metric):
    assert_exact(integers(n, d, high=1), 3, metric)


small_integers = st.tuples(st.integers(2, 12), st.integers(1, 4)).flatmap(
    lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(-3, 3))
)


@given(small_integers, st.data())
def test_ties_go_to_the_lowest_index(x, data):
    n = len(x)
    k = data.draw(st.integers(1, n - 1))
    gram = [[int(a @ b) for b in x] for a in x]

    def far(i, j, metric):  # grows with the distance of j from i, exactly
        if metric == "euclidean":
            return int(((x[i] - x[j]) ** 2).sum())
        return Fraction(-gram[i][j] * abs(gram[i][j]), max(gram[j][j], 1))

    for metric in METRICS:
        _, indices = knn(torch.from_numpy(x).float(), k, metric=metric)
        for i in range(n):
            others = sorted((j for j in range(n) if j != i), key=lambda j, i=i, m=metric: (far(i, j, m), j))
            assert set(indices[i].tolist()) == set(others[:k])


@pytest.mark.parametrize("rows", [[[126, 15], [882, 105]], [[882, 105], [126, 15]]])
def test_a_tie_between_multiples_goes_to_the_lowest_index(rows):
    """The two cosines to (1, 2) are equal; in float64 they differ in the last digit."""
    x = torch.tensor([[1, 2], *rows], dtype=torch.float64)
    assert knn(x, 1)[1][0].item() == 1


def test_a_zero_row_has_the_first_others_at_similarity_0():
    x = normal(30, 4)
    x[[0, 7]] = 0
    values, indices = knn(x, 3)
    assert indices[0].tolist() == [1, 2, 3]
    assert indices[7].tolist() == [0, 1, 2]
    assert values[[0, 7]].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_row_that_opposes_all_others_takes_the_first_zero_rows():
    x = torch.tensor([[1.0, 0], [2, 0], [0, 0], [-1, 0], [0, 0]])
    assert sorted(knn(x, 2)[1][3].tolist()) == [2, 4]


def test_norms_below_the_floor_shrink_the_similarity():
    x = torch.tensor([[1e-10, 0], [1.0, 1.0], [0, 1.0]], dtype=torch.float64)
    assert knn(x, 1)[0][0].item() == pytest.approx(1e-2 / 2**0.5, rel=1e-12)


def test_duplicates_are_at_distance_exactly_zero():
    x = normal(40, 600).repeat(2, 1) + 1e3
    values, indices = knn(x, 2, metric="euclidean")
    assert torch.equal(values[:, 0], torch.zeros(80))
    assert torch.equal(indices[:, 0], (torch.arange(80) + 40) % 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cosines_lie_in_minus_one_to_one(dtype):
    x = normal(50, 300, dtype=dtype)
    values, _ = knn(torch.cat((x, x, -x)), 149)
    assert values.abs().max() <= 1


@given(seeds, st.integers(2, 40), st.integers(1, 30))
@settings(max_examples=10)
def test_parity_with_scikit_learn(seed, n, d):
    x = normal(n, d, seed=seed, dtype=torch.float64)
    k = min(5, n - 1)
    for metric in METRICS:
        reference = NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(x.numpy())
        distance, index = reference.kneighbors()
        values, indices = knn(x, k, metric=metric)
        if metric == "cosine" and d == 1:
            index = indices.numpy()  # all cosines are 1 or -1: only the values can be compared
        np.testing.assert_array_equal(indices.numpy(), index)
        np.testing.assert_allclose(values.numpy(), 1 - distance if metric == "cosine" else distance, atol=1e-7)


def sets(x, k=5):
    return [knn(x, k, metric=metric)[1].sort(1).values for metric in METRICS]


MIXED = {
    "normal": normal(600, 12),
    "integers": integers(600, 3),
    "offset": normal(600, 12) + 1e5,
    "dead rows": (normal(600, 4) - 1).relu(),
}


@pytest.mark.parametrize("x", MIXED.values(), ids=MIXED)
def test_block_size_changes_no_neighbour(x, monkeypatch):
    expected = sets(x)
    for block in (1000, 7):
        monkeypatch.setattr(neighbors, "_block", lambda n, block=block: block)
        for one, other in zip(sets(x), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("x", MIXED.values(), ids=MIXED)
def test_threads_change_no_neighbour(x):
    before = torch.get_num_threads()
    expected = sets(x)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for one, other in zip(sets(x), expected, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block", [1, 3, 64, 255, 256, 1000])
def test_screened_values_keep_to_their_bound(block):
    """The error of a screened cosine is below (512 + d/512 + 8) u; each of the m largest is found."""
    x = normal(256, 700).abs() + 1
    factor = torch.linalg.vector_norm(x, dim=1).reciprocal()
    values, indices = neighbors._screen(x, factor, None, 20, block, BAR)
    s = torch.from_numpy(similarities(x, "cosine"))
    bound = (512 + 700 / 512 + 8) * 2.0**-24
    assert (values.double() - s.gather(1, indices)).abs().max() < bound
    assert (values.double() - s.topk(20, dim=1).values).abs().max() < bound
    assert all(len(set(row)) == 20 and i not in row for i, row in enumerate(indices.tolist()))


@pytest.mark.parametrize("block", [1, 3, 64, 100])
def test_screen_finds_the_same_sets_in_any_block(block):
    x = normal(100, 9, dtype=torch.float64)
    half = x.square().sum(1) / 2
    values, indices = neighbors._screen(x, None, half, 6, block, BAR)
    expected = torch.from_numpy(similarities(x, "euclidean"))
    torch.testing.assert_close(values, -expected.topk(6, dim=1).values.square() / 2)
    assert torch.equal(indices, expected.topk(6, dim=1).indices)


def test_a_lower_matmul_precision_is_set_aside_and_restored():
    x = normal(300, 600) + 3
    expected = sets(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for one, other in zip(sets(x), expected, strict=True):
            assert torch.equal(one, other)
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(RuntimeError), full_precision(x.device):
            torch.mm(normal(2, 3), normal(2, 4))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("d", [50, 700])
def test_autocast_changes_nothing(d):
    x = normal(300, d) + 2
    expected = sets(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sets(x)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has only one setting")
@pytest.mark.parametrize("name", ["cuda", "mkldnn"])
def test_precision_set_per_backend_is_set_aside_and_restored(name):
    backend = getattr(torch.backends, name).matmul
    x = normal(20, 5)
    expected = knn(x, 3)[1]
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        assert torch.equal(knn(x, 3)[1], expected)
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("metric", METRICS)
def test_trailing_axes_are_flattened(metric):
    x = normal(30, 24)
    for part, whole in zip(knn(x.reshape(30, 2, 3, 4), 4, metric=metric), knn(x, 4, metric=metric), strict=True):
        assert torch.equal(part, whole)


@pytest.mark.parametrize(
    ("given_type", "value_type"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float16, torch.float32),
        (torch.int32, torch.float32),
    ],
)
def test_types_and_device_of_the_result(given_type, value_type):
    x = (10 * normal(20, 5)).to(given_type)
    values, indices = knn(x, 3)
    assert (values.dtype, indices.dtype) == (value_type, torch.int64)
    assert values.shape == indices.shape == (20, 3)
    assert values.device == indices.device == x.device


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["normal", "float64", "tiny", "dead rows", "common offset"])
def test_x_is_not_modified(name, metric):
    x = ADVERSARIAL[name].clone().requires_grad_()
    values, _ = knn(x, 3, metric=metric)
    assert torch.equal(x, ADVERSARIAL[name])
    assert not values.requires_grad


def test_as_samples_makes_no_copy_of_floats():
    x = normal(4, 6)
    assert as_samples(x).data_ptr() == x.data_ptr()
    assert as_samples(x.reshape(4, 2, 3)).shape == (4, 6)
    assert as_samples(torch.full((2, 3), 3e38)).isfinite().all()  # though their sum is not


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("x", "k", "metric", "message"),
    [
        (torch.ones(5), 1, "cosine", r"x must have shape \(n, \.\.\.\).* got \(5,\)"),
        (torch.ones(0, 3), 1, "cosine", r"x must have shape .* got \(0, 3\)"),
        (torch.ones(4, 0), 1, "cosine", r"x must have shape .* got \(4, 0\)"),
        (torch.tensor([[1.0], [NAN], [2.0]]), 1, "cosine", "x must be finite.* in 1 of 3 samples"),
        (torch.tensor([[INF], [-INF], [2.0]]), 1, "euclidean", "x must be finite.* in 2 of 3 samples"),
        (torch.eye(3), 0, "cosine", "k must be an integer with 1 <= k < n, got k = 0 with n = 3"),
        (torch.eye(3), 3, "cosine", "k must be .* got k = 3 with n = 3"),
        (torch.eye(3), -1, "euclidean", "k must be .* got k = -1"),
        (torch.eye(3), 1.0, "cosine", "k must be .* got k = 1.0"),
        (torch.eye(3), True, "cosine", "k must be .* got k = True"),
        (torch.eye(1), 1, "cosine", "k must be .* n = 1 samples"),
        (torch.eye(3), 1, "manhattan", "metric must be 'cosine' or 'euclidean', got 'manhattan'"),
    ],
)
def test_bad_input(x, k, metric, message):
    with pytest.raises(ValueError, match=message):
        knn(x, k, metric=metric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [5, 1030])
def test_kernels_stay_on_cuda(d, dtype):
    with FakeTensorMode():
        x = torch.empty(300, d, device="cuda", dtype=dtype)
        rows = torch.arange(10, device="cuda")
        others = torch.zeros((10, 12), dtype=torch.int64, device="cuda")
        norm = neighbors.row_norms(x)
        results = [norm]
        results += neighbors._screen(x, norm.reciprocal().to(dtype), None, 11, 256, BAR)
        results += neighbors._screen(x, None, norm.square().to(dtype), 11, 128, BAR)
        for metric in METRICS:
            results += neighbors._best(neighbors._pair_scores(x, norm, rows, others, metric), others, 3, metric)
            results.append(neighbors._row_scores(x, norm, rows, metric))
        assert {result.device.type for result in results} == {"cuda"}
        assert results[-1].shape == (10, 300)
