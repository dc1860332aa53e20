"""Every figure: data in, matplotlib Axes out. Nothing is shown or saved, and no global style is touched."""

from repgraph.plot.by_layer import caption, curve, curves, label_layers, main_columns
from repgraph.plot.cells import partition
from repgraph.plot.drawing import CLASS_COLORS, class_handles, graph, graphs
from repgraph.plot.layer_pairs import heatmap, heatmaps, sample_agreement, similarity_by_distance
from repgraph.plot.pruning import plan, widths
from repgraph.plot.units import complexity, unit_entropies

__all__ = [
    "CLASS_COLORS",
    "caption",
    "class_handles",
    "complexity",
    "curve",
    "curves",
    "graph",
    "graphs",
    "heatmap",
    "heatmaps",
    "label_layers",
    "main_columns",
    "partition",
    "plan",
    "sample_agreement",
    "similarity_by_distance",
    "unit_entropies",
    "widths",
]
