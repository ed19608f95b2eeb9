"""Click rate, diversity, hits and calibration."""

from __future__ import annotations

import pytest
import torch

from probkit.calibration import ecdf_p_value
from probkit.errors import DataError, ShapeError
from probkit.models.slates import SlateLog
from probkit.models.slates.metrics import click_calibration, click_rate, distinct_groups, hits

pytestmark = pytest.mark.usefixtures("unchanged_global_state")


def test_click_rate_counts_the_steps_of_its_part():
    log = SlateLog(
        [[[1, 3, 2]] * 4] * 2,
        [[3, 1, 2, 3], [1, 3, 3, 1]],
        train=[[True] * 4, [True, False, False, False]],
        part=[0, 2],
    )
    assert click_rate(log) == pytest.approx(2 / 4)  # An unknown click is no observation.
    assert click_rate(log, "test") == pytest.approx(2 / 3)


def test_distinct_groups_by_hand():
    groups = [0, 0, 0, 5, 5, 6, 0]
    slates = [[3, 4, 5, 6], [3, 4, 0, 0], [0, 0, 0, 0], [6, 3, 6, 1]]
    assert distinct_groups(slates, groups).tolist() == [3, 1, 0, 2]


def test_hits_count_each_item_once():
    log = SlateLog([[[1, 3], [1, 4], [1, 4], [1, 5]]] * 2, [[3, 4, 4, 5], [1, 4, 1, 1]])
    shown = torch.tensor([[4, 5, 3], [4, 3, 9]])
    assert hits(shown, log, first=1).tolist() == [2, 1]
    assert hits(shown, log, first=0).tolist() == [3, 1]
    assert hits(shown, log, first=2).tolist() == [2, 0]
    with pytest.raises(ShapeError, match=r"recommended \[user=2, rank\]"):
        hits(shown[:1], log, first=1)
    with pytest.raises(DataError, match=r"first step in \[0, 4\)"):
        hits(shown, log, first=4)


def simulated(sharpen, n=4000):
    """Choices from known probabilities, and the probabilities of a model that is too sure."""
    g = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(n, 5, generator=g, dtype=torch.float64)
    logits[: n // 2, 3:] = -torch.inf  # Short slates.
    chosen = torch.multinomial(torch.softmax(logits, 1), 1, generator=g)[:, 0]
    return click_calibration(torch.softmax(sharpen * logits, 1), chosen, rng=0), chosen


def test_right_probabilities_are_calibrated():
    found, _ = simulated(1.0)
    inside = (found.low <= found.predicted) & (found.predicted <= found.high)
    assert int(inside.sum()) >= 8  # of ten 95 % intervals: fewer has a probability of 1e-2
    assert found.ece < 0.015
    assert ecdf_p_value((found.pit * 99.999).long(), 99) > 1e-3
    assert int(found.count.sum()) == 2000 * 3 + 2000 * 5


def test_overconfidence_is_seen():
    right, _ = simulated(1.0)
    found, _ = simulated(2.0)
    assert found.ece > 3 * right.ece
    assert found.nll > right.nll
    assert ecdf_p_value((found.pit * 99.999).long(), 99) < 1e-3


def test_bad_input():
    for call, error, text in (
        (lambda: click_calibration([[0.5, 0.6]], [0]), DataError, "sum to 1"),
        (lambda: click_calibration([0.5, 0.5], [0]), ShapeError, r"probs \[choice, slot\]"),
        (lambda: click_calibration([[1.0]], [0], bins=0), DataError, "bins >= 1"),
    ):
        with pytest.raises(error, match=text):
            call()
