"""Networks that are affine on cells, in float64 and filled from a seed, and planes through their inputs."""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from repgraph.metrics.spline import slice_partition

BOX = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


class Net(nn.Module):
    """A function of the modules' owner and the input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(net, seed=0):
    """In eval mode and float64, with parameters and running statistics from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            fan = p[0].numel() ** 0.5 if p.ndim > 1 else 2.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / fan)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return net.double().eval()


def mlp(widths, seed=0, gate=nn.ReLU):
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), gate())]
    return filled(nn.Sequential(*parts[:-1]), seed)


def layer(weight, bias, *more):
    """A first layer given by numbers, its ReLU, and further (weight, bias) pairs; no output layer."""
    parts = []
    for w, b in ((weight, bias), *more):
        w, b = (torch.tensor(x, dtype=torch.float64) for x in (w, b))
        linear = nn.Linear(*w.T.shape).double()
        linear.weight.data, linear.bias.data = w, b
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts).eval()


def cells(net, domain=BOX, origin=None, basis=None, **options):
    """The cells in a plane of R^2, unless another is given."""
    origin = torch.zeros(2, dtype=torch.float64) if origin is None else origin
    basis = torch.eye(2, dtype=torch.float64) if basis is None else basis
    return slice_partition(net, origin, basis, domain, progress=False, **options)


def plane(shape, seed=0):
    return draw(*shape, seed=seed + 1000), draw(2, *shape, seed=seed + 2000)


def at(partition, u):
    """Inputs at coordinates u (n, 2)."""
    basis = partition.basis.double()
    return partition.origin.double() + torch.einsum("np,p...->n...", torch.as_tensor(u), basis)


def holders(partition, u):
    """Whether each polygon holds each point, (R, n) bool, from the half-planes of its edges."""
    found = []
    for p in partition.polygons:
        e = np.roll(p, -1, 0) - p
        side = e[:, :1] * (u[:, 1] - p[:, 1:]) - e[:, 1:] * (u[:, 0] - p[:, :1])
        found.append((side >= 0).all(0))
    return np.array(found)


def code_areas(partition):
    return {tuple(code): area for code, area in zip(partition.codes.tolist(), partition.areas, strict=True)}


def outputs(net, x):
    with torch.no_grad():
        return net(x).flatten(1).numpy()


def conv(a, b, **options):
    return nn.Conv2d(a, b, 3, padding=1, **options)


def _bottleneck(net, x):
    out = net.bn(net.conv(x))
    out += x
    out = torch.cat([out.relu_(), x], 1)
    return net.out(out.mean((2, 3)))


def _chunks(net, x):
    u, v = net.a(x).chunk(2, 1)
    return net.b(torch.cat([v.clamp(min=0), u.clamp(0, 0.7)], 1)) + v[:, :2]


def _by_hand(net, x):
    b = x.shape[0]
    h = F.relu(net.c(x.permute(0, 2, 3, 1).reshape(b, 12, 2)))
    return net.out(F.hardtanh(h.transpose(1, 2), -0.2, 0.5).contiguous().view(b, -1))


def _written(net, x):
    out = torch.zeros(len(x), 5, dtype=x.dtype)
    out[:, 1:4] = F.relu(net.a(x))
    return net.b(out)


ZOO = {
    "mlp": ((4,), lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))),
    "leaky": ((4,), lambda: nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2, True), nn.Linear(8, 3))),
    "prelu": ((4,), lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 2))),
    "relu6": ((4,), lambda: nn.Sequential(nn.Linear(4, 6), Net(lambda n, x: 5 * x + 3), nn.ReLU6(), nn.Linear(6, 2))),
    "hardtanh": ((4,), lambda: nn.Sequential(nn.Linear(4, 6), nn.Hardtanh(-0.3, 0.4), nn.Linear(6, 2))),
    "jump": (
        (4,),
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.Threshold(0.3, -2.0), nn.Linear(6, 5), nn.Threshold(-0.1, 1.0), nn.Linear(5, 2)
        ),
    ),
    "clamp": ((4,), lambda: Net(_chunks, a=nn.Linear(4, 8), b=nn.Linear(8, 2))),
    "written": ((4,), lambda: Net(_written, a=nn.Linear(4, 3), b=nn.Linear(5, 2))),
    "residual": ((2, 4, 4), lambda: Net(_bottleneck, conv=conv(2, 2), bn=nn.BatchNorm2d(2), out=nn.Linear(4, 3))),
    "pooled": (
        (1, 4, 4),
        lambda: nn.Sequential(
            conv(1, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), conv(4, 4, groups=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(16, 3),
        ),
    ),
    "strided": (
        (2, 7, 7),
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, dilation=2, groups=2), nn.ReLU6(), nn.ConvTranspose2d(4, 2, 2), nn.PReLU(2),
            nn.Flatten(), nn.Linear(18, 2),
        ),
    ),
    "functional": ((2, 3, 4), lambda: Net(_by_hand, c=nn.Linear(2, 3), out=nn.Linear(36, 2))),
    "twice": (
        (4,),
        lambda: Net(
            lambda n, x: n.out(n.part(n.part(x) + x)),
            part=nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
            out=nn.Linear(4, 3),
        ),
    ),
    "padded max": (
        (1, 5, 5),
        lambda: nn.Sequential(
            conv(1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(1, 2), nn.LeakyReLU(0.1),
            nn.MaxPool2d((2, 1), 1, 0, (2, 1)), nn.Flatten(), nn.Linear(6, 3),
        ),
    ),
    "max 1-D": (
        (1, 8),
        lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 2)),
    ),
}  # fmt: skip
