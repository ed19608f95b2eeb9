"""Regression with scale mixtures of Gaussian processes, through the public interface."""

from __future__ import annotations

import gpytorch
import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Weibull

import probkit as pk
from probkit.inference import MAP, SVI, Direct, ImportanceSampling, MeanField
from probkit.kernels import NNGPKernel
from probkit.models import (
    BurrXII,
    Gamma,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    PointMass,
    ScaleMixtureNNGP,
)
from probkit.sources import Draws
from probkit.testing import GuideConformance, ModelConformance, SamplerConformance

X = torch.tensor(
    [[1.0, 0.5, -0.3], [0.2, -1.0, 0.7], [-0.4, 0.1, 0.9], [0.3, 0.3, 0.3]], dtype=torch.float64
)
Y = torch.tensor([0.5, -1.0, 0.8, 0.1], dtype=torch.float64)
LAWS = [
    InverseGamma(2.0, 1.5),
    PointMass(1.3),
    BurrXII(2.0, 1.0),
    LogNormal(0.1, 0.7),
    HalfCauchy(1.2),
    Gamma(2.0, 1.5),
    Weibull(torch.tensor(1.5).double(), torch.tensor(1.4).double()),
]


def _ids(law: object) -> str:
    return type(law).__name__


def _kernel() -> NNGPKernel:
    return NNGPKernel(depth=3, w_std=1.5, b_std=0.3, last_w_std=1.2)


def _sine(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None]
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, (2 * x[:, 0]).sin() + 0.1 * noise


class TestModel(ModelConformance):
    def problem(self):
        x, y = _sine(12)
        return ScaleMixtureNNGP(_kernel(), scale=BurrXII(2.0, 1.0)), (x, y), x[:3] + 0.05


class TestMultiOutputModel(ModelConformance):
    def problem(self):
        x, y = _sine(10)
        both = torch.stack([y, 3 * y.flip(0) + 1], 1)
        return ScaleMixtureNNGP(_kernel(), standardize=True), (x, both), x[:3] + 0.05


class TestProposal(GuideConformance):
    def problem(self):
        model = ScaleMixtureNNGP(_kernel(), scale=LogNormal(0.0, 1.0))
        return model.guide(), model, (X, Y)


# ------------------------------------------------------------------------ acceptance numbers


def test_evidence_of_an_inverse_gamma_is_that_of_the_student_t_process():
    post = pk.infer(ScaleMixtureNNGP(_kernel(), InverseGamma(2.0, 1.5), 0.1), (X, Y), rng=0)
    assert post.log_evidence.kind == "exact"
    assert float(post.log_evidence.value) == pytest.approx(-5.475714662096, abs=2e-12)


def test_evidence_of_a_point_mass_is_that_of_the_gaussian_process():
    post = pk.infer(ScaleMixtureNNGP(_kernel(), PointMass(1.0), 0.1), (X, Y), rng=0)
    assert float(post.log_evidence.value) == pytest.approx(-5.033924190181, abs=2e-12)
    assert post.draws == {} and post.analytic == {}


def test_burr_law_by_quadrature():
    post = pk.infer(ScaleMixtureNNGP(_kernel(), BurrXII(2.0, 1.0), 0.1), (X, Y), rng=0)
    assert float(post.log_evidence.value) == pytest.approx(-5.473018771221, abs=1e-10)
    assert float(post.analytic["scale_var"].mean) == pytest.approx(1.400609425430, abs=1e-9)


def test_prediction_is_the_ratio_of_joint_densities():
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(2.0, 1.5), 0.1)
    three, four = (pk.infer(model, (X[:n], Y[:n]), rng=0) for n in (3, 4))
    law = three.predict(X[3:])
    assert float(law.dist.df) == 7.0
    assert float(law.mean) == pytest.approx(0.281954766575, abs=2e-12)
    assert float(law.dist.scale) ** 2 == pytest.approx(0.222414141398, abs=2e-12)
    density = float(law.log_prob(Y[3:]))
    assert density == pytest.approx(-0.287095505247, abs=2e-12)
    ratio = float(four.log_evidence.value - three.log_evidence.value)
    assert density == pytest.approx(ratio, abs=1e-12)


