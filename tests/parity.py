"""What repgraph computes beside what independent packages compute: the rows of docs/parity.md, each also a test.

Every row is a quantity, our value, the packages behind the reference value, and a function that computes it with them.
Data: 60 samples, float64, the second layer a noisy nonlinear image of the first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx
import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
from sklearn.metrics.pairwise import (
    cosine_similarity,
    paired_cosine_distances,
    paired_euclidean_distances,
    rbf_kernel,
)
from sklearn.neighbors import NearestNeighbors, kneighbors_graph, radius_neighbors_graph

import repgraph
from repgraph.metrics import complexity, feature_entropy, spline
from repgraph.metrics import similarity as ours
from repgraph.metrics.angular_distance import angular_distance
from repgraph.metrics.block_influence import block_influence
from repgraph.metrics.redundancy import redundancy
from repgraph.metrics.relative_residual import relative_residual
from repgraph.scores.central_filter import map_similarity
from repgraph.scores.chip import channel_independence
from repgraph.scores.fsm import relu_gaussian_mean
from repgraph.scores.hrank import feature_rank


def samples(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two layers (n, 8) and (n, 12), and labels in three classes."""
    generator = np.random.default_rng(seed)
    y = np.arange(n) % 3
    a = generator.normal(size=(n, 8)) + 0.7 * generator.normal(size=(3, 8))[y] + 0.3
    b = np.maximum(a @ generator.normal(size=(8, 12)), 0) + 0.3 * generator.normal(size=(n, 12))
    return torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(y)


@dataclass(frozen=True)
class Row:
    """One line of the parity table."""

    quantity: str
    ours: Callable[[], float]
    packages: tuple[str, ...]
    """Import names; a package that is absent skips the row's test."""
    reference: Callable[[], float]

    @property
    def name(self) -> str:
        """The packages as the table names them."""
        return ", ".join(self.packages)


X, Y, LABELS = samples()
A, B = X.numpy(), Y.numpy()
N = len(A)


def _classes():
    return [set(np.flatnonzero(LABELS.numpy() == c).tolist()) for c in range(3)]


def _cosine_graph(x, k):
    """Directed adjacency of the k nearest by cosine, from scikit-learn."""
    graph = kneighbors_graph(x, k, mode="distance", metric="cosine")
    graph.data = 1 - graph.data
    return graph


def _symmetric(x, k):
    graph = _cosine_graph(x, k)
    return (graph + graph.T) / 2


def _igraph_modularity():
    import igraph

    graph = nx.from_scipy_sparse_array(_symmetric(A, 3))
    converted = igraph.Graph.from_networkx(graph)
    return converted.modularity(LABELS.tolist(), weights="weight")


def _bct_modularity():
    import bct

    dense = repgraph.threshold_graph(X, -1.0).to_scipy().toarray()
    return float(bct.modularity_louvain_und_sign(dense, qtype="gja", seed=0)[1])


def _bct_ours():
    import bct

    graph = repgraph.threshold_graph(X, -1.0)
    found = bct.modularity_louvain_und_sign(graph.to_scipy().toarray(), qtype="gja", seed=0)[0]
    return repgraph.modularity(graph, found, negative="signed")


def _class_separation():
    distance = scipy.spatial.distance.cdist(A, A, "cosine")
    y = LABELS.numpy()
    between = np.array([[distance[np.ix_(y == a, y == b)].mean() for b in range(3)] for a in range(3)])
    return 1 - between.diagonal().mean() / between.mean()


def _knn(x, k, metric):
    distance, index = NearestNeighbors(n_neighbors=k, metric=metric).fit(x).kneighbors()
    return distance, index


def _cka(**options):
    from ckatorch.core import cka_base

    return float(cka_base(X, Y, **options))


def _hsic(kernel_a, kernel_b, unbiased):
    from ckatorch.hsic import hsic0, hsic1

    a, b = torch.from_numpy(kernel_a), torch.from_numpy(kernel_b)
    return float(hsic1(a[None], b[None])[0]) if unbiased else float(hsic0(a, b))


def _pytorch_cka():
    from cka import cka_from_features

    return float(cka_from_features([X], [Y])[0, 0])


def _rbf():
    kernels = []
    for x in (A, B):
        distance = scipy.spatial.distance.pdist(x, "sqeuclidean")
        kernels.append(rbf_kernel(x, gamma=1 / (2 * np.median(distance))))
    a, b = kernels
    return _hsic(a, b, False) / (_hsic(a, a, False) * _hsic(b, b, False)) ** 0.5


