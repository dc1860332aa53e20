"""A memory budget changes where the layers are made, never what they are."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from repgraph import capture, profile

N = 23
X = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 2


class Unit(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(before, after, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.conv(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [Unit(3, 4), Unit(4, 5), nn.Flatten(), nn.Linear(80, 10), nn.Linear(10, 2)]
    return nn.Sequential(*layers).train()


def take(model, data, **options):
    return capture(model, data, "leaves", batch_size=5, progress=False, **options)


def sizes(acts):
    return {name: x.numel() * x.element_size() for name, x in acts.items()}


def same(a, b):
    """Bit for bit: layers, labels, ids, hashes."""
    return (
        list(a) == list(b)
        and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
        and torch.equal(a.labels, b.labels)
        and a.sample_ids.tolist() == b.sample_ids.tolist()
        and torch.equal(a.input_hashes, b.input_hashes)
    )


def test_several_passes_give_the_same_bit_for_bit(model):
    whole = take(model, (X, Y))
    largest = max(sizes(whole).values())
    passes = set()
    for budget in (largest, largest + 1, 2 * largest, whole.nbytes - 1, whole.nbytes):
        acts = take(model, (X, Y), memory=budget)
        passes.add(repr(acts).splitlines()[0].split(", ")[-1])
        assert same(acts, whole)
        assert same(acts, whole)  # read again
    assert len(passes) == 3  # five passes, two, one


def test_layers_read_in_any_order_and_kept_by_the_reader(model):
    whole = take(model, (X, Y))
    acts = take(model, (X, Y), memory=max(sizes(whole).values()))
    held = {name: acts[name] for name in reversed(list(acts))}
    assert all(torch.equal(held[name], whole[name]) for name in whole)


def test_later_calls_of_a_module_survive_several_passes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(self.b(self.a(x))))

    torch.manual_seed(0)
    model, data = Twice(), (X[:, 0, 0, :4], Y)
    acts = take(model, data, memory=N * 16)
    assert "4 passes" in repr(acts)
    assert list(acts) == ["a", "b", "a#1", "b#1"]
    assert same(acts, take(model, data))


@pytest.mark.parametrize("reduce", ["mean", None])
def test_a_tenth_of_the_memory_gives_the_identical_table(model, reduce):
    settings = {"layers": "leaves", "n": 11, "repeats": 2, "reduce": reduce, "batch_size": 5, "progress": False}
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(12)))
    data = (torch.randn(22, 10), Y[:22])
    whole = profile(model, data, **settings)
    assert whole.equals(profile(model, data, memory=22 * 12 * 40 // 10, **settings))


def test_too_small_a_budget_names_the_least_that_will_do(model):
    least = max(sizes(take(model, (X, Y))).values())
    for budget in (1, least - 1):
        with pytest.raises(ValueError, match=rf"layer '0.conv' alone needs {least} bytes .*for {N} samples.*folder="):
            take(model, (X, Y), memory=budget)
    assert same(take(model, (X, Y), memory=least), take(model, (X, Y)))


def test_only_the_wanted_samples_count(model):
    least = max(sizes(take(model, (X, Y), samples=4)).values())
    assert take(model, (X, Y), samples=4, memory=least).n == 4


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("13248", 13248),
        ("13248 B", 13248),
        ("13.25 kB", 13250),
        ("14kb", 14000),
        ("13 KiB", 13312),
        ("0.02MB", 20000),
        ("1MiB", 2**20),
        ("2 GB", 2 * 10**9),
        (" 1 TiB ", 2**40),
    ],
)
def test_budget_as_text(model, text, number):
    assert repr(take(model, (X, Y), memory=text)) == repr(take(model, (X, Y), memory=number))


def test_budget_as_text_that_does_not_suffice(model):
    with pytest.raises(ValueError, match=r"memory is 1.02 kB, but layer '0.conv' alone needs"):
        take(model, (X, Y), memory="1 KiB")


@pytest.mark.parametrize("memory", ["much", "", "2 GB RAM", "-1", "1e9", "1.5.2 GB", ".", "GB"])
def test_text_that_is_no_budget_is_refused(model, memory):
    with pytest.raises(ValueError, match="memory must be a number of bytes or text like '2 GB'"):
        take(model, (X, Y), memory=memory)


@pytest.mark.parametrize("memory", [0, -5, True])
def test_number_that_is_no_budget_is_refused(model, memory):
    with pytest.raises(ValueError, match="memory must be a positive number of bytes"):
        take(model, (X, Y), memory=memory)


def several(model, data, **options):
    return take(model, data, memory="14 kB", **options)


def test_one_shot_generator_works_with_several_passes(model):
    batches = [(X[i : i + 5], Y[i : i + 5]) for i in range(0, N, 5)]
    acts = several(model, (batch for batch in batches))
    assert "passes" in repr(acts)
    assert same(acts, take(model, (X, Y)))


def test_loader_works_with_several_passes(model):
    assert same(several(model, DataLoader(TensorDataset(X, Y), 5)), take(model, (X, Y)))


def test_shuffling_loader_is_refused_at_capture(model):
    loader = DataLoader(TensorDataset(X, Y), 5, shuffle=True)
    with pytest.raises(ValueError, match=r"data gave another sample \d+ in a later pass.*loader that does not shuffle"):
        several(model, loader)


def test_shuffling_loader_with_a_generator_of_its_own_is_refused_at_capture(model):
    loader = DataLoader(TensorDataset(X, Y), 5, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="data gave another sample"):
        several(model, loader)


def test_shuffling_loader_is_fine_in_one_pass(model):
    acts = take(model, DataLoader(TensorDataset(X, torch.arange(N)), 5, shuffle=True))
    assert sorted(acts.labels.tolist()) == list(range(N))
    torch.testing.assert_close(acts["4"], take(model, X)["4"][acts.labels])


class Augmented(Dataset):
    """Images with noise on some of them, drawn anew at every reading."""

    def __init__(self, noisy):
        self.noisy = noisy

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i] + (0.01 * torch.randn(3, 8, 8) if i in self.noisy else 0), Y[i]


def test_random_augmentation_is_refused(model):
    with pytest.raises(ValueError, match=r"data gave another sample 0 in a later pass.*random augmentation"):
        several(model, Augmented(range(N)))


def test_random_augmentation_of_later_samples_is_refused_when_read(model):
    acts = several(model, Augmented([17]))
    last = list(acts)[-1]
    for _ in range(2):
        with pytest.raises(ValueError, match="data gave another sample 17 in a later pass"):
            acts[last]


class OtherOrderLater(list):
    """A sampler whose second and later readings differ from the first behind the first batch."""

    readings = 0

    def __iter__(self):
        self.readings += 1
        return iter([*range(5), *(range(5, N) if self.readings == 1 else reversed(range(5, N)))])


def test_order_that_changes_behind_the_first_batch_is_refused_when_read(model):
    acts = several(model, DataLoader(TensorDataset(X, Y), 5, sampler=OtherOrderLater(range(N))))
    with pytest.raises(ValueError, match="data gave another sample 5 in a later pass"):
        acts[list(acts)[-1]]


@pytest.mark.parametrize("kind", ["texts", "second input"])
def test_other_order_of_what_only_forward_reads_is_refused(kind):
    class Two(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return ("word" * i if kind == "texts" else torch.zeros(1)), torch.full((1,), float(i)), i

    def forward(model, batch):
        return model(torch.tensor([[float(len(word))] for word in batch[0]]) if kind == "texts" else batch[1])

    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4))
    loader = DataLoader(Two(), 5, sampler=OtherOrderLater(range(N)))
    with pytest.raises(ValueError, match="data gave another sample 5 in a later pass"):
        take(model, loader, forward=forward, memory=N * 16)["1"]


@pytest.mark.parametrize("part", ["weight", "bias", "running_mean"])
def test_model_that_changed_since_capture_is_refused_when_read(part):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    acts = take(model, (X, Y), memory=N * 144 * 4)
    before, last = acts["2"].clone(), list(acts)[-1]
    tensor = getattr(model[1], part)
    old = tensor.detach().clone()
    with torch.no_grad():
        tensor[2] += 1
    acts["2"]  # still held
    with pytest.raises(ValueError, match="model has changed since capture"):
        acts["0"]
    with torch.no_grad():
        tensor.copy_(old)
    acts["0"]
    assert torch.equal(acts[last], before)


def test_mode_of_the_model_may_change_in_between():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3)).eval()
    whole, acts = take(model, (X, Y)), take(model, (X, Y), memory=N * 144 * 4)
    model.train()
    assert same(acts, whole)
    assert model[1].training


def test_labels_and_ids_given_for_several_passes(model):
    ids = [f"image {i}" for i in range(N)]
    acts = several(model, X, labels=Y, sample_ids=ids)
    assert torch.equal(acts.labels, Y)
    assert acts.sample_ids.tolist() == ids
    assert torch.equal(acts[list(acts)[-1]], take(model, X)["4"])


def test_several_passes_over_given_ids_still_compare_the_inputs(model):
    with pytest.raises(ValueError, match="data gave another sample"):
        several(model, Augmented(range(N)), sample_ids=range(N))


def test_subset_of_several_passes(model):
    acts, whole = several(model, (X, Y)), take(model, (X, Y))
    part = acts.subset([3, 20, 7], ["0.relu", "4"])
    assert list(part) == ["0.relu", "4"]
    assert all(torch.equal(part[name], whole[name][[3, 20, 7]]) for name in part)
    assert part.labels.tolist() == [1, 0, 1]