@pytest.mark.parametrize("noise_in", ["scale", "outside"])
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_joint_prediction_is_the_ratio_of_evidences(law, noise_in):
    """log p(y3, y4 | y1, y2) = log p(y1..4) - log p(y1, y2) for every law and noise."""
    model = ScaleMixtureNNGP(_kernel(), law, 0.1, noise_in=noise_in)
    two, four = (pk.infer(model, (X[:n], Y[:n]), rng=0) for n in (2, 4))
    ratio = float(four.log_evidence.value - two.log_evidence.value)
    assert float(two.predict(X[2:], joint=True).log_prob(Y[2:])) == pytest.approx(ratio, abs=1e-8)


@pytest.mark.parametrize("noise_in", ["scale", "outside"])
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_joint_prediction_of_standardized_outputs_is_a_ratio_on_the_original_scale(law, noise_in):
    """With fixed statistics the change of variables must cancel: scale targets by hand."""
    y = torch.stack([Y, 2 * Y.flip(0)], 1)
    plain = ScaleMixtureNNGP(_kernel(), law, 0.1, noise_in=noise_in)
    scaled = ScaleMixtureNNGP(_kernel(), law, 0.1, noise_in=noise_in, standardize=True)
    x_std = (X - X.mean(0)) / X.std(0, correction=0)
    y_mean, y_sd = y.mean(0), y.std(0, correction=0)
    by_hand = pk.infer(plain, (x_std, (y - y_mean) / y_sd), rng=0)
    post = pk.infer(scaled, (X, y), rng=0)
    expected = float(by_hand.log_evidence.value) - 4 * float(y_sd.log().sum())
    assert float(post.log_evidence.value) == pytest.approx(expected, abs=1e-9)
    new, target = X[:2] + 0.1, y[:2] + 0.3
    here = post.predict(new, joint=True)
    there = by_hand.predict((new - X.mean(0)) / X.std(0, correction=0), joint=True)
    wanted = float(there.log_prob((target - y_mean) / y_sd)) - 2 * float(y_sd.log().sum())
    assert float(here.log_prob(target)) == pytest.approx(wanted, abs=1e-9)
    torch.testing.assert_close(here.mean, there.mean * y_sd + y_mean)


def test_large_alpha_is_the_gaussian_process():
    limit = ScaleMixtureNNGP(_kernel(), InverseGamma(1e8, 1e8), 0.1)
    plain = ScaleMixtureNNGP(_kernel(), PointMass(1.0), 0.1)
    a, b = (pk.infer(m, (X, Y), rng=0) for m in (limit, plain))
    assert float(a.log_evidence.value) == pytest.approx(float(b.log_evidence.value), abs=1e-6)
    level = [0.05, 0.95]
    torch.testing.assert_close(
        a.predict(X).quantile(level), b.predict(X).quantile(level), rtol=0, atol=1e-6
    )


# ------------------------------------------------------------------------------ any kernel


def test_any_gpytorch_kernel_and_the_gradient_of_the_evidence():
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=3))
    model = ScaleMixtureNNGP(kernel.double(), HalfCauchy(1.0), 0.2)
    sites = model.hyper_sites((X, Y))
    assert set(sites) == {
        "kernel.outputscale", "kernel.base_kernel.lengthscale", "noise_var", "scale.scale",
    }  # fmt: skip
    start = {k: v.clone().requires_grad_() for k, v in model.hyper_values((X, Y)).items()}
    model.log_evidence(start, (X, Y)).backward()
    for name, value in start.items():
        flat = value.detach().flatten()
        for i in range(len(flat)):
            step = 1e-5 * torch.eye(len(flat), dtype=flat.dtype)[i].reshape(value.shape)
            moved = [
                model.log_evidence({**start, name: value.detach() + s * step}, (X, Y)).item()
                for s in (1, -1)
            ]
            slope = (moved[0] - moved[1]) / 2e-5
            assert float(value.grad.flatten()[i]) == pytest.approx(slope, rel=1e-6, abs=1e-6), name


def test_plain_mixture_agrees_with_gpytorch():
    """The point mass is GPyTorch's exact GP with the same kernel, noise and zero mean."""
    kernel = gpytorch.kernels.RBFKernel().double()
    post = pk.infer(ScaleMixtureNNGP(kernel, PointMass(1.0), 0.05), (X, Y), rng=0)

    class Exact(gpytorch.models.ExactGP):
        def __init__(self, x, y, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.05
    peer = Exact(X, Y, likelihood).double()
    peer.eval()
    new = X + 0.1
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        theirs = peer(new)
    ours = post.predict(new, site="f", joint=True)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-8)
    cov = ours.dist.scale_tril @ ours.dist.scale_tril.mT
    torch.testing.assert_close(cov, theirs.covariance_matrix, rtol=0, atol=1e-8)


