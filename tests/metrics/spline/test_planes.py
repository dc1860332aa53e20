"""Planes through samples and through principal directions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piecewise import at, code_areas, draw, mlp

from repgraph.metrics.spline import slice_through_pca, slice_through_samples

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=8)
NET = mlp([5, 7, 6, 2])


@given(seeds, st.floats(0, 1))
@few
def test_samples_lie_in_the_plane_at_their_points(seed, margin):
    x = draw(3, 5, seed=seed)
    found = slice_through_samples(NET, x, margin=margin, progress=False)
    torch.testing.assert_close(at(found, found.points), x)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(2, dtype=torch.float64))
    assert found.points[0].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert found.points[1].tolist() == pytest.approx([(x[1] - x[0]).norm().item(), 0], abs=1e-12)
    assert found.points[2, 1] > 0
    sides = found.points.max(0) - found.points.min(0)
    assert found.areas.sum() == pytest.approx(sides.prod() * (1 + 2 * margin) ** 2, rel=1e-9)
    assert found.domain.min(0) == pytest.approx(found.points.min(0) - margin * sides, abs=1e-12)


@given(seeds)
@few
def test_principal_plane(seed):
    x = draw(12, 5, seed=seed) @ torch.diag(torch.tensor([5.0, 3, 1, 1, 0.1])).double() + 2
    found = slice_through_pca(NET, x, progress=False)
    z = x - x.mean(0)
    torch.testing.assert_close(found.origin, x.mean(0))
    values = torch.linalg.eigvalsh(z.T @ z).flip(0)[:2]
    torch.testing.assert_close((torch.from_numpy(found.points) ** 2).sum(0), values)
    torch.testing.assert_close(torch.from_numpy(found.points), z @ found.basis.T)
    sides = found.points.max(0) - found.points.min(0)
    assert found.areas.sum() == pytest.approx(1.2**2 * sides.prod(), rel=1e-9)


def test_a_larger_margin_holds_the_smaller_one():
    x = draw(3, 5)
    small, large = (code_areas(slice_through_samples(NET, x, margin=m, progress=False)) for m in (0, 1))
    assert all(area <= large[code] + 1e-9 for code, area in small.items())


def test_planes_refusals():
    x = draw(4, 5)
    for f in (slice_through_samples, slice_through_pca):
        with pytest.raises(ValueError, match="samples must be"):
            f(NET, x[:2], progress=False)
        with pytest.raises(ValueError, match="margin must be at least 0"):
            f(NET, x[:3], margin=-0.1, progress=False)
        line = torch.stack((x[0], x[0] + x[1], x[0] + 3 * x[1]))
        with pytest.raises(ValueError, match=r"line|two directions|dependent"):
            f(NET, line, progress=False)
        with pytest.raises(ValueError, match=r"line|two directions|dependent"):
            f(NET, x[:1].repeat(3, 1), progress=False)
    with pytest.raises(ValueError, match="samples must be three"):
        slice_through_samples(NET, x, progress=False)
