"""Cost of capture over a plain forward pass: ``python -m benchmarks.capture [--full]``.

ResNet-56 on CIFAR-10 images where they are present, else the demo network on digits; all blocks. Ours are runs of
`capture(reduce="mean")`, `stream` of means and of the batches' Gram matrices, and `stream_grams`; the peer is a plain
forward pass in eval mode over the same batches, for `stream_grams` with the bare products of features kept by hooks.
The runs take turns; medians of processor seconds, which other work on the machine disturbs less, and of the ratios of
each turn. Growth is that of resident memory over the start of a run.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import repgraph
from benchmarks import shared_data
from benchmarks.rss import growth
from repgraph.demo import digits, digits_resnet
from repgraph.metrics.similarity.minibatch import BatchGram

REPEATS = 5


def network(n: int) -> tuple[str, nn.Module, Tensor]:
    if shared_data.available():
        return "ResNet-56", shared_data.cifar_network(56), shared_data.cifar_images(n)[0]
    x = digits()[0]
    return "demo", digits_resnet().eval(), x.repeat(-(-n // len(x)), 1, 1, 1)[:n]


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


def works(model: nn.Module, x: Tensor, batch_size: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What is measured: ours and its peer."""
    options = {"batch_size": batch_size, "progress": False}

    def forward() -> None:
        plain(model, x, batch_size)

    return {
        "capture(reduce='mean')": (lambda: repgraph.capture(model, x, reduce="mean", **options), forward),
        "stream of means": (lambda: repgraph.stream(model, x, lambda y: y.mean((2, 3)), **options), forward),
        "stream of batch Grams": (lambda: repgraph.stream(model, x, BatchGram(batch_size), **options), forward),
        "stream_grams": (
            lambda: repgraph.stream_grams(model, x, memory="8 GB", **options),
            lambda: plain_grams(model, x, batch_size),
        ),
    }


def timed(f: Callable[[], object]) -> tuple[float, int]:
    with growth(0.02) as memory:
        start = time.process_time()
        f()
        seconds = time.process_time() - start
    return seconds, memory.peak


def rows(full: bool) -> Iterator[dict[str, object]]:
    """One line for each work, number of samples and batch size; `full` takes more samples."""
    for n in (512, 2048) if full else (256,):
        for batch_size in (64, 256):
            kind, model, x = network(n)
            for work, (ours, peer) in works(model, x, batch_size).items():
                peer()
                turns = [(timed(ours), timed(peer)) for _ in range(REPEATS)]
                yield {
                    "work": work,
                    "network": kind,
                    "size": n,
                    "batch_size": batch_size,
                    "ours": statistics.median(own[0] for own, _ in turns),
                    "peer": statistics.median(other[0] for _, other in turns),
                    "ratio": statistics.median(own[0] / other[0] for own, other in turns),
                    "ours_growth": max(own[1] for own, _ in turns),
                    "peer_growth": max(other[1] for _, other in turns),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="512 and 2048 samples instead of 256")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, repgraph {repgraph.__version__}")
    print(
        f"{'work':24}{'network':>10}{'n':>6}{'batch':>6}{'ours s':>9}{'peer s':>9}{'ratio':>7}{'growth':>9}{'peer':>9}"
    )
    for row in rows(args.full):
        growths = (row["ours_growth"], row["peer_growth"])
        print(
            f"{row['work']:24}{row['network']:>10}{row['size']:6}{row['batch_size']:6}{row['ours']:9.2f}"
            f"{row['peer']:9.2f}{row['ratio']:7.3f}" + "".join(f"{size / 2**20:6.0f} MB" for size in growths),
            flush=True,
        )


if __name__ == "__main__":
    main()
