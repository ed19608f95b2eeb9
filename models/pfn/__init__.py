"""Prior-data fitted networks: Bayesian prediction in one forward pass, and learning curves."""

from __future__ import annotations

from probkit.models.pfn.bars import BarDistribution
from probkit.models.pfn.curve_predictive import CurvePredictive
from probkit.models.pfn.curve_prior import CurvePrior
from probkit.models.pfn.curve_reference import (
    PolishedCurve,
    curve_posterior,
    polish,
    sampled_scores,
)
from probkit.models.pfn.curves import Curves
from probkit.models.pfn.learning_curve import LearningCurvePFN
from probkit.models.pfn.lightning_callback import LightningCallback
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.optuna_pruner import OptunaPruner
from probkit.models.pfn.stopping import RunWatch, StopDecision, checked_steps
from probkit.models.pfn.surprise import OutOfPriorWarning, PriorCheck
from probkit.models.pfn.transformers_callback import TransformersCallback

__all__ = [
    "BarDistribution",
    "CurveNormalizer",
    "CurvePredictive",
    "CurvePrior",
    "Curves",
    "LearningCurvePFN",
    "LightningCallback",
    "OptunaPruner",
    "OutOfPriorWarning",
    "PolishedCurve",
    "PriorCheck",
    "RunWatch",
    "StopDecision",
    "TransformersCallback",
    "checked_steps",
    "curve_posterior",
    "polish",
    "sampled_scores",
]