def test_the_outlier_is_not_down_weighted():
    y = Y.clone()
    y[2] = 30.0
    means = [
        pk.infer(ScaleMixtureNNGP(_kernel(), law, 0.1), (X, y), rng=0).predict(X).mean
        for law in (PointMass(1.0), InverseGamma(2.0, 2.0))
    ]
    torch.testing.assert_close(*means)


# -------------------------------------------------------------------------- hyper-parameters


def test_bare_infer_fits_nothing():
    kernel = _kernel()
    before = {k: v.clone() for k, v in kernel.state_dict().items()}
    post = pk.infer(ScaleMixtureNNGP(kernel), _sine(12), rng=0)
    assert post.draws == {}
    assert all(torch.equal(v, kernel.state_dict()[k]) for k, v in before.items())


def test_marginal_likelihood_fit_is_a_maximum():
    data = _sine(25)
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(2.0, 2.0))
    post = pk.infer(model, data, Direct(hyper=MAP(restarts=2)), rng=0)
    best = {name: value[0, 0] for name, value in post.draws.items()}
    objective = float(model.log_evidence(best, data) + model.log_hyperprior(best))
    start = model.hyper_values(data)
    assert objective > float(model.log_evidence(start, data) + model.log_hyperprior(start))
    for name, value in best.items():
        for factor in (0.97, 1.03):
            moved = {**best, name: value * factor}
            assert float(model.log_evidence(moved, data) + model.log_hyperprior(moved)) < objective
    assert float(post.log_evidence.value) == pytest.approx(float(model.log_evidence(best, data)))


def test_several_hyper_draws_give_a_mixture():
    data = _sine(12)
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(2.0, 2.0), learn=("kernel.w_std", "noise_var"))
    hyper = {
        "kernel.w_std": torch.tensor([[1.2, 1.6, 2.0]]).double(),
        "noise_var": torch.tensor([[0.05, 0.1, 0.2]]).double(),
    }
    from probkit.inference.direct import condition_on_draws
    from probkit.posterior import make_posterior
    from probkit.sampler import Problem

    prepared = model.prepare(data)
    problem = Problem(model, prepared)
    log_weights = torch.tensor([[0.2, 0.5, 0.3]]).double().log()
    source = Draws(hyper, log_weights)
    post = condition_on_draws(problem, make_posterior(problem, source), source)
    new = data[0][:3] + 0.03
    mixture = post.predict(new)
    assert isinstance(mixture, pk.Mixture)
    parts = [
        pk.infer(model, data, Direct(hyper={k: v[0, i] for k, v in hyper.items()}), rng=0).predict(
            new
        )
        for i in range(3)
    ]
    weights = log_weights[0].exp()
    expected = sum(w * part.mean for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(mixture.mean, expected)
    density = sum(
        w * part.log_prob(data[1][:3]).exp() for w, part in zip(weights, parts, strict=True)
    )
    torch.testing.assert_close(mixture.log_prob(data[1][:3]).exp(), density)
    draws = post.sample(2000, rng=0)
    shares = [(draws["noise_var"] == v).double().mean() for v in hyper["noise_var"][0]]
    for share, weight in zip(shares, weights, strict=True):
        assert abs(float(share - weight)) < 4 * float((weight * (1 - weight) / 2000).sqrt())


@pytest.mark.parametrize("law", [InverseGamma(2.0, 2.0), BurrXII(2.0, 1.0)], ids=_ids)
def test_update_equals_refitting(law):
    x, y = _sine(15)
    model = ScaleMixtureNNGP(_kernel(), law)
    updated = pk.infer(model, (x[:9], y[:9]), rng=0).update((x[9:], y[9:]), rng=0)
    whole = pk.infer(model, (x, y), rng=0)
    torch.testing.assert_close(updated.predict(x).mean, whole.predict(x).mean)
    torch.testing.assert_close(updated.log_evidence.value, whole.log_evidence.value)


# --------------------------------------------------------------------------- other samplers


def test_importance_sampling_agrees_with_quadrature_and_reports_its_size():
    model = ScaleMixtureNNGP(_kernel(), BurrXII(2.0, 1.0), 0.1)
    exact = float(pk.infer(model, (X, Y), rng=0).log_evidence.value)
    post = pk.infer(model, (X, Y), ImportanceSampling(20_000), rng=0)
    weights = post.log_weights.flatten()
    error = float((weights - weights.logsumexp(0)).exp().std()) * len(weights) ** 0.5
    assert abs(float(post.log_evidence.value) - exact) < 4 * error
    assert 10 < post.attrs["ess"] <= 20_000


def test_prior_draws_fail_loudly_where_data_are_informative():
    x, y = _sine(300)
    model = ScaleMixtureNNGP(_kernel(), BurrXII(2.0, 1.0), 0.01)
    with pytest.warns(pk.NumericsWarning, match="effective draws of 100"):
        pk.infer(model, (x, 30 * y), ImportanceSampling(100, proposal="prior"), rng=0)


@pytest.mark.filterwarnings("ignore:SVI. Pareto k")  # of a log-normal for an inverse Gamma
def test_a_fitted_guide_predicts_nearly_as_the_closed_form():
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(2.0, 1.5), 0.1)
    exact = pk.infer(model, (X, Y), rng=0)
    fit = pk.infer(model, (X, Y), SVI(steps=400), guide=MeanField(), rng=0)
    assert float(fit.log_evidence.value) <= float(exact.log_evidence.value) + 0.01
    torch.testing.assert_close(fit.predict(X, rng=0).mean, exact.predict(X).mean)
    ratio = fit.predict(X, rng=0).variance / exact.predict(X).variance
    assert bool(((ratio > 0.6) & (ratio < 1.4)).all())


