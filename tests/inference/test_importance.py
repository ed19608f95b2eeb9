"""Importance sampling: weights, evidence and effective sample size."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data

import probkit as pk
from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.guide import LogQ
from probkit.inference import SVI, Fixed, FullRank, ImportanceSampling, MeanField
from probkit.testing import assert_mean, worst_z, z_bound

MODEL, DATA = LineModel(1.0), line_data(4)
PRIOR = ImportanceSampling(2000, proposal="prior")


def evidence_ratios(post, exact):
    """Estimates of evidence over exact evidence, one for each chain; their mean is 1."""
    return (post.log_evidence.value - exact).exp()[:, None]


def test_the_evidence_is_unbiased_from_the_prior():
    exact = MODEL.exact(DATA)[2]
    post = pk.infer(MODEL, DATA, ImportanceSampling(300, proposal="prior"), rng=0, chains=200)
    assert post.log_evidence.kind == "estimate"
    assert_mean(evidence_ratios(post, exact), 1.0, "evidence from the prior")


def wide_guide(scale=0.9):
    loc = MODEL.exact(DATA)[0] + 0.2
    params = {
        "loc": loc,
        "log_diagonal": 0 * loc + math.log(scale),
        "below": torch.zeros(2, 2, dtype=torch.float64),
        "local": {},
    }
    return Fixed(FullRank(), params)


def test_the_evidence_is_unbiased_from_a_guide():
    exact = MODEL.exact(DATA)[2]
    post = pk.infer(MODEL, DATA, ImportanceSampling(300), guide=wide_guide(), rng=1, chains=200)
    assert_mean(evidence_ratios(post, exact), 1.0, "evidence from a guide")


@dataclass(frozen=True)
class WrongWeights(FullRank):
    """A guide that states a density a twentieth too low: every weight is too large."""

    def sample(self, params, model, batch, n, *, rng):
        values, log_q = super().sample(params, model, batch, n, rng=rng)
        return values, LogQ(log_q.global_ - 0.05, log_q.local)


def test_a_wrong_weight_shows_in_the_evidence():
    exact = MODEL.exact(DATA)[2]
    guide = Fixed(WrongWeights(), wide_guide().params)
    post = pk.infer(MODEL, DATA, ImportanceSampling(300), guide=guide, rng=1, chains=200)
    assert worst_z(evidence_ratios(post, exact), 1.0) > z_bound()


def test_the_posterior_as_proposal_is_exact():
    """With q the exact posterior every weight is the evidence."""
    mean, covariance, exact = MODEL.exact(DATA)
    factor = torch.linalg.cholesky(covariance)
    params = {"loc": mean, "log_diagonal": factor.diagonal().log(), "below": factor, "local": {}}
    post = pk.infer(MODEL, DATA, ImportanceSampling(50), guide=Fixed(FullRank(), params), rng=0)
    torch.testing.assert_close(post.log_weights, exact.expand(1, 50))
    torch.testing.assert_close(post.log_evidence.value, exact.reshape(1))
    assert post.attrs["ess"] == pytest.approx(50)


def test_weighted_moments_are_those_of_the_posterior():
    mean, covariance, _ = MODEL.exact(DATA)
    post = pk.infer(MODEL, DATA, PRIOR, rng=0, chains=4)
    draws = post.draws["w"].flatten(0, 1)
    share = torch.softmax(post.log_weights.flatten(), 0)
    error = (share[:, None].square() * (draws - mean).square()).sum(0).sqrt()
    z = (share @ draws - mean).abs() / error
    assert float(z.max()) < z_bound(2)
    picked = post.sample(4000, rng=3)["w"]
    resampled = (error.square() + covariance.diagonal() / 4000).sqrt()
    assert float(((picked.mean(0) - mean).abs() / resampled).max()) < z_bound(2)


def test_the_effective_sample_size_follows_the_weights():
    post = pk.infer(MODEL, DATA, PRIOR, rng=0, chains=3)
    weights = post.log_weights.exp()
    sizes = weights.sum(1).square() / weights.square().sum(1)
    assert post.attrs["ess"] == pytest.approx(float(sizes.min()))


def test_few_effective_draws_warn():
    with pytest.warns(NumericsWarning, match=r"kept \d\.\d effective draws of 12; .*guide="):
        pk.infer(MODEL, DATA, ImportanceSampling(12, proposal="prior"), rng=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pk.infer(MODEL, DATA, PRIOR, rng=0).attrs["ess"] > 10


def test_the_warning_counts_the_draws_that_were_made():
    sampler = ImportanceSampling(500, chunk=8, proposal="prior")
    with pytest.warns(NumericsWarning, match="effective draws of 8;"):
        pk.infer(MODEL, DATA, sampler, rng=0, callbacks=[lambda info: True])


def test_a_fit_serves_as_proposal():
    fit = pk.infer(MODEL, DATA, SVI(steps=400, lr=0.05), guide=FullRank(), rng=0)
    proposal = Fixed(FullRank(), fit.source.params[0])
    post = pk.infer(MODEL, DATA, ImportanceSampling(500), guide=proposal, rng=0)
    assert post.attrs["ess"] > 250
    assert float(post.log_evidence.value) == pytest.approx(float(MODEL.exact(DATA)[2]), abs=0.2)


def test_the_proposal_is_the_given_guide_else_that_of_the_model_else_the_prior():
    given = pk.infer(MODEL, DATA, ImportanceSampling(200), guide=wide_guide(), rng=0)
    prior = pk.infer(MODEL, DATA, ImportanceSampling(200, proposal="prior"), rng=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The model's own guide has not been fitted.
        own = pk.infer(MODEL, DATA, ImportanceSampling(200), rng=0)
    spreads = [float(post.draws["w"].std(1).mean()) for post in (given, prior, own)]
    # The standard deviation of 400 numbers is known to 1 in sqrt(800).
    assert spreads == pytest.approx([0.9, 1.5, 0.1], rel=4 / 800**0.5)


def test_a_model_that_cannot_propose():
    with pytest.raises(CapabilityError, match=r"GroupModel lacks sample_prior.*Pass guide="):
        pk.infer(GroupModel(), DATA[1], ImportanceSampling(), rng=0)


def test_a_guide_and_the_prior_exclude_each_other():
    with pytest.raises(DataError, match="leave out guide= or proposal='prior'"):
        pk.infer(MODEL, DATA, PRIOR, guide=MeanField(), rng=0)


def likelihood_of(result):
    class Wrong(LineModel):
        def log_likelihood(self, values, data):
            return result(super().log_likelihood(values, data))

    return Wrong(1.0)


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (lambda x: x * torch.nan, DataError, "NaN or infinite"),
        (lambda x: x + torch.inf, DataError, "NaN or infinite"),
        (lambda x: x - torch.inf, DataError, "every weight is zero"),
        (lambda x: x.sum(), ShapeError, r"expected \[n=1000\] for n values, got \(\)"),
    ],
)
def test_useless_weights_are_errors(result, error, text):
    with pytest.raises(error, match=text):
        pk.infer(likelihood_of(result), DATA, PRIOR, rng=0)


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"chunk": 0}, {"proposal": "posterior"}])
def test_options_are_checked(wrong):
    with pytest.raises(DataError, match=r"^ImportanceSampling: expected draws and chunk >= 1"):
        ImportanceSampling(**wrong)


def test_a_positive_site_needs_its_jacobian():
    """The evidence of a gamma-exponential pair: its log prior is stated for the value."""
    y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0], dtype=torch.float64)
    model = RateModel()
    a, b = model.exact(y)
    gamma = torch.distributions.Gamma(torch.tensor(a).double(), b)
    rate = torch.tensor(0.7, dtype=torch.float64)
    exact = model.log_joint({"rate": rate}, y) - gamma.log_prob(rate)
    guide = Fixed(
        MeanField(),
        {"rate": {"loc": torch.zeros((), dtype=torch.float64), "log_scale": rate.log()}},
    )
    post = pk.infer(model, y, ImportanceSampling(500), guide=guide, rng=0, chains=100)
    assert_mean(evidence_ratios(post, exact), 1.0, "evidence over a positive site")
