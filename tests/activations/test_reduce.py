"""Means and single tokens, against loops; the channel axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import swin_t

from repgraph import capture


class Tokens(nn.Module):
    """Embeds token ids; the mask does not move its output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.out(self.embed(input_ids))


def take(model, data, layers="leaves", **options):
    return capture(model, data, layers, progress=False, **options)


def loop(x, mask, how):
    """Reduction of tokens (n, T, d) one sample at a time."""
    rows = []
    for tokens, shown in zip(x, mask, strict=True):
        kept = torch.stack([token for token, s in zip(tokens, shown, strict=True) if s])
        rows.append({"mean": kept.mean(0), "cls": kept[0], "last": kept[-1]}[how])
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    side=st.sampled_from(["left", "right"]),
    how=st.sampled_from(["mean", "cls", "last"]),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([torch.int64, torch.bool, torch.float32]),
)
def test_masked_tokens_do_not_count_on_either_side(lengths, side, how, seed, dtype):
    torch.manual_seed(seed)
    model, ids = Tokens(), torch.randint(0, 30, (len(lengths), 6))
    place, lengths = torch.arange(6), torch.tensor(lengths)[:, None]
    mask = place < lengths if side == "right" else place >= 6 - lengths
    acts = take(model, {"input_ids": ids, "attention_mask": mask.to(dtype)}, reduce=how, batch_size=3)
    for name, expected in (("embed", model.embed(ids)), ("out", model(ids))):
        torch.testing.assert_close(acts[name], loop(expected.detach(), mask, how))


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_tokens_without_a_mask(how):
    model, ids = Tokens(), torch.randint(0, 30, (5, 6))
    acts = take(model, ids, reduce=how, batch_size=2)
    torch.testing.assert_close(acts["out"], loop(model(ids).detach(), torch.ones(5, 6), how))


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_batches_of_different_length(how):
    model, ids = Tokens(), torch.randint(0, 30, (5, 6))
    mask = torch.arange(6) < torch.tensor([2, 3, 1, 6, 5])[:, None]
    data = [
        {"input_ids": ids[:3, :3], "attention_mask": mask[:3, :3]},
        {"input_ids": ids[3:], "attention_mask": mask[3:]},
    ]
    torch.testing.assert_close(take(model, data, "out", reduce=how)["out"], loop(model(ids).detach(), mask, how))


def test_mask_of_another_length_than_the_tokens_is_refused():
    class Halved(Tokens):
        def forward(self, input_ids, attention_mask):
            return self.out(self.embed(input_ids)[:, ::2])

    data = {"input_ids": torch.zeros(3, 6, dtype=torch.long), "attention_mask": torch.ones(3, 6)}
    with pytest.raises(ValueError, match=r"layer 'out': attention_mask has shape \(3, 6\), expected \(3, 3\)"):
        take(Halved(), data, reduce="mean")


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_plain_features_stay_as_they_are(how):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    assert torch.equal(take(model, x, reduce=how)["0"], take(model, x)["0"])


def test_images_are_channels_first():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Sequential(nn.GELU()))
    x = torch.randn(5, 3, 10, 10)
    plain, mean = take(model, x, "*"), take(model, x, "*", reduce="mean")
    for name in plain:
        torch.testing.assert_close(mean[name], torch.stack([image.flatten(1).mean(1) for image in plain[name]]))


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv1d, (5, 3, 9)), (nn.Conv3d, (5, 3, 4, 4, 4))])
def test_signals_and_volumes_are_channels_first(conv, shape):
    model, x = (
        nn.Sequential(conv(3, 4, 3), nn.BatchNorm1d(4) if conv is nn.Conv1d else nn.BatchNorm3d(4)),
        torch.randn(shape),
    )
    plain, mean = take(model, x), take(model, x, reduce="mean")
    for name in plain:
        torch.testing.assert_close(mean[name], plain[name].flatten(2).mean(2))


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return swin_t(num_classes=2), torch.randn(3, 3, 32, 32)


@pytest.fixture(scope="module")
def plain_swin(swin):
    return take(*swin, SWIN)


SWIN = ["features.0.0", "features.1.0", "features.2", "features.3.1"]  # stem conv, block, merging, block


def test_channels_last_is_refused_unless_said(swin):
    with pytest.raises(
        ValueError, match=r"layer 'features.1.0': cannot tell the channels.*\(3, 8, 8, 96\).*channel_axis="
    ):
        take(*swin, SWIN, reduce="mean")


