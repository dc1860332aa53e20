"""What capture records, and what it refuses."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import Through
from torch import nn
from torch.nn import functional as F

from repgraph import capture

X = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """An in-place ReLU after the conv; the linear layer runs twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(self.mix(self.mix(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    return net


def take(model, data, layers="leaves", **options):
    return capture(model, data, layers, progress=False, **options)


def by_hand(net, x):
    """The same forward pass written out, in eval mode."""
    bn, shape = net.bn, (1, -1, 1, 1)
    with torch.no_grad():
        conv = F.conv2d(x, net.conv.weight, net.conv.bias)
        norm = (conv - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
        norm = norm * bn.weight.view(shape) + bn.bias.view(shape)
        relu = norm.clamp_min(0)
        first = relu.mean((2, 3)) @ net.mix.weight.T + net.mix.bias
        second = first @ net.mix.weight.T + net.mix.bias
        head = second @ net.head.weight.T + net.head.bias
    return {"conv": conv, "bn": norm, "relu": relu, "mix": first, "mix#1": second, "head": head}


@pytest.mark.parametrize("training", [True, False])
def test_values_are_those_of_the_forward_pass_in_eval_mode(net, training):
    acts, expected = take(net.train(training), X, batch_size=4), by_hand(net, X)
    assert list(acts) == list(expected)
    for name in expected:
        assert acts[name].dtype == torch.float32
        assert acts[name].device.type == "cpu"
        assert not acts[name].requires_grad
        torch.testing.assert_close(acts[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_in_place_relu_after_a_layer_does_not_reach_it(net):
    assert (take(net, X, "conv")["conv"] < 0).any()
    assert (take(net, X, "bn")["bn"] < 0).any()


def test_module_used_twice_has_two_names(net):
    expected = by_hand(net, X)
    assert list(take(net, X, "mix")) == ["mix", "mix#1"]
    for select in ("mix#1", ["mix#1"], ["mix#1", "head"]):
        acts = take(net, X, select)
        assert next(iter(acts)) == "mix#1"
        assert "mix" not in acts
        torch.testing.assert_close(acts["mix#1"], expected["mix#1"])


def test_a_later_call_beside_other_choices(net):
    assert list(take(net, X, ["mix", "mix#1"])) == ["mix", "mix#1"]
    assert list(take(net, X, ["leaves", "mix#1"])) == list(by_hand(net, X))
    assert list(take(net, X, ["m*", "mix#1"])) == ["mix", "mix#1"]


def test_calls_are_counted_anew_for_every_batch(net):
    assert take(net, X, "mix", batch_size=2)["mix#1"].shape == (11, 4)


@dataclass
class Answer:
    extra: object
    hidden: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, -x),
        lambda x: [x, -x],
        lambda x: {"hidden": x, "other": -x},
        lambda x: Answer(None, x),
        lambda x: (None, ("text", {"deep": x}), -x),
    ],
    ids=["tuple", "list", "dict", "dataclass", "nested"],
)
def test_first_tensor_of_an_output_is_taken(wrap):
    model = nn.Sequential(nn.Linear(4, 5), Through(wrap))
    acts = take(model, ROWS, batch_size=4)
    assert torch.equal(acts["1"], acts["0"])


def test_recurrent_layer_gives_its_sequence():
    model = nn.Sequential(nn.LSTM(4, 5, batch_first=True))
    x = torch.randn(7, 6, 4)
    torch.testing.assert_close(take(model, x)["0"], model(x)[0].detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("data", [X, X.double().numpy(), X.half()], ids=["float32", "float64 array", "float16"])
def test_inputs_take_the_type_of_the_model(dtype, data):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).to(dtype)
    acts = take(model, data, batch_size=4)
    assert {x.dtype for x in acts.values()} == {dtype}
    expected = model[0](torch.as_tensor(data).to(dtype)).detach()
    torch.testing.assert_close(acts["0"], expected, rtol=2e-2, atol=2e-2)


def test_float64_array_goes_into_a_float32_model(net):
    torch.testing.assert_close(take(net, X.double().numpy())["head"], by_hand(net, X)["head"])


def test_integer_and_bool_outputs():
    model = nn.Sequential(nn.Linear(4, 5), Through(lambda x: x > 0), Through(lambda x: x.sum(1)))
    acts = take(model, ROWS)
    assert (acts["1"].dtype, acts["2"].dtype, acts["2"].shape) == (torch.bool, torch.int64, (11,))


def test_default_device_and_type_of_the_caller_do_not_matter(net):
    expected = take(net, X, "head", batch_size=4)["head"]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # stands for "cuda"
            acts = take(net, X, "head", batch_size=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(acts["head"], expected)


def test_settings_and_repr(net):
    acts = take(net, X, ["conv", nn.Linear], reduce="mean")
    assert acts.settings == {"model": "Net", "layers": ["conv", "Linear"], "reduce": "mean"}
    assert repr(acts).splitlines()[:2] == ["Activations(n=11, layers=4, 616 B in memory)", "  conv   4  float32"]


@settings(max_examples=30, deadline=None)
@given(batch_size=st.integers(1, 12), seed=st.integers(0, 5))
def test_batch_size_moves_nothing_but_rounding(batch_size, seed):
    torch.manual_seed(seed)
    net = Net()
    whole, parts = take(net, X, batch_size=11), take(net, X, batch_size=batch_size)
    assert list(parts) == list(whole)
    assert torch.equal(parts.input_hashes, whole.input_hashes)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


# Refused


@pytest.mark.parametrize("size", [11, 4, 1])
def test_first_axis_that_is_not_the_batch_is_refused(size):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2))  # batch_first=False
    x = torch.randn(11, 5, 8)
    with pytest.raises(
        ValueError, match=rf"layer '0' gives shape \(5, {size}, 8\) for a batch of {size} samples.*batch"
    ):
        take(model, x, "0", batch_size=size, forward=lambda model, batch: model(batch.transpose(0, 1)))


def test_output_without_axes_is_refused():
    with pytest.raises(ValueError, match=r"layer '0' gives shape \(\) for a batch of 11"):
        take(nn.Sequential(Through(torch.sum)), ROWS)


def test_other_lengths_in_later_batches_are_refused_without_reduce():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    data = [torch.zeros(3, 5, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)]
    with pytest.raises(
        ValueError, match=r"layer '0' gives shape \(2, 4, 4\) at sample 3, expected \(b, 5, 4\).*reduce="
    ):
        take(model, data)
    acts = take(model, data, "0", reduce="mean")
    torch.testing.assert_close(acts["0"], model[0].weight[[0, 0, 0, 1, 1]].detach())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 9])
