"""Laplace where the answer is known: linear models, single rows, canonical links."""

from __future__ import annotations

import math

import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data
from torch.distributions import MultivariateNormal

import probkit as pk
from probkit.inference import MAP, DeepEnsemble, Fixed, ImportanceSampling, Laplace
from probkit.models import BNN, LogNormal
from probkit.testing import worst_z, z_bound

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(14, 3, generator=GENERATOR).double()
Y = X[:, 0] - 2 * X[:, 1] + 0.3 * torch.randn(14, generator=GENERATOR).double()
NEW = torch.randn(5, 3, generator=GENERATOR).double()
PRECISE = MAP(jacobian=True, tolerance=1e-11, max_iter=500)


def _with_one(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def _bayes(features, y, noise_var, prior_var):
    """Mean, covariance and log evidence of Bayesian linear regression, weights ~ N(0, V)."""
    v = prior_var * torch.ones(features.shape[1], dtype=features.dtype)
    precision = features.T @ features / noise_var + torch.diag(1 / v)
    covariance = torch.linalg.inv(precision)
    gram = features * v @ features.T + noise_var * torch.eye(len(y), dtype=y.dtype)
    evidence = MultivariateNormal(torch.zeros_like(y), gram).log_prob(y)
    return covariance @ features.T @ y / noise_var, covariance, evidence


@pytest.mark.parametrize(
    ("structure", "curvature"),
    [("full", "ggn"), ("full", "hessian"), ("kron", "auto"), ("last_layer", "auto")],
)
def test_without_hidden_layer_it_is_bayesian_linear_regression(structure, curvature):
    model = BNN(hidden=(), noise_var=0.09, prior_std=1.5)
    post = pk.infer(model, (X, Y), Laplace(structure, PRECISE, curvature), rng=0)
    mean, covariance, evidence = _bayes(_with_one(X), Y, 0.09, 2.25)
    params = post.source.params[0]
    torch.testing.assert_close(params["loc"], mean, rtol=0, atol=1e-8)
    variance = params["covariance"].variance()
    torch.testing.assert_close(variance, covariance.diagonal(), rtol=1e-8, atol=0)
    torch.testing.assert_close(post.log_evidence.value[0], evidence, rtol=0, atol=1e-8)
    features = _with_one(NEW)
    expected = features @ covariance @ features.T
    latent = post.predict(NEW, site="f", joint=True)
    torch.testing.assert_close(latent.mean, features @ mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(latent.dist.covariance_matrix, expected, rtol=0, atol=1e-8)
    noisy = post.predict(NEW, joint=True).dist.covariance_matrix
    added = expected + 0.09 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(noisy, added, rtol=0, atol=1e-8)
    torch.testing.assert_close(post.predict(NEW).variance, added.diagonal(), rtol=0, atol=1e-8)
    assert float(post.sample_stats["gap"]) < 1e-12


def test_fan_in_priors_with_other_biases_are_exact_too():
    """Weights of standard deviation gain / sqrt(3), a bias of standard deviation 0.7."""
    model = BNN(hidden=(), noise_var=0.09, prior="fan_in", gains=(2.0, 1.0), prior_std=0.7)
    prior = torch.tensor([4 / 3] * 3 + [0.49]).double()
    mean, covariance, evidence = _bayes(_with_one(X), Y, 0.09, prior)
    for structure in ("full", "kron"):
        post = pk.infer(model, (X, Y), Laplace(structure, PRECISE), rng=0)
        predicted = post.predict(NEW, site="f", joint=True)
        features = _with_one(NEW)
        torch.testing.assert_close(predicted.mean, features @ mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(
            predicted.dist.covariance_matrix, features @ covariance @ features.T, rtol=0, atol=1e-8
        )
        torch.testing.assert_close(post.log_evidence.value[0], evidence, rtol=0, atol=1e-8)


def test_standardised_models_predict_on_the_original_scale():
    x, y = 3 * X + 1, 100 + 20 * Y
    model = BNN(hidden=(), noise_var=0.09, standardize=True)
    post = pk.infer(model, (x, y), Laplace("kron", PRECISE), rng=0)
    sx, sy = (x - x.mean(0)) / x.std(0, correction=0), (y - y.mean()) / y.std(correction=0)
    mean, covariance, evidence = _bayes(_with_one(sx), sy, 0.09, 1.0)
    scale = y.std(correction=0)
    features = _with_one((NEW - x.mean(0)) / x.std(0, correction=0))
    predicted = post.predict(NEW, joint=True)
    torch.testing.assert_close(predicted.mean, features @ mean * scale + y.mean())
    expected = features @ covariance @ features.T + 0.09 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(predicted.dist.covariance_matrix, expected * scale**2)
    jacobian = len(y) * scale.log()
    torch.testing.assert_close(post.log_evidence.value[0], evidence - jacobian)


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_outputs_with_their_own_noise(structure):
    """Independent regressions; the Kronecker factors stay exact, being diagonal in the outputs."""
    y = torch.stack([Y, Y.square() - 1, 0.5 - Y], 1)
    noise = torch.tensor([0.04, 0.3, 0.1]).double()
    model = BNN(hidden=(), noise_var=LogNormal(-2.0, 1.0))
    mode = {
        "weight_0": torch.zeros(3, 3).double(),
        "bias_0": torch.zeros(3).double(),
        "noise_var": noise,
    }
    means, covariances, evidences = [], [], []
    for k in range(3):
        mean, covariance, evidence = _bayes(_with_one(X), y[:, k], float(noise[k]), 1.0)
        mode["weight_0"][:, k], mode["bias_0"][k] = mean[:3], mean[3]
        means.append(_with_one(NEW) @ mean)
        covariances.append(_with_one(NEW) @ covariance @ _with_one(NEW).T)
        evidences.append(evidence)
    post = pk.infer(model, (X, y), Laplace(structure, mode), rng=0)
    predicted = post.predict(NEW, joint=True)
    torch.testing.assert_close(predicted.mean, torch.stack(means, 1))
    table = predicted.dist.covariance_matrix.reshape(5, 3, 5, 3)
    for k in range(3):
        expected = covariances[k] + noise[k] * torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(table[:, k, :, k], expected)
        assert float(table[:, k, :, (k + 1) % 3].abs().max()) < 1e-12
    torch.testing.assert_close(post.log_evidence.value[0], torch.stack(evidences).sum())


def test_the_last_layer_is_bayesian_linear_regression_on_features():
    model = BNN(hidden=(7, 4), noise_var=0.05, prior_std=1.3)
    point = {k: v[0] for k, v in model.initial_values((X, Y), 1, rng=GENERATOR).items()}
    hidden = model.layers(point, X)[-1].inputs
    mean, covariance, _ = _bayes(_with_one(hidden), Y, 0.05, 1.69)
    point["weight_2"], point["bias_2"] = mean[:4, None], mean[4:]
    post = pk.infer(model, (X, Y), Laplace("last_layer", point), rng=0)
    features = _with_one(model.layers(point, NEW)[-1].inputs)
    predicted = post.predict(NEW, site="f", joint=True)
    torch.testing.assert_close(predicted.mean, features @ mean)
    expected = features @ covariance @ features.T
    torch.testing.assert_close(predicted.dist.covariance_matrix, expected)
    gram = 1.69 * _with_one(hidden) @ _with_one(hidden).T + 0.05 * torch.eye(14).double()
    evidence = MultivariateNormal(torch.zeros_like(Y), gram).log_prob(Y)
    torch.testing.assert_close(post.log_evidence.value[0], evidence)
    draws = post.sample(3, rng=0)
    assert torch.equal(draws["weight_0"], point["weight_0"].expand(3, -1, -1))
    assert set(post.analytic) == {"weight_2", "bias_2"}


def test_softmax_regression_has_equal_hessian_and_gauss_newton():
    """The categorical likelihood is canonical, so both are the same matrix at any point."""
    labels = (Y > 0.5).long() + (Y > -0.5).long()
    model = BNN(hidden=(), likelihood="categorical", outputs=3, prior_std=2.0)
    posts = [
        pk.infer(model, (X, labels), Laplace("full", PRECISE, c), rng=0) for c in ("ggn", "hessian")
    ]
    first, second = (p.source.params[0]["covariance"] for p in posts)
    torch.testing.assert_close(first.root @ first.root.T, second.root @ second.root.T)
    torch.testing.assert_close(posts[0].log_evidence.value, posts[1].log_evidence.value)


def test_a_gamma_posterior_in_its_logarithm():
    """Density of u = log rate: a u - b e^u, mode log(a / b), curvature a."""
    data = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0]).double()
    a, b = RateModel().exact(data)
    post = pk.infer(RateModel(), data, Laplace(mode=PRECISE), rng=0)
    params = post.source.params[0]
    assert float(params["loc"]) == pytest.approx(math.log(a / b), abs=1e-7)
    assert float(params["covariance"].variance()) == pytest.approx(1 / a, rel=1e-6)
    top = RateModel().log_joint(
        {"rate": torch.tensor(float(a / b), dtype=torch.float64)}, data
    ) + math.log(a / b)
    expected = float(top) + 0.5 * math.log(2 * math.pi / a)
    assert float(post.log_evidence.value) == pytest.approx(expected, abs=1e-9)
    assert float(post.sample_stats["gap"]) < 1e-10
    law = post.analytic["rate"]
    assert float(law.mean) == pytest.approx(a / b * math.exp(0.5 / a), rel=1e-6)


@pytest.mark.parametrize("guide", [None, "full"])
def test_normal_models_with_local_sites_are_exact(guide):
    data = torch.tensor([0.3, 1.2, 0.1, 0.8]).double()
    given = None if guide is None else pk.inference.FullRank()
    post = pk.infer(GroupModel(), data, Laplace(mode=PRECISE), guide=given, rng=0)
    mean, exact, evidence = GroupModel().exact(data)
    root = post.source.params[0]["covariance"].root
    torch.testing.assert_close(post.source.params[0]["loc"], mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(root @ root.T, exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(post.log_evidence.value[0], evidence, rtol=0, atol=1e-7)


def test_diagonal_precisions_are_those_of_the_full_matrix():
    full = pk.infer(LineModel(), line_data(), Laplace(mode=PRECISE), rng=0)
    diag = pk.infer(
        LineModel(), line_data(), Laplace(mode=PRECISE), guide=pk.inference.MeanField(), rng=0
    )
    assert diag.attrs["structure"] == "diag"
    root = full.source.params[0]["covariance"].root
    precision = torch.linalg.inv(root @ root.T)
    found = diag.source.params[0]["covariance"].variance()
    torch.testing.assert_close(found, 1 / precision.diagonal())


def test_draws_follow_the_gaussian():
    post = pk.infer(LineModel(), line_data(), Laplace(mode=PRECISE), rng=0)
    mean, covariance, _ = LineModel().exact(line_data())
    draws = post.sample(4000, rng=1)["w"] - mean
    products = draws[:, :, None] * draws[:, None]
    assert worst_z(draws, torch.zeros(2)) < z_bound(2)
    assert worst_z(products, covariance) < z_bound(4)


def test_it_serves_as_a_proposal_with_exact_weights():
    post = pk.infer(LineModel(), line_data(), Laplace(mode=PRECISE), rng=0)
    proposal = Fixed(post.source.guide, post.source.params[0])
    again = pk.infer(LineModel(), line_data(), ImportanceSampling(50), guide=proposal, rng=0)
    _, _, evidence = LineModel().exact(line_data())
    # Every weight is the evidence, since the proposal is the posterior.
    torch.testing.assert_close(again.log_evidence.value[0], evidence, rtol=0, atol=1e-6)
    assert float(again.log_weights.std()) < 1e-6


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "last_layer"])
def test_draws_of_the_weights_agree_with_the_linearised_prediction(structure):
    """Without hidden layers both are exact; 4000 draws, Bonferroni over all entries."""
    model = BNN(hidden=(), noise_var=0.09)
    mode = {
        "weight_0": torch.tensor([[1.0], [-2.0], [0.1]]).double(),
        "bias_0": torch.ones(1).double(),
    }
    with pytest.warns(pk.ConvergenceWarning):
        exact = pk.infer(model, (X, Y), Laplace(structure, mode), rng=0)
        other = pk.infer(model, (X, Y), Laplace(structure, mode, linearised=False), rng=0)
    closed = exact.predict(NEW, site="f", joint=True)
    drawn = model.predict(other, NEW, site="f", rng=3, draws=4000).values - closed.mean
    assert worst_z(drawn, torch.zeros(5)) < z_bound(5)
    products = drawn[:, :, None] * drawn[:, None]
    assert worst_z(products, closed.dist.covariance_matrix) < z_bound(25)


def test_several_chains_are_a_mixture_of_modes():
    model = BNN(hidden=(5,), noise_var=0.05)
    sampler = Laplace("kron", DeepEnsemble(1, 150, 0.05, fraction=1.0), tune=("prior",))
    post = pk.infer(model, (X, Y), sampler, rng=0, chains=3)
    assert post.log_evidence.value.shape == (3,)
    mixed = post.predict(NEW)
    assert mixed.dist.batch_shape == (3, 5)
    singles = [pk.infer(model, (X, Y), sampler, rng=0, chains=k).predict(NEW) for k in (1,)]
    torch.testing.assert_close(mixed.dist.loc[0], singles[0].mean)
    torch.testing.assert_close(mixed.dist.variance[0], singles[0].variance)
