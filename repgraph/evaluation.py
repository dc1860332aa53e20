"""How well a classifier does on labelled data, and models side by side: what each costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repgraph.activations.batches import Batch, Source, read_batches
from repgraph.activations.forward import kept_random_state, run
from repgraph.activations.layers import unwrap
from repgraph.cost import latency, model_cost
from repgraph.labels import Labels, class_codes


@kept_random_state()
def evaluate_classifier(
    model: nn.Module,
    data: object,
    *,
    labels: Labels | None = None,
    samples: int | Sequence[int] | Tensor | None = None,
    batch_size: int = 128,
    progress: bool = True,
) -> pd.Series:
    """Cross-entropy and accuracy of a classifier on labelled data, in eval mode; the model comes out as it went in.

    Parameters
    ----------
    model
        Its output, or the first tensor of it, is one row of class scores (n, C) per sample.
    data, labels, samples, batch_size
        As in `capture`. Integer labels are the classes' places among the scores; strings are sorted first.
    progress
        Show a progress bar.

    Returns
    -------
    Series
        "cross_entropy" (nats, mean over the samples), "accuracy" (share of samples whose largest score is that of the
        label), "samples".

    Raises
    ------
    ValueError
        If there are no labels, the output is not (n, C) or not finite, labels lie outside 0..C-1, or strings name
        other than C classes.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> bool(evaluate_classifier(digits_resnet(), digits(), progress=False)["accuracy"] > 0.97)
    True
    """
    model = unwrap(model)
    if isinstance(data, Iterator):
        data = read_batches(data, None)[0]
    source = Source(data, batch_size, samples)
    own = None if labels is None else source.pick(labels, "labels")
    rows: list[Tensor] = []
    found: list[object] = []

    def keep(key: str, module: nn.Module, output: Tensor, batch: Batch) -> None:
        if output.ndim != 2 or len(output) != batch.size:
            raise ValueError(f"the model must give one row of class scores per sample, got {tuple(output.shape)}")
        rows.append(output.float().cpu())

    total = source.num_batches
    with closing(run(model, {"": model}, source, keep, progress="evaluate" if progress else None, total=total)) as all_:
        for batch in all_:
            if own is None and batch.labels is None:
                raise ValueError("data must have labels: pass (inputs, labels), or labels=")
            found += [] if batch.labels is None else list(batch.labels)
    scores = torch.cat(rows)
    codes, classes = class_codes(found if own is None else own, source.n)
    if isinstance(classes[0], str) and len(classes) != scores.shape[1]:
        raise ValueError(
            f"labels are strings of {len(classes)} classes, the model has {scores.shape[1]}: which is which cannot be "
            "told, pass integers"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("the model gives class scores that are not finite")
    target = codes if isinstance(classes[0], str) else torch.tensor(classes, dtype=torch.int64)[codes]
    if int(target.min()) < 0 or int(target.max()) >= scores.shape[1]:
        raise ValueError(
            f"labels must be classes 0 to {scores.shape[1] - 1} of the model, got {int(target.min())} to "
            f"{int(target.max())}"
        )
    return pd.Series(
        {
            "cross_entropy": float(F.cross_entropy(scores, target)),
            "accuracy": float((scores.argmax(1) == target).double().mean()),
            "samples": source.n,
        }
    )


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
