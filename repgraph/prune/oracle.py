"""What dropping a layer really costs: run the model without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral

import pandas as pd
from torch import nn
from tqdm import tqdm

from repgraph.activations import capture
from repgraph.activations.batches import Source, read_batches
from repgraph.activations.layers import INPUTS, unwrap
from repgraph.activations.reduce import Reduce
from repgraph.metrics.similarity import linear_cka
from repgraph.prune.layers import as_names, drop_layers
from repgraph.prune.plan import Plan
from repgraph.prune.pruned import new_name
from repgraph.surgery.calls import observe

Evaluate = Callable[[nn.Module], float]
"""The user's own evaluation of a model: a loss, low = good."""


def drop_and_evaluate(
    model: nn.Module, names: Sequence[str], evaluate: Evaluate, example: object, *, progress: bool = True
) -> pd.Series:
    """Rise of the loss when one layer alone is dropped: the oracle that every score tries to foretell.

    evaluate(model without l) - evaluate(model), for each layer l.

    Parameters
    ----------
    model
        In eval mode; untouched.
    names
        Layers to try, as `droppable_layers` names them.
    evaluate
        ``evaluate(model) -> float``: a loss on data of your choice, low = good (for accuracy, 1 - accuracy). It is
        called once for the whole model and once without each layer.
    example
        As in `drop_layers`.
    progress
        Show a progress bar.

    Returns
    -------
    Series
        Layer -> rise of the loss, in its units; negative where the model is better without. High = keep. The loss of
        the whole model is in ``attrs["whole"]``.

    Raises
    ------
    ValueError
        As `drop_layers`; if the model is in training mode, in which dropout and batch norm would be evaluated instead;
        if evaluate gives no finite number.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> x, y = digits()
    >>> error = lambda model: 1 - (model(x[:200]).argmax(1) == y[:200]).double().mean().item()
    >>> rise = drop_and_evaluate(digits_resnet(), ["layer1.0", "layer3.3"], error, x[:2], progress=False)
    >>> bool(rise["layer1.0"] > rise["layer3.3"])
    True
    """
    model = _in_eval(model)
    whole = _evaluated(evaluate, model, "the whole model")
    rises = {}
    for name in tqdm(as_names(names), desc="oracle", unit="layer", disable=not progress, delay=1, leave=False):
        without = drop_layers(model, [name], example).model
        rises[name] = _evaluated(evaluate, without, f"the model without {name!r}") - whole
    found = pd.Series(rises, name="drop_and_evaluate", dtype=float).rename_axis("layer")
    found.attrs = {"whole": whole}
    return found


def drop_greedily(
    model: nn.Module, names: Sequence[str], evaluate: Evaluate, count: int, example: object, *, progress: bool = True
) -> Plan:
    """Drop `count` layers one after the other, each time the one without which the loss is lowest.

    Every step evaluates the model without each of the layers that are left, given those already dropped: about
    count x layers evaluations.

    Parameters
    ----------
    model, names, evaluate, example, progress
        As in `drop_and_evaluate`.
    count
        How many layers to drop, 1 to all of the names.

    Returns
    -------
    Plan
        Its scores are the rises over the whole model: at the moment of the drop, or, for layers that stay, at the last
        step in which they were tried. Equal losses: the later layer goes.

    Raises
    ------
    ValueError
        As `drop_and_evaluate`; if count is out of range.
    """
    model = _in_eval(model)
    names = as_names(names)
    if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= count <= len(names):
        raise ValueError(f"count must be an integer from 1 to the {len(names)} names, got {count!r}")
    whole = _evaluated(evaluate, model, "the whole model")
    gone: list[str] = []
    scores: dict[str, float] = {}
    total = sum(len(names) - step for step in range(count))
    with tqdm(desc="oracle", unit="layer", total=total, disable=not progress, delay=1, leave=False) as bar:
        for _ in range(count):
            for name in names:
                if name not in gone:
                    without = drop_layers(model, [*gone, name], example).model
                    scores[name] = _evaluated(evaluate, without, f"the model without {[*gone, name]}") - whole
                    bar.update()
            left = [name for name in names if name not in gone]
            gone.append(min(left, key=lambda name: (scores[name], -left.index(name))))
    return Plan(
        layers=tuple(name for name in names if name in gone),
        by="drop_and_evaluate, greedily",
        scores={name: scores[name] for name in names},
        settings={"order": gone, "whole": whole},
    )


def result_change(
    model: nn.Module,
    data: object,
    names: Sequence[str],
    *,
    at: str | None = None,
    samples: int = 500,
    reduce: Reduce = None,
    batch_size: int = 64,
    progress: bool = True,
) -> pd.Series:
    """How much the last representation changes when one layer alone is dropped, in [0, 1] up to sampling error.

    1 - CKA(Z, Z without l), Z what goes into the classifier, CKA linear and unbiased. One forward pass over the samples
    for each layer, no labels: an oracle of half the price, which sees the representation and not the task.

    Parameters
    ----------
    model, data, reduce, batch_size
        As in `capture`; the model in any mode.
    names
        Layers to try, as `droppable_layers` names them.
    at
        Where Z is taken, as a layer of `capture`; by default what goes into the last linear layer that runs.
    samples
        How many samples to take: the first ones.
    progress
        Show a progress bar.

    Returns
    -------
    Series
        Layer -> change; high = keep.

    Raises
    ------
    ValueError
        As `capture` and `drop_layers`; if no linear layer runs and `at` is not given.

    References
    ----------
    Pons et al. 2024, arXiv 2405.17081, from its abstract: drop the layer of the smallest change, and repeat. Here the
    CKA is the unbiased one.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> result_change(digits_resnet(), digits(), ["layer1.0", "layer3.3"], samples=200, progress=False).idxmax()
    'layer1.0'
    """
    model = unwrap(model)
    if isinstance(data, Iterator):
        data = read_batches(data, samples)[0]
    example = next(iter(Source(data, batch_size, 2))).inputs
    if at is None:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        ran = list(observe(model, example, linear))
        if not ran:
            raise ValueError("at must name the layer before the classifier: no linear layer runs")
        at = INPUTS + ran[-1]
    take = partial(capture, data=data, samples=samples, reduce=reduce, batch_size=batch_size, progress=False)
    whole = take(model, layers=at)[at]
    changes = {}
    for name in tqdm(as_names(names), desc="result", unit="layer", disable=not progress, delay=1, leave=False):
        pruned = drop_layers(model, [name], example)
        prefix = INPUTS if at.startswith(INPUTS) else ""
        where = prefix + new_name(at.removeprefix(INPUTS), pruned.plan.renamed)
        changes[name] = 1 - linear_cka(whole, take(pruned.model, layers=where)[where], unbiased=True)
    return pd.Series(changes, name="result_change", dtype=float).rename_axis("layer")


def _in_eval(model: nn.Module) -> nn.Module:
    model = unwrap(model)
    if training := [name for name, module in model.named_modules() if module.training]:
        raise ValueError(
            f"model is in training mode ({training[0] or 'as a whole'}), in which dropout and batch norm would be "
            "evaluated: call model.eval() first"
        )
    return model


def _evaluated(evaluate: Evaluate, model: nn.Module, what: str) -> float:
    value = float(evaluate(model))
    if not math.isfinite(value):
        raise ValueError(f"evaluate must give a finite loss, got {value} for {what}")
    return value
