"""One scale for each output or each group: exact products of processes."""

from __future__ import annotations

import gpytorch
import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats
import torch

import probkit as pk
from probkit.inference import MAP, Direct, ImportanceSampling
from probkit.kernels import NNGPKernel
from probkit.models import BurrXII, HalfCauchy, InverseGamma, PointMass, ScaleMixtureNNGP
from probkit.testing import ModelConformance

LAWS = [InverseGamma(2.0, 1.5), PointMass(1.3), BurrXII(2.0, 1.0), HalfCauchy(1.2)]
NOISES = ["scale", "outside"]
LABELS = ["b", "a", "b", "b", "a", "c", "b"]


def _ids(value: object) -> str:
    return type(value).__name__ if not isinstance(value, str) else value


def _kernel() -> NNGPKernel:
    return NNGPKernel(depth=2, w_std=1.5, b_std=0.3, last_w_std=1.2)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(7, generator=generator, dtype=torch.float64) * 2
    return x, y


def _new() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(5, 2, generator=generator, dtype=torch.float64)


class TestOutputModel(ModelConformance):
    latents = ("f",)

    def problem(self):
        x, y = _data()
        model = ScaleMixtureNNGP(_kernel(), scale=BurrXII(2.0, 1.0), scale_per="output")
        return model, (x, torch.stack([y, 3 * y.flip(0) + 1], 1)), _new()


class TestGroupModel(ModelConformance):
    latents = ("f",)

    def problem(self):
        x, y = _data()
        model = ScaleMixtureNNGP(_kernel(), scale_per="group", standardize=True)
        return model, (x, y, torch.tensor([1, 0, 1, 1, 0, 5, 1])), _new()

    def predictive(self, post=None, **options):
        return super().predictive(post, groups={"group": [0, 1, 7, 0, 7]}, **options)


# -------------------------------------------------------------------------------- by outputs


@pytest.mark.parametrize("noise_in", NOISES)
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_outputs_are_separate_processes(law, noise_in):
    x, y = _data()
    both = torch.stack([y, 4 * y.flip(0)], 1)
    whole = pk.infer(
        ScaleMixtureNNGP(_kernel(), law, noise_in=noise_in, scale_per="output"), (x, both), rng=0
    )
    single = ScaleMixtureNNGP(_kernel(), law, noise_in=noise_in)
    parts = [pk.infer(single, (x, column), rng=0) for column in both.T]
    total = sum(float(part.log_evidence.value) for part in parts)
    assert float(whole.log_evidence.value) == pytest.approx(total, abs=1e-9)
    target = _new() + 0.5
    for joint in (False, True):
        prediction = whole.predict(_new(), joint=joint)
        predictions = [part.predict(_new(), joint=joint) for part in parts]
        for name in ("mean", "variance"):
            expected = torch.stack([getattr(p, name) for p in predictions], 1)
            torch.testing.assert_close(getattr(prediction, name), expected)
        expected = torch.stack([p.quantile([0.05, 0.9]) for p in predictions], -1)
        torch.testing.assert_close(prediction.quantile([0.05, 0.9]), expected)
        expected = torch.stack([p.cdf(target[:, k]) for k, p in enumerate(predictions)], 1)
        torch.testing.assert_close(prediction.cdf(target), expected)
        densities = torch.stack([p.log_prob(target[:, k]) for k, p in enumerate(predictions)], -1)
        expected = densities.sum() if joint else densities
        torch.testing.assert_close(prediction.log_prob(target), expected)


def test_a_shared_scale_is_another_model():
    """The two differ, so the tests above cannot pass by ignoring ``scale_per``."""
    x, y = _data()
    both = torch.stack([y, 40 * y.flip(0)], 1)
    one, each = (
        pk.infer(ScaleMixtureNNGP(_kernel(), scale_per=per), (x, both), rng=0)
        for per in (None, "output")
    )
    assert float(each.log_evidence.value) > float(one.log_evidence.value) + 5
    spread = each.analytic["scale_var"].mean
    assert spread.shape == (2,)
    assert float(spread[1] / spread[0]) > 100
    assert one.analytic["scale_var"].mean.shape == ()


