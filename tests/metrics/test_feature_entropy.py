"""Feature entropy of births: by hand, against loops, rare births, the noise floor, the table by layer, class, unit."""

import math
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import repgraph
from repgraph import Activations
from repgraph.metrics.feature_entropy import feature_birth, feature_entropy, feature_entropy_floor, unit_feature_entropy

seeds = st.integers(0, 2**32 - 1)
RARE = {
    "one_minus": lambda eps, n: (1 - eps) * math.log(n),
    "max": lambda eps, n: math.log(n),
    "printed": lambda eps, n: eps * math.log(n),
    "nan": lambda eps, n: math.nan,
}


def plain(births, min_rate=0.1, rare="one_minus"):
    """(H, rate, H / rate) of the births of one unit."""
    n, exist = len(births), [b for b in births if b > 0]
    rate = len(exist) / n
    shares = [k / len(exist) for k in Counter(exist).values()]
    h = RARE[rare](rate, n) if rate < min_rate else -sum(p * math.log(p) for p in shares)
    return h, rate, h / rate if rate else 0.0


def square(birth):
    """A 4 x 4 map with this birth, 0 to 4: a cycle of four edges, of which the last ones are tied."""
    u = torch.zeros(4, 4)
    if birth:
        for k, (i, j) in enumerate([(0, 1), (1, 2), (2, 3), (0, 3)]):
            u[i, j] = 9 - min(k, birth - 1)
    return u


def maps_with(births):
    """Maps (n, c, 4, 4) with the births (n, c)."""
    return torch.stack([torch.stack([square(int(b)) for b in row]) for row in births])


def table(activations, labels=None, **options):
    return unit_feature_entropy(activations, labels, progress=False, **options)


# By hand


@pytest.mark.parametrize(
    ("births", "h", "rate", "ineffectiveness"),
    [
        ([3, 3, 5, 5, 0], 0.6931472, 0.8, 0.8664340),
        ([4] * 10, 0, 1, 0),
        (range(1, 11), 2.3025851, 1, 2.3025851),
        ([3, 3, 3, 7], 0.5623351, 1, 0.5623351),
        ([7] + 99 * [0], 4.5591185, 0.01, 455.911848),
        (100 * [0], 4.6051702, 0, 0),
        ([5] + 9 * [0], 0, 0.1, 0),
    ],
)
def test_entropy_by_hand(births, h, rate, ineffectiveness):
    found = feature_entropy(list(births))
    assert found.entropy.item() == pytest.approx(h, abs=1e-7)
    assert found.birth_rate.item() == pytest.approx(rate, abs=1e-12)
    assert found.ineffectiveness.item() == pytest.approx(ineffectiveness, rel=1e-7, abs=1e-12)
    assert found.n == len(births)
    assert found.entropy.shape == found.birth_rate.shape == found.ineffectiveness.shape == (1,)


@pytest.mark.parametrize(("rare", "h"), [("one_minus", 4.5591185), ("max", 4.6051702), ("printed", 0.0460517)])
def test_rare_births_by_hand(rare, h):
    assert feature_entropy([3] + 99 * [0], rare=rare).entropy.item() == pytest.approx(h, abs=1e-7)


def test_rare_births_may_be_left_undefined():
    found = feature_entropy(torch.tensor([[0, 0, 2], [0, 1, 2], *[[0, 0, 3]] * 18]), rare="nan")
    assert found.entropy.isnan().tolist() == [True, True, False]
    assert found.birth_rate.tolist() == [0, 0.05, 1]
    assert found.ineffectiveness.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("n", "born"), [(10, 1), (30, 3), (70, 7), (100, 10), (1000, 100)])
def test_a_rate_at_the_limit_is_not_rare(n, born):
    assert feature_entropy([2] * born + [0] * (n - born)).entropy.item() == 0
    below = feature_entropy([2] * (born - 1) + [0] * (n - born + 1)).entropy.item()
    assert below == pytest.approx((1 - (born - 1) / n) * math.log(n))


def test_no_rate_is_rare_at_the_limit_0_and_all_but_1_at_the_limit_1():
    births = torch.tensor([[0, 1, 1], [0, 0, 2]])
    assert feature_entropy(births, min_rate=0).entropy.tolist() == pytest.approx([0, 0, math.log(2)])
    expected = pytest.approx([math.log(2), 0.5 * math.log(2), math.log(2)])
    assert feature_entropy(births, min_rate=1).entropy.tolist() == expected


# Parity


