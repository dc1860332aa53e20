"""Similarity of two layers over the same samples: graph-based similarity (GBS) and the measures it is compared with."""

from repgraph.metrics.similarity.cka import hsic, linear_cka, rbf_cka
from repgraph.metrics.similarity.cknna import cknna
from repgraph.metrics.similarity.gbs import gbs, gbs_per_sample
from repgraph.metrics.similarity.gram import Gram, gram
from repgraph.metrics.similarity.layer_matching import layer_matching_accuracy, layer_matching_chance
from repgraph.metrics.similarity.minibatch import minibatch_cka
from repgraph.metrics.similarity.motifs import TriangleMotifs, motif_ratio, motif_ratio_chance, triangle_motifs
from repgraph.metrics.similarity.mutual_knn import mutual_knn
from repgraph.metrics.similarity.null import similarity_null
from repgraph.metrics.similarity.procrustes import procrustes
from repgraph.metrics.similarity.rsa import rsa
from repgraph.metrics.similarity.rtd import rtd
from repgraph.metrics.similarity.svcca import svcca

__all__ = [
    "Gram",
    "TriangleMotifs",
    "cknna",
    "gbs",
    "gbs_per_sample",
    "gram",
    "hsic",
    "layer_matching_accuracy",
    "layer_matching_chance",
    "linear_cka",
    "minibatch_cka",
    "motif_ratio",
    "motif_ratio_chance",
    "mutual_knn",
    "procrustes",
    "rbf_cka",
    "rsa",
    "rtd",
    "similarity_null",
    "svcca",
    "triangle_motifs",
]
