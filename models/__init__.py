"""Models: one file or folder a family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probkit.models.arphmm import ARPHMM, Sequences, SwitchingPrior
from probkit.models.bnn import BNN
from probkit.models.deep_kernel_machine import DeepKernelMachine
from probkit.models.funbat import FunBaT, LogWarp, StudentTNoise, TensorData
from probkit.models.functional_prior import (
    LayerwiseBNN,
    MatchedPrior,
    PriorMatch,
    ProcessPrior,
    sliced_wasserstein,
)
from probkit.models.nngp import ScaleMixtureNNGP, ScaleProposal
from probkit.models.nngp_classification import (
    LabelledData,
    ScaleMixtureClassifier,
    SparseScaleGuide,
)
from probkit.models.nngp_ensemble import ScaleMixtureNetwork, WideEnsemble
from probkit.models.nngp_paths import SamplePaths, sample_paths
from probkit.models.pfn import (
    PFN,
    CurveNormalizer,
    CurvePrior,
    Curves,
    DistributionTransformer,
    GPPrior,
    LearningCurvePFN,
    LightningCallback,
    OptunaPruner,
    PFNGuide,
    TransformersCallback,
    amortize,
)
from probkit.models.sbl import EvidenceMaximization, KroneckerSBL, SparseRegression
from probkit.models.scale_laws import (
    BurrXII,
    Gamma,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    PointMass,
)
from probkit.models.scale_mixture_gp import ScaleMixture
from probkit.models.slates import (
    InSlateThompson,
    SlateGRU,
    SlateLog,
    SlateMeanField,
    recommend,
)
from probkit.models.state_space import (
    DiscreteHMM,
    LinearGaussian,
    StateSpaceModel,
    StochasticVolatility,
)

if TYPE_CHECKING:
    from probkit.models.language import (
        FiniteLM,
        LlamaCppLM,
        MarkovLM,
        OpenAILM,
        OracleLM,
        RecordingLM,
        ReplayLM,
        TransformersLM,
        load_smollm2,
        smollm2_path,
    )
    from probkit.models.sbl import (
        KroneckerSparseBayes,
        RVMClassifier,
        RVMRegressor,
        SparseBayesRegressor,
    )

__all__ = [
    "ARPHMM",
    "BNN",
    "BurrXII",
    "CurveNormalizer",
    "CurvePrior",
    "Curves",
    "DeepKernelMachine",
    "DiscreteHMM",
    "DistributionTransformer",
    "EvidenceMaximization",
    "FiniteLM",
    "FunBaT",
    "GPPrior",
    "Gamma",
    "HalfCauchy",
    "InSlateThompson",
    "InverseGamma",
    "KroneckerSBL",
    "KroneckerSparseBayes",
    "LabelledData",
    "LayerwiseBNN",
    "LearningCurvePFN",
    "LightningCallback",
    "LinearGaussian",
    "LlamaCppLM",
    "LogNormal",
    "LogWarp",
    "MarkovLM",
    "MatchedPrior",
    "OpenAILM",
    "OptunaPruner",
    "OracleLM",
    "PFN",
    "PFNGuide",
    "PointMass",
    "PriorMatch",
    "ProcessPrior",
    "RVMClassifier",
    "RVMRegressor",
    "RecordingLM",
    "ReplayLM",
    "SamplePaths",
    "ScaleMixture",
    "ScaleMixtureClassifier",
    "ScaleMixtureNNGP",
    "ScaleMixtureNetwork",
    "ScaleProposal",
    "Sequences",
    "SlateGRU",
    "SlateLog",
    "SlateMeanField",
    "SparseBayesRegressor",
    "SparseRegression",
    "SparseScaleGuide",
    "StateSpaceModel",
    "StochasticVolatility",
    "StudentTNoise",
    "SwitchingPrior",
    "TensorData",
    "TransformersCallback",
    "TransformersLM",
    "WideEnsemble",
    "amortize",
    "load_smollm2",
    "recommend",
    "sample_paths",
    "sliced_wasserstein",
    "smollm2_path",
]

_ESTIMATORS = ("KroneckerSparseBayes", "RVMClassifier", "RVMRegressor", "SparseBayesRegressor")
#: Language models, which load on first use.
_LANGUAGE = (
    "FiniteLM",
    "LlamaCppLM",
    "MarkovLM",
    "OpenAILM",
    "OracleLM",
    "RecordingLM",
    "ReplayLM",
    "TransformersLM",
    "load_smollm2",
    "smollm2_path",
)


def __getattr__(name: str) -> Any:
    """Load estimators (and with them scikit-learn) and language models on first use."""
    if name in _ESTIMATORS:
        from probkit.models import sbl

        return getattr(sbl, name)
    if name in _LANGUAGE:
        from probkit.models import language

        return getattr(language, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
