"""Networks as surrogates: exact where they are linear, and honest about what they cannot do."""

from __future__ import annotations

import logging

import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qMaxValueEntropy,
)
from botorch.models import SingleTaskGP
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.sampling.normal import SobolQMCNormalSampler

import probkit as pk
from probkit._botorch_ensemble import MemberPosterior
from probkit._botorch_posterior import PredictivePosterior
from probkit.bo import Float, Space, Study
from probkit.bo.domain import Domain
from probkit.bo.surrogates import (
    DKLSurrogate,
    EnsembleSurrogate,
    HMCSurrogate,
    LaplaceSurrogate,
    ModelSurrogate,
    NNGPSurrogate,
    PosteriorSurrogate,
    SGHMCSurrogate,
    make_surrogate,
    warm_state,
)
from probkit.bo.surrogates.data import training_data
from probkit.bo.surrogates.dense_gp import DenseGP
from probkit.bo.surrogates.networks import tempered
from probkit.density import log_joint_of
from probkit.inference import Direct
from probkit.kernels import NNGPKernel
from probkit.models import ScaleMixtureNNGP
from probkit.numerics import ess_from_log_weights

SMALL = {
    "hmc": HMCSurrogate(
        hidden=(8,), chains=4, draws=5, warmup=10, rewarm=3, ascent=60, max_steps=12, warm_steps=8
    ),
    "sghmc": SGHMCSurrogate(hidden=(8,), chains=2, draws=5, warmup=30, thin=2, ascent=40),
    "ensemble": EnsembleSurrogate(hidden=(8,), members=4, steps=40, warm_steps=10),
    "laplace": LaplaceSurrogate(hidden=(8,), steps=60),
    "dkl": DKLSurrogate(hidden=(8,), latent=2, pretraining=20, steps=20),
    "nngp": NNGPSurrogate(depth=2, iterations=5),
}


def _data(rows=12, outputs=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 2, generator=generator).double()
    y = torch.stack([50 + 10 * torch.sin(4 * x[:, 0]) + x[:, 1], x.sum(1)], 1)[:, :outputs]
    return x, y


@pytest.mark.parametrize("name", SMALL)
def test_every_surrogate_is_a_botorch_model(name):
    x, y = _data()
    model = make_surrogate(SMALL[name], x, y, rng=0)
    at = x[:6].reshape(3, 2, 2) * 0.9
    whole = model.posterior(at)
    assert whole.mean.shape == whole.variance.shape == (3, 2, 1)
    part = model.posterior(at[1])
    torch.testing.assert_close(whole.mean[1], part.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.variance[1], part.variance, rtol=1e-6, atol=1e-9)
    noisy = model.posterior(at, observation_noise=True)
    assert bool((noisy.variance > whole.variance).all())
    torch.testing.assert_close(noisy.mean, whole.mean, rtol=1e-6, atol=1e-6)
    assert model.batch_shape == torch.Size() and model.num_outputs == 1
    torch.testing.assert_close(model.subset_output([0]).posterior(at).mean, whole.mean)
    with pk.scope(rng=0):
        value = qLogExpectedImprovement(model, y.max())(at)
    assert value.shape == (3,) and bool(torch.isfinite(value).all())
    # On the scale of the user's data: outcomes are near 50.
    assert 30 < float(whole.mean.mean()) < 70
    again = make_surrogate(SMALL[name], x, y, rng=0)
    assert torch.equal(again.posterior(at).mean, whole.mean)


@pytest.mark.parametrize("name", SMALL)
def test_later_rounds_start_from_the_last_one(name):
    x, y = _data(13)
    first = make_surrogate(SMALL[name], x[:12], y[:12], rng=0)
    state = warm_state(first)
    second = make_surrogate(SMALL[name], x, y, previous=state, rng=1)
    again = make_surrogate(SMALL[name], x, y, previous=first, rng=1)
    assert torch.equal(second.posterior(x).mean, again.posterior(x).mean)
    other = make_surrogate(SMALL[name], x[:, :1], y, previous=state, rng=1)  # Does not fit: afresh.
    assert other.posterior(x[:, :1]).mean.shape == (13, 1)