def _minibatch():
    from ckatorch.core import cka_batch

    return float(cka_batch(X.reshape(4, 15, 8), Y.reshape(4, 15, 12)))


def _nuclear():
    wide = np.pad(A, ((0, 0), (0, 4)))
    return (1 - scipy.spatial.procrustes(wide, B)[2]) ** 0.5


def _mean_rho():
    bases = [x - x.mean(0) for x in (A, B)]
    return float(np.cos(scipy.linalg.subspace_angles(*bases)).mean())


def _svcca():
    kept = []
    for x in (A, B):
        u, s, _ = scipy.linalg.svd(x - x.mean(0), full_matrices=False)
        kept.append(u[:, : int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.99)) + 1])
    return float(np.cos(scipy.linalg.subspace_angles(*kept)).mean())


def _rsa(method, compare_by):
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare

    rdms = [calc_rdm(Dataset(x), method=method) for x in (A, B)]
    return float(compare(*rdms, method=compare_by)[0, 0])


def _gbs(k):
    a, b = (_symmetric(x, k).toarray() for x in (A, B))
    return float(1 - paired_cosine_distances(a, b).mean())


def _dense_gbs():
    grams = [cosine_similarity(x) for x in (A, B)]
    for matrix in grams:
        np.fill_diagonal(matrix, 0)
    return float(1 - paired_cosine_distances(*grams).mean())


def _mutual_knn(k):
    neighbors = [_knn(x, k, "cosine")[1] for x in (A, B)]
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(*neighbors, strict=True)]) / k)


def _cknna(k):
    kernels = [A @ A.T, B @ B.T]
    masks = []
    for kernel in kernels:
        kernel = kernel.copy()
        np.fill_diagonal(kernel, -np.inf)
        mask = np.zeros_like(kernel)
        np.put_along_axis(mask, np.argsort(-kernel, axis=1)[:, :k], 1, axis=1)
        masks.append(mask)

    def aligned(i, j):
        mask = masks[i] * masks[j]
        return _hsic(mask * kernels[i], mask * kernels[j], True)

    return aligned(0, 1) / (aligned(0, 0) * aligned(1, 1)) ** 0.5


def _rtd():
    from ripser import ripser

    distances = [scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(x)) for x in (A, B)]
    a, b = (matrix / np.quantile(matrix, 0.9) for matrix in distances)

    def length(r1, r2):
        matrix = np.block([[np.zeros_like(r1), r1], [r1, np.minimum(r1, r2)]])
        bars = ripser(matrix, maxdim=1, distance_matrix=True)["dgms"][1]
        return (bars[:, 1] - bars[:, 0]).sum()

    return float(length(a, b) + length(b, a)) / 2


def _triangles():
    return sum(nx.triangles(nx.from_scipy_sparse_array(_symmetric(A, 5))).values()) / 3


def _type1():
    graph = nx.from_scipy_sparse_array(_symmetric(A, 5))
    return sum(sum(nx.triangles(graph.subgraph(nodes)).values()) / 3 for nodes in _classes())


def _graph(x=X, k=3, symmetrize="mean"):
    return repgraph.knn_graph(x, k, symmetrize=symmetrize)


OUT = X + 0.4 * Y[:, :8]  # of a residual block with the input X


def _angles():
    return [np.arccos(1 - scipy.spatial.distance.cosine(a, b)) / np.pi for a, b in zip(A, OUT.numpy(), strict=True)]


def _redundancy():
    """Change, neighbours of the last representation and all other ordered pairs, on full distance matrices."""
    near = np.zeros((N, N), bool)
    np.put_along_axis(near, _knn(B, 5, "cosine")[1], True, axis=1)
    others = ~near & ~np.eye(N, dtype=bool)
    ends = (OUT.numpy() - A, OUT.numpy())
    moved, at_y = (scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(x, "sqeuclidean")) for x in ends)
    among, beside = at_y[near].mean(), at_y[others].mean() - at_y[near].mean()
    turned = np.mean([scipy.spatial.distance.cosine(a, b) for a, b in zip(A, OUT.numpy(), strict=True)])
    return float((turned * moved[near].mean() / (among * beside) ** 0.5) ** 0.5)


def _drifting():
    """Six layers that drift away from X, and their linear CKA."""
    layers = {str(i): torch.cos(i / 3 * X) + X for i in range(6)}
    return layers, repgraph.between_layers(ours.linear_cka, layers, permutations=0, progress=False)


