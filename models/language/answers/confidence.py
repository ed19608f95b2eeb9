"""How far stated confidence can be believed, and a map that mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.rng import scope

__all__ = ["ConfidenceCalibration", "calibrate_confidence", "expected_calibration_error"]

_EDGE = 1e-4  # confidences are kept this far from 0 and 1 before log odds are taken


@storable
@dataclass(frozen=True, eq=False)
class ConfidenceCalibration:
    """A map from stated confidence to the share of right answers, learned on held-out tasks.

    Attributes:
        method: "isotonic" or "platt".
        points: [point, 2], confidences and their calibrated values, between which the isotonic map
            is linear; (slope, intercept) [1, 2] of the log odds for Platt's.
        error_before: Expected calibration error of the stated confidences.
        error_after: The same of calibrated ones, each task calibrated by the others (five folds).
        tasks: Number of tasks.
    """

    method: Literal["isotonic", "platt"]
    points: Tensor
    error_before: float
    error_after: float
    tasks: int

    def __call__(self, confidence: float | Sequence[float] | Tensor) -> Tensor:
        """Return calibrated confidences, of the shape of what is given."""
        stated = torch.as_tensor(confidence, dtype=torch.float64)
        return _apply(self.method, self.points, stated)


def _apply(method: str, points: Tensor, stated: Tensor) -> Tensor:
    if method == "platt":
        slope, intercept = points[0]
        return torch.sigmoid(slope * _log_odds(stated) + intercept)
    x, y = points.T.contiguous()
    if len(x) == 1:
        return y.expand(stated.shape).clone()
    right = torch.searchsorted(x, stated.contiguous()).clamp(1, len(x) - 1)
    step = (stated - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + step.clamp(0.0, 1.0) * (y[right] - y[right - 1])


def _log_odds(stated: Tensor) -> Tensor:
    return torch.logit(stated.clamp(_EDGE, 1.0 - _EDGE))


def expected_calibration_error(
    confidences: Sequence[float] | Tensor, correct: Sequence[bool] | Tensor, *, bins: int = 10
) -> float:
    """Return the mean distance of confidence and share of right answers over bins of confidence.

    Args:
        confidences: In [0, 1], [task].
        correct: Whether the answer was right, [task].
        bins: Equal bins of [0, 1].

    Raises:
        ShapeError: Different lengths.
        DataError: A confidence outside [0, 1], no tasks, or ``bins < 1``.

    Example:
        >>> expected_calibration_error([0.9, 0.9, 0.1], [True, False, False])
        0.3
    """
    stated, right = _checked(confidences, correct)
    if not isinstance(bins, int) or bins < 1:
        raise DataError(f"expected_calibration_error: expected bins >= 1, got {bins!r}")
    which = (stated * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, which, stated - right)
    return float(gaps.abs().sum() / len(stated))


def calibrate_confidence(
    confidences: Sequence[float] | Tensor,
    correct: Sequence[bool] | Tensor,
    *,
    method: Literal["isotonic", "platt"] = "isotonic",
) -> ConfidenceCalibration:
    """Learn what stated confidence is worth from tasks whose right answers are known.

    Args:
        confidences: ``AnswerPosterior.confidence`` of each task, [task].
        correct: Whether the mode was right, [task].
        method: "isotonic", any rising map, for some hundred tasks; "platt", two parameters, for
            fewer.

    Returns:
        The map, with the expected calibration error before and after.

    Raises:
        ShapeError: Different lengths.
        DataError: Fewer than 10 tasks, a confidence outside [0, 1], an unknown method, or all
            answers right (or wrong), which says nothing of confidence.

    Example:
        >>> stated = torch.linspace(0.5, 1.0, 200)
        >>> rng = torch.Generator().manual_seed(0)
        >>> right = torch.rand(200, generator=rng) < stated - 0.3
        >>> calibration = calibrate_confidence(stated, right)
        >>> calibration.error_after < calibration.error_before
        True
    """
    stated, right = _checked(confidences, correct)
    if method not in ("isotonic", "platt"):
        raise DataError(
            f"calibrate_confidence: expected method 'isotonic' or 'platt', got {method!r}"
        )
    n, n_right = len(stated), int(right.sum())
    if n < 10 or n_right in (0, n):
        raise DataError(
            "calibrate_confidence: expected at least 10 tasks with right and wrong answers, got "
            f"{n} tasks with {n_right} right"
        )
    folds = torch.arange(n) % 5
    held_out = torch.empty_like(stated)
    for fold in range(5):
        train, test = folds != fold, folds == fold
        held_out[test] = _apply(method, _fit(method, stated[train], right[train]), stated[test])
    return ConfidenceCalibration(
        method,
        _fit(method, stated, right),
        expected_calibration_error(stated, right),
        expected_calibration_error(held_out, right),
        n,
    )


def _fit(method: str, stated: Tensor, right: Tensor) -> Tensor:
    """Points of the isotonic map, or slope and intercept of Platt's."""
    with scope(rng=0, foreign=True):  # A first fit of scikit-learn draws from Python's stream.
        return _fitted(method, stated, right)


def _fitted(method: str, stated: Tensor, right: Tensor) -> Tensor:
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted: Any = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        fitted.fit(stated.numpy(), right.numpy())
        columns = (fitted.X_thresholds_, fitted.y_thresholds_)
        return torch.stack([torch.as_tensor(c, dtype=torch.float64) for c in columns], -1)
    if int(right.sum()) in (0, len(right)):
        share = (right.sum() + 1.0) / (len(right) + 2.0)
        return torch.tensor([[0.0, float(torch.logit(share))]], dtype=torch.float64)
    from sklearn.linear_model import LogisticRegression

    model: Any = LogisticRegression(C=100.0)
    model.fit(_log_odds(stated).unsqueeze(-1).numpy(), right.numpy().astype(int))
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    return torch.tensor([[slope, intercept]], dtype=torch.float64)


def _checked(
    confidences: Sequence[float] | Tensor, correct: Sequence[bool] | Tensor
) -> tuple[Tensor, Tensor]:
    stated = torch.as_tensor(confidences, dtype=torch.float64)
    right = torch.as_tensor(correct, dtype=torch.float64)
    if stated.ndim != 1 or stated.shape != right.shape:
        raise ShapeError(
            "confidences and correct: expected two rows [task] of one length, got shapes "
            f"{list(stated.shape)} and {list(right.shape)}"
        )
    if not len(stated) or not bool(((stated >= 0) & (stated <= 1)).all()):
        raise DataError(
            f"confidences: expected at least one, each in [0, 1], got {stated.tolist()[:5]}"
        )
    return stated, right
