"""See what every layer of a trained network does to a set of samples, as graphs, and act on it."""

from repgraph.activations import Activations, capture, join_shards, layer_names, stream, stream_grams
from repgraph.between import between_layers, between_layers_null, compare_layers, stream_cka
from repgraph.graph import Graph, Partition, communities, knn_graph, threshold_graph
from repgraph.layerwise import apply_layers, profile, profile_activations
from repgraph.metrics.class_separation import class_separation
from repgraph.metrics.modularity import label_agreement, modularity, modularity_ceiling, modularity_null
from repgraph.segments import segment_layers

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Graph",
    "Partition",
    "apply_layers",
    "between_layers",
    "between_layers_null",
    "capture",
    "class_separation",
    "communities",
    "compare_layers",
    "join_shards",
    "knn_graph",
    "label_agreement",
    "layer_names",
    "modularity",
    "modularity_ceiling",
    "modularity_null",
    "profile",
    "profile_activations",
    "segment_layers",
    "stream",
    "stream_cka",
    "stream_grams",
    "threshold_graph",
]