def _inertia():
    """Squared deviations of the normalised centred Gram matrices from the means of the runs, as k-means counts them."""
    from sklearn.cluster import KMeans

    grams = []
    for x in _drifting()[0].values():
        gram = (x - x.mean(0)).numpy() @ (x - x.mean(0)).numpy().T
        grams.append((gram / np.linalg.norm(gram)).ravel())
    return min(
        sum(KMeans(1, n_init=1).fit(part).inertia_ for part in (grams[:i], grams[i:j], grams[j:]))
        for i in range(1, 5)
        for j in range(i + 1, 6)
    )


MAPS = np.maximum(np.random.default_rng(1).normal(size=(40, 12, 12)), 0)
GATES = X[:, :8] > X[:, :8].median()
LINES = (Y[:12, :2] / Y[:12, :2].norm(dim=1, keepdim=True), 0.4 + X[:12, 0].abs() / 4)


def _birth_rips(u):
    """First birth of a 1-cycle when distances are the ranks of the weights, by gudhi."""
    import gudhi

    tree = gudhi.RipsComplex(distance_matrix=_ranks(u)).create_simplex_tree(max_dimension=2)
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=True)
    bars = tree.persistence_intervals_in_dimension(1)
    return bars[:, 0].min() if len(bars) else 0


def _birth_ripser(u):
    from ripser import ripser

    bars = ripser(_ranks(u), maxdim=1, distance_matrix=True)["dgms"][1]
    return bars[:, 0].min() if len(bars) else 0


def _ranks(u):
    weight = np.maximum(u, u.T)
    upper = np.triu_indices(len(u), 1)
    ranks = np.zeros_like(weight)
    ranks[upper] = np.unique(-weight[upper], return_inverse=True)[1] + 1
    return ranks + ranks.T


def _births():
    return feature_entropy.feature_birth(MAPS, density=1.0)


def _birth_entropy():
    births = _births().numpy()
    return float(scipy.stats.entropy(np.unique(births[births > 0], return_counts=True)[1]))


def _kernel_entropy(gates, lam=0.01):
    """Log density at the gates themselves, by scikit-learn, freed of the Gaussian's normalisation."""
    from sklearn.neighbors import KernelDensity

    d = gates.shape[1]
    density = KernelDensity(bandwidth=(lam * d) ** 0.5).fit(gates).score_samples(gates)
    return float(-(density + d / 2 * np.log(2 * np.pi * lam * d)).mean() / np.log(2))


def _label_information():
    from sklearn.metrics import mutual_info_score

    codes = np.unique(GATES.numpy(), axis=0, return_inverse=True)[1].ravel()
    return mutual_info_score(LABELS, codes) / np.log(2)


def _single_gates():
    rates = GATES.double().mean(0).numpy()
    return float(scipy.stats.entropy(np.stack((rates, 1 - rates)), base=2).sum())


def _centre_cell():
    w, b = LINES
    net = torch.nn.Sequential(torch.nn.Linear(2, 12), torch.nn.ReLU()).double().eval()
    net[0].weight.data, net[0].bias.data = w, b
    box = [[-2, -2], [2, -2], [2, 2], [-2, 2]]
    cells = spline.slice_partition(net, torch.zeros(2, dtype=torch.float64), torch.eye(2), box, progress=False)
    centre = int((cells.codes == 1).all(1).nonzero())  # all biases are positive: the origin is on every unit's side
    return float(cells.areas[centre])


def _centre_cell_by_halfspaces():
    w, b = (part.numpy() for part in LINES)
    box = np.concatenate((np.eye(2), -np.eye(2)))
    halfspaces = np.vstack((np.c_[-w, -b], np.c_[box, np.full(4, -2.0)]))
    corners = scipy.spatial.HalfspaceIntersection(halfspaces, np.zeros(2)).intersections
    return float(scipy.spatial.ConvexHull(corners).volume)


def _unit_redundancy():
    layer = torch.nn.Linear(8, 60).double()
    layer.weight.data, layer.bias.data = X, torch.zeros(60, dtype=torch.float64)
    return float(spline.unit_redundancy(layer).mean())


CHANNELS = torch.relu(torch.from_numpy(np.random.default_rng(3).normal(size=(4, 6, 5, 5)))) * (torch.arange(5) < 4)


def _independence():
    """Nuclear norms with and without each channel, of the first image after the other."""
    total = 0.0
    for image in CHANNELS.flatten(2).numpy():
        whole = np.linalg.norm(image, "nuc")
        total += sum(whole - np.linalg.norm(np.delete(image, j, 0), "nuc") for j in range(len(image)))
    return total / len(CHANNELS)


