"""Remaining useful life: each estimator against what is known exactly, calibration, decisions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal

from probkit import infer
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import EM
from probkit.models.arphmm import ARPHMM, Sequences, SwitchingPrior, plausibility
from probkit.models.arphmm.rul import (
    ConformalLife,
    Failure,
    HealthIndicator,
    LifeRegression,
    TrailingFeatures,
    coverage_by_band,
    life_scores,
    phase_type_life,
    phm08_score,
    plan_maintenance,
    simulate_degradation,
    simulate_life,
)
from probkit.models.arphmm.rul.metrics import crps
from probkit.posterior import make_posterior
from probkit.predictive import Analytic, Empirical
from probkit.sampler import Problem
from probkit.sources import Draws


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


CHAIN = {
    "initial": tensor([1.0, 0.0, 0.0]),
    "transition": tensor([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]]),
    "weights": tensor([[[1.0]], [[0.5]], [[0.0]]]),
    "covariance": tensor([[[0.01]]] * 3),
}


def fixed(model, values, data):
    problem = Problem(model, model.prepare(data))
    draws = {name: value[None, None] for name, value in values.items()}
    return make_posterior(problem, Draws(draws), attrs={"point_estimate": True})


class TestEndState:
    def test_mean_is_that_of_the_fundamental_matrix(self):
        filtered = tensor([[0.7, 0.3, 0.0]])
        values = {name: value[None] for name, value in CHAIN.items()}
        law = phase_type_life(values, filtered, Failure(state=2, horizon=2000))
        q = CHAIN["transition"][:2, :2]
        steps = torch.linalg.solve(torch.eye(2).double() - q, torch.ones(2).double())
        expected = float(filtered[0, :2] @ steps)
        probs = law.probs
        found = float((probs * torch.arange(len(probs))).sum())
        assert abs(found - expected) < 1e-9
        assert abs(float(probs[1]) - 0.3 * 0.2) < 1e-12  # from state 1 straight into the end

    def test_predict_and_simulation_agree(self):
        failure = Failure(state=2, horizon=200)
        model = ARPHMM(3, 0, transition="left_right", prior=None, failure=failure)
        y = tensor([1.0, 1.05, 0.9, 0.52])
        post = fixed(model, CHAIN, y)
        exact = post.predict(y, site="rul")
        n = 20_000
        drawn = simulate_life(model, post, y, failure, paths=n, rng=0)
        h = torch.arange(201)
        mean = float((exact.probs * h).sum())
        variance = float((exact.probs * h.square()).sum()) - mean**2
        assert abs(float(drawn.mean) - mean) < 4 * math.sqrt(variance / n)
        for threshold in (2, 5, 10):
            p = float(exact.probs[: threshold + 1].sum())
            assert abs(float(drawn.cdf(float(threshold))) - p) < 4 * math.sqrt(p * (1 - p) / n)

    def test_a_failed_unit_has_no_life_left(self):
        values = {name: value[None] for name, value in CHAIN.items()}
        law = phase_type_life(values, tensor([[0.0, 0.0, 1.0]]), Failure(state=2))
        assert float(law.probs[0]) == 1.0


def test_a_level_is_reached_when_a_drift_reaches_it():
    """One state, a noisy drift of -0.1: the first passage through 0 from 1 takes about 10 steps."""
    values = {
        "initial": tensor([1.0]),
        "transition": tensor([[1.0]]),
        "weights": tensor([[[-0.1, 1.0]]]),
        "covariance": tensor([[[1e-6]]]),
    }
    model = ARPHMM(1, 1, prior=None, failure=Failure(level=0.0005, horizon=50))
    y = tensor([1.2, 1.1, 1.0])
    life = fixed(model, values, y).predict(y, site="rul", rng=0)
    assert float(life.quantile(0.05)) >= 9 and float(life.quantile(0.95)) <= 11
    short = ARPHMM(1, 1, prior=None, failure=Failure(level=0.0, horizon=4))
    assert bool((fixed(short, values, y).predict(y, site="rul", rng=0).values == 4.0).all())


def degrading(n, seed):
    """Units whose health stays near one, then falls to zero at an accelerating rate."""
    rng = np.random.default_rng(seed)
    units, lives = [], []
    for _ in range(n):
        total = int(rng.integers(60, 120))
        left = np.arange(total - 1, -1, -1)
        health = np.minimum(left, 40) / 40 + 0.08 * rng.standard_normal(total)
        units.append(torch.as_tensor(health))
        lives.append(torch.as_tensor(left.astype(float)))
    return units, lives


@pytest.fixture(scope="module")
def fitted():
    units, lives = degrading(40, 0)
    edges = tensor([10.0, 25.0, 40.0])
    labels = [
        plausibility.from_labels(3 - torch.bucketize(life, edges), 4, nonspecificity=0.1)
        for life in lives
    ]
    model = ARPHMM(4, 1, transition="left_right", prior=SwitchingPrior(scale=0.01))
    post = infer(model, Sequences(units, labels), EM(), rng=0)
    features = TrailingFeatures((1, 5, 15), age=False)
    return LifeRegression.fit(post, Sequences(units), lives, features=features, cap=50.0)


def cut(units, lives, seed):
    """Stop every unit at a random time; returns what was seen and what was left (capped)."""
    rng = np.random.default_rng(seed)
    times = [int(rng.integers(15, len(unit) - 1)) for unit in units]
    seen = [unit[: t + 1] for unit, t in zip(units, times, strict=True)]
    left = tensor([float(life[t]) for life, t in zip(lives, times, strict=True)])
    return Sequences(seen), left.clamp_max(50.0)


def test_life_regression_beats_knowing_nothing(fitted):
    units, lives = degrading(60, 1)
    seen, left = cut(units, lives, 2)
    predicted = fitted.predict(seen)
    rmse = life_scores(predicted.mean, left)["rmse"]
    assert rmse < 0.4 * float(left.std())
    times = [len(y) - 1 for y in seen.y]
    same = fitted.predict(Sequences(units), times=times)
    torch.testing.assert_close(same.mean, predicted.mean)  # later values do not matter


def test_calibration_covers_new_units(fitted):
    """Coverage of 90 % intervals over 300 new units lies within the binomial's 4 standard errors.

    The calibration set is random as well, so its share (Beta distributed) is added.
    """
    wrong = Analytic  # an overconfident law, to have something to correct

    def narrow(mixture):
        return wrong(Normal(mixture.mean, 0.3 * mixture.variance.sqrt()))

    calibration, known = cut(*degrading(99, 3), 4)
    new, truth = cut(*degrading(300, 5), 6)
    raw = narrow(fitted.predict(new))
    calibrated = ConformalLife.fit(narrow(fitted.predict(calibration)), known)(raw)
    low, high = calibrated.quantile([0.05, 0.95])
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    se = math.sqrt(0.09 / 300 + 0.09 / 100)
    assert abs(covered - 0.9) < 4 * se
    low, high = raw.quantile([0.05, 0.95])
    before = float(((low <= truth) & (truth <= high)).double().mean())
    assert before < 0.9 - 4 * se  # the check would have failed without calibration


class TestCalibratedLife:
    @pytest.fixture
    def calibrated(self):
        rng = torch.Generator().manual_seed(0)
        truth = 20 + 5 * torch.randn(200, generator=rng, dtype=torch.float64)
        claimed = Analytic(Normal(tensor([18.0]).expand(200), tensor([2.0]).expand(200)))
        return ConformalLife.fit(claimed, truth)(Analytic(Normal(tensor([18.0]), tensor([2.0]))))

    def test_quantiles_invert_the_cdf(self, calibrated):
        q = tensor([0.1, 0.35, 0.8])
        y = calibrated.quantile(q)[:, 0]
        torch.testing.assert_close(
            torch.stack([calibrated.cdf(v[None])[0] for v in y]), q, rtol=0, atol=1e-6
        )

    def test_density_is_the_slope_of_the_cdf(self, calibrated):
        y = calibrated.quantile(0.42)
        h = 1e-6
        slope = (calibrated.cdf(y + h) - calibrated.cdf(y - h)) / (2 * h)
        torch.testing.assert_close(calibrated.log_prob(y), slope.log(), rtol=1e-4, atol=1e-4)

    def test_moments_and_draws_agree(self, calibrated):
        drawn = calibrated.sample(4000, rng=0)
        se = float(drawn.std()) / math.sqrt(4000)
        assert abs(float(drawn.mean() - calibrated.mean[0])) < 4 * se
        law = stats.ecdf(drawn[:, 0].numpy()).cdf
        y = float(calibrated.quantile(0.3)[0])
        assert abs(law.evaluate(y) - 0.3) < 4 * math.sqrt(0.21 / 4000)

    def test_lives_are_never_negative(self):
        base = Analytic(Normal(tensor([1.0] * 20), tensor([5.0] * 20)))
        calibrated = ConformalLife.fit(base, torch.linspace(0, 9, 20).double())(base)
        assert float(calibrated.quantile(0.01).min()) == 0.0
        assert float(calibrated.cdf(-1.0).max()) == 0.0
        assert float(calibrated.sample(200, rng=0).min()) >= 0.0


class TestHealthIndicator:
    def test_it_recovers_a_hidden_wear(self):
        rng = torch.Generator().manual_seed(0)
        units = []
        for total in (80, 120, 100):
            left = torch.arange(total - 1, -1, -1).double()
            wear = 1 - left.clamp_max(60) / 60
            mix = tensor([2.0, -1.0, 0.0, 0.5])
            noise = 0.05 * torch.randn(total, 4, generator=rng, dtype=torch.float64)
            sensors = wear[:, None] * mix + noise + 100
            sensors[:, 2] = 7.0
            units.append(sensors)
        indicator = HealthIndicator.fit(units, cap=60)
        assert float(indicator.weights[3]) == 0.0
        health = indicator(units[1])
        truth = torch.arange(119, -1, -1).double().clamp_max(60) / 60
        assert float((health - truth).abs().max()) < 0.15

    def test_exponential_target_runs_from_one_to_zero(self):
        cycles = torch.arange(100).double()[:, None]
        found = HealthIndicator.fit(
            [torch.cat([cycles, cycles**2, cycles**3], 1)], target="exponential"
        )
        health = found(torch.cat([cycles, cycles**2, cycles**3], 1))
        assert float(health[0]) > 0.9 and abs(float(health[-1])) < 0.1

    @pytest.mark.parametrize(
        ("sensors", "error", "text"),
        [
            ([], DataError, "at least one unit"),
            ([torch.zeros(5, 2)], DataError, "every sensor is constant"),
            ([torch.zeros(5)], ShapeError, r"unit 0: expected \[cycle, sensor\]"),
            ([torch.tensor([[0.0], [math.nan]])], DataError, r"got nan at \[1, 0\]"),
            ([torch.rand(3, 2), torch.rand(3, 1)], ShapeError, "equal sensors"),
        ],
    )
    def test_bad_sensors(self, sensors, error, text):
        with pytest.raises(error, match=text):
            HealthIndicator.fit(sensors)


class TestScores:
    def test_phm08_by_hand(self):
        expected = math.expm1(13 / 13) + math.expm1(10 / 10) + 0.0
        assert abs(phm08_score([7.0, 30.0, 5.0], [20.0, 20.0, 5.0]) - expected) < 1e-12

    def test_all_scores_by_hand(self):
        found = life_scores([10.0, 30.0, 50.0, 90.0], [10.0, 20.0, 63.0, 70.0])
        assert found["rmse"] == pytest.approx(math.sqrt((0 + 100 + 169 + 400) / 4))
        assert found["mae"] == pytest.approx(43 / 4)
        assert found["mape"] == pytest.approx(100 * (0 + 0.5 + 13 / 63 + 20 / 70) / 4)
        assert (found["accuracy"], found["early"], found["late"]) == (75.0, 25.0, 50.0)

    def test_coverage_by_band(self):
        law = Empirical(torch.linspace(0, 100, 101).double()[:, None].expand(101, 3))
        table = coverage_by_band(law, [3.0, 50.0, 97.0], edges=(0, 40, 80, 120))
        assert table.index.tolist() == ["[0.0, 40.0)", "[40.0, 80.0)", "[80.0, 120.0)", "all"]
        assert table["covered"].tolist() == [0.0, 1.0, 0.0, pytest.approx(1 / 3)]
        assert table["width"].tolist() == pytest.approx([90.0] * 4)
        assert table["error"].tolist()[:3] == pytest.approx([47.0, 0.0, -47.0])

    def test_crps_of_a_normal(self):
        """Closed form of Gneiting and Raftery (2007) for a normal law."""
        law = Analytic(Normal(tensor([1.0]), tensor([2.0])))
        z = (2.5 - 1.0) / 2.0
        pdf, cdf = stats.norm.pdf(z), stats.norm.cdf(z)
        exact = 2.0 * (z * (2 * cdf - 1) + 2 * pdf - 1 / math.sqrt(math.pi))
        assert float(crps(law, [2.5], levels=4000)) == pytest.approx(exact, abs=2e-3)


def test_simulated_units_wear_out_in_order():
    found = simulate_degradation(5, sensors=3, rng=0)
    for sensors, lives, stages, health in zip(*found, strict=True):
        assert sensors.shape == (len(lives), 3) and float(lives[-1]) == 0.0
        assert bool((stages.diff() >= 0).all()) and float(health[-1]) <= 0.1
        assert bool((sensors[:, 2] == sensors[0, 2]).all())
    with pytest.raises(DataError, match="units >= 1 and sensors >= 2"):
        simulate_degradation(0, rng=0)


class TestMaintenance:
    def test_without_a_price_of_failure_it_is_the_newsvendor(self):
        law = Analytic(Normal(tensor([100.0, 40.0]), tensor([10.0, 5.0])))
        plan = plan_maintenance(law, cost_early=1.0, cost_late=19.0)
        expected = torch.tensor([100.0, 40.0]) + torch.tensor([10.0, 5.0]) * stats.norm.ppf(0.05)
        torch.testing.assert_close(plan.time, expected.double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(plan.risk, tensor([0.05, 0.05]), rtol=0, atol=1e-6)

    def test_no_other_time_is_cheaper(self):
        law = Analytic(Normal(tensor([60.0]), tensor([12.0])))
        costs = {"cost_early": 1.0, "cost_late": 2.0, "cost_failure": 50.0}
        plan = plan_maintenance(law, **costs)
        lives = law.sample(200_000, rng=0)[:, 0]

        def cost(s):
            late = 2.0 * (s - lives).clamp_min(0) + 50.0 * (lives < s)
            return (lives - s).clamp_min(0) + late

        best = cost(plan.time[0])
        for other in torch.linspace(0, 100, 41).double():
            gap = cost(other) - best
            assert float(gap.mean()) > -4 * float(gap.std()) / math.sqrt(len(lives)) - 0.02

    def test_costs_must_make_sense(self):
        law = Analytic(Normal(tensor([60.0]), tensor([12.0])))
        with pytest.raises(DataError, match="cost_early > 0"):
            plan_maintenance(law, cost_early=0.0, cost_late=1.0)


class TestBadInput:
    def test_no_definition_of_failure(self):
        model = ARPHMM(3, 0, prior=None)
        y = tensor([1.0, 0.5])
        with pytest.raises(CapabilityError, match="needs a definition of failure"):
            fixed(model, CHAIN, y).predict(y, site="rul")

    def test_a_level_needs_random_numbers(self):
        model = ARPHMM(3, 0, prior=None, failure=Failure(level=0.0))
        y = tensor([1.0, 0.5])
        with pytest.raises(DataError, match="expected rng="):
            fixed(model, CHAIN, y).predict(y, site="rul")

    @pytest.mark.parametrize(
        ("make", "error", "text"),
        [
            (lambda: Failure(), DataError, "a state, a level, or both"),
            (lambda: Failure(state=1, horizon=0), DataError, "horizon >= 1"),
            (lambda: TrailingFeatures(()), DataError, "windows"),
            (lambda: phm08_score([1.0], [1.0, 2.0]), ShapeError, "of one shape"),
            (
                lambda: ConformalLife.fit(Analytic(Normal(tensor([0.0] * 3), 1.0)), [1.0] * 3),
                DataError,
                "at least 20 held-out units",
            ),
            (
                lambda: phase_type_life(
                    {n: v[None] for n, v in CHAIN.items()}, tensor([[1.0, 0, 0]]), Failure(state=7)
                ),
                DataError,
                "expected a state 0..2, got 7",
            ),
        ],
    )
    def test_is_refused(self, make, error, text):
        with pytest.raises(error, match=text):
            make()

    def test_lives_must_fit_the_units(self, fitted):
        post = fixed(fitted.model, {n: v[0] for n, v in fitted.values.items()}, torch.arange(9.0))
        with pytest.raises(ShapeError, match=r"expected \[time=9\] for unit 0"):
            LifeRegression.fit(post, [torch.arange(9.0)], [torch.zeros(4)])
        with pytest.raises(DataError, match="finite lives >= 0"):
            LifeRegression.fit(post, [torch.arange(9.0)], [-torch.ones(9)])
        with pytest.raises(DataError, match=r"expected 1\.\.8 for unit 0, got 40"):
            fitted.predict([torch.arange(9.0)], times=[40])
