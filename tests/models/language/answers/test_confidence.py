"""Calibrated confidence: a map that mends a known distortion, an error that is known by hand."""

from __future__ import annotations

import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.models.language.answers import calibrate_confidence, expected_calibration_error


def simulated(n, seed, distort):
    """Confidences whose true share of right answers is ``distort(confidence)``."""
    rng = torch.Generator().manual_seed(seed)
    stated = torch.rand(n, generator=rng, dtype=torch.float64)
    return stated, torch.rand(n, generator=rng, dtype=torch.float64) < distort(stated)


def test_the_error_by_hand():
    stated = [0.95, 0.95, 0.65, 0.65, 1.0]
    right = [True, False, True, True, True]
    # bins: [0.6, 0.7): |0.65 - 1| * 2; [0.9, 1]: |(0.95 + 0.95 + 1) / 3 - 2 / 3| * 3
    assert expected_calibration_error(stated, right) == pytest.approx((0.7 + 0.9) / 5)
    assert expected_calibration_error(stated, right, bins=1) == pytest.approx(abs(4.2 - 4) / 5)


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_over_confidence_is_mended(method):
    def true_share(confidence):
        return torch.sigmoid(0.5 * torch.logit(confidence.clamp(1e-4, 1 - 1e-4)) - 1.0)

    stated, right = simulated(4000, 0, true_share)
    calibration = calibrate_confidence(stated, right, method=method)
    assert calibration.error_before > 0.15 and calibration.tasks == 4000
    assert calibration.error_after < 0.04
    grid = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    # a share of about 200 tasks near each point is known to 0.035; isotonic fits are rougher
    assert float((calibration(grid) - true_share(grid)).abs().max()) < 0.12
    mapped = calibration(torch.linspace(0, 1, 101))
    assert bool((mapped.diff() >= -1e-12).all()) and bool(((mapped >= 0) & (mapped <= 1)).all())
    assert float(calibration(0.5)) == pytest.approx(float(calibration([0.5])[0]))


def test_the_isotonic_map_is_scikit_learns():
    from sklearn.isotonic import IsotonicRegression

    stated, right = simulated(300, 1, lambda c: c**2)
    mapped = calibrate_confidence(stated, right)(torch.linspace(0, 1, 57))
    peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    peer.fit(stated.numpy(), right.double().numpy())
    wanted = torch.as_tensor(peer.predict(torch.linspace(0, 1, 57).double().numpy()))
    torch.testing.assert_close(mapped, wanted)


def test_good_confidence_is_left_alone():
    stated, right = simulated(4000, 2, lambda c: c)
    calibration = calibrate_confidence(stated, right, method="platt")
    assert calibration.error_before < 0.04 and calibration.error_after < 0.04


def test_the_error_after_is_of_tasks_not_seen():
    """On pure noise an isotonic map fits its own tasks better than new ones."""
    stated, right = simulated(60, 3, lambda c: torch.full_like(c, 0.5))
    calibration = calibrate_confidence(stated, right)
    own = expected_calibration_error(calibration(stated), right)
    assert own < calibration.error_after


@pytest.mark.parametrize(
    ("stated", "right", "error", "message"),
    [
        ([0.5] * 9, [True] * 9, DataError, "at least 10 tasks.*got 9 tasks with 9 right"),
        ([0.5] * 20, [True] * 20, DataError, "got 20 tasks with 20 right"),
        ([0.5] * 20, [True] * 19, ShapeError, r"got shapes \[20\] and \[19\]"),
        ([1.5] * 20, [True] * 20, DataError, r"each in \[0, 1\], got \[1.5"),
        ([float("nan")] * 20, [True] * 20, DataError, r"each in \[0, 1\], got \[nan"),
    ],
)
def test_bad_input(stated, right, error, message):
    with pytest.raises(error, match=message):
        calibrate_confidence(stated, right)


def test_bad_options():
    stated, right = simulated(20, 4, lambda c: c)
    with pytest.raises(DataError, match="expected method 'isotonic' or 'platt', got 'beta'"):
        calibrate_confidence(stated, right, method="beta")
    with pytest.raises(DataError, match="expected bins >= 1, got 0"):
        expected_calibration_error(stated, right, bins=0)