@given(seeds, st.integers(2, 60), st.integers(1, 6), st.floats(0, 1), st.floats(0, 1), st.sampled_from(sorted(RARE)))
@settings(max_examples=60)
def test_parity_with_loops(seed, n, c, dead, min_rate, rare):
    rng = np.random.default_rng(seed)
    births = rng.integers(1, rng.integers(2, 40), (n, c)) * (rng.random((n, c)) >= dead)
    expected = np.array([plain(column.tolist(), min_rate, rare) for column in births.T])
    for given_as in (
        births,
        torch.from_numpy(births),
        births.tolist(),
        births.astype(np.int32),
        np.asfortranarray(births),
    ):
        found = feature_entropy(given_as, min_rate=min_rate, rare=rare)
        got = torch.stack((found.entropy, found.birth_rate, found.ineffectiveness), 1)
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    one = feature_entropy(births[:, 0], min_rate=min_rate, rare=rare)
    assert one.entropy.item() == pytest.approx(expected[0, 0], abs=1e-12, nan_ok=True)


# Theorems


@given(seeds, st.integers(2, 50))
def test_order_and_names_of_births_do_not_matter_and_bounds_hold(seed, n):
    rng = np.random.default_rng(seed)
    births = rng.integers(0, 9, (n, 3))
    found = feature_entropy(births)
    assert ((found.entropy >= 0) & (found.entropy <= math.log(n) + 1e-12)).all()
    renamed = np.concatenate(([0], 1 + rng.permutation(200)[:8]))[births]
    for other in (rng.permutation(births), renamed):
        torch.testing.assert_close(feature_entropy(other).entropy, found.entropy, atol=1e-12, rtol=0)
    torch.testing.assert_close(feature_entropy(births[:, [2, 0, 1]]).entropy, found.entropy[[2, 0, 1]])


@given(seeds, st.integers(2, 20))
def test_repeating_the_samples_keeps_the_entropy(seed, n):
    births = np.random.default_rng(seed).integers(0, 5, (n, 2))
    once, thrice = (feature_entropy(x, min_rate=0).entropy for x in (births, np.tile(births, (3, 1))))
    torch.testing.assert_close(thrice, once, atol=1e-12, rtol=0)


def test_births_are_not_changed():
    births = torch.tensor([[5, 0], [3, 1], [4, 1]])
    feature_entropy(births)
    assert births.tolist() == [[5, 0], [3, 1], [4, 1]]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_births_of_any_integer_type(dtype):
    assert feature_entropy(np.array([3, 3, 5, 5, 0], dtype)).entropy.item() == pytest.approx(math.log(2))


# Behaviour


@pytest.mark.parametrize(
    ("sd", "low", "high"), [(0.02, 0, 0), (0.05, 0, 0), (0.2, 0, 0.1), (0.5, 1.4, 1.8), (1, 1.9, 2.25), (2, 2.0, 2.35)]
)
def test_noise_on_a_pattern_raises_the_entropy(sd, low, high):
    u = torch.zeros(14, 14)
    for k in range(14):
        u[k, (k + 1) % 14] = 3 - 0.15 * k
    noise = sd * torch.randn(100, 6, 14, 14, generator=torch.Generator().manual_seed(0))
    assert low <= feature_entropy(feature_birth((u + noise).relu())).entropy.mean().item() <= high


@pytest.mark.parametrize(("m", "expected"), [(7, 1.94), (14, 2.24), (28, 2.66)])
def test_floor_of_noise(m, expected):
    assert feature_entropy_floor(m, 100) == pytest.approx(expected, abs=0.1)
    assert feature_entropy_floor(m, 100, seed=1) == pytest.approx(expected, abs=0.1)


def test_floor_is_fixed_by_its_seed_and_heeds_the_limits():
    floors = {feature_entropy_floor(6, 30, seed=seed, units=4) for seed in range(4)}
    assert len(floors) == 4
    assert feature_entropy_floor(6, 30, seed=2, units=4) in floors
    assert feature_entropy_floor(6, 30, max_rank=1) == pytest.approx(math.log(30))  # no ties: no birth so early
    assert feature_entropy_floor(6, 30, density=0.01) == pytest.approx(math.log(30))
    assert 0 <= feature_entropy_floor(6, 30, units=1) <= math.log(30)


@pytest.mark.parametrize(
    ("m", "n", "options"), [(3, 10, {}), (5, 1, {}), (5, 10, {"units": 0}), (5, 9, {"density": 2})]
)
def test_floor_of_nothing_is_refused(m, n, options):
    with pytest.raises(ValueError, match=r"at least|units|density"):
        feature_entropy_floor(m, n, **options)


# Refused


@pytest.mark.parametrize(
    ("births", "message"),
    [
        ([3], "at least 2"),
        ([], "at least 2"),
        (torch.zeros(1, 5, dtype=torch.int64), "at least 2"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), "shape"),
        (torch.tensor(3), "shape"),
        ([1.0, 2.0], "integers"),
        (np.array([1.0, math.nan]), "integers"),
        ([True, False], "integers"),
        ([1, -1], r"0 \(none\) or more"),
    ],
)
def test_births_that_are_none_are_refused(births, message):
    with pytest.raises(ValueError, match=message):
        feature_entropy(births)


