"""Schedules, and what cycles are for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import constraints

import probkit as pk
from probkit.errors import DataError
from probkit.inference import SGHMC, SGLD, Constant, Cyclical, PolynomialDecay
from probkit.inference.sgmcmc.schedules import Plan
from probkit.model import Model, Site
from probkit.testing import z_bound

PLAN = Plan(draws=12, warmup=7, thin=3)


@pytest.mark.parametrize(
    "schedule", [Constant(0.1), PolynomialDecay(0.1), Cyclical(0.1, 3), Cyclical(0.1, 4, 0.8)]
)
def test_every_schedule_keeps_the_draws_that_were_asked_for(schedule):
    stages = [schedule.stage(step, PLAN) for step in range(schedule.steps(PLAN))]
    kept = [step for step, stage in enumerate(stages) if stage.keep]
    assert len(kept) == PLAN.draws and kept[0] >= PLAN.warmup
    assert stages[-1].keep
    assert all(0 < stage.size <= 0.1 for stage in stages)
    assert all(stage.temperature == 1.0 for stage in stages if stage.keep)


def test_the_decay_is_that_of_the_paper():
    """a (b + t)^-gamma with a = size * b^gamma."""
    schedule = PolynomialDecay(0.3, power=0.55, delay=10)
    sizes = [schedule.stage(t, PLAN).size for t in range(50)]
    a = 0.3 * 10**0.55
    assert sizes == pytest.approx([a * (10 + t) ** -0.55 for t in range(50)])


def test_the_cycles_are_those_of_the_paper():
    """alpha_0 / 2 (cos(pi mod(k - 1, ceil(K / M)) / ceil(K / M)) + 1), k from 1."""
    plan = Plan(draws=6, warmup=0, thin=2)
    schedule = Cyclical(0.4, cycles=3, explore=0.6)
    steps = schedule.steps(plan)
    length = math.ceil(steps / 3)
    assert steps == 30 and length == 10
    for k in range(1, steps + 1):
        place = (k - 1) % length
        stage = schedule.stage(k - 1, plan)
        assert stage.size == pytest.approx(0.2 * (math.cos(math.pi * place / length) + 1))
        assert (stage.temperature == 0.0) == (place / length < 0.6)
        assert stage.keep == (place in (7, 9))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Constant(0.0), r"Constant: expected size > 0, got 0\.0"),
        (lambda: Constant(math.nan), "Constant: expected size > 0, got nan"),
        (lambda: PolynomialDecay(0.1, power=1.5), r"0 < power <= 1 and delay >= 1, got 1\.5, 1000"),
        (lambda: PolynomialDecay(0.1, delay=0), r"got 0\.55, 0"),
        (lambda: Cyclical(0.1, cycles=0), "expected cycles >= 1 and explore in"),
        (lambda: Cyclical(0.1, explore=1.0), r"explore in \[0, 1\), got 4, 1\.0"),
        (lambda: Cyclical(0.1, temperature=-1.0), "expected temperature >= 0, got -1"),
        (
            lambda: SGLD(10, step_size=Cyclical(0.1, 4)),
            r"expected draws to be a multiple of cycles=4, got draws=10",
        ),
    ],
)
def test_options_are_checked(make, text):
    with pytest.raises(DataError, match=text):
        make()


class TwoModes(Model):
    """An equal mixture of N(-4, 1) and N(4, 1): the density between them is e^-8 of the peaks."""

    batched = True

    def sites(self, data):
        return {"x": Site((), constraints.real)}

    def log_joint(self, values, data, *, scale=1.0):
        x = values["x"]
        return torch.logaddexp(-0.5 * (x - 4.0).square(), -0.5 * (x + 4.0).square())


DATA = torch.zeros(1, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")
@pytest.mark.parametrize("kind", [SGLD, SGHMC])
def test_cycles_find_both_modes(kind):
    """Every cycle forgets the last mode; a constant step of the sampling stage stays for good."""
    large = 3.9 if kind is SGLD else 0.7
    cycles = Cyclical(large, cycles=12, explore=0.7, temperature=6.0)
    options = {"warmup": 0, "precondition": False}
    if kind is SGHMC:
        options["friction"] = 0.5
    post = pk.infer(TwoModes(), DATA, kind(144, step_size=cycles, **options), rng=0, chains=16)
    right = (post.draws["x"] > 0).double()
    # Cycles are nearly independent: one draw each counts.
    per_cycle = right.reshape(16, 12, 12)[..., -1]
    error = 0.5 / per_cycle.numel() ** 0.5
    assert abs(float(per_cycle.mean()) - 0.5) < z_bound() * error
    assert bool(((per_cycle.mean(1) > 0) & (per_cycle.mean(1) < 1)).all()), "a chain saw one mode"
    small = large / 8
    post = pk.infer(TwoModes(), DATA, kind(450, step_size=small, **options), rng=0, chains=16)
    side = post.draws["x"][:, 100:].sign()
    assert float((side == side[:, :1]).all(1).double().mean()) > 0.75
