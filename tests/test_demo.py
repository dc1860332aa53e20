"""The bundled network is what its docstring says, and the demo leaves what it names."""

from importlib.resources import files

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from repgraph import between_layers, capture, layer_names, profile
from repgraph.cli import cli
from repgraph.demo import digits, digits_resnet
from repgraph.metrics.similarity import gbs, layer_matching_accuracy
from repgraph.plot import caption


@pytest.mark.parametrize("seed", [0, 1])
def test_networks_are_trained_small_and_deep_enough(seed):
    x, y = digits()
    accuracy = (digits_resnet(seed)(x).argmax(1) == y).float().mean()
    assert accuracy > 0.975
    assert len(layer_names(digits_resnet(seed))) == 15  # the stem and 14 blocks
    assert len(files("repgraph.demo").joinpath(f"digits_resnet_{seed}.safetensors").read_bytes()) < 500_000


def test_only_two_networks_come_along():
    with pytest.raises(ValueError, match="seed must be 0 or 1"):
        digits_resnet(2)


def test_gbs_finds_the_corresponding_layer_of_a_network_from_another_seed():
    a, b = (capture(digits_resnet(seed), digits(), samples=400, progress=False) for seed in (0, 1))
    table = between_layers(gbs, a, b, progress=False)
    stage = layer_matching_accuracy(table, group=lambda name: name.split(".")[0])
    assert stage > 0.8
    assert table.to_numpy().diagonal().mean() > 10 * table.attrs["chance"]


def test_splits_are_disjoint_and_cover_the_digits():
    held_out, train = digits("held out")[0], digits("train")[0]
    assert (len(held_out), len(train)) == (1000, 797)
    rows = torch.cat((held_out, train)).flatten(1)
    assert len(rows) == 1797
    assert rows.min() == -1
    assert rows.max() == 1


def test_later_layers_sort_digits_better_than_the_stem():
    table = profile(digits_resnet(), digits(), n=200, progress=False)
    assert table["modularity"].iloc[-1] > table["modularity"].iloc[0] + 0.05
    assert (table["modularity"] <= table["ceiling"]).all()
    assert table["null"].abs().max() < 0.02


def test_demo_leaves_table_figures_and_page(tmp_path):
    out = tmp_path / "deep" / "results"
    result = CliRunner().invoke(cli, ["demo", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(item.name for item in out.iterdir()) == ["curve.png", "graphs.png", "index.html", "profile.csv"]
    table = pd.read_csv(out / "profile.csv", index_col="layer")
    assert len(table) == 15
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert all(f"<th>{layer}</th>" in page for layer in table.index)
    assert "k = 3" in page
    assert str(out / "index.html") in result.output


def test_caption_names_the_settings():
    table = profile(digits_resnet(), digits(), n=100, repeats=2, reduce="mean", progress=False)
    assert caption(table) == "DigitsResNet, 2 x 100 samples, k=3 cosine graphs (mean), reduce=mean"
