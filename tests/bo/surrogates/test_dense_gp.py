"""Gaussian processes: the same numbers as BoTorch's, faster."""

from __future__ import annotations

import itertools
import math

import gpytorch
import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.gpytorch import BatchedMultiOutputGPyTorchModel
from botorch.models.utils.gpytorch_modules import (
    get_covar_module_with_dim_scaled_prior,
    get_matern_kernel_with_gamma_prior,
)
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.mlls import ExactMarginalLogLikelihood

import probkit as pk
from probkit.bo.domain import Domain
from probkit.bo.surrogates import GPSurrogate, make_surrogate, warm_state
from probkit.bo.surrogates.data import training_data
from probkit.bo.surrogates.dense_gp import DenseGP
from probkit.bo.surrogates.encoding import Encode
from probkit.bo.surrogates.gp import dense_model
from probkit.bo.surrogates.gp_fit import fit_map, hyper_parameters, log_posterior
from probkit.bo.surrogates.hamming import MixedKernel

NAMES = ("gp", "gp-paper", "gp-exact")


def _data(rows=15, features=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, features, generator=generator).double()
    y = 5 + 2 * torch.sin(4 * x[:, :1]) + x[:, 1:2] ** 2
    return x, y + 0.05 * torch.randn(rows, 1, generator=generator).double()


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_those_of_botorch(name, noisy):
    x, y = _data()
    model = make_surrogate(name, x, y, rng=0)
    at = (x[:8] * 0.9 + 0.05).reshape(2, 4, 3).requires_grad_()
    ours = model.posterior(at, observation_noise=noisy)
    theirs = BatchedMultiOutputGPyTorchModel.posterior(model, at, observation_noise=noisy)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-8, atol=1e-9)
    one, other = (p.distribution.covariance_matrix for p in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    slopes = [torch.autograd.grad(p.mean.sum() + p.variance.sum(), at)[0] for p in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)
    single = model.posterior(at.reshape(8, 1, 3), observation_noise=noisy)
    torch.testing.assert_close(single.variance.reshape(2, 4, 1), ours.variance, rtol=1e-7, atol=0)


def test_the_objective_of_the_fit_is_that_of_botorch():
    x, y = _data()
    for kind in (GPSurrogate(), GPSurrogate(preset="paper")):
        model = kind.fit(training_data(x, y), rng=0).requires_grad_()
        model.train()
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        expected = mll(model(*model.train_inputs), model.train_targets) * len(y)
        found = log_posterior(model)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        parameters = [p for p in model.parameters()]
        for one, other in zip(
            torch.autograd.grad(found, parameters),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_fit_is_as_good_as_that_of_botorch(seed):
    x, y = _data(seed=seed)
    model = GPSurrogate(kernel="rbf").fit(training_data(x, y), rng=0)
    theirs = SingleTaskGP(x, y)
    with pk.scope(rng=0):
        fit_gpytorch_mll(ExactMarginalLogLikelihood(theirs.likelihood, theirs))
    with torch.no_grad():
        assert float(log_posterior(model.train())) >= float(log_posterior(theirs.train())) - 1e-2


def test_priors_are_those_of_botorch():
    data = training_data(*_data())
    ours = GPSurrogate(kernel="rbf").fit(data, rng=0).requires_grad_().train()
    theirs = SingleTaskGP(data.X, data.Y)
    theirs.covar_module.lengthscale = ours.covar_module.lengthscale.detach()
    theirs.likelihood.noise = ours.likelihood.noise.detach()
    theirs.mean_module.constant.data.copy_(ours.mean_module.constant.detach())
    torch.testing.assert_close(log_posterior(ours), log_posterior(theirs.train()))
    own = GPSurrogate(preset="paper").fit(data, rng=0).covar_module
    published = get_matern_kernel_with_gamma_prior(3)
    for kernel in (own, published):
        prior = kernel.base_kernel.lengthscale_prior
        assert [float(prior.concentration), float(prior.rate)] == [3.0, 6.0]
        assert float(kernel.outputscale_prior.rate) == pytest.approx(0.15)


def test_later_rounds_reach_the_same_mode_from_the_last_one():
    x, y = _data(20)
    before = make_surrogate("gp", x[:18], y[:18], rng=0)
    fresh = make_surrogate("gp", x, y, rng=0)
    warm = make_surrogate("gp", x, y, previous=warm_state(before), rng=0)
    again = make_surrogate("gp", x, y, previous=before, rng=0)
    with torch.no_grad():
        values = [float(log_posterior(m.train())) for m in (fresh, warm)]
    assert values[1] >= values[0] - 1e-3
    assert all(
        torch.equal(a, b) for a, b in zip(warm.parameters(), again.parameters(), strict=True)
    )


def test_another_number_of_features_starts_afresh():
    x, y = _data()
    other = make_surrogate("gp", x[:, :2], y, rng=0)
    model = make_surrogate("gp", x, y, previous=other, rng=0)
    assert model.covar_module.lengthscale.shape == (1, 3)


def test_exact_outcomes_are_interpolated():
    x, _ = _data()
    y = torch.sin(3 * x[:, :1]) + x[:, 1:2]
    model = make_surrogate("gp-exact", x, y, rng=0)
    assert float((model.posterior(x).mean - y).abs().max()) < 1e-3 * float(y.std())
    assert isinstance(model.covar_module, gpytorch.kernels.MaternKernel)
    zero = make_surrogate("gp", x, y, torch.zeros_like(y), rng=0)
    torch.testing.assert_close(zero.posterior(x).mean, model.posterior(x).mean)
    learned = make_surrogate("gp", x, y, rng=0)
    assert isinstance(learned.covar_module, gpytorch.kernels.RBFKernel)


def test_known_variances_are_used():
    x, y = _data()
    variance = torch.full_like(y, 1e-4)
    variance[3] = 25.0
    y = y.clone()
    y[3] += 4.0
    model = make_surrogate("gp", x, y, variance, rng=0)
    residual = (model.posterior(x).mean - y).abs().detach()
    assert float(residual[3]) > 1.0
    assert float(residual[torch.arange(15) != 3].max()) < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_conditioning_is_fitting_to_all_data_with_the_same_hyper_parameters(name):
    x, y = _data(12)
    model = make_surrogate(name, x, y, rng=0)
    new_x, new_y = x[:2] * 0.5 + 0.2, torch.tensor([[5.5], [6.0]]).double()
    joined = model.condition_on_observations(new_x, new_y)
    data = training_data(torch.cat([x, new_x]), torch.cat([y, new_y]))
    whole = dense_model(
        data,
        model.covar_module,
        Encode(data.domain),
        exact=name == "gp-exact",
        paper_noise=name == "gp-paper",
    )
    # The same units and noise as before: only the data grows.
    scaled = (data.Y - model.outcome_transform.means) / model.outcome_transform.stdvs
    K = model.covar_module(data.X).to_dense()
    noise = model.likelihood.noise.mean()
    cross = model.covar_module(x[4:6], data.X).to_dense()
    weights = torch.linalg.solve(K + noise * torch.eye(14).double(), scaled - _constant(model))
    expected = (cross @ weights + _constant(model)) * model.outcome_transform.stdvs
    expected = expected + model.outcome_transform.means
    found = joined.posterior(x[4:6]).mean
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert isinstance(whole, DenseGP)


def _constant(model):
    return model.mean_module.constant.detach()


def test_fantasies_have_their_batch():
    x, y = _data(10)
    model = make_surrogate("gp", x, y, rng=0)
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    fantasy = model.fantasize(x[:2].reshape(2, 1, 3) + 0.01, sampler)
    mean = fantasy.posterior(x[:3].expand(4, 2, 3, 3)).mean
    assert mean.shape == (4, 2, 3, 1)
    before = model.posterior(x[:3]).mean
    torch.testing.assert_close(model.posterior(x[:3]).mean, before)  # The model is unchanged.


def test_outputs_are_models_of_their_own():
    x, y = _data()
    both = torch.cat([y, -3 * y.square()], 1)
    model = make_surrogate("gp", x, both, rng=0)
    assert isinstance(model, ModelListGP)
    alone = make_surrogate("gp", x, both[:, 1], rng=0)
    torch.testing.assert_close(
        model.subset_output([1]).posterior(x).mean, alone.posterior(x).mean, rtol=1e-5, atol=1e-5
    )
    assert model.posterior(x[:4].reshape(2, 2, 3)).mean.shape == (2, 2, 2)
    again = make_surrogate("gp", x, both, previous=warm_state(model), rng=0)
    assert len(warm_state(again)["outputs"]) == 2


@pytest.mark.parametrize("smoothness", ["rbf", "matern"])
def test_categories_are_one_apart(smoothness):
    kernel = MixedKernel(3, (1,), smoothness).double()
    lengths = torch.tensor([0.5, 2.0, 0.8]).double()
    kernel.lengthscale = lengths
    x = torch.tensor([[0.1, 0, 0.3], [0.1, 2, 0.3], [0.6, 1, 0.3], [0.6, 1, 0.9]]).double()
    K = kernel(x).to_dense().detach()
    for i, j in itertools.product(range(4), repeat=2):
        gap = x[i] - x[j]
        gap[1] = float(x[i, 1] != x[j, 1])
        r = float((gap / lengths).norm())
        root = math.sqrt(5) * r
        expected = (
            math.exp(-0.5 * r * r)
            if smoothness == "rbf"
            else (1 + root + root**2 / 3) * math.exp(-root)
        )
        assert float(K[i, j]) == pytest.approx(expected, abs=1e-9)
    assert torch.equal(kernel(x, diag=True), torch.ones(4).double())
    plain = MixedKernel(2, (), smoothness).double()
    reference = get_covar_module_with_dim_scaled_prior(2, use_rbf_kernel=smoothness == "rbf")
    reference = reference.double()
    reference.lengthscale = plain.lengthscale = torch.tensor([0.4, 1.3]).double()
    torch.testing.assert_close(
        plain(x[:, ::2]).to_dense(), reference(x[:, ::2]).to_dense(), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("name", [*NAMES, "ibnn"])
def test_the_names_of_categories_do_not_matter(name):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(20, 2, generator=generator).double()
    x[:, 1] = (3 * x[:, 1]).floor()
    y = x[:, :1] + torch.tensor([0.0, 3.0, 1.0]).double()[x[:, 1].long()][:, None]
    domain = Domain(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), categorical=(1,))
    other = x.clone()
    other[:, 1] = torch.tensor([2.0, 0.0, 1.0]).double()[x[:, 1].long()]
    models = [make_surrogate(name, data, y, bounds=domain, rng=0) for data in (x, other)]
    means = [m.posterior(d).mean for m, d in zip(models, (x, other), strict=True)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-4)


def test_batches_of_points_equal_the_loop():
    x, y = _data()
    for name in NAMES:
        model = make_surrogate(name, x, y, rng=0)
        batch = x[:6].reshape(3, 2, 3) * 0.8
        whole = model.posterior(batch)
        for k in range(3):
            part = model.posterior(batch[k])
            torch.testing.assert_close(whole.mean[k], part.mean)
            torch.testing.assert_close(
                whole.distribution.covariance_matrix[k], part.distribution.covariance_matrix
            )


def test_the_fit_stops_at_a_mode():
    x, y = _data()
    data = training_data(x, y)
    model = dense_model(data, MixedKernel(3), Encode(data.domain))
    first = hyper_parameters(model)
    reached = fit_map(model)
    after = hyper_parameters(model)
    moved = [float((first[name] - after[name]).abs().max()) for name in first]
    assert max(moved) > 1e-2
    model.train()
    with torch.no_grad():
        assert reached == pytest.approx(float(log_posterior(model)), abs=1e-8)
        for name, value in model.named_parameters():  # A mode: no step along any parameter helps.
            for step in (0.97, 1.03):
                old = value.data.clone()
                value.data.mul_(step)
                constraint = model.constraint_for_parameter_name(name)
                if constraint is None or bool(constraint.check(value)):
                    assert float(log_posterior(model)) <= reached + 1e-3
                value.data.copy_(old)


@pytest.mark.parametrize("outcome", ["standardize", "winsorize", "rank"])
def test_exact_outcomes_stay_exact_behind_every_transform(outcome):
    """The floor of the noise is a millionth of what the model sees, not of the heavy tails."""
    x = torch.linspace(0, 1, 15, dtype=torch.float64)[:, None]
    y = torch.sin(3 * x)
    y[-2:] = -1e5
    model = make_surrogate("gp-exact", x, y, outcome=outcome, rng=0)
    share = float(model.likelihood.noise.mean() / model.train_targets.var())
    assert share == pytest.approx(1e-6, rel=0.1)  # GPyTorch rounds variances below 1e-6 up to it
