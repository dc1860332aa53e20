"""Every figure: data in, matplotlib Axes out. Nothing is shown or saved, and no global style is touched."""

from repgraph.plot.by_layer import caption, curve, label_layers
from repgraph.plot.drawing import CLASS_COLORS, class_handles, graph, graphs
from repgraph.plot.layer_pairs import heatmap, heatmaps, sample_agreement, similarity_by_distance

__all__ = [
    "CLASS_COLORS",
    "caption",
    "class_handles",
    "curve",
    "graph",
    "graphs",
    "heatmap",
    "heatmaps",
    "label_layers",
    "sample_agreement",
    "similarity_by_distance",
]