class TestDirectSampler(SamplerConformance):
    def problem(self):
        model = ScaleMixtureNNGP(_kernel(), InverseGamma(2.0, 2.0))
        return Direct(hyper=MAP(restarts=1, tolerance=1e-3)), model, _sine(10)


# --------------------------------------------------------------------- predictions and shapes


@pytest.mark.parametrize("law", [InverseGamma(2.0, 1.5), BurrXII(2.0, 1.0)], ids=_ids)
@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("noise_in", ["scale", "outside"])
def test_batches_of_inputs_equal_the_loop(law, outputs, joint, noise_in):
    y = Y if outputs is None else torch.stack([Y, 2 * Y + 1], 1)
    model = ScaleMixtureNNGP(_kernel(), law, 0.1, noise_in=noise_in, standardize=True)
    post = pk.infer(model, (X, y), rng=0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 3, generator=generator, dtype=torch.float64)
    whole = post.predict(x, joint=joint)
    tail = () if outputs is None else (outputs,)
    assert whole.mean.shape == (2, 3, 4, *tail)
    assert whole.quantile([0.1, 0.9]).shape == (2, 2, 3, 4, *tail)
    assert whole.sample(5, rng=0).shape == (5, 2, 3, 4, *tail)
    y_new = torch.randn(whole.mean.shape, generator=generator, dtype=torch.float64)
    densities = whole.log_prob(y_new)
    for i in range(2):
        for j in range(3):
            part = post.predict(x[i, j], joint=joint)
            torch.testing.assert_close(whole.mean[i, j], part.mean)
            torch.testing.assert_close(whole.variance[i, j], part.variance)
            torch.testing.assert_close(densities[i, j], part.log_prob(y_new[i, j]))


def test_joint_samples_share_one_scale():
    """Excess kurtosis of a joint draw shows in products of squares of far-apart rows."""
    model = ScaleMixtureNNGP(gpytorch.kernels.RBFKernel().double(), InverseGamma(3.0, 3.0), 1e-6)
    post = pk.infer(model, (X[:1], Y[:1]), rng=0)
    far = torch.tensor([[40.0, 0, 0], [0, 40.0, 0]], dtype=torch.float64)
    draws = post.predict(far, joint=True).sample(40_000, rng=0)
    law = post.predict(far, joint=True).dist
    # Cov(f1^2, f2^2) = Var(s) > 0 for one s ~ IG; zero if each row drew its own.
    squares = draws.square()
    centred = squares - squares.mean(0)
    products = centred[:, 0] * centred[:, 1]
    error = float(products.std()) / len(products) ** 0.5
    nu = float(law.df.reshape(-1)[0])
    s = float(law.variance.reshape(-1)[0]) * (nu - 2) / nu
    expected = s**2 * (nu**2 / ((nu - 2) * (nu - 4)) - (nu / (nu - 2)) ** 2)
    assert abs(float(products.mean()) - expected) < 4 * error
    assert expected > 8 * error


