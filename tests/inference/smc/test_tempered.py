"""Tempered SMC against conjugate evidences and posteriors, and its mutants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch.distributions import Gamma, MultivariateNormal, Normal, constraints

from probkit import infer
from probkit.errors import CapabilityError, DataError
from probkit.inference.smc import SMC, tempered
from probkit.inference.smc.tempered import next_temperature
from probkit.model import Model, Site
from probkit.rng import scope, stream


@dataclass(frozen=True)
class Conjugate(Model):
    """y ~ N(mu, 1 / precision), mu ~ N(0, 1 / (0.5 precision)), precision ~ Gamma(2, 2)."""

    batched = True

    def sites(self, data):
        return {"mu": Site((), constraints.real), "precision": Site((), constraints.positive)}

    def sample_prior(self, n, *, rng):
        with scope(rng=stream(rng, "prior")):
            precision = Gamma(*self._gamma()).sample((n,))
            mu = torch.randn(n).double() / (0.5 * precision).sqrt()
            return {"mu": mu, "precision": precision}

    def _gamma(self):
        return torch.tensor(2.0).double(), torch.tensor(2.0).double()

    def log_prior(self, values):
        precision = values["precision"]
        mu = Normal(torch.zeros(()).double(), (0.5 * precision).rsqrt()).log_prob(values["mu"])
        return Gamma(*self._gamma()).log_prob(precision) + mu

    def log_likelihood(self, values, data):
        mean, sd = values["mu"].unsqueeze(-1), values["precision"].rsqrt().unsqueeze(-1)
        return Normal(mean, sd).log_prob(data).sum(-1)

    def log_joint(self, values, data, *, scale=1.0):
        return self.log_prior(values) + scale * self.log_likelihood(values, data)


def conjugate_answers(y):
    """Log evidence, and posterior means of mu and precision (normal-gamma algebra)."""
    n, k0, a0, b0 = len(y), 0.5, 2.0, 2.0
    kn, an = k0 + n, a0 + n / 2
    bn = b0 + 0.5 * ((y - y.mean()) ** 2).sum() + k0 * n * y.mean() ** 2 / (2 * kn)
    evidence = (
        math.lgamma(an)
        - math.lgamma(a0)
        + a0 * math.log(b0)
        - an * torch.log(bn)
        + 0.5 * math.log(k0 / kn)
        - n / 2 * math.log(2 * math.pi)
    )
    return float(evidence), float(n * y.mean() / kn), float(an / bn)


Y = 1.5 + 0.7 * torch.randn(30, generator=torch.Generator().manual_seed(3)).double()


def check(exact, sampler, chains=12):
    post = infer(Conjugate(), Y, sampler, rng=0, chains=chains)
    evidence, mu, precision = conjugate_answers(Y)
    assert abs(exact.z((post.log_evidence.value - evidence).exp(), 1.0)) < 4
    assert float(post.log_evidence.value.std()) < 0.5
    assert abs(exact.z(post.draws["mu"].mean(1), mu)) < 4
    assert abs(exact.z(post.draws["precision"].mean(1), precision)) < 4
    return post


@pytest.mark.parametrize("kernel", ["random_walk", "independent", "differential_evolution"])
def test_conjugate_evidence_and_posterior(exact, kernel):
    post = check(exact, SMC(400, kernel=kernel, moves=6))
    stats = post.sample_stats
    assert bool((stats["temperature"].diff(dim=1) >= 0).all())
    assert bool((stats["temperature"][:, -1] == 1.0).all())
    assert int(stats["stages"].max()) == stats["temperature"].shape[1]
    # Every adapted stage but the last leaves half of the particles.
    assert float(stats["ess"][0, 0]) == pytest.approx(200, rel=1e-3)


def test_fixed_temperatures(exact):
    post = check(exact, SMC(400, temperatures=(0.02, 0.1, 0.3, 1.0), moves=6))
    assert post.sample_stats["temperature"][0].tolist() == pytest.approx([0.02, 0.1, 0.3, 1.0])


def test_no_jacobian_is_caught(exact, monkeypatch):
    def without_jacobian(problem, free, flat):
        values, _ = free.constrain(flat)
        likelihood = problem.model.log_likelihood(values, problem.data)
        return problem.model.log_prior(values), likelihood

    monkeypatch.setattr(tempered, "_densities", without_jacobian)
    with pytest.raises(AssertionError):
        check(exact, SMC(800, moves=5), chains=20)


def test_wrong_weight_is_caught(exact, monkeypatch):
    monkeypatch.setattr(tempered, "_power", lambda ll, step: 0.9 * step * ll.double())
    with pytest.raises(AssertionError):
        check(exact, SMC(400, moves=6))


def test_missing_proposal_correction_is_caught(exact, monkeypatch):
    monkeypatch.setattr(
        tempered._Kernel, "_half_square", lambda self, flat: torch.zeros(len(flat)).double()
    )
    with pytest.raises(AssertionError):
        check(exact, SMC(400, kernel="independent", moves=6))


def test_one_sided_differences_are_caught(exact, monkeypatch):
    difference = tempered._Kernel._difference
    monkeypatch.setattr(
        tempered._Kernel,
        "_difference",
        lambda self, pool, shape: difference(self, pool, shape).abs(),
    )
    with pytest.raises(AssertionError):
        check(exact, SMC(400, kernel="differential_evolution", moves=6))


def test_last_moves_are_made_at_temperature_one_only(monkeypatch):
    calls = []
    accept = tempered._Kernel._accept

    def counted(self, *args):
        calls.append(self.temperature)
        return accept(self, *args)

    monkeypatch.setattr(tempered._Kernel, "_accept", counted)
    infer(Conjugate(), Y, SMC(50, temperatures=(0.2, 1.0), moves=3, last_moves=7), rng=0)
    assert (calls.count(0.2), calls.count(1.0)) == (3, 7)


@dataclass(frozen=True)
class TwoModes(Conjugate):
    """Two separated modes in the plane with unequal masses: 0.8 and 0.2."""

    def sites(self, data):
        return {"x": Site((2,), constraints.real, ("axis",))}

    def sample_prior(self, n, *, rng):
        g = stream(rng, "prior")
        return {"x": 4.0 * torch.randn(n, 2, generator=g, dtype=torch.float64)}

    def log_prior(self, values):
        return Normal(0.0, 4.0).log_prob(values["x"]).sum(-1)

    def log_likelihood(self, values, data):
        x = values["x"]
        eye = 0.09 * torch.eye(2).double()
        parts = [
            math.log(w) + MultivariateNormal(torch.full((2,), c).double(), eye).log_prob(x)
            for w, c in ((0.8, -3.0), (0.2, 3.0))
        ]
        return torch.logaddexp(*parts)


def test_modes_keep_their_masses(exact):
    post = infer(TwoModes(), None, SMC(600), rng=1, chains=10)
    share = (post.draws["x"][..., 0] < 0).double().mean(1)
    # Both modes lie equally far from the prior's centre, so their masses stay as they are.
    assert abs(exact.z(share, 0.8)) < 4
    assert float(share.std()) < 0.1


def test_next_temperature_hits_the_target():
    ll = torch.randn(500, generator=torch.Generator().manual_seed(0)).double() * 20
    beta = next_temperature(ll, 0.1, 0.5)
    weights = ((beta - 0.1) * (ll - ll.max())).exp()
    assert float(weights.sum() ** 2 / (weights**2).sum()) == pytest.approx(250, rel=1e-3)
    # Half the particles are impossible; the others are alike.
    ll = torch.cat([torch.zeros(5), torch.full((5,), -math.inf)]).double()
    assert next_temperature(ll, 0.0, 0.5) == 1.0


class PriorOnly(Conjugate):
    log_likelihood = None

    def log_joint(self, values, data, *, scale=1.0):
        return self.log_prior(values) + Conjugate.log_likelihood(self, values, data)


class NoLikelihood(PriorOnly):
    log_prior = None

    def log_joint(self, values, data, *, scale=1.0):
        return torch.zeros_like(values["mu"])


def test_log_prior_serves_as_well():
    both = infer(Conjugate(), Y, SMC(50, moves=2), rng=0)
    prior = infer(PriorOnly(), Y, SMC(50, moves=2), rng=0)
    assert torch.allclose(both.log_evidence.value, prior.log_evidence.value)
    with pytest.raises(CapabilityError, match="NoLikelihood has neither"):
        infer(NoLikelihood(), Y, SMC(50), rng=0)


class Impossible(Conjugate):
    def log_likelihood(self, values, data):
        return torch.full_like(values["mu"], -math.inf)


def test_impossible_data():
    with pytest.raises(DataError, match="none of 20 prior draws has a positive likelihood"):
        infer(Impossible(), Y, SMC(20), rng=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "whole n >= 1"),
        ({"ess_threshold": 1.0}, "0 < ess_threshold < 1"),
        ({"kernel": "hmc"}, "kernel 'random_walk', 'independent' or 'differential_evolution'"),
        ({"kernel": "differential_evolution", "n": 7}, "differences of particles: expected n >= 8"),
        ({"last_moves": 0}, "last_moves"),
        ({"temperatures": (0.5, 0.2, 1.0)}, "rise from above 0 to exactly 1"),
        ({"temperatures": (0.5,)}, "rise from above 0 to exactly 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        SMC(**options)


def test_too_many_stages():
    with pytest.raises(DataError, match="after max_stages=1"):
        infer(Conjugate(), Y, SMC(50, max_stages=1), rng=0)


def test_resumes_bit_for_bit(tmp_path):
    options = SMC(60, moves=2)
    whole = infer(Conjugate(), Y, options, rng=1)
    stop = [lambda info: info.step == 2]
    with pytest.raises(DataError, match="before there was a draw"):
        infer(Conjugate(), Y, options, rng=1, checkpoint=tmp_path, callbacks=stop)
    resumed = infer(Conjugate(), Y, options, rng=1, checkpoint=tmp_path)
    assert torch.equal(whole.draws["mu"], resumed.draws["mu"])
