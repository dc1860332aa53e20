"""Feature entropy: how consistently a unit lays out its activations over the images of one class."""

from repgraph.metrics.feature_entropy.births import feature_birth
from repgraph.metrics.feature_entropy.entropy import (
    FeatureEntropy,
    UnitFeatureEntropy,
    feature_entropy,
    feature_entropy_floor,
    unit_feature_entropy,
)

__all__ = [
    "FeatureEntropy",
    "UnitFeatureEntropy",
    "feature_birth",
    "feature_entropy",
    "feature_entropy_floor",
    "unit_feature_entropy",
]
