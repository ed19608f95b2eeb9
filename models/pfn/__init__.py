"""Prior-data fitted networks: Bayesian prediction in one forward pass, and learning curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probkit.models.pfn.amortization import amortize
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
from probkit.models.pfn.distribution_transformer import (
    DistributionTransformer,
    MixturePriors,
    NormalVariance,
    TransformerShape,
    train_distribution_transformer,
)
from probkit.models.pfn.gp_prior import GPPrior
from probkit.models.pfn.latent_guide import PFNGuide
from probkit.models.pfn.learning_curve import LearningCurvePFN
from probkit.models.pfn.lightning_callback import LightningCallback
from probkit.models.pfn.network import PFNNetwork, PFNSize
from probkit.models.pfn.normal_mixture import NormalMixture
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.onnx_export import export_onnx
from probkit.models.pfn.optuna_pruner import OptunaPruner
from probkit.models.pfn.predictor import PFN
from probkit.models.pfn.stopping import RunWatch, StopDecision, checked_steps
from probkit.models.pfn.surprise import OutOfPriorWarning, PriorCheck
from probkit.models.pfn.training import TrainingPlan
from probkit.models.pfn.transformers_callback import TransformersCallback

if TYPE_CHECKING:
    from probkit.models.pfn.botorch_model import (
        BarExpectedImprovement,
        BarPosterior,
        PFNBotorchModel,
    )

__all__ = [
    "BarDistribution",
    "BarExpectedImprovement",
    "BarPosterior",
    "CurveNormalizer",
    "CurvePredictive",
    "CurvePrior",
    "Curves",
    "DistributionTransformer",
    "GPPrior",
    "LearningCurvePFN",
    "LightningCallback",
    "MixturePriors",
    "NormalMixture",
    "NormalVariance",
    "OptunaPruner",
    "OutOfPriorWarning",
    "PFN",
    "PFNBotorchModel",
    "PFNGuide",
    "PFNNetwork",
    "PFNSize",
    "PolishedCurve",
    "PriorCheck",
    "RunWatch",
    "StopDecision",
    "TrainingPlan",
    "TransformerShape",
    "TransformersCallback",
    "amortize",
    "checked_steps",
    "curve_posterior",
    "export_onnx",
    "polish",
    "sampled_scores",
    "train_distribution_transformer",
]

_BOTORCH = ("BarExpectedImprovement", "BarPosterior", "PFNBotorchModel")


def __getattr__(name: str) -> Any:
    """Load what stands on BoTorch on first use."""
    if name in _BOTORCH:
        from probkit.models.pfn import botorch_model

        return getattr(botorch_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