def test_evidence_by_brute_force():
    """Integrate each output's scale with SciPy, on densities of its own."""
    x, y = _data()
    both = np.stack([y.numpy(), 4 * y.flip(0).numpy()], 1)
    kernel, noise = _kernel(), 0.1
    gram = kernel(x).to_dense().detach().numpy()

    def evidence(column, noise_in):
        def density(u):
            v = np.exp(u)
            cov = v * gram + (v if noise_in == "scale" else 1.0) * noise * np.eye(7)
            likelihood = scipy.stats.multivariate_normal(cov=cov).pdf(column)
            return likelihood * scipy.stats.burr12(2.0, 1.0).pdf(v) * v

        return np.log(scipy.integrate.quad(density, -12, 12, points=[0.0], epsabs=0, limit=200)[0])

    for noise_in in NOISES:
        expected = sum(evidence(column, noise_in) for column in both.T)
        model = ScaleMixtureNNGP(
            kernel, BurrXII(2.0, 1.0), noise, noise_in=noise_in, scale_per="output"
        )
        found = float(pk.infer(model, (x, both), rng=0).log_evidence.value)
        assert found == pytest.approx(expected, abs=1e-7)


def test_joint_draws_of_outputs_have_their_own_scales():
    """Squares of two outputs far from the data are uncorrelated; within one output they are not."""
    kernel = gpytorch.kernels.RBFKernel().double()
    x = torch.zeros(1, 1, dtype=torch.float64)
    far = torch.tensor([[40.0], [80.0]], dtype=torch.float64)
    model = ScaleMixtureNNGP(kernel, InverseGamma(4.0, 4.0), scale_per="output")
    post = pk.infer(model, (x, torch.ones(1, 2, dtype=torch.float64)), rng=0)
    squares = post.predict(far, joint=True).sample(40_000, rng=0).square()
    centred = squares - squares.mean(0)
    within = centred[:, 0, 0] * centred[:, 1, 0]
    across = centred[:, 0, 0] * centred[:, 0, 1]
    error = float(across.std()) / len(across) ** 0.5
    assert abs(float(across.mean())) < 4 * error
    assert float(within.mean()) > 8 * float(within.std()) / len(within) ** 0.5


# --------------------------------------------------------------------------------- by groups


@pytest.mark.parametrize("noise_in", NOISES)
@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_groups_are_separate_processes(law, outputs, noise_in):
    x, y = _data()
    y = y if outputs is None else torch.stack([y, 4 * y.flip(0)], 1)
    options = {"noise_in": noise_in}
    whole = pk.infer(
        ScaleMixtureNNGP(_kernel(), law, scale_per="group", **options), (x, y, LABELS), rng=0
    )
    single = ScaleMixtureNNGP(_kernel(), law, **options)
    rows = {g: torch.tensor([i for i, name in enumerate(LABELS) if name == g]) for g in "abc"}
    parts = {g: pk.infer(single, (x[i], y[i]), rng=0) for g, i in rows.items()}
    total = sum(float(part.log_evidence.value) for part in parts.values())
    assert float(whole.log_evidence.value) == pytest.approx(total, abs=1e-8)
    asked = ["a", "c", "a", "b", "c"]
    target = _new()[:, :1] * 2 if outputs else _new()[:, 0] * 2
    target = target.expand(5, outputs) if outputs else target
    for joint in (False, True):
        prediction = whole.predict(_new(), joint=joint, groups={"group": asked})
        density = 0.0
        for g, part in parts.items():
            at = torch.tensor([i for i, name in enumerate(asked) if name == g])
            expected = part.predict(_new()[at], joint=joint)
            torch.testing.assert_close(prediction.mean[at], expected.mean)
            torch.testing.assert_close(prediction.variance[at], expected.variance)
            torch.testing.assert_close(prediction.quantile(0.9)[at], expected.quantile(0.9))
            density = density + expected.log_prob(target[at]).sum()
        torch.testing.assert_close(prediction.log_prob(target).sum(), density)


