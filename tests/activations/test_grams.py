"""Gram matrices from the passes are those of the captured features, within any budget, in the fewest passes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import Loaded, Net, Through
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.rss import growth
from repgraph import capture, stream_grams

pytestmark = pytest.mark.usefixtures("one_thread")

N = 13
X = torch.randn(N, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 2), nn.Flatten())


MODEL = conv_net()
EACH = 4 * (48 + 48 + 36 + 36)  # bytes of one sample in all layers


def take(data=X, model=MODEL, layers="leaves", **options):
    return stream_grams(model, data, layers, progress=False, **options)


def check_products(grams, data=X, model=MODEL, tolerance=1e-6, **options):
    acts = capture(model, data, "leaves", progress=False, **options)
    assert list(grams) == list(acts)
    for name, x in acts.items():
        x = x.flatten(1).double()
        expected = x @ x.T
        torch.testing.assert_close(grams[name].double(), expected, rtol=0, atol=tolerance * float(expected.max()))
        assert torch.equal(grams[name], grams[name].T)


def test_by_hand():
    model = nn.Sequential(Through(lambda x: x), Through(lambda x: x[:, :1] * 2))
    found = take(torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]]), model, batch_size=2, memory=12)
    assert found["0"].tolist() == [[5, 1, 2], [1, 10, -1], [2, -1, 1]]
    assert found["1"].tolist() == [[4, 12, 0], [12, 36, 0], [0, 0, 0]]


class Counted:
    """Batches of given sizes that count how often they are read, and the samples that were."""

    def __init__(self, sizes):
        self.sizes, self.readings, self.samples = sizes, 0, 0

    def __iter__(self):
        self.readings += 1
        yield from X[: sum(self.sizes)].split(self.sizes)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, N))
def test_any_budget_and_any_batches_give_the_products_in_the_fewest_passes(sizes, room):
    sizes = sizes if sum(sizes) <= N else [N]
    n, run, data = sum(sizes), [], Counted(sizes)

    def forward(model, batch):
        run.append(len(batch))
        return model(batch)

    grams = take(data, memory=room * EACH + EACH - 1, forward=forward)
    check_products(grams, X[:n])
    passes = max(1, -(-(n - sizes[-1]) // room))
    assert data.readings == 1 + 1 + passes  # once to count the samples, once to compare the first batch
    assert sum(run) == sizes[0] + sum(n - room * i for i in range(passes))


@pytest.mark.parametrize("room", [1, 4, 5, N])
@pytest.mark.parametrize("samples", [None, 9, [12, 0, 3, 4, 5, 7, 8, 11]])
def test_data_in_every_form(room, samples):
    batches = [X[i : i + 4] for i in range(0, N, 4)]
    forms = [X, TensorDataset(X), DataLoader(TensorDataset(X), 4), batches, iter(batches)]
    for data in forms:
        grams = take(data, memory=room * EACH, samples=samples, batch_size=4)
        check_products(grams, samples=samples, batch_size=4)


def test_a_dataset_loads_no_sample_before_the_block():
    data = Loaded(X)
    check_products(take(data, memory=6 * EACH, batch_size=4))
    assert data.loaded[-7:] == list(range(6, N))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_types(dtype, tolerance):
    model = conv_net().to(dtype)
    grams = take(model=model, memory="5 kB", batch_size=4)
    assert {gram.dtype for gram in grams.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    check_products(grams, X, model, tolerance, batch_size=4)


def test_integers_and_reductions():
    model = nn.Sequential(Through(lambda x: (x * 4).long()), Through(lambda x: x > 0))
    check_products(take(model=model), model=model)
    check_products(take(reduce="mean"), reduce="mean")


def test_wide_layers_are_summed_over_chunks():
    x = torch.randn(5, 10_000, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(Through(lambda x: x + 100))
    check_products(take(x, model, batch_size=2, memory=80_000), x, model)


def test_precision_that_the_user_lowered_is_not_that_of_the_products():
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(Through(lambda x: x))
    with torch.autocast("cpu", torch.bfloat16):
        check_products(take(x, model), x, model)


def test_inputs_of_modules():
    found = take(layers="inputs:2")["inputs:2"]
    expected = capture(MODEL, X, "1", progress=False)["1"].flatten(1)
    torch.testing.assert_close(found, expected @ expected.T)


@pytest.mark.parametrize("memory", [EACH, "1 GB"])
def test_other_orders_are_refused(memory):
    loader = DataLoader(TensorDataset(X), 4, shuffle=True)
    with pytest.raises(ValueError, match="data gave another sample"):
        take(loader, memory=memory)

    class Later(list):
        readings = 0

        def __iter__(self):
            self.readings += 1
            return iter(range(N) if self.readings < 3 else [*range(8), *reversed(range(8, N))])

    loader = DataLoader(TensorDataset(X), 4, sampler=Later(range(N)))
    if memory == EACH:
        with pytest.raises(ValueError, match="data gave another sample 8 in a later pass"):
            take(loader, memory=memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": EACH - 1}, rf"memory is 671 B, but one sample of all 4 layers needs {EACH} bytes \(672 B\)"),
        ({"layers": "gates"}, r"layers must be outputs or inputs of modules, got 'gates:\*'"),
        ({"layers": "no"}, "'no' matches no layer"),
        ({"reduce": "sum"}, "reduce must be"),
        ({"memory": "much"}, "memory must be"),
        ({"data": X * 1e38}, "layer '0' gives NaN or infinite values|leave the range of torch.float32"),
        ({"data": X.double() * 1e20}, "layer '0': products of its outputs leave the range of torch.float32"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        take(**options)


def test_the_model_is_untouched():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    take(model=model, memory=N * 48 * 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_memory_grows_by_the_budget_and_the_result():
    n, width = 64, 2**18  # 1 MiB a sample and layer: 128 MiB in both
    x = torch.randn(n, 64, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(Through(lambda x: x.repeat(1, width // 64)), Through(torch.tanh))
    model[0](x[:4])
    with growth() as memory:
        grams = take(x, model, memory=24 * 2**20, batch_size=4)
    assert memory.peak < (24 + 3 * 8 + 32) * 2**20  # budget, what a batch of 8 MiB takes in the model, the rest
    y = model(x[:3]).double()
    torch.testing.assert_close(grams["1"][:3, :3].double(), y @ y.T, rtol=1e-5, atol=0)


def test_net_of_linear_layers_in_one_and_in_many_passes():
    net, x = Net(), torch.randn(N, 6, generator=torch.Generator().manual_seed(2))
    one, many = take(x, net), take(x, net, memory=200, batch_size=3)
    for name in one:
        torch.testing.assert_close(one[name], many[name])
