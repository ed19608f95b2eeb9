"""What is measured, and what of it a surrogate sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from probkit.bo.observations import observe
from probkit.bo.outcomes import Constraint, Outcomes
from probkit.bo.parameters import Float
from probkit.bo.space import Space
from probkit.bo.trials import Trial
from probkit.errors import DataError, ShapeError

SPACE = Space(x=Float(0, 1))


def trial(number, x, status="complete", variances=None, **values):
    return Trial(number, {"x": x}, status, values or None, variances)


def test_constraints_are_read_from_sentences():
    outcomes = Outcomes({"loss": "min"}, ["memory <= 4e9", "accuracy>=0.9"])
    assert outcomes.names == ("loss", "memory", "accuracy")
    assert outcomes.bounds == [(1, 1.0, 4e9), (2, -1.0, -0.9)]
    assert outcomes.is_feasible({"loss": 1, "memory": 1, "accuracy": 0.9})
    assert not outcomes.is_feasible({"loss": 1, "memory": 1, "accuracy": 0.89})
    assert Outcomes.from_json(outcomes.to_json()) == outcomes


def test_values_are_read_in_every_form():
    one, two = Outcomes({"a": "min"}), Outcomes({"a": "min", "b": "max"})
    for value in (2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor([2.0]), [2], {"a": 2}):
        assert one.read(value) == {"a": 2.0}
    for value in ([1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), {"b": 2, "a": 1}):
        assert two.read(value) == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.0, ShapeError, r"value: expected \[outcome=2\] \(a, b\), got 1; pass a mapping"),
        ([1, 2, 3], ShapeError, r"value: expected \[outcome=2\] \(a, b\), got 3"),
        ({"a": 1}, DataError, r"value: expected the outcomes a, b, got a"),
        ({"a": 1, "b": 2, "c": 3}, DataError, r"expected the outcomes a, b, got a, b, c"),
        ([1, math.nan], DataError, r"value of 'b': expected a finite number, got nan; for a trial"),
        ([math.inf, 1], DataError, r"value of 'a': expected a finite number, got inf"),
        ([1, "x"], DataError, r"value of 'b': expected a number, got 'x'"),
    ],
)
def test_other_values_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        Outcomes({"a": "min", "b": "max"}).read(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Outcomes({}), r"expected objectives as names with directions, such as"),
        (lambda: Outcomes({"a": "down"}), r"objective 'a': expected 'min' or 'max', got 'down'"),
        (lambda: Outcomes({"a": "min"}, ["a <= 1"]), r"a: an objective and a constraint at once"),
        (lambda: Outcomes({"a": "min"}, ["b < 1"]), r"expected a constraint such as 'memory <= 4'"),
        (lambda: Constraint("b"), r"constraint 'b': expected a finite lower or upper bound"),
        (lambda: Constraint("b", 2, 1), r"constraint 'b': bounds are reversed: lower=2 > upper=1"),
    ],
)
def test_outcomes_without_meaning_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_objectives_are_turned_to_be_maximised():
    outcomes = Outcomes({"loss": "min", "gain": "max"}, ["cost <= 3"])
    seen = observe([trial(0, 0.5, loss=1, gain=2, cost=4)], SPACE, outcomes)
    assert seen.Y.tolist() == [[-1.0, 2.0, 4.0]]


def test_failed_trials_stand_with_the_worst_value_and_never_with_zero():
    outcomes = Outcomes({"loss": "min"})
    trials = [trial(0, 0.1, loss=5), trial(1, 0.2, loss=7), trial(2, 0.3, "failed")]
    seen = observe(trials, SPACE, outcomes)
    assert seen.Y[:, 0].tolist() == [-5.0, -7.0, -7.0] and seen.told.tolist() == [True, True, False]
    left_out = observe(trials, SPACE, outcomes, failures="ignore")
    assert left_out.Y[:, 0].tolist() == [-5.0, -7.0]
    assert len(left_out.visited) == 3
    maximised = observe(trials, SPACE, Outcomes({"loss": "max"}))
    assert maximised.Y[2, 0] == 5.0


def test_failed_trials_violate_constraints_as_badly_as_any():
    outcomes = Outcomes({"loss": "min"}, ["cost <= 3", "gain >= 1"])
    trials = [
        trial(0, 0.1, loss=1, cost=9, gain=2),
        trial(1, 0.2, loss=2, cost=1, gain=0.5),
        trial(2, 0.3, "failed"),
    ]
    assert observe(trials, SPACE, outcomes).Y[2].tolist() == [-2.0, 9.0, 0.5]


def test_pruned_trials_are_never_better_than_the_median():
    outcomes = Outcomes({"loss": "min"})
    told = [trial(k, 0.1 * k, loss=value) for k, value in enumerate([1.0, 2.0, 3.0])]
    pruned = [
        trial(3, 0.5, "pruned", loss=0.1),
        trial(4, 0.6, "pruned", loss=9.0),
        trial(5, 0.7, "pruned"),
    ]
    seen = observe([*pruned, *told], SPACE, outcomes)  # in any order
    assert seen.Y[3:, 0].tolist() == [-2.0, -9.0, -3.0]
    assert seen.complete == 3


def test_running_trials_are_pending_and_cancelled_ones_are_nothing():
    trials = [trial(0, 0.1, loss=1), trial(1, 0.2, "running"), trial(2, 0.3, "cancelled")]
    seen = observe(trials, SPACE, Outcomes({"loss": "min"}))
    assert seen.pending[:, 0].tolist() == [0.2] and seen.visited[:, 0].tolist() == [0.1, 0.2]
    assert len(seen.Y) == 1


def test_variances_are_zero_known_or_learned():
    outcomes = Outcomes({"loss": "min"})
    plain = [trial(0, 0.1, loss=1), trial(1, 0.2, loss=2), trial(2, 0.3, "failed")]
    assert observe(plain, SPACE, outcomes).Yvar is None
    assert observe(plain, SPACE, outcomes, noise="none").Yvar.tolist() == [[0.0]] * 3
    known = [
        trial(0, 0.1, loss=1, variances={"loss": 0.1}),
        trial(1, 0.2, loss=2, variances={"loss": 0.3}),
        trial(2, 0.3, "failed"),
    ]
    assert observe(known, SPACE, outcomes).Yvar[:, 0].tolist() == pytest.approx([0.1, 0.3, 0.2])


def test_the_worst_of_two_sided_bounds_is_the_farthest_outside():
    outcomes = Outcomes({"loss": "min"}, [Constraint("load", 1.0, 2.0)])
    trials = [
        trial(0, 0.1, loss=1, load=0.0),
        trial(1, 0.2, loss=2, load=4.0),
        trial(2, 0.3, "failed"),
    ]
    assert observe(trials, SPACE, outcomes).Y[2].tolist() == [-2.0, 4.0]