@pytest.mark.parametrize(
    "axis",
    [-1, 3, {"features.*": -1}, {"features.1.0": -1, "features.[23]*": 3}, {"*": -1}],
    ids=["-1", "3", "wildcard", "names", "all"],
)
def test_channels_last_when_said_and_the_stem_conv_first(swin, plain_swin, axis):
    plain, mean = plain_swin, take(*swin, SWIN, reduce="mean", channel_axis=axis)
    torch.testing.assert_close(mean["features.0.0"], plain["features.0.0"].mean((2, 3)))
    for name in SWIN[1:]:
        torch.testing.assert_close(mean[name], plain[name].mean((1, 2)))


def test_first_pattern_that_fits_gives_the_channel_axis():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Tanh())
    x = torch.randn(2, 3, 8, 8)
    plain, mean = take(model, x), take(model, x, reduce="mean", channel_axis={"2": 2})
    torch.testing.assert_close(mean["1"], plain["1"].mean((2, 3)))
    torch.testing.assert_close(mean["2"], plain["2"].mean((1, 3)))


@pytest.mark.parametrize("axis", [0, 4, -4, -5])
def test_channel_axis_out_of_range_is_refused(axis):
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match=rf"layer '0': channel_axis must be an axis of \(2, 3, 8, 8\).*got {axis}"):
        take(model, torch.randn(2, 3, 8, 8), reduce="mean", channel_axis=axis)


class Both(nn.Module):
    """A conv and a linear layer of the same width: its output could be either way round."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.conv(x))


def test_square_output_that_could_be_either_way_is_refused():
    with pytest.raises(ValueError, match="layer '0': cannot tell the channels"):
        take(nn.Sequential(Both()), torch.randn(2, 4, 4, 4), "0", reduce="mean")


@pytest.mark.parametrize("how", ["cls", "last"])
def test_token_of_an_image_is_refused(how):
    with pytest.raises(ValueError, match=rf"layer '0': reduce='{how}' needs tokens \(n, T, d\)"):
        take(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8), reduce=how)


def test_function_of_the_users_own():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(5, 3, 8, 8)
    plain, peak = take(model, x), take(model, x, reduce=lambda maps: maps.amax((2, 3)), batch_size=2)
    torch.testing.assert_close(peak["1"], plain["1"].amax((2, 3)))
    assert peak.specs["1"].shape == (4,)


def test_view_returned_by_a_function_is_safe_from_later_in_place_operations():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), torch.randn(5, 3, 8, 8)
    assert torch.equal(take(model, x, "0", reduce=lambda maps: maps[:, 0])["0"], take(model, x, "0")["0"][:, 0])


@pytest.mark.parametrize(
    ("f", "got"),
    [(lambda x: x[:1], r"\(1, 3\)"), (lambda x: x.mean(), r"\(\)"), (lambda x: [1.0] * len(x), "list")],
)
def test_function_with_other_rows_is_refused(f, got):
    with pytest.raises(
        ValueError, match=f"layer '0': reduce must return one row per sample, expected 5 rows, got {got}"
    ):
        take(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), reduce=f)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mean_of_half_precision_is_taken_in_float32(dtype):
    x = 1000 + torch.randn(4, 3, 20, 20).to(dtype)  # in float16 the sum would overflow
    acts = take(nn.Sequential(nn.Identity()), x, reduce="mean")
    assert acts["0"].dtype == torch.float32
    torch.testing.assert_close(acts["0"], x.float().mean((2, 3)))
    tokens, mask = x[:, 0], torch.ones(4, 20)
    masked = take(
        nn.Sequential(nn.Identity()),
        {"x": tokens, "attention_mask": mask},
        reduce="mean",
        forward=lambda model, batch: model(batch["x"]),
    )
    torch.testing.assert_close(masked["0"], tokens.float().mean(1))


def test_single_token_keeps_its_type():
    assert take(nn.Sequential(nn.Identity()), torch.randn(4, 5, 3).half(), reduce="cls")["0"].dtype == torch.float16


def test_mean_of_integers_is_float32():
    acts = take(nn.Sequential(nn.Identity()), torch.arange(24).reshape(2, 4, 3), reduce="mean")
    assert torch.equal(acts["0"], torch.tensor([[4.5, 5.5, 6.5], [16.5, 17.5, 18.5]]))
