"""What two criteria do for the next layer when a filter goes: columns absorbed, batch norms shifted."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import nn

from repgraph.activations.layers import unwrap
from repgraph.prune.filter_groups import prunable_filters
from repgraph.prune.plan import Plan
from repgraph.scores.central_filter import CentralPlan, absorb_columns_
from repgraph.scores.fsm import relu_gaussian_mean, shift_batchnorm_, shift_readers
from repgraph.surgery.channels import output_channels


def absorb_filters(model: nn.Module, example: object, plans: Mapping[str, CentralPlan]) -> tuple[nn.Module, Plan]:
    """A copy in which the kept filters do the work of those that they represent, and the plan that cuts these.

    Central Filter's compensation in a whole model: the columns of a removed filter in every layer that reads it are
    added to those of its representative (`absorb_columns_`). Where the maps are equal, `prune_filters` with the plan
    then changes nothing.

    Parameters
    ----------
    model, example
        As in `prune_filters`; untouched.
    plans
        Layer -> result of `central_filters`; layers whose channels nothing else shares.

    Returns
    -------
    Module
        Of the same shapes.
    Plan
        With the removed filters of every layer.

    Raises
    ------
    ValueError
        If the channels of a layer cannot be cut, go together with those of others, or its reader has groups.

    References
    ----------
    Duan et al., arXiv 2112.05493; their code keeps the change of a layer only if the accuracy on test data does not
    fall. Delegates that are removed themselves are followed to the kept filter, which their code does not.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> from repgraph.scores.central_filter import central_filters, map_similarity
    >>> from repgraph.scores.maps import stream_maps
    >>> model, x = digits_resnet(), digits()[0]
    >>> alike = stream_maps(model, x, map_similarity, ["layer2.0.conv1"], combine="mean", samples=64)
    >>> ready, plan = absorb_filters(model, x[:2], {name: central_filters(s, 4) for name, s in alike.items()})
    >>> len(plan.filters["layer2.0.conv1"])
    4
    """
    model = unwrap(model)
    found = prunable_filters(model, example)
    ready = deepcopy(model)
    for name, plan in plans.items():
        group = next((group for group in found.groups if name in group.layers), None)
        if group is None or group.layers != (name,):
            why = found.left.get(name) or "they go together with those of others"
            raise ValueError(f"the filters of {name!r} cannot be absorbed: {why}")
        for reader, columns in group.readers(name).items():
            absorb_columns_(ready.get_submodule(reader), plan, offset=columns)
    filters = {name: tuple(plan.assigned) for name, plan in plans.items()}
    return ready, Plan(filters=filters, by="central_filter", settings={"absorbed": True})


@torch.no_grad()
def shift_batch_norms(model: nn.Module, example: object, plan: Plan) -> nn.Module:
    """A copy whose batch norms behind the readers of a plan's filters expect what is left of their input.

    FSM's correction in a whole model, additive: from the running mean goes the mean that the removed channels gave,
    by the parameters of their own batch norm (`shift_batchnorm_`). Layers to which feature shift does not apply
    (`fsm_scores`) or whose readers have no batch norm of their own are left as they are.

    Parameters
    ----------
    model, example, plan
        As in `prune_filters`, which cuts the copy by the same plan; the model is untouched.

    Returns
    -------
    Module
        Of the same shapes.

    References
    ----------
    Duan et al., arXiv 2207.02632, whose form is a ratio of means, which explodes where they are near 0, and also
    scales the variance.

    Examples
    --------
    >>> from repgraph.demo import digits, digits_resnet
    >>> model, x = digits_resnet(), digits()[0][:2]
    >>> shifted = shift_batch_norms(model, x, Plan(filters={"layer1.0.conv1": (0, 1)}))
    >>> bool((shifted.layer1[0].bn2.running_mean != model.layer1[0].bn2.running_mean).any())
    True
    """
    model = unwrap(model)
    shifted = deepcopy(model)
    places = output_channels(model, example)
    for name, readers in shift_readers(model, example, places).items():
        gone = plan.filters.get(name, ())
        for reader, columns in readers.items():
            norm = places[reader].norm if reader in places else None
            if gone and norm is not None:
                own = model.get_submodule(places[name].norm or "")
                weight, bias = own.get_parameter("weight").detach(), own.get_parameter("bias").detach()
                expected = relu_gaussian_mean(bias, weight)
                keep = [i for i in range(len(expected)) if i not in set(gone)]
                shift_batchnorm_(shifted.get_submodule(norm), (shifted.get_submodule(reader), columns), expected, keep)
    return shifted
