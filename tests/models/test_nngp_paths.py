"""Sample paths by Matheron's rule, against the closed-form predictive."""

from __future__ import annotations

import gpytorch
import pytest
import torch

import probkit as pk
from probkit.inference import MAP, SVI, Direct, ImportanceSampling, MeanField
from probkit.kernels import NNGPKernel
from probkit.models import (
    BurrXII,
    HalfCauchy,
    InverseGamma,
    PointMass,
    ScaleMixture,
    ScaleMixtureNNGP,
    sample_paths,
)
from probkit.models.random_features import random_features
from probkit.testing.statistics import z_bound

LAWS = [InverseGamma(4.0, 3.0), PointMass(1.3), BurrXII(6.0, 2.0)]
NOISES = ["scale", "outside"]
N = 4000


def _ids(value):
    return type(value).__name__ if not isinstance(value, str) else value


def _kernel():
    return NNGPKernel(depth=2, w_std=1.5, b_std=0.3, last_w_std=1.2)


def _data():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    return x, 5 + 2 * torch.randn(6, generator=generator, dtype=torch.float64)


def _new(rows: int = 4):
    generator = torch.Generator().manual_seed(8)
    return torch.randn(rows, 2, generator=generator, dtype=torch.float64)


def _assert_moments(draws, law, *, bias=0.0):
    """Mean, second moments and quantile levels of draws [draw, *obs] within Monte Carlo error.

    ``bias`` widens the bound on second moments, relative to the variances.
    """
    n = len(draws)
    flat, mean, variance = (v.reshape(*v.shape[:k], -1) for v, k in (
        (draws, 1), (law.mean, 0), (law.variance, 0)
    ))  # fmt: skip
    z = (flat.mean(0) - mean) / (variance / n).sqrt()
    assert float(z.abs().max()) < z_bound(z.numel()), z
    squares = (flat - mean).square()
    excess = ((squares.mean(0) - variance).abs() - bias * variance).clamp_min(0)
    z = excess / (squares.std(0) / n**0.5)
    assert float(z.max()) < z_bound(z.numel()), z
    for level in (0.05, 0.5, 0.95):
        below = (flat <= law.quantile(level).flatten()).double().mean(0)
        gap = ((below - level).abs() - 0.5 * bias).clamp_min(0)
        z = gap / (level * (1 - level) / n) ** 0.5
        assert float(z.max()) < z_bound(3 * z.numel()), (level, z)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("noise_in", NOISES)
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_paths_have_the_law_of_the_predictive(law, noise_in, standardize):
    model = ScaleMixtureNNGP(_kernel(), law, 0.1, noise_in=noise_in, standardize=standardize)
    post = pk.infer(model, _data(), rng=0)
    new = torch.cat([_new(), _data()[0][:2]])  # training points are points like others
    draws = sample_paths(post, N, rng=0)(new)
    assert draws.shape == (N, 6)
    joint = post.predict(new, site="f", joint=True)
    _assert_moments(draws, joint)
    exact = joint.sample(N, rng=1)
    products, wanted = (((v - joint.mean)[:, :1] * (v - joint.mean)[:, 1:]) for v in (draws, exact))
    error = ((products.var(0) + wanted.var(0)) / N).sqrt()
    z = (products.mean(0) - wanted.mean(0)) / error
    assert float(z.abs().max()) < z_bound(z.numel()), z


def test_paths_of_one_scale_for_all_rows_are_heavy_tailed_together():
    """Far from the data a path is sigma g: its squares are correlated, as sigma^2 is shared."""
    kernel = gpytorch.kernels.RBFKernel().double()
    x = torch.zeros(1, 1, dtype=torch.float64)
    post = pk.infer(
        ScaleMixtureNNGP(kernel, InverseGamma(4.0, 4.0)), (x, torch.ones(1).double()), rng=0
    )
    far = torch.tensor([[40.0], [80.0]], dtype=torch.float64)
    paths = sample_paths(post, 20_000, rng=0)
    values = paths(far)
    squares = values.square()
    centred = squares - squares.mean(0)
    product = centred[:, 0] * centred[:, 1]
    assert float(product.mean()) > 6 * float(product.std()) / 20_000**0.5
    # Divided by their own scale they are standard normal and independent.
    white = values / paths.scale_var.sqrt()[:, None]
    z = (white.square().mean(0) - 1) / (2 / 20_000) ** 0.5
    assert float(z.abs().max()) < 4
    z = (white[:, 0].square() * white[:, 1].square()).mean() - 1
    assert abs(float(z)) < 4 * (8 / 20_000) ** 0.5


