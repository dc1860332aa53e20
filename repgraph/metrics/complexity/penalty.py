"""A loss term that lowers the complexity of chosen layers during training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn

from repgraph.activations.forward import kept_random_state
from repgraph.activations.gates import RELU_LIKE

_MOMENTUM = 0.9
_WIDTHS = (32, 64, 128, 256, 512, 512)


class ComplexityPenalty:
    r"""Differentiable complexity of the gates of chosen layers, on the batches that run inside a ``with`` block.

    Gates are made soft, sigmoid(beta z), z the pre-activation. "kde": the sum over the layers of the estimate of
    `gate_entropy` on the soft gates of the batch, in bits; no second network (ours, not the paper's). "ebm": the sum
    over the layers of the mean energy -f(s) - log q(s) per position, f a network that is trained beside, q independent
    gates with running activation rates; the paper's complexity loss up to a constant, in nats.

    Parameters
    ----------
    layers
        Modules: of a ReLU, LeakyReLU, PReLU or RReLU the input is the pre-activation, of any other the output. Each
        call counts by itself, for a module that runs more than once.
    kind
        "kde" or "ebm".
    beta
        Steepness of the soft gates, > 0. The authors take 100, at which the gradient is 25 at z = 0 but 0.0045 at
        z = 0.1: almost all units get none.
    lam
        For "kde": kernel width as a share of the number of gates, > 0.
    tau, steps
        For "ebm": step size and number of the Langevin steps that make samples of the model.
    seed
        Of these samples, and of the weights of the networks f.

    Attributes
    ----------
    energies : dict
        For "ebm": (number of the layer, number of its call) -> `EnergyNetwork`, made when its first batch runs.

    Raises
    ------
    ValueError
        If layers is empty or holds something else, an option is out of range, or no batch has run.

    Notes
    -----
    Call the penalty once per forward pass. With "ebm" the output of a ReLU is z sigmoid(beta z) inside the block, as in
    the paper, and axis 1 of the gates is the channels; "kde" leaves the forward pass alone. At the end of the block all
    hooks are gone.

    References
    ----------
    Ren et al., "Towards Theoretical Analysis of Transformation Complexity of ReLU DNNs", ICML 2022, arXiv 2205.01940.
    Their loop updates f on every batch and adds 10^loglambda times the value to the task loss on every tenth.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with ComplexityPenalty([net[1]]) as penalty:
    ...     loss = net(torch.randn(16, 3)).square().mean() + 0.1 * penalty()
    >>> loss.backward()

    With "ebm" the networks f learn after the model's own step:

    >>> with ComplexityPenalty([net[1]], kind="ebm") as penalty:
    ...     loss = net(torch.randn(16, 3)).square().mean() + 0.1 * penalty()
    ...     loss.backward()
    ...     optimizer = torch.optim.Adam(penalty.parameters(), 1e-4)
    ...     optimizer.zero_grad()
    ...     penalty.energy_loss().backward()
    ...     optimizer.step()
    """

    def __init__(
        self,
        layers: Sequence[nn.Module] | nn.Module,
        *,
        kind: Literal["kde", "ebm"] = "kde",
        beta: float = 10.0,
        lam: float = 0.04,
        tau: float = 1e-3,
        steps: int = 5,
        seed: int = 0,
    ) -> None:
        self.layers = (
            [layers] if isinstance(layers, nn.Module) else list(layers) if isinstance(layers, Iterable) else []
        )
        if not self.layers or not all(isinstance(layer, nn.Module) for layer in self.layers):
            raise ValueError(f"layers must be one or more nn.Module, got {layers!r}")
        other = next((layer for layer in self.layers if isinstance(layer, RELU_LIKE) and not _at_zero(layer)), None)
        if other is not None:
            raise ValueError(
                f"layers: the gates of {type(other).__name__} are not at 0; choose ReLU, LeakyReLU, PReLU or RReLU, or "
                "the layer before it"
            )
        if kind not in ("kde", "ebm"):
            raise ValueError(f"kind must be 'kde' or 'ebm', got {kind!r}")
        for name, value in (("beta", beta), ("lam", lam), ("tau", tau), ("steps", steps)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        self.kind, self.beta, self.lam, self.tau, self.steps = kind, beta, lam, tau, steps
        self.energies: dict[tuple[int, int], EnergyNetwork] = {}
        self.seed = seed
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._gates: dict[tuple[int, int], Tensor] = {}  # of each call since the penalty was last taken
        self._real: dict[tuple[int, int], Tensor] = {}  # what the networks f learn from
        self._soft: Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for number, layer in enumerate(self.layers):
            if isinstance(layer, RELU_LIKE):
                before = partial(self._before, number)
                self._stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                if self.kind == "ebm" and isinstance(layer, nn.ReLU):
                    self._stack.callback(layer.register_forward_hook(lambda *_: self._soft).remove)
            else:
                self._stack.callback(layer.register_forward_hook(partial(self._after, number)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._gates.clear()
        self._soft = None

    def __call__(self) -> Tensor:
        """The penalty of what ran since the last call, a scalar with gradients to the layers' weights.

        Raises
        ------
        ValueError
            If nothing ran, or fewer than 2 samples.
        """
        taken, self._gates = self._gates, {}
        missing = next((number for number in range(len(self.layers)) if (number, 0) not in taken), None)
        if missing is not None:
            raise ValueError(
                f"layers[{missing}] ({type(self.layers[missing]).__name__}) has not run since the last call: run the "
                "model inside the with block first"
            )
        if self.kind == "kde":
            return torch.stack([self._kde(gates) for gates in taken.values()]).sum()
        self._real = {key: gates.detach() for key, gates in taken.items()}
        return torch.stack([self._energy(key, gates) for key, gates in taken.items()]).sum()

    def energy_loss(self) -> Tensor:
        """For "ebm": the loss of the networks f on the gates of the last call, mean f(samples) - f(gates).

        Minimise it with an optimizer of `parameters()`, after the gradients of the penalty itself were taken. The
        samples are Langevin steps from the batch.

        Raises
        ------
        ValueError
            If kind is "kde" or the penalty has not been called.
        """
        if self.kind != "ebm" or not self._real:
            raise ValueError("energy_loss needs kind='ebm' and a call of the penalty before it")
        losses = []
        for key, real in self._real.items():
            energy = self.energies[key]
            fake = real.clone()
            for _ in range(self.steps):
                with torch.enable_grad():
                    fake.requires_grad_(True)
                    (slope,) = torch.autograd.grad(energy(fake).sum(), fake)
                noise = torch.randn(fake.shape, generator=self._generator, device="cpu").to(fake)
                fake = (fake - self.tau / 2 * slope + self.tau**0.5 * noise).detach()
            losses.append((energy.network(fake) - energy.network(real)).mean())
        return torch.stack(losses).sum()

    def parameters(self) -> Iterator[nn.Parameter]:
        """For "ebm": the weights of the networks f, which exist once a batch has run."""
        for energy in self.energies.values():
            yield from energy.parameters()

    def _before(self, number: int, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        z = args[0] if args else next(iter(kwargs.values()))
        gates = self._keep(number, z)
        if self.kind == "ebm":
            self._soft = z.clone() * gates  # an in-place ReLU changes z

    def _after(self, number: int, _: nn.Module, __: object, z: Tensor) -> None:
        self._keep(number, z)

    def _keep(self, number: int, z: Tensor) -> Tensor:
        gates = torch.sigmoid(self.beta * z)
        self._gates[number, sum(key[0] == number for key in self._gates)] = gates
        return gates

    def _kde(self, gates: Tensor) -> Tensor:
        flat = gates.flatten(1)
        if len(flat) < 2:
            raise ValueError(f"a batch must have at least 2 samples, got {len(flat)}")
        return soft_gate_entropy(flat, self.lam)

    def _energy(self, key: tuple[int, int], gates: Tensor) -> Tensor:
        if key not in self.energies:
            with kept_random_state():
                torch.manual_seed(self.seed + len(self.energies))
                self.energies[key] = EnergyNetwork(gates.shape[1]).to(gates)
        energy = self.energies[key]
        energy.update(gates.detach())
        value: Tensor = energy(gates).mean() / max(1, gates[0, 0].numel())
        return value


def _at_zero(layer: nn.Module) -> bool:
    """Whether a ReLU-like module has its only kink at 0."""
    return isinstance(layer, nn.ReLU | nn.LeakyReLU | nn.PReLU | nn.RReLU)


class EnergyNetwork(nn.Module):
    """Energy of soft gates (b, c, ...), E = -f - log q, of an unnormalized model of their distribution.

    f: six 1 x 1 convolutions with BatchNorm and ReLU over the channels, summed over positions, and a linear unit, times
    c / 1000; q: independent gates with running rates per channel.

    Parameters
    ----------
    channels
        c.

    Attributes
    ----------
    rates : Tensor
        Running activation rate of each channel, (c,), momentum 0.9.

    References
    ----------
    Ren et al., ICML 2022: widths 32-64-128-256-512-512 and the factor 3.072 for 3072 channels; that the factor is
    c / 1000 is our guess.

    Examples
    --------
    >>> EnergyNetwork(4).eval()(torch.rand(2, 4)).shape
    torch.Size([2])
    """

    rates: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((channels, *_WIDTHS), _WIDTHS, strict=False):
            layers += [nn.Conv1d(before, after, 1), nn.BatchNorm1d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(_WIDTHS[-1], 1)
        self.scale = channels / 1000
        self.register_buffer("rates", torch.full((channels,), 0.5))

    def forward(self, gates: Tensor) -> Tensor:
        """Energy of each sample, (b,)."""
        rates = self.rates.view(-1, *[1] * (gates.ndim - 2))
        return -self.network(gates) - gate_log_probability(gates, rates).flatten(1).sum(1)

    def network(self, gates: Tensor) -> Tensor:
        """The network f itself for each sample, (b,)."""
        found: Tensor = self.linear(self.convolutions(gates.flatten(2) if gates.ndim > 2 else gates[..., None]).sum(2))
        return self.scale * found[:, 0]

    def update(self, gates: Tensor) -> None:
        """Move the running rates towards those of a batch."""
        now = (gates.transpose(0, 1).flatten(1) >= 0.5).to(self.rates).mean(1)
        self.rates.mul_(_MOMENTUM).add_(now, alpha=1 - _MOMENTUM)


def gate_log_probability(gates: Tensor, rates: Tensor) -> Tensor:
    """Log probability of soft gates s under independent rates p, log(s (2 p - 1) - p + 1 + 1e-5), in nats.

    Parameters
    ----------
    gates
        Soft gates in [0, 1].
    rates
        Rates, of a shape that broadcasts.

    Returns
    -------
    Tensor
        Of the shape of the gates.

    Examples
    --------
    >>> gate_log_probability(torch.tensor([0.0, 1.0]), torch.tensor(0.3))
    tensor([-0.3567, -1.2039])
    """
    return (gates * (2 * rates - 1) - rates + 1 + 1e-5).log()


def soft_gate_entropy(gates: Tensor, lam: float) -> Tensor:
    """The estimate "kde" of `gate_entropy` for soft gates (N, D), differentiable, in bits."""
    with torch.autocast(gates.device.type, enabled=False):
        gates = gates if gates.dtype == torch.float64 else gates.float()
        own = gates.square().sum(1)
        squares = (own[:, None] + own - 2 * gates @ gates.T).clamp_min(0)
    similar = torch.logsumexp(-squares / (2 * lam * gates.shape[1]), 1) - math.log(len(gates))
    return -similar.mean() / math.log(2)
