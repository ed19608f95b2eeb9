"""The container of observed curves: forms, padding, thinning, selection, bad input by text."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.files import pack, unpack
from probkit.models.pfn.curves import Curves
from probkit.models.pfn.normalizer import CurveNormalizer

ACC = CurveNormalizer.accuracy()


@pytest.mark.parametrize(
    "y",
    [
        [0.2, 0.3, 0.4],
        np.array([0.2, 0.3, 0.4]),
        torch.tensor([0.2, 0.3, 0.4]),
        pd.Series([0.2, 0.3, 0.4]),
    ],
)
def test_one_curve_of_any_form(y):
    curves = Curves(None, y, ACC)
    assert curves.single and len(curves) == 1
    assert curves.t.tolist() == [[1.0, 2.0, 3.0]] and curves.last.tolist() == [3.0]
    assert torch.allclose(curves.y.double(), torch.tensor([[0.2, 0.3, 0.4]]).double(), atol=1e-7)


def test_ragged_batches_are_padded_and_sorted():
    curves = Curves([[3, 1], [2]], [[0.5, 0.1], np.array([0.3])], ACC)
    assert not curves.single
    assert curves.t.tolist() == [[1, 3], [2, 0]]
    assert curves.y.tolist() == [[0.1, 0.5], [0.3, 0]]
    assert curves.lengths.tolist() == [2, 1] and curves.last.tolist() == [3, 2]
    assert curves.normalized[1, 1] == 0 and curves.grid_t[1, 1] == 1
    assert torch.allclose(curves.normalized[0], ACC.normalize(curves.y[0]))


def test_one_grid_serves_all_curves():
    curves = Curves([2, 4], torch.tensor([[0.1, 0.2], [0.3, 0.4]]), ACC)
    assert curves.t.tolist() == [[2, 4], [2, 4]]


def test_empty_curves():
    assert Curves(None, torch.zeros(0), ACC).last.tolist() == [0]
    assert Curves(None, [[], [0.5]], ACC).lengths.tolist() == [0, 1]


def test_every_kth_point():
    y = torch.linspace(0.1, 0.9, 250)
    curves = Curves(None, y, ACC, horizon=300, every=3)
    assert curves.t[0, :3].tolist() == [3, 6, 9] and curves.lengths.tolist() == [83]
    assert curves.grid_t[0, :3].tolist() == [1, 2, 3]
    assert torch.equal(curves.y[0], y[2::3])


def test_selection_and_time_travel():
    y0 = torch.tensor([1.0, 2.0, 3.0])
    curves = Curves(None, [[0.9, 0.8], [1.5], [2.0, 1.0, 0.5]], CurveNormalizer.log_loss(y0))
    assert curves[1].normalizer.soft_upper.tolist() == [2.0]
    assert curves[[2, 0]].lengths.tolist() == [3, 2]
    assert torch.equal(curves[2].normalized[0], curves.normalized[2])
    early = curves.until(1)
    assert early.lengths.tolist() == [1, 1, 1] and early.t.shape == (3, 1)


def test_files():
    curves = Curves(None, [[0.9, 0.8], [1.5]], CurveNormalizer.log_loss([1.0, 2.0]), horizon=30)
    back = unpack(*pack(curves))
    assert torch.equal(back.t, curves.t) and torch.equal(back.lengths, curves.lengths)
    assert torch.equal(back.normalizer.soft_upper, curves.normalizer.soft_upper)
    assert back.horizon == 30 and back.single is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curves(None, [0.1, math.nan]), "y must be finite; found nan at step 2"),
        (lambda: Curves(None, [[0.1], [0.2, math.inf]]), "found inf at step 2 of curve 1"),
        (lambda: Curves(None, [0.1, 1.2]), "y = 1.2 at step 2 lies above the upper bound 1"),
        (lambda: Curves(None, [-0.1]), "lies below the lower bound 0; pass normalizer="),
        (lambda: Curves(None, [1.2], ACC), "above the upper bound 1; widen the hard bound"),
        (
            lambda: Curves(None, [-1.0], CurveNormalizer.log_loss(2.0)),
            "y = -1 at step 1 lies below the lower bound 0",
        ),
        (lambda: Curves([0, 1], [0.1, 0.2]), r"steps t >= 1, got 0; count epochs from 1"),
        (lambda: Curves([1.5, 2], [0.1, 0.2]), "whole steps t, got 1.5"),
        (lambda: Curves([2, 2], [0.1, 0.2]), "step 2 appears twice; average"),
        (lambda: Curves([[1], [2, 2]], [[0.1], [0.1, 0.2]]), "step 2 appears twice in curve 1"),
        (lambda: Curves([101], [0.1]), "step 101 lies beyond horizon=100"),
        (lambda: Curves([21], [0.1], horizon=20), "step 21 lies beyond horizon=20"),
        (lambda: Curves([1], [0.1], horizon=300), "keep every 3rd point with every=3"),
        (lambda: Curves([1], [0.1], horizon=0), "expected horizon as a whole number >= 1"),
        (lambda: Curves([1], [0.1], every=1.5), "expected every as a whole number >= 1"),
        (lambda: Curves([math.nan], [0.1]), "t must be finite"),
        (lambda: Curves([[1.0]], [[0.1]], lengths=[2]), "lengths between 0 and 1"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curves([1, 2], [0.1]), r"t and y of equal length \[step\], got 2 and 1"),
        (lambda: Curves([[1], [1, 2]], [[0.1], [0.2]]), "t and y of curve 1 of equal length"),
        (lambda: Curves([[1]], [[0.1], [0.2]]), "got 1 curves in t and 2 in y"),
        (lambda: Curves(None, torch.zeros(2, 2, 2)), r"y as \[step\], \[curve, step\] or a list"),
        (lambda: Curves([1.0], [0.1], lengths=[1]), r"expected padded t and y \[curve, step\]"),
        (
            lambda: Curves(None, [[0.1]], CurveNormalizer.log_loss([1.0, 2.0])),
            "bounds of the normaliser for 1 curves, got 2",
        ),
    ],
)
def test_bad_shapes(make, message):
    with pytest.raises(ShapeError, match=message):
        make()
