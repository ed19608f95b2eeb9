"""Posteriors of hyper-parameters by NUTS, against a grid."""

from __future__ import annotations

import functools

import pytest
import torch

import probkit as pk
from probkit.inference import NUTS, Direct
from probkit.kernels import NNGPKernel
from probkit.models import BurrXII, InverseGamma, ScaleMixtureNNGP

CHAINS = 16


def _problem(law=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64)[:, None]
    noise = torch.randn(12, generator=generator, dtype=torch.float64)
    model = ScaleMixtureNNGP(
        NNGPKernel(depth=1), law or InverseGamma(2.0, 2.0), learn=("kernel.w_std", "noise_var")
    )
    return model, (x, (2 * x[:, 0]).sin() + 0.3 * noise)


@functools.cache
def _sampled():
    """One run for all tests."""
    model, data = _problem()
    return pk.infer(model, data, Direct(hyper=NUTS(250, warmup=200)), rng=0, chains=CHAINS)


def _grid(model, data):
    """Points in the logarithms of both hyper-parameters, and their posterior weights."""
    data = model.prepare(data)
    axes = torch.linspace(-9, 6, 121, dtype=torch.float64), torch.linspace(-9, 6, 121).double()
    w, noise = (v.flatten() for v in torch.meshgrid(*axes, indexing="ij"))
    hyper = {"kernel.w_std": w.exp(), "noise_var": noise.exp()}
    with torch.no_grad():
        log_p = model.log_evidence(hyper, data) + model.log_hyperprior(hyper) + w + noise
    weights = torch.softmax(log_p, 0)
    return hyper, weights


def _z(draws: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Distance of the mean of [chain, draw] in standard errors, taken from the chains' means."""
    means = draws.mean(1)
    return (means.mean() - expected) / (means.std() / len(means) ** 0.5)


def _functions(w, noise):
    return {"log w": w.log(), "log noise": noise.log(), "log w^2": w.log() ** 2,
            "log noise^2": noise.log() ** 2, "both": w.log() * noise.log()}  # fmt: skip


@pytest.mark.slow
def test_draws_follow_the_posterior_on_a_grid():
    model, data = _problem()
    hyper, weights = _grid(model, data)
    grid = weights.reshape(121, 121)
    edge = grid[[0, -1]].sum() + grid[:, [0, -1]].sum()
    assert float(edge) < 1e-3  # the grid holds the posterior
    post = _sampled()
    expected = _functions(hyper["kernel.w_std"], hyper["noise_var"])
    found = _functions(post.draws["kernel.w_std"], post.draws["noise_var"])
    for name in expected:
        z = float(_z(found[name], (weights * expected[name]).sum()))
        # The 0.9999 quantile of |t| with 15 degrees of freedom.
        assert abs(z) < 5.2, (name, z)

    # Predictions average over the same posterior.
    new = data[0][:3] + 0.1
    nodes = weights > 1e-9
    parts = model.condition(model.prepare(data), {k: v[nodes] for k, v in hyper.items()})
    whole = (weights[nodes][:, None] * _means(model, parts, new)).sum(0)
    each = _means(model, post, new).reshape(CHAINS, -1, 3)
    torch.testing.assert_close(each.mean((0, 1)), post.predict(new).mean)
    for k in range(3):
        assert abs(float(_z(each[..., k], whole[k]))) < 5.2


def _means(model, post, new):
    """Predictive mean [hyper, row] of each hyper-parameter draw."""
    return model.predict(post, new).dist.mean


@pytest.mark.slow
def test_a_wrong_prior_is_seen():
    """The grid of a model with another prior is many standard errors away."""
    model, data = _problem()
    other = ScaleMixtureNNGP(
        NNGPKernel(depth=1), InverseGamma(2.0, 2.0), learn=model.learn, hyper_scale=0.2
    )
    hyper, weights = _grid(other, data)
    post = _sampled()
    z = _z(post.draws["noise_var"].log(), (weights * hyper["noise_var"].log()).sum())
    assert abs(float(z)) > 8


def test_the_export_holds_scales_that_belong_to_their_hyper_parameters():
    """sigma^2 is drawn given each hyper-parameter draw: its mean follows theirs."""
    model, data = _problem(BurrXII(4.0, 2.0))
    from probkit.inference.direct import condition_on_draws
    from probkit.posterior import make_posterior
    from probkit.sampler import Problem
    from probkit.sources import Draws

    problem = Problem(model, model.prepare(data))
    w_std = torch.tensor([0.3, 6.0]).double().repeat(4, 60)  # [chain, draw]
    values = {"kernel.w_std": w_std, "noise_var": torch.full_like(w_std, 0.1)}
    source = Draws(values)
    post = condition_on_draws(problem, make_posterior(problem, source), source)
    exported = post.to_arviz(rng=0).posterior
    assert dict(exported.sizes) == {"chain": 4, "draw": 120}
    assert bool((exported["kernel.w_std"].values == w_std.numpy()).all())
    law = post.source.joint["scale_var"]
    drawn = torch.tensor(exported["scale_var"].values)
    for number in (0, 1):
        mean, variance = law.mean[0, number], law.variance[0, number]
        part = drawn[:, number::2]
        z = (part.mean() - mean) / (variance / part.numel()).sqrt()
        assert abs(float(z)) < 4
    assert float(law.mean[0, 0]) != pytest.approx(float(law.mean[0, 1]), rel=0.05)


def test_a_fit_may_learn_the_kernel_alone():
    """Hyper-parameters without the noise: batches lead all the same."""
    model, data = _problem()
    alone = ScaleMixtureNNGP(NNGPKernel(depth=1), learn=("kernel.w_std",))
    post = pk.infer(alone, data, Direct(hyper=NUTS(5, warmup=10)), rng=0, chains=2)
    new = data[0][:4]
    parts = [
        pk.infer(alone, data, Direct(hyper={"kernel.w_std": value}), rng=0).predict(new)
        for value in post.draws["kernel.w_std"].flatten()
    ]
    whole = post.predict(new)
    torch.testing.assert_close(whole.mean, torch.stack([p.mean for p in parts]).mean(0))
    density = torch.stack([p.log_prob(data[1][:4]).exp() for p in parts]).mean(0)
    torch.testing.assert_close(whole.log_prob(data[1][:4]).exp(), density)
