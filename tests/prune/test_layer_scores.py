"""Every column of layer_scores against values from hooks set by hand, on networks of several kinds."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repgraph.demo import digits, digits_resnet
from repgraph.graph import knn_graph
from repgraph.metrics.angular_distance import angular_distance
from repgraph.metrics.modularity import modularity
from repgraph.metrics.redundancy import redundancy
from repgraph.metrics.similarity import gbs, linear_cka, mutual_knn
from repgraph.prune import layer_scores

torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

NO_LABELS = ["block_influence", "angular_distance", "relative_residual", "turnover", "gbs", "cka", "tail", "random"]
WITH = ["modularity", *NO_LABELS]
N = 30
LABELS = torch.arange(N) % 3


pytestmark = pytest.mark.usefixtures("one_thread")


def scores(model, data, **options):
    return layer_scores(model, data, progress=False, **options)


def run(model, data):
    with torch.no_grad():
        return model(**data) if isinstance(data, dict) else model(data)


def blocks_by_hand(model, data, names):
    """Copies of what enters and leaves modules."""
    kept, handles = {}, []
    for name in names:
        module = model.get_submodule(name)

        def enter(_, args, kwargs, name=name):
            kept[name] = [next(iter([*args, *kwargs.values()])).clone()]

        def leave(_, args, output, name=name):
            kept[name].append((output[0] if isinstance(output, tuple) else output).clone())

        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    run(model, data)
    for handle in handles:
        handle.remove()
    return kept


def rows(x):
    return x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x.flatten(1)


def by_hand(before, behind, labels, place, total):
    """The columns but "random", written out where that is short."""
    x, y = rows(before).double(), rows(behind).double()
    cos = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    flat = before.flatten(1).double(), behind.flatten(1).double()
    row = {
        "block_influence": float((1 - cos).mean()),
        "angular_distance": angular_distance(before, behind),
        "relative_residual": float(((flat[1] - flat[0]).norm(dim=1) / flat[0].norm(dim=1)).mean()),
        "turnover": 1 - mutual_knn(before, behind, k=10),
        "gbs": 1 - gbs(before, behind),
        "cka": 1 - linear_cka(before, behind, unbiased=True),
        "tail": (total - place - 1) / total,
    }
    if labels is not None:
        q = [modularity(knn_graph(z, 3), labels, negative="signed") for z in (before, behind)]
        row["modularity"] = q[1] - q[0]
    return row


def check(table, ends, labels):
    assert list(table.index) == list(ends)
    for place, (name, (before, behind)) in enumerate(ends.items()):
        for column, value in by_hand(before, behind, labels, place, len(ends)).items():
            assert table.loc[name, column] == pytest.approx(value, abs=2e-6), (name, column)


# Residual networks


def test_demo_network():
    model, (x, y) = digits_resnet(), digits()
    table = scores(model, (x, y), samples=60)
    assert list(table) == ["redundancy", *WITH]
    names = [f"layer{s}.{i}" for s, count in ((1, 5), (2, 5), (3, 4)) for i in range(count) if i or s == 1]
    check(table, blocks_by_hand(model, x[:60], names), y[:60])
    assert table.index.name == "layer"
    assert table.attrs == {"model": "DigitsResNet", "samples": 60, "seed": None, "reduce": None}


def test_redundancy_reads_the_graph_of_what_goes_into_the_classifier():
    model, (x, _) = digits_resnet(), digits()
    names = ["layer1.3", "layer3.2"]
    table = scores(model, x, samples=60, layers=names, by=["redundancy"])
    z = blocks_by_hand(model, x[:60], ["linear"])["linear"][0]
    for name, ends in blocks_by_hand(model, x[:60], names).items():
        assert table.loc[name, "redundancy"] == pytest.approx(redundancy(*ends, z, k=5), rel=1e-5)


def test_turnover_is_the_share_of_new_neighbours():
    model, (x, _) = digits_resnet(), digits()
    before, behind = blocks_by_hand(model, x[:N], ["layer2.3"])["layer2.3"]
    near = []
    for z in (before, behind):
        z = nn.functional.normalize(z.flatten(1).double())
        near.append((z @ z.T).fill_diagonal_(-2).topk(10).indices)
    new = [len(set(b.tolist()) - set(a.tolist())) / 10 for a, b in zip(*near, strict=True)]
    table = scores(model, x, samples=N, by=["turnover"], layers=["layer2.3"])
    assert table.loc["layer2.3", "turnover"] == pytest.approx(np.mean(new))


def test_torchvision_resnet_whose_relu_runs_several_times_in_a_block():
    """The samples before layer2.1 are what layer2.0 gives, not what its ReLU gave at its first call."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    x = torch.randn(N, 3, 32, 32)
    names = ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    check(scores(model, (x, LABELS), by=WITH), blocks_by_hand(model, x, names), LABELS)