def test_the_tail_is_that_of_a_student_t_law():
    """Rare events: the share beyond the 99.9 % quantile, which a Gaussian would miss."""
    post = pk.infer(ScaleMixtureNNGP(_kernel(), InverseGamma(1.0, 1.0)), _data(), rng=0)
    new = _new(2)
    law = post.predict(new, site="f")
    draws = sample_paths(post, 60_000, rng=0)(new)
    share = (draws > law.quantile(0.999)).double().mean(0)
    z = (share - 0.001) / (0.001 * 0.999 / 60_000) ** 0.5
    assert float(z.abs().max()) < 4
    normal = law.mean + 3.0902 * law.variance.sqrt()
    gauss = (draws > normal).double().mean(0)
    assert bool((((gauss - 0.001) / (0.001 / 60_000) ** 0.5) > 4).all())


@pytest.mark.parametrize("prior", ["exact", "features"])
@pytest.mark.parametrize("outputs", [None, 2])
def test_a_path_is_one_function_however_it_is_asked(prior, outputs):
    x, y = _data()
    y = y if outputs is None else torch.stack([y, -y], 1)
    post = pk.infer(ScaleMixtureNNGP(_kernel(), standardize=True), (x, y), rng=0)
    paths = sample_paths(post, 3, rng=0, prior=prior)
    new = _new(6)
    whole = paths(new)
    tail = () if outputs is None else (outputs,)
    assert whole.shape == (3, 6, *tail)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(paths(new[[4, 1, 4]]), whole[:, [4, 1, 4]], **close)
    torch.testing.assert_close(paths(new.reshape(2, 3, 2)), whole.reshape(3, 2, 3, *tail), **close)
    torch.testing.assert_close(
        paths(torch.cat([_new(8)[6:], new[:2]]))[:, 2:], whole[:, :2], **close
    )
    assert paths(new[:0]).shape == (3, 0, *tail)
    assert torch.equal(sample_paths(post, 3, rng=0, prior=prior)(new), whole)
    assert not torch.equal(sample_paths(post, 3, rng=1, prior=prior)(new), whole)


def test_points_asked_for_later_follow_the_same_joint_law():
    """Asked one by one or all at once, paths have the same covariance."""
    post = pk.infer(ScaleMixtureNNGP(_kernel(), InverseGamma(5.0, 4.0)), _data(), rng=0)
    new = _new()
    paths = sample_paths(post, N, rng=0)
    draws = torch.cat([paths(row[None]) for row in new], 1)
    law = post.predict(new, site="f", joint=True)
    _assert_moments(draws, law)
    centred = draws - law.mean
    scale = law.dist.covariance_matrix
    for i, j in ((0, 3), (1, 2)):
        product = centred[:, i] * centred[:, j]
        z = (product.mean() - scale[i, j]) / (product.std() / N**0.5)
        assert abs(float(z)) < 4


def test_without_noise_paths_go_through_the_data():
    x, y = _data()
    post = pk.infer(ScaleMixtureNNGP(_kernel(), noise_var=1e-10), (x, y), rng=0)
    for prior in ("exact", "features"):
        values = sample_paths(post, 5, rng=0, prior=prior)(x)
        torch.testing.assert_close(values, y.expand(5, 6), rtol=0, atol=1e-3)


@pytest.mark.parametrize("noise_in", NOISES)
def test_outputs_with_scales_of_their_own(noise_in):
    x, y = _data()
    both = torch.stack([y, 30 * y.flip(0)], 1)
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(4.0, 3.0), scale_per="output",
                             noise_in=noise_in)  # fmt: skip
    post = pk.infer(model, (x, both), rng=0)
    paths = sample_paths(post, N, rng=0)
    assert paths.scale_var.shape == (N, 2)
    _assert_moments(paths(_new()), post.predict(_new(), site="f"))