@pytest.mark.parametrize("noise_in", NOISES)
@pytest.mark.parametrize("law", LAWS, ids=_ids)
def test_a_new_group_is_drawn_from_the_prior(law, noise_in):
    """Its prediction does not depend on the data: compare with the law of sigma (g + e) by hand."""
    x, y = _data()
    model = ScaleMixtureNNGP(_kernel(), law, 0.1, noise_in=noise_in, scale_per="group")
    prediction = pk.infer(model, (x, y, LABELS), rng=0).predict(
        _new(), groups={"group": ["z", "a", "z", "y", "a"]}
    )
    at = [0, 2, 3]
    prior = _kernel()(_new()[at]).to_dense().diagonal().detach()
    u = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
    scale = torch.tensor([1.3]).double() if isinstance(law, PointMass) else u.exp()
    weight = (
        torch.ones(1) if isinstance(law, PointMass) else (law.log_prob(scale) + u).exp() * 0.002
    )
    noise = scale * 0.1 if noise_in == "scale" else torch.full_like(scale, 0.1)
    sd = (scale[:, None] * prior + noise[:, None]).sqrt()
    target = torch.tensor([0.3, -2.0, 1.0]).double()
    density = torch.distributions.Normal(torch.zeros(3).double(), sd).log_prob(target).exp()
    expected = (weight[:, None].double() * density).sum(0)
    value = torch.zeros(5).double()
    value[at] = target
    torch.testing.assert_close(prediction.mean[at], torch.zeros(3).double())
    # The trapezoid rule of 0.002 on smooth densities is exact but for its ends at exp(+-40).
    found = prediction.log_prob(value).exp()[at]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_new_groups_are_independent_of_each_other_and_rows_of_one_are_not():
    kernel = gpytorch.kernels.RBFKernel().double()
    model = ScaleMixtureNNGP(kernel, InverseGamma(3.0, 3.0), scale_per="group")
    x = torch.zeros(2, 1, dtype=torch.float64)
    post = pk.infer(model, (x, torch.ones(2, dtype=torch.float64), ["a", "b"]), rng=0)
    at = torch.tensor([[0.0], [0.0], [0.1]], dtype=torch.float64)
    draws = post.predict(at, joint=True, groups={"group": ["y", "z", "z"]}).sample(20_000, rng=0)
    products = draws[:, :1] * draws[:, 1:]
    same = draws[:, 1] * draws[:, 2]
    assert bool((products.mean(0).abs() < 4 * products.std(0) / 20_000**0.5).all())
    assert float(same.mean()) > 8 * float(same.std()) / 20_000**0.5


def test_labels_may_be_numbers_arrays_or_strings_and_become_coords():
    x, y = _data()
    model = ScaleMixtureNNGP(_kernel(), scale_per="group")
    codes = np.array([4, 2, 4, 4, 2, 9, 4])
    asked = {"group": [2, 9, 2, 4, 9]}
    numbers = pk.infer(model, (x, y, codes), rng=0)
    names = pk.infer(model, (x, y, LABELS), rng=0)
    found = names.predict(_new(), groups={"group": np.array(["a", "c", "a", "b", "c"])}).mean
    assert torch.equal(numbers.predict(_new(), groups=asked).mean, found)
    series = pd.Series(["a", "c", "a", "b", "c"])
    assert torch.equal(names.predict(_new(), groups={"group": series}).mean, found)
    assert list(names.context.coords["group"]) == ["b", "a", "c"]
    summary = names.summary()
    assert {"scale_var[b]", "scale_var[a]", "scale_var[c]"} <= set(summary.index)


