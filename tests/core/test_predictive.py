"""The three forms of a predictive against brute force."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from support.models import ConjugateNormal, normal_data
from torch.distributions import Categorical, Independent, MultivariateNormal, Normal, Poisson

from probkit.distributions import MultivariateStudentT
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.model import Model
from probkit.posterior import Context, Posterior
from probkit.predictive import Analytic, Empirical, Mixture, Predictive
from probkit.sources import Draws

FLOATS = st.floats(-100, 100, allow_subnormal=False).map(lambda v: round(v, 6))
LEVELS = st.floats(0.01, 0.99)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def weighted_values(draw):
    values = draw(hnp.arrays(float, st.integers(1, 12), elements=FLOATS))
    weights = draw(hnp.arrays(float, len(values), elements=st.floats(0.01, 1.0)))
    return values, weights / weights.sum()


# ------------------------------------------------------------------------------ empirical


@settings(max_examples=60, deadline=None)
@given(weighted_values(), LEVELS)
def test_weighted_quantiles_invert_the_weighted_cdf(sample, level):
    values, weights = sample
    found = Empirical(torch.tensor(values), torch.tensor(np.log(weights))).quantile(level).item()
    # By definition: the smallest draw at which the mass at or below reaches the level.
    mass = {v: weights[values <= v].sum() for v in sorted(set(values))}
    allowed = [
        next((v for v, m in mass.items() if m >= level + slack), max(values))
        for slack in (-1e-12, 0.0, 1e-12)
    ]
    assert found in allowed


@settings(max_examples=60, deadline=None)
@given(weighted_values())
def test_weighted_moments_and_cdf(sample):
    values, weights = sample
    law = Empirical(torch.tensor(values), torch.tensor(np.log(weights)))
    mean = np.average(values, weights=weights)
    assert law.mean.item() == pytest.approx(mean, abs=1e-9)
    variance = np.average((values - mean) ** 2, weights=weights)
    assert law.variance.item() == pytest.approx(variance, abs=1e-6)
    at = values[0]
    assert law.cdf(at).item() == pytest.approx(weights[values <= at].sum())


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(float, st.tuples(st.integers(1, 9), st.just(3)), elements=FLOATS), LEVELS)
def test_equal_weights_give_the_linear_rule(values, level):
    law = Empirical(torch.tensor(values))
    np.testing.assert_allclose(law.quantile(level), np.quantile(values, level, axis=0), atol=1e-9)
    found = law.quantile([[0.25, 0.5], [0.75, level]])
    expected = np.quantile(values, [[0.25, 0.5], [0.75, level]], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_draw_without_weight_moves_nothing():
    law = Empirical(double(-1e6, 1.0, 2.0), double(1e-300, 0.5, 0.5).log())
    assert law.quantile([0.05, 0.45, 0.95]).tolist() == [1.0, 1.0, 2.0]


def test_each_entry_has_its_own_order():
    values = double([3.0, 1.0], [1.0, 3.0], [2.0, 2.0])
    law = Empirical(values, double(0.6, 0.3, 0.1).log())
    assert law.quantile(0.35).tolist() == [2.0, 1.0]
    assert law.quantile(0.71).tolist() == [3.0, 3.0]


def test_more_draws_than_torch_quantile_takes():
    values = torch.arange(2**24 + 16, dtype=torch.float32)
    assert Empirical(values).quantile(0.5).item() == pytest.approx((2**24 + 15) / 2, rel=1e-6)


def test_classes_and_frequencies():
    law = Empirical(torch.tensor([[0, 2], [1, 2], [1, 0]]), double(0.5, 0.25, 0.25).log())
    torch.testing.assert_close(law.probs, double([0.5, 0.5, 0.0], [0.25, 0.0, 0.75]))
    torch.testing.assert_close(law.log_prob(torch.tensor([1, 0])).exp(), double(0.5, 0.25))


def test_empirical_sampling_follows_the_weights():
    weights = double(0.1, 0.2, 0.7)
    law = Empirical(torch.tensor([0, 1, 2]), weights.log())
    counts = torch.bincount(law.sample(6000, rng=0), minlength=3)
    assert scipy.stats.chisquare(counts, 6000 * weights).pvalue > 1e-3
    assert Empirical(["a", "b"], double(0.0, 1.0).log()).sample(3, rng=0) == ["b", "b", "b"]


def test_what_draws_cannot_tell():
    real, objects = Empirical(double(1.0, 2.0)), Empirical(["a"])
    with pytest.raises(CapabilityError, match="draws of real numbers have no density"):
        real.log_prob(double(1.0))
    with pytest.raises(CapabilityError, match="probs exist for categorical predictives only"):
        _ = real.probs
    with pytest.raises(CapabilityError, match="holds objects, not numbers; use sample"):
        _ = objects.mean
    with pytest.raises(ShapeError, match="expected at least one draw"):
        Empirical(torch.zeros(0, 2))
    with pytest.raises(ShapeError, match=r"expected log_weights \[draw=2\], got \(3,\)"):
        Empirical(double(1.0, 2.0), torch.zeros(3))


# ------------------------------------------------------------------------------ analytic


def test_analytic_values_are_those_of_scipy():
    loc, scale = double(0.0, 1.0, -2.0), double(1.0, 0.5, 3.0)
    law, exact = Analytic(Normal(loc, scale)), scipy.stats.norm(loc.numpy(), scale.numpy())
    np.testing.assert_allclose(law.mean, exact.mean())
    np.testing.assert_allclose(law.variance, exact.var())
    np.testing.assert_allclose(law.cdf(0.3), exact.cdf(0.3))
    np.testing.assert_allclose(law.log_prob(double(0.1, 0.2, 0.3)), exact.logpdf([0.1, 0.2, 0.3]))
    levels = [[0.1, 0.5], [0.8, 0.9]]
    expected = np.stack([[exact.ppf(level) for level in row] for row in levels])
    np.testing.assert_allclose(law.quantile(levels), expected, atol=1e-12)


def test_a_scalar_predictive():
    assert Analytic(Normal(double(1.0)[0], 2.0)).quantile(0.5).shape == ()
    assert Mixture(Normal(double(0.0, 1.0), 1.0), torch.zeros(2)).quantile([0.5]).shape == (1,)
    assert Empirical(double(1.0, 2.0, 3.0)).quantile([0.5, 0.6]).tolist() == [2.0, 2.2]


def test_joint_laws_answer_for_each_entry():
    covariance = double([2.0, 1.9], [1.9, 2.0])
    joint = Analytic(MultivariateNormal(double(0.0, 1.0), covariance))
    alone = Normal(double(0.0, 1.0), double(2.0, 2.0).sqrt())
    torch.testing.assert_close(joint.quantile(0.3), alone.icdf(double(0.3)))
    torch.testing.assert_close(joint.cdf(0.7), alone.cdf(double(0.7)))
    assert joint.log_prob(double(0.0, 0.0)).shape == ()
    draws = joint.sample(4000, rng=0)
    # Standard error of a correlation r: (1 - r^2) / sqrt(n).
    assert abs(torch.corrcoef(draws.T)[0, 1] - 0.95) < 4 * (1 - 0.95**2) / 4000**0.5


def test_class_probabilities():
    probs = double([0.2, 0.8], [0.5, 0.5])
    torch.testing.assert_close(Analytic(Categorical(probs)).probs, probs)
    with pytest.raises(CapabilityError, match="probs exist for categorical"):
        _ = Analytic(Normal(0.0, 1.0)).probs


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, float("nan")])
def test_levels_outside_the_unit_interval(level):
    for law in (
        Analytic(Normal(0.0, 1.0)),
        Mixture(Normal(torch.zeros(2), 1.0), torch.zeros(2)),
        Empirical(double(1.0, 2.0)),
    ):
        with pytest.raises(DataError, match="expected levels strictly between 0 and 1"):
            law.quantile(level)


# ------------------------------------------------------------------------------ mixture


@settings(max_examples=25, deadline=None)
@given(weighted_values(), LEVELS)
def test_mixtures_against_the_sum_over_components(sample, level):
    loc, weights = sample
    law = Mixture(Normal(torch.tensor(loc), 1.5), torch.tensor(np.log(weights)) + 3.0)
    parts = scipy.stats.norm(loc, 1.5)
    assert law.mean.item() == pytest.approx((weights * loc).sum(), abs=1e-9)
    second = (weights * (1.5**2 + loc**2)).sum()
    variance = second - (weights * loc).sum() ** 2
    assert law.variance.item() == pytest.approx(variance, rel=1e-6)
    assert law.cdf(0.4).item() == pytest.approx((weights * parts.cdf(0.4)).sum(), abs=1e-12)
    density = (weights * parts.pdf(0.4)).sum()
    assert law.log_prob(double(0.4)[0]).exp().item() == pytest.approx(density, rel=1e-9, abs=1e-300)
    x = law.quantile(level).item()
    assert (weights * parts.cdf(x)).sum() == pytest.approx(level, abs=1e-9)


def test_mixture_entries_keep_their_shape():
    loc = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    law = Mixture(Normal(loc, 1.0), torch.zeros(3))
    assert (
        law.mean.shape == law.cdf(0.0).shape == law.log_prob(torch.zeros(4).double()).shape == (4,)
    )
    assert law.quantile([0.1, 0.9]).shape == (2, 4)
    assert law.sample(7, rng=0).shape == (7, 4)
    joint = Mixture(Independent(Normal(loc, 1.0), 1), torch.zeros(3))
    assert joint.log_prob(torch.zeros(4).double()).shape == ()
    assert joint.quantile([0.1, 0.9]).shape == (2, 4)


def test_entries_of_one_draw_share_their_component():
    law = Mixture(Normal(double([0.0, 0.0], [100.0, 100.0]), 1.0), double(0.3, 0.7).log())
    draws = law.sample(2000, rng=1)
    high = draws > 50
    assert torch.equal(high[:, 0], high[:, 1])
    assert abs(high[:, 0].double().mean().item() - 0.7) < 4 * (0.21 / 2000) ** 0.5


def test_mixtures_of_student_t_sample_their_own_law():
    law = Mixture(
        MultivariateStudentT(double(4.0, 9.0), double([0.0], [2.0]), torch.eye(1).double()),
        double(0.4, 0.6).log(),
    )
    draws = law.sample(4000, rng=2)[:, 0]
    levels = law.cdf(draws[:, None])[:, 0]
    assert scipy.stats.kstest(levels, "uniform").pvalue > 1e-3


def test_mixture_probs_and_bad_weights():
    probs = double([[0.2, 0.8]], [[0.6, 0.4]])
    law = Mixture(Categorical(probs), double(0.25, 0.75).log())
    torch.testing.assert_close(law.probs, double([0.5, 0.5]))
    with pytest.raises(ShapeError, match=r"expected components \[component, \*obs\]"):
        Mixture(Normal(torch.zeros(3), 1.0), torch.zeros(2))
    with pytest.raises(DataError):
        Mixture(Normal(torch.zeros(2), 1.0), torch.full((2,), -torch.inf))


# ------------------------------------------------------------------------------ all of them


ALL = {
    "analytic": Analytic(Poisson(double(3.0, 4.0))),
    "mixture": Mixture(Normal(double([0.0, 1.0], [2.0, 3.0]), 1.0), torch.zeros(2)),
    "empirical": Empirical(double([0.0, 1.0], [2.0, 3.0])),
}


@pytest.mark.parametrize("name", ALL)
def test_every_form_keeps_the_protocol_and_its_stream(name):
    law = ALL[name]
    names = [name for name in vars(Predictive) if not name.startswith("_")]
    assert {"mean", "quantile", "sample"} <= set(names) <= set(dir(type(law)))
    assert law.sample(5, rng=3).shape == (5, 2)
    assert torch.equal(law.sample(5, rng=3), law.sample(5, rng=3))
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(law.sample(50, rng=generator), law.sample(50, rng=generator))


# ------------------------------------------------------------------------------ by simulation


class Simulated(ConjugateNormal):
    """The conjugate model, its predictions left to simulation."""

    predict = Model.predict


def test_predictions_by_simulation_have_the_right_moments():
    data = normal_data()
    exact = ConjugateNormal()
    mean, sd = exact.moments(data)
    post = Posterior(exact.condition(data).source, Simulated(), Context(data))
    law = post.predict(3, rng=0)
    assert law.values.shape == (1000, 3)
    total = (sd**2 + 1) ** 0.5
    assert bool(((law.mean - mean).abs() < 4 * total / 1000**0.5).all())
    assert bool(((law.variance / total**2 - 1).abs() < 4 * (2 / 1000) ** 0.5).all())
    with pytest.raises(DataError, match="this prediction draws random numbers"):
        post.predict(3)
    with pytest.raises(CapabilityError, match="Simulated.predict has no site="):
        post.predict(3, site="mu", rng=0)
    with pytest.raises(CapabilityError, match="Simulated.predict has no groups="):
        post.predict(3, groups={"g": [1]}, rng=0)


def test_a_model_without_simulate():
    class Silent(Model):
        def sites(self, data):
            return {}

    post = Posterior(Draws({"a": torch.zeros(1, 1)}), Silent())
    with pytest.raises(CapabilityError, match="predict needs simulate.*Silent lacks it"):
        post.predict(1, rng=0)


@pytest.mark.parametrize("shape", [(3, 1), (2,), (1, 3, 1), (4, 2)])
def test_values_that_would_broadcast_the_prediction_are_refused(shape):
    normal = torch.distributions.Normal(torch.zeros(3), 1.0)
    pair = torch.distributions.Normal(torch.zeros(2, 3), 1.0)
    for law in (Analytic(normal), Mixture(pair, torch.zeros(2))):
        with pytest.raises(ShapeError, match=r"log_prob: expected y .* obs = \(3,\), got"):
            law.log_prob(torch.zeros(shape))
        assert law.log_prob(torch.zeros(5, 3)).shape == (5, 3)
        assert law.log_prob(torch.zeros(())).shape == (3,)