def test_torchvision_bottlenecks():
    torch.manual_seed(0)
    block = torchvision.models.resnet.Bottleneck
    model = torchvision.models.ResNet(block, [2, 2, 1, 2], num_classes=3).eval()
    x = torch.randn(N, 3, 32, 32)
    check(scores(model, (x, LABELS), by=WITH), blocks_by_hand(model, x, ["layer1.1", "layer2.1", "layer4.1"]), LABELS)


class InPlace(nn.Module):
    """x changed in place at the start, the sum built in place, one ReLU for all."""

    def __init__(self, relu):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), relu

    def forward(self, x):
        x = self.relu(x)
        out = self.conv(x)
        out += x
        return out


def test_a_relu_in_place_that_all_blocks_share():
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *(InPlace(relu) for _ in range(4))).eval()
    x = torch.randn(N, 3, 6, 6)
    check(scores(model, x, layers=InPlace, by=NO_LABELS), blocks_by_hand(model, x, list("1234")), None)


def test_a_shared_module_between_blocks():
    """One norm that runs after every block: what enters a block is its second, third, ... result."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            x = self.norm(x)
            for block in self.blocks:
                x = self.norm(block(x) * 0.5)
            return x

    torch.manual_seed(0)
    model, x = Body().eval(), torch.randn(N, 6)
    names = ["blocks.0", "blocks.1", "blocks.2"]
    check(scores(model, x, layers="blocks.?", by=NO_LABELS), blocks_by_hand(model, x, names), None)


# Transformers


def tokens(n=N, length=7):
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(0, 50, (n, length), generator=generator),
        "attention_mask": torch.ones(n, length, dtype=torch.long),
    }


SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def vit():
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 32, num_classes=4).eval()


def streams(model, data, blocks, half):
    """The stream before and after each half: what the block got, that plus the first half, what the block gave."""
    ends, first = {}, blocks_by_hand(model, data, [f"{block}.{half[0]}" for block in blocks])
    for block, (before, behind) in blocks_by_hand(model, data, blocks).items():
        middle = before + first[f"{block}.{half[0]}"][1]
        ends[f"{block}.{half[0]}"], ends[f"{block}.{half[1]}"] = (before, middle), (middle, behind)
    return ends


@pytest.mark.parametrize(
    ("make", "blocks", "half"),
    [
        (llama, "model.layers.{}", ("self_attn", "mlp")),
        (gpt2, "transformer.h.{}", ("attn", "mlp")),
        (vit, "encoder.layers.encoder_layer_{}", ("self_attention", "mlp")),
    ],
)
def test_halves_of_transformers(make, blocks, half):
    model, data = make(), torch.randn(N, 3, 16, 16) if make is vit else tokens()
    names = [blocks.format(i) for i in range(3)]
    check(scores(model, data, layers="halves", labels=LABELS, by=WITH), streams(model, data, names, half), LABELS)
    check(scores(model, data, labels=LABELS, by=WITH), blocks_by_hand(model, data, names), LABELS)


def test_halves_of_bert_which_norms_after_the_sum():
    model, data = bert(), tokens()
    whole, halves = (
        blocks_by_hand(model, data, [f"encoder.layer.{i}{part}" for i in range(3)]) for part in ("", ".attention")
    )
    ends = {}
    for name, (before, behind) in whole.items():
        middle = halves[f"{name}.attention"][1]
        ends[f"{name}.attention"], ends[f"{name}.output"] = (before, middle), (middle, behind)
    check(scores(model, data, layers="halves", by=NO_LABELS), ends, None)


def test_swin_halves():
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([2, 2], 16, [2, 2], [2, 2], [2, 2], num_classes=4).eval()
    x = torch.randn(N, 3, 16, 16)
    blocks = [f"features.{stage}.{i}" for stage in (1, 3) for i in range(2)]
    check(scores(model, x, layers="halves", by=NO_LABELS), streams(model, x, blocks, ("attn", "mlp")), None)
    check(scores(model, x, by=NO_LABELS), blocks_by_hand(model, x, blocks), None)


def test_mean_over_the_tokens_that_are_no_padding():
    model, data = llama(), tokens()
    data["attention_mask"][::2, 4:] = 0
    ends = streams(model, data, [f"model.layers.{i}" for i in range(3)], ("self_attn", "mlp"))
    shown = data["attention_mask"][..., None]
    means = {name: [(z * shown).sum(1) / shown.sum(1) for z in pair] for name, pair in ends.items()}
    table = scores(model, data, layers="halves", reduce="mean", labels=LABELS, by=WITH)
    check(table, means, LABELS)
    assert table.attrs["reduce"] == "mean"


# Theorems


class Add(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x + self.f(x)


def residual(*parts):
    return nn.Sequential(nn.Linear(5, 6), *(Add(part) for part in parts), nn.Linear(6, 2)).eval()


def test_a_block_that_does_nothing_scores_0():
    torch.manual_seed(0)
    zero = nn.Linear(6, 6)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    model, x = residual(nn.Linear(6, 6), zero, nn.Linear(6, 6)), torch.randn(N, 5)
    table = scores(model, x, layers=Add, labels=LABELS, by=WITH[:-2])
    torch.testing.assert_close(torch.tensor(table.loc["2"].to_numpy()), torch.zeros(7).double(), atol=1e-12, rtol=0)
    assert (table.loc[["1", "3"]].drop(columns="modularity") > 1e-3).all(axis=None)


def test_a_block_that_only_scales():
    model, x = residual(nn.Identity(), nn.Linear(6, 6)), torch.randn(N, 5)  # x + x
    row = scores(model, x, layers=Add, labels=LABELS, by=WITH).loc["1"]
    assert row["relative_residual"] == pytest.approx(1)
    for name in ("block_influence", "angular_distance", "turnover", "gbs", "cka", "modularity"):
        assert row[name] == pytest.approx(0, abs=1e-6), name


def test_tail_and_random():
    torch.manual_seed(0)
    model, x = residual(*(nn.Linear(6, 6) for _ in range(4))), torch.randn(N, 5)
    table = scores(model, x, layers=Add, by=["random", "tail"])
    assert list(table) == ["random", "tail"]
    assert table["tail"].tolist() == [0.75, 0.5, 0.25, 0.0]
    assert table["random"].is_unique
    assert table["random"].between(0, 1, inclusive="left").all()
    pd.testing.assert_frame_equal(table, scores(model, x, layers=Add, by=["random", "tail"]))
    other = scores(model, x, layers=Add, by=["random", "tail"], seed=1)
    assert (other["random"] != table["random"]).all()
    assert other["tail"].equals(table["tail"])
    zero = scores(model, x, layers=Add, by=["random"], seed=0)
    assert zero["random"].equals(table["random"])


# What is taken of the data


def test_samples_are_the_first_ones_or_drawn_with_the_seed():
    model, (x, y) = digits_resnet(), digits()
    layers = ["layer2.3", "layer3.2"]
    first = scores(model, (x, y), layers=layers, samples=40)
    pd.testing.assert_frame_equal(first, scores(model, (x[:40], y[:40]), layers=layers))
    drawn = scores(model, (x, y), layers=layers, samples=40, seed=3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[:40]
    by_hand = scores(model, (x[order], y[order]), layers=layers)
    columns = [name for name in first if name not in ("random",)]
    np.testing.assert_allclose(drawn[columns], by_hand[columns], atol=1e-6)
    assert not np.allclose(drawn["cka"], first["cka"])
    assert drawn.attrs["seed"] == 3
    few = scores(model, (x[:25], y[:25]), layers=layers)  # fewer than the default of 500
    assert few.attrs["samples"] == 25


def test_labels_absent_or_given():
    model, (x, y) = digits_resnet(), digits()
    options = {"layers": ["layer2.3"], "samples": 40}
    without, given = scores(model, x, **options), scores(model, x, labels=y, **options)
    assert list(without) == ["redundancy", *NO_LABELS]
    pd.testing.assert_frame_equal(given.drop(columns="modularity"), without)
    pd.testing.assert_frame_equal(given, scores(model, (x, y), **options))
    names = scores(model, x, labels=[f"digit {i}" for i in y.tolist()], **options)
    pd.testing.assert_frame_equal(names, given)
    with pytest.raises(ValueError, match="'modularity' needs labels"):
        scores(model, x, by=["cka", "modularity"], **options)


def test_columns_come_in_the_order_of_by():
    table = scores(digits_resnet(), digits(), layers=["layer2.3"], by=["cka", "modularity", "gbs"], samples=40)
    assert list(table) == ["cka", "modularity", "gbs"]


def test_labels_are_not_needed_where_modularity_is_not_asked_for():
    x, _ = digits()
    classless = torch.randn(40)  # numbers of a regression are no classes
    table = scores(digits_resnet(), (x[:40], classless), layers=["layer2.3"], by=["cka"])
    assert list(table) == ["cka"]


def test_memory_budget_gives_the_identical_table():
    model, (x, y) = digits_resnet(), digits()
    whole = scores(model, (x, y), samples=50)
    budget = 50 * 8 * 64 * 4 * 2 + 1000  # two of the largest points
    pd.testing.assert_frame_equal(scores(model, (x, y), samples=50, memory=budget), whole, check_exact=True)


def test_loaders_iterators_and_lists():
    model, (x, y) = digits_resnet(), digits()
    options = {"layers": ["layer2.3"], "by": ["modularity", "cka", "random"], "samples": 50}
    whole = scores(model, (x[:60], y[:60]), batch_size=20, **options)
    loader = DataLoader(TensorDataset(x[:60], y[:60]), batch_size=20)
    pd.testing.assert_frame_equal(scores(model, loader, **options), whole)
    pd.testing.assert_frame_equal(scores(model, list(loader), **options), whole)
    pd.testing.assert_frame_equal(scores(model, iter(list(loader)), **options), whole)
    pd.testing.assert_frame_equal(scores(model, (batch for batch in loader), **options), whole)
    seeded = scores(model, iter(list(loader)), seed=1, **options)
    pd.testing.assert_frame_equal(seeded, scores(model, (x[:60], y[:60]), seed=1, batch_size=20, **options))


@pytest.mark.parametrize("seed", [None, 1])
def test_labels_for_all_samples_of_an_iterator(seed):
    """As capture takes them: one label for each sample of the data, though only some of them are read."""
    model, (x, y) = digits_resnet(), digits()
    options = {"layers": ["layer2.3"], "by": ["modularity"], "samples": 30, "labels": y[:60], "seed": seed}
    found = scores(model, (part for part in x[:60].split(20)), **options)
    pd.testing.assert_frame_equal(found, scores(model, x[:60], batch_size=20, **options))


# The model


def test_model_is_untouched():
    model, (x, y) = digits_resnet().train(), digits()
    model.layer1[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    some = ["layer1.0", "layer2.3", "layer3.2"]
    table = scores(model, (x, y), layers=some, samples=40, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    pd.testing.assert_frame_equal(table, scores(digits_resnet(), (x, y), layers=some, samples=40, seed=2))


def test_wrapped_models():
    model, (x, y) = digits_resnet(), digits()
    whole = scores(model, (x, y), samples=30, layers=["layer2.3"])
    pd.testing.assert_frame_equal(scores(nn.DataParallel(model), (x, y), samples=30, layers=["layer2.3"]), whole)


# Refused


@pytest.mark.parametrize("by", ["cka", [], ["cka", "beauty"]])
def test_unknown_scores_are_refused(by):
    with pytest.raises(ValueError, match="by must be a sequence of names from"):
        scores(digits_resnet(), digits(), by=by)


def test_models_without_a_layer_to_drop_are_refused():
    with pytest.raises(ValueError, match="no layer of the choice can be dropped"):
        scores(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(N, 4), layers="leaves")
    with pytest.raises(ValueError, match="no layer of the choice can be dropped"):
        scores(digits_resnet(), digits(), layers=["layer2.0"])


def test_unknown_layers_and_nan_are_refused():
    x, y = digits()
    with pytest.raises(ValueError, match=r"'layer9' matches no layer"):
        scores(digits_resnet(), (x, y), layers="layer9")
    with pytest.raises(ValueError, match=r"layer '.*' gives NaN or infinite values"):
        scores(digits_resnet(), torch.where(torch.arange(40)[:, None, None, None] == 30, torch.nan, x[:40]))


def test_errors_of_the_measures_name_the_layer():
    model = residual(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"layer '1': .*k"):
        scores(model, torch.randn(8, 5), layers=Add, by=["turnover"])  # too few for 10 neighbours
    with pytest.warns(UserWarning, match=r"layer '1': turnover is undefined \(nan\)"):
        table = scores(model, torch.randn(8, 5), layers=Add)
    assert table["turnover"].isna().all()
    assert table["cka"].notna().all()
    zeros = torch.randn(N, 5)
    with torch.no_grad():
        model[0].bias.zero_()
    zeros[3] = 0
    with pytest.raises(ValueError, match=r"layer '1': x must have no zero samples"):
        scores(model, zeros, layers=Add, by=["relative_residual"])


def test_samples_that_no_module_takes_or_gives_are_refused():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x)

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Half(), Half()

        def forward(self, x):
            y = x.exp()
            y = y + self.a(x.sin())
            return (y + self.b(y.cos())).sum(1, keepdim=True)

    with pytest.raises(ValueError, match="layer 'a' adds to samples that no module takes or gives: choose whole"):
        scores(Stream(), torch.randn(N, 4), layers=["a", "b"])