@pytest.mark.parametrize("name", ["hmc", "sghmc", "ensemble", "laplace"])
def test_one_network_predicts_all_outputs(name):
    x, y = _data(outputs=2)
    model = make_surrogate(SMALL[name], x, y, rng=0)
    assert not hasattr(model, "models") and model.num_outputs == 2
    both = model.posterior(x)
    one = model.subset_output([1]).posterior(x)
    torch.testing.assert_close(both.mean[:, 1:], one.mean)
    torch.testing.assert_close(both.variance[:, 1:], one.variance, rtol=1e-6, atol=1e-12)
    assert model.posterior(x, output_indices=[1]).mean.shape == (12, 1)
    assert float(both.mean[:, 0].mean()) > 30 > float(both.mean[:, 1].mean())


def test_known_noise_is_that_of_the_network():
    x, y = _data()
    variance = torch.full_like(y, 4.0)
    for name in ("hmc", "laplace", "ensemble"):
        model = make_surrogate(SMALL[name], x, y, variance, rng=0)
        gain = model.posterior(x, observation_noise=True).variance - model.posterior(x).variance
        torch.testing.assert_close(gain, variance, rtol=1e-6, atol=1e-6)
    exact = HMCSurrogate(noise="none", noise_var=1e-3).network()
    assert exact.noise_var == pytest.approx(1e-4)


def test_categories_reach_a_network_as_columns():
    x, y = _data()
    x = torch.cat([x, torch.arange(12.0).remainder(3)[:, None].double()], 1)
    bounds = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 2.0]])
    model = make_surrogate(SMALL["ensemble"], x, y, bounds=Domain(bounds, categorical=(2,)), rng=0)
    assert model.source.context.data[0].shape == (12, 5)
    assert model.source.draws["weight_0"].shape[-2:] == (5, 8)


# ------------------------------------------------------------------------- exact where linear


def _linear_posterior(x, y, noise_var, prior_var):
    """Mean and covariance [d + 1] of the weights of Bayesian linear regression."""
    features = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    precision = features.T @ features / noise_var
    precision = precision + torch.eye(features.shape[1]).double() / prior_var
    covariance = torch.linalg.inv(precision)
    return covariance @ features.T @ y[:, 0] / noise_var, covariance


def _linear_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 3, generator=generator).double()
    y = x[:, :1] - 2 * x[:, 1:2] + 0.5 * torch.randn(20, 1, generator=generator).double()
    return x, (y - y.mean()) / y.std()


LINEAR = {
    "hidden": (),
    "prior": "iid",
    "prior_std": 1.5,
    "learn_gains": None,
    "noise_var": 0.25,
    "noise": "fixed",
}


def test_laplace_without_hidden_layers_is_linear_regression():
    x, y = _linear_data()
    spec = LaplaceSurrogate(structure="full", steps=1000, lr=0.1, tune=False, **LINEAR)
    model = make_surrogate(spec, x, y, outcome="none", rng=0)
    mean, covariance = _linear_posterior(x, y, 0.25, 2.25)
    at = torch.cat([x[:7] * 0.7, torch.ones(7, 1).double()], 1)
    posterior = model.posterior(x[:7] * 0.7)
    assert isinstance(posterior, GPyTorchPosterior)
    torch.testing.assert_close(posterior.mean[:, 0], at @ mean, rtol=0, atol=1e-6)
    found = posterior.distribution.covariance_matrix
    torch.testing.assert_close(found, at @ covariance @ at.T, rtol=0, atol=1e-6)


