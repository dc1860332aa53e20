"""All layer pairs of a network, from its captured activations.

    python -m benchmarks.similarity [--full]

The lower bound is X X' of each layer, once, in float32. pytorch-cka's `cka_from_features` gives unbiased CKA on the
same features and clamps it to [0, 1], so positive values are compared, with its float64 on every ninth layer.
"Prepared" starts from Gram matrices or graphs. SVCCA and Procrustes, which need n^3 per pair, take every ninth layer.
Capture is excluded on all sides. ResNet-56 on CIFAR-10 images where they are present, else the demo network on digits.
"""

from collections.abc import Callable, Iterator, Mapping

import pandas as pd
import torch
from torch import Tensor

import repgraph
from benchmarks import shared_data
from benchmarks.rows import Row, Target, main, measure, peer
from repgraph.metrics.similarity import cknna, gbs, gram, linear_cka, mutual_knn, procrustes, rbf_cka, rsa, svcca

SMALL, FULL = 300, 1000


def bare(layers: Mapping[str, Tensor]) -> None:
    for z in layers.values():
        z @ z.T


def pytorch_cka(layers: Mapping[str, Tensor]) -> Tensor:
    from cka import cka_from_features

    features = list(layers.values())
    return cka_from_features(features, features)


def table(similarity: Callable[..., float], layers: Mapping[str, object], **options: object) -> pd.DataFrame:
    return repgraph.between_layers(similarity, layers, progress=False, **options)


def rows(full: bool) -> Iterator[Row]:
    promised = full and shared_data.available()
    name, model, x, _ = shared_data.network(FULL if full else SMALL)
    acts = repgraph.capture(model, x, memory="12 GB", progress=False)
    layers = {layer: acts[layer].flatten(1) for layer in acts}
    few = dict(list(layers.items())[::9])
    pairs = f"{name}, n = {len(x):,}, {len(layers)} layers, {len(layers) * (len(layers) + 1) // 2} pairs"
    peers = {"pytorch-cka": peer("cka", lambda: pytorch_cka(layers))}
    exact = None if isinstance(peers["pytorch-cka"], str) else pytorch_cka({at: z.double() for at, z in few.items()})

    def off(found: pd.DataFrame, _: object) -> float:
        return float((torch.tensor(found.loc[list(few), list(few)].to_numpy()).clamp(0, 1) - exact).abs().max())

    table(linear_cka, few, unbiased=True)
    table(gbs, few)  # libraries allocate on first use
    floor = ("X X'", lambda: bare(layers))
    yield measure(
        "unbiased CKA",
        pairs,
        lambda: table(linear_cka, layers, unbiased=True),
        peers=peers,
        floor=floor,
        difference=None if exact is None else off,
        target=Target(floor=1.0, peer=0.5, difference=1e-8) if promised else Target(difference=1e-8),
    )
    if exact is not None:
        own = float((pytorch_cka(few) - exact).abs().max())
        yield Row(work="pytorch-cka in float32 against its float64", sizes=f"{len(few)} layers", difference=own)
    bound = Target(floor=1.0 if promised else None)
    yield measure("GBS, k = 5", pairs, lambda: table(gbs, layers), floor=floor, target=bound)
    yield measure("mutual kNN, k = 10", pairs, lambda: table(mutual_knn, layers), floor=floor)
    grams = {at: gram(z) for at, z in layers.items()}
    graphs = {at: repgraph.knn_graph(z, 5) for at, z in layers.items()}
    for title, f, options in (
        ("unbiased CKA", linear_cka, {"unbiased": True}),
        ("linear CKA", linear_cka, {}),
        ("Gaussian CKA", rbf_cka, {}),
        ("RSA", rsa, {}),
        ("CKNNA", cknna, {}),
    ):
        yield measure(f"{title}, prepared", pairs, lambda f=f, options=options: table(f, grams, **options))
    yield measure("GBS, prepared", pairs, lambda: table(gbs, graphs))
    for title, f in (("SVCCA", svcca), ("Procrustes", procrustes)):
        some = {at: grams[at] for at in few}
        yield measure(f"{title}, prepared", f"{len(few)} layers", lambda f=f, some=some: table(f, some))


if __name__ == "__main__":
    main(rows)