def test_negative_births_are_not_blamed_on_their_type():
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        feature_entropy([3, -2, 0])
    assert "-2" in str(caught.value) or "negative" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_rate": -0.1}, "min_rate"), ({"min_rate": 1.1}, "min_rate"), ({"min_rate": math.nan}, "min_rate"),
     ({"rare": "mean"}, "rare"), ({"rare": None}, "rare")],
)  # fmt: skip
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        feature_entropy([1, 2], **options)
    with pytest.raises(ValueError, match=message):
        table({"a": maps_with(torch.ones(40, 1))}, [0] * 40, **options)


# The table


def drawn(seed, n=60, c=3):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 5, (n, c)))


def test_table_by_hand():
    a, b = drawn(0), drawn(1, c=2)
    a[:, 1] = 0
    labels = ["dog", "cat", "dog"] * 20
    found = table({"a": maps_with(a), "b": maps_with(b)}, labels)
    index = [(layer, name, unit) for layer, c in (("a", 3), ("b", 2)) for name in ("cat", "dog") for unit in range(c)]
    assert found.units.index.tolist() == index
    assert list(found.units.index.names) == ["layer", "class", "unit"]
    for layer, name, unit in index:
        column = (a if layer == "a" else b)[:, unit].tolist()
        expected = plain([x for x, label in zip(column, labels, strict=True) if label == name])
        row = found.units.loc[(layer, name, unit)]
        assert tuple(row[["entropy", "birth_rate", "ineffectiveness"]]) == pytest.approx(expected, abs=1e-12)
    assert found.layers.index.tolist() == ["a", "b"]
    for layer in "ab":
        row, units = found.layers.loc[layer], [i for i in index if i[0] == layer]
        assert row["entropy"] == pytest.approx(np.mean([found.units.loc[i, "entropy"] for i in units]))
        assert row["birth_rate"] == pytest.approx(np.mean([found.units.loc[i, "birth_rate"] for i in units]))
        assert (row["units"], row["map_size"], row["n"]) == (len(units) / 2, 4, 30)
        assert row["ceiling"] == pytest.approx((math.log(20) + math.log(40)) / 2)
        assert row["floor"] == feature_entropy_floor(4, 30)
    assert found.layers[["units", "map_size"]].dtypes.tolist() == [np.dtype("int64")] * 2


def test_chosen_classes_in_the_order_given():
    births, labels = drawn(2, 90), torch.arange(90) % 3
    found = table({"a": maps_with(births)}, labels, classes=[2, 0])
    assert found.units.index.get_level_values("class").tolist() == [2] * 3 + [0] * 3
    for name in (0, 2):
        for unit in range(3):
            expected = plain(births[labels == name, unit].tolist())
            assert tuple(found.units.loc[("a", name, unit)]) == pytest.approx(expected, abs=1e-12)
    assert found.layers.loc["a", "n"] == 30


