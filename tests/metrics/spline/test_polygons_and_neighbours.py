"""Polygons are convex and disjoint; who shares an edge is checked by comparing all edges with each other."""

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piecewise import BOX, ZOO, cells, draw, filled, layer, mlp, plane

from repgraph import Graph

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=6)


def shared_edges(partition, tolerance=1e-9):
    """Pair of cells -> length, by laying every edge over every other that runs the opposite way on the same line."""
    start = np.concatenate(partition.polygons)
    end = np.concatenate([np.roll(p, -1, 0) for p in partition.polygons])
    cell = np.repeat(np.arange(partition.count), [len(p) for p in partition.polygons])
    length = np.linalg.norm(end - start, axis=1)
    keep = length > tolerance
    start, end, cell, length = start[keep], end[keep], cell[keep], length[keep]
    unit = (end - start) / length[:, None]
    normal = np.stack((-unit[:, 1], unit[:, 0]), 1)
    along = lambda x: np.einsum("ijk,ik->ij", x[None] - start[:, None], unit)  # noqa: E731
    off = lambda x: np.abs(np.einsum("ijk,ik->ij", x[None] - start[:, None], normal))  # noqa: E731
    overlap = np.minimum(along(start), length[:, None]) - np.maximum(along(end), 0)
    same = (off(start) < tolerance) & (off(end) < tolerance) & (unit @ unit.T < 0) & (overlap > tolerance)
    found = {}
    for i, j in zip(*np.nonzero(same & (cell[:, None] < cell)), strict=True):
        found[cell[i], cell[j]] = found.get((cell[i], cell[j]), 0) + overlap[i, j]
    return found


def pairs_of(partition):
    return {(min(a, b), max(a, b)): x for (a, b), x in zip(partition.pairs.tolist(), partition.lengths, strict=True)}


SOME = ("mlp", "relu6", "jump", "clamp", "functional", "max 1-D", "padded max")


@pytest.mark.parametrize("name", SOME)
def test_neighbours_are_those_that_share_an_edge(name):
    shape, make = ZOO[name]
    found = cells(filled(make()), (0.2 if name == "padded max" else 1) * BOX, *plane(shape))
    assert found.count > 5
    assert len(pairs_of(found)) == len(found.pairs)
    assert pairs_of(found) == pytest.approx(shared_edges(found), abs=1e-8)


@given(seeds)
@few
def test_neighbours_in_random_networks(seed):
    found = cells(mlp([2, 7, 6, 2], seed), 3 * BOX)
    expected = {pair: x for pair, x in shared_edges(found).items() if x > 1e-7}
    got = {pair: x for pair, x in pairs_of(found).items() if x > 1e-7}
    assert got == pytest.approx(expected, abs=1e-7)
    graph = found.to_networkx()
    assert nx.is_connected(graph)
    assert nx.check_planarity(graph)[0]


@pytest.mark.parametrize("name", SOME[:-1])
def test_polygons_are_convex_and_counterclockwise(name):
    shape, make = ZOO[name]
    found = cells(filled(make()), BOX, *plane(shape))
    for p, area in zip(found.polygons, found.areas, strict=True):
        e = np.roll(p, -1, 0) - p
        f = np.roll(e, -1, 0)
        assert (e[:, 0] * f[:, 1] - e[:, 1] * f[:, 0] > -1e-11).all()
        q = np.roll(p, -1, 0)
        assert area == pytest.approx((p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum() / 2, abs=1e-12)
        assert area > 0
        assert (np.abs(p) <= 1 + 1e-12).all()
    assert found.areas.sum() == pytest.approx(4, abs=1e-10)


@given(seeds, st.integers(1, 8))
@few
def test_edges_of_one_layer_add_up_to_its_chords(seed, n):
    w, b = draw(n, 2, seed=seed), 0.5 * draw(n, seed=seed + 1)
    total = 0.0
    for row, bias in zip(w.numpy(), b.numpy(), strict=True):
        point, direction = -bias * row / (row @ row), np.array([-row[1], row[0]]) / np.linalg.norm(row)
        ends = np.sort(np.stack(((-1 - point) / direction, (1 - point) / direction)), 0)
        total += max(0, ends[1].min() - ends[0].max())
    found = cells(layer(w.tolist(), b.tolist()))
    assert found.lengths.sum() == pytest.approx(total, abs=1e-9)


@given(seeds)
@few
def test_neighbours_across_a_first_border_differ_in_one_gate(seed):
    net = mlp([2, 6], seed)
    net.append(torch.nn.ReLU())
    found = cells(net.eval(), 3 * BOX)
    for a, b in found.pairs:
        assert (found.codes[a] != found.codes[b]).sum() == 1


def test_dual_graph_and_networkx_hold_the_same():
    found = cells(mlp([2, 6, 5, 2]), 3 * BOX)
    graph, other = found.dual_graph(), found.to_networkx()
    assert isinstance(graph, Graph)
    assert (graph.n, graph.num_edges) == (found.count, len(found.pairs)) == (len(other), other.number_of_edges())
    dense = nx.to_numpy_array(other, nodelist=range(found.count), weight="length")
    assert np.array_equal(graph.adjacency.toarray(), dense)
    assert [other.nodes[i]["area"] for i in range(found.count)] == found.areas.tolist()


def test_a_single_cell_has_no_neighbours():
    found = cells(layer([[1, 0]], [5]))
    assert (found.count, found.pairs.shape, found.dual_graph().num_edges) == (1, (0, 2), 0)
    assert found.areas.tolist() == [4]
    assert found.to_networkx().number_of_nodes() == 1
