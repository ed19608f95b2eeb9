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
    from probkit.bo.calibration import Calibration
    from probkit.bo.domain import Domain
    from probkit.bo.evaluation import Measurement, Pruned
    from probkit.bo.llm import LLMCandidates, LLMSurrogate, LLMWarmStart
    from probkit.bo.optuna_sampler import ProbkitSampler
    from probkit.bo.outcomes import Constraint
    from probkit.bo.parameters import Categorical, Float, Int
    from probkit.bo.policy import Goal, acquisition_for, maximise
    from probkit.bo.space import Space
    from probkit.bo.study import Study
    from probkit.bo.surrogates import ExactEnsembleSampler, make_surrogate
    from probkit.bo.trials import Trial

_HOME = {
    "Calibration": "calibration",
    "Categorical": "parameters",
    "Constraint": "outcomes",
    "Domain": "domain",
    "ExactEnsembleSampler": "surrogates",
    "Float": "parameters",
    "Goal": "policy",
    "Int": "parameters",
    "LLMCandidates": "llm",
    "LLMSurrogate": "llm",
    "LLMWarmStart": "llm",
    "LogStudentTExpectedImprovement": "acquisition",
    "Measurement": "evaluation",
    "ProbkitSampler": "optuna_sampler",
    "Pruned": "evaluation",
    "Space": "space",
    "StudentTExpectedImprovement": "acquisition",
    "StudentTUpperConfidenceBound": "acquisition",
    "Study": "study",
    "Trial": "trials",
    "acquisition_for": "policy",
    "make_surrogate": "surrogates",
    "maximise": "policy",
}

__all__ = [
    "Calibration",
    "Categorical",
    "Constraint",
    "Domain",
    "ExactEnsembleSampler",
    "Float",
    "Goal",
    "Int",
    "LLMCandidates",
    "LLMSurrogate",
    "LLMWarmStart",
    "LogStudentTExpectedImprovement",
    "Measurement",
    "ProbkitSampler",
    "Pruned",
    "Space",
    "StudentTExpectedImprovement",
    "StudentTUpperConfidenceBound",
    "Study",
    "Trial",
    "acquisition_for",
    "make_surrogate",
    "maximise",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"probkit.bo.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'probkit.bo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
