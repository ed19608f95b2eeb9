"""Bayesian neural networks under HMC: exact where linear, honest on a small hard problem."""

from __future__ import annotations

import arviz
import pytest
import torch
from torch.distributions import Normal

import probkit as pk
from probkit.inference import HMC, DeepEnsemble
from probkit.models import BNN

pytestmark = pytest.mark.slow


def test_without_hidden_layer_it_is_bayesian_linear_regression():
    """64 chains; the tolerances are several times the Monte Carlo error of 19200 draws."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator).double()
    y = x[:, 0] - 2 * x[:, 1] + 0.5 * torch.randn(20, generator=generator).double()
    model = BNN(hidden=(), noise_var=0.25, prior_std=1.5)
    post = pk.infer(model, (x, y), HMC(draws=300, warmup=300), rng=0, chains=64)
    features = torch.cat([x, torch.ones(20, 1).double()], 1)
    precision = features.T @ features / 0.25 + torch.eye(5).double() / 2.25
    covariance = torch.linalg.inv(precision)
    mean = covariance @ features.T @ y / 0.25
    draws = torch.cat([post.draws["weight_0"].flatten(2), post.draws["bias_0"]], -1).flatten(0, 1)
    sd = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.05
    found = torch.cov(draws.T)
    assert float(((found - covariance) / torch.outer(sd, sd)).abs().max()) < 0.1


def _toy():
    """Nine points of a wavy function on the unit interval, and the truth on a grid."""

    def truth(u):
        z = 10 * u - 5
        return (1.4 - 3 * z) * torch.sin(1.5 * z) / 8

    u = [0.7576, 0.2793, 0.4031, 0.7347, 0.0993, 0.7999, 0.7544, 0.8695, 0.4388]
    u = torch.tensor(u).double()
    grid = torch.linspace(0, 1, 101).double()
    return (u[:, None], truth(u)), grid[:, None], truth(grid)


def _sample(model, data, **options):
    """Sixteen chains from as many modes."""
    modes = DeepEnsemble(members=16, steps=600, lr=0.02, fraction=1.0)
    start = pk.infer(model, data, modes, rng=1)
    return pk.infer(model, data, HMC(start=start, max_steps=128, **options), rng=0, chains=16)


def test_an_iid_prior_covers_the_truth_of_a_wavy_function():
    data, grid, truth = _toy()
    model = BNN(hidden=(50,), prior_std=10**0.5, noise_var=1e-3)
    options = {"length": 3.0, "inverse_mass": torch.ones(151).double(), "adapt_mass": False}
    # The functions of iid priors mix slowly (R-hat far above 1.1), and a few transitions diverge.
    with pytest.warns(pk.ConvergenceWarning):
        post = _sample(model, data, draws=100, warmup=100, **options)
    f = post.predict(grid, site="f")
    low, high = f.quantile([0.025, 0.975])
    assert float(((truth >= low) & (truth <= high)).double().mean()) >= 0.6
    assert float(-Normal(f.mean, f.variance.sqrt()).log_prob(truth).mean()) <= 1.0


def test_functions_under_a_fan_in_prior_mix():
    data, grid, _ = _toy()
    model = BNN(hidden=(50,), prior="fan_in", gains=(5.0, 1.5), prior_std=5.0, noise_var=1e-3)
    post = _sample(model, data, draws=80, warmup=80)
    # Of the function: hidden units may change places, so the weights' own means little.
    f = post.predict(grid[::5], site="f").values.reshape(16, 80, -1)
    rhat = [float(arviz.rhat(f[..., k].numpy())) for k in range(f.shape[-1])]
    assert max(rhat) <= 1.1
