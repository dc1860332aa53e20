"""Choose layers, run the model over data, keep what the layers give.

The only place that reads over data, sets eval mode and moves batches.
"""

from repgraph.activations.container import Activations
from repgraph.activations.grams import stream_grams
from repgraph.activations.names import LayerNames, layer_names
from repgraph.activations.record import capture, stream
from repgraph.activations.shards import join_shards
from repgraph.activations.spec import Spec

__all__ = ["Activations", "LayerNames", "Spec", "capture", "join_shards", "layer_names", "stream", "stream_grams"]
