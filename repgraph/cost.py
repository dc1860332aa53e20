"""What a forward pass costs: multiply-accumulates (MACs), parameters, activation bytes, latency."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repgraph.activations.batches import example_inputs, model_device, model_dtype, to_device
from repgraph.activations.forward import kept_random_state, untouched
from repgraph.activations.spec import readable
from repgraph.operations import checked, count, without_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Cost of one forward pass over an example; see `model_cost`."""

    macs: int
    """Multiply-accumulates of matrix products and convolutions, for the whole batch."""
    parameters: int
    """Numbers in the parameters, each tensor once."""
    activation_bytes: int
    """Bytes of the tensors that the pass writes, for the whole batch."""

    @property
    def flops(self) -> int:
        """Floating-point operations of the same products: 2 macs, a multiplication and an addition each."""
        return 2 * self.macs

    def __repr__(self) -> str:
        return (
            f"Cost({self.macs:,} MACs, {self.parameters:,} parameters, {readable(self.activation_bytes)} activations)"
        )

    def _repr_html_(self) -> str:
        return (
            "<table><tr><th>MACs</th><th>parameters</th><th>activations</th></tr>"
            f"<tr><td>{self.macs:,}</td><td>{self.parameters:,}</td><td>{readable(self.activation_bytes)}</td></tr></table>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Time of one forward pass over an example; see `latency`."""

    median: float
    """Seconds."""
    lower: float
    """Lower quartile, seconds."""
    upper: float
    """Upper quartile, seconds."""
    runs: int
    """Forward passes that were timed."""
    threads: int
    """CPU threads that torch used within an operation."""
    device: str

    def __repr__(self) -> str:
        low, middle, high = (f"{1e3 * seconds:.4g}" for seconds in (self.lower, self.median, self.upper))
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"Latency({middle} ms, quartiles {low} to {high} ms, {self.runs:,} runs, {self.device}, {threads})"


def model_cost(model: nn.Module, example: object) -> Cost:
    """Multiply-accumulates (MACs), parameters and activation bytes of one forward pass over an example.

    A product of an (m, k) with a (k, n) matrix has m k n MACs; a convolution one for each element of the output, of
    the kernel and of the input channels of a group (transposed: of the input, the kernel and the output channels of a
    group); attention of T queries on S keys T S (d_key + d_value) per head; an RNN, GRU or LSTM per sample and step as
    many as its matrices have elements. They are counted where the operations reach ATen, so that functional
    calls count as modules do.

    Parameters
    ----------
    model
        Any nn.Module. It runs once, in eval mode without gradients, and comes out as it went in. With parameters or an
        example on the "meta" device, or of fake tensors, nothing is computed and the counts are those of the CPU
        (unless the model itself treats such tensors in another way, as some build their attention masks).
    example
        One batch, in any form that `capture` reads. MACs and activation bytes grow with the batch: pass one sample for
        the cost of one.

    Returns
    -------
    Cost
        macs, parameters, activation_bytes, and flops = 2 macs.

    Raises
    ------
    TypeError
        If `model` is no nn.Module or `example` holds no tensor.
    ValueError
        If the model is scripted or has lazy parameters.

    Warns
    -----
    UserWarning
        If an operation that may hold products cannot be counted; it is named.

    Notes
    -----
    What moves the numbers. Not counted: biases, element-wise operations, normalisation, softmax, pooling, distances,
    Fourier transforms. Nothing is taken off for zeros: padding counts, and causal or masked attention counts all T S
    products. Grouped-query attention counts as if its keys were repeated. A complex product is one MAC.
    torch's fused path of encoder layers is switched off for the pass, since it hides its products.

    activation_bytes sums, over all calls of ATen operations, the bytes of dense results that have no memory in common
    with an argument. Views and in-place operations add nothing, memory used inside an operation neither (fused
    attention writes no T x S scores, its other forms do), nor does it matter when a tensor is freed: this is
    the memory traffic of writing, not a peak.

    References
    ----------
    Formulas of matrix products, convolutions and attention: torch.utils.flop_counter, halved.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    >>> cost = model_cost(model, torch.zeros(1, 3, 4, 4))
    >>> cost
    Cost(4,096 MACs, 869 parameters, 532 B activations)
    >>> cost.macs == (8 * 4 * 4) * (3 * 3 * 3) + 128 * 5, cost.flops
    (True, 8192)
    """
    model, counts, _ = count(model, example)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(macs=counts.macs[model], parameters=parameters, activation_bytes=counts.written[model])


def cost_by_module(model: nn.Module, example: object) -> pd.DataFrame:
    """What every module of a model costs in one forward pass over an example.

    The numbers of a module are what goes with it: the first row minus its own is the cost of the model with
    ``nn.Identity`` in the module's place, where its output has the shape of its input.

    Parameters
    ----------
    model
        As in `model_cost`.
    example
        As in `model_cost`.

    Returns
    -------
    pd.DataFrame
        Indexed by module: "" for the whole model, then those that run or hold parameters, in the order of
        ``named_modules``. calls (how often it ran), macs, parameters, activation_bytes; all but calls include the
        modules inside. The example's shape, dtype and the device are in `attrs`.

    Raises
    ------
    TypeError, ValueError
        As `model_cost`.

    Warns
    -----
    UserWarning
        As `model_cost`.

    Notes
    -----
    An operation counts for every module whose forward method is running, and for those that hold these. A module that
    runs several times has the sum. A parameter counts for the modules without which it would be gone: one that two
    modules share counts for neither, only for what holds both. Scripted modules inside the model have no rows.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    >>> cost_by_module(model, torch.zeros(10, 4))  # doctest: +NORMALIZE_WHITESPACE
            calls  macs  parameters  activation_bytes
    module
                1  1120         130              1040
    0           1   320          40               320
    1           1     0           0               320
    2           1   800          90               400
    2.0         1   640          72               320
    2.1         1   160          18                80
    """
    model, counts, settings = count(model, example)
    owners: dict[int, set[nn.Module]] = {}
    """Parameter -> the modules without which it is gone."""
    for module, above in counts.above.items():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), above) & above
    parameters: Counter[nn.Module] = Counter()
    for parameter in model.parameters():
        parameters.update(dict.fromkeys(owners[id(parameter)], parameter.numel()))
    rows = {
        name: (counts.calls[m], counts.macs[m], parameters[m], counts.written[m])
        for name, m in model.named_modules()
        if not isinstance(m, torch.jit.ScriptModule)
        and (counts.calls[m] or counts.written[m] or next(m.parameters(), None) is not None)
    }
    columns = ["calls", "macs", "parameters", "activation_bytes"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("module")
    table.attrs.update(settings)
    return table


def latency(model: nn.Module, example: object, *, seconds: float = 1.0) -> Latency:
    """Time of one forward pass over an example, in seconds: median and quartiles of many.

    Parameters
    ----------
    model
        Any nn.Module, compiled ones as they are. It runs in eval mode without gradients and comes out as it went in.
    example
        One batch, as in `model_cost`; it is on the model's device before the clock starts.
    seconds
        How long to measure, at least three times, after a few passes to warm up.

    Returns
    -------
    Latency
        median, lower and upper quartile, number of runs, threads, device.

    Raises
    ------
    TypeError
        If `model` is no nn.Module or `example` holds no tensor.
    ValueError
        If `seconds` is not positive, the model is scripted, has lazy parameters, or there are no data to run on.

    Notes
    -----
    Measured by torch.utils.benchmark, which waits for the GPU to finish. Passes of less than a millisecond are timed in
    blocks of about one: the quartiles are those of block means. Threads are those of torch.get_num_threads(). A
    model that works in place on its input finds what it left there. What else the machine does moves the numbers:
    compare models measured side by side. blocked_autorange of the same library is not used: to keep its overhead below
    1e-4 it makes blocks as long as a second, of which there is then one, without quartiles.

    Examples
    --------
    >>> time = latency(nn.Linear(8, 8), torch.zeros(1, 8), seconds=0.01)
    >>> 0 < time.lower <= time.median <= time.upper
    True
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, got {seconds}")
    inner = checked(model)
    if without_data(inner, example):
        raise ValueError("model and example must hold data to be timed, got tensors on 'meta' or fake ones")
    from torch.utils.benchmark import Timer  # here, since its import looks for a compiler and says what it lacks

    inputs = to_device(example_inputs(example), model_device(inner), model_dtype(inner), copy=True)
    threads = torch.get_num_threads()
    with kept_random_state(), untouched(model), torch.no_grad():
        call = partial(model, **inputs) if isinstance(inputs, Mapping) else partial(model, inputs)
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        number = max(1, round(0.001 / timer.timeit(1).mean))  # which runs it twice before
        start, blocks = perf_counter(), [timer.timeit(number) for _ in range(3)]
        while perf_counter() - start < seconds:
            blocks.append(timer.timeit(number))
    lower, median, upper = np.quantile([block.mean for block in blocks], [0.25, 0.5, 0.75]).tolist()
    runs = number * len(blocks)
    device = next(value.device for value in tree_leaves(inputs) if isinstance(value, Tensor))
    return Latency(median=median, lower=lower, upper=upper, runs=runs, threads=threads, device=str(device))
