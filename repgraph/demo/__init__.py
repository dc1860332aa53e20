"""A small trained network and its data, which `repgraph demo` analyses."""

from repgraph.demo.network import DigitsResNet, digits, digits_resnet

__all__ = ["DigitsResNet", "digits", "digits_resnet"]
