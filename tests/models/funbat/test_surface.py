"""Joint moments of the surface, its gradients, and its use as a BoTorch model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from botorch.acquisition import UpperConfidenceBound, qUpperConfidenceBound
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from torch import Tensor

import probkit as pk
from probkit.errors import CapabilityError
from probkit.inference.message_passing import NaturalSites
from probkit.inference.passing import MessagePassing
from probkit.kernels.state_space import Matern, Periodic
from probkit.models.funbat import (
    BernoulliNoise,
    FunBaT,
    LogWarp,
    TensorData,
    additive,
)
from probkit.models.funbat.pairs import unpack
from probkit.models.funbat.prediction import latent_moments
from probkit.models.funbat.surface import joint_moments

F64 = torch.float64
MODELS = {
    "cp": lambda: FunBaT(2, kind="cp", kernels=Matern(1.5, 0.3)),
    "tucker": lambda: FunBaT(
        (2, 1, 3), kernels=[Matern(0.5, 0.3), Matern(2.5, 0.5), Matern(1.5, 0.4) + Periodic(0.7)]
    ),
    "masked": lambda: FunBaT(kind="cp", masks=additive(3), kernels=Matern(2.5, 0.3)),
}


def fit(name: str, generator: torch.Generator, chains: int = 2) -> Any:
    index = torch.randint(12, (120, 3), generator=generator).double() / 11
    y = (3 * index[:, 0]).sin() * (2 * index[:, 1]).cos() + index[:, 2]
    y = y + 0.1 * torch.randn(120, generator=generator, dtype=F64)
    options = MessagePassing(sweeps=4, tolerance=0)
    return pk.infer(MODELS[name](), (index, y), options, rng=0, chains=chains)


def somewhere(generator: torch.Generator) -> Tensor:
    """Points inside, outside and on the grid, some twice."""
    x = torch.rand(5, 4, 3, generator=generator, dtype=F64) * 1.4 - 0.2
    x[0, 0] = 3 / 11
    x[1, 1] = x[1, 0]
    x[2, 2, 0] = x[2, 1, 0]
    return x


@pytest.mark.parametrize("name", sorted(MODELS))
def test_marginals_are_those_of_the_smoother(name: str, generator: torch.Generator) -> None:
    post, x = fit(name, generator), somewhere(generator)
    state, layout = post.model._fits(post)
    mean, cov = joint_moments(layout, state, x)
    exact_mean, exact_variance = latent_moments(layout, state, x.reshape(-1, 3))
    torch.testing.assert_close(mean.reshape(2, -1), exact_mean, rtol=1e-8, atol=1e-8)
    variance = cov.diagonal(dim1=-1, dim2=-2).reshape(2, -1)
    torch.testing.assert_close(variance, exact_variance, rtol=1e-8, atol=1e-8)
    assert float(torch.linalg.eigvalsh(cov).min()) > -1e-10
    twice = cov[:, 1]
    torch.testing.assert_close(twice[:, 0, 1], twice[:, 0, 0])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_are_differences(name: str, generator: torch.Generator) -> None:
    post = fit(name, generator, chains=1)
    state, layout = post.model._fits(post)
    x = torch.rand(2, 3, 3, generator=generator, dtype=F64) * 1.2 - 0.1
    weight = torch.randn(1, 2, 3, 3, generator=generator, dtype=F64)

    def value(x: Tensor) -> Tensor:
        mean, cov = joint_moments(layout, state, x)
        return (weight[..., 0] * mean).sum() + (weight * cov).sum()

    x.requires_grad_()
    value(x).backward()
    assert x.grad is not None
    for place in ((0, 0, 0), (0, 2, 1), (1, 1, 2)):
        step = torch.zeros_like(x)
        step[place] = 1e-6
        with torch.no_grad():
            slope = (value(x + step) - value(x - step)) / 2e-6
        assert float(slope) == pytest.approx(float(x.grad[place]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_one_mode_is_a_gaussian_process(nu: float, generator: torch.Generator) -> None:
    """Joint covariances, also of points in one gap and beyond the same end, from a dense GP."""
    x = torch.tensor([0.0, 0.1, 0.15, 0.5, 0.9, 1.0], dtype=F64)
    y = torch.randn(6, generator=generator, dtype=F64)
    kernel = Matern(nu, lengthscale=0.4, variance=1.3)
    model = FunBaT(1, kind="cp", kernels=kernel, learn_hyperparameters=False)
    post = pk.infer(model, (x[:, None], y), MessagePassing(sweeps=3, tolerance=0), rng=0)
    state, layout = model._fits(post)
    new = torch.tensor([0.3, 0.4, 0.2, -0.3, -0.1, 1.2, 1.5, 0.5], dtype=F64)
    mean, cov = joint_moments(layout, state, new.unsqueeze(-1))
    K = kernel(torch.cat((x, new)).unsqueeze(-1)).to_dense().detach()
    mode = state["modes"][0]
    sites = NaturalSites(mode["eta"][0], unpack(mode["precision"][0], 1))
    seen, cross = K[:6, :6], K[6:, :6]
    S = torch.linalg.inv(seen + torch.diag(1 / sites.precision.flatten()))
    torch.testing.assert_close(cov[0], K[6:, 6:] - cross @ S @ cross.T, rtol=1e-8, atol=1e-9)
    target = sites.eta.flatten() / sites.precision.flatten()
    torch.testing.assert_close(mean[0], cross @ S @ target, rtol=1e-8, atol=1e-9)


def test_joint_predictions(generator: torch.Generator) -> None:
    post, x = fit("cp", generator, chains=1), somewhere(generator)
    law = post.predict(x, site="f", joint=True).dist
    assert law.batch_shape == (5,)
    assert law.event_shape == (4,)
    marginal = post.predict(x.reshape(-1, 3), site="f")
    torch.testing.assert_close(law.mean.flatten(), marginal.mean, rtol=1e-7, atol=1e-8)
    new = post.predict(x, joint=True).dist
    noise = post.predict(x.reshape(-1, 3)).variance - marginal.variance
    torch.testing.assert_close((new.variance - law.variance).flatten(), noise, rtol=1e-6, atol=1e-8)
    mixed = fit("cp", generator).predict(x[0], site="f", joint=True)
    assert mixed.mean.shape == (4,)
    with pytest.raises(CapabilityError, match="a warped surface is not normal"):
        warped = FunBaT(1, kind="cp", warp=LogWarp())
        pk.infer(
            warped, ([[0.0], [1.0]], [1.0, 2.0]), MessagePassing(sweeps=1, tolerance=0), rng=0
        ).predict([[0.5]], joint=True)
    labels = TensorData([[0.0], [0.5], [1.0]], [1.0, 0.0, 1.0])
    options = MessagePassing(sweeps=2, tolerance=0)
    classified = pk.infer(FunBaT(1, kind="cp", noise=BernoulliNoise()), labels, options, rng=0)
    assert classified.predict([[0.2], [0.3]], site="f", joint=True).mean.shape == (2,)
    with pytest.raises(CapabilityError, match="joint predictions of a new y need GaussianNoise"):
        classified.predict([[0.2], [0.3]], joint=True)


def test_botorch_finds_the_maximum(generator: torch.Generator) -> None:
    """The upper confidence bound of a smooth surface peaks near the true maximum."""
    index = torch.randint(21, (300, 2), generator=generator).double() / 20
    y = (math.pi * index[:, 0]).sin() * (2 * index[:, 1]).sin()
    y = y + 0.02 * torch.randn(300, generator=generator, dtype=F64)
    options = MessagePassing(sweeps=12, tolerance=0)
    kernel = Matern(2.5, lengthscale=0.5)
    model = FunBaT(1, kind="cp", kernels=kernel, learn_hyperparameters=False)
    surface = pk.infer(model, (index, y), options, rng=0).to_botorch()
    assert surface.num_outputs == 1
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=F64)
    seed = 0
    with pk.scope(rng=seed):
        best, value = optimize_acqf(
            UpperConfidenceBound(surface, beta=0.01),
            bounds,
            q=1,
            num_restarts=2,
            raw_samples=16,
            options={"maxiter": 15},
        )
    # the maximum is 1 at (1/2, pi/4); within 0.05 of it the truth loses 0.015 at most
    torch.testing.assert_close(
        best[0], torch.tensor([0.5, math.pi / 4], dtype=F64), rtol=0.0, atol=0.05
    )
    assert 0.95 < float(value) < 1.05
    joint = surface.posterior(torch.stack((best, best + 0.05), 1).expand(1, 2, 2))
    sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
    pair = qUpperConfidenceBound(surface, beta=0.01, sampler=sampler)
    with pk.scope(rng=seed):
        assert joint.rsample(torch.Size([8])).shape == (8, 1, 2, 1)
        assert float(pair(best.expand(1, 2, 2))) == pytest.approx(float(value), abs=0.05)
