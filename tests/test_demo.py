"""The bundled network is what its docstring says, and the demo leaves what it names."""

from functools import partial
from importlib.resources import files

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from repgraph import between_layers, capture, cli, layer_names, profile
from repgraph.demo import digits, digits_resnet
from repgraph.metrics.similarity import gbs, layer_matching_accuracy, linear_cka
from repgraph.plot import caption
from repgraph.prune import Plan, compare_models, evaluate_classifier, load_pruned


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


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "deep" / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "compare_models", partial(compare_models, seconds=0.001))  # its latencies are no test
        result = CliRunner().invoke(cli.cli, ["demo", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    return out, result.output


def test_demo_leaves_tables_figures_pages_plan_and_weights(demo):
    out, output = demo
    profiled = ["profile.csv", "curve.png", "graphs.png", "index.html"]
    pruned = ["plan.json", "weights.safetensors", "results.csv", "plan.png", "pruning.html"]
    assert sorted(item.name for item in out.iterdir()) == sorted([*profiled, *pruned, "filters"])
    assert sorted(item.name for item in (out / "filters").iterdir()) == sorted(pruned)
    for names in (profiled, pruned, [f"filters/{name}" for name in pruned]):
        assert "wrote " + ", ".join(str(out / name) for name in names) in output
    table = pd.read_csv(out / "profile.csv", index_col="layer")
    assert len(table) == 15
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert all(f"<th>{layer}</th>" in page for layer in table.index)
    assert "k = 3" in page


def test_demo_drops_repairs_and_tunes(demo):
    out, output = demo
    results = pd.read_csv(out / "results.csv", index_col="model")
    assert results.index.tolist() == ["whole, 14 blocks", "5 blocks dropped", "cuts repaired", "and fine-tuned"]
    whole, dropped, repaired, tuned = results["accuracy"]
    assert dropped < repaired < whole
    assert dropped < whole - 0.02
    assert tuned == pytest.approx(whole, abs=0.02)
    assert whole > 0.975
    losses = results["cross_entropy"]
    assert losses.iloc[0] < losses.iloc[2] < losses.iloc[1]
    macs = results["macs"]
    assert macs.iloc[1] <= macs.iloc[2] == macs.iloc[3] < macs.iloc[0]
    assert all(name in output for name in results.index)


def test_demo_cuts_filters_refits_and_tunes(demo):
    results = pd.read_csv(demo[0] / "filters/results.csv", index_col="model")
    whole, cut, refitted, tuned = results["accuracy"]
    assert cut < 0.5 < whole - 0.02 < refitted
    assert tuned == pytest.approx(whole, abs=0.02)
    macs = results["macs"]
    assert 0.55 * macs.iloc[0] < macs.iloc[1] <= 0.6 * macs.iloc[0]
    plan = Plan.load(demo[0] / "filters/plan.json")
    assert (plan.by, plan.settings["macs"]) == ("chip", macs.iloc[:2].tolist())


def test_demo_weights_are_those_of_the_repaired_model(demo):
    out, _ = demo
    plan = Plan.load(out / "plan.json")
    assert (len(plan.layers), plan.by, len(plan.scores)) == (5, "redundancy", 12)
    results = pd.read_csv(out / "results.csv", index_col="model")
    pruned = load_pruned(digits_resnet(), out, digits()[0][:2])
    found = evaluate_classifier(pruned.model, digits(), progress=False)
    assert found["accuracy"] == results.loc["cuts repaired", "accuracy"]
    page = (out / "pruning.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert all(f"<td>{layer}</td>" in page for layer in plan.scores)
    assert all(f"<th>{name}</th>" in page for name in results.index)


def test_caption_names_the_settings():
    table = profile(digits_resnet(), digits(), n=100, repeats=2, reduce="mean", progress=False)
    assert caption(table) == "DigitsResNet, 2 x 100 samples, k=3 cosine graphs (mean), reduce=mean"
