"""Slots of padded shortcuts, masks and their undoing, heads, groups by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from repgraph.surgery.coupling import attentions, channel_groups, cut_channels, mask_channels
from repgraph.surgery.slots import Slots, with_slots, without_slots

pytestmark = pytest.mark.usefixtures("one_thread")


def image(side):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


class Pad(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class Mixes(nn.Module):
    def forward(self, x):
        return torch.cat((x, x.mean(1, keepdim=True)), 1)


class PlusOne(nn.Module):
    def forward(self, x):
        return F.pad(x + 1, (0, 0, 0, 0, 1, 1))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 4), (4, 0), (1, 3)])
def test_slots_know_where_a_padding_puts_each_channel(before, after):
    model = with_slots(nn.Sequential(nn.Conv2d(3, 4, 1), Pad(before, after)), image(8))
    slots = model[1]
    assert isinstance(slots, Slots)
    assert slots.places == [before, before + 1, before + 2, before + 3]
    assert (slots.width, slots.total, slots.whole) == (4, 8, True)


@pytest.mark.parametrize("module", [Mixes(), PlusOne(), nn.Identity(), nn.ZeroPad2d(1), nn.PixelUnshuffle(2)])
def test_no_slots_around_what_does_more_than_pad(module):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), module)
    assert not any(isinstance(m, Slots) for m in with_slots(model, image(8)).modules())


def test_slots_give_what_the_module_gives_on_zeros():
    torch.manual_seed(0)
    slots, x = Slots(Pad(1, 3), torch.arange(1, 5), 8), torch.randn(2, 4, 6, 6)
    cut_channels(
        slots_in := nn.Sequential(slots), {("0", "in"): torch.tensor([1, 3]), ("0", "out"): torch.tensor([0, 4])}
    )
    masked = x.clone()
    masked[:, [1, 3]] = 0
    assert torch.equal(slots_in(x[:, [0, 2]]), Pad(1, 3)(masked)[:, [1, 2, 3, 5, 6, 7]])
    assert not slots.whole
    assert list(slots.state_dict()) == []


def test_slots_that_lost_nothing_give_the_module_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Pad(2, 2))
    slotted = with_slots(model, image(8))
    assert isinstance(model[1], Pad)
    assert isinstance(without_slots(slotted)[1], Pad)


def test_a_channel_goes_with_its_place_behind_the_padding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.pad, self.b = nn.Conv2d(3, 4, 1), Pad(2, 2), nn.Conv2d(4, 8, 1, 2)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.head((self.pad(x) + self.b(x)).mean((2, 3)))

    groups = channel_groups(with_slots(Net(), image(8)), image(8))
    units = {}
    for group in groups:
        for name in group.layers:
            channels, unit = group.places[name, "out"]
            for c, u in zip(channels.tolist(), unit.tolist(), strict=True):
                units.setdefault((group.layers, u), []).append((name, c))
    together = {frozenset(own) for own in units.values()}
    assert {frozenset({("a", i), ("b", i + 2)}) for i in range(4)} <= together
    assert {frozenset({("b", i)}) for i in (0, 1, 6, 7)} <= together


@pytest.mark.parametrize("transposed", [False, True])
def test_masks_by_hand_and_undone(transposed):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 4, 2) if transposed else nn.Conv2d(3, 4, 2)
    model = nn.Sequential(layer, nn.BatchNorm2d(4)).eval()
    for value in model[1].state_dict().values():
        if value.ndim:
            value.uniform_(0.5, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gone = torch.tensor([1, 3])
    undo = mask_channels(model, {("0", "out"): gone, ("1", "out"): gone})
    weight = layer.weight.transpose(0, 1) if transposed else layer.weight
    for tensor in (weight, layer.bias, model[1].weight, model[1].bias, model[1].running_mean):
        assert [bool(row.any()) for row in tensor] == [True, False, True, False]
    assert torch.equal(model[1].running_var, before["1.running_var"])
    assert not model(image(4))[:, gone].any()
    undo()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_cut_layers_keep_flags_and_other_columns():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    old = [p.clone() for p in model.parameters()]
    cut_channels(model, {("0", "out"): torch.tensor([0, 5]), ("1", "in"): torch.tensor([0, 5])})
    kept = [1, 2, 3, 4]
    for new, expected in zip(model.parameters(), [old[0][kept], old[1][kept], old[2][:, kept], old[3]], strict=True):
        assert torch.equal(new, expected)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert (model[0].out_features, model[1].in_features) == (4, 4)


def test_heads_by_their_attribute():
    class Heads(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.q, self.k, self.v, self.small = *(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 5)
            self.num_heads = heads

    assert list(attentions(nn.ModuleList([Heads(4)]))) == [("0", "num_heads", 4, ["0.q", "0.k", "0.v"])]
    assert list(attentions(Heads(1))) == []


def test_what_cannot_be_traced_is_said():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            raise RuntimeError("no")

    with pytest.raises(ValueError, match="Torch-Pruning cannot trace Odd: RuntimeError: no"):
        channel_groups(Odd(), image(8))
