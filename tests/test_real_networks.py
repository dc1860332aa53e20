"""Trained ResNets on CIFAR-10: curves, gates, births and cells are those of the definitions, stages find each other."""

import networkx as nx
import numpy as np
import pytest
import torch

from benchmarks import shared_data
from repgraph import capture, compare_layers, layer_names, profile
from repgraph.metrics.complexity import gating_states, transformation_complexity
from repgraph.metrics.feature_entropy import feature_birth
from repgraph.metrics.similarity import gbs, layer_matching_accuracy, layer_matching_chance, mutual_knn
from repgraph.metrics.spline import region_codes, segment_regions

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not shared_data.available(), reason="shared data absent (REPGRAPH_SHARED)"),
]


def defined(x, y, k=3):
    """Q by the definition: dense cosines in float64, k largest of each row, (A + A') / 2, networkx."""
    x = x.reshape(len(x), -1).astype(np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)
    s = unit @ unit.T
    np.fill_diagonal(s, -np.inf)
    a = np.zeros_like(s)
    for i, row in enumerate(s):
        nearest = np.argsort(-row, kind="stable")[:k]
        a[i, nearest] = row[nearest]
    graph = nx.from_numpy_array((a + a.T) / 2)
    return nx.community.modularity(graph, [set(np.flatnonzero(y == c).tolist()) for c in np.unique(y)])


def test_curve_equals_the_definition():
    model = shared_data.cifar_network(20)
    images, labels = shared_data.cifar_images(200)
    table = profile(model, (images, labels), n=100, repeats=2, progress=False)
    names = layer_names(model)
    assert list(table.index) == names
    assert names == ["conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))]

    outputs = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: outputs.setdefault(name, []).append(out.numpy().copy())
        )
    with torch.no_grad():  # the batches of the call above, so that rounding is the same
        for batch in images.split(64):
            model(batch)
    for name in names:
        x = np.concatenate(outputs[name])
        sets = [defined(x[r : r + 100], labels[r : r + 100].numpy()) for r in (0, 100)]
        assert table.loc[name, "modularity"] == pytest.approx(np.mean(sets), abs=1e-6)
        assert table.loc[name, "modularity_std"] == pytest.approx(np.std(sets, ddof=1), abs=1e-6)


def test_layers_of_another_depth_find_their_stage():
    images, _ = shared_data.cifar_images(120)
    shallow, deep = (capture(shared_data.cifar_network(depth), images, progress=False) for depth in (20, 56))
    for table in compare_layers([gbs, mutual_knn], shallow, deep, progress=False).values():
        found, chance = (
            f(table, group=lambda name: name.split(".")[0]) for f in (layer_matching_accuracy, layer_matching_chance)
        )
        assert found >= 0.9
        assert chance < 0.3
        assert table.loc["conv1", "conv1"] > 0.5 > 5 * table.attrs["chance"]


def test_births_of_trained_maps_equal_those_of_gudhi():
    images, _ = shared_data.cifar_images(12)
    maps = capture(shared_data.cifar_network(20), images, ["layer2.2", "layer3.0", "layer3.2"], progress=False)
    for name in maps:
        births = feature_birth(maps[name])
        assert torch.equal(births[:3], feature_birth(maps[name][:3], backend="gudhi"))
        assert len(births.unique()) > 5


def test_gates_are_the_signs_of_the_outputs_and_differ_between_images():
    model, (images, labels) = shared_data.cifar_network(20), shared_data.cifar_images(60)
    gates = gating_states(model, images, progress=False)
    outputs = capture(model, images, "*relu*", progress=False)
    assert list(gates) == list(outputs)
    assert len(gates) == 19
    for name in gates:
        assert torch.equal(gates[name], outputs[name].flatten(1) > 0)
    report = transformation_complexity(model, (images, labels), lam=0.04, progress=False)
    assert report.layers["plugin"].tolist() == pytest.approx([np.log2(60)] * 19)
    assert report.total < 0.9 * report.ceiling
    assert report.layers["label_information"].iloc[-1] > 2 * report.layers["label_information"].iloc[0]


def test_cells_on_a_segment_between_two_images_are_those_that_dense_samples_find():
    model, (images, _) = shared_data.cifar_network(20).double(), shared_data.cifar_images(2)
    ends = images[0].double(), (images[0] + 1e-4 * (images[1] - images[0])).double()
    found = segment_regions(model, *ends)
    t = torch.linspace(0, 1, 61).double().view(-1, 1, 1, 1)
    codes = region_codes(model, ends[0] + t * (ends[1] - ends[0]), progress=False).bits
    known = {row.tobytes() for row in found.codes.numpy()}
    seen = {row.tobytes() for row in codes.unique(dim=0).numpy()}
    assert seen <= known
    assert found.count == len(known) >= len(seen) > 3
