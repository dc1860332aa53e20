"""The bundled network is what its docstring says, and the demo leaves what it names."""

from importlib.resources import files

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from repgraph import between_layers, capture, layer_names, profile
from repgraph.cli import cli
from repgraph.demo import digits, digits_resnet
from repgraph.metrics.similarity import gbs, layer_matching_accuracy, linear_cka
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


def test_networks_from_two_seeds_are_alike_by_stage_and_far_above_chance():
    a, b = (capture(digits_resnet(seed), digits(), samples=400, progress=False) for seed in (0, 1))
    cka = between_layers(linear_cka, a, b, unbiased=True, progress=False)
    assert layer_matching_accuracy(cka, group=lambda name: name.split(".")[0]) > 0.5
    table = between_layers(gbs, a, b, progress=False)
    assert table.to_numpy().min() > 10 * table.attrs["chance"]


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
