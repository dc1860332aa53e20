"""Five families of metrics by layer of one trained network: ``python -m figures.five_families`` (about four minutes).

ResNet-56 on CIFAR-10 test images where the shared data are present, else the demo network on digits. Writes
figures/five_families.png and the numbers beside it.
"""

import textwrap
from pathlib import Path

import matplotlib as mpl
import pandas as pd

import repgraph
from benchmarks import shared_data
from repgraph import plot
from repgraph.demo import digits, digits_resnet

LAYERS = ["relu", "layer?.?"]  # the stem behind its ReLU, and the blocks
METRICS = ("modularity", "gbs", "cka", "feature_entropy", "complexity", "spline")
COLUMNS = ("modularity", "gbs_previous", "feature_entropy", "complexity", "label_information", "local_complexity")


def table() -> tuple[str, pd.DataFrame]:
    if not shared_data.available():
        found = repgraph.profile(digits_resnet(), digits(), layers=LAYERS, n=200, metrics=METRICS, lam=0.04)
        return "Demo network, digits", found
    model, data = shared_data.cifar_network(56, "_jpeg"), shared_data.cifar_images(1000)
    found = repgraph.profile(model, data, layers=LAYERS, repeats=2, metrics=METRICS, lam=0.04, memory="6 GB")
    return "ResNet-56, CIFAR-10", found


def says(name: str, found: pd.DataFrame) -> str:
    """What the numbers say, from the numbers."""
    entropy, floor = (found[name].dropna() for name in ("feature_entropy", "feature_entropy_floor"))
    above = entropy - floor
    near = found["local_complexity"] / found["gates"]
    return (
        f"{name}: feature entropy stays within {above.abs().max():.2f} nats of noise on maps of its size; it falls by "
        f"{entropy.iloc[0] - entropy.iloc[-1]:.2f} nats over the layers, noise by {floor.iloc[0] - floor.iloc[-1]:.2f};"
        f" complexity goes from "
        f"{found['complexity'].iloc[0]:.1f} to {found['complexity'].iloc[-1]:.1f} of "
        f"{found['complexity_ceiling'].iloc[0]:.1f} bits and what of it tells the class from "
        f"{found['label_information'].iloc[0]:.2f} to {found['label_information'].iloc[-1]:.2f} of "
        f"{found['label_information_ceiling'].iloc[0]:.2f}; near a sample {near.iloc[0]:.1%} of the gates change sign "
        f"at the first layer and {near.iloc[-1]:.1%} at the last."
    )


def main() -> None:
    mpl.use("Agg")
    name, found = table()
    axes = plot.curves(found, columns=COLUMNS)
    figure = axes[0].figure
    a = found.attrs
    note = f"lam={a['lam']}, radius {a['radius']:.2g} around {a['around']} samples"
    axes[0].set_title(f"{axes[0].get_title(loc='left')}, {note}", loc="left", size=8, color="#444444")
    figure.supxlabel(textwrap.fill(says(name, found), 118), size=8.5, ha="left", x=0.02)
    place = Path(__file__).with_suffix("")
    figure.savefig(place.with_suffix(".png"), dpi=130)
    found.to_csv(place.with_suffix(".csv"), float_format="%.5f")
    print(says(name, found))
    print(f"wrote {place}.png and .csv")


if __name__ == "__main__":
    main()
