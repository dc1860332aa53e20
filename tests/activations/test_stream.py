"""stream gives what capture would have given to the same function."""

import pytest
import torch
from torch import nn

from repgraph import capture, stream

X = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(11) % 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True))


def flow(model, f, **options):
    return stream(model, (X, Y), f, "leaves", progress=False, batch_size=4, **options)  # the last batch has 3


def stored(model, **options):
    return capture(model, (X, Y), "leaves", progress=False, batch_size=4, **options)


@pytest.mark.parametrize(
    "f",
    [lambda x: x, lambda x: x[:, :2], lambda x: x.flatten(1), lambda x: x > 0, lambda x: x.amax((2, 3))],
    ids=["itself", "part", "reshaped", "gates", "maxima"],
)
def test_concat_joins_what_f_gives(model, f):
    found, acts = flow(model, f), stored(model)
    assert list(found) == list(acts) == ["0", "1", "2", "3"]
    assert all(torch.equal(found[name], f(acts[name])) for name in acts)


def test_sum_adds_up(model):
    gram = lambda x: x.flatten(1).T @ x.flatten(1)  # noqa: E731
    found, acts = flow(model, gram, combine="sum"), stored(model)
    for name in acts:
        torch.testing.assert_close(found[name], gram(acts[name]), rtol=1e-4, atol=1e-4)


def test_mean_is_weighted_by_batch_size(model):
    found, acts = flow(model, lambda x: x.mean(0), combine="mean"), stored(model)
    for name in acts:
        torch.testing.assert_close(found[name], acts[name].mean(0))


def test_mean_of_counts_is_float(model):
    found = flow(model, lambda x: (x > 0).sum(0), combine="mean")
    batches = [(stored(model)["0"][i : i + 4] > 0).sum(0) for i in (0, 4, 8)]
    torch.testing.assert_close(found["0"], (4 * batches[0] + 4 * batches[1] + 3 * batches[2]) / 11)


def test_sums_without_axes(model):
    found = flow(model, lambda x: x.sum(), combine="sum")
    torch.testing.assert_close(found["2"], stored(model)["2"].sum())


def test_results_do_not_hold_on_to_the_outputs(model):
    found = flow(model, lambda x: x[:, :1])
    assert found["0"].untyped_storage().nbytes() == 11 * 36 * 4


def test_reduction_and_samples_as_in_capture(model):
    options = {"reduce": "mean", "samples": [1, 2, 9]}
    found, acts = flow(model, lambda x: 2 * x, **options), stored(model, **options)
    assert all(torch.equal(found[name], 2 * acts[name]) for name in acts)


def test_unknown_combination_is_refused(model):
    with pytest.raises(ValueError, match="combine must be 'concat', 'sum' or 'mean', got 'max'"):
        flow(model, lambda x: x, combine="max")


@pytest.mark.parametrize("combine", ["concat", "sum", "mean"])
def test_f_must_give_a_tensor(model, combine):
    with pytest.raises(ValueError, match="layer '0': f must return a tensor, got float"):
        flow(model, lambda x: float(x.mean()), combine=combine)


def test_concat_needs_rows(model):
    with pytest.raises(ValueError, match="layer '0'"):
        flow(model, lambda x: x.mean(), combine="concat")


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_shapes_that_change_with_the_batch_cannot_be_added(model, combine):
    with pytest.raises(ValueError, match="layer '0'"):
        stream(model, X[:9], lambda x: x, "0", combine=combine, batch_size=4, progress=False)  # the last batch has 1


def test_error_of_f_keeps_its_type(model):
    def fail(x):
        raise ZeroDivisionError("in f")

    with pytest.raises(ZeroDivisionError, match="in f"):
        flow(model, fail)


def test_checks_are_those_of_capture(model):
    with pytest.raises(ValueError, match="layer '0' gives NaN"):
        stream(model, X.masked_fill(X > 3, torch.nan), lambda x: x, "0", progress=False)
    with pytest.raises(ValueError, match="'convv' matches no layer"):
        stream(model, X, lambda x: x, "convv", progress=False)
