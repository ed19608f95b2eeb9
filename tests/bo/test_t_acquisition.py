"""Closed-form acquisition functions for Student-t posteriors and mixtures."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from botorch.acquisition.analytic import (
    ExpectedImprovement,
    LogExpectedImprovement,
    UpperConfidenceBound,
)
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf

import probkit as pk
from probkit.bo import (
    LogStudentTExpectedImprovement,
    StudentTExpectedImprovement,
    StudentTUpperConfidenceBound,
)
from probkit.inference import Direct
from probkit.kernels import NNGPKernel
from probkit.models import BurrXII, InverseGamma, PointMass, ScaleMixtureNNGP

LAWS = [InverseGamma(2.0, 1.5), PointMass(1.3), BurrXII(2.0, 1.0)]
NOISES = ["scale", "outside"]


def _ids(value):
    return type(value).__name__ if not isinstance(value, str) else value


def _plain(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch advises its logarithm
        return ExpectedImprovement(*arguments, **options)


def _data(n: int = 6):
    x = torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
    return x, (3 * x[:, 0]).sin() + 0.3 * x[:, 0]


def _post(law=None, noise_in: str = "scale"):
    model = ScaleMixtureNNGP(
        NNGPKernel(depth=2), law or InverseGamma(2.0, 1.5), 0.01, noise_in=noise_in
    )
    return pk.infer(model, _data(), rng=0)


AT = torch.tensor([[-1.4], [-0.3], [0.45], [2.0]], dtype=torch.float64)
BEST = 0.7


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("noise_in", NOISES)
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_expected_improvement_is_the_integral(law, noise_in, maximize):
    """E[(y - best)+] is the integral of P(Y > y) from best; SciPy does it from the cdf."""
    post = _post(law, noise_in)
    found = StudentTExpectedImprovement(post.to_botorch(), BEST, maximize=maximize)(AT[:, None])
    assert found.shape == (4,)
    for row, value in zip(AT, found, strict=True):
        prediction = post.predict(row[None], site="f")

        def beyond(y, prediction=prediction):
            below = float(prediction.cdf(torch.tensor([y], dtype=torch.float64)))
            return 1.0 - below if maximize else below

        # In t = y - best = sinh(u): tails of few degrees of freedom become exponential.
        expected, _ = scipy.integrate.quad(
            lambda u, f=beyond: f(BEST + (1 if maximize else -1) * np.sinh(u)) * np.cosh(u),
            *(0.0, 12.0),
            epsabs=1e-11,
            epsrel=1e-11,
            limit=400,
        )
        assert float(value) == pytest.approx(expected, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_expected_improvement_is_the_mean_of_a_million_draws(law):
    post = _post(law)
    found = StudentTExpectedImprovement(post.to_botorch(), BEST)(AT[:, None])
    draws = post.predict(AT, site="f").sample(1_000_000, rng=0)
    gain = (draws - BEST).clamp_min(0)
    seen = found.detach() > 1e-3  # smaller ones rest on a few draws out of a million
    assert int(seen.sum()) >= 2
    z = ((gain.mean(0) - found.detach()) / (gain.std(0) / 1e3))[seen]
    assert bool((z.abs() < 4).all()), z


def test_a_wrong_tail_is_seen():
    """The Gaussian formula with the same mean and variance fails the tests above by far."""
    post = _post(InverseGamma(0.6, 0.4))
    prediction = post.predict(AT, site="f")
    sd = prediction.variance.sqrt()
    z = (prediction.mean - BEST) / sd
    gauss = sd * (z * torch.special.ndtr(z) + (-0.5 * z**2).exp() / (2 * torch.pi) ** 0.5)
    found = StudentTExpectedImprovement(post.to_botorch(), BEST)(AT[:, None])
    assert float(((found - gauss) / gauss).abs().max()) > 0.01


@pytest.mark.parametrize("maximize", [True, False])
def test_the_limit_of_many_degrees_of_freedom_is_botorchs_own(maximize):
    t, normal = (_post(law).to_botorch() for law in (InverseGamma(1e9, 1e9), PointMass(1.0)))
    at = AT[:, None]
    ours = StudentTExpectedImprovement(t, BEST, maximize=maximize)(at)
    theirs = _plain(normal, BEST, maximize=maximize)(at)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    ours = LogStudentTExpectedImprovement(t, BEST, maximize=maximize)(at)
    theirs = LogExpectedImprovement(normal, BEST, maximize=maximize)(at)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    level = float(torch.special.ndtr(torch.tensor(2.0).double() ** 0.5))
    ours = StudentTUpperConfidenceBound(t, level, maximize=maximize)(at)
    theirs = UpperConfidenceBound(normal, beta=2.0, maximize=maximize)(at)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_gaussian_model_of_botorch_gives_botorchs_values():
    x, y = _data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch's advice on the range of the data
        model = SingleTaskGP(x, y[:, None], outcome_transform=None)
    at = AT[:, None]
    best = torch.tensor(BEST).double()  # a number becomes float32 in BoTorch's
    for ours, theirs in [
        (StudentTExpectedImprovement(model, best), _plain(model, best)),
        (LogStudentTExpectedImprovement(model, best), LogExpectedImprovement(model, best)),
    ]:
        torch.testing.assert_close(ours(at), theirs(at), rtol=1e-9, atol=1e-12)


def test_the_logarithm_does_not_underflow():
    """A best value 60 standard deviations away: EI underflows, its logarithm has a gradient."""
    model = _post(PointMass(1.0)).to_botorch()
    at = AT[1:2, None].clone().requires_grad_()
    assert StudentTExpectedImprovement(model, 60.0)(at).item() == 0.0
    ours = LogStudentTExpectedImprovement(model, 60.0)(at)
    theirs = LogExpectedImprovement(model, 60.0)(at)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    (slope,) = torch.autograd.grad(ours.sum(), at, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs.sum(), at)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", [0.6, 0.975])
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_the_confidence_bound_is_the_quantile(law, level):
    post = _post(law)
    model = post.to_botorch()
    latent = post.predict(AT, site="f")
    upper = StudentTUpperConfidenceBound(model, level)(AT[:, None])
    torch.testing.assert_close(upper, latent.quantile(level))
    below = StudentTUpperConfidenceBound(model, level, maximize=False)(AT[:, None])
    torch.testing.assert_close(-below, latent.quantile(1 - level))


@pytest.mark.parametrize("noise_in", NOISES)
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_gradients_are_those_of_differences(law, noise_in):
    model = _post(law, noise_in).to_botorch()
    for acquisition in (
        StudentTExpectedImprovement(model, BEST),
        LogStudentTExpectedImprovement(model, BEST, maximize=False),
        StudentTUpperConfidenceBound(model, 0.9),
    ):
        at = AT[:, None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(acquisition(at).sum(), at)
        with torch.no_grad():
            h = 1e-5
            slope = (acquisition(at + h) - acquisition(at - h)) / (2 * h)
        torch.testing.assert_close(gradient[:, 0, 0], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_batches_of_points_equal_the_loop(law):
    model = _post(law).to_botorch()
    generator = torch.Generator().manual_seed(0)
    at = torch.randn(2, 3, 1, 1, generator=generator, dtype=torch.float64)
    for acquisition in (
        StudentTExpectedImprovement(model, BEST),
        StudentTExpectedImprovement(model, torch.tensor([0.1, 0.5, 0.9]).double()),
        LogStudentTExpectedImprovement(model, BEST),
        StudentTUpperConfidenceBound(model),
    ):
        whole = acquisition(at)
        assert whole.shape == (2, 3)
        if getattr(acquisition, "best_f", torch.zeros(())).ndim == 0:
            one = torch.stack([torch.stack([acquisition(p[None])[0] for p in row]) for row in at])
            torch.testing.assert_close(whole, one)


def test_mixtures_over_hyper_parameters_average_their_improvements():
    data = _data()
    model = ScaleMixtureNNGP(NNGPKernel(depth=2), noise_var=0.01, learn=("kernel.w_std",))
    from probkit.inference.direct import condition_on_draws
    from probkit.posterior import make_posterior
    from probkit.sampler import Problem
    from probkit.sources import Draws

    problem = Problem(model, model.prepare(data))
    values = torch.tensor([[1.1, 1.9]]).double()
    weights = torch.tensor([[0.3, 0.7]]).double()
    source = Draws({"kernel.w_std": values}, weights.log())
    post = condition_on_draws(problem, make_posterior(problem, source), source)
    found = StudentTExpectedImprovement(post.to_botorch(), BEST)(AT[:, None])
    parts = [
        StudentTExpectedImprovement(
            pk.infer(model, data, Direct(hyper={"kernel.w_std": v}), rng=0).to_botorch(), BEST
        )(AT[:, None])
        for v in values[0]
    ]
    torch.testing.assert_close(found, 0.3 * parts[0] + 0.7 * parts[1])


def test_the_optimiser_finds_the_best_point_of_a_grid():
    model = _post().to_botorch()
    acquisition = LogStudentTExpectedImprovement(model, BEST, maximize=False)
    bounds = torch.tensor([[-1.5], [1.5]], dtype=torch.float64)
    with pk.scope(rng=0):
        candidate, value = optimize_acqf(
            acquisition, bounds=bounds, q=1, num_restarts=4, raw_samples=32
        )
    grid = torch.linspace(-1.5, 1.5, 3001, dtype=torch.float64)[:, None, None]
    values = acquisition(grid).detach()
    assert float(value) >= float(values.max()) - 1e-6
    assert abs(float(candidate) - float(grid[values.argmax()])) < 2e-3


def test_several_outputs_are_made_one():
    x, y = _data()
    both = torch.stack([y, y.flip(0) * 2], 1)
    post = pk.infer(ScaleMixtureNNGP(NNGPKernel(depth=2), noise_var=0.01), (x, both), rng=0)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    transform = ScalarizedPosteriorTransform(weights)
    found = StudentTExpectedImprovement(post.to_botorch(), BEST, posterior_transform=transform)(
        AT[:, None]
    )
    draws = post.predict(AT[:, None], site="f", joint=True).sample(200_000, rng=0)[:, :, 0]
    gain = (draws @ weights - BEST).clamp_min(0)
    z = (gain.mean(0) - found.detach()) / (gain.std(0) / 200_000**0.5)
    assert bool((z.abs() < 4).all())


def test_outputs_with_scales_of_their_own_are_taken_one_by_one():
    x, y = _data()
    both = torch.stack([y, y.flip(0) * 2], 1)
    for law in (InverseGamma(2.0, 1.5), BurrXII(2.0, 1.0)):
        model = ScaleMixtureNNGP(NNGPKernel(depth=2), law, noise_var=0.01, scale_per="output")
        post = pk.infer(model, (x, both), rng=0)
        alone = pk.infer(
            ScaleMixtureNNGP(NNGPKernel(depth=2), law, noise_var=0.01), (x, both[:, 1]), rng=0
        )
        found = StudentTExpectedImprovement(post.to_botorch([1]), BEST)(AT[:, None])
        expected = StudentTExpectedImprovement(alone.to_botorch(), BEST)(AT[:, None])
        torch.testing.assert_close(found, expected)
        with pytest.raises(pk.CapabilityError, match=r"to_botorch\(\[k\]\) for each output"):
            post.to_botorch().posterior(AT)


def test_bad_input_is_named():
    post = _post()
    model = post.to_botorch()
    with pytest.raises(pk.DataError, match="best_f: expected finite numbers, got nan"):
        StudentTExpectedImprovement(model, float("nan"))
    with pytest.raises(pk.DataError, match=r"level: expected a probability .* got 1.5"):
        StudentTUpperConfidenceBound(model, 1.5)
    with pytest.raises(pk.ShapeError, match=r"best_f: expected a number or \[\*batch\]"):
        StudentTExpectedImprovement(model, torch.zeros(4, 1))(AT[:, None])
    with pytest.raises(AssertionError, match="q=1"):
        StudentTExpectedImprovement(model, BEST)(AT[None])
    with pytest.raises(pk.CapabilityError, match="no closed form with pending points"):
        StudentTExpectedImprovement(model, BEST).set_X_pending(AT)
    x, y = _data()
    two = pk.infer(ScaleMixtureNNGP(NNGPKernel()), (x, torch.stack([y, -y], 1)), rng=0)
    with pytest.raises(pk.CapabilityError, match=r"one point and one output, got .* \(1, 2\)"):
        StudentTExpectedImprovement(two.to_botorch(), BEST)(AT[:, None])


def test_a_law_without_a_mean_and_draws_have_no_closed_form():
    from botorch.posteriors.ensemble import EnsemblePosterior

    from probkit._botorch_posterior import PredictivePosterior
    from probkit.bo.acquisition import _components, _standard_improvement

    flat = PredictivePosterior(
        torch.zeros(1, 1, 1).double(),
        torch.ones(1, 1, 1).double(),
        torch.zeros(1).double(),
        torch.ones(1).double(),
    )
    law = _components(flat)
    with pytest.raises(pk.DataError, match="infinite for df <= 1, got df = 1"):
        _standard_improvement(law.loc, law.df)
    with pytest.raises(pk.CapabilityError, match="got EnsemblePosterior; use a Monte Carlo form"):
        _components(EnsemblePosterior(torch.zeros(4, 1, 1)))
    exact = scipy.stats.t(3.0).expect(lambda t: max(t + 0.5, 0.0), epsabs=1e-12, limit=500)
    found = _standard_improvement(torch.tensor(0.5).double(), torch.tensor(3.0).double())
    assert float(found) == pytest.approx(exact, abs=1e-7)
