"""The stopping rule: against the laws it is made of, its checks, and the record of a run."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.models.pfn.curves import Curves
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.stopping import RunWatch, checked_steps

ACC = CurveNormalizer.accuracy()
SEEN = [0.31, 0.42, 0.49, 0.54, 0.57, 0.60, 0.615, 0.63]


def test_every_future_step_counts(lc):
    law = lc.predict(SEEN, normalizer=ACC, horizon=60)
    for best in (0.5, 0.7, 0.8, 0.95):
        chance = float(law.prob_above(best).max())
        decision = lc.should_stop(SEEN, best, normalizer=ACC, horizon=60)
        assert float(decision.chance) == pytest.approx(chance, abs=1e-6)
        assert bool(decision) == (chance <= 0.05)
    assert not lc.should_stop(SEEN, 0.5, normalizer=ACC, horizon=60)
    assert lc.should_stop(SEEN, 0.99, normalizer=ACC, horizon=60)


def test_a_larger_delta_stops_more(lc):
    chance = float(lc.should_stop(SEEN, 0.8, normalizer=ACC).chance)
    assert 0 < chance < 1
    assert lc.should_stop(SEEN, 0.8, delta=min(chance + 0.01, 0.99), normalizer=ACC)
    assert not lc.should_stop(SEEN, 0.8, delta=chance / 2, normalizer=ACC)


def test_nothing_stops_before_there_is_a_value_to_beat(lc):
    decision = lc.should_stop(SEEN, None, normalizer=ACC)
    assert not decision and float(decision.chance) == 1 and decision.best is None


def test_errors_are_beaten_from_above(lc):
    down = CurveNormalizer.error()
    falling = [1 - y for y in SEEN]
    up = lc.should_stop(SEEN, 0.8, normalizer=ACC)
    assert float(lc.should_stop(falling, 0.2, normalizer=down).chance) == pytest.approx(
        float(up.chance), abs=1e-5
    )


def test_many_runs_at_once(lc):
    rows = [SEEN, SEEN[:3], [0.2, 0.21, 0.2, 0.21]]
    best = torch.tensor([0.9, 0.6, 0.9])
    many = lc.should_stop(Curves(None, rows, ACC, horizon=40), best)
    for k, row in enumerate(rows):
        alone = lc.should_stop(row, float(best[k]), normalizer=ACC, horizon=40)
        assert float(many.chance[k]) == pytest.approx(float(alone.chance), abs=1e-5)
        assert bool(many.stop[k]) == bool(alone)
    with pytest.raises(DataError, match=r"a decision on 3 runs has no one truth value"):
        bool(many)
    one_best = lc.should_stop(Curves(None, rows, ACC, horizon=40), 0.9)
    assert float(one_best.chance[0]) == pytest.approx(float(many.chance[0]), abs=1e-6)


def test_a_thinned_curve_looks_to_its_horizon(lc):
    y = torch.linspace(0.3, 0.6, 298)
    decision = lc.should_stop(y, 0.99, normalizer=ACC, horizon=299, every=3)
    assert decision.chance.shape == () and bool(decision)


@pytest.mark.parametrize("delta", [0, 1, -0.1, 2.0, math.nan, True, "0.05"])
def test_delta_is_a_probability(lc, delta):
    with pytest.raises(DataError, match="delta: expected a probability strictly between 0 and 1"):
        lc.should_stop(SEEN, 0.5, delta=delta)


def test_bad_input(lc):
    with pytest.raises(DataError, match="a curve has reached horizon=8; raise the horizon"):
        lc.should_stop(SEEN, 0.5, horizon=8)
    with pytest.raises(DataError, match="y_best = 1.5 lies outside the bounds"):
        lc.should_stop(SEEN, 1.5)
    with pytest.raises(DataError, match="y_best = -2 lies outside the bounds"):
        lc.should_stop(SEEN, -2, normalizer=CurveNormalizer.log_loss(1.0))
    with pytest.raises(DataError, match="expected a finite y_best"):
        lc.should_stop(SEEN, math.nan)
    with pytest.raises(ShapeError, match=r"y_best as a number or \[curve=1\], got \(2,\)"):
        lc.should_stop(SEEN, torch.tensor([0.1, 0.2]))


def test_steps_that_are_checked():
    assert checked_steps("fine", 6) == {2, 3, 4, 5}
    assert checked_steps("coarse", 100) == {10, 20, 40, 80}
    assert checked_steps("coarse", 52) == {6, 11, 21, 42}
    assert checked_steps([3, 5], 6) == {3, 5}
    for check in ("all", [0], [6], [2.5]):
        with pytest.raises(DataError, match="'fine', 'coarse' or whole steps between 1 and 5"):
            checked_steps(check, 6)


# ------------------------------------------------------------------ the record of a run


def test_a_hopeless_run_is_left_and_a_good_one_kept(lc):
    hopeless = RunWatch(lc, ACC, 40, best=0.95)
    stops = [hopeless.observe(t, 0.30 + 0.002 * t) for t in range(1, 6)]
    assert stops[-1] and hopeless.stopped_at is not None and not stops[0]
    good = RunWatch(lc, ACC, 40, best=0.5)
    assert not any(good.observe(t, y) for t, y in enumerate(SEEN, 1))
    assert good.to_beat() == 0.63 and good.stopped_at is None


def test_decisions_are_those_of_should_stop(lc):
    watch = RunWatch(lc, ACC, 40, best=0.75)
    for t, y in enumerate(SEEN, 1):
        watch.observe(t, y)
    expected = lc.should_stop(SEEN, 0.75, normalizer=ACC, horizon=40)
    assert float(watch.decision.chance) == pytest.approx(float(expected.chance), abs=1e-6)


def test_only_checked_steps_are_judged(lc):
    watch = RunWatch(lc, ACC, 20, best=0.99, check=[5])
    assert [watch.observe(t, 0.3) for t in range(1, 7)] == [False] * 4 + [True, False]


def test_long_runs_are_thinned(lc):
    watch = RunWatch(lc, ACC, 200, best=0.99)
    assert [watch.observe(t, 0.3) for t in range(1, 5)] == [False, True, False, True]


def test_a_run_that_diverges_is_stopped(lc):
    watch = RunWatch(lc, ACC, 20)
    assert not watch.observe(1, 0.3) and watch.observe(2, math.nan)
    assert watch.stopped_at == 2


def test_rounding_beyond_a_bound_is_forgiven(lc):
    watch = RunWatch(lc, ACC, 20, best=0.5)
    watch.observe(1, 0.5)
    assert watch.observe(2, 1.0 + 1e-9)  # nothing beats an accuracy of one
    with pytest.raises(DataError, match="lies above the upper bound 1"):
        watch.observe(3, 1.5)


def test_a_record_is_restored(lc):
    first, second = (RunWatch(lc, ACC, 40, best=0.8) for _ in range(2))
    for t, y in enumerate(SEEN, 1):
        first.observe(t, y)
    second.load_state_dict(first.state_dict())
    assert float(second.judge().chance) == float(first.decision.chance)
    second.observe(8, 0.7)  # a step that is repeated replaces its value
    assert second.steps == list(range(1, 9)) and second.values[-1] == 0.7


@pytest.mark.parametrize("horizon", [1, 0, 2.5, True])
def test_bad_horizons(lc, horizon):
    with pytest.raises(DataError, match="horizon: expected the number of steps of a full run"):
        RunWatch(lc, ACC, horizon)