def test_update_adds_rows_to_old_and_new_groups():
    x, y = _data()
    model = ScaleMixtureNNGP(_kernel(), scale_per="group")
    first = pk.infer(model, (x[:4], y[:4], LABELS[:4]), rng=0)
    updated = first.update((x[4:], y[4:], LABELS[4:]), rng=0)
    whole = pk.infer(model, (x, y, LABELS), rng=0)
    asked = {"group": ["a", "b", "c", "c", "z"]}
    torch.testing.assert_close(
        updated.predict(_new(), groups=asked).variance, whole.predict(_new(), groups=asked).variance
    )
    torch.testing.assert_close(updated.log_evidence.value, whole.log_evidence.value)
    assert list(updated.context.coords["group"]) == ["b", "a", "c"]


# -------------------------------------------------------------------- samplers and mixtures


@pytest.mark.parametrize("per", ["output", "group"])
@pytest.mark.parametrize("noise_in", NOISES)
def test_hyper_draws_are_mixed_over_whole_blocks(per, noise_in):
    """Parts are independent given each draw, so the joint density is a sum of products."""
    x, y = _data()
    data = (x, torch.stack([y, 4 * y.flip(0)], 1)) if per == "output" else (x, y, LABELS)
    model = ScaleMixtureNNGP(
        _kernel(), BurrXII(2.0, 1.0), noise_in=noise_in, scale_per=per, learn=("kernel.w_std",)
    )
    from probkit.inference.direct import condition_on_draws
    from probkit.posterior import make_posterior
    from probkit.sampler import Problem
    from probkit.sources import Draws

    problem = Problem(model, model.prepare(data))
    hyper = {"kernel.w_std": torch.tensor([[1.2, 1.6], [2.0, 1.1]]).double()}
    log_weights = torch.tensor([[0.2, 0.3], [0.4, 0.1]]).double().log()
    source = Draws(hyper, log_weights)
    post = condition_on_draws(problem, make_posterior(problem, source), source)
    options = {} if per == "output" else {"groups": {"group": ["a", "z", "b", "a", "c"]}}
    target = _new() if per == "output" else _new()[:, 0]
    singles = [
        pk.infer(model, data, Direct(hyper={"kernel.w_std": value}), rng=0)
        for value in hyper["kernel.w_std"].flatten()
    ]
    weights = log_weights.flatten().exp()
    for joint in (False, True):
        mixture = post.predict(_new(), joint=joint, **options)
        parts = [single.predict(_new(), joint=joint, **options) for single in singles]
        density = sum(w * p.log_prob(target).exp() for w, p in zip(weights, parts, strict=True))
        torch.testing.assert_close(mixture.log_prob(target).exp(), density)
        mean = sum(w * p.mean for w, p in zip(weights, parts, strict=True))
        torch.testing.assert_close(mixture.mean, mean)
        assert mixture.sample(6, rng=0).shape == (6, *mean.shape)
        level = mixture.cdf(mixture.quantile(0.3))
        torch.testing.assert_close(level, torch.full_like(mean, 0.3), rtol=0, atol=1e-6)
    if per == "output":
        assert post.sample(5, rng=0)["scale_var"].shape == (5, 2)


@pytest.mark.parametrize("per", ["output", "group"])
def test_importance_sampling_of_several_scales(per):
    x, y = _data()
    data = (x, torch.stack([y, 4 * y.flip(0)], 1)) if per == "output" else (x, y, LABELS)
    model = ScaleMixtureNNGP(_kernel(), BurrXII(2.0, 1.0), scale_per=per)
    exact = float(pk.infer(model, data, rng=0).log_evidence.value)
    post = pk.infer(model, data, ImportanceSampling(20_000), rng=0)
    weights = post.log_weights.flatten()
    error = float((weights - weights.logsumexp(0)).exp().std()) * len(weights) ** 0.5
    assert abs(float(post.log_evidence.value) - exact) < 4 * error
    assert post.draws["scale_var"].shape == (1, 20_000, 2 if per == "output" else 3)


