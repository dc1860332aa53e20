"""Smaller models: scores of layers, plans, their removal, and the repair of the cut."""

from repgraph.prune.classifier import evaluate_classifier
from repgraph.prune.comparison import compare_models
from repgraph.prune.layers import drop_layers, droppable_layers, load_pruned, predict_cost
from repgraph.prune.oracle import drop_and_evaluate, drop_greedily, result_change
from repgraph.prune.plan import Plan
from repgraph.prune.pruned import Pruned
from repgraph.prune.recover import reestimate_batch_norm_, repair
from repgraph.prune.scores import layer_scores
from repgraph.prune.selection import plan_greedily, plan_layers, redundant_blocks

__all__ = [
    "Plan",
    "Pruned",
    "compare_models",
    "drop_and_evaluate",
    "drop_greedily",
    "drop_layers",
    "droppable_layers",
    "evaluate_classifier",
    "layer_scores",
    "load_pruned",
    "plan_greedily",
    "plan_layers",
    "predict_cost",
    "redundant_blocks",
    "reestimate_batch_norm_",
    "repair",
    "result_change",
]