def test_infinite_variance_warns_and_quantiles_stay():
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(0.4, 1.0), 0.1)
    post = pk.infer(model, (X[:1], Y[:1]), rng=0)
    law = post.predict(X[1:])
    with pytest.warns(pk.NumericsWarning, match="variance"):
        assert bool(torch.isinf(law.variance).all())
    assert bool(torch.isfinite(law.quantile([0.05, 0.95])).all())


def test_frames_and_arrays_equal_tensors_and_keep_names():
    frame = pd.DataFrame(X.numpy(), columns=["age", "dose", "time"], index=list("abcd"))
    model = ScaleMixtureNNGP(_kernel())
    tensors = pk.infer(model, (X, Y), rng=0)
    frames = pk.infer(model, (frame, pd.Series(Y.numpy(), index=list("abcd"))), rng=0)
    assert list(frames.context.coords["feature"]) == ["age", "dose", "time"]
    assert list(frames.context.coords["row"]) == list("abcd")
    assert torch.equal(tensors.predict(X).mean, frames.predict(frame).mean)
    assert torch.equal(tensors.predict(X).mean, tensors.predict(X.numpy()).mean)
    target = Y.numpy()
    torch.testing.assert_close(
        frames.predict(frame).log_prob(target), tensors.predict(X).log_prob(Y)
    )


def test_single_precision_is_computed_in_double():
    post = pk.infer(ScaleMixtureNNGP(_kernel()), (X.float(), Y.float()), rng=0)
    assert post.predict(X.float()).mean.dtype == torch.float64


def test_saves_and_loads(tmp_path):
    kernel = gpytorch.kernels.ScaleKernel(NNGPKernel(depth=2, activation="erf"))
    model = ScaleMixtureNNGP(kernel, BurrXII(2.0, 1.0), standardize=True, noise_in="outside")
    post = pk.infer(model, (X, Y), rng=0)
    post.save(tmp_path)
    again = pk.load(tmp_path)
    for level in (0.1, 0.9):
        assert torch.equal(again.predict(X).quantile(level), post.predict(X).quantile(level))
    assert torch.equal(again.analytic["scale_var"].mean, post.analytic["scale_var"].mean)


# -------------------------------------------------------------------------------- bad input


def _nan_at(row: int, column: int) -> torch.Tensor:
    x = X.clone()
    x[row, column] = float("nan")
    return x


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ((_nan_at(2, 1), Y), pk.DataError, "X.*row 2.*column 1"),
        ((X, torch.tensor([0.0, 1.0, float("inf"), 2.0])), pk.DataError, "y.*row 2"),
        ((X[:, :0], Y), pk.ShapeError, "at least one feature column"),
        ((X[:0], Y[:0]), pk.DataError, "at least one row"),
        ((X, Y[:3]), pk.ShapeError, "equally many rows"),
        ((X[:, 0], Y), pk.ShapeError, r"use X\[:, None\]"),
        ((X.half(), Y), pk.DataError, "float16"),
        ((X, torch.complex(Y, Y)), pk.DataError, "real numbers"),
        (X, pk.DataError, r"expected data \(X"),
        ((pd.DataFrame({"a": ["x"] * 4}), Y), pk.DataError, "column 'a'"),
    ],
)
def test_bad_data_is_named(data, error, text):
    with pytest.raises(error, match=text):
        pk.infer(ScaleMixtureNNGP(_kernel()), data, rng=0)