def test_nan_and_infinity_are_refused_with_the_layer(bad, row):
    x = ROWS.clone()
    x[row] = 50
    model = nn.Sequential(nn.Linear(4, 4), Through(lambda x: x.masked_fill(x.abs() > 5, bad)), nn.Linear(4, 2))
    nn.init.eye_(model[0].weight)
    with pytest.raises(ValueError, match=f"layer '1' gives NaN or infinite values.*from sample {row - row % 3}"):
        take(model, x, batch_size=3)


def test_layer_that_never_runs_is_refused_by_name_and_left_out_of_a_group(net):
    net.unused = nn.Linear(2, 2)
    for select in ("unused", ["conv", "unused"], ["module.unused", "conv"]):
        with pytest.raises(ValueError, match=r"layer '(module\.)?unused' does not run.*those that ran: "):
            take(net, X, select)
    assert "unused" not in take(net, X, "leaves")
    with pytest.raises(ValueError, match="layer 'head#1' does not run"):
        take(net, X, ["head#1", "conv"])


class Sometimes(nn.Module):
    """Runs its second layer only on batches that start with a small number."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) if x[0, 0] < 50 else y


def test_layer_that_runs_in_some_batches_only_is_refused():
    x = ROWS.clone()
    x[4] = 100
    with pytest.raises(ValueError, match="layer 'b' does not run at sample 4, but in the first batch"):
        take(Sometimes(), x, batch_size=2)


def test_call_that_happens_in_later_batches_only_is_refused():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return self.a(y) if x[0, 0] > 50 else y

    x = ROWS.clone()
    x[4] = 100
    with pytest.raises(ValueError, match="layer 'a#1' runs at sample 4, but not in the first batch"):
        take(Again(), x, batch_size=2)


@pytest.mark.parametrize(
    "f",
    [F.dropout, lambda x: x + 0.1 * torch.randn_like(x), lambda x: x + float(np.random.rand())],  # noqa: NPY002
    ids=["dropout", "noise", "NumPy noise"],
)
def test_random_forward_pass_is_refused(f):
    with pytest.raises(ValueError, match=r"layer '1' differs between two runs of the first batch.*random"):
        take(nn.Sequential(nn.Linear(4, 5), Through(f)), ROWS)


def test_dropout_modules_are_no_randomness(net):
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)).train()
    acts = take(model, ROWS)
    assert torch.equal(acts["1"], acts["0"])


@pytest.mark.parametrize("output", ["text", None, (), {"a": [None]}, Answer(1, 2)])
def test_output_without_a_tensor_is_refused(output):
    with pytest.raises(ValueError, match=f"layer '1' gives no tensor but {type(output).__name__}"):
        take(nn.Sequential(nn.Linear(4, 5), Through(lambda x: output)), ROWS)


def test_nested_and_sparse_outputs_are_refused():
    for f in (torch.Tensor.to_sparse, lambda x: torch.nested.nested_tensor([x[:2], x[2:]])):
        with pytest.raises(ValueError, match="layer '1' gives a nested or sparse tensor"):
            take(nn.Sequential(nn.Linear(4, 5), Through(f)), ROWS)


@pytest.mark.parametrize("row", [0, 7])
def test_error_of_the_model_keeps_its_type_and_says_how_far_it_got(row):
    class Weird(Exception):
        pass

    def fail(x):
        if (x > 50).any():
            raise Weird("no such animal")
        return x

    x = ROWS.clone()
    x[row] = 100
    model = nn.Sequential(nn.Identity(), nn.Identity(), Through(fail), nn.Linear(4, 2))
    with pytest.raises(Weird, match="no such animal") as caught:
        take(model, x, ["0", "1", "3"], batch_size=3)
    (note,) = caught.value.__notes__
    assert "last layer to run: 1" in note
    assert f"batch {row // 3} of shape (3, 4)" in note


def test_error_before_any_layer_of_a_later_batch_names_no_layer_of_the_batch_before():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x):
            if (x > 50).any():
                raise RuntimeError("early")
            return self.a(x)

    x = ROWS.clone()
    x[9] = 100
    with pytest.raises(RuntimeError, match="early") as caught:
        take(Early(), x, batch_size=3)
    assert "last layer to run: none" in caught.value.__notes__[0]


def test_wrong_input_shape_keeps_the_error_of_torch():
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        take(nn.Sequential(nn.Linear(4, 5), nn.Linear(6, 2)), ROWS)
    assert "last layer to run: 0" in caught.value.__notes__[0]


@pytest.mark.parametrize("reduce", ["max", "", 3])
def test_unknown_reduction_is_refused(net, reduce):
    with pytest.raises(ValueError, match="reduce must be None, 'mean', 'cls', 'last' or a callable"):
        take(net, X, reduce=reduce)
