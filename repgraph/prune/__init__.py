"""Smaller models: scores of layers, plans, their removal, and the repair of the cut."""

from repgraph.evaluation import compare_models, evaluate_classifier
from repgraph.prune.budgets import plan_filters, search_widths
from repgraph.prune.filter_groups import FilterGroups, prunable_filters
from repgraph.prune.filters import mask_filters, prune_filters
from repgraph.prune.layers import drop_layers, droppable_layers, predict_cost
from repgraph.prune.loading import load_pruned
from repgraph.prune.oracle import drop_and_evaluate, drop_greedily, result_change
from repgraph.prune.plan import Plan
from repgraph.prune.pruned import Pruned
from repgraph.prune.recover import reestimate_batch_norm_, repair
from repgraph.prune.scores import layer_scores
from repgraph.prune.selection import plan_greedily, plan_layers, redundant_blocks
from repgraph.prune.sensitivity import Rates, layer_sensitivity, rates_from_sensitivity, tolerated_ratios

__all__ = [
    "FilterGroups",
    "Plan",
    "Pruned",
    "Rates",
    "compare_models",
    "drop_and_evaluate",
    "drop_greedily",
    "drop_layers",
    "droppable_layers",
    "evaluate_classifier",
    "layer_scores",
    "layer_sensitivity",
    "load_pruned",
    "mask_filters",
    "plan_filters",
    "plan_greedily",
    "plan_layers",
    "predict_cost",
    "prunable_filters",
    "prune_filters",
    "rates_from_sensitivity",
    "redundant_blocks",
    "reestimate_batch_norm_",
    "repair",
    "result_change",
    "search_widths",
    "tolerated_ratios",
]
