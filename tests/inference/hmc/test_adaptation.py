"""Step sizes, windows, moments and path lengths, each on its own."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.inference.hmc.leapfrog import Phase, Point
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.moments import Moments, pooled, trusted
from probkit.inference.hmc.path import PathLength, halton
from probkit.inference.hmc.step_size import (
    DualAveraging,
    first_step_size,
    pooled_step_size,
    shared_acceptance,
)
from probkit.inference.hmc.windows import windows_of


def bowls(precision):
    """Potential of independent normals with another precision in each chain [chain, 1]."""
    return lambda q: (0.5 * (precision * q.square()).sum(-1), precision * q)


def test_dual_averaging_finds_the_target():
    """Acceptance exp(-step / scale): the target 0.8 is met at scale ln(1 / 0.8)."""
    scale = torch.tensor([0.01, 1.0, 300.0], dtype=torch.float64)
    search = DualAveraging.start(torch.ones(3, dtype=torch.float64))
    for _ in range(2000):
        search = search.update((-search.log_step.exp() / scale).exp(), 0.8)
    found = search.log_average.exp() / scale
    # The pull towards the centre, log(10 step), fades as 1 / (gamma sqrt(count)): some percent.
    assert torch.allclose(found, torch.full_like(found, math.log(1 / 0.8)), rtol=0.06)


def test_dual_averaging_is_hoffman_and_gelmans():
    """Equation 6 of Hoffman and Gelman (2014), written out for three updates."""
    acceptance, target = [0.3, 0.95, 0.6], 0.8
    error, log_average, centre = 0.0, math.log(0.5), math.log(5.0)
    for t, a in enumerate(acceptance, start=1):
        error = (1 - 1 / (t + 10)) * error + (target - a) / (t + 10)
        log_step = centre - math.sqrt(t) / 0.05 * error
        log_average = t**-0.75 * log_step + (1 - t**-0.75) * log_average
    search = DualAveraging.start(torch.tensor([0.5], dtype=torch.float64))
    for a in acceptance:
        search = search.update(torch.tensor([a], dtype=torch.float64), target)
    assert float(search.log_step) == pytest.approx(log_step, rel=1e-12)
    assert float(search.log_average) == pytest.approx(log_average, rel=1e-12)


def test_first_step_sizes_follow_each_chains_scale(generator):
    precision = torch.tensor([[1e-4], [1.0], [1e4]], dtype=torch.float64)
    q = torch.randn(3, 1, generator=generator, dtype=torch.float64) / precision.sqrt()
    p = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    potential = bowls(precision)
    point = Point(q, *potential(q))
    unit = Metric(torch.ones(1, dtype=torch.float64))
    start = torch.ones(3, dtype=torch.float64)
    step = first_step_size(potential, unit, point, p, start) * precision[:, 0].sqrt()
    # In each chain's own units the step is of order one: powers of two apart at most.
    assert bool(((step > 0.2) & (step < 8.0)).all()), step


def test_slow_chains_keep_their_step_and_the_others_share_theirs():
    own = torch.tensor([0.10, 0.11, 0.12, 0.10, 0.01], dtype=torch.float64)
    pooled_steps = pooled_step_size(own)
    assert pooled_steps.tolist() == pytest.approx([0.10, 0.10, 0.10, 0.10, 0.01])
    acceptance = torch.tensor([1.0, 0.5, 0.6, 0.7, 0.9], dtype=torch.float64)
    shared = shared_acceptance(acceptance, pooled_steps)
    assert shared.tolist() == pytest.approx([0.7, 0.7, 0.7, 0.7, 0.9])


@pytest.mark.parametrize("warmup", [0, 5, 19, 20, 60, 149, 150, 200, 500, 1000, 3000])
def test_windows_fit_and_leave_room_for_the_step_size(warmup):
    windows = windows_of(warmup)
    ends = windows.ends
    assert list(ends) == sorted(set(ends))
    if warmup >= 20:
        assert windows.begin < ends[0]
        assert warmup - ends[-1] >= min(50, 0.25 * warmup)
        held = [draw for draw in range(1, warmup + 1) if windows.holds(draw)]
        assert held == list(range(windows.begin + 1, ends[-1] + 1))


def filled(positions, energy, dense):
    moments = Moments.empty(positions[0], dense)
    for position in positions:
        moments = moments.add(position, energy)
    return moments


@pytest.mark.parametrize("dense", [False, True])
def test_pooled_moments_are_the_covariance_of_all_positions(generator, dense):
    positions = torch.randn(30, 4, 3, generator=generator, dtype=torch.float64)
    positions = positions @ torch.tensor(
        [[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.3, 0.1]], dtype=torch.float64
    )
    found = pooled(filled(positions, torch.zeros(4, dtype=torch.float64), dense))
    share = 120 / 125
    expected = share * torch.cov(positions.flatten(0, 1).T)
    expected += (1 - share) * 1e-3 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found, expected if dense else expected.diagonal())


def test_a_lost_chain_and_a_frozen_one_do_not_count(generator):
    positions = torch.randn(50, 6, 2, generator=generator, dtype=torch.float64)
    clean = positions.clone()
    positions[:, 4] += 1e4
    positions[:, 5] = 7.0
    energy = torch.tensor([1.0, 1.2, 0.9, 1.1, 1e6, 1.0], dtype=torch.float64)
    moments = filled(positions, energy, False)
    assert trusted(moments).tolist() == [True] * 4 + [False] * 2
    alone = filled(clean[:, :4], energy[:4], False)
    torch.testing.assert_close(pooled(moments), pooled(alone))
    assert pooled(filled(positions[:, 5:], energy[5:], False)) is None


def test_the_halton_sequence_fills_the_interval():
    points = torch.tensor([halton(k) for k in range(255)])
    assert sorted(points.tolist()) == [k / 256 for k in range(1, 256)]


@pytest.mark.parametrize("lost", [0, 2])
def test_the_path_length_climbs_to_the_best_of_a_normal(lost, generator):
    """On a unit normal ChEES is best at a quarter period, pi / 2, without jitter.

    Chains that are lost far away pull towards their own length, but cannot pull hard.
    """
    chains = 200
    unit = Metric(torch.ones(5, dtype=torch.float64))
    start = torch.zeros(chains, 5, dtype=torch.float64)
    path = PathLength.start(0.2, start)
    for _ in range(600):
        q = torch.randn(chains, 5, generator=generator, dtype=torch.float64)
        p = torch.randn(chains, 5, generator=generator, dtype=torch.float64)
        t = math.exp(path.log_length)
        end = q * math.cos(t) + p * math.sin(t)
        speed = p * math.cos(t) - q * math.sin(t)
        # Still on their way: they gain distance as long as they go on.
        q[:lost], end[:lost], speed[:lost] = 1e4, 1e4 + 1e3 * t, 1e3
        phase = Phase(Point(end, q[:, 0], q), speed)
        path = path.update(unit, q, phase, torch.ones(chains, dtype=torch.float64), 1.0)
    assert math.exp(path.log_average) == pytest.approx(math.pi / 2, rel=0.1)
