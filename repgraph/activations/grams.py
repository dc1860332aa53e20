"""Gram matrices of layers too wide to be kept, straight from the passes over the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repgraph.activations.forward import Forward, kept_random_state
from repgraph.activations.layers import Select
from repgraph.activations.memory import as_bytes
from repgraph.activations.recording import Recording
from repgraph.activations.reduce import ChannelAxis, Reduce, check_choice
from repgraph.activations.spec import readable
from repgraph.precision import full_precision

_FEATURES = 4096  # features per product


@kept_random_state()
def stream_grams(
    model: nn.Module,
    data: object,
    layers: Select = "blocks",
    *,
    memory: int | str | None = None,
    reduce: Reduce = None,
    forward: Forward | None = None,
    samples: int | Sequence[int] | Tensor | None = None,
    batch_size: int = 64,
    channel_axis: ChannelAxis = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Gram matrices X X' of layers whose outputs X (n, d), flattened, need not fit into memory.

    As many samples as fit are held with all their features, from all layers; those of later batches are multiplied with
    them inside the pass and dropped. The next pass begins behind the samples that were held. One pass is enough where
    all but the last batch fit; P passes run (P + 1) / 2 times as many samples as one.

    Parameters
    ----------
    model, data, layers, reduce, forward, samples, batch_size, channel_axis, progress
        As in `capture`; gates are refused. The data must come in the same order every time.
    memory
        Bytes of features held at once, as a number or text ("2 GB"), beside the result; half of the free memory by
        default.

    Returns
    -------
    dict of str to Tensor
        Layer name -> (n, n), symmetric, in execution order, on the model's device, in float64 for layers of that type
        and else in float32. Rows are the samples in the order of the data.

    Raises
    ------
    ValueError
        As `capture`, or if one sample of all layers does not fit into the memory, or products overflow.

    Notes
    -----
    Products are added up in the type of the result over chunks of 4096 features. The number of passes is the least: a
    sample before the last batch must be held when that comes, in some pass, and each pass holds as many more of them
    as fit. Time: n^2 d multiply-adds for a layer in one pass, about half of that in many.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> _ = nn.init.eye_(model[0].weight)
    >>> g = stream_grams(model, torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 2.0]]), "0")["0"]
    >>> g.tolist()
    [[25.0, 24.0, 8.0], [24.0, 25.0, 6.0], [8.0, 6.0, 4.0]]

    Cosines for a graph, ``knn_graph(cosines, k, metric="precomputed")``:

    >>> norms = g.diagonal().sqrt()
    >>> cosines = g / (norms[:, None] * norms)
    """
    check_choice(reduce)
    budget = as_bytes(memory)
    recording = Recording(model, data, layers, reduce, channel_axis, forward, batch_size, samples, progress)
    specs, n = recording.specs, recording.source.n
    if recording.patterns:
        raise ValueError(f"layers must be outputs or inputs of modules, got {recording.patterns[0]!r}: capture gates")
    need = sum(spec.nbytes for spec in specs.values())
    if need > budget:
        raise ValueError(
            f"memory is {readable(budget)}, but one sample of all {len(specs)} layers needs {need} bytes "
            f"({readable(need)}): raise memory= to that, or choose fewer layers at a time"
        )
    room = min(n, budget // max(need, 1))
    grams: dict[str, Tensor] = {}
    begin = last = 0
    while begin == 0 or begin < last:
        block = _Block(grams, begin, min(begin + room, n), n)
        recording.run(list(specs), block.add, "grams" if room == n else f"grams, from sample {begin}", begin)
        if begin == 0:
            recording.check_order()
            last = block.last
        begin = block.end
        del block  # before the next one takes its memory
    return {name: _whole(grams.pop(name), name) for name in specs}


class _Block:
    """Samples begin to end, whose features are held during one pass, and their products with all from begin on.

    Of `grams` (n, n) the entries below the diagonal are written, and those within a batch.
    """

    def __init__(self, grams: dict[str, Tensor], begin: int, end: int, n: int) -> None:
        self.grams, self.begin, self.end, self.n = grams, begin, end, n
        self.last = 0
        """First sample of the last batch so far."""
        self.held: dict[str, Tensor] = {}
        self.done: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        """The next batch (b, ...) of a layer."""
        x = x.flatten(1)
        at = self.last = self.done.get(name, self.begin)
        after = self.done[name] = at + len(x)
        if name not in self.grams:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            self.grams[name] = torch.zeros((self.n, self.n), dtype=dtype, device=x.device)
        if name not in self.held:
            self.held[name] = x.new_empty((self.end - self.begin, x.shape[1]))
        rows, held = self.grams[name][at:after], self.held[name]
        known = min(at, self.end) - self.begin
        _add_products(x, held[:known], rows[:, self.begin : self.begin + known])
        if self.begin == 0 or at < self.end:  # within later batches the first pass did it
            _add_products(x, x, rows[:, at:after])
        kept = max(0, min(after, self.end) - at)
        held[known : known + kept] = x[:kept]


def _add_products(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Set `out` to a b', summed over chunks of features in its type."""
    out.zero_()
    if not out.numel():
        return
    with full_precision(a.device):
        for f in range(0, a.shape[1], _FEATURES):
            out.addmm_(a[:, f : f + _FEATURES].to(out.dtype), b[:, f : f + _FEATURES].to(out.dtype).T)


def _whole(gram: Tensor, name: str) -> Tensor:
    gram = gram.tril_()
    gram += gram.tril(-1).T
    if not bool(gram.isfinite().all()):
        raise ValueError(
            f"layer {name!r}: products of its outputs leave the range of {gram.dtype}: reduce or scale them"
        )
    return gram
