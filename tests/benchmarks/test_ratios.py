from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.harness.ratios import Spread, disagreement, paired_ratio, quantile
from benchmarks.harness.spec import Agreement


def test_spread_is_that_of_the_ratios_inside_rounds() -> None:
    spread = paired_ratio([1.0, 4.0, 3.0, 10.0, 2.0], [2.0, 2.0, 2.0, 2.0, 4.0])
    assert spread == Spread(median=1.5, q25=0.5, q75=2.0, low=0.5, high=5.0)


def test_a_load_met_by_both_sides_of_a_round_cancels() -> None:
    load = np.array([1.0, 9.0, 3.0])
    spread = paired_ratio(list(0.4 * load), list(load))
    assert (spread.low, spread.high) == pytest.approx((0.4, 0.4))


def test_quantiles_are_those_of_numpy() -> None:
    values = list(np.random.default_rng(0).standard_normal(23))
    for q in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-14)


def test_goal_is_held_against_the_median() -> None:
    spread = Spread(median=0.5, q25=0.4, q75=0.6, low=0.3, high=0.9)
    assert spread.meets(0.5) and not spread.meets(0.49)
    assert spread.clear_of(0.6) and spread.clear_of(0.39) and not spread.clear_of(0.5)


@pytest.mark.parametrize("peer", [[1.0], []])
def test_rounds_must_pair(peer: list[float]) -> None:
    with pytest.raises(ValueError, match="equal numbers of rounds"):
        paired_ratio([1.0, 2.0] if peer else [], peer)


def test_a_time_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="too short for the clock"):
        paired_ratio([1.0], [0.0])


@pytest.mark.parametrize(
    ("ours", "peer", "gap", "word"),
    [
        ({"k": [1.0, 2.0]}, {"k": [1.0, 2.0000001]}, 1e-7, ""),
        ({"k": [1.0, 2.0]}, {"k": [1.0, 2.1]}, 0.1, "k[1] is 2 in ours and 2.1"),
        ({"k": [1.0]}, {"k": [1.0, 2.0]}, math.inf, "1 numbers in ours and 2"),
        ({"k": [math.nan]}, {"k": [1.0]}, math.inf, "k[0] is nan"),
        ({}, {}, math.inf, "k has 0 numbers"),
    ],
)
def test_disagreement(ours: dict, peer: dict, gap: float, word: str) -> None:
    worst, problem = disagreement(ours, peer, Agreement(("k",), rtol=1e-6))
    assert worst == pytest.approx(gap, rel=1e-6)
    assert problem.startswith(word) if word and word[0] == "k" else word in problem
    assert bool(problem) == bool(word)
