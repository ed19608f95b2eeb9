"""Bayesian optimisation on top of BoTorch. Names load on first use, as BoTorch itself does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probkit.bo.acquisition import (
        LogStudentTExpectedImprovement,
        StudentTExpectedImprovement,
        StudentTUpperConfidenceBound,
    )

_HOME = {
    "LogStudentTExpectedImprovement": "acquisition",
    "StudentTExpectedImprovement": "acquisition",
    "StudentTUpperConfidenceBound": "acquisition",
}

__all__ = [
    "LogStudentTExpectedImprovement",
    "StudentTExpectedImprovement",
    "StudentTUpperConfidenceBound",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"probkit.bo.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'probkit.bo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
