"""Posteriors as BoTorch models: shapes, laws, gradients and acquisition functions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import scipy.stats
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    PosteriorMean,
    qExpectedImprovement,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qUpperConfidenceBound,
)
from botorch.acquisition.objective import (
    ExpectationPosteriorTransform,
    ScalarizedPosteriorTransform,
)
from botorch.optim import optimize_acqf
from botorch.posteriors import GPyTorchPosterior
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.sampling.get_sampler import get_sampler
from botorch.sampling.normal import SobolQMCNormalSampler
from support.models import ConjugateNormal, TinyProcess, normal_data, process_data

from probkit._botorch_posterior import PredictivePosterior
from probkit.distributions import MultiOutputStudentT
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.posterior import Context, Posterior
from probkit.predictive import Analytic
from probkit.rng import scope
from probkit.sources import Closed, Draws

FORMS = ("normal", "student", "mixture", "amplitude mixture", "t mixture", "draws")
SPREAD = ("student", "mixture", "amplitude mixture", "t mixture")


def posterior_of(form, outputs=0, **options):
    return TinyProcess(form, **options).condition(process_data(outputs=outputs))


def inputs(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 2, generator=generator, dtype=torch.float64)


def moments(form, x, outputs=0, noisy=False):
    """Exact mean [*batch, q, m] and covariance [*batch, q, q] of one output."""
    model = TinyProcess(form)
    mean, covariance = model.moments(process_data(outputs=outputs), x, noisy)
    if form == "student":
        df = model.df(process_data())
        return mean, covariance * df / (df - 2)
    weights = torch.tensor(model.weights, dtype=torch.float64)
    squares = torch.tensor(model.scales, dtype=torch.float64).square()
    if form == "t mixture":
        squares = squares * torch.tensor([3.0, 5 / 3, 9 / 7], dtype=torch.float64)
    return mean, covariance * (1.0 if form == "normal" else (weights * squares).sum())


# ------------------------------------------------------------------------------ shapes, moments


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_shapes_of_moments_and_draws(form, outputs, batch, generator):
    model = posterior_of(form, outputs).to_botorch()
    m = outputs or 1
    assert model.num_outputs == m
    assert model.batch_shape == torch.Size()
    found = model.posterior(inputs(*batch, 3))
    assert found.mean.shape == found.variance.shape == (*batch, 3, m)
    with scope(rng=generator):
        assert found.rsample(torch.Size([5])).shape == (5, *batch, 3, m)
        sampler = get_sampler(found, torch.Size([8]), seed=0)
    assert sampler(found).shape == (8, *batch, 3, m)


@pytest.mark.parametrize("form", ("normal", *SPREAD))
@pytest.mark.parametrize("noisy", [False, True])
def test_mean_and_variance_are_those_of_the_law(form, noisy):
    x = inputs(4, 3)
    found = posterior_of(form).to_botorch().posterior(x, observation_noise=noisy)
    mean, covariance = moments(form, x, noisy=noisy)
    torch.testing.assert_close(found.mean, mean)
    variance = covariance.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    torch.testing.assert_close(found.variance, variance, rtol=1e-9, atol=1e-12)


def test_posterior_classes_follow_the_form():
    kinds = {form: type(posterior_of(form).to_botorch().posterior(inputs(2))) for form in FORMS}
    assert kinds.pop("normal") is GPyTorchPosterior
    assert issubclass(kinds.pop("draws"), EnsemblePosterior)
    assert set(kinds.values()) == {PredictivePosterior}


@pytest.mark.parametrize("form", FORMS)
def test_t_batches_agree_with_single_calls(form):
    model, x = posterior_of(form, 2).to_botorch(), inputs(3, 2)
    together = model.posterior(x)
    if form == "draws":  # one shape, one set of draws
        assert together.values.shape == (3, 64, 2, 2)
        return
    for k in range(3):
        torch.testing.assert_close(together.mean[k], model.posterior(x[k]).mean)
        torch.testing.assert_close(together.variance[k], model.posterior(x[k]).variance)


# ------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("form", ("normal", *SPREAD))
@pytest.mark.parametrize("outputs", [0, 2])
def test_draws_have_the_joint_law(form, outputs):
    """Whitened draws: variances, correlation of points, and independence of outputs, by z tests."""
    n, x = 20_000, inputs(2)
    found = posterior_of(form, outputs).to_botorch().posterior(x)
    sampler = get_sampler(found, torch.Size([n]), seed=1)
    draws = sampler(found).detach()
    mean, covariance = moments(form, x, outputs)
    z = torch.linalg.solve(torch.linalg.cholesky(covariance), draws - mean)
    m = outputs or 1
    flat = z.reshape(n, 2 * m)
    products = flat.unsqueeze(-1) * flat.unsqueeze(-2)
    error = products.mean(0) - torch.eye(2 * m).double()
    standard_error = products.std(0) / n**0.5
    # Quasi-random draws err less than independent ones; 4 standard errors bound both.
    assert bool((error.abs() < 4 * standard_error).all()), error / standard_error


@pytest.mark.parametrize("form", SPREAD)
def test_draws_follow_the_marginal_cdf(form):
    """Kolmogorov-Smirnov distance of independent draws to the exact marginal."""
    n, x = 5000, inputs(2)
    post = posterior_of(form)
    found = post.to_botorch().posterior(x)
    with scope(rng=7):
        draws = found.rsample(torch.Size([n]))[:, 1, 0].detach()
    exact = post.predict(x, site="f", joint=True)
    levels = exact.cdf(torch.stack([draws, draws], -1))[:, 1]
    assert scipy.stats.kstest(levels.numpy(), "uniform").pvalue > 1e-3


def test_one_scale_is_shared_by_all_points_and_outputs():
    """Squares of uncorrelated t coordinates correlate; a product of t laws would show none."""
    loc, root = torch.zeros(1, 1, 2).double(), torch.eye(2).double()[None]
    df = torch.tensor([10.0]).double()
    post = PredictivePosterior(loc, root, torch.zeros(1).double(), df)
    with scope(rng=3):
        squares = post.rsample(torch.Size([100_000]))[:, 0, :].square()
    # Cov(y1^2, y2^2) / Var(y^2), from E s^4 = nu^2 / ((nu-2)(nu-4)), E s^2 = nu / (nu-2).
    s2, s4 = 10 / 8, 100 / 48
    expected = (s4 - s2**2) / (3 * s4 - s2**2)
    assert abs(torch.corrcoef(squares.T)[0, 1].item() - expected) < 0.03


def test_both_ways_to_write_a_scale_mixture_give_the_same_draws():
    x = inputs(3, 2)
    one, other = (
        posterior_of(form, 2).to_botorch().posterior(x) for form in ("mixture", "amplitude mixture")
    )
    sampler = get_sampler(one, torch.Size([64]), seed=5)
    torch.testing.assert_close(sampler(one), sampler(other))
    assert len(other.scale_tril) == 1  # the factor is held once


@pytest.mark.parametrize("kept", [[0, 1], [1]])
def test_outputs_may_have_scales_of_their_own(kept):
    each = torch.tensor([1.0, 3.0], dtype=torch.float64)

    class Scaled(TinyProcess):
        def predict(self, post, x, **options):
            mean, covariance = self.moments(post.context.data, x, False)
            tril = torch.linalg.cholesky(covariance)
            return Analytic(MultiOutputStudentT(5.0, mean, tril, output_scale=each))

    post = Posterior(Closed(), Scaled(), Context(process_data(outputs=2)))
    x = inputs(2, 3)
    found, exact = post.to_botorch(kept).posterior(x), post.predict(x)
    torch.testing.assert_close(found.mean, exact.mean[..., kept])
    torch.testing.assert_close(found.variance, exact.variance[..., kept])


def test_component_frequencies_are_the_weights():
    x = inputs(1)
    post = posterior_of("mixture").to_botorch().posterior(x)
    normals = torch.randn(
        30_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    component, rest = post._pick(normals[:, :1])
    counts = torch.bincount(component[:, 0], minlength=3)
    expected = 30_000 * torch.tensor([0.5, 0.3, 0.2])
    assert scipy.stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3
    assert scipy.stats.kstest(rest[:, 0].numpy(), "uniform").pvalue > 1e-3


def test_a_component_without_weight_is_never_drawn():
    loc = torch.tensor([0.0, 5.0, 9.0]).double().reshape(3, 1, 1)
    root = 1e-3 * torch.ones(3, 1, 1).double()
    post = PredictivePosterior(loc, root, torch.tensor([0.5, 0.5, 0.0]).double().log())
    with scope(rng=0):
        draws = post.rsample(torch.Size([1000]))
    assert draws.max() < 6


def test_base_samples_are_shared_along_t_batches_and_extend_with_q():
    model = posterior_of("student").to_botorch()
    x = inputs(3)
    sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
    batched = sampler(model.posterior(x.expand(4, 3, 2)))
    torch.testing.assert_close(batched[:, 0], batched[:, 3])
    # The first points of a longer candidate see the same base samples.
    longer = SobolQMCNormalSampler(torch.Size([16]), seed=0)
    longer._update_base_samples(model.posterior(torch.cat([x, inputs(1, seed=9)])), sampler_of(x))
    torch.testing.assert_close(
        longer(model.posterior(torch.cat([x, inputs(1, seed=9)])))[:, :3],
        sampler_of(x)(model.posterior(x)),
    )


def sampler_of(x):
    sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
    sampler(posterior_of("student").to_botorch().posterior(x))
    return sampler


@pytest.mark.parametrize("form", ("normal", *SPREAD))
def test_draws_are_differentiable_in_x(form):
    model = posterior_of(form, 2).to_botorch()
    sampler = get_sampler(model.posterior(inputs(2, 2)), torch.Size([3]), seed=0)
    x = inputs(2, 2).requires_grad_()
    # A base sample at the border of two components would make the map jump; these are not.
    assert torch.autograd.gradcheck(lambda x: sampler(model.posterior(x)), (x,))


def test_quantiles_and_densities_are_marginal():
    x = inputs(2)
    found = posterior_of("student").to_botorch().posterior(x)
    model = TinyProcess("student")
    mean, covariance = model.moments(process_data(), x, False)
    law = scipy.stats.t(
        df=model.df(process_data()),
        loc=mean[:, 0].numpy(),
        scale=covariance.diagonal().sqrt().numpy(),
    )
    q = torch.tensor([0.1, 0.9]).double()
    expected = torch.stack([torch.as_tensor(law.ppf(level)) for level in q.tolist()])
    torch.testing.assert_close(found.quantile(q)[..., 0], expected)
    y = torch.tensor([0.3]).double()
    torch.testing.assert_close(found.density(y)[0, :, 0], torch.as_tensor(law.pdf(0.3)))


# ------------------------------------------------------------------------------ acquisition


def expected_improvement(mean, sd, best, df=None):
    """EI of a normal or Student-t law, the latter by its known closed form."""
    u = (mean - best) / sd
    if df is None:
        return sd * (u * scipy.stats.norm.cdf(u) + scipy.stats.norm.pdf(u))
    pdf, cdf = scipy.stats.t.pdf(u, df), scipy.stats.t.cdf(u, df)
    return sd * (u * cdf + (df + u**2) / (df - 1) * pdf)


@pytest.mark.filterwarnings("ignore:qExpectedImprovement has known numerical issues")
@pytest.mark.parametrize("form", ("normal", "student", "mixture", "t mixture"))
def test_monte_carlo_improvement_matches_its_closed_form(form):
    x, best = inputs(1), 1.2
    model = posterior_of(form).to_botorch()
    mean, covariance = (t.item() for t in TinyProcess(form).moments(process_data(), x, False))
    parts = {
        "normal": [(1.0, 1.0, None)],
        "student": [(1.0, 1.0, 10.0)],
        "mixture": [(0.5, 0.5, None), (0.3, 1.0, None), (0.2, 2.0, None)],
        "t mixture": [(0.5, 0.5, 3.0), (0.3, 1.0, 5.0), (0.2, 2.0, 9.0)],
    }[form]
    exact = sum(w * expected_improvement(mean, s * covariance**0.5, best, df) for w, s, df in parts)
    sampler = SobolQMCNormalSampler(torch.Size([2**14]), seed=0)
    found = qExpectedImprovement(model, best_f=best, sampler=sampler)(x).item()
    # The Monte Carlo error of independent draws is below 1.5 sd / sqrt(n) here.
    assert abs(found - exact) < 2 * 1.5 * (4 * covariance) ** 0.5 / 2**7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("q", [1, 2])
def test_optimize_acqf_runs_and_ascends(form, q):
    model = posterior_of(form).to_botorch()
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    with scope(rng=0):
        sampler = get_sampler(model.posterior(inputs(q)), torch.Size([32]), seed=0)
        acquisition = qLogExpectedImprovement(model, best_f=1.2, sampler=sampler)
        candidates, value = optimize_acqf(
            acquisition, bounds, q=q, num_restarts=2, raw_samples=8, options={"maxiter": 20}
        )
    assert candidates.shape == (q, 2)
    random = acquisition(inputs(16, q, seed=4)).max()
    assert value >= random - 1e-6


@pytest.mark.filterwarnings("ignore:qExpectedImprovement has known numerical issues")
@pytest.mark.parametrize("form", FORMS)
def test_other_monte_carlo_acquisitions(form):
    model, x = posterior_of(form).to_botorch(), inputs(3, 2)
    with scope(rng=0):
        sampler = get_sampler(model.posterior(x), torch.Size([16]), seed=0)
        for acquisition in (
            qExpectedImprovement(model, 1.0, sampler),
            qUpperConfidenceBound(model, 0.2, sampler),
        ):
            assert bool(torch.isfinite(acquisition(x)).all())


@pytest.mark.parametrize("form", ("normal", "student"))
def test_noisy_improvement_with_a_baseline(form):
    model = posterior_of(form).to_botorch()
    with scope(rng=0):
        sampler = SobolQMCNormalSampler(torch.Size([64]), seed=0)
        acquisition = qLogNoisyExpectedImprovement(
            model, X_baseline=process_data()[0], sampler=sampler
        )
        assert bool(torch.isfinite(acquisition(inputs(3, 1))).all())


def test_analytic_improvement_needs_a_gaussian():
    x = inputs(5, 1)
    model = posterior_of("normal").to_botorch()
    mean, covariance = TinyProcess().moments(process_data(), x, False)
    exact = expected_improvement(mean[:, 0, 0].numpy(), covariance[:, 0, 0].sqrt().numpy(), 1.2)
    found = LogExpectedImprovement(model, best_f=1.2)(x)
    torch.testing.assert_close(found.exp(), torch.as_tensor(exact), rtol=1e-6, atol=1e-9)
    for form in (*SPREAD, "draws"):
        acquisition = LogExpectedImprovement(posterior_of(form).to_botorch(), best_f=1.2)
        with pytest.raises(CapabilityError, match="assumes a Gaussian.*qLogExp"):
            acquisition(x)


def test_the_posterior_mean_is_allowed_for_any_form():
    x = inputs(5, 1)
    model = posterior_of("student").to_botorch()
    torch.testing.assert_close(PosteriorMean(model)(x), model.posterior(x).mean[:, 0, 0])


# ------------------------------------------------------------------------------ outputs, transforms


@pytest.mark.parametrize("form", FORMS)
def test_output_selection_composes(form):
    x = inputs(2, 3)
    post = posterior_of(form, 3)
    full = post.to_botorch().posterior(x)
    some = post.to_botorch(outputs=[2, 0])
    assert some.num_outputs == 2
    torch.testing.assert_close(some.posterior(x).mean, full.mean[..., [2, 0]])
    torch.testing.assert_close(
        some.posterior(x, output_indices=[1]).variance, full.variance[..., :1]
    )
    torch.testing.assert_close(some.subset_output([0]).posterior(x).mean, full.mean[..., 2:])
    torch.testing.assert_close(
        post.to_botorch().subset_output([-1]).posterior(x).mean, full.mean[..., 2:]
    )


def test_outputs_that_do_not_exist():
    with pytest.raises(DataError, match="positions among 1 outputs, got \\[3\\]"):
        posterior_of("normal").to_botorch([3]).posterior(inputs(1))
    with pytest.raises(DataError, match="output_indices: expected positions among 1 outputs"):
        posterior_of("normal").to_botorch().posterior(inputs(1), output_indices=[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs", [0, 2])
def test_scalarisation_is_exact(form, outputs):
    x = inputs(2, 3)
    weights = torch.tensor([-2.0, 0.5][: outputs or 1]).double()
    transform = ScalarizedPosteriorTransform(weights, offset=0.7)
    model = posterior_of(form, outputs).to_botorch()
    plain, found = model.posterior(x), model.posterior(x, posterior_transform=transform)
    torch.testing.assert_close(found.mean, 0.7 + (plain.mean @ weights).unsqueeze(-1))
    if form != "draws":  # outputs are uncorrelated
        expected = (plain.variance @ weights.square()).unsqueeze(-1)
        torch.testing.assert_close(found.variance, expected)


def test_other_transforms_need_a_gaussian():
    transform = ExpectationPosteriorTransform(n_w=2)
    with pytest.raises(CapabilityError, match="ExpectationPosteriorTransform needs a Gaussian"):
        posterior_of("student").to_botorch().posterior(inputs(2), posterior_transform=transform)


# ------------------------------------------------------------------------------ conditioning


def test_conditioning_on_observations_is_refitting():
    (x, y), (new_x, new_y) = process_data(6), process_data(4)
    model = TinyProcess("student").condition((x, y)).to_botorch()
    updated = model.condition_on_observations(new_x, new_y[:, None])
    whole = TinyProcess("student").condition((torch.cat([x, new_x]), torch.cat([y, new_y])))
    at = inputs(3)
    torch.testing.assert_close(updated.posterior(at).mean, whole.to_botorch().posterior(at).mean)
    torch.testing.assert_close(
        updated.posterior(at).variance, whole.to_botorch().posterior(at).variance
    )
    assert len(model.source.context.data[0]) == 6


def test_conditioning_that_is_not_exact_is_refused():
    model = posterior_of("normal").to_botorch()
    with pytest.raises(CapabilityError, match=r"expected X \[new, d\], Y \[new, m\].*X_pending"):
        model.condition_on_observations(inputs(2, 3), torch.zeros(2, 3, 1))
    with pytest.raises(CapabilityError, match="fantasies .* need batched conditioning"):
        model.fantasize(inputs(1), None)
    draws = Posterior(
        Draws({"a": torch.zeros(1, 5)}), TinyProcess(), Context(process_data())
    ).to_botorch()
    with pytest.raises(CapabilityError, match="TinyProcess with Draws is neither"):
        draws.condition_on_observations(inputs(1), torch.zeros(1, 1))


# ------------------------------------------------------------------------------ bad input


def test_wrong_dtype_and_shape():
    model = posterior_of("normal").to_botorch()
    with pytest.raises(DataError, match="expected X of the data's dtype torch.float64, got"):
        model.posterior(inputs(2).float())
    with pytest.raises(ShapeError, match=r"expected X \[\*batch, q, d\], got \(2,\)"):
        model.posterior(torch.zeros(2).double())
    with pytest.raises(CapabilityError, match="observation_noise: expected True or False"):
        model.posterior(inputs(2), observation_noise=torch.ones(1))


def test_marginals_are_no_joint_law():
    class Marginal(TinyProcess):
        def predict(self, post, x, **options):
            mean, covariance = self.moments(post.context.data, x, False)
            law = torch.distributions.StudentT(4.0, mean[..., 0], 1.0)
            return Analytic(law)

    model = Marginal().condition(process_data())
    model = Posterior(model.source, Marginal(), model.context).to_botorch()
    assert model.posterior(inputs(1)).variance.item() == pytest.approx(2.0)
    with pytest.raises(CapabilityError, match="joint over the q points.*got StudentT"):
        model.posterior(inputs(2))


def test_a_predictive_of_another_shape_names_both():
    class Wrong(TinyProcess):
        def predict(self, post, x, **options):
            return Analytic(torch.distributions.Normal(torch.zeros(7), 1.0))

    post = Posterior(posterior_of("normal").source, Wrong(), Context(process_data()))
    with pytest.raises(ShapeError, match=r"expected \[\*batch, q\] = \(2,\).*got \(7,\)"):
        post.to_botorch().posterior(inputs(2))


def test_number_of_outputs_without_a_pair_of_data():
    model = ConjugateNormal().condition(normal_data()).to_botorch()
    with pytest.raises(CapabilityError, match="number of outputs is not known"):
        _ = model.num_outputs


def test_draws_depend_on_x_alone():
    """Predictions that draw random numbers repeat themselves, so acquisition surfaces are fixed."""
    model, x = posterior_of("draws").to_botorch(), inputs(2)
    assert torch.equal(model.posterior(x).values, model.posterior(x).values)


def test_importing_the_adapter_does_not_load_botorch():
    code = "import sys, probkit.botorch_adapter; sys.exit('botorch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
