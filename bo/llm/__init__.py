"""Language models inside Bayesian optimisation: first points, candidates and a surrogate.

Each part works alone in an ordinary BoTorch loop. Points are codes ``[row, parameter]`` of a
:class:`~probkit.bo.Space`, as the surrogates of a study see them (``space.codes``,
``space.from_codes``). What a model writes is read by a strict grammar and never evaluated; what
cannot be read is counted with its reason and never raises.

* :class:`LLMWarmStart` asks for first configurations, without any data.
* :class:`LLMSurrogate` predicts scores of configurations: from samples, from token probabilities
  (an exact discrete predictive density), or as the probability of being among the best.
* :class:`LLMCandidates` asks for configurations that would reach a target score.
* :class:`LLMHybrid` puts them together behind a Gaussian process that stays in charge: what
  ``Study(surrogate="llm")`` uses.

Names load on first use, as BoTorch itself does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probkit.bo.llm.acquisition import DiscreteExpectedImprovement, expected_improvement
    from probkit.bo.llm.calibration import (
        CoverageReport,
        SigmaCalibration,
        coverage_report,
        fit_calibration,
        leave_one_out,
    )
    from probkit.bo.llm.candidates import LLMCandidates, Proposal, target_score
    from probkit.bo.llm.cards import ProblemCard, card_from_frame
    from probkit.bo.llm.digits import DigitDensity, DigitTree
    from probkit.bo.llm.hybrid import Hybrid, Said, fit_hybrid
    from probkit.bo.llm.model import LLMModel
    from probkit.bo.llm.posterior import DiscretePosterior
    from probkit.bo.llm.reports import AnswerReport
    from probkit.bo.llm.script import GPScript
    from probkit.bo.llm.serialise import Serialiser
    from probkit.bo.llm.surrogate import LLMSurrogate
    from probkit.bo.llm.tuning import LLMHybrid
    from probkit.bo.llm.warm_start import LLMWarmStart

_HOME = {
    "AnswerReport": "reports",
    "CoverageReport": "calibration",
    "DigitDensity": "digits",
    "DigitTree": "digits",
    "DiscreteExpectedImprovement": "acquisition",
    "DiscretePosterior": "posterior",
    "GPScript": "script",
    "Hybrid": "hybrid",
    "LLMCandidates": "candidates",
    "LLMHybrid": "tuning",
    "LLMModel": "model",
    "LLMSurrogate": "surrogate",
    "LLMWarmStart": "warm_start",
    "ProblemCard": "cards",
    "Proposal": "candidates",
    "Said": "hybrid",
    "Serialiser": "serialise",
    "SigmaCalibration": "calibration",
    "card_from_frame": "cards",
    "coverage_report": "calibration",
    "expected_improvement": "acquisition",
    "fit_calibration": "calibration",
    "fit_hybrid": "hybrid",
    "leave_one_out": "calibration",
    "target_score": "candidates",
}

__all__ = [
    "AnswerReport",
    "CoverageReport",
    "DigitDensity",
    "DigitTree",
    "DiscreteExpectedImprovement",
    "DiscretePosterior",
    "GPScript",
    "Hybrid",
    "LLMCandidates",
    "LLMHybrid",
    "LLMModel",
    "LLMSurrogate",
    "LLMWarmStart",
    "ProblemCard",
    "Proposal",
    "Said",
    "Serialiser",
    "SigmaCalibration",
    "card_from_frame",
    "coverage_report",
    "expected_improvement",
    "fit_calibration",
    "fit_hybrid",
    "leave_one_out",
    "target_score",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"probkit.bo.llm.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
