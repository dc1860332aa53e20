"""Transformation complexity: how many different linear maps a ReLU network uses over a data set."""

from repgraph.metrics.complexity.entropy import (
    activation_cross_entropy,
    gate_entropy,
    gate_label_information,
    total_correlation,
)
from repgraph.metrics.complexity.penalty import ComplexityPenalty, EnergyNetwork, gate_log_probability
from repgraph.metrics.complexity.report import ComplexityReport, gating_states, transformation_complexity

__all__ = [
    "ComplexityPenalty",
    "ComplexityReport",
    "EnergyNetwork",
    "activation_cross_entropy",
    "gate_entropy",
    "gate_label_information",
    "gate_log_probability",
    "gating_states",
    "total_correlation",
    "transformation_complexity",
]
