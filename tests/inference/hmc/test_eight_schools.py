"""Eight schools, non-centred: natively and as a Pyro program, against quadrature."""

from __future__ import annotations

import pyro
import pyro.distributions as pdist
import pytest
import torch
from torch.distributions import HalfCauchy, Normal, constraints

from probkit import FromPyro, infer
from probkit.inference.hmc import HMC, NUTS, Start
from probkit.model import Model, Site
from probkit.testing import worst_z, z_bound

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
ZERO, FIVE = torch.zeros((), dtype=torch.float64), torch.full((), 5.0, dtype=torch.float64)


class Schools(Model):
    """mu ~ N(0, 5), tau ~ HalfCauchy(5), z_j ~ N(0, 1), y_j ~ N(mu + tau z_j, sigma_j)."""

    batched = True

    def sites(self, data):
        return {
            "mu": Site((), constraints.real),
            "tau": Site((), constraints.positive),
            "z": Site((8,), constraints.real, ("school",)),
        }

    def log_joint(self, values, data, *, scale=1.0):
        mu, tau, z = values["mu"], values["tau"], values["z"]
        effect = mu[..., None] + tau[..., None] * z
        prior = Normal(ZERO, FIVE).log_prob(mu) + HalfCauchy(FIVE).log_prob(tau)
        local = Normal(ZERO, 1.0).log_prob(z) + Normal(effect, SIGMA).log_prob(Y)
        return prior + local.sum(-1)


def program(y):
    mu = pyro.sample("mu", pdist.Normal(ZERO, FIVE))
    tau = pyro.sample("tau", pdist.HalfCauchy(FIVE))
    with pyro.plate("school", 8):
        z = pyro.sample("z", pdist.Normal(ZERO, FIVE / 5))
        pyro.sample("y", pdist.Normal(mu + tau * z, SIGMA), obs=y)


def exact():
    """Moments by quadrature over log tau; mu and the effects are normal given tau.

    Given tau, y_j ~ N(mu, sigma_j^2 + tau^2) and mu ~ N(0, 25).
    """
    log_tau = torch.linspace(-12, 8, 20_001, dtype=torch.float64)
    tau = log_tau.exp()
    spread = SIGMA.square() + tau.square()[:, None]
    precision = (1 / spread).sum(1) + 1 / 25
    mean = (Y / spread).sum(1) / precision
    # log p(y | tau) by completing the square, constants dropped.
    evidence = -0.5 * (spread.log() + Y.square() / spread).sum(1)
    evidence = evidence + 0.5 * (precision * mean.square() - precision.log())
    log_density = evidence + HalfCauchy(FIVE).log_prob(tau) + log_tau
    weight = (log_density - log_density.max()).exp()
    weight = weight / weight.sum()
    share = tau.square() / spread[:, 0]  # of y_1 in the mean of effect 1 given mu
    effect = (1 - share) * mean + share * Y[0]
    return {
        "mu": float(weight @ mean),
        "mu^2": float(weight @ (mean.square() + 1 / precision)),
        "log tau": float(weight @ log_tau),
        "tau": float(weight @ tau),
        "effect": float(weight @ effect),
    }


def functionals(post):
    mu, tau, z = (post.draws[name] for name in ("mu", "tau", "z"))
    found = {
        "mu": mu,
        "mu^2": mu.square(),
        "log tau": tau.log(),
        "tau": tau,
        "effect": mu + tau * z[..., 0],
    }
    return torch.stack(list(found.values()), -1)


def schools_z(post):
    expected = torch.tensor(list(exact().values()), dtype=torch.float64)
    return worst_z(functionals(post).mean(1), expected)


@pytest.mark.parametrize(
    "sampler", [NUTS(120, warmup=100), HMC(250, warmup=200, accept=0.9)], ids=["nuts", "hmc"]
)
def test_the_native_model(sampler):
    post = infer(Schools(), None, sampler, rng=5, chains=32)
    assert schools_z(post) < z_bound(5)


def test_the_pyro_program():
    model = FromPyro(program, observed=("y",))
    post = infer(model, {"y": Y}, HMC(100, warmup=100, accept=0.9), rng=6, chains=32)
    assert schools_z(post) < z_bound(5)
    assert post.draws["z"].shape == (32, 100, 8)


@pytest.mark.slow
def test_the_pyro_program_by_nuts():
    model = FromPyro(program, observed=("y",))
    post = infer(model, {"y": Y}, NUTS(100, warmup=100), rng=7, chains=32)
    assert schools_z(post) < z_bound(5)


def test_a_warm_start_needs_no_long_warmup():
    first = infer(Schools(), None, HMC(60, warmup=120), rng=8, chains=16)
    start = Start.of(first)
    flat_tau = first.draws["tau"].log()
    shrink = 960 / 965
    assert float(start.inverse_mass[1]) == pytest.approx(shrink * float(flat_tau.var()), rel=1e-2)
    sampler = NUTS(60, warmup=15, start=first)
    again = infer(Schools(), None, sampler, rng=9, chains=16)
    assert schools_z(again) < z_bound(5)
    # Chains begin at draws of the earlier posterior, and with its scales.
    from probkit.inference.hmc.base import ChainState
    from probkit.rng import stream
    from probkit.sampler import Problem

    problem = Problem(Schools(), None)
    state = ChainState.of(sampler.init(problem, rngs=[stream(0, k) for k in range(3)]))
    mu = first.draws["mu"].flatten()
    assert all(bool((mu == value).any()) for value in state.point.position[:, 0])
    torch.testing.assert_close(state.inverse_mass, start.inverse_mass)
