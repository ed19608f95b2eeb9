"""Means and variances against exact ones, and proof that wrong samplers would be seen.

Chains are independent given the adaptation, so the error of a mean follows from the spread of the
chains' own means: no estimate of autocorrelation is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from scipy import stats
from torch.distributions import Dirichlet, Gamma, constraints

from probkit import infer
from probkit.inference.hmc import HMC, NUTS, base, hmc, potential, tree
from probkit.inference.hmc.hmc import HMC as HMCClass
from probkit.model import Model, Site
from probkit.testing import worst_z, z_bound

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")


@dataclass(frozen=True)
class Gaussian(Model):
    """A normal law; its data is the precision matrix."""

    batched: ClassVar[bool] = True

    def sites(self, data):
        return {"x": Site((len(data),), constraints.real, ("entry",))}

    def log_joint(self, values, data, *, scale=1.0):
        x = values["x"]
        return -0.5 * ((x @ data) * x).sum(-1)


@dataclass(frozen=True)
class Counts(Model):
    """rate ~ Gamma(2, 1) with Poisson counts; share ~ Dirichlet(1, 2, 3) with category counts.

    One point at a time, so that the sampler maps it; the posterior is conjugate.
    """

    def sites(self, data):
        return {
            "rate": Site((), constraints.positive),
            "share": Site((3,), constraints.simplex, ("category",)),
        }

    def log_joint(self, values, data, *, scale=1.0):
        counts, categories = data
        rate, share = values["rate"], values["share"]
        prior = rate.log() - rate + (torch.arange(3) * share.log()).sum()
        poisson = (counts * rate.log() - rate).sum()
        return prior + poisson + (categories * share.log()).sum()

    def exact(self, data):
        counts, categories = data
        alpha = categories + torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        return Gamma(2.0 + counts.sum(), 1.0 + len(counts)), Dirichlet(alpha)


COUNTS = (
    torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64),
    torch.tensor([4.0, 0.0, 2.0], dtype=torch.float64),
)


def correlated(size=20):
    """Covariance with correlations 0.8^|i - j| and standard deviations from 0.1 to 10."""
    index = torch.arange(size, dtype=torch.float64)
    sd = torch.logspace(-1, 1, size, dtype=torch.float64)
    return 0.8 ** (index[:, None] - index).abs() * sd[:, None] * sd


def moments_z(draws, mean, variance):
    """Largest |z| of first and second moments of draws [chain, draw, *]."""
    centred = draws - mean
    first = worst_z(centred.mean(1), torch.zeros_like(mean))
    second = worst_z(centred.square().mean(1), variance)
    return max(first, second)


def t_bound(count, chains=32, level=1e-4):
    """What |t| of ``count`` tests with chains - 1 degrees of freedom exceeds with ``level``."""
    return float(stats.t.ppf(1 - level / (2 * count), chains - 1))


SAMPLERS = {
    "nuts": NUTS(60, warmup=120),
    "nuts-dense": NUTS(100, warmup=130, dense=True),
    "hmc": HMC(200, warmup=200),
    "hmc-dense": HMC(200, warmup=200, dense=True, length=3.0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_correlated_normal(name):
    covariance = correlated()
    sampler = SAMPLERS[name]
    post = infer(Gaussian(), torch.linalg.inv(covariance), sampler, rng=1, chains=32)
    variance = covariance.diagonal()
    assert moments_z(post.draws["x"], torch.zeros(20), variance) < t_bound(40)
    # A mixed product that no marginal shows.
    product = post.draws["x"][..., 0] * post.draws["x"][..., 1]
    assert worst_z(product.mean(1), covariance[0, 1]) < z_bound()
    assert float(post.sample_stats["acceptance_rate"].mean()) == pytest.approx(
        sampler.accept, abs=0.1
    )


def counts_z(sampler, chains=32):
    rate, share = Counts().exact(COUNTS)
    post = infer(Counts(), COUNTS, sampler, rng=2, chains=chains)
    return max(
        moments_z(post.draws["rate"], rate.mean, rate.variance),
        moments_z(post.draws["share"], share.mean, share.variance),
    )


@pytest.mark.parametrize("sampler", [NUTS(60, warmup=50), HMC(200, warmup=120)])
def test_positive_and_simplex_sites(sampler):
    assert counts_z(sampler) < z_bound(16)


def test_that_test_sees_a_missing_jacobian(monkeypatch):
    def forgetful(self, position):
        values, _ = self.free.constrain(position)
        return potential.log_joint_of(self.model, values, self.data)

    monkeypatch.setattr(potential.Potential, "log_density", forgetful)
    assert counts_z(HMC(100, warmup=100)) > z_bound(16)


# A rough step, so that what corrects it matters: 1.6 is close to the limit of stability, 2.
ROUGH = torch.eye(2, dtype=torch.float64)
ROUGH_NUTS = NUTS(300, warmup=0, step_size=1.6, max_depth=4)
ROUGH_HMC = HMC(400, warmup=0, step_size=1.6, length=5.0)


def rough_z(sampler, chains=64):
    """The unit normal by rough steps, after the first 30 draws."""
    post = infer(Gaussian(), ROUGH, sampler, rng=3, chains=chains)
    draws = post.draws["x"][:, 30:]
    return moments_z(draws, torch.zeros(2), torch.ones(2))


@pytest.mark.parametrize("sampler", [ROUGH_NUTS, ROUGH_HMC])
def test_rough_steps_are_corrected(sampler):
    assert rough_z(sampler) < z_bound(4)


def test_that_test_sees_no_accept_step(monkeypatch):
    original = HMCClass._transition

    def eager(self, potential, metric, state, momentum, uniforms):
        return original(self, potential, metric, state, momentum, torch.zeros_like(uniforms))

    monkeypatch.setattr(hmc.HMC, "_transition", eager)
    assert rough_z(ROUGH_HMC) > z_bound(4)


@pytest.mark.parametrize("sampler", [replace(ROUGH_NUTS, draws=100), ROUGH_HMC])
def test_that_test_sees_momenta_of_half_the_scale(sampler, monkeypatch):
    original = base.HamiltonianSampler._random

    def timid(self, position, rngs, count):
        momenta, uniforms = original(self, position, rngs, count)
        return 0.5 * momenta, uniforms

    monkeypatch.setattr(base.HamiltonianSampler, "_random", timid)
    assert rough_z(sampler) > z_bound(4)


def test_that_test_sees_leaves_without_weights(monkeypatch):
    def blind(log_weights, log_total, uniform):
        return (uniform * log_weights.shape[1]).long()

    monkeypatch.setattr(tree, "_pick", blind)
    assert rough_z(ROUGH_NUTS) > z_bound(4)


@dataclass(frozen=True)
class TwoHills(Model):
    """exp(-(x^2 - 1)^2 - x / 4): two modes of different weight, in one dimension."""

    batched: ClassVar[bool] = True

    def sites(self, data):
        return {"x": Site((), constraints.real)}

    def log_joint(self, values, data, *, scale=1.0):
        x = values["x"]
        return -((x.square() - 1.0).square()) - 0.25 * x


EDGES = torch.tensor([-1.3, -1.0, -0.7, -0.2, 0.3, 0.8, 1.1], dtype=torch.float64)


def histogram_z(sampler):
    """Largest |z| of the shares of 8 bins, exact shares by the trapezoidal rule."""
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    density = TwoHills().log_joint({"x": grid}, None).exp()
    bins = torch.nn.functional.one_hot(torch.bucketize(grid, EDGES), 8).double()
    exact = (density[:, None] * bins).sum(0) / density.sum()
    post = infer(TwoHills(), None, sampler, rng=4, chains=64)
    found = torch.bucketize(post.draws["x"][:, 20:].contiguous(), EDGES)
    shares = torch.nn.functional.one_hot(found, 8).double().mean(1)
    return worst_z(shares, exact)


TWO_HILLS = [
    NUTS(250, warmup=0, step_size=0.7),
    HMC(400, warmup=0, step_size=0.7, length=4.0),
]


@pytest.mark.parametrize("sampler", TWO_HILLS)
def test_the_histogram_of_two_hills(sampler):
    assert histogram_z(sampler) < z_bound(8)


def test_that_test_sees_a_tree_that_always_prefers_the_new(monkeypatch):
    original = tree.draw_tree

    def hasty(potential, metric, point, momentum, step, uniforms, max_depth):
        # The second uniform of every doubling decides between the trees.
        uniforms = uniforms.clone()
        place = 0
        for depth in range(max_depth):
            uniforms[:, place + 1] *= 0.3
            place += 2 + 2 * tree.blocks_of(depth)
        return original(potential, metric, point, momentum, step, uniforms, max_depth)

    from probkit.inference.hmc import nuts

    monkeypatch.setattr(nuts, "draw_tree", hasty)
    assert histogram_z(TWO_HILLS[0]) > z_bound(8)
