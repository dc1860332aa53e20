"""Agreement of criteria and stability over images, against SciPy, pandas and plain loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from repgraph.scores.agreement import score_agreement, score_stability

pytestmark = pytest.mark.usefixtures("one_thread")

seeds = st.integers(0, 2**32 - 1)


def drawn(seed, widths, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"layer{i}": torch.randn(c, generator=generator) for i, c in enumerate(widths)}
    return {name: value.round() if ties else value for name, value in scores.items()}


# Criteria


def test_by_hand():
    """Layer x: 1 and -1 of order; layer y: only in two of them; layer z: constant in a, so left out with a."""
    a = {"x": torch.tensor([1.0, 2, 3]), "z": torch.tensor([5.0, 5, 5])}
    b = {"x": torch.tensor([1.0, 10, 100]), "y": torch.tensor([1.0, 2, 3, 4]), "z": torch.tensor([3.0, 2, 1])}
    c = {"x": torch.tensor([3.0, 2, 1]), "y": torch.tensor([1.0, 2, 4, 3]), "z": torch.tensor([1.0, 2, 3])}
    found = score_agreement({"a": a, "b": b, "c": c})
    assert found.loc["a", "b"] == pytest.approx(1)
    assert found.loc["a", "c"] == pytest.approx(-1)
    assert found.loc["b", "c"] == pytest.approx((-1 + 0.8 - 1) / 3)
    assert np.diag(found) == pytest.approx(1)
    assert found.attrs == {"constant": {"a": 1, "b": 0, "c": 0}}


@given(seeds, st.booleans())
def test_parity_with_scipy(seed, ties):
    first, second = drawn(seed, [9, 5, 30], ties), drawn(seed + 1, [9, 5, 30], ties)
    found = score_agreement({"a": first, "b": second})
    each = [spearmanr(first[name], second[name]).statistic for name in first if len(first[name].unique()) > 1 < len(
        second[name].unique())]  # fmt: skip
    assert found.loc["a", "b"] == pytest.approx(np.mean(each), abs=1e-12)
    assert found.loc["b", "a"] == found.loc["a", "b"]


def test_parity_with_pandas_on_many_criteria():
    criteria = {f"c{i}": drawn(i, [20]) for i in range(6)}
    frame = pd.DataFrame({name: scores["layer0"].numpy() for name, scores in criteria.items()})
    pd.testing.assert_frame_equal(score_agreement(criteria), frame.corr(method="spearman"))


@given(seeds)
def test_only_the_order_within_a_layer_matters(seed):
    first, second = drawn(seed, [8, 4]), drawn(seed + 1, [8, 4])
    moved = {name: value.exp() * (i + 1) - 50 for i, (name, value) in enumerate(first.items())}
    found = score_agreement({"a": first, "moved": moved, "b": second, "minus": {k: -v for k, v in first.items()}})
    assert found.loc["a", "moved"] == pytest.approx(1)
    assert found.loc["a", "minus"] == pytest.approx(-1)
    assert found.loc["moved", "b"] == pytest.approx(found.loc["a", "b"])
    assert found.to_numpy().max() <= 1


def test_nothing_in_common():
    found = score_agreement({"a": {"x": torch.arange(3)}, "b": {"y": torch.arange(3)}, "c": {"y": torch.ones(3)}})
    assert found.isna().to_numpy().tolist() == [[False, True, True], [True, False, True], [True, True, True]]
    assert found.attrs["constant"] == {"a": 0, "b": 0, "c": 1}
    assert score_agreement({"a": {"x": torch.ones(1)}}).attrs["constant"] == {"a": 1}


def test_refusals_of_criteria():
    with pytest.raises(ValueError, match="at least one criterion"):
        score_agreement({})
    with pytest.raises(ValueError, match=r"layer 'x' must have as many scores in each criterion, got \[3, 2\]"):
        score_agreement({"a": {"x": torch.ones(3)}, "b": {"x": torch.ones(2)}})
    with pytest.raises(ValueError, match="scores of 'a', layer 'x', must be finite"):
        score_agreement({"a": {"x": torch.tensor([1, torch.nan])}})
    with pytest.raises(ValueError, match=r"scores of 'a', layer 'x', must have shape \(C,\), got \(2, 2\)"):
        score_agreement({"a": {"x": torch.ones(2, 2)}})


# Images


def plain(x, size, repeats, seed):
    values = []
    for repeat in range(repeats):
        order = np.random.default_rng([seed, size, repeat]).permutation(len(x))
        first, second = x[order[:size]].mean(0), x[order[size : 2 * size]].mean(0)
        values.append(spearmanr(first, second).statistic)
    return np.mean(values)


@given(seeds, st.integers(0, 3))
def test_parity_with_a_plain_loop(seed, own):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64) + torch.arange(6) / 5
    found = score_stability({"a": x, "b": x[:12, :4]}, sizes=(1, 6), repeats=3, seed=own)
    for name, values in (("a", x.numpy()), ("b", x[:12, :4].numpy())):
        for size in (1, 6):
            assert found.loc[name, size] == pytest.approx(plain(values, size, 3, own), abs=1e-12)


def test_more_images_are_more_stable_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(600, 64, generator=generator)
    found = score_stability(
        {"signal": noise + torch.linspace(0, 1, 64), "noise": noise, "sure": torch.arange(64.0).expand(600, 64)}
    )
    assert found.columns.tolist() == [16, 64, 256]
    assert (found.loc["signal"].diff().dropna() > 0.1).all()
    assert found.loc["noise"].abs().max() < 0.2
    assert found.loc["sure"].tolist() == pytest.approx([1, 1, 1])
    assert (found.index.name, found.attrs) == ("layer", {"repeats": 10, "seed": 0})


def test_integers_tie_exactly_and_constants_are_unknown():
    x = torch.randint(0, 3, (40, 5), generator=torch.Generator().manual_seed(0)).float() * 0.1
    x[:, 3] = x[:, 1]
    doubled = x.clone()
    found = score_stability({"x": x, "same": doubled, "constant": torch.ones(40, 5)}, sizes=(20,))
    assert found.loc["x", 20] == found.loc["same", 20]
    assert np.isnan(found.loc["constant", 20])


def test_refusals_of_images():
    x = torch.rand(10, 3)
    with pytest.raises(ValueError, match="sizes must be from 1 to 5, half of the 10 images, got 6"):
        score_stability({"a": x}, sizes=(2, 6))
    with pytest.raises(ValueError, match="sizes must be from 1 to 5"):
        score_stability({"a": x}, sizes=(0,))
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        score_stability({"a": x}, sizes=(2,), repeats=0)
    with pytest.raises(ValueError, match=r"scores of layer 'a' must have shape \(n, C\), got \(3,\)"):
        score_stability({"a": x[0]}, sizes=(2,))
    with pytest.raises(ValueError, match="scores of layer 'a' must be finite"):
        score_stability({"a": x / 0}, sizes=(2,))