def _rectified():
    """By numerical integration over the density's upper part."""
    pairs = zip(A[:, 0], np.abs(B[:, 0]), strict=True)
    return sum(scipy.integrate.quad(lambda t, b=b, g=g: t * scipy.stats.norm.pdf(t, b, g), 0, max(0, b) + 12 * g,
               points=[max(0, b)])[0] if g > 1e-9 else max(b, 0.0) for b, g in pairs)  # fmt: skip


ROWS = [
    Row("modularity, k = 3", lambda: repgraph.modularity(_graph(), LABELS), ("sklearn", "networkx"),
        lambda: nx.community.modularity(nx.from_scipy_sparse_array(_symmetric(A, 3)), _classes())),
    Row("modularity, k = 3", lambda: repgraph.modularity(_graph(), LABELS), ("sklearn", "igraph"), _igraph_modularity),
    Row("modularity, resolution 0.5", lambda: repgraph.modularity(_graph(), LABELS, resolution=0.5),
        ("sklearn", "networkx"),
        lambda: nx.community.modularity(nx.from_scipy_sparse_array(_symmetric(A, 3)), _classes(), resolution=0.5)),
    Row("signed modularity, all cosines", _bct_ours, ("bct",), _bct_modularity),
    Row("label agreement, union graph", lambda: repgraph.label_agreement(_graph(symmetrize="union"), LABELS),
        ("sklearn", "networkx"),
        lambda: nx.community.modularity(
            nx.from_scipy_sparse_array(_cosine_graph(A, 3).maximum(_cosine_graph(A, 3).T)), _classes(), resolution=0)),
    Row("class separation", lambda: repgraph.class_separation(X, LABELS), ("scipy",), _class_separation),
    Row("mean cosine to 5 nearest", lambda: float(repgraph.graph.knn(X, 5)[0].mean()), ("sklearn",),
        lambda: float(1 - _knn(A, 5, "cosine")[0].mean())),
    Row("mean distance to 5 nearest", lambda: float(repgraph.graph.knn(X, 5, metric="euclidean")[0].mean()),
        ("sklearn",), lambda: float(_knn(A, 5, "euclidean")[0].mean())),
    Row("edges within distance 3", lambda: float(repgraph.threshold_graph(X, 3.0, metric="euclidean").num_edges),
        ("sklearn",), lambda: radius_neighbors_graph(A, 3.0).nnz / 2),
    Row("GBS, k = 5", lambda: ours.gbs(X, Y), ("sklearn",), lambda: _gbs(5)),
    Row("GBS, dense", lambda: ours.gbs(X, Y, k=None), ("sklearn",), _dense_gbs),
    Row("mutual kNN, k = 10", lambda: ours.mutual_knn(X, Y), ("sklearn",), lambda: _mutual_knn(10)),
    Row("CKNNA, k = 10", lambda: ours.cknna(X, Y), ("ckatorch",), lambda: _cknna(10)),
    Row("linear CKA", lambda: ours.linear_cka(X, Y), ("ckatorch",), _cka),
    Row("unbiased linear CKA", lambda: ours.linear_cka(X, Y, unbiased=True), ("ckatorch",),
        lambda: _cka(unbiased=True, method="fro_norm")),
    Row("unbiased linear CKA", lambda: ours.linear_cka(X, Y, unbiased=True), ("cka",), _pytorch_cka),
    Row("unbiased HSIC", lambda: ours.hsic(X, Y), ("ckatorch",), lambda: _hsic(A @ A.T, B @ B.T, True)),
    Row("biased HSIC", lambda: ours.hsic(X, Y, unbiased=False), ("ckatorch",),
        lambda: _hsic(A @ A.T, B @ B.T, False)),
    Row("Gaussian CKA", lambda: ours.rbf_cka(X, Y), ("sklearn", "ckatorch"), _rbf),
    Row("minibatch CKA, 4 x 15", lambda: ours.minibatch_cka(X, Y, batch_size=15), ("ckatorch",), _minibatch),
    Row("Procrustes, angular", lambda: ours.procrustes(X, Y), ("scipy",), lambda: float(np.arccos(_nuclear()))),
    Row("Procrustes, Ding", lambda: ours.procrustes(X, Y, kind="ding"), ("scipy",), lambda: 2 - 2 * _nuclear()),
    Row("CCA, mean correlation", lambda: ours.svcca(X, Y, variance=1), ("scipy",), _mean_rho),
    Row("SVCCA, 99% of variance", lambda: ours.svcca(X, Y), ("scipy",), _svcca),
    Row("RSA, Euclidean, Spearman", lambda: ours.rsa(X, Y), ("rsatoolbox",), lambda: _rsa("euclidean", "spearman")),
    Row("RSA, squared Euclidean, Pearson", lambda: ours.rsa(X, Y, rdm="sqeuclidean", compare="pearson"),
        ("rsatoolbox",), lambda: _rsa("euclidean", "corr")),
    Row("RSA, correlation, Spearman", lambda: ours.rsa(X, Y, rdm="correlation"), ("rsatoolbox",),
        lambda: _rsa("correlation", "spearman")),
    Row("RSA, squared Euclidean, cosine", lambda: ours.rsa(X, Y, rdm="sqeuclidean", compare="cosine"),
        ("rsatoolbox",), lambda: _rsa("euclidean", "cosine")),
    Row("RTD", lambda: ours.rtd(X, Y), ("ripser",), _rtd),
    Row("block influence", lambda: block_influence(X, OUT), ("sklearn",),
        lambda: float(paired_cosine_distances(A, OUT.numpy()).mean())),
    Row("angular distance", lambda: angular_distance(X, OUT), ("scipy",), lambda: float(np.mean(_angles()))),
    Row("relative residual", lambda: relative_residual(X, OUT), ("sklearn",),
        lambda: float((paired_euclidean_distances(A, OUT.numpy()) / np.linalg.norm(A, axis=1)).mean())),
    Row("redundancy, k = 5", lambda: redundancy(X, OUT, Y), ("sklearn", "scipy"), _redundancy),
    Row("cost of 6 layers in 3 runs", lambda: repgraph.segment_layers(_drifting()[1], 3).cost, ("sklearn",), _inertia),
    Row("triangles, k = 5", lambda: float(sum(ours.triangle_motifs(_graph(k=5), LABELS))), ("networkx",), _triangles),
    Row("triangles of one class, k = 5", lambda: float(ours.triangle_motifs(_graph(k=5), LABELS).type1),
        ("networkx",), _type1),
    Row("mean birth of 40 maps", lambda: float(_births().double().mean()), ("gudhi",),
        lambda: float(np.mean([_birth_rips(u) for u in MAPS]))),
    Row("mean birth of 40 maps", lambda: float(_births().double().mean()), ("ripser",),
        lambda: float(np.mean([_birth_ripser(u) for u in MAPS]))),
    Row("feature entropy", lambda: float(feature_entropy.feature_entropy(_births()).entropy), ("scipy",),
        _birth_entropy),
    Row("gate entropy, kernel", lambda: complexity.gate_entropy(GATES), ("sklearn",), lambda: _kernel_entropy(GATES)),
    Row("gate entropy, plug-in", lambda: complexity.gate_entropy(GATES, estimator="plugin"), ("scipy",),
        lambda: float(scipy.stats.entropy(np.unique(GATES, axis=0, return_counts=True)[1], base=2))),
    Row("label information, plug-in",
        lambda: complexity.gate_label_information(GATES, LABELS, estimator="plugin"), ("sklearn",), _label_information),
    Row("entropies of single gates", lambda: complexity.activation_cross_entropy(GATES), ("scipy",), _single_gates),
    Row("area of one cell of 12 lines", _centre_cell, ("scipy",), _centre_cell_by_halfspaces),
    Row("partition distance", lambda: spline.partition_distance(GATES[:30], GATES[30:]), ("scipy",),
        lambda: float(np.mean([scipy.spatial.distance.hamming(GATES[i], GATES[30 + i]) for i in range(30)]))),
    Row("unit redundancy, no biases", _unit_redundancy, ("sklearn",),
        lambda: float((1 - np.abs(cosine_similarity(A))).mean())),
    Row("channel independence (CHIP)", lambda: float(channel_independence(CHANNELS).sum()), ("numpy",), _independence),
    Row("mean rank of maps (HRank)", lambda: float(feature_rank(CHANNELS).mean()), ("numpy",),
        lambda: float(np.linalg.matrix_rank(CHANNELS.numpy()).mean())),
    Row("similarity of maps (Central Filter)", lambda: float(map_similarity(CHANNELS).mean()), ("numpy",),
        lambda: float(np.mean([np.corrcoef(one) for one in CHANNELS.flatten(2).numpy()]))),
    Row("mean of a rectified normal (FSM)", lambda: float(relu_gaussian_mean(X[:, 0], Y[:, 0]).sum()), ("scipy",),
        _rectified),
]  # fmt: skip
