"""Clusters against scikit-learn, means against NumPy, schedules by hand; what is merged computes the same."""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from repgraph.scores.soft_cluster import cluster_filters, merge_clusters, rate_schedule, reconstruct_

pytestmark = pytest.mark.usefixtures("one_thread")

seeds = st.integers(0, 2**32 - 1)
HAND = torch.tensor([[0.0, 0], [0, 1], [10, 0], [10, 2]])
KINDS = ("linear", "exponential", "cosine")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(clusters, c, seed=0):
    """c filters in clusters far from each other, one of each among the first, and which cluster each is of."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.cat([torch.arange(clusters), torch.randint(clusters, (c - clusters,), generator=generator)])
    own = own[torch.randperm(c, generator=generator)]
    centres = 10 * torch.eye(clusters, 18, dtype=torch.float64)
    return (centres[own] + 0.1 * draw(c, 18, seed=seed)).view(c, 2, 3, 3), own


def numbered(own):
    """Labels 0, 1, ... in the order in which they first come."""
    order = list(dict.fromkeys(own.tolist()))
    return [order.index(k) for k in own.tolist()]


def randomised(model, seed=0):
    """The model in double and eval mode, all numbers of its batch norms drawn."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def gap(model, smaller, x):
    with torch.no_grad():
        return float((model(x) - smaller(x)).abs().max())


# Clusters


def test_clusters_by_hand():
    labels = cluster_filters(HAND, 2)
    assert labels.tolist() == [0, 0, 1, 1]
    layer = nn.Linear(2, 4)
    layer.weight.data, layer.bias.data = HAND.clone(), torch.tensor([1.0, 3, 5, 5])
    reconstruct_(layer, labels)
    assert layer.weight.tolist() == [[0, 0.5], [0, 0.5], [10, 1], [10, 1]]
    assert layer.bias.tolist() == [2, 2, 5, 5]
    assert float((layer.weight.detach() - HAND).square().sum()) == 2.5


@settings(max_examples=8)
@given(seeds, st.integers(1, 11))
def test_parity_with_scikit_learn_and_numpy(seed, k):
    w = draw(12, 2, 3, 3, seed=seed)
    rows = w.flatten(1).numpy()
    kmeans = KMeans(k, n_init=10, random_state=seed).fit(rows)
    labels = cluster_filters(w, k, seed=seed)
    assert labels.tolist() == numbered(torch.from_numpy(kmeans.labels_))
    conv = nn.Conv2d(2, 12, 3).double()
    conv.weight.data = w.clone()
    reconstruct_(conv, labels)
    means = np.stack([rows[labels.numpy() == label].mean(0) for label in labels.tolist()])
    torch.testing.assert_close(conv.weight.detach().flatten(1), torch.from_numpy(means))
    assert float((conv.weight.detach() - w).square().sum()) == pytest.approx(kmeans.inertia_)


@settings(max_examples=15)
@given(seeds, st.integers(1, 6), st.integers(6, 12))
def test_labels_follow_the_filters_but_not_a_common_shift(seed, k, c):
    w, own = apart(k, c, seed)
    labels = cluster_filters(w, k)
    assert labels.tolist() == numbered(own)
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    assert cluster_filters(w[order], k).tolist() == numbered(own[order])
    assert torch.equal(cluster_filters(w + draw(2, 3, 3, seed=seed), k), labels)


def test_labels_do_see_a_scale_of_one_filter():
    w = torch.tensor([[1.0, 0], [1.1, 0], [0, 1], [0, 1.1]])
    assert cluster_filters(w, 2).tolist() == [0, 0, 1, 1]
    small = w * torch.tensor([[1.0], [1], [0.01], [1]])
    assert cluster_filters(torch.cat([small, torch.tensor([[9.0, 9]])]), 2).tolist() == [0, 0, 0, 0, 1]