@pytest.mark.parametrize("law", [InverseGamma(5.0, 4.0), BurrXII(6.0, 2.0), PointMass(2.0)])
def test_groups_and_new_groups(law):
    x, y = _data()
    labels = ["a", "b", "a", "a", "b", "a"]
    post = pk.infer(ScaleMixtureNNGP(_kernel(), law, scale_per="group"), (x, y, labels), rng=0)
    for group in ("a", "z"):
        draws = sample_paths(post, N, rng=0, group=group)(_new())
        _assert_moments(draws, post.predict(_new(), site="f", groups={"group": [group] * 4}))
    with pytest.raises(pk.DataError, match="group: expected a label, of 'a', 'b' or a new one"):
        sample_paths(post, 3, rng=0)


def test_a_wrapped_gaussian_process_with_its_mean():
    x, y = _data()

    class Line(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(2.5))
            self.double()
            self.mean_module.constant.data.fill_(3.0)

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    post = pk.infer(ScaleMixture(Line(), InverseGamma(5.0, 4.0)), (x, y), rng=0)
    _assert_moments(sample_paths(post, N, rng=0)(_new()), post.predict(_new(), site="f"))
    draws = sample_paths(post, N, rng=0, prior="features", features=4000)(_new())
    _assert_moments(draws, post.predict(_new(), site="f"), bias=0.08)


# ------------------------------------------------------------------------- other posteriors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SVI. Pareto k")  # a normal guide has too light a tail here
def test_every_kind_of_posterior_has_paths():
    data = _data()
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(4.0, 3.0))
    exact = pk.infer(model, data, rng=0)
    sampled = pk.infer(model, data, ImportanceSampling(4000), rng=0)
    fitted = pk.infer(model, data, SVI(steps=200), guide=MeanField(), rng=0)
    best = pk.infer(model, data, Direct(hyper=MAP(restarts=1)), rng=0)
    for post in (sampled, fitted, best):
        draws = sample_paths(post, N, rng=0)(_new())
        law = post.predict(_new(), site="f", rng=0)
        z = (draws.mean(0) - law.mean) / (law.variance / N).sqrt()
        assert float(z.abs().max()) < z_bound(4)
    draws = sample_paths(sampled, N, rng=0)(_new())
    spread = draws.var(0) / exact.predict(_new(), site="f").variance
    assert bool(((spread - 1).abs() < 0.2).all())  # four standard errors of heavy-tailed squares


@pytest.mark.parametrize("noise_in", NOISES)
@pytest.mark.parametrize("per", [None, "output"])
def test_each_path_takes_hyper_parameters_of_its_own(per, noise_in):
    from probkit.inference.direct import condition_on_draws
    from probkit.posterior import make_posterior
    from probkit.sampler import Problem
    from probkit.sources import Draws

    x, y = _data()
    data = (x, torch.stack([y, 30 * y.flip(0)], 1)) if per else (x, y)
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(5.0, 4.0), noise_in=noise_in, scale_per=per,
                             learn=("kernel.w_std", "noise_var"))  # fmt: skip
    problem = Problem(model, model.prepare(data))
    hyper = {
        "kernel.w_std": torch.tensor([[1.0, 2.5]]).double(),
        "noise_var": torch.tensor([[0.05, 0.6]]).double(),
    }
    source = Draws(hyper, torch.tensor([[0.3, 0.7]]).double().log())
    post = condition_on_draws(problem, make_posterior(problem, source), source)
    draws = sample_paths(post, N, rng=0)(_new())
    _assert_moments(draws, post.predict(_new(), site="f"))
    with pytest.raises(pk.CapabilityError, match="needs one set of hyper-parameters"):
        sample_paths(post, 3, rng=0, prior="features")


# ----------------------------------------------------------------------------------- features


