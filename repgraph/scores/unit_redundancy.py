"""Redundant borders as a score: the filter that another one can best stand in for goes first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repgraph.activations.layers import Select, unwrap
from repgraph.metrics.spline import redundant_units, unit_redundancy
from repgraph.scores.weight_norm import as_scores, filter_rows, layers_with_filters
from repgraph.surgery.channels import output_channels

_STEP = 1e-12  # between filters that are dropped at the same distance


def unit_redundancy_scores(model: nn.Module, example: object, layers: Select | None = None) -> dict[str, Tensor]:
    """Distance to the nearest border left when a filter is dropped, one after the other, high = keep.

    Again and again the two closest of the filters left are found by `unit_redundancy`, batch norm folded in, and the
    one of smaller norm is dropped; its score is their distance, plus 1e-12 times its place in the order. So the q
    lowest scores are what `redundant_units` drops for q of the C filters, for every q.

    Parameters
    ----------
    model
        Untouched.
    example
        One batch, to see which batch norm follows which layer.
    layers
        Convolutions, not transposed, and linear layers, as `capture` chooses them; by default all such convolutions.

    Returns
    -------
    dict
        Layer -> (C,), float64 on the CPU, distinct. Filters without weights are lowest, from -1 up; the last one left
        has the distance of the last pair, or 0 if it was never in one.

    Raises
    ------
    ValueError
        If a layer has no filters or is transposed, or its batch norm has no running statistics.

    Notes
    -----
    Norms are those of the rows with batch norm folded in.

    References
    ----------
    As for `unit_redundancy`, whose distance and greedy rule are reconstructions of You et al., arXiv 2101.02338.

    Examples
    --------
    >>> layer = nn.Linear(2, 3, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, 4], [6, 8], [4, -3]])
    >>> [round(score, 9) for score in unit_redundancy_scores(nn.Sequential(layer), torch.ones(1, 2), "0")["0"].tolist()]
    [0.0, 1.0, 1.0]
    """
    model = unwrap(model)
    chosen = layers_with_filters(model, layers)
    if layers is None:
        chosen = {name: m for name, m in chosen.items() if isinstance(m, nn.Linear) or not m.transposed}
    known = output_channels(model, example, None if layers is None else [*chosen])
    scores = {}
    for name, norm in ((name, behind.norm) for name, behind in known.items() if name in chosen):
        bn = model.get_submodule(norm) if norm else None
        try:
            d = unit_redundancy(chosen[name], bn=bn)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        norms = filter_rows(chosen[name]).double().norm(dim=1)
        if isinstance(bn, nn.modules.batchnorm._BatchNorm) and bn.running_var is not None:
            scale = (bn.running_var.double() + bn.eps).rsqrt()
            norms = norms * (scale * bn.weight.detach().double().abs() if bn.affine else scale)
        scores[name] = _drop_scores(d.cpu(), norms.cpu())
    return as_scores(scores)


def _drop_scores(d: Tensor, norms: Tensor) -> Tensor:
    """Scores (c,) in the order in which the units go, from their distances (c, c) and norms (c,)."""
    c = len(d)
    order = redundant_units(d, (c - 1) / c, norms)
    order += set(range(c)) - set(order)  # the last one left
    later = torch.ones(c, c, dtype=torch.bool).triu(1)
    nearest = d[order][:, order].masked_fill(~later, torch.inf).amin(1)  # rises: the closest pair goes first
    nearest = torch.cat([nearest[:-1], nearest[-2:-1] if c > 1 else nearest.new_zeros(1)]).nan_to_num(0)
    nearest = torch.where(norms[order] > 0, nearest, -1.0) + _STEP * torch.arange(c)
    return torch.empty_like(nearest).scatter(0, torch.tensor(order), nearest)
