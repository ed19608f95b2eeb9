"""ARPHMM holds what every model holds, Gibbs what every sampler holds; Pyro sees the same law."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from probkit import infer
from probkit.inference import EM, MAP, Gibbs
from probkit.models.arphmm import ARPHMM, Sequences, SwitchingPrior
from probkit.pyro_adapter import FromPyro, to_pyro
from probkit.testing import ModelConformance, SamplerConformance

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.NumericsWarning")


def series(steps=30, features=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(steps, features, generator=rng, dtype=torch.float64).cumsum(0)


class TestFull(ModelConformance):
    prior_draws = 60
    latents = ("state", "filtered_state")

    def problem(self):
        model = ARPHMM(2, 1, features=2, missing="error", prior=SwitchingPrior(ridge=1.0, dof=8.0))
        return model, series(), series(12, seed=1)

    def sampler(self):
        return EM(restarts=2)


class TestStructured(ModelConformance):
    prior_draws = 60
    allows_missing = True
    latents = ("state",)

    def problem(self):
        prior = SwitchingPrior(initial=2.0, transition=2.0, ridge=1.0, dof=8.0, scale=1.0)
        model = ARPHMM(3, 1, cov="diag", transition="left_right", features=2, prior=prior)
        return model, series(), series(12, seed=1)

    def sampler(self):
        return Gibbs(draws=20, warmup=20)


class TestShared(ModelConformance):
    prior_draws = 60
    allows_missing = True

    def problem(self):
        model = ARPHMM(2, 0, cov="shared", features=1, prior=SwitchingPrior(ridge=1.0, dof=6.0))
        return model, series(features=1), series(12, 1, seed=1)


class TestGibbs(SamplerConformance):
    stops = 4
    moment_chains = 4

    def problem(self):
        model = ARPHMM(1, 0, prior=SwitchingPrior(ridge=0.5, dof=5.0, scale=1.0))
        return Gibbs(draws=12, warmup=4, thin=2), model, series(features=1)

    def precise(self):
        return Gibbs(draws=300, warmup=5)

    def moments(self):
        """One state and no lags: the normal-inverse-gamma posterior in closed form."""
        y = series(features=1)[:, 0]
        n, ridge, dof, scale = len(y), 0.5, 5.0, 1.0
        mean = y.sum() / (n + ridge)
        scatter = scale + (y - mean).square().sum() + ridge * mean**2
        variance = scatter / (dof + n - 2)
        sd = scatter * (2 / ((dof + n - 2) ** 2 * (dof + n - 4))) ** 0.5
        return {
            "weights": (mean.reshape(1, 1, 1), (variance / (n + ridge)).sqrt().reshape(1, 1, 1)),
            "covariance": (variance.reshape(1, 1, 1), sd.reshape(1, 1, 1)),
        }


def test_the_same_law_as_a_pyro_program():
    model = ARPHMM(2, 1, prior=SwitchingPrior(scale=1.0), features=1)
    data = Sequences([series(features=1), series(9, 1, seed=2)])
    values = {n: v[0] for n, v in model.sample_prior(1, rng=0).items()}
    program = to_pyro(model)
    trace = poutine.trace(poutine.condition(program, values)).get_trace(data)
    torch.testing.assert_close(trace.log_prob_sum(), model.log_joint(values, data))


def test_the_pyro_program_is_sampled_as_the_model_is():
    model = ARPHMM(1, 1, prior=SwitchingPrior(scale=1.0), features=1)
    data = Sequences([series(features=1)])
    ours = infer(model, data, EM(tolerance=1e-12), rng=0)
    wrapped = FromPyro(to_pyro(model), observed=())
    theirs = infer(wrapped, {"data": data}, MAP(restarts=1), rng=0)
    for name in ("weights", "covariance"):
        torch.testing.assert_close(theirs.draws[name], ours.draws[name], rtol=1e-4, atol=1e-4)
