"""Trained ResNets on CIFAR-10: the curve is that of the definition, and the stages of two depths find each other."""

import networkx as nx
import numpy as np
import pytest
import torch

from benchmarks import shared_data
from repgraph import capture, compare_layers, layer_names, profile
from repgraph.metrics.similarity import gbs, layer_matching_accuracy, layer_matching_chance, mutual_knn

pytestmark = pytest.mark.skipif(not shared_data.available(), reason="shared data absent (REPGRAPH_SHARED)")


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
    model = shared_data.cifar_network(56)
    images, labels = shared_data.cifar_images(200)
    table = profile(model, (images, labels), n=100, repeats=2, progress=False)
    names = layer_names(model)
    assert list(table.index) == names
    assert names == ["conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(9))]

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
    images, _ = shared_data.cifar_images(200)
    shallow, deep = (capture(shared_data.cifar_network(depth), images, progress=False) for depth in (20, 56))
    for table in compare_layers([gbs, mutual_knn], shallow, deep, progress=False).values():
        found, chance = (
            f(table, group=lambda name: name.split(".")[0]) for f in (layer_matching_accuracy, layer_matching_chance)
        )
        assert found >= 0.9
        assert chance < 0.3
        assert table.loc["conv1", "conv1"] > 0.5 > 5 * table.attrs["chance"]
