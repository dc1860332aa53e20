"""Spline partitions: the cells of input space on which a network is affine."""

from repgraph.metrics.spline.bounds import max_regions_bound, reachable_regions
from repgraph.metrics.spline.codes import (
    EarlyBird,
    RegionCodes,
    partition_distance,
    partition_distance_by_layer,
    region_codes,
)
from repgraph.metrics.spline.local import local_complexity, local_complexity_by_layer
from repgraph.metrics.spline.planes import slice_through_pca, slice_through_samples
from repgraph.metrics.spline.redundancy import redundant_units, unit_redundancy
from repgraph.metrics.spline.segment import SegmentPartition, segment_regions
from repgraph.metrics.spline.slices import SlicePartition, slice_partition

__all__ = [
    "EarlyBird",
    "RegionCodes",
    "SegmentPartition",
    "SlicePartition",
    "local_complexity",
    "local_complexity_by_layer",
    "max_regions_bound",
    "partition_distance",
    "partition_distance_by_layer",
    "reachable_regions",
    "redundant_units",
    "region_codes",
    "segment_regions",
    "slice_partition",
    "slice_through_pca",
    "slice_through_samples",
    "unit_redundancy",
]
