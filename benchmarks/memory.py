"""Peak memory of a profile under a budget of a tenth of the activations: ``python -m benchmarks.memory``.

ResNet-56 on 5 x 500 CIFAR-10 images where they are present, else the demo network on 5 x 200 digits. Each line is
measured in a process of its own, as growth of resident memory over the moment when model and data are loaded.
"""

import argparse
import json
import subprocess
import sys
import time

import pandas as pd
import torch

import repgraph
from benchmarks import shared_data
from benchmarks.rss import growth
from repgraph.demo import digits, digits_resnet


def work(kind: str) -> None:
    real = shared_data.available()
    model, n = (shared_data.cifar_network(56), 500) if real else (digits_resnet(), 200)
    x, y = shared_data.cifar_images(5 * n) if real else digits()
    with torch.no_grad():
        model(x[:2])  # libraries allocate on first use
    whole = 5 * n * sum(spec.nbytes for spec in repgraph.layer_names(model, data=x[:2]).specs.values())
    repgraph.knn_graph(x[:100])
    table: pd.DataFrame | None = None
    start = time.perf_counter()
    with growth() as memory:
        if kind == "pass without hooks":
            with torch.no_grad():
                for batch in x.split(64):
                    model(batch)
        else:
            budget = whole // 10 if kind == "budget of a tenth" else None
            table = repgraph.profile(model, (x, y), n=n, memory=budget, progress=False)
    seconds = time.perf_counter() - start
    values = None if table is None else table.to_json(double_precision=15)
    print(json.dumps({"peak": memory.peak, "seconds": seconds, "whole": whole, "table": values}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    found = {}
    for kind in ("pass without hooks", "everything in memory", "budget of a tenth"):
        command = [sys.executable, "-m", "benchmarks.memory", "--work", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind:22s} growth {found[kind]['peak'] / 1e6:7.0f} MB   {found[kind]['seconds']:6.1f} s", flush=True)
    whole, small = found["everything in memory"], found["budget of a tenth"]
    limit = whole["whole"] / 10 + found["pass without hooks"]["peak"] + 200e6
    print(f"activations {whole['whole'] / 1e6:.0f} MB; tables identical: {whole['table'] == small['table']}")
    print(f"limit: budget + pass without hooks + 200 MB = {limit / 1e6:.0f} MB; reached {small['peak'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
