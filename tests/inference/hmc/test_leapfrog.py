"""The integrator: exact order, exact reversal, and the mass matrix as a change of coordinates."""

from __future__ import annotations

import pytest
import torch

from probkit.inference.hmc.leapfrog import Phase, Point, kinetic, leapfrog, trajectory
from probkit.inference.hmc.metric import Metric


def quartic(position):
    """U = sum q^4 / 4 + q_0 q_1, in the place of a model."""
    gradient = position**3 + position.flip(-1)
    energy = (position**4).sum(-1) / 4 + position[:, 0] * position[:, 1]
    return energy, gradient


def begin(generator, chains=5):
    position = torch.randn(chains, 2, generator=generator, dtype=torch.float64)
    momentum = torch.randn(chains, 2, generator=generator, dtype=torch.float64)
    return Phase(Point(position, *quartic(position)), momentum)


def metrics():
    diagonal = torch.tensor([0.5, 2.0], dtype=torch.float64)
    dense = torch.tensor([[0.5, 0.3], [0.3, 2.0]], dtype=torch.float64)
    return [Metric(diagonal), Metric(dense)]


def energy(phase):
    return phase.point.energy + kinetic(phase.momentum)


@pytest.mark.parametrize("metric", metrics(), ids=["diagonal", "dense"])
def test_the_energy_error_falls_with_the_square_of_the_step(generator, metric):
    start = begin(generator)
    errors = []
    for halvings in range(3):
        step = torch.full((5, 1), 0.02 / 2**halvings, dtype=torch.float64)
        end = trajectory(quartic, metric, start, step, 25 * 2**halvings)
        errors.append((energy(end) - energy(start)).abs())
    # The error is c h^2 (1 + O(h^2)); h^2 is 4e-4, the constant of the next term some tens.
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert torch.allclose(coarse / fine, torch.full_like(fine, 4.0), rtol=0.05)


@pytest.mark.parametrize("metric", metrics(), ids=["diagonal", "dense"])
def test_a_path_turned_round_leads_back(generator, metric):
    start = begin(generator)
    step = torch.full((5, 1), 0.1, dtype=torch.float64)
    end = trajectory(quartic, metric, start, step, 20)
    back = trajectory(quartic, metric, Phase(end.point, -end.momentum), step, 20)
    torch.testing.assert_close(back.point.position, start.point.position, rtol=0, atol=1e-11)
    torch.testing.assert_close(back.momentum, -start.momentum, rtol=0, atol=1e-11)
    past = trajectory(quartic, metric, end, -step, 20)
    torch.testing.assert_close(past.point.position, start.point.position, rtol=0, atol=1e-11)


def test_joined_half_steps_are_single_steps(generator):
    start = begin(generator)
    step = torch.full((5, 1), 0.1, dtype=torch.float64)
    metric = metrics()[1]
    phase = start
    for _ in range(7):
        phase = leapfrog(quartic, metric, phase, step)
    joined = trajectory(quartic, metric, start, step, 7)
    torch.testing.assert_close(joined.point.position, phase.point.position, rtol=0, atol=1e-13)


def test_volume_is_preserved(generator):
    start = begin(generator, chains=1)
    step = torch.full((1, 1), 0.3, dtype=torch.float64)

    def flow(z):
        position = z[None, :2]
        phase = Phase(Point(position, *quartic(position)), z[None, 2:])
        end = trajectory(quartic, metrics()[1], phase, step, 5)
        return torch.cat([end.point.position[0], end.momentum[0]])

    z = torch.cat([start.point.position[0], start.momentum[0]])
    jacobian = torch.autograd.functional.jacobian(flow, z)
    # 5 steps of a map with entries of order one: rounding only.
    assert abs(float(torch.linalg.det(jacobian).abs()) - 1.0) < 1e-10


def test_whitening_is_a_change_of_coordinates(generator):
    """A path under M^-1 = S S' is S times the path of U(S z) with unit masses."""
    start = begin(generator)
    step = torch.full((5, 1), 0.1, dtype=torch.float64)
    unit = Metric(torch.ones(2, dtype=torch.float64))
    for metric in metrics():
        root = metric.root if metric.dense else torch.diag(metric.root)

        def whitened(z, root=root):
            found, gradient = quartic(z @ root.T)
            return found, gradient @ root

        z = metric.whiten(start.point.position)
        torch.testing.assert_close(z @ root.T, start.point.position)
        other = trajectory(whitened, unit, Phase(Point(z, *whitened(z)), start.momentum), step, 10)
        end = trajectory(quartic, metric, start, step, 10)
        torch.testing.assert_close(other.point.position @ root.T, end.point.position)
        torch.testing.assert_close(other.momentum, end.momentum)
