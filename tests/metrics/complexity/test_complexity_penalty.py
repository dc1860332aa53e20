"""The complexity penalty against the entropy of soft gates and energies by hand, and what training with it does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from repgraph.metrics.complexity import ComplexityPenalty, EnergyNetwork, gate_entropy, gate_log_probability
from repgraph.metrics.complexity.penalty import soft_gate_entropy

seeds = st.integers(0, 2**32 - 1)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(a, b, seed=0, dtype=torch.float32):
    layer = nn.Linear(a, b, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(noise(b, a, seed=seed, dtype=dtype) / a**0.5)
        layer.bias.copy_(noise(b, seed=seed + 1, dtype=dtype) / a**0.5)
    return layer


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def network(inplace=False):
    return nn.Sequential(linear(6, 9), nn.ReLU(inplace), linear(9, 4, 5), nn.ReLU(inplace), linear(4, 2, 9))


def plain_log_q(s, p):
    return torch.log(s * (2 * p - 1) - p + 1 + 1e-5)


# Kernel estimate


@given(seeds, st.sampled_from([0.5, 10.0, 100.0]), st.sampled_from([0.01, 0.04, 0.5]))
@settings(max_examples=20)
def test_value_is_the_entropy_of_the_soft_gates(seed, beta, lam):
    layer, x = linear(5, 7, seed % 1000, torch.float64), noise(12, 5, seed=seed, dtype=torch.float64)
    with ComplexityPenalty(layer, beta=beta, lam=lam) as penalty:
        layer(x)
        value = penalty()
    expected = gate_entropy(torch.sigmoid(beta * layer(x)), lam=lam)
    assert value.item() == pytest.approx(expected, abs=1e-10)
    assert (value.shape, value.dtype) == ((), torch.float64)


def test_sum_over_layers_of_relus_and_others():
    model, x = network(), noise(10, 6)
    with ComplexityPenalty([model[1], model[2]], beta=3.0, lam=0.02) as penalty:
        out = model(x)
        value = penalty()
    z = [model[:1](x), model[:3](x)]
    expected = sum(gate_entropy(torch.sigmoid(3 * part), lam=0.02) for part in z)
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(out, model(x))


def test_relu_and_the_layer_before_it_give_the_same_gates():
    x = noise(10, 6)
    for inplace in (False, True):
        model = network(inplace)
        values = []
        for layer in (model[0], model[1]):
            with ComplexityPenalty(layer) as penalty:
                model(x)
                values.append(penalty().item())
        assert values[0] == values[1]
        assert values[0] == pytest.approx(gate_entropy(torch.sigmoid(10 * model[0](x)), lam=0.04), abs=1e-5)


def test_gates_of_a_convolution_are_its_channels_and_positions():
    layer, x = nn.Conv2d(2, 3, 2, dtype=torch.float64), noise(6, 2, 4, 4, dtype=torch.float64)
    with ComplexityPenalty(layer, lam=0.1) as penalty:
        z = layer(x)
        value = penalty()
    assert value.item() == pytest.approx(gate_entropy(torch.sigmoid(10 * z).flatten(1), lam=0.1), abs=1e-10)


def test_each_forward_pass_since_the_last_call_counts_by_itself():
    layer, x = linear(5, 7), noise(12, 5)
    with ComplexityPenalty(layer) as penalty:
        layer(x[:5])
        layer(x[5:])
        both = penalty().item()
        layer(x[:5])
        first = penalty().item()
    parts = [gate_entropy(torch.sigmoid(10 * layer(part)), lam=0.04) for part in (x[:5], x[5:])]
    assert both == pytest.approx(sum(parts), abs=1e-5)
    assert first == pytest.approx(gate_entropy(torch.sigmoid(10 * layer(x[:5])), lam=0.04), abs=1e-5)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_gradient(beta):
    x = noise(5, 3, dtype=torch.float64)

    def value(weight, bias):
        layer = nn.Identity()
        with ComplexityPenalty(layer, beta=beta, lam=0.3) as penalty:
            layer(x @ weight.T + bias)
            return penalty()

    weight = noise(4, 3, seed=1, dtype=torch.float64).requires_grad_()
    bias = noise(4, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(value, (weight, bias))


@given(seeds)
@settings(max_examples=10)
def test_soft_gate_entropy_gradient(seed):
    s = torch.rand(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_gate_entropy(s, 0.2), (s,))


def test_equal_samples_have_a_finite_gradient():
    layer = linear(5, 7)
    with ComplexityPenalty(layer) as penalty:
        layer(noise(1, 5).expand(6, 5))
        value = penalty()
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(("z", "slope"), [(0.0, 25), (0.02, 10.5), (0.05, 0.66), (0.1, 0.0045)])
def test_slope_of_steep_gates(z, slope):
    """Of the entropy of two samples, one of them fixed, with a kernel so wide that it is a square distance."""
    z = torch.tensor([[z], [-1.0]], dtype=torch.float64, requires_grad=True)
    layer, lam = nn.Identity(), 1e6
    with ComplexityPenalty(layer, beta=100.0, lam=lam) as penalty:
        layer(z)
        value = penalty()
    value.backward()
    s = torch.sigmoid(100 * z.detach()[0]).item()
    by_gate = 2 * s / (2 * lam) / 2 / math.log(2)  # of -log2((1 + exp(-s^2 / 2 lam)) / 2), to first order
    assert z.grad[0].item() / by_gate == pytest.approx(slope, rel=0.02)


def test_training_closes_the_gates():
    """200 steps of Adam on a 16 -> 32 layer: hard entropy falls from about 6.5 bits to 0."""
    layer, x = linear(16, 32), noise(128, 16, seed=3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    before = gate_entropy(layer(x) > 0, lam=0.04)
    with ComplexityPenalty(layer) as penalty:
        for _ in range(200):
            layer(x)
            optimizer.zero_grad()
            penalty().backward()
            optimizer.step()
    assert 5.8 < before < 7
    assert gate_entropy(layer(x) > 0, lam=0.04) < 0.05


def test_autocast_does_not_round_the_distances():
    gates = torch.sigmoid(noise(32, 20) * 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_gate_entropy(gates, 0.01).item()
    assert found == pytest.approx(gate_entropy(gates, lam=0.01), abs=1e-3)


# Energies


@pytest.mark.parametrize(("gate", "expected"), [(0.0, -0.356661), (1.0, -1.203939), (0.5, -0.693127)])
def test_log_probability_by_hand(gate, expected):
    found = gate_log_probability(torch.tensor(gate, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, abs=1e-6)


@given(seeds)
def test_log_probability_of_hard_gates_is_that_of_coins(seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(6, generator=generator, dtype=torch.float64)
    s = (torch.rand(9, 6, generator=generator) < 0.5).double()
    expected = torch.where(s == 1, p, 1 - p)
    torch.testing.assert_close(gate_log_probability(s, p).exp(), expected + 1e-5, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2)])
def test_energy_is_minus_network_minus_log_probability(shape):
    torch.manual_seed(0)
    energy = EnergyNetwork(4).eval()
    s = torch.sigmoid(noise(*shape))
    energy.rates.copy_(torch.tensor([0.1, 0.3, 0.5, 0.9]))
    f = s.reshape(5, 4, -1)
    for i in range(0, 18, 3):
        convolution, norm = energy.convolutions[i], energy.convolutions[i + 1]
        f = torch.einsum("oc,bcp->bop", convolution.weight[:, :, 0], f) + convolution.bias[:, None]
        f = (f * norm.weight[:, None] / math.sqrt(1 + norm.eps) + norm.bias[:, None]).relu()
    f = 0.004 * (f.sum(2) @ energy.linear.weight.T + energy.linear.bias)[:, 0]
    log_q = plain_log_q(s.reshape(5, 4, -1), energy.rates[:, None]).sum((1, 2))
    torch.testing.assert_close(energy.network(s), f, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(energy(s), -f - log_q, atol=1e-4, rtol=1e-5)
    widths = [m.out_channels for m in energy.convolutions if isinstance(m, nn.Conv1d)]
    assert widths == [32, 64, 128, 256, 512, 512]


def test_running_rates_by_hand():
    energy = EnergyNetwork(2)
    assert energy.rates.tolist() == [0.5, 0.5]
    energy.update(torch.tensor([[0.5, 0.2], [0.9, 0.6], [0.1, 0.0], [1.0, 0.49]]))
    assert energy.rates.tolist() == pytest.approx([0.9 * 0.5 + 0.1 * 0.75, 0.9 * 0.5 + 0.1 * 0.25])
    energy.update(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))
    assert energy.rates.tolist() == pytest.approx([0.9 * 0.525 + 0.05, 0.9 * 0.475])
    assert not energy.rates.requires_grad


def zero_network(penalty):
    """f = 0, so that the energy is - log q."""
    for energy in penalty.energies.values():
        nn.init.zeros_(energy.linear.weight)
        nn.init.zeros_(energy.linear.bias)


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 3, 4, 2)])
def test_penalty_is_the_mean_energy_per_position(shape):
    layer, z = nn.Identity(), noise(*shape) / 5
    with ComplexityPenalty(layer, kind="ebm", beta=4.0) as penalty:
        layer(z)
        penalty()
        zero_network(penalty)
        layer(z)
        value = penalty().item()
    s = torch.sigmoid(4 * z).reshape(8, 3, -1)
    now = (s >= 0.5).float().mean((0, 2))
    rates = 0.81 * 0.5 + 0.19 * now
    expected = -plain_log_q(s, rates[:, None]).sum((1, 2)).mean() / s.shape[2]
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(penalty.energies[0, 0].rates, rates)


def test_penalty_of_several_layers_is_their_sum():
    model, x = network(), noise(12, 6)
    with ComplexityPenalty([model[1], model[3]], kind="ebm") as penalty:
        model(x)
        penalty()
        zero_network(penalty)
        model(x)
        value = penalty().item()
    a = model[0](x)
    b = model[2](a * torch.sigmoid(10 * a))
    expected = 0
    for z in (a, b):
        s = torch.sigmoid(10 * z)
        expected -= plain_log_q(s, 0.405 + 0.19 * (s >= 0.5).float().mean(0)).sum(1).mean().item()
    assert value == pytest.approx(expected, rel=1e-5)
    assert sorted(penalty.energies) == [(0, 0), (1, 0)]
    counts = [sum(p.numel() for p in energy.parameters()) for energy in penalty.energies.values()]
    assert sum(p.numel() for p in penalty.parameters()) == sum(counts)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["ebm", "kde"])
def test_output_of_relu_inside_and_after_the_block(kind, inplace):
    relu, z = nn.ReLU(inplace), noise(8, 5) / 5
    soft = z * torch.sigmoid(10 * z)
    with ComplexityPenalty(relu, kind=kind):
        found = relu(z.clone())
        torch.testing.assert_close(found, soft if kind == "ebm" else z.relu())
    assert torch.equal(relu(z.clone()), z.relu())


def test_output_of_other_layers_is_left_alone():
    layer, x = linear(5, 7), noise(4, 5)
    with ComplexityPenalty(layer, kind="ebm"):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_through_the_soft_output(inplace):
    model, x = network(inplace), noise(8, 6)
    with ComplexityPenalty([model[1], model[3]], kind="ebm", beta=2.0):
        model(x).square().sum().backward()
    found = model[0].weight.grad.clone()
    model.zero_grad()
    h = model[0](x)
    h = model[2](h * torch.sigmoid(2 * h))
    model[4](h * torch.sigmoid(2 * h)).square().sum().backward()
    torch.testing.assert_close(found, model[0].weight.grad, rtol=1e-4, atol=1e-5)


def test_penalty_has_gradients_to_the_layer():
    layer = linear(5, 7)
    with ComplexityPenalty(layer, kind="ebm", beta=1.0) as penalty:
        layer(noise(9, 5))
        penalty().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_networks_of_double_gates():
    layer, x = linear(5, 7, dtype=torch.float64), noise(9, 5, dtype=torch.float64)
    with ComplexityPenalty(layer, kind="ebm") as penalty:
        layer(x)
        penalty().backward()
        assert penalty.energy_loss().isfinite()
    assert layer.weight.grad.isfinite().all()


def test_energy_loss_falls_when_it_is_minimised():
    torch.manual_seed(0)
    layer, z = nn.Identity(), noise(64, 6).sign()
    with ComplexityPenalty(layer, kind="ebm", tau=0.1) as penalty:
        layer(z)
        penalty()
        optimizer = torch.optim.Adam(penalty.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            layer(z)
            penalty()
            loss = penalty.energy_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_energy_loss_is_the_rise_of_the_network_along_langevin_steps():
    """One step: gates - tau / 2 slope + sqrt(tau) noise."""
    torch.manual_seed(0)
    layer, z = nn.Identity(), noise(8, 3)
    with ComplexityPenalty(layer, kind="ebm", tau=0.01, steps=1, seed=5) as penalty:
        layer(z)
        penalty()
    energy = penalty.energies[0, 0].eval()
    real = torch.sigmoid(10 * z).requires_grad_()
    (slope,) = torch.autograd.grad(energy(real).sum(), real)
    fake = real - 0.005 * slope + 0.1 * noise(8, 3, seed=5)
    expected = (energy.network(fake) - energy.network(real)).mean()
    assert penalty.energy_loss().item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-8)


def test_energy_loss_leaves_the_layer_without_gradient():
    layer = linear(5, 7)
    with ComplexityPenalty(layer, kind="ebm") as penalty:
        layer(noise(9, 5))
        penalty()
        penalty.energy_loss().backward()
    assert layer.weight.grad is None
    assert all(p.grad is not None for p in penalty.parameters())


# Hooks


@pytest.mark.parametrize("kind", ["kde", "ebm"])
def test_hooks_go_with_the_block(kind):
    model = network()
    penalty = ComplexityPenalty([model[0], model[1], model[3]], kind=kind)
    assert hooks(model) == 0
    for _ in range(2):
        with penalty:
            assert hooks(model) > 0
            model(noise(8, 6))
            assert penalty().isfinite()
        assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), penalty:
        model(noise(8, 7))
    assert hooks(model) == 0
    with penalty, pytest.raises(ValueError, match="has not run"):
        penalty()


@pytest.mark.parametrize("kind", ["kde", "ebm"])
def test_relu_called_by_keyword(kind):
    relu, z = nn.ReLU(), noise(8, 5)
    with ComplexityPenalty(relu, kind=kind) as penalty:
        relu(input=z)
        assert penalty().isfinite()


# Bad input


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {}, "layers must be one or more nn.Module"),
        (["1"], {}, "layers must be one or more nn.Module"),
        ([nn.ReLU(), None], {}, "layers must be one or more nn.Module"),
        (nn.ReLU(), {"kind": "mine"}, "kind must be 'kde' or 'ebm', got 'mine'"),
        (nn.ReLU(), {"beta": -1.0}, "beta must be positive, got -1.0"),
        (nn.ReLU(), {"beta": math.nan}, "beta must be positive"),
        (nn.ReLU(), {"lam": 0}, "lam must be positive, got 0"),
        (nn.ReLU(), {"tau": 0.0}, "tau must be positive"),
        (nn.ReLU(), {"steps": 0}, "steps must be positive"),
    ],
)
def test_bad_options(layers, options, message):
    with pytest.raises(ValueError, match=message):
        ComplexityPenalty(layers, **options)


@pytest.mark.parametrize("kind", ["kde", "ebm"])
def test_nothing_has_run(kind):
    model = network()
    with ComplexityPenalty([model[1], model[3]], kind=kind) as penalty:
        with pytest.raises(ValueError, match=r"layers\[0\] \(ReLU\) has not run since the last call"):
            penalty()
        model[:2](noise(8, 6))
        with pytest.raises(ValueError, match=r"layers\[1\] \(ReLU\) has not run"):
            penalty()
        model(noise(8, 6))
        penalty()
        with pytest.raises(ValueError, match="has not run since the last call"):
            penalty()


@pytest.mark.parametrize("kind", ["kde", "ebm"])
def test_one_sample_is_refused(kind):
    layer = linear(5, 7)
    with ComplexityPenalty(layer, kind=kind) as penalty:
        layer(noise(1, 5))
        with pytest.raises(ValueError):  # noqa: PT011
            penalty()


def test_energy_loss_needs_an_energy():
    layer = linear(5, 7)
    with ComplexityPenalty(layer) as penalty:
        layer(noise(8, 5))
        penalty()
        with pytest.raises(ValueError, match="energy_loss needs kind='ebm'"):
            penalty.energy_loss()
    assert list(penalty.parameters()) == []
    with pytest.raises(ValueError, match="a call of the penalty before it"):
        ComplexityPenalty(layer, kind="ebm").energy_loss()


def test_soft_gate_entropy_stays_on_cuda():
    with FakeTensorMode():
        found = soft_gate_entropy(torch.empty(6, 20, device="cuda"), 0.04)
        assert (found.device.type, found.shape) == ("cuda", ())


@pytest.mark.parametrize("module", [nn.Hardtanh(), nn.ReLU6(), nn.Threshold(0.1, 0.0), nn.Hardsigmoid()])
def test_layers_whose_kink_is_not_at_zero_are_refused(module):
    with pytest.raises(ValueError, match=f"gates of {type(module).__name__} are not at 0"):
        ComplexityPenalty([nn.ReLU(), module])


def test_a_relu_that_runs_twice_counts_twice():
    relu, wide, narrow = nn.ReLU(), noise(9, 6), noise(9, 4, seed=1)
    with ComplexityPenalty(relu) as penalty:
        relu(wide)
        relu(narrow)
        both = penalty().item()
    parts = [gate_entropy(torch.sigmoid(10 * z), lam=0.04) for z in (wide, narrow)]
    assert both == pytest.approx(sum(parts), abs=1e-5)