@pytest.mark.parametrize(
    "kernel",
    [
        NNGPKernel(depth=1, w_std=1.3, b_std=0.4, last_b_std=0.3),
        NNGPKernel(depth=1, activation="erf"),
        NNGPKernel(depth=1, activation="tanh"),
        gpytorch.kernels.RBFKernel(ard_num_dims=2),
        gpytorch.kernels.MaternKernel(1.5),
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(0.5, active_dims=[1])),
        gpytorch.kernels.RBFKernel() + NNGPKernel(depth=1),
    ],
    ids=lambda kernel: type(kernel).__name__,
)
def test_features_average_to_the_kernel(kernel):
    """Unbiased: the mean over independent maps, within its Monte Carlo error."""
    kernel = kernel.double()
    x = _new(5)
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack(
        [
            (phi := random_features(kernel, 64, 2, generator=generator, like=x)(x)) @ phi.mT
            for _ in range(400)
        ]
    )
    with torch.no_grad():
        z = (maps.mean(0) - kernel(x).to_dense()) / (maps.std(0) / 20 + 1e-12)
    assert float(z.abs().max()) < z_bound(25), z


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mlp", "resnet"])
def test_deep_features_approach_the_kernel_with_their_width(arch):
    kernel = NNGPKernel(depth=3, arch=arch, activation="erf")
    x = _new(5)
    exact = kernel(x).to_dense().detach()
    errors = []
    for width in (64, 1024):
        generator = torch.Generator().manual_seed(0)
        gaps = [
            (phi := random_features(kernel, width, 2, generator=generator, like=x)(x)) @ phi.mT
            - exact
            for _ in range(12)
        ]
        errors.append(float(torch.stack(gaps).square().mean().sqrt()))
    # Sixteen times the width: a quarter of the error, give or take its own Monte Carlo error.
    assert 2.4 < errors[0] / errors[1] < 6.5, errors


@pytest.mark.slow
def test_paths_of_features_are_near_the_predictive_and_have_gradients():
    post = pk.infer(ScaleMixtureNNGP(_kernel(), InverseGamma(5.0, 4.0)), _data(), rng=0)
    paths = sample_paths(post, N, rng=0, prior="features", features=4096)
    _assert_moments(paths(_new()), post.predict(_new(), site="f"), bias=0.08)
    at = _new(1).requires_grad_()
    value = sample_paths(post, 2, rng=0, prior="features")
    (gradient,) = torch.autograd.grad(value(at)[0].sum(), at)
    with torch.no_grad():
        for k in range(2):
            step = 1e-6 * torch.eye(2, dtype=torch.float64)[k]
            slope = (value(at + step) - value(at - step))[0, 0] / 2e-6
            assert float(gradient[0, k]) == pytest.approx(float(slope), rel=1e-5, abs=1e-6)


def test_a_missing_correction_is_seen():
    """The prior alone, or the mean alone, fails the moment test: the test has teeth."""
    post = pk.infer(ScaleMixtureNNGP(_kernel(), InverseGamma(4.0, 3.0)), _data(), rng=0)
    paths = sample_paths(post, N, rng=0)
    law = post.predict(_new(), site="f")
    paths._coefficients = torch.zeros_like(paths._coefficients)
    with pytest.raises(AssertionError):
        _assert_moments(paths(_new()), law)
    with pytest.raises(AssertionError):
        _assert_moments(law.mean.expand(N, -1), law)


def test_bad_requests_are_named():
    post = pk.infer(ScaleMixtureNNGP(_kernel(), HalfCauchy(1.0)), _data(), rng=0)
    with pytest.raises(pk.DataError, match="prior: expected 'exact' or 'features', got 'fourier'"):
        sample_paths(post, 3, rng=0, prior="fourier")
    with pytest.raises(pk.CapabilityError, match="has no groups; leave group= out"):
        sample_paths(post, 3, rng=0, group="a")
    with pytest.raises(pk.ShapeError, match="x: expected 2 feature columns as in training, got 1"):
        sample_paths(post, 3, rng=0)(_new()[:, :1])
    with pytest.raises(pk.DataError, match="features: expected a number >= 1, got 0"):
        sample_paths(post, 3, rng=0, prior="features", features=0)
    periodic = ScaleMixtureNNGP(gpytorch.kernels.PeriodicKernel().double())
    other = pk.infer(periodic, _data(), rng=0)
    with pytest.raises(pk.CapabilityError, match="not known for PeriodicKernel; use prior='exact'"):
        sample_paths(other, 3, rng=0, prior="features")
