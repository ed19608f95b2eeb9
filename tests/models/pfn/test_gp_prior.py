"""The Gaussian-process prior, its exact predictions, and a network that mimics them."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import DataError
from probkit.models.pfn import GPPrior, amortize


def test_covariance_of_what_is_drawn():
    prior = GPPrior(rows=3, lengthscale=0.5, noise_var=0.04)
    x = torch.tensor([[0.1], [0.4], [0.9]])
    values = {"lengthscale": torch.full((40_000, 1), 0.5), "noise_var": torch.full((40_000,), 0.04)}
    y = prior.simulate(values, x.expand(40_000, 3, 1), rng=0)[1]
    expected = torch.exp(-0.5 * (x - x.T).square() / 0.25) + 0.04 * torch.eye(3)
    # a covariance of 40 000 draws has standard errors below sqrt(2 / 40 000)
    assert (torch.cov(y.T) - expected).abs().max() < 4 * math.sqrt(2 * 1.04**2 / 40_000)


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_exact_predictions_are_conditional_normals(kernel):
    prior = GPPrior(rows=5, features=2, kernel=kernel, lengthscale=0.4, noise_var=0.1)
    values, (x, y) = prior.sample_dataset(6, rng=0)
    law = prior.exact(values, x[:, :4], y[:, :4], x[:, 4:])
    gram = prior.gram(values, x, x).double() + 0.1 * torch.eye(5).double()
    weights = torch.linalg.solve(gram[:, :4, :4], gram[:, :4, 4:])
    mean = (weights.transpose(1, 2) @ y[:, :4, None].double())[..., 0]
    variance = gram[:, 4:, 4:] - gram[:, 4:, :4] @ weights
    assert torch.allclose(law.mean, mean, atol=1e-6)
    assert torch.allclose(law.variance, variance[..., 0], atol=1e-6)
    nothing = prior.exact(values, x[:, :0], y[:, :0], x[:, 4:])
    assert torch.allclose(nothing.variance, torch.tensor(1.1).double())


def test_kernels_equal_those_of_gpytorch():
    from gpytorch.kernels import MaternKernel, RBFKernel

    x = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)).double()
    values = {"lengthscale": torch.tensor([0.3, 0.7]).double()}
    for kernel, peer in (("rbf", RBFKernel), ("matern52", MaternKernel)):
        theirs = peer(ard_num_dims=2).double()
        theirs.lengthscale = values["lengthscale"]
        ours = GPPrior(features=2, kernel=kernel).gram(values, x, x)
        assert torch.allclose(ours, theirs(x).to_dense(), atol=1e-7)


def test_hyper_parameters_follow_their_laws():
    prior = GPPrior(features=2, lengthscale=None, noise_var=(1e-3, 1e-1))
    values = prior.sample_prior(20_000, rng=0)
    scale = values["lengthscale"]
    # Gamma(3, 6): mean 1/2, variance 1/12
    assert scale.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 40_000))
    log_noise = values["noise_var"].log10()
    assert -3 <= log_noise.min() and log_noise.max() <= -1
    assert log_noise.mean().item() == pytest.approx(-2, abs=4 / math.sqrt(3 * 20_000))


def test_unused_features_stay_at_zero():
    x = GPPrior(rows=4, features=3, fewest_features=1).sample_inputs(300, rng=0)
    used = (x != 0).any(1)
    assert used[:, 0].all()
    assert {int(k) for k in used.sum(1)} == {1, 2, 3}
    assert not bool((used[:, 2] & ~used[:, 1]).any())


@pytest.mark.slow
def test_a_network_mimics_the_exact_process():
    """Within 0.1 nats of the exact predictions after a short training (1-D, lengthscale 0.6)."""
    prior = GPPrior(rows=26, lengthscale=0.6, noise_var=1e-2)
    net = amortize(prior, "tiny", steps=2500, bars=150, batch=32, most=21, rng=0)
    values, (x, y) = prior.sample_dataset(1000, rng=77)
    for n in (0, 1, 3, 5, 10, 20):
        law = net.predict_sets(x[:, :n], y[:, :n], x[:, n:])
        exact = prior.exact(values, x[:, :n], y[:, :n], x[:, n:])
        gap = exact.log_prob(y[:, n:].double()) - law.log_prob(y[:, n:]).double()
        assert -0.01 < gap.mean() < 0.1


def test_bad_input():
    with pytest.raises(DataError, match="kernel: expected 'rbf' or 'matern52', got 'periodic'"):
        GPPrior(kernel="periodic")
    with pytest.raises(DataError, match="lengthscale: expected positive numbers in order"):
        GPPrior(lengthscale=(0.6, 0.1))
    with pytest.raises(DataError, match="noise_var: expected positive numbers"):
        GPPrior(noise_var=0.0)
    with pytest.raises(DataError, match="rows: expected a whole number >= 1, got 0"):
        GPPrior(rows=0)
    with pytest.raises(DataError, match="fewest_features: expected 1 to 2, got 3"):
        GPPrior(features=2, fewest_features=3)
