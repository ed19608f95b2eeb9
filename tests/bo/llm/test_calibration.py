"""Calibration of standard deviations from rows left out."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.bo.llm.calibration import (
    coverage_report,
    fit_calibration,
    leave_one_out,
)
from probkit.errors import DataError, ShapeError


def _rows(n: int, sd: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, generator=rng, dtype=torch.float64)
    return mean, mean + sd * torch.randn(n, generator=rng, dtype=torch.float64)


def test_each_row_is_predicted_without_itself() -> None:
    X = torch.arange(4.0, dtype=torch.float64)[:, None]
    Y = X[:, 0] ** 2
    asked = []

    def predict(X, Y, at, *, rng):
        asked.append((X[:, 0].tolist(), at[:, 0].tolist()))
        return Y.sum().expand(1), torch.rand(1, generator=rng, dtype=torch.float64)

    found = leave_one_out(predict, X, Y, rng=0)
    assert asked[2] == ([0.0, 1.0, 3.0], [2.0])
    assert found.mean.tolist() == (Y.sum() - Y).tolist()
    some = leave_one_out(predict, X, Y, rows=[2], rng=0)
    assert torch.equal(some.sd, found.sd[2:3])  # the stream belongs to the row


def test_moments_recover_the_scale() -> None:
    mean, values = _rows(4000, 3.0, 0)
    scale = fit_calibration(mean, torch.ones_like(mean), values).scale
    # The root of a mean of 4,000 squares: relative standard error sqrt(1 / (2 * 4000)).
    assert abs(scale / 3.0 - 1) < 4 * math.sqrt(1 / 8000)


def test_conformal_intervals_hold_new_values_as_often_as_promised() -> None:
    """With n = 9 rows the rank is ceil(10 * 0.68) = 7: coverage is exactly 7/10."""
    runs, n, inside = 4000, 9, 0
    rng = torch.Generator().manual_seed(1)
    # Not normal: what counts is exchangeability alone.
    errors = torch.empty(runs, n + 1, dtype=torch.float64).exponential_(generator=rng)
    signs = torch.where(torch.rand(errors.shape, generator=rng) < 0.5, -1.0, 1.0).double()
    values = errors * signs
    normal = float(torch.special.ndtri(torch.tensor(0.84, dtype=torch.float64)))
    for row in values:
        zero = torch.zeros(n, dtype=torch.float64)
        fitted = fit_calibration(zero, zero + 1, row[:n], method="conformal", level=0.68)
        inside += int(row[n].abs() <= normal * fitted.scale)
    error = math.sqrt(0.7 * 0.3 / runs)
    assert abs(inside / runs - 0.7) < 4 * error


def test_isotonic_sees_that_only_large_sds_are_wrong() -> None:
    rng = torch.Generator().manual_seed(2)
    sd = torch.cat([torch.full((2000,), 1.0), torch.full((2000,), 2.0)]).double()
    sd = sd * (1 + 1e-6 * torch.rand(4000, generator=rng, dtype=torch.float64))
    truth = torch.where(sd < 1.5, 1.0, 6.0).double()
    values = truth * torch.randn(4000, generator=rng, dtype=torch.float64)
    fitted = fit_calibration(torch.zeros_like(sd), sd, values, method="isotonic")
    new = fitted.sd(torch.tensor([1.0000005, 2.000001], dtype=torch.float64))
    assert abs(float(new[1]) / 6 - 1) < 0.3
    assert float(new[0]) < 2.0
    heights = fitted.heights
    assert heights is not None and bool((heights.diff() >= 0).all())


def test_isotonic_is_the_least_squares_fit() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    errors = torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=torch.float64).sqrt()
    fitted = fit_calibration(torch.zeros(4).double(), x, errors, method="isotonic")
    assert fitted.heights is not None
    assert torch.allclose(fitted.heights.square(), torch.tensor([1.0, 3.0, 3.0, 9.0]).double())


def test_report_judges_each_row_by_the_others() -> None:
    mean, values = _rows(300, 4.0, 3)
    sd = torch.ones_like(mean)  # four times too sure
    report = coverage_report(mean, sd, values)
    assert report.raw[0] < 0.3
    for level, share in zip(report.levels, report.calibrated, strict=True):
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 300)
    assert report.calibrated_log_density > report.log_density
    assert report.table().shape == (2, 2)
    # A value far off is nothing but its own surprise: the others do not excuse it.
    far = values.clone()
    far[0] = mean[0] + 40.0
    assert coverage_report(mean, sd, far).calibrated_log_density < report.calibrated_log_density


def test_floor_is_relative() -> None:
    values = torch.tensor([0.0, 1000.0], dtype=torch.float64)
    fitted = fit_calibration(values, torch.zeros(2).double(), values)
    assert float(fitted.sd(torch.zeros(1).double())) >= 1.0  # a thousandth of the range


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "platt"}, "method: expected 'moment', 'conformal' or 'isotonic', got 'platt'"),
        ({"method": "conformal", "level": 1.0}, r"level: expected a probability in \(0, 1\)"),
        ({"sd": torch.tensor([-1.0, 1.0])}, "sd: expected standard deviations >= 0, got -1"),
        ({"mean": torch.tensor([math.nan, 0.0])}, "mean must be finite, got nan at row 0"),
    ],
)
def test_bad_input(change: dict, text: str) -> None:
    given = {"mean": torch.zeros(2), "sd": torch.ones(2), "values": torch.ones(2), **change}
    with pytest.raises(DataError, match=text):
        fit_calibration(given.pop("mean"), given.pop("sd"), given.pop("values"), **given)


def test_bad_shapes_and_sizes() -> None:
    one = torch.ones(1)
    with pytest.raises(ShapeError, match=r"expected mean, sd and values \[row\], got"):
        fit_calibration(torch.ones(2), one, one)
    with pytest.raises(DataError, match="at least one prediction of a row left out"):
        fit_calibration(torch.ones(0), torch.ones(0), torch.ones(0))
    with pytest.raises(DataError, match="a coverage report needs at least 2 rows, got 1"):
        coverage_report(one, one, one)
    with pytest.raises(DataError, match="leaving one out needs at least 2 rows, got 1"):
        leave_one_out(lambda *a, **k: (one, one), torch.ones(1, 1), one, rng=0)
    with pytest.raises(ShapeError, match=r"expected X \[row, feature\] and Y \[row\]"):
        leave_one_out(lambda *a, **k: (one, one), torch.ones(2, 1), one, rng=0)
    with pytest.raises(DataError, match=r"levels: expected probabilities in \(0, 1\), got 2"):
        coverage_report(torch.ones(3), torch.ones(3), torch.arange(3.0), levels=[2])
