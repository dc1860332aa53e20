"""Bounds on the number of cells, by hand, by formula, and reached by networks."""

from itertools import combinations, product
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from piecewise import draw, layer

from repgraph.metrics.spline import max_regions_bound, reachable_regions, region_codes, segment_regions

widths = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("n0", "layers", "upper", "reached"),
    [(2, [8, 8], 1369, 592), (1, [2, 2], 9, 6), (1, [2] * 5, 243, 48), (2, [4, 4], 121, 44), (3, [5], 26, 26)],
)
def test_by_hand(n0, layers, upper, reached):
    assert max_regions_bound(layers, n0) == upper
    assert reachable_regions(layers, n0) == reached


@given(widths, st.integers(1, 6))
def test_product_of_layers(layers, n0):
    expected, least = 1, n0
    for n in layers:
        expected *= sum(comb(n, j) for j in range(least + 1))
        least = min(least, n)
    assert max_regions_bound(layers, n0) == expected
    assert reachable_regions(layers, n0) <= expected


@given(widths, st.integers(1, 6))
def test_more_units_or_dimensions_never_lower_the_bound(layers, n0):
    bound = max_regions_bound(layers, n0)
    assert max_regions_bound(layers, n0 + 1) >= bound
    assert max_regions_bound([layers[0] + 1, *layers[1:]], n0) >= bound
    assert max_regions_bound([*layers, 1], n0) == 2 * bound


@given(widths)
def test_a_wide_input_allows_all_codes_of_the_first_layer(layers):
    assert max_regions_bound(layers[:1], 12) == 2 ** layers[0]


def test_bounds_are_exact_integers_beyond_floating_point():
    assert max_regions_bound([200] * 3, 200) == 2**600
    assert reachable_regions([300, 1], 1) == 600


def test_five_planes_of_space_make_26_cells():
    """Each cell has a corner where three of the planes meet: a step off it in eight directions finds them all."""
    w, b = draw(5, 3, seed=4), draw(5, seed=5)
    probes = []
    for three in map(list, combinations(range(5), 3)):
        for signs in product((-1e-7, 1e-7), repeat=3):
            probes.append(torch.linalg.solve(w[three], torch.tensor(signs, dtype=torch.float64) - b[three]))
    codes = region_codes(layer(w.tolist(), b.tolist()), torch.stack(probes), progress=False)
    assert codes.n_unique == 26 == max_regions_bound([5], 3)


def test_four_planes_through_the_origin_make_14_cells():
    w = draw(4, 3, seed=4)
    codes = region_codes(layer(w.tolist(), [0.0] * 4), draw(20_000, 3, seed=6), progress=False)
    assert codes.n_unique == 14 == 2 * sum(comb(3, j) for j in range(3))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_tents_double_and_stay_below_the_bound(count):
    more = [([[2.0, -2.0], [4.0, -4.0]], [0.0, -2.0])] * (count - 1)
    net = layer([[2.0], [4.0]], [0.0, -2.0], *more)
    found = segment_regions(net, torch.zeros(1), torch.ones(1)).count
    assert found == 2**count
    assert found <= max_regions_bound([2] * count, 1)


@pytest.mark.parametrize("f", [max_regions_bound, reachable_regions])
def test_refusals(f):
    for bad in ([], [0], [3, -1]):
        with pytest.raises(ValueError, match="widths must be at least one positive"):
            f(bad, 2)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="n0 must be at least 1"):
            f([3], bad)
