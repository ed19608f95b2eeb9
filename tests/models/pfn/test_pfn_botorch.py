"""A network as a BoTorch surrogate."""

from __future__ import annotations

import math

import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.optim import optimize_acqf
from botorch.sampling.get_sampler import get_sampler

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.pfn import BarExpectedImprovement, GPPrior, PFNBotorchModel, amortize


@pytest.fixture(scope="module")
def net():
    prior = GPPrior(rows=16, features=2, fewest_features=1, lengthscale=0.5)
    return amortize(prior, "tiny", steps=250, bars=80, batch=32, rng=0)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, 2, generator=generator, dtype=torch.float64)
    return x, 50 + 10 * (-(x - 0.4).square().sum(1) * 4).exp()


@pytest.fixture(scope="module")
def model(net, data):
    return net.to_botorch(*data)


def points(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(*shape, 2, generator=generator, dtype=torch.float64)


def test_shapes_and_scale(model, data):
    post = model.posterior(points(4, 3))
    assert post.mean.shape == post.variance.shape == (4, 3, 1)
    assert post.mean.dtype == torch.float64
    assert model.num_outputs == 1 and model.batch_shape == torch.Size()
    # in the units of y, not of the standardised data
    assert (post.mean - data[1].mean()).abs().max() < 4 * data[1].std()
    assert post.quantile(torch.tensor([0.1, 0.9])).shape == (2, 4, 3, 1)
    with pk.scope(rng=0):
        assert post.rsample(torch.Size([5])).shape == (5, 4, 3, 1)


def test_the_density_is_that_of_the_units(model):
    post = model.posterior(points(1, 1))
    grid = torch.linspace(-60, 180, 40_001, dtype=torch.float64)
    mass = post.density(grid).sum() * (grid[1] - grid[0])
    assert mass.item() == pytest.approx(1.0, abs=2e-3)


def test_single_points_are_drawn_from_their_bars(model):
    post = model.posterior(points(2, 1))
    normals = torch.randn(
        4000, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    drawn = post.rsample_from_base_samples(torch.Size([4000]), normals)
    u = post.law.cdf(drawn[..., 0, 0].unsqueeze(-1))
    assert (u.mean(0) - 0.5).abs().max() < 4 / math.sqrt(12 * 4000)
    error = post.variance.sqrt()[..., 0, 0] / math.sqrt(4000)
    assert ((drawn[..., 0, 0].mean(0) - post.mean[..., 0, 0]).abs() < 4 * error).all()


def test_near_points_are_drawn_together(model):
    x = points(1, 1).expand(1, 2, 2).clone()
    x[0, 1] += 1e-3
    normals = torch.randn(
        1500, 1, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    drawn = model.posterior(x).rsample_from_base_samples(torch.Size([1500]), normals)[:, 0, :, 0]
    assert torch.corrcoef(drawn.T)[0, 1] > 0.3  # independent ones would stay within 0.1


def test_closed_form_improvement_equals_monte_carlo(model, data):
    x = points(3, 1)
    best = float(data[1].max())
    exact = BarExpectedImprovement(model, best)(x)
    sampler = get_sampler(model.posterior(x), torch.Size([8192]), seed=0)
    estimate = (sampler(model.posterior(x)) - best).clamp_min(0).mean(0)[..., 0, 0]
    assert torch.allclose(exact, estimate, rtol=0.05, atol=1e-3)


def test_acquisition_is_optimised_by_gradients(model, data):
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    sampler = get_sampler(model.posterior(points(1, 1)), torch.Size([32]), seed=0)
    acquisition = qLogExpectedImprovement(model, best_f=float(data[1].max()), sampler=sampler)
    x = points(1, 1).requires_grad_()
    acquisition(x).sum().backward()
    assert x.grad.abs().max() > 0
    with pk.scope(rng=0, foreign=True):
        best, value = optimize_acqf(
            acquisition, bounds, q=2, num_restarts=2, raw_samples=8, options={"maxiter": 5}
        )
    assert best.shape == (2, 2)
    assert value.isfinite()


def test_more_data_move_the_law(model):
    x = points(1, 1)
    before = model.posterior(x).mean
    near = x[0] + torch.tensor([[0.01, 0.0], [0.0, 0.01], [-0.01, 0.0]])
    target = before.item() + 4
    more = model.condition_on_observations(near, torch.full((3, 1), target, dtype=torch.float64))
    assert isinstance(more, PFNBotorchModel)
    assert len(more.train_targets) == 12
    assert more.posterior(x).mean.item() > before.item() + 1


def test_fewer_columns_are_filled_up(net):
    x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    model = PFNBotorchModel(net, x, (3 * x).sin())
    assert model.posterior(x[:2].unsqueeze(0)).mean.shape == (1, 2, 1)


def test_scalarisation(model):
    transform = ScalarizedPosteriorTransform(
        torch.tensor([-2.0], dtype=torch.float64), torch.tensor(3.0)
    )
    plain, moved = (
        model.posterior(points(1, 2)),
        model.posterior(points(1, 2), posterior_transform=transform),
    )
    assert torch.allclose(moved.mean, 3 - 2 * plain.mean)
    assert torch.allclose(moved.variance, 4 * plain.variance)
    level = torch.tensor([0.9], dtype=torch.float64)
    assert torch.allclose(moved.quantile(level), 3 - 2 * plain.quantile(1 - level))


def test_what_is_refused(model, net, data):
    with pytest.raises(CapabilityError, match="LogExpectedImprovement assumes a Gaussian"):
        LogExpectedImprovement(model, best_f=1.0)(points(2, 1))
    with pytest.raises(CapabilityError, match="fantasies"):
        model.fantasize(points(1), None)
    with pytest.raises(ShapeError, match="takes up to 2 features, got 3"):
        PFNBotorchModel(net, torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"expected x \[row, feature\] and y \[row\]"):
        PFNBotorchModel(net, data[0], data[1][:3])
    with pytest.raises(DataError, match="expected at least one row"):
        PFNBotorchModel(net, data[0][:0], data[1][:0])
    with pytest.raises(DataError, match="y must be finite"):
        PFNBotorchModel(net, data[0], data[1] * math.nan)
    with pytest.raises(ShapeError, match=r"expected X \[\*batch, q, d=2\]"):
        model.posterior(torch.zeros(1, 1, 3))
