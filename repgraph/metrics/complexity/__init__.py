"""Transformation complexity: how many different linear maps a ReLU network uses over a data set."""

from repgraph.metrics.complexity.entropy import (
    activation_cross_entropy,
    gate_entropy,
    gate_label_information,
    total_correlation,
)
from repgraph.metrics.complexity.report import ComplexityReport, gating_states, transformation_complexity

__all__ = [
    "ComplexityReport",
    "activation_cross_entropy",
    "gate_entropy",
    "gate_label_information",
    "gating_states",
    "total_correlation",
    "transformation_complexity",
]