def test_start_from_earlier_labels():
    """Two clusters along one axis or the other: which, is up to the start."""
    w = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    for start in ([0, 0, 1, 1], [0, 1, 0, 1], [7, 7, 3, 3]):
        assert cluster_filters(w, 2, init=torch.tensor(start)).tolist() == numbered(torch.tensor(start))
    with pytest.raises(ValueError, match="init must have 3 distinct labels"):
        cluster_filters(w, 3, init=torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("conv", [nn.Conv2d(2, 5, 3), nn.Conv1d(3, 5, 4), nn.ConvTranspose2d(2, 5, 3), nn.Linear(7, 5)])
def test_one_filter_per_cluster_changes_nothing(conv):
    """Also where filters are equal."""
    filters = conv.weight.data.movedim(int(getattr(conv, "transposed", False)), 0)
    filters[3] = filters[1]
    before = deepcopy(conv.state_dict())
    labels = cluster_filters(filters, 5)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    reconstruct_(conv, labels)
    assert all(torch.equal(before[key], value) for key, value in conv.state_dict().items())


@settings(max_examples=15)
@given(seeds, st.integers(1, 10))
def test_reconstruction_is_idempotent_and_leaves_k_distinct_filters(seed, k):
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(2, 10, 3), nn.BatchNorm2d(10)
    bn.weight.data.normal_()
    labels = cluster_filters(conv.weight, k)
    reconstruct_(conv, labels, bn)
    assert len(conv.weight.detach().flatten(1).unique(dim=0)) <= k
    assert len(bn.weight.unique()) <= k
    before = deepcopy([conv.state_dict(), bn.state_dict()])
    reconstruct_(conv, labels, bn)
    after = [conv.state_dict(), bn.state_dict()]
    assert all(torch.equal(b[key], a[key]) for b, a in zip(before, after, strict=True) for key in b)


def test_batch_norm_takes_the_means():
    bn = randomised(nn.BatchNorm2d(4))
    before, steps = deepcopy(bn.state_dict()), int(bn.num_batches_tracked)
    reconstruct_(nn.Linear(2, 4), torch.tensor([0, 1, 0, 2]), bn)
    for key in ("weight", "bias", "running_mean", "running_var"):
        mean = (before[key][0] + before[key][2]) / 2
        torch.testing.assert_close(bn.state_dict()[key], torch.stack([mean, before[key][1], mean, before[key][3]]))
    assert int(bn.num_batches_tracked) == steps


def test_fewer_distinct_filters_than_clusters():
    w = torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]])
    with pytest.warns(UserWarning, match="distinct clusters"):
        assert cluster_filters(w, 3).tolist() == [0, 0, 1, 1]


# Schedules


@pytest.mark.parametrize(
    ("t", "rate"), [(0, 0), (1, 0.0215766), (25, 0.3), (50, 0.3750034), (100, 0.3984433), (200, 0.4)]
)
def test_exponential_schedule_by_hand(t, rate):
    assert rate_schedule("exponential", t, 200, 0.4) == pytest.approx(rate, abs=5e-8)


def test_constant_of_the_exponential_schedule():
    """From two values: P_2 / P_1 = 1 + exp(-k)."""
    one, two = (rate_schedule("exponential", t, 200, 0.4) for t in (1, 2))
    assert -np.log(two / one - 1) == pytest.approx(0.0554499, abs=5e-8)


@given(
    st.sampled_from(KINDS), st.integers(1, 300), st.floats(0, 0.99), st.floats(0.01, 0.98), st.floats(0.01, 1 - 1e-9)
)
def test_schedules_rise_from_0_to_the_goal(kind, T, goal, D, share):
    options = {"D": D, "q": D + (1 - D) * share}
    rates = [rate_schedule(kind, t, T, goal, **options) for t in range(T + 1)]
    assert rates[0] == 0
    assert rates[-1] == goal
    assert all(b >= a - 1e-15 for a, b in pairwise(rates))
    if kind == "exponential":
        assert rate_schedule(kind, D * T, T, goal, **options) == pytest.approx(options["q"] * goal)


def test_linear_and_cosine_schedules_by_hand():
    assert rate_schedule("linear", 50, 200, 0.4) == pytest.approx(0.1)
    assert rate_schedule("cosine", 50, 200, 0.4) == pytest.approx(0.4 * (1 - 0.5**0.5) / 2)
    assert rate_schedule("cosine", 100, 200, 0.4) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("linear", 3, 2, 0.4), {}),
        (("linear", -1, 2, 0.4), {}),
        (("linear", 0, 0, 0.4), {}),
        (("linear", 1, 2, 1.0), {}),
        (("linear", 1, 2, -0.1), {}),
        (("exponential", 1, 2, 0.4), {"D": 0.8}),
        (("exponential", 1, 2, 0.4), {"q": 1.0}),
        (("step", 1, 2, 0.4), {}),
    ],
)
def test_schedules_refuse(args, options):
    with pytest.raises(ValueError, match=r"must be"):
        rate_schedule(*args, **options)


# Merging

LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def pair(*consumers, middle=(), conv=None):
    """Six filters in three clusters, their batch norm, and what reads them."""
    model = randomised(nn.Sequential(conv or nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *middle, *consumers))
    reconstruct_(model[0], LABELS, model[1])
    return model


@pytest.mark.parametrize(
    "model",
    [
        pair(nn.Conv2d(6, 4, 3)),
        pair(nn.ConvTranspose2d(6, 4, 3, groups=1)),
        pair(nn.Conv2d(6, 4, 3), conv=nn.ConvTranspose2d(3, 6, 3, bias=False)),
        pair(nn.Linear(6 * 9, 4), middle=(nn.MaxPool2d(3), nn.Flatten())),
        pair(nn.Linear(6, 4), middle=(nn.AdaptiveAvgPool2d(1), nn.Flatten())),
    ],
    ids=["conv", "transposed", "transposed layer", "flatten", "pooled"],
)
def test_merged_computes_the_same(model):
    x, before, last = draw(2, 3, 11, 11), deepcopy(model.state_dict()), str(len(model) - 1)
    smaller = merge_clusters(model, "0", LABELS, last, norm="1")
    assert smaller[0].out_channels == smaller[1].num_features == 3
    assert gap(model, smaller, x) < 1e-12
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model[0].out_channels == 6
    for old, new in zip(model.parameters(), smaller.parameters(), strict=True):
        assert new.requires_grad == old.requires_grad
    rebuilt = deepcopy(model)
    rebuilt[0], rebuilt[1], rebuilt[-1] = (deepcopy(smaller[i]) for i in (0, 1, -1))
    assert repr(rebuilt) == repr(smaller)


def test_channel_addition_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for values in (*model[0].parameters(), *model[1].parameters(), model[1].running_mean, model[1].running_var):
            values[2] = values[0]
    labels = torch.tensor([0, 1, 0, 2])
    assert gap(model, merge_clusters(model, "0", labels, ["3"], norm="1"), torch.randn(2, 3, 9, 9)) < 1e-6
    with torch.no_grad():
        model[1].bias[2] += 0.5
    with pytest.raises(ValueError, match=r"'1': members of a cluster must agree to 1e-06, bias is 0\.5 apart"):
        merge_clusters(model, "0", labels, ["3"], norm="1")
    assert merge_clusters(model, "0", labels, "3", norm="1", tol=0.6)[0].out_channels == 3


class Concatenated(nn.Module):
    """A layer between others, read behind a batch norm of all and a convolution of all; and behind a flatten."""

    def __init__(self):
        super().__init__()
        self.before, self.layer, self.after = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(3, 4, 3)
        self.norm, self.reader, self.head = nn.BatchNorm2d(12), nn.Conv2d(12, 5, 1), nn.Linear(12 * 4, 2)

    def forward(self, x):
        z = F.relu(self.norm(torch.cat([self.before(x), self.layer(x), self.after(x)], 1)))
        return self.reader(z).sum((2, 3)).sum(1, keepdim=True) + self.head(F.adaptive_max_pool2d(z, 2).flatten(1))


def test_concatenation():
    model = randomised(Concatenated())
    reconstruct_(model.layer, LABELS)
    with torch.no_grad():
        for values in (model.norm.weight, model.norm.bias, model.norm.running_mean, model.norm.running_var):
            values[2:8] = values[2:8][[0, 1, 0, 3, 1, 0]]
    blocks = 4 * 2 + torch.arange(6 * 4).view(6, 4)
    smaller = merge_clusters(model, "layer", LABELS, {"reader": 2, "head": blocks}, norm={"norm": 2})
    assert smaller.norm.num_features == smaller.reader.in_channels == 9
    assert smaller.head.in_features == 9 * 4
    assert gap(model, smaller, draw(2, 3, 9, 9)) < 1e-12


