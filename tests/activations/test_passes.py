"""Passes: as few as the budget allows, no longer than they need to be, and no check is lost on the way."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import Through, Wired, take
from torch import nn

from repgraph import capture
from repgraph.activations.memory import groups_within
from repgraph.activations.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")

N = 12
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))


def fewest_runs(sizes, budget):
    """Over all ways to cut the layers into consecutive runs."""
    best = len(sizes)
    for cuts in range(2 ** (len(sizes) - 1)):
        ends = [0, *(i + 1 for i in range(len(sizes) - 1) if cuts >> i & 1), len(sizes)]
        if all(sum(sizes[a:b]) <= budget for a, b in pairwise(ends)):
            best = min(best, len(ends) - 1)
    return best


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(0, 60))
def test_runs_of_layers_are_as_few_as_can_be(sizes, more):
    budget = max(sizes) * 4 * N + more * 4 * N
    specs = {f"layer{i}": Spec((size,), torch.float32) for i, size in enumerate(sizes)}
    groups = groups_within(specs, N, budget)
    assert [name for group in groups for name in group] == list(specs)
    assert all(sum(specs[name].nbytes for name in group) * N <= budget for group in groups)
    assert len(groups) == fewest_runs([4 * N * size for size in sizes], budget)


class Counted(nn.Module):
    """A linear layer that counts the samples it sees."""

    def __init__(self, width=6):
        super().__init__()
        self.fc, self.seen = nn.Linear(6, width), 0

    def forward(self, x):
        self.seen += len(x)
        return self.fc(x)


def deep(depth=4):
    torch.manual_seed(0)
    return nn.Sequential(*(Counted() for _ in range(depth)))


def names(model):
    return [name for name, _ in model.named_children()]


def test_a_later_pass_ends_behind_the_last_layer_that_it_wants():
    model = deep()
    whole = capture(model, X, names(model), batch_size=4, progress=False)
    acts = capture(model, X, names(model), batch_size=4, memory=N * 6 * 4, progress=False)
    for name in acts:  # one layer a pass
        before = [block.seen for block in model]
        assert torch.equal(acts[name], whole[name])
        grown = [block.seen - b for block, b in zip(model, before, strict=True)]
        if name != "0":
            few = 2 * 3  # three samples tell twice that this does no harm
            number = int(name)
            assert grown == [N + few] * (number + 1) + [0] * (3 - number)


@pytest.mark.parametrize("kind", ["own hook", "wrapped forward", "forward="])
def test_what_waits_for_the_end_of_a_forward_sees_it(kind):
    model, seen, options = deep(), [], {}
    if kind == "own hook":
        model.register_forward_hook(lambda *_: seen.append(1))
    elif kind == "wrapped forward":
        own = model.forward

        def wrapped(x):
            y = own(x)
            seen.append(len(x))
            return y

        model.forward = wrapped
    else:
        options["forward"] = lambda model, batch: seen.append(len(model(batch)))
    acts = capture(model, X, names(model), batch_size=4, memory=N * 6 * 4, progress=False, **options)
    before = len(seen)
    acts["1"]
    assert len(seen) == before + 3


def test_a_model_that_remembers_until_its_end_is_run_to_its_end():
    """A value left from a forward that was broken off would change the next one."""

    def run(model, x):
        x = model.a(x if model.left is None else x + model.left)
        model.left = x[:1]
        x = model.b(x)
        model.left = None
        return model.c(x)

    torch.manual_seed(0)
    model = Wired(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6))
    model.left = None
    whole = take(model, X, batch_size=4)
    acts = take(model, X, batch_size=4, memory=N * 6 * 4)
    for name in ("b", "a", "c", "a"):
        assert torch.equal(acts[name], whole[name])
        assert model.left is None


def test_a_handler_in_the_model_does_not_take_the_end_for_an_error():
    def run(model, x):
        try:
            return model.b(model.a(x))
        except Exception:
            return x * 0

    torch.manual_seed(0)
    model = Wired(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    acts, whole = take(model, X, memory=N * 6 * 4), take(model, X)
    assert torch.equal(acts["b"], whole["b"])
    assert torch.equal(acts["a"], whole["a"])


def test_later_passes_over_gates_and_calls_end_early_too():
    def run(model, x):
        x = model.fc(x).relu()
        x = model.fc(x)
        return model.end(torch.relu(x))

    torch.manual_seed(0)
    model = Wired(run, fc=nn.Linear(6, 6), end=Counted())
    layers = ["fc", "fc#1", "gates", "end"]
    whole = capture(model, X, layers, batch_size=4, progress=False)
    acts = capture(model, X, layers, batch_size=4, memory=N * 6 * 4, progress=False)
    assert list(whole) == ["fc", "gates:#relu0", "fc#1", "gates:#relu1", "end"]
    for name in ("end", "gates:#relu1", "fc#1", "gates:#relu0", "fc"):
        before = model.end.seen
        assert torch.equal(acts[name], whole[name])
        assert (model.end.seen > before) == (name == "end")


def test_a_call_that_only_a_later_batch_has_is_refused_in_the_first_pass():
    def run(model, x):
        x = model.b(model.a(x))
        return model.b(x) if x.flatten()[0] > 90 else x

    torch.manual_seed(0)
    model = Wired(run, a=nn.Linear(6, 6), b=Through(lambda x: x + 0))
    x = X.clone()
    x[8] = 1e4
    with torch.no_grad():
        model.a.weight.copy_(torch.eye(6))
    with pytest.raises(ValueError, match="layer 'b#1' runs at sample 8, but not in the first batch"):
        capture(model, x, ["a", "b"], batch_size=4, memory=N * 6 * 4, progress=False)


def sizes_seen(model, x, **options):
    sizes = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    capture(model, x, "leaves", progress=False, **options)
    handle.remove()
    return sizes


def test_a_few_samples_are_run_ahead_and_with_hooks_of_others_the_first_batch():
    model = deep(1)
    capture(model, X, names(model), batch_size=4, progress=False)
    assert model[0].seen == N + 3
    assert sizes_seen(deep(1), X, batch_size=4) == [4, 4, 4, 4]
    many, model = X.repeat(100, 1), deep(1)
    capture(model, many, names(model), batch_size=100, progress=False)
    assert model[0].seen == 1200 + 5


def fixed(x):
    if len(x) != 4:
        raise ZeroDivisionError(f"made for 4 samples, got {len(x)}")
    return x * 2


EXPERT = nn.Linear(6, 6)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Through(fixed)),
        nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False)),
        nn.Sequential(Through(lambda x: x + x.mean(0))),
        nn.Sequential(Through(lambda x: x @ x.T)),
        nn.Sequential(Wired(lambda m, x: m.expert(x) if len(x) > 3 else x, expert=EXPERT)),
    ],
    ids=[
        "one batch size",
        "statistics of the batch",
        "mean of the batch",
        "products in the batch",
        "layer that few samples do not reach",
    ],
)
@pytest.mark.parametrize("memory", [None, N * 6 * 4])
def test_models_that_need_whole_batches_are_captured(model, memory):
    layers = "leaves"
    acts = capture(model, X, layers, batch_size=4, memory=memory, progress=False)
    with torch.no_grad():
        expected = torch.cat([model.eval()(part) for part in X.split(4)])
    assert torch.equal(acts[list(acts)[-1]], expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_single_bad_number_is_found_and_a_sum_that_overflows_is_not_one(bad, dtype):
    model = nn.Sequential(Through(lambda x: x.to(dtype)))
    x = torch.full((6, 3), 3e4 if dtype == torch.float16 else 3e38)  # finite in the type, their sum is not
    assert torch.equal(capture(model, x, "0", batch_size=2, progress=False)["0"], x.to(dtype))
    x[3, 1] = bad
    with pytest.raises(ValueError, match="layer '0' gives NaN or infinite values among the 2 samples from sample 2 on"):
        capture(model, x, "0", batch_size=2, progress=False)
