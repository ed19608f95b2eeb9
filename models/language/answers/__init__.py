"""From weighted texts to a posterior over answers, and to confidence that can be believed."""

from __future__ import annotations

from probkit.models.language.answers.confidence import (
    ConfidenceCalibration,
    calibrate_confidence,
    expected_calibration_error,
)
from probkit.models.language.answers.parsers import JsonField, RegexGroup, boxed, last_number
from probkit.models.language.answers.posterior import AnswerPosterior, answer_posterior, vote

__all__ = [
    "AnswerPosterior",
    "ConfidenceCalibration",
    "JsonField",
    "RegexGroup",
    "answer_posterior",
    "boxed",
    "calibrate_confidence",
    "expected_calibration_error",
    "last_number",
    "vote",
]
