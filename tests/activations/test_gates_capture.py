"""Gates in captures: several passes, folders, beside layers, real architectures, no trace left, refusals."""

import pytest
import torch
from small_networks import Through
from torch import nn
from torch.nn import functional as F

from repgraph import Activations, capture, layer_names, stream
from repgraph.activations.gates import unpack

ROWS = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
FUSED = torch.backends.mha.get_fastpath_enabled
HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


class Net(nn.Module):
    """Gates of modules and functions, one module called twice, a buffer that changes, in training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.mix, self.bn = nn.Linear(6, 13), nn.Linear(13, 13), nn.BatchNorm1d(13)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.careful = True
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = self.act(self.fc(x))
        x = self.act(self.mix(x) - 0.1)
        if self.careful and (x > 1000).any():
            raise ZeroDivisionError("in forward")
        return F.relu6(self.drop(self.bn(self.mix(x))))


def by_hand(net, x):
    """Outputs and gates of the forward pass in eval mode, in order."""
    with torch.no_grad():
        fc = F.linear(x, net.fc.weight, net.fc.bias)
        mix = F.linear(fc.clip(0), net.mix.weight, net.mix.bias)
        second = mix - 0.1
        again = F.linear(second.clip(0), net.mix.weight, net.mix.bias)
        bn = (again - net.bn.running_mean) / (net.bn.running_var + net.bn.eps).sqrt() * net.bn.weight + net.bn.bias
    bits = {"gates:act": fc > 0, "gates:act#1": second > 0, "gates:#relu0": bn > 0, "gates:#relu0/upper": bn > 6}
    layers = {"fc": fc, "act": fc.clip(0), "mix": mix, "act#1": second.clip(0), "mix#1": again, "bn": bn, "drop": bn}
    return layers, bits


ORDER = ["fc", "gates:act", "act", "mix", "gates:act#1", "act#1", "mix#1", "bn", "drop", "gates:#relu0",
         "gates:#relu0/upper"]  # fmt: skip


def take(model, data, layers="gates", **options):
    return capture(model, data, layers, progress=False, **options)


def check(acts, layers, bits, rows=slice(None)):
    for name, spec in acts.specs.items():
        if name in bits:
            assert (spec.gates, spec.shape, spec.dtype) == (13, (2,), torch.uint8)
            assert torch.equal(unpack(acts[name], 13), bits[name][rows])
        else:
            assert spec.gates is None
            torch.testing.assert_close(acts[name], layers[name][rows])


# Beside layers, in passes, in files


def test_gates_and_layers_together():
    net = Net()
    acts = take(net, ROWS, ["gates", "leaves"], batch_size=7)
    assert list(acts) == ORDER
    check(acts, *by_hand(net, ROWS))
    assert list(take(net, ROWS, ["gates:act", "act"])) == ["gates:act", "act", "act#1"]
    assert list(layer_names(net, ["gates", "leaves"], ROWS)) == ORDER


def test_gates_beside_a_later_call_of_a_layer():
    net = Net()
    acts = take(net, ROWS, ["gates:act", "mix#1"])
    assert list(acts) == ["gates:act", "mix#1"]
    check(acts, *by_hand(net, ROWS))


def test_no_reduction_of_gates():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    acts = take(model, x, ["gates", "1"], reduce="mean")
    z = model[0](x).detach()
    assert torch.equal(unpack(acts["gates:1"], 48), z.flatten(1) > 0)
    torch.testing.assert_close(acts["1"], z.relu().mean((2, 3)))


@pytest.mark.parametrize("memory", [23 * 2, 23 * 4, 23 * 13 * 4, "1 MB"])
def test_several_passes_give_the_same(memory):
    net = Net()
    select = "gates" if memory in (46, 92) else ["gates", "leaves"]
    acts = take(net, ROWS, select, batch_size=5, memory=memory)
    assert ("passes" in repr(acts)) == (memory != "1 MB")
    assert list(acts) == [name for name in ORDER if "gates" in name or len(select) == 2]
    for _ in range(2):
        check(acts, *by_hand(net, ROWS))
    for name in reversed(list(acts)):
        acts[name]
    assert acts.nbytes == 23 * (8 + (7 * 13 * 4 if len(select) == 2 else 0))


def test_too_little_memory_for_gates_is_refused_by_name():
    with pytest.raises(ValueError, match="layer 'gates:act' alone needs 46 bytes"):
        take(Net(), ROWS, memory=45)


def test_folders_keep_the_number_of_gates(tmp_path):
    net = Net()
    written = take(net, ROWS, ["gates", "leaves"], folder=tmp_path / "a", batch_size=9)
    written.save(tmp_path / "b")
    for acts in (written, Activations.load(tmp_path / "a"), Activations.load(tmp_path / "b")):
        assert list(acts) == ORDER
        check(acts, *by_hand(net, ROWS))
        assert "13 gates" in repr(acts)


@pytest.mark.parametrize("rows", [slice(2, 9), [4, 1, 20]])
def test_subsets_keep_the_number_of_gates(rows, tmp_path):
    net = Net()
    part = take(net, ROWS, ["gates", "leaves"]).subset(rows, ["gates:act#1", "bn"])
    assert list(part) == ["gates:act#1", "bn"]
    part.save(tmp_path / "part")
    for acts in (part, Activations.load(tmp_path / "part")):
        check(acts, *by_hand(net, ROWS), rows)


def test_samples_and_labels():
    net = Net()
    acts = take(net, (ROWS, torch.arange(23)), samples=[2, 5, 22], batch_size=4)
    assert acts.labels.tolist() == [2, 5, 22]
    check(acts, *by_hand(net, ROWS), [2, 5, 22])


# Streams and functions of the user's


def test_streams_of_gates():
    net = Net()
    bits = by_hand(net, ROWS)[1]
    counts = stream(net, ROWS, lambda x: unpack(x, 13).sum(0), "gates", batch_size=5, combine="sum", progress=False)
    assert {name: x.tolist() for name, x in counts.items()} == {name: x.sum(0).tolist() for name, x in bits.items()}
    share = stream(net, ROWS, lambda x: unpack(x, 13).float().mean(0), "gates:act", combine="mean", progress=False)
    torch.testing.assert_close(share["gates:act"], bits["gates:act"].float().mean(0))


def test_relus_of_the_users_functions_are_no_gates():
    net, own = Net(), nn.ReLU()

    def f(x):
        return own(torch.relu(x.float().clamp(min=0)))

    found = stream(net, ROWS, f, ["gates", "leaves"], batch_size=5, progress=False)
    assert list(found) == ORDER
    torch.testing.assert_close(found["mix"], by_hand(net, ROWS)[0]["mix"].relu())
    acts = take(net, ROWS, ["gates", "leaves"], reduce=f)
    assert list(acts) == ORDER
    check(acts.subset(layers=list(by_hand(net, ROWS)[1])), *by_hand(net, ROWS))


def test_relus_of_the_users_forward_outside_the_model_are_no_gates():
    net = Net()
    acts = take(net, ROWS, forward=lambda model, batch: F.relu(model(batch.relu())))
    assert list(acts) == list(by_hand(net, ROWS)[1])
    check(acts, *by_hand(net, ROWS.relu()))


def test_relus_of_the_users_hooks_belong_to_the_model():
    net = Net()
    net.fc.register_forward_hook(lambda module, args, output: F.relu(output))
    acts = take(net, ROWS)
    expected = by_hand(Net(), ROWS)[1]
    assert list(acts) == ["gates:fc#relu0", *expected]
    assert torch.equal(unpack(acts["gates:fc#relu0"], 13), expected["gates:act"])


# Architectures


@pytest.mark.parametrize("nested", [True, False])
def test_fused_transformer_layers_show_their_gates(nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    inputs = []
    for one in model.layers:
        one.linear1.register_forward_hook(lambda module, args, output: inputs.append(output.detach()))
    hidden = torch.arange(4).expand(5, 4) > 2
    for mask in (None, hidden):
        inputs.clear()
        acts = take(model, x, forward=lambda m, b, mask=mask: m(b, src_key_padding_mask=mask))
        assert list(acts) == ["gates:layers.0#relu0", "gates:layers.1#relu0"]
        for bits, z in zip(acts.values(), inputs[-2:], strict=True):
            assert torch.equal(unpack(bits, 48), z.flatten(1) > 0)
    torch.testing.assert_close(
        take(model, x, ["gates", "layers.1"])["layers.1"], take(model, x, "layers.1")["layers.1"]
    )


def test_gelu_transformer_has_no_gates():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu")
    with pytest.raises(ValueError, match="no gate in the model"):
        take(nn.Sequential(layer), torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0)))


def test_a_module_named_gates_can_still_be_taken():
    model = nn.Sequential()
    model.add_module("gates", nn.Linear(6, 4))
    model.add_module("act", nn.ReLU())
    z = model.gates(ROWS).detach()
    acts = take(model, ROWS, ["gates", "gate[s]"])
    assert list(acts) == ["gates", "gates:act"]
    torch.testing.assert_close(acts["gates"], z)
    assert torch.equal(unpack(acts["gates:act"], 4), z > 0)


# No trace


def snapshot(model):
    hooks = {(name, kind): list(getattr(m, kind).items()) for name, m in model.named_modules() for kind in HOOKS
             if hasattr(getattr(m, kind), "items")}  # fmt: skip
    values = {name: (id(t), t.tolist()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return hooks, values, [m.training for m in model.modules()], torch.get_rng_state().tolist(), FUSED()


JOBS = {
    "capture": lambda m, x, f: take(m, x, batch_size=5),
    "with layers": lambda m, x, f: take(m, x, ["gates", "leaves"], batch_size=5),
    "folder": lambda m, x, f: take(m, x, folder=f, batch_size=5),
    "passes": lambda m, x, f: [*take(m, x, batch_size=5, memory=46).values()],
    "stream": lambda m, x, f: stream(m, x, lambda y: y, "gates", batch_size=5, progress=False),
    "layer_names": lambda m, x, f: layer_names(m, "gates", x[-2:]),
    "layer_names without data": lambda m, x, f: layer_names(m, "gates"),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("job", JOBS)
def test_no_trace_is_left(job, fused, tmp_path):
    model, kept = Net(), FUSED()
    model.bn.eval()
    model.careful = "without data" not in job  # fake tensors cannot be looked at
    model.act.register_forward_pre_hook(lambda module, args: None)
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        before = snapshot(model)
        JOBS[job](model, ROWS, tmp_path / "a")
        assert snapshot(model) == before
        assert FUSED() is fused
    finally:
        torch.backends.mha.set_fastpath_enabled(kept)


@pytest.mark.parametrize("row", [0, 22])
@pytest.mark.parametrize("job", [job for job in JOBS if "without" not in job])
def test_no_trace_is_left_after_an_error_in_forward(job, row, tmp_path):
    model, x = Net(), ROWS.clone()
    x[row] = 1e6
    before = snapshot(model)
    if job == "layer_names" and row == 0:
        JOBS[job](model, x, None)  # looks at the last samples only
    else:
        with pytest.raises(ZeroDivisionError, match="in forward") as caught:
            JOBS[job](model, x, tmp_path / "a")
        assert "last layer to run: act#1" in caught.value.__notes__[0]
    assert snapshot(model) == before
    with torch.no_grad():
        assert len(model(ROWS)) == 23  # nobody watches any more


def test_no_trace_is_left_after_an_error_in_the_users_function():
    model = Net()
    before = snapshot(model)
    for layers in ("gates", "leaves", ["gates", "leaves"]):
        with pytest.raises(ZeroDivisionError):
            stream(model, ROWS, lambda x: 1 / 0, layers, progress=False)
        assert snapshot(model) == before


def test_outputs_of_the_model_are_the_same_while_it_is_watched():
    net, seen = Net(), []
    take(net, ROWS, forward=lambda model, batch: seen.append(model(batch)), batch_size=23)
    torch.testing.assert_close(seen[-1], by_hand(net, ROWS)[0]["bn"].clip(0, 6))


# Refused


def test_gates_of_other_number_in_a_later_batch_are_refused():
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU())
    data = [torch.randn(3, 1, size, generator=torch.Generator().manual_seed(0)) for size in (5, 5, 7)]
    with pytest.raises(ValueError, match="layer 'gates:1' has 14 units at sample 6, expected 10 as in the first batch"):
        take(model, data)


class Sometimes(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.act, self.first = nn.Linear(6, 4), nn.Linear(4, 4), nn.ReLU(), first

    def forward(self, x):
        x = self.a(x).clamp(min=0)
        return self.b(self.act(x) if bool(x[0].sum() > 1e4) is not self.first else x)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (False, "layer 'gates:act' runs at sample 10, but not in the first batch"),
        (True, "layer 'gates:act' does not run at sample 10, but in the first batch"),
    ],
)
def test_gates_in_some_batches_only_are_refused(first, message):
    model, x = Sometimes(first), ROWS.clone()
    nn.init.ones_(model.a.weight)
    x[10] = 1e6
    with pytest.raises(ValueError, match=message):
        take(model, x, batch_size=5)
    assert list(take(model, x, "gates:#relu0", batch_size=5)) == ["gates:#relu0"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 22])
def test_nan_and_infinity_before_a_gate_are_refused_by_name(bad, row):
    x = ROWS.clone()
    x[row, 2] = 50
    model = nn.Sequential(nn.ReLU(), Through(lambda x: x.masked_fill(x > 49, bad)), nn.Hardtanh())
    with pytest.raises(
        ValueError, match=f"layer 'gates:2' gives NaN or infinite values.*from sample {row - row % 5} on"
    ):
        take(model, x, batch_size=5)
    assert list(take(model, x, "gates:0", batch_size=5)) == ["gates:0"]


def test_gates_on_another_first_axis_are_refused():
    model = nn.Sequential(nn.Linear(6, 4), Through(lambda x: F.relu(x.T).T))
    with pytest.raises(ValueError, match=r"layer 'gates:1#relu0' gives shape \(4, 23\) for a batch of 23.*batch"):
        take(model, ROWS)


def test_random_gates_are_refused():
    model = nn.Sequential(nn.Linear(6, 4), Through(lambda x: F.relu(x + torch.randn_like(x))))
    with pytest.raises(ValueError, match="layer 'gates:1#relu0' differs between two runs"):
        take(model, ROWS)


def test_gates_of_a_changed_model_are_refused():
    model = Net()
    acts = take(model, ROWS, memory=46)
    with torch.no_grad():
        model.fc.weight.add_(1)
    with pytest.raises(ValueError, match="the model has changed since capture"):
        list(acts.values())


def test_control_flow_that_torch_keeps_whole_does_not_disturb():
    branch = Through(lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))
    acts = take(nn.Sequential(nn.ReLU(), branch), ROWS)
    assert torch.equal(unpack(acts["gates:0"], 6), ROWS > 0)
