"""Models side by side: what each costs and how well it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from torch import Tensor, nn

from repgraph.activations.batches import Source, read_batches
from repgraph.cost import latency, model_cost
from repgraph.prune.classifier import evaluate_classifier

if TYPE_CHECKING:
    from repgraph.labels import Labels


def compare_models(
    models: Mapping[str, nn.Module],
    data: object,
    *,
    labels: Labels | None = None,
    samples: int | Sequence[int] | Tensor | None = None,
    batch_size: int = 128,
    seconds: float = 0.5,
) -> pd.DataFrame:
    """What every model costs and, where the data have labels, how well it classifies them: one row per model.

    Parameters
    ----------
    models
        Name -> model, for example before and after a cut.
    data, labels, samples, batch_size
        As in `evaluate_classifier`.
    seconds
        Time spent on measuring the latency of each model.

    Returns
    -------
    DataFrame
        Columns: accuracy and cross_entropy (with labels); macs, parameters (`model_cost`, for one sample) and
        milliseconds (median latency of the first batch) and batch (its samples). The number of samples is in `attrs`.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> from repgraph.prune import drop_layers
    >>> model, (x, y) = digits_resnet(), digits()
    >>> cut = drop_layers(model, "layer1.3", x[:2]).model
    >>> table = compare_models({"whole": model, "cut": cut}, (x, y), seconds=0.05)
    >>> table.columns.tolist(), bool(table.loc["cut", "macs"] < table.loc["whole", "macs"])
    (['accuracy', 'cross_entropy', 'macs', 'parameters', 'milliseconds', 'batch'], True)
    """
    if not models:
        raise ValueError("models is empty: name at least one")
    if isinstance(data, Iterator):
        data = read_batches(data, None)[0]
    source = Source(data, batch_size, samples)
    one = next(iter(Source(data, batch_size, source.positions[:1]))).inputs
    first = next(iter(source))
    rows: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        row: dict[str, float] = {}
        if labels is not None or first.labels is not None:
            found = evaluate_classifier(model, data, labels=labels, samples=source.positions, batch_size=batch_size)
            row = {"accuracy": found["accuracy"], "cross_entropy": found["cross_entropy"]}
        cost = model_cost(model, one)
        time = 1e3 * latency(model, first.inputs, seconds=seconds).median
        rows[name] = {**row, "macs": cost.macs, "parameters": cost.parameters, "milliseconds": time}
        rows[name]["batch"] = first.size
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    table = table.astype({"macs": int, "parameters": int, "batch": int})
    table.attrs = {"samples": source.n}
    return table
