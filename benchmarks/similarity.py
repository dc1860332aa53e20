"""All layer pairs of a network, from its captured activations: ours against the bare Gram products and pytorch-cka.

    python -m benchmarks.similarity [--n 1000] [--repeats 3] [--slow]

The floor is X X' of each layer, once, in float32. pytorch-cka's `cka_from_features` gives unbiased CKA on the same
features and clamps it to [0, 1], so positive values are compared. Every further measure starts from prepared layers
(Gram matrices or graphs). --slow adds those that need n^3 per pair: SVCCA and Procrustes. Capture is excluded on all
sides. ResNet-56 on CIFAR-10 images where they are present, else the demo network on digits. Runs are interleaved and
medians printed, since other work on the machine moves single runs.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor

import repgraph
from benchmarks import shared_data
from benchmarks.rss import growth
from repgraph.demo import digits, digits_resnet
from repgraph.metrics.similarity import cknna, gbs, gram, linear_cka, mutual_knn, procrustes, rbf_cka, rsa, svcca


def bare(layers: Mapping[str, Tensor]) -> object:
    return [z @ z.T for z in layers.values()]


def peer(layers: Mapping[str, Tensor]) -> Tensor:
    from cka import cka_from_features

    features = list(layers.values())
    return cka_from_features(features, features)


def table(similarity: Callable[..., float], **options: object) -> Callable[[Mapping[str, object]], pd.DataFrame]:
    return lambda layers: repgraph.between_layers(similarity, layers, progress=False, **options)


def timed(f: Callable[[Mapping[str, object]], object], layers: Mapping[str, object]) -> tuple[float, object]:
    start = time.perf_counter()
    value = f(layers)
    return time.perf_counter() - start, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow", action="store_true", help="also SVCCA and Procrustes")
    args = parser.parse_args()
    real = shared_data.available()
    model = shared_data.cifar_network(56) if real else digits_resnet()
    x = (shared_data.cifar_images(args.n) if real else digits())[0][: args.n]
    acts = repgraph.capture(model, x, memory="16 GB", progress=False)
    layers = {name: acts[name].flatten(1) for name in acts}
    widths = [z.shape[1] for z in layers.values()]
    pairs = len(layers) * (len(layers) + 1) // 2
    print(
        f"{'ResNet-56, CIFAR-10' if real else 'demo network, digits'}: n = {len(x)}, {len(layers)} layers of "
        f"{min(widths)} to {max(widths)} features ({acts.nbytes / 1e6:.0f} MB), {pairs} pairs\n"
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    unbiased = table(linear_cka, unbiased=True)
    routes = {
        "bare Gram products": bare,
        "unbiased CKA": unbiased,
        "GBS, k = 5": table(gbs),
        "mutual kNN, k = 10": table(mutual_knn),
    }
    try:
        import cka  # noqa: F401

        routes["pytorch-cka"] = peer
    except ImportError:
        print("pytorch-cka is not installed: left out")
    times: dict[str, list[float]] = {name: [] for name in routes}
    values: dict[str, object] = {}
    for f in routes.values():  # warm up
        f(dict(list(layers.items())[:2]))
    for _ in range(args.repeats):
        for name, f in routes.items():
            seconds, values[name] = timed(f, layers)
            times[name].append(seconds)
    floor = statistics.median(times["bare Gram products"])
    print(f"\n{'from features':24s}    time   / products   peak growth")
    for name, f in routes.items():
        seconds = statistics.median(times[name])
        with growth() as memory:  # a run of its own: watching costs time
            f(layers)
        print(f"{name:24s} {seconds:6.2f} s {seconds / floor:9.2f}x {memory.peak / 1e6:10.0f} MB", flush=True)
    if "pytorch-cka" in routes:
        ratio = statistics.median(times["pytorch-cka"]) / statistics.median(times["unbiased CKA"])
        own = torch.tensor(values["unbiased CKA"].to_numpy()).clamp(0, 1)
        print(f"pytorch-cka / ours: {ratio:.2f}x; largest difference {(own - values['pytorch-cka']).abs().max():.1e}")
        few = dict(list(layers.items())[::9])
        exact = peer({name: z.double() for name, z in few.items()})
        own = torch.tensor(unbiased(few).to_numpy()).clamp(0, 1)
        print(
            f"against its float64 on {len(few)} layers: ours {(own - exact).abs().max():.1e}, "
            f"its float32 {(peer(few) - exact).abs().max():.1e}"
        )
    grams = {name: gram(z) for name, z in layers.items()}
    graphs = {name: repgraph.knn_graph(z, 5) for name, z in layers.items()}
    further = {
        "unbiased CKA": (unbiased, grams),
        "linear CKA": (table(linear_cka), grams),
        "Gaussian CKA": (table(rbf_cka), grams),
        "RSA": (table(rsa), grams),
        "CKNNA": (table(cknna), grams),
        "GBS": (table(gbs), graphs),
    }
    if args.slow:
        further |= {"SVCCA": (table(svcca), grams), "Procrustes": (table(procrustes), grams)}
    print(f"\n{'from prepared layers':24s}    time   / products")
    for name, (f, prepared) in further.items():
        seconds = statistics.median(timed(f, prepared)[0] for _ in range(1 if name in ("SVCCA", "Procrustes") else 3))
        print(f"{name:24s} {seconds:6.2f} s {seconds / floor:9.2f}x", flush=True)


if __name__ == "__main__":
    main()
