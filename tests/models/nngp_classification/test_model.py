"""The classifier through the public interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpytorch.kernels import RBFKernel
from sklearn.datasets import load_digits

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import MAP, SVI, Direct, ImportanceSampling
from probkit.kernels import NNGPKernel
from probkit.loader import Loader
from probkit.model import Batch
from probkit.models import BurrXII, InverseGamma, LogNormal, PointMass, ScaleMixtureNNGP
from probkit.models.nngp_classification import ScaleMixtureClassifier
from probkit.models.nngp_classification.data import stratified
from probkit.models.nngp_classification.labels import largest_score
from probkit.predictive import Analytic, Mixture
from probkit.sources import Draws
from probkit.testing import GuideConformance, ModelConformance, z_bound

SHORT = SVI(steps=40, lr=0.1, particles=8, evidence_draws=100)


def _kernel(**options) -> NNGPKernel:
    return NNGPKernel(depth=2, w_std=1.4, b_std=0.5, last_w_std=1.0, **options)


def _data(n=12, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    angle = torch.atan2(x[:, 1], x[:, 0])
    labels = ((angle / np.pi + 1) / 2 * classes).long().clamp(0, classes - 1)
    labels[:classes] = torch.arange(classes)  # every class has a row
    return x, labels


class TestModel(ModelConformance):
    latents = ("f",)

    def problem(self):
        x, labels = _data()
        model = ScaleMixtureClassifier(_kernel(), inducing=4, jitter=1e-3)
        return model, (x, labels), x[:3] + 0.05

    def sampler(self):
        return SHORT


class TestLogNormalModel(ModelConformance):
    latents = ("f",)

    def problem(self):
        x, labels = _data()
        model = ScaleMixtureClassifier(
            _kernel(),
            BurrXII(3.0, 2.0),
            4,
            "diag",
            jitter=1e-3,
            learn=("kernel.w_std", "inducing_inputs"),
        )
        return model, (x, labels), x[:3] + 0.05

    def sampler(self):
        return SHORT


class TestGaussianModel(ModelConformance):
    latents = ("f",)

    def problem(self):
        x, labels = _data()
        return ScaleMixtureClassifier(_kernel(), likelihood="gaussian"), (x, labels), x[:3] + 0.05


class TestGuide(GuideConformance):
    def problem(self):
        x, labels = _data(3, 2)
        scale = InverseGamma(8.0, 8.0)
        model = ScaleMixtureClassifier(
            _kernel(), scale, 2, jitter=1e-2, learn=("inducing_inputs", "kernel.b_std")
        )
        return model.guide(), model, (x, labels)


class TestPlainDiagonalGuide(GuideConformance):
    def problem(self):
        x, labels = _data(3, 2)
        model = ScaleMixtureClassifier(
            _kernel(), LogNormal(0.0, 0.3), 2, "diag", whiten=False, jitter=1e-2
        )
        return model.guide(), model, (x, labels)


# ------------------------------------------------------------------------------- whole fits


def _digits(n):
    bunch = load_digits()
    return torch.as_tensor(bunch.data[:n] / 16), torch.as_tensor(bunch.target[:n])


@pytest.mark.slow
def test_digits_are_told_apart():
    """Nearest neighbours get 0.94 of these rows right."""
    x, y = _digits(800)
    model = ScaleMixtureClassifier(NNGPKernel(), inducing=60)
    sampler = SVI(steps=350, lr=0.2, batch_size=100, particles=8)
    post = pk.infer(model, (x[:500], y[:500]), sampler, rng=0)
    law = post.predict(x[500:], rng=0)
    assert law.probs.shape == (300, 10)
    torch.testing.assert_close(law.probs.sum(-1), torch.ones(300).double())
    accuracy = float((law.probs.argmax(-1) == y[500:]).double().mean())
    assert accuracy > 0.85
    assert float(-law.log_prob(y[500:]).mean()) < 0.6
    assert post.log_evidence is None  # not on a minibatch
    assert float(post.analytic["scale_var"].mean) > 3  # labels far apart need large scores


def test_digits_by_regression():
    x, y = _digits(800)
    model = ScaleMixtureClassifier(NNGPKernel(), likelihood="gaussian", noise_var=0.01)
    post = pk.infer(model, (x[:500], y[:500]), rng=0)
    law = post.predict(x[500:])
    assert float((law.probs.argmax(-1) == y[500:]).double().mean()) > 0.9
    assert float(-law.log_prob(y[500:]).mean()) < 0.35
    assert post.log_evidence.kind == "exact"


def test_the_gaussian_likelihood_is_regression_on_centred_one_hot_labels():
    x, y = _data()
    targets = torch.eye(3, dtype=torch.float64)[y] - 1 / 3
    for law in (InverseGamma(2.0, 1.5), PointMass(1.3), BurrXII(2.0, 1.0)):
        model = ScaleMixtureClassifier(_kernel(), law, likelihood="gaussian", noise_var=0.2)
        post = pk.infer(model, (x, y), rng=0)
        there = pk.infer(ScaleMixtureNNGP(_kernel(), law, 0.2), (x, targets), rng=0)
        assert torch.equal(post.log_evidence.value, there.log_evidence.value)
        a, b = post.predict(x[:3] + 0.1, site="f"), there.predict(x[:3] + 0.1, site="f")
        torch.testing.assert_close(a.quantile(0.9), b.quantile(0.9))
        # The chance of the largest score, by joint draws: one sigma^2 for all classes.
        scores = there.predict(x[:3] + 0.1, joint=True).sample(40_000, rng=1)
        wins = torch.nn.functional.one_hot(scores.argmax(-1), 3).double().mean(0)
        probs = post.predict(x[:3] + 0.1).probs
        error = (probs * (1 - probs) / 40_000).sqrt()
        assert float(((wins - probs).abs() / error).max()) < z_bound(9)


def test_hyperparameters_of_the_regression_can_be_fitted():
    x, y = _data(30)
    model = ScaleMixtureClassifier(_kernel(), likelihood="gaussian")
    plain = pk.infer(model, (x, y), rng=0)
    fitted = pk.infer(model, (x, y), Direct(hyper=MAP(restarts=1, max_iter=40)), rng=0)
    assert set(fitted.draws) == {
        *("kernel.w_std", "kernel.b_std", "noise_var", "scale.rate"),
    }
    assert float(fitted.log_evidence.value) > float(plain.log_evidence.value)
    assert fitted.predict(x[:4]).probs.shape == (4, 3)


def test_kernel_hyperparameters_can_be_learned():
    """Labels that change often ask for a shorter lengthscale than it starts with."""
    x = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None]
    y = ((2 * x[:, 0]).sin() > 0).long()
    kernel = RBFKernel().double()
    kernel.lengthscale = 2.0
    sampler = SVI(steps=150, lr=0.1, particles=8, evidence_draws=2000)
    bounds = []
    for learn in ((), ("inducing_inputs", "kernel.lengthscale")):
        model = ScaleMixtureClassifier(kernel, inducing=8, learn=learn)
        post = pk.infer(model, (x, y), sampler, rng=0)
        bounds.append(float(post.log_evidence.value))
    assert bounds[0] + 3 < bounds[1]
    learned = post.source.guide.kernel_params(post.source.params[0], model)
    assert 0.2 < float(learned["lengthscale"]) < 1.5
    assert float(kernel.lengthscale.detach()) == pytest.approx(2.0)
    assert kernel.raw_lengthscale.grad is None


def test_a_full_covariance_bounds_more_closely_than_a_diagonal_one():
    sampler = SVI(steps=100, lr=0.15, decay=0.02, particles=8, evidence_draws=5000)
    bound = {}
    for covariance in ("full", "diag"):
        model = ScaleMixtureClassifier(_kernel(), inducing=8, covariance=covariance, whiten=False)
        post = pk.infer(model, _data(24), sampler, rng=0)
        bound[covariance] = float(post.log_evidence.value)
    assert bound["full"] > bound["diag"] + 0.2


def test_scores_and_labels_agree():
    """Probabilities of labels are means of softmax over draws of the scores."""
    post = TestModel().posterior()
    x = _data()[0][:3] + 0.05
    law = post.predict(x, site="f")
    assert law.mean.shape == (3, 3)
    scale = post.analytic["scale_var"]
    torch.testing.assert_close(law.dist.df, (2 * scale.concentration).expand(3, 3))
    # Independent classes given sigma^2: their draws share the chi-squared variable.
    generator = torch.Generator().manual_seed(0)
    chi = scale.rate / torch._standard_gamma(
        scale.concentration.detach().expand(100_000).contiguous(), generator=generator
    )
    noise = torch.randn(100_000, 3, 3, generator=generator, dtype=torch.float64)
    unit = law.dist.scale * (scale.concentration / scale.rate).sqrt()
    f = law.mean + (chi[:, None, None]).sqrt() * unit * noise
    wanted = torch.softmax(f, -1)
    found = post.predict(x, rng=3).probs
    error = wanted.std(0) * (1 / 100_000 + 1 / 2000) ** 0.5
    assert float(((wanted.mean(0) - found).abs() / error).max()) < z_bound(9)


def test_leading_dims_of_the_inputs_are_kept():
    post = TestModel().posterior()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 3, 2)
    assert post.predict(x, rng=0).probs.shape == (2, 3, 3)
    assert post.predict(x, site="f").mean.shape == (2, 3, 3)
    flat = post.predict(x.reshape(6, 2), site="f").mean
    torch.testing.assert_close(post.predict(x, site="f").mean.reshape(6, 3), flat)


def test_several_fits_are_mixed():
    x, y = _data()
    for law in (InverseGamma(2.0, 2.0), PointMass(1.0), LogNormal(0.0, 1.0)):
        model = ScaleMixtureClassifier(_kernel(), law, 4, draws=400)
        post = pk.infer(model, (x, y), SVI(steps=5), rng=0, chains=2)
        scores = post.predict(x[:3], site="f")
        assert isinstance(scores, Mixture) and scores.mean.shape == (3, 3)
        one = post.source.guide.scores(post.source.params[0], model, post.context.data, x[:3])
        two = post.source.guide.scores(post.source.params[1], model, post.context.data, x[:3])
        torch.testing.assert_close(scores.mean, (one.mean + two.mean) / 2)
        assert post.predict(x[:3], rng=0).probs.shape == (3, 3)


def test_log_normal_scores_have_the_moments_of_the_mixture():
    post = TestLogNormalModel().posterior()
    x = _data()[0][:3]
    guide, params = post.source.guide, post.source.params[0]
    scores = guide.scores(params, post.model, post.context.data, x)
    found = post.predict(x, site="f")
    torch.testing.assert_close(found.mean, scores.mean)
    torch.testing.assert_close(found.variance, scores.variance * scores.scale.mean)


def test_weighted_draws_agree_with_the_fit():
    """Importance sampling with the fitted guide as proposal targets the model itself."""
    x, y = _data(6, 2)
    model = ScaleMixtureClassifier(
        _kernel(), InverseGamma(4.0, 4.0), 3, jitter=1e-2, learn=(), draws=20_000
    )
    sampler = SVI(steps=250, lr=0.1, decay=0.02, particles=16)
    fit = pk.infer(model, (x, y), sampler, rng=0)
    from probkit.inference.guides import Fixed

    proposal = Fixed(fit.source.guide, fit.source.params[0])
    exact = pk.infer(model, (x, y), ImportanceSampling(40_000), guide=proposal, rng=1)
    assert isinstance(exact.source, Draws)
    assert float(exact.log_evidence.value) > float(fit.log_evidence.value) - 0.02
    a, b = fit.predict(x, rng=0).probs, exact.predict(x, rng=0).probs
    assert float((a - b).abs().max()) < 0.05
    scores = exact.predict(x, site="f")
    assert isinstance(scores, Mixture)
    assert float((scores.mean - fit.predict(x, site="f").mean).abs().max()) < 0.3


def test_a_checkpoint_resumes_to_the_last_bit(tmp_path):
    x, y = _data(20)
    model = ScaleMixtureClassifier(_kernel(), inducing=4)
    sampler = SVI(steps=40, chunk=10, batch_size=6)

    def stop(info):
        return info.step >= 2

    whole = pk.infer(model, (x, y), sampler, rng=0)
    part = pk.infer(model, (x, y), sampler, rng=0, callbacks=[stop], checkpoint=tmp_path)
    assert part.attrs["complete"] is False
    resumed = pk.infer(model, (x, y), sampler, rng=0, checkpoint=tmp_path)
    for name, value in whole.source.params[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.source.params[0][name]), name


def test_a_loader_brings_its_own_batches():
    x, y = _data(20)
    model = ScaleMixtureClassifier(_kernel(), inducing=4)
    data = model.prepare((x, y))

    def factory(epoch, generator):
        for index in torch.randperm(20, generator=generator).split(10):
            yield Batch(data.rows(index), index, 2.0)

    loader = Loader(factory, units=20, example=data)
    post = pk.infer(model, loader, SVI(steps=20), rng=0)
    assert post.predict(x, rng=0).probs.shape == (20, 3)


def test_the_default_samplers():
    model = ScaleMixtureClassifier(_kernel())
    assert isinstance(model.sampler(), SVI) and model.sampler().batch_size == 100
    gaussian = ScaleMixtureClassifier(_kernel(), likelihood="gaussian")
    assert isinstance(gaussian.sampler(), Direct)


# --------------------------------------------------------------------------------- the pieces


def test_inducing_rows_are_stratified():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    chosen = stratified(labels, 15)
    assert torch.bincount(labels[chosen]).tolist() == [6, 3, 6]
    assert len(chosen.unique()) == 15
    assert stratified(labels, 73).tolist() == list(range(73))
    assert torch.bincount(labels[stratified(labels, 2)], minlength=3).sum() == 2


def test_given_inducing_inputs_are_used():
    x, y = _data()
    given = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    model = ScaleMixtureClassifier(_kernel(), inducing=given)
    assert torch.equal(model.prepare((x, y)).inducing, given.double())


def test_largest_of_normal_scores():
    loc = torch.tensor([[0.3, -0.2, 0.9], [50.0, 0.0, -3.0]], dtype=torch.float64)
    law = torch.distributions.Normal(loc, torch.full_like(loc, 0.7))
    probs = largest_score(Analytic(law))
    draws = loc + 0.7 * torch.randn(
        400_000, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    wins = torch.nn.functional.one_hot(draws.argmax(-1), 3).double().mean(0)
    error = (probs * (1 - probs) / 400_000).sqrt() + 1e-12
    assert float(((wins - probs).abs() / error).max()) < z_bound(6)
    two = largest_score(Analytic(torch.distributions.Normal(loc[:1, :2], 0.7)))
    exact = torch.special.ndtr(torch.tensor(0.5 / (0.7 * 2**0.5), dtype=torch.float64))
    assert float(two[0, 0]) == pytest.approx(float(exact), abs=1e-12)


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x, y: (x, y - 1), DataError, "whole numbers from 0 to 1, got -1 at row 0"),
        (lambda x, y: (x, y * 0), DataError, "at least two classes, got 1"),
        (lambda x, y: (x, y + 0.5), DataError, "expected whole numbers, got 0.5 at row 0"),
        (lambda x, y: (x, y.double().log()), DataError, "labels must be finite, got -inf at row 0"),
        (lambda x, y: (x, y[:-1]), ShapeError, r"equally many rows, got \(12, 2\) and \(11,\)"),
        (lambda x, y: (x[:0], y[:0]), DataError, "at least one row, got none"),
        (lambda x, y: (x[:, :0], y), ShapeError, "at least one feature column"),
        (lambda x, y: (x.half(), y), DataError, "float64 or float32, got torch.float16"),
        (lambda x, y: (x / 0, y), DataError, "X must be finite, got .* at row 0, column 0"),
        (lambda x, y: x, DataError, r"expected data \(X"),
        (lambda x, y: (x[:, 0], y), ShapeError, r"use X\[:, None\]"),
    ],
)
def test_bad_data_is_named(change, error, text):
    with pytest.raises(error, match=text):
        pk.infer(ScaleMixtureClassifier(_kernel()), change(*_data()), rng=0)


def test_labels_beyond_the_classes_are_named():
    x, y = _data()
    with pytest.raises(DataError, match="from 0 to 1, got 2 at row 2; .*pass classes="):
        ScaleMixtureClassifier(_kernel(), classes=2).prepare((x, y))
    assert ScaleMixtureClassifier(_kernel(), classes=5).prepare((x, y)).classes == 5
    assert ScaleMixtureClassifier(_kernel(), classes=2).prepare((x, y * 0)).classes == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"inducing": 0}, "inducing: expected a whole number >= 1, got 0"),
        ({"covariance": "low"}, "covariance: expected 'full' or 'diag', got 'low'"),
        ({"likelihood": "probit"}, "likelihood: expected 'categorical' or 'gaussian'"),
        ({"jitter": 0.0}, "jitter: expected a finite number > 0, got 0.0"),
        ({"noise_var": -1.0}, "noise_var: expected a finite number > 0, got -1.0"),
        ({"draws": 0}, "draws: expected a whole number >= 1, got 0"),
        ({"classes": 1}, "classes: expected a whole number >= 2, got 1"),
        ({"learn": ("w",)}, "learn: expected names out of inducing_inputs, kernel.w_std"),
        (
            {"learn": ("inducing_inputs",), "likelihood": "gaussian"},
            "learn: expected names out of kernel.w_std",
        ),
        (
            {"scale": torch.distributions.Uniform(torch.tensor(0.5), torch.tensor(2.0))},
            r"scale: expected a law on all of \(0, inf\), got Uniform on \(0.5, 2\)",
        ),
        ({"scale": InverseGamma(torch.ones(3), 1.0)}, r"one law for all classes, got .*\(3,\)"),
        ({"scale": 2.0}, "a scale law must be a distribution"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(DataError, match=text):
        ScaleMixtureClassifier(_kernel(), **options)
    with pytest.raises(DataError, match="kernel: expected a GPyTorch kernel"):
        ScaleMixtureClassifier(None)


def test_bad_predictions_are_named():
    post = TestModel().posterior()
    x = _data()[0]
    with pytest.raises(ShapeError, match="expected 2 feature columns as in training, got 1"):
        post.predict(x[:, :1], rng=0)
    with pytest.raises(DataError, match="prediction of labels draws random numbers"):
        post.predict(x)
    with pytest.raises(DataError, match=r"expected None \(labels\) or 'f' \(scores\), got 'y'"):
        post.predict(x, site="y", rng=0)
    with pytest.raises(CapabilityError, match="leave joint= out"):
        post.predict(x, joint=True, rng=0)
    with pytest.raises(CapabilityError, match="leave groups= out"):
        post.predict(x, groups={"row": [1]}, rng=0)


def test_what_a_likelihood_cannot_do_is_refused():
    with pytest.raises(CapabilityError, match="ScaleMixtureClassifier lacks condition.*SVI"):
        pk.infer(ScaleMixtureClassifier(_kernel()), _data(), Direct(), rng=0)
    gaussian = ScaleMixtureClassifier(_kernel(), likelihood="gaussian")
    with pytest.raises(CapabilityError, match="lacks plate_size, minibatch"):
        pk.infer(gaussian, _data(), SVI(batch_size=5), rng=0)
