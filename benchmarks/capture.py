"""Cost of capture over a plain forward pass.

    python -m benchmarks.capture [--full]

All blocks of ResNet-56 on CIFAR-10 images where they are present, else of the demo network on digits. The bound is a
plain forward pass in eval mode over the same batches; for `stream_grams`, whose products cost as much as the pass,
the peer is such a pass that keeps the outputs by hooks, and bare products of them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import repgraph
from benchmarks import shared_data
from benchmarks.rows import Row, Target, main, measure

RUNS = 7


def plain(model: nn.Module, x: Tensor, batch_size: int) -> None:
    with torch.no_grad():
        for batch in x.split(batch_size):
            model(batch)


def plain_grams(model: nn.Module, x: Tensor, batch_size: int) -> None:
    kept: dict[str, list[Tensor]] = {name: [] for name in repgraph.layer_names(model)}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: kept[name].append(out.flatten(1)))
        for name in kept
    ]
    plain(model, x, batch_size)
    for handle in handles:
        handle.remove()
    for parts in kept.values():
        features = torch.cat(parts)
        parts.clear()
        features @ features.T


def rows(full: bool) -> Iterator[Row]:
    for n, batch_size in ((512, 64), (512, 256)) if full else ((256, 64),):
        name, model, x, _ = shared_data.network(n)
        options = {"batch_size": batch_size, "progress": False}
        sizes = f"{name}, n = {len(x):,}, batches of {batch_size}"
        forward = ("a plain pass", lambda x=x, size=batch_size, model=model: plain(model, x, size))
        forward[1]()
        work = {
            "capture(reduce='mean')": lambda o=options, x=x, m=model: repgraph.capture(m, x, reduce="mean", **o),
            "stream of means": lambda o=options, x=x, m=model: repgraph.stream(m, x, lambda y: y.mean((2, 3)), **o),
        }
        for what, ours in work.items():
            target = Target(floor=1.05) if full else Target()
            yield measure(what, sizes, ours, floor=forward, target=target, runs=RUNS)
        yield measure(
            "stream_grams",
            sizes,
            lambda o=options, x=x, m=model: repgraph.stream_grams(m, x, memory="8 GB", **o),
            peers={"hooks and products": lambda x=x, size=batch_size, m=model: plain_grams(m, x, size)},
            floor=forward,
            target=Target(peer=1.05) if full else Target(),
        )


if __name__ == "__main__":
    main(rows)
