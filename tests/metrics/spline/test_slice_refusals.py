"""What slices refuse, and that the model comes out as it was."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from piecewise import BOX, Net, cells, draw, filled, mlp
from torch import nn

from repgraph.metrics.spline import region_codes, segment_regions


def gated(f, width=4, **modules):
    """f of a first layer with a gate in front."""
    return filled(Net(lambda n, x: f(n, n.gate(n.lin(x))), lin=nn.Linear(2, width), gate=nn.ReLU(), **modules))


@pytest.mark.parametrize(
    ("module", "name"),
    [(nn.GELU(), "gelu"), (nn.Tanh(), "tanh"), (nn.Softmax(1), "softmax"), (nn.LayerNorm(4), "native_layer_norm"),
     (nn.SiLU(), "silu"), (nn.Sigmoid(), "sigmoid"), (nn.ELU(), "elu"), (nn.Softplus(), "softplus")],
)  # fmt: skip
def test_smooth_functions_are_named(module, name):
    net = filled(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), module))
    with pytest.raises(ValueError, match=f"layer '3' calls {name}, which is not piecewise affine"):
        cells(net)


@pytest.mark.parametrize(
    ("net", "name"),
    [(nn.AdaptiveMaxPool2d(2), "adaptive_max_pool2d"), (nn.MaxPool3d(1), "max_pool3d_with_indices")],
    ids=["adaptive", "3-D"],
)
def test_other_poolings_are_named(net, name):
    shape = (1, 1, 4, 4)[-4 if "3d" in name else -3 :]
    net = Net(lambda n, x: n.pool(n.gate(n.lin(x)).view(-1, *shape)), lin=nn.Linear(2, 16), gate=nn.ReLU(), pool=net)
    with pytest.raises(ValueError, match=f"layer 'pool' calls {name}, which is not supported here"):
        cells(filled(net))


@pytest.mark.parametrize("weights", [True, False])
def test_attention_is_named(weights):
    def f(n, h):
        h = h.view(-1, 2, 4)
        return n.attention(h, h, h, need_weights=weights)[0]

    net = gated(f, 8, attention=nn.MultiheadAttention(4, 2, batch_first=True))
    with pytest.raises(ValueError, match=r"layer 'attention' calls .*(softmax|attention).*not piecewise affine"):
        cells(net)


@pytest.mark.parametrize(
    "f",
    [
        lambda n, h: h * h,
        lambda n, h: (h - 0.3).abs(),
        lambda n, h: torch.maximum(h, h.flip(1)),
        lambda n, h: h / (1 + h.sum(1, keepdim=True)),
        lambda n, h: h.clamp(max=0.2),
        lambda n, h: h.sort(1).values,
        lambda n, h: F.softshrink(h, 0.1),
        lambda n, h: F.normalize(h + 1),
        lambda n, h: h - h.mean(0),
    ],
    ids=["square", "abs", "maximum", "ratio", "clamp max", "sort", "shrink", "norm", "batch mean"],
)
def test_what_is_not_affine_is_refused(f):
    net = gated(f, 6)
    with pytest.raises(ValueError, match="not affine between its gates"):
        cells(net, 3 * BOX)


def test_control_flow_by_values_is_refused():
    with pytest.raises(ValueError, match=r"cannot be followed .control flow"):
        cells(gated(lambda n, h: h if h.sum() > 0.5 else -h, 6), 3 * BOX)


def test_a_bend_beside_the_middle_is_refused():
    """|u1 + 1/2| is affine near the origin, at (1, 0) and at (0, 1), where it is measured, but not on the box."""
    net = Net(lambda n, x: torch.cat((n.gate(x + 3), (x[:, :1] + 0.5).abs()), 1), gate=nn.ReLU()).eval()
    with pytest.raises(ValueError, match="not affine"):
        cells(net)


def test_models_without_cells_are_refused():
    with pytest.raises(ValueError, match="calls no ReLU-like function"):
        cells(nn.Linear(2, 3).eval())
    for part in (None, 2):
        net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(3)).eval()
        (net if part is None else net[part]).train()
        with pytest.raises(ValueError, match="model must be in eval mode"):
            cells(net)
    pool = nn.Sequential(nn.Unflatten(1, (1, 1, 2)), nn.ReLU(), nn.MaxPool2d((1, 2), ceil_mode=True)).eval()
    with pytest.raises(ValueError, match="ceil_mode"):
        cells(pool)


@pytest.mark.parametrize(
    "domain",
    [
        BOX[[0, 1, 3, 2]],  # crosses itself
        BOX[:2],
        BOX[[0, 1, 1, 2, 3]],
        [[-1, -1], [1, -1], [0, 0], [1, 1]],  # a dent
        [[0, 0], [1, 0], [2, 0], [0, 1]],  # a flat corner
        [[0, 0], [1, 1], [2, 2]],
        [[np.cos(4 * np.pi * k / 5), np.sin(4 * np.pi * k / 5)] for k in range(5)],  # a star
        np.concatenate((BOX, BOX)),  # twice around
        BOX * np.nan,
        np.zeros((4, 3)),
    ],
)
def test_domains_that_are_not_convex_are_refused(domain):
    with pytest.raises(ValueError, match="domain must be"):
        cells(mlp([2, 3, 2]), domain)


def test_planes_that_are_none_are_refused():
    net, origin = mlp([3, 3, 2]), draw(3)
    for basis, message in (
        (torch.stack((origin, 2 * origin)), "basis must be two independent directions"),
        (torch.stack((origin, 0 * origin)), "basis must be two independent directions"),
        (torch.zeros(2, 3), "basis must be two independent directions"),
        (draw(2, 2), r"basis must have shape \(2, 3\), got \(2, 2\)"),
        (draw(3, 3), r"basis must have shape \(2, 3\), got \(3, 3\)"),
        (draw(2, 3) / 0, "origin and basis must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            cells(net, BOX, origin, basis)
    with pytest.raises(ValueError, match=r"real numbers, got inputs of torch.int64"):
        cells(net, BOX, torch.zeros(3, dtype=torch.int64), torch.eye(3)[:2])


def state(net):
    return (
        [(k, v.dtype, v.clone(), v._version) for k, v in net.state_dict(keep_vars=True).items()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()],
        torch.backends.mha.get_fastpath_enabled(),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_model_comes_out_as_it_was(dtype, fails):
    net = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    net = filled(net.append(nn.Tanh() if fails else nn.PReLU())).to(dtype)
    before = state(net)
    for call in (lambda: cells(net), lambda: segment_regions(net, torch.zeros(2), torch.ones(2))):
        if fails:
            with pytest.raises(ValueError, match="tanh"):
                call()
        else:
            assert call().count > 1
    after = state(net)
    assert before[1:] == after[1:]
    for (k, t, v, n), (key, dtype_now, value, version) in zip(before[0], after[0], strict=True):
        assert (k, t, n) == (key, dtype_now, version)
        assert torch.equal(v, value)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_the_origin_is_left_alone_by_an_in_place_gate():
    net = filled(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)))
    origin = torch.tensor([-0.3, 0.2], dtype=torch.float64)
    found = cells(net, BOX, origin)
    assert origin.tolist() == [-0.3, 0.2]
    middles = torch.from_numpy(np.array([p.mean(0) for p in found.polygons]))
    expected = (middles + torch.tensor([-0.3, 0.2]).double() > 0).to(torch.uint8)
    assert torch.equal(found.region.layer("0"), expected)


def test_a_gate_of_a_parameter_does_not_cut():
    net = filled(Net(lambda n, x: n.gate(F.linear(x, n.raw.weight.relu()) + 0.1), raw=nn.Linear(2, 3), gate=nn.ReLU()))
    plain = filled(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    plain[0].weight.data, plain[0].bias.data = (
        net.raw.weight.detach().relu(),
        torch.full((3,), 0.1, dtype=torch.float64),
    )
    assert sorted(cells(net).areas) == pytest.approx(sorted(cells(plain).areas), abs=1e-12)


def test_a_gate_whose_result_is_unused_cuts_like_its_code():
    def forward(n, x):
        n.other(x - 0.2)
        return n.gate(x)

    found = cells(Net(forward, gate=nn.ReLU(), other=nn.ReLU()).eval())
    codes = region_codes(Net(forward, gate=nn.ReLU(), other=nn.ReLU()).eval(), torch.zeros(1, 2), progress=False)
    assert list(found.region.layers) == list(codes.layers) == ["other", "gate"]
    assert found.count == 9


def test_a_randomized_gate_is_leaky_in_eval_mode():
    net = filled(nn.Sequential(nn.Linear(2, 4), nn.RReLU(0.1, 0.3), nn.Linear(4, 2)))
    leaky = nn.Sequential(net[0], nn.LeakyReLU(0.2), net[2]).eval()
    found, expected = cells(net), cells(leaky)
    assert found.count == expected.count
    assert found.forms == pytest.approx(expected.forms)


def test_an_in_place_randomized_gate_cannot_be_traced():
    net = filled(nn.Sequential(nn.Linear(2, 4), nn.RReLU(0.1, 0.3, inplace=True), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"cannot be followed .*rrelu_"):
        cells(net)


@pytest.mark.parametrize("axes", [(-1,), ()])
def test_a_single_output_without_its_axis_is_taken(axes):
    net = gated(lambda n, h: n.out(h).squeeze(*axes), out=nn.Linear(4, 1))
    kept = nn.Sequential(net.lin, net.gate, net.out).eval()
    assert cells(net).decision_boundary() == pytest.approx(cells(kept).decision_boundary())