class Stream(nn.Module):
    """A residual stream of two writers and two readers, one of which is both."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        z = F.relu(self.stem(x))
        return self.head(F.relu(z + self.norm(self.block(z))))


def test_all_writers_of_a_stream_take_the_same_clusters():
    model = randomised(Stream())
    reconstruct_(model.stem, LABELS)
    with pytest.raises(ValueError, match="'block': members"):
        merge_clusters(model, ["stem", "block"], LABELS, ["block", "head"], norm="norm")
    reconstruct_(model.block, LABELS, model.norm)
    smaller = merge_clusters(model, ["stem", "block"], LABELS, ["block", "head"], norm="norm")
    assert tuple(smaller.block.weight.shape) == (3, 3, 3, 3)
    assert gap(model, smaller, draw(2, 3, 9, 9)) < 1e-12


def test_dead_filters_merge():
    model = pair(nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        for values in (*model[0].parameters(), *model[1].parameters()):
            values[[1, 3]] = 0
        model[1].running_mean[[1, 3]], model[1].running_var[[1, 3]] = 0, 1
    labels = torch.tensor([0, 1, 2, 1, 3, 4])
    smaller = merge_clusters(model, "0", labels, "3", norm="1")
    assert smaller[0].out_channels == 5
    assert gap(model, smaller, draw(2, 3, 9, 9)) < 1e-12


def test_a_training_loop():
    """Filters train freely between reconstructions; at the end floor(c p) of them go, and nothing changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), nn.Linear(160, 3))
    x, y = torch.randn(64, 1, 6, 6), torch.randint(3, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    T, goal, seen, labels = 8, 0.45, [], None
    for t in range(T + 1):
        k = 10 - int(10 * rate_schedule("exponential", t, T, goal) + 1e-9)
        labels = cluster_filters(model[0].weight, k, init=labels if seen and seen[-1] == k else None)
        reconstruct_(model[0], labels, model[1])
        seen.append(k)
        if t < T:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert len(model[0].weight.detach().flatten(1).unique(dim=0)) == 10
    assert seen[0] == 10
    assert seen == sorted(seen, reverse=True)
    smaller = merge_clusters(model.eval(), "0", labels, "4", norm="1")
    assert smaller[0].out_channels == 10 - 4
    assert gap(model, smaller, x) < 1e-5


@pytest.mark.parametrize(
    ("model", "layer", "consumers", "match"),
    [
        (pair(nn.Conv2d(6, 6, 3, groups=6)), "0", "3", "'3' must be a linear layer, ungrouped convolution, is Conv2d"),
        (pair(nn.Conv2d(6, 4, 3)), "9", "3", "no module '9'"),
        (pair(nn.Conv2d(6, 4, 3)), "2", "3", "'2' must be .*, is ReLU"),
        (pair(nn.Conv2d(6, 4, 3)), "0", "1", "'1' must be .*, is BatchNorm2d"),
        (pair(nn.Conv2d(6, 4, 3)), "3", "0", "'3' must have columns of its own for 6 filters among its 4"),
        (pair(nn.Conv2d(6, 4, 3)), "0", {"3": 1}, "'3' must have columns of its own for 6 filters among its 6, got 1"),
        (pair(nn.Conv2d(6, 4, 3)), "0", {"3": torch.zeros(6, 1).long()}, "columns of its own"),
        (pair(nn.Linear(6, 12)), "3", "0", "'3' must have columns of its own for 6 filters among its 12"),
        (pair(nn.Conv2d(12, 4, 3)), "0", "3", "'3' must have columns of its own for 6 filters among its 12"),
    ],
)
def test_merging_refuses(model, layer, consumers, match):
    with pytest.raises(ValueError, match=match):
        merge_clusters(model, layer, LABELS, consumers, norm="1")


def test_grouped_layers_are_refused():
    """Equal filters of different groups see different inputs."""
    grouped = nn.Conv2d(6, 6, 3, groups=2)
    with pytest.raises(ValueError, match="'module' must be a linear layer, ungrouped convolution or batch norm"):
        reconstruct_(grouped, LABELS)
    with pytest.raises(ValueError, match="'0' must be a linear layer, ungrouped"):
        merge_clusters(nn.Sequential(grouped, nn.Conv2d(6, 2, 1)), "0", LABELS, "1")


def test_refused_reconstruction_changes_nothing():
    conv = nn.Conv2d(2, 4, 3)
    before = conv.weight.detach().clone()
    with pytest.raises(ValueError, match="labels must be 5 integers"):
        reconstruct_(conv, torch.tensor([0, 0, 1, 1]), nn.BatchNorm2d(5))
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize(
    ("weight", "k", "match"),
    [
        (HAND, 0, "n_clusters must be 1 to 4"),
        (HAND, 5, "n_clusters must be 1 to 4"),
        (HAND[0], 1, "weight must be finite, of shape"),
        (HAND * torch.nan, 2, "weight must be finite"),
    ],
)
def test_clustering_refuses(weight, k, match):
    with pytest.raises(ValueError, match=match):
        cluster_filters(weight, k)