def test_conditioning_a_linearised_network_is_exact():
    """Linear regression on old and new data together."""
    x, y = _linear_data()
    spec = LaplaceSurrogate(structure="full", steps=1000, lr=0.1, tune=False, **LINEAR)
    model = make_surrogate(spec, x[:14], y[:14], outcome="none", rng=0)
    joined = model.condition_on_observations(x[14:], y[14:])
    mean, covariance = _linear_posterior(x, y, 0.25, 2.25)
    at = torch.cat([x[:5], torch.ones(5, 1).double()], 1)
    posterior = joined.posterior(x[:5])
    torch.testing.assert_close(posterior.mean[:, 0], at @ mean, rtol=0, atol=1e-5)
    found = posterior.distribution.covariance_matrix
    torch.testing.assert_close(found, at @ covariance @ at.T, rtol=0, atol=1e-5)
    twice = model.condition_on_observations(x[14:16], y[14:16])
    twice = twice.condition_on_observations(x[16:], y[16:]).posterior(x[:5])
    torch.testing.assert_close(twice.mean, posterior.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(twice.variance, posterior.variance, rtol=0, atol=1e-6)


def test_a_linearised_network_looks_ahead():
    x, y = _data()
    model = make_surrogate(SMALL["laplace"], x, y, rng=0)
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    fantasy = model.fantasize(x[:2].reshape(2, 1, 2), sampler)
    assert fantasy.posterior(x[:3].expand(4, 2, 3, 2)).mean.shape == (4, 2, 3, 1)
    with pk.scope(rng=0):
        gradient = qKnowledgeGradient(model, num_fantasies=4)
        assert gradient(x[:10].reshape(2, 5, 2)).shape == (2,)
        entropy = qMaxValueEntropy(model, x, num_fantasies=4, train_inputs=x)
        assert bool(torch.isfinite(entropy(x[:3, None])).all())
    assert LogExpectedImprovement(model, y.max())(x[:3, None]).shape == (3,)


@pytest.mark.slow
def test_hmc_without_hidden_layers_is_linear_regression():
    """64 chains of 300 draws: the Monte Carlo error of a mean is below .02 standard deviations."""
    x, y = _linear_data()
    spec = HMCSurrogate(
        chains=64, draws=300, warmup=200, ascent=200, length=3.0, max_steps=64, **LINEAR
    )
    model = make_surrogate(spec, x, y, outcome="none", rng=0)
    mean, covariance = _linear_posterior(x, y, 0.25, 2.25)
    draws = model.source.draws
    weights = torch.cat([draws["weight_0"].flatten(2), draws["bias_0"]], -1).flatten(0, 1)
    sd = covariance.diagonal().sqrt()
    assert float(((weights.mean(0) - mean) / sd).abs().max()) < 0.05
    gap = (torch.cov(weights.T) - covariance) / torch.outer(sd, sd)
    assert float(gap.abs().max()) < 0.1


def test_deep_kernel_learning_with_identity_features_is_the_process():
    x, y = _data()
    identity = make_surrogate(DKLSurrogate(hidden=()), x, y, rng=0)
    plain = make_surrogate("gp", x, y, options={"kernel": "matern"}, rng=0)
    for one, other in zip(
        (identity.posterior(x).mean, identity.posterior(x * 0.9).variance),
        (plain.posterior(x).mean, plain.posterior(x * 0.9).variance),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert isinstance(plain, SingleTaskGP)


def test_gradients_of_all_chains_at_once_are_those_of_a_loop():
    x, y = _data()
    model = SMALL["hmc"].network()
    values = model.initial_values((x, y[:, 0]), 6, rng=torch.Generator().manual_seed(0))
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    together = torch.autograd.grad(
        log_joint_of(model, leaves, (x, y[:, 0])).sum(), list(leaves.values())
    )
    for chain in range(6):
        own = {k: v[chain].detach().requires_grad_() for k, v in values.items()}
        alone = torch.autograd.grad(model.log_joint(own, (x, y[:, 0])), list(own.values()))
        for one, other in zip(together, alone, strict=True):
            scale = float(other.abs().max()) + 1
            assert float((one[chain] - other).abs().max()) / scale <= 1e-10


def test_a_network_learns_its_misfit_where_outcomes_are_exact():
    x, y = _data()
    for surrogate, noise in ((SMALL["hmc"], "learned"), (SMALL["laplace"], "none"), ("gp", "none")):
        study = Study(Space(a=Float(0, 1), b=Float(0, 1)), noise="none", rng=0, surrogate=surrogate)
        for row, value in zip(x.tolist(), y[:, 0].tolist(), strict=True):
            study.attach(dict(zip("ab", row, strict=True)), value)
        assert study.settings.surrogate_for(study.space, study.outcomes).noise == noise
        model = study.model()
        if surrogate is SMALL["hmc"]:
            assert "noise_var" in model.source.draws


# --------------------------------------------------------------------- reweighting, fallback


def test_the_same_data_need_no_new_draws():
    x, y = _data()
    first = make_surrogate(SMALL["hmc"], x, y, rng=0)
    second = make_surrogate(SMALL["hmc"], x, y, previous=first, rng=1)
    assert second.diagnostics["sampled"] == 0.0
    assert second.diagnostics["ess"] == pytest.approx(20.0)
    torch.testing.assert_close(second.posterior(x).mean, first.posterior(x).mean)
    third = make_surrogate(SMALL["hmc"], x, y, previous=second, rng=2)
    torch.testing.assert_close(third.posterior(x).mean, first.posterior(x).mean)


def test_surprising_data_are_sampled_anew():
    x, y = _data()
    first = make_surrogate(SMALL["hmc"], x, y, rng=0)
    new_y = torch.cat([y, y[:1] + 100])
    new_x = torch.cat([x, 1 - x[:1]])
    second = make_surrogate(SMALL["hmc"], new_x, new_y, previous=first, rng=1)
    assert second.diagnostics["sampled"] == 1.0


def test_conditioning_reweights_the_draws_by_the_likelihood():
    x, y = _data()
    spec = HMCSurrogate(**{**SMALL["hmc"].__dict__, "noise": "fixed", "noise_var": 0.05})
    model = make_surrogate(spec, x, y, rng=0)
    new_x, new_y = x[:2] * 0.8, torch.tensor([[52.0], [54.0]]).double()
    joined = model.condition_on_observations(new_x, new_y)
    f = model.posterior(new_x).values[..., 0]  # [member, 2]
    sd = 0.05**0.5 * float(model.outcome_transform.stdvs)
    law = torch.distributions.Normal(f, torch.tensor(sd).double())
    log_weights = law.log_prob(new_y[:, 0]).sum(-1)
    weights = torch.softmax(log_weights, 0)
    expected = (weights[:, None] * model.posterior(x).values[..., 0]).sum(0)
    torch.testing.assert_close(joined.posterior(x).mean[:, 0], expected, rtol=1e-8, atol=1e-8)
    assert len(joined.source.context.data[0]) == 14


def test_chains_that_fail_are_replaced_by_a_process(caplog, monkeypatch):
    from probkit.bo.surrogates import hmc

    monkeypatch.setattr(hmc, "_is_sound", lambda post: False)
    x, y = _data()
    with caplog.at_level(logging.WARNING, logger="probkit"):
        model = make_surrogate(SMALL["hmc"], x, y, rng=0)
    assert isinstance(model, DenseGP) and model.diagnostics == {"fallback": 1.0}
    assert "a Gaussian process takes its place" in caplog.text
    monkeypatch.undo()
    after = make_surrogate(SMALL["hmc"], x, y, previous=model, rng=0)
    assert isinstance(after, PosteriorSurrogate)


def test_tempering_keeps_enough_draws():
    weights = torch.tensor([0.0, -50.0, -60.0, -1000.0, float("nan")]).double()
    softer = tempered(weights, 3.0)
    assert float(ess_from_log_weights(softer, 0)) == pytest.approx(3.0, abs=0.05)
    assert float(softer[4]) == -torch.inf
    flat = torch.zeros(5).double()
    assert torch.equal(tempered(flat, 3.0), flat)


# ------------------------------------------------------------------ any model, any posterior


def test_any_model_and_any_posterior_is_a_surrogate():
    x, y = _data()
    network = ScaleMixtureNNGP(NNGPKernel(depth=2), noise_var=0.01)
    model = make_surrogate(network, x, y, rng=0)
    assert isinstance(model, PosteriorSurrogate)
    standard = (y - y.mean()) / y.std()
    post = pk.infer(network, (x, standard[:, 0]), Direct(), rng=0)
    plain = make_surrogate(post, x, y, rng=0)
    torch.testing.assert_close(
        model.posterior(x).mean, y.mean() + y.std() * plain.posterior(x).mean, rtol=1e-8, atol=1e-8
    )
    ours, theirs = model.posterior(x[:4]), plain.posterior(x[:4])
    assert isinstance(ours, PredictivePosterior)
    torch.testing.assert_close(ours.variance, y.var() * theirs.variance, rtol=1e-8, atol=0)
    named = make_surrogate(ModelSurrogate(network), x, y, rng=0)
    torch.testing.assert_close(named.posterior(x).mean, model.posterior(x).mean)
    joined = model.condition_on_observations(x[:1] * 0.5, y[:1])
    assert len(joined.source.context.data[0]) == 13


def test_what_a_surrogate_cannot_do_is_named():
    x, y = _data()
    model = make_surrogate(SMALL["ensemble"], x, y, rng=0)
    assert isinstance(model.posterior(x), MemberPosterior)
    with pytest.raises(pk.CapabilityError, match="LogExpectedImprovement assumes a Gaussian"):
        LogExpectedImprovement(model, 0.0)(x[:2, None])
    with pytest.raises(pk.CapabilityError, match="fantasies .* use qLogExpectedImprovement"):
        model.fantasize(x[:1], None)
    with pytest.raises(pk.ShapeError, match=r"expected X \[\*batch, q, d\]"):
        model.posterior(x[0])
    with pytest.raises(pk.CapabilityError, match="expected True or False, got a tensor"):
        model.posterior(x, observation_noise=y)
    laplace = make_surrogate(SMALL["laplace"], *_data(outputs=2), rng=0)
    with pytest.raises(pk.CapabilityError, match=r"expected one output, got 2; take subset_output"):
        laplace.condition_on_observations(x[:1], y[:1])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: HMCSurrogate(chains=0), "expected whole chains, draws, .* >= 1, got 0"),
        (lambda: HMCSurrogate(noise="no"), "noise: expected 'learned', 'fixed' or 'none', got"),
        (lambda: HMCSurrogate(noise_var=0.0), "noise_var: expected a finite number > 0, got 0.0"),
        (lambda: SGHMCSurrogate(thin=0), "expected whole chains, draws, warmup, thin and ascent"),
        (lambda: LaplaceSurrogate(steps=0), "steps: expected a whole number >= 1, got 0"),
        (lambda: DKLSurrogate(latent=0), "hidden and latent: expected whole widths >= 1"),
        (lambda: DKLSurrogate(noise="x"), "noise: expected 'learned' or 'none', got 'x'"),
        (lambda: NNGPSurrogate(concentration=1.0), "concentration: expected a finite number > 1"),
        (lambda: EnsembleSurrogate(hidden=(0,)), "hidden: expected widths >= 1"),
    ],
)
def test_bad_options_are_named(make, text):
    with pytest.raises(pk.DataError, match=text):
        make()