def test_sampled_scales_predict_as_the_closed_form():
    x, y = _data()
    model = ScaleMixtureNNGP(_kernel(), InverseGamma(3.0, 3.0), scale_per="group")
    exact = pk.infer(model, (x, y, LABELS), rng=0)
    sampled = pk.infer(model, (x, y, LABELS), ImportanceSampling(4000), rng=0)
    asked = {"group": ["a", "b", "c", "z", "b"]}
    torch.testing.assert_close(
        sampled.predict(_new(), groups=asked).mean, exact.predict(_new(), groups=asked).mean
    )
    ratio = (
        sampled.predict(_new(), groups=asked).variance
        / exact.predict(_new(), groups=asked).variance
    )
    # The means of 4000 weighted draws of sigma^2, whose law has three to seven degrees of freedom
    # a group: their standard errors are 1 to 4 %.
    assert bool(((ratio > 0.85) & (ratio < 1.17)).all()), ratio


def test_hyper_parameters_are_shared_and_fitted():
    """One optimum for all groups, of the sum of their evidences and the prior."""
    x = torch.linspace(-2, 2, 30, dtype=torch.float64)[:, None]
    labels = ["a", "b", "c"] * 10
    size = torch.tensor([0.3, 1.0, 5.0] * 10, dtype=torch.float64)
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = (x, size * ((2 * x[:, 0]).sin() + 0.2 * noise), labels)
    kernel = gpytorch.kernels.RBFKernel().double()
    model = ScaleMixtureNNGP(kernel, scale_per="group", learn=("kernel.lengthscale", "noise_var"))
    post = pk.infer(model, data, Direct(hyper=MAP(restarts=1)), rng=0)
    prepared = model.prepare(data)

    def objective(hyper):
        return (model.log_evidence(hyper, prepared) + model.log_hyperprior(hyper)).item()

    best = {name: value[0, 0] for name, value in post.draws.items()}
    assert objective(best) > objective(model.hyper_values(prepared)) + 0.01
    for name in best:
        for factor in (0.5, 2.0):
            assert objective({**best, name: best[name] * factor}) < objective(best)


# ---------------------------------------------------------------------------------- bad input


def test_bad_groups_are_named():
    x, y = _data()
    model = ScaleMixtureNNGP(_kernel(), scale_per="group")
    for data, error, text in [
        ((x, y), pk.DataError, r"expected data \(X .*groups \[row\]\), got 2 parts"),
        ((x, y, LABELS[:3]), pk.ShapeError, "groups: expected one label a row, 7, got 3"),
        ((x, y, "abababa"), pk.DataError, "groups: expected one label a row, got str"),
        ((x, y, y), pk.DataError, "expected integers or strings as labels, got .* at row 0"),
        ((x, y, [[1]] * 7), pk.DataError, "expected integers or strings as labels"),
    ]:
        with pytest.raises(error, match=text):
            pk.infer(model, data, rng=0)
    post = pk.infer(model, (x, y, LABELS), rng=0)
    with pytest.raises(pk.DataError, match=r'expected groups=\{"group": labels \[row\]\}'):
        post.predict(_new())
    with pytest.raises(pk.DataError, match=r"got \['site'\]"):
        post.predict(_new(), groups={"site": ["a"] * 5})
    with pytest.raises(pk.ShapeError, match=r"groups\['group'\]: expected one label a row, 5"):
        post.predict(_new(), groups={"group": ["a"]})
    with pytest.raises(pk.DataError, match="labels are for scale_per='group'"):
        pk.infer(ScaleMixtureNNGP(_kernel()), (x, y, LABELS), rng=0)
    with pytest.raises(pk.DataError, match="scale_per: expected None, 'output' or 'group'"):
        ScaleMixtureNNGP(_kernel(), scale_per="row")


def test_nothing_can_be_drawn_without_data():
    model = ScaleMixtureNNGP(_kernel(), scale_per="output")
    assert not hasattr(model, "sample_prior") and not hasattr(model, "simulate")
    assert hasattr(ScaleMixtureNNGP(_kernel()), "sample_prior")
