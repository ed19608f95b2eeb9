"""Geweke's joint-distribution test of single transitions, and proof that it sees wrong ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.distributions import constraints

from probkit.calibration import geweke
from probkit.density import log_joint_of
from probkit.inference.hmc import HMC, NUTS, base, hmc
from probkit.inference.hmc.potential import Potential
from probkit.model import Model, Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning"),
]


@dataclass(frozen=True)
class Rate(Model):
    """log rate ~ N(0, 1), log y ~ N(log rate, 2), one observation; the site is the rate.

    The observation says little, so that the transitions alone decide where the chains go.
    """

    batched: ClassVar[bool] = True

    def sites(self, data):
        return {"rate": Site((), constraints.positive)}

    def log_joint(self, values, data, *, scale=1.0):
        log_rate = values["rate"].log()
        return -0.5 * log_rate.square() - log_rate - (data.log() - log_rate).square() / 8


def redraw(values, generator):
    noise = torch.randn((), generator=generator, dtype=torch.float64)
    return values["rate"] * (2 * noise).exp()


def pair(generator):
    values = {"rate": torch.randn((), generator=generator, dtype=torch.float64).exp()}
    return values, redraw(values, generator)


def quantities(values, data):
    """One of the values alone, one of values and data together."""
    log_rate = values["rate"].log()
    return {"log rate": log_rate, "product": (log_rate * data.log()).tanh()}


ROUGH = {
    # Rough steps, close to the limit of stability, so that the correction matters.
    "hmc": HMC(step_size=1.6, length=3.0, chunk=1),
    "nuts": NUTS(step_size=1.4, chunk=1, max_depth=4),
}


def drifts(sampler):
    return geweke(
        Rate(),
        sampler,
        redraw=redraw,
        simulate=pair,
        chains=40,
        steps=15,
        rng=0,
        quantities=quantities,
    )


@pytest.mark.parametrize("name", ROUGH)
def test_transitions_stay_in_the_joint(name):
    result = drifts(ROUGH[name])
    assert set(result.drift) == {"log rate", "log rate^2", "product", "product^2"}
    assert result.passed(0.01), result.summary()


def test_a_missing_jacobian_is_seen(monkeypatch):
    def forgetful(self, position):
        values, _ = self.free.constrain(position)
        return log_joint_of(self.model, values, self.data)

    monkeypatch.setattr(Potential, "log_density", forgetful)
    assert not drifts(ROUGH["hmc"]).passed(1e-3)


def test_momenta_of_half_the_scale_are_seen(monkeypatch):
    original = base.HamiltonianSampler._random

    def timid(self, position, rngs, count):
        momenta, uniforms = original(self, position, rngs, count)
        return 0.5 * momenta, uniforms

    monkeypatch.setattr(base.HamiltonianSampler, "_random", timid)
    # Rough steps reject most paths either way; fine ones show how short they are.
    assert not drifts(HMC(step_size=0.9, length=2.0, chunk=1)).passed(1e-3)


def test_a_missing_accept_step_is_seen(monkeypatch):
    original = hmc.HMC._transition

    def eager(self, potential, metric, state, momentum, uniforms):
        return original(self, potential, metric, state, momentum, torch.zeros_like(uniforms))

    monkeypatch.setattr(hmc.HMC, "_transition", eager)
    assert not drifts(ROUGH["hmc"]).passed(1e-3)
