"""Every wrong input is named, with what was expected."""

from __future__ import annotations

import math

import pytest
import torch

from probkit import infer
from probkit.errors import DataError, NumericsWarning, ShapeError
from probkit.inference import EM
from probkit.models.arphmm import ARPHMM, Sequences, SwitchingPrior, plausibility

Y = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.9], dtype=torch.float64)


def labels(*rows):
    return torch.tensor(rows, dtype=torch.float64)


FULL = labels([1, 1], [1, 1], [1, 1], [1, 1], [1, 1])


def changed(row, values):
    found = FULL.clone()
    found[row] = torch.tensor(values, dtype=torch.float64)
    return found


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Sequences([]), DataError, "at least one sequence"),
        (lambda: Sequences(Y), ShapeError, r"write Sequences\(\[y\]\)"),
        (lambda: Sequences([torch.zeros(2, 2, 2)]), ShapeError, r"expected \[time, feature\]"),
        (lambda: Sequences([Y, torch.zeros(3, 2)]), ShapeError, "sequence 1 has 2"),
        (lambda: Sequences([[0.0, math.inf]]), DataError, r"got inf at \[1, 0\]"),
        (
            lambda: Sequences([Y], [changed(2, [-0.1, 1])]),
            DataError,
            "got -0.1 for state 0 at time 2",
        ),
        (
            lambda: Sequences([Y], [changed(2, [1.1, 1])]),
            DataError,
            "got 1.1 for state 0 at time 2",
        ),
        (lambda: Sequences([Y], [changed(2, [math.nan, 1])]), DataError, "got nan for state 0"),
        (
            lambda: Sequences([Y], [changed(3, [0, 0])]),
            DataError,
            "no state is plausible at time 3",
        ),
        (lambda: Sequences([Y], [FULL[:3]]), ShapeError, r"expected \[time=5, state\]"),
        (lambda: Sequences([Y], [FULL, FULL]), ShapeError, "for each of 1 sequences, got 2"),
        (lambda: Sequences([Y], FULL), ShapeError, r"got \(5, 2\)"),
        (lambda: Sequences([Y, Y], [FULL, FULL[:, :1]]), ShapeError, "same number of states"),
        (lambda: Sequences([Y], prev=[torch.zeros(1, 2)]), ShapeError, "prev: expected 1 features"),
        (lambda: Sequences([Y], prev=[]), ShapeError, "for each of 1 sequences, got 0"),
        (lambda: ARPHMM(0), DataError, "states >= 1"),
        (lambda: ARPHMM(2, -1), DataError, "order >= 0"),
        (lambda: ARPHMM(2, cov="round"), DataError, "expected cov one of full, diag, shared"),
        (lambda: ARPHMM(2, transition="up"), DataError, "'left_right' or a mask"),
        (lambda: ARPHMM(2, transition=torch.ones(3, 3)), ShapeError, r"\[state=2, state=2\]"),
        (
            lambda: ARPHMM(2, transition=labels([1, 0], [0, 0])),
            DataError,
            "lets state 1 go nowhere",
        ),
        (lambda: SwitchingPrior(ridge=0.0), DataError, "ridge > 0"),
        (lambda: SwitchingPrior(sticky=-1.0), DataError, "sticky >= 0"),
        (lambda: SwitchingPrior(scale=-1.0), DataError, "scale > 0"),
        (lambda: plausibility.from_labels([0, 3], 2), DataError, "got 3 at time 1"),
        (lambda: plausibility.from_labels([0.5], 2), DataError, "whole numbers 0..1"),
        (lambda: plausibility.from_labels([0], 2, nonspecificity=2), DataError, r"in \[0, 1\]"),
        (lambda: plausibility.from_intervals(4, 2, [(0, 9, 1)]), DataError, "stop <= 4"),
        (
            lambda: plausibility.from_intervals(4, 2, [(0, 2, 0), (1, 3, 1)]),
            DataError,
            "exclude every",
        ),
        (lambda: plausibility.from_probabilities([[0.0, 0.0]]), DataError, "not all zero"),
        (lambda: plausibility.from_probabilities([[1.0, -1.0]]), DataError, "non-negative"),
    ],
)
def test_is_refused_at_once(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("model", "data", "error", "text"),
    [
        (
            ARPHMM(2, 5),
            Sequences([Y]),
            DataError,
            r"more than 5 time steps \(the lag order\), got 5",
        ),
        (ARPHMM(3, 1), Sequences([Y], [FULL]), ShapeError, r"\[time, state=3\], got \(5, 2\)"),
        (ARPHMM(2, 1, missing="error"), Sequences([[0.0, math.nan, 1.0]]), DataError, "is NaN"),
        (ARPHMM(2, 2), Sequences([Y], prev=[Y[:1]]), ShapeError, "at least 2 past values"),
        (ARPHMM(2, 1, features=3), Sequences([Y]), ShapeError, "that many features, got 1"),
        (
            ARPHMM(2, 1, transition="left_right"),
            Sequences([Y], [labels([1, 1], [0, 1], [1, 1], [1, 0], [1, 1])]),
            DataError,
            "labels of sequence 0: no path of allowed transitions reaches time 3",
        ),
        (
            ARPHMM(2, 0),
            Sequences([torch.ones(5)]),
            DataError,
            "feature 0 is 1 at every usable step",
        ),
        (
            ARPHMM(2, 1, prior=SwitchingPrior(scale=torch.eye(3))),
            Sequences([Y]),
            ShapeError,
            "feature=1",
        ),
        (
            ARPHMM(2, 1, prior=SwitchingPrior(mean=torch.zeros(1, 3))),
            Sequences([Y]),
            ShapeError,
            "mean",
        ),
        (ARPHMM(2, 1, prior=SwitchingPrior(dof=-1.0)), Sequences([Y]), DataError, "dof > 0"),
    ],
)
def test_is_refused_before_any_work(model, data, error, text):
    with pytest.raises(error, match=text):
        infer(model, data, EM(max_iter=2), rng=0)


def test_probabilities_that_do_not_add_up(tiny):
    values, data, _ = tiny
    wrong = {**values, "transition": values["transition"] * 0.9}
    with pytest.raises(DataError, match="transition: expected probabilities >= 0 whose rows sum"):
        ARPHMM(2, 1).smooth(wrong, data)
    wrong = {**values, "initial": torch.tensor([1.2, -0.2], dtype=torch.float64)}
    with pytest.raises(DataError, match="initial: expected probabilities"):
        ARPHMM(2, 1).filter_start(wrong)


def test_states_that_explain_next_to_nothing_are_reported():
    rng = torch.Generator().manual_seed(0)
    y = torch.randn(12, 1, generator=rng, dtype=torch.float64)
    with pytest.warns(NumericsWarning, match="explain fewer than 3 steps"):
        infer(ARPHMM(5, 1, prior=SwitchingPrior(scale=1.0)), y, EM(), rng=0)