@pytest.mark.slow
def test_hmc_covers_a_wavy_function():
    """Nine points; published numbers of a single chain are coverage .24 and score 22.6."""

    def truth(u):
        z = 10 * u - 5
        return (1.4 - 3 * z) * torch.sin(1.5 * z) / 8

    u = [0.7576, 0.2793, 0.4031, 0.7347, 0.0993, 0.7999, 0.7544, 0.8695, 0.4388]
    x = torch.tensor(u).double()[:, None]
    grid = torch.linspace(0, 1, 101).double()[:, None]
    spec = HMCSurrogate(
        prior="iid",
        prior_std=10**0.5,
        learn_gains=None,
        noise="fixed",
        noise_var=1e-3,
        chains=16,
        draws=100,
        warmup=100,
        length=3.0,
        max_steps=128,
    )
    model = make_surrogate(spec, x, truth(x), outcome="none", rng=1)
    f = model.posterior(grid).values[..., 0]
    low, high = f.quantile(0.025, dim=0), f.quantile(0.975, dim=0)
    y = truth(grid[:, 0])
    assert float(((y >= low) & (y <= high)).double().mean()) >= 0.6
    law = torch.distributions.Normal(f.mean(0), f.std(0))
    assert float(-law.log_prob(y).mean()) <= 1.0


def test_warnings_of_data_are_named():
    x, y = _data()
    with pytest.warns(pk.NumericsWarning, match="X came in float32"):
        training_data(x.float(), y)
    with pytest.warns(pk.NumericsWarning, match=r"all outcomes of output 0 are equal \(1\)"):
        model = make_surrogate("gp", x, torch.ones_like(y), rng=0)
    assert bool(torch.isfinite(model.posterior(x).mean).all())