def test_bad_frame_names_the_column():
    frame = pd.DataFrame(_nan_at(2, 1).numpy(), columns=["age", "dose", "time"])
    with pytest.raises(pk.DataError, match=r"X.*row 2.*(dose|column 1)"):
        pk.infer(ScaleMixtureNNGP(_kernel()), (frame, Y), rng=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"noise_var": 0.0}, "noise_var: expected a finite number > 0, got 0"),
        ({"noise_var": -1.0}, "noise_var"),
        ({"noise_in": "inside"}, "noise_in: expected 'scale' or 'outside', got 'inside'"),
        ({"scale": torch.distributions.Normal(0.0, 1.0)}, "positive support"),
        ({"learn": ("kernel.depth",)}, "learn: expected names out of kernel.w_std"),
        ({"hyper_scale": 0.0}, "hyper_scale"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(pk.DataError, match=text):
        ScaleMixtureNNGP(_kernel(), **options)


def test_bad_kernel_laws_and_requests():
    with pytest.raises(pk.DataError, match="expected a GPyTorch kernel"):
        ScaleMixtureNNGP("relu")
    with pytest.raises(pk.DataError, match="alpha"):
        InverseGamma(-1.0, 2.0)
    with pytest.raises(pk.DataError, match="target that varies"):
        pk.infer(ScaleMixtureNNGP(_kernel(), standardize=True), (X, torch.ones(4)), rng=0)
    post = pk.infer(ScaleMixtureNNGP(_kernel()), (X, Y), rng=0)
    with pytest.raises(pk.ShapeError, match="expected 3 feature columns as in training, got 2"):
        post.predict(X[:, :2])
    with pytest.raises(pk.DataError, match="expected None .* or 'f', got 'g'"):
        post.predict(X, site="g")
    with pytest.raises(pk.CapabilityError, match="leave groups= out"):
        post.predict(X, groups={"row": [1]})
    with pytest.raises(pk.DataError, match="hyper: expected names out of"):
        pk.infer(ScaleMixtureNNGP(_kernel()), (X, Y), Direct(hyper={"w": torch.ones(())}), rng=0)


def test_all_zero_row_without_bias_is_zero_by_rule():
    x = X.clone()
    x[1] = 0.0
    model = ScaleMixtureNNGP(NNGPKernel(depth=2, b_std=0.0), noise_var=0.1)
    post = pk.infer(model, (x, Y), rng=0)
    law = post.predict(torch.zeros(1, 3, dtype=torch.float64), site="f")
    assert float(law.mean) == 0.0
    assert np.isfinite(float(post.log_evidence.value))


def test_allocation_that_cannot_fit_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr("probkit.numerics.available_memory", lambda *a, **k: 10_000)
    with pytest.raises(pk.DataError, match="a kernel matrix of 200 rows"):
        pk.infer(ScaleMixtureNNGP(_kernel()), _sine(200), rng=0)


def test_joint_predictions_at_noiseless_training_points_stay_within_rounding():
    x, _ = _sine(20)
    y = (2 * x[:, 0]).sin()
    model = ScaleMixtureNNGP(gpytorch.kernels.RBFKernel().double(), noise_var=1e-10)
    with pytest.warns(pk.NumericsWarning, match="jitter"):
        post = pk.infer(model, (x, y), rng=0)
        law = post.predict(x.repeat(3, 1), site="f", joint=True)
    torch.testing.assert_close(law.mean, y.repeat(3), rtol=0, atol=1e-3)
    assert bool((law.variance < 1e-5 * post.analytic["scale_var"].mean).all())


@pytest.mark.parametrize("law", [InverseGamma(2.0, 1.5), BurrXII(2.0, 1.0)])
def test_no_rows_are_a_prediction_of_no_rows(law):
    post = pk.infer(ScaleMixtureNNGP(_kernel(), law, 0.1), (X, Y), rng=0)
    assert post.predict(X[:0]).mean.shape == (0,)
    assert post.predict(X[:0]).quantile([0.1, 0.9]).shape == (2, 0)


def test_an_update_with_other_columns_names_them():
    post = pk.infer(ScaleMixtureNNGP(_kernel()), (X, Y), rng=0)
    with pytest.raises(pk.ShapeError, match=r"update: expected rows of X \(3,\).* got \(2,\)"):
        post.update((X[:, :2], Y), rng=0)
    with pytest.raises(pk.ShapeError, match=r"and y \(\) \[output\].* and \(1,\)"):
        post.update((X, Y[:, None]), rng=0)


def test_columns_of_frames_are_matched_by_name():
    frame = pd.DataFrame(X.numpy(), columns=["a", "b", "c"], index=["w", "x", "y", "z"])
    post = pk.infer(ScaleMixtureNNGP(_kernel()), (frame, pd.Series(Y.numpy(), frame.index)), rng=0)
    expected = post.predict(X).mean
    assert torch.equal(post.predict(frame[["c", "a", "b"]]).mean, expected)
    assert torch.equal(post.predict(pd.DataFrame(X.numpy())).mean, expected)
    with pytest.raises(pk.DataError, match="columns a, b, c .* missing: c, unknown: d"):
        post.predict(frame.rename(columns={"c": "d"}))
    with pytest.raises(pk.DataError, match="labels along 'row' differ between parts of the data"):
        pk.infer(
            ScaleMixtureNNGP(_kernel()), (frame, pd.Series(Y.numpy(), frame.index[::-1])), rng=0
        )