def test_small_classes_that_are_not_chosen_do_not_matter():
    labels = [0] * 58 + [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table({"a": maps_with(drawn(3))}, labels, classes=[0])


@pytest.mark.parametrize("rare", sorted(RARE))
def test_options_reach_births_and_entropy(rare):
    births, labels = drawn(4), [0] * 60
    expected = [plain([b if b <= 2 else 0 for b in births[:, unit].tolist()], 0.5, rare)[0] for unit in range(3)]
    for limits in ({"max_rank": 2}, {"density": 0.3}):  # 0.3 of 6 edges: 2 frames
        found = table({"a": maps_with(births)}, labels, rare=rare, min_rate=0.5, **limits)
        np.testing.assert_allclose(found.units["entropy"], expected, atol=1e-12)
        assert found.layers.loc["a", "floor"] == feature_entropy_floor(4, 60, **limits)


def test_preset_reaches_births_and_floor():
    maps = torch.zeros(40, 1, 60, 60)
    births = torch.arange(40) % 4 + 49  # a cycle of so many edges, strongest first
    for u, k in zip(maps[:, 0], births.tolist(), strict=True):
        for i in range(k):
            u[i, (i + 1) % k] = 2 * k - i
    free, preset = (table({"a": maps}, [0] * 40, **options) for options in ({}, {"preset": "zhao2022"}))
    assert tuple(free.units.iloc[0]) == pytest.approx((math.log(4), 1, math.log(4)))
    assert tuple(preset.units.iloc[0]) == pytest.approx((math.log(3), 0.75, math.log(3) / 0.75))
    assert preset.layers.loc["a", "floor"] == feature_entropy_floor(60, 40, max_rank=51, density=0.8)
    assert preset.layers.loc["a", "floor"] != free.layers.loc["a", "floor"]


def test_labels_of_activations():
    births = drawn(5)
    acts = Activations({"a": maps_with(births)}, labels=torch.arange(60) % 2)
    pd.testing.assert_frame_equal(table(acts).units, table({"a": maps_with(births)}, torch.arange(60) % 2).units)
    own = table(acts, ["x"] * 60).units
    assert own.index.get_level_values("class").unique().tolist() == ["x"]
    with pytest.raises(ValueError, match="labels are missing"):
        table(Activations({"a": maps_with(births)}))
    with pytest.raises(ValueError, match="labels are missing"):
        table({"a": maps_with(births)})


def test_units_without_a_rare_value_are_averaged_within_their_class_first():
    births = torch.tensor([[0, 1, 2], [0, 2, 2]]).repeat_interleave(30, 0)  # class by class
    births[30:, 0] = torch.arange(30) % 3 + 1
    births[:30, 1] = torch.arange(30) % 4 + 1
    labels = [0] * 30 + [1] * 30
    found = table({"a": maps_with(births)}, labels, rare="nan")
    per_class = [np.nanmean([plain(births[rows, u].tolist(), rare="nan")[0] for u in range(3)])
                 for rows in (slice(30), slice(30, 60))]  # fmt: skip
    assert found.layers.loc["a", "entropy"] == pytest.approx(np.mean(per_class))


def test_few_samples_are_warned_of():
    with pytest.warns(UserWarning, match="class 'b' has 19 samples, fewer than 20"):
        table({"a": maps_with(drawn(6))}, ["a"] * 41 + ["b"] * 19)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table({"a": maps_with(drawn(6))}, ["a"] * 40 + ["b"] * 20)


def test_the_warning_gives_the_samples_of_the_class_that_it_names():
    with pytest.warns(UserWarning, match=r"class 'a' has 15 samples|class 'b' has 5 samples"):
        table({"a": maps_with(drawn(7, 20))}, ["a"] * 15 + ["b"] * 5)


def test_negative_values_are_warned_of_by_layer():
    maps = maps_with(drawn(8))
    with pytest.warns(UserWarning, match="negative values in conv: .*after the ReLU") as caught:
        found = table({"relu": maps, "conv": maps - 1}, [0] * 60)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert found.units.loc["relu"].equals(found.units.loc["conv"])
    with pytest.warns(UserWarning, match=r"negative values in l0, l1, l2, l3 \.\.\.: "):
        table({f"l{i}": maps - 1 for i in range(5)}, [0] * 60)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(40, 2, 4, 5), "square"),
        (torch.zeros(40, 2, 3, 3), "at least 4 x 4"),
        (torch.full((40, 2, 4, 4), torch.nan), "finite"),
        (torch.zeros(40, 16), "maps"),
        (torch.zeros(40, 4, 4), "maps"),
        (torch.zeros(40, 2, 4, 4, 4), "maps"),
    ],
)
def test_refusals_name_the_layer(maps, message):
    with pytest.raises(ValueError, match=f"layer 'features.3'.*{message}"):
        table({"first": torch.zeros(40, 1, 4, 4), "features.3": maps}, [0] * 40)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0] * 39, {}, "expected 40, got 39"),
        ([0] * 39 + [1], {}, "class 1 must have at least 2 samples, got 1"),
        ([0] * 40, {"classes": [7]}, r"no class 7; the classes are \[0\]"),
        ([0] * 40, {"classes": []}, "empty"),
        (torch.zeros(40), {}, "integers"),
        ([0] * 40, {"preset": "zhao"}, "preset"),
        ([0] * 40, {"density": 0}, "density"),
        ([0] * 40, {"max_rank": 0}, "max_rank"),
    ],
)
def test_labels_and_options_that_do_not_fit_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        table({"a": torch.zeros(40, 1, 4, 4)}, labels, **options)


def test_layers_of_other_length_are_refused_by_name():
    with pytest.raises(ValueError, match="'b'"):
        table({"a": torch.zeros(40, 1, 4, 4), "b": torch.zeros(30, 1, 4, 4)}, [0] * 40)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match=r"activations|layer"):
        table({}, [0] * 40)


def test_repr_shows_the_layers():
    found = table({"stem": maps_with(drawn(9))}, [0] * 60)
    assert "3 units x classes" in repr(found)
    assert "stem" in repr(found)
    assert "<table" in found._repr_html_()


def test_births_can_be_streamed_without_keeping_maps():
    net, x = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()), torch.randn(30, 1, 8, 8)
    births = repgraph.stream(net, x, feature_birth, "1", batch_size=8, progress=False)["1"]
    assert births.shape == (30, 3)
    assert torch.equal(births, feature_birth(torch.relu(net[0](x))))
