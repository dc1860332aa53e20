"""Networks whose products are counted by hand, and other counts of them."""

import pytest
import torch
from small_networks import Through
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repgraph.cost import model_cost

transformers = pytest.importorskip("transformers")

COLUMNS = ["calls", "macs", "parameters", "activation_bytes"]


class Block(nn.Module):
    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Sequential()
        if before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.short(x)).relu()


class Toy(nn.Module):
    """The residual network of check 5 in the notes on filter surgery."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b1, self.b2 = Block(8, 8), Block(8, 16, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc(self.b2(self.b1(x)).mean((2, 3)))


def images(n=1, side=16):
    return random(n, 3, side, side)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


def macs(f, x):
    return model_cost(Through(f), x).macs


def counted_by_torch(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops()


class SelfAttention(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(12, 3, batch_first=True), weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


def bert(implementation):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attn_implementation=implementation,
    )  # fmt: skip
    b, t, d = 3, 7, 16
    return transformers.BertModel(config), 2 * b * (4 * t * d * d + 2 * t * t * d + 2 * t * d * 32) + b * d * d


def llama(implementation):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, attn_implementation=implementation,
    )  # fmt: skip
    b, t, d = 3, 7, 16
    layer = t * d * (d + 8 + 8 + d) + 2 * t * t * d + 3 * t * d * 24
    return transformers.LlamaModel(config), 2 * b * layer


def tokens():
    ids = torch.arange(21).reshape(3, 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids))) * self.scale[0]
