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
        GuidedGeneration,
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
    from probkit.models.language.answers import answer_posterior
    from probkit.models.language.potentials import (
        GrammarPotential,
        JudgePotential,
        LikelihoodPotential,
        RegexPotential,
        RewardPotential,
        VerifierPotential,
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
    "PFN",
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
    "GrammarPotential",
    "GuidedGeneration",
    "HalfCauchy",
    "InSlateThompson",
    "InverseGamma",
    "JudgePotential",
    "KroneckerSBL",
    "KroneckerSparseBayes",
    "LabelledData",
    "LayerwiseBNN",
    "LearningCurvePFN",
    "LightningCallback",
    "LikelihoodPotential",
    "LinearGaussian",
    "LlamaCppLM",
    "LogNormal",
    "LogWarp",
    "MarkovLM",
    "MatchedPrior",
    "OpenAILM",
    "OptunaPruner",
    "OracleLM",
    "PFNGuide",
    "PointMass",
    "PriorMatch",
    "ProcessPrior",
    "RVMClassifier",
    "RVMRegressor",
    "RecordingLM",
    "RegexPotential",
    "ReplayLM",
    "RewardPotential",
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
    "VerifierPotential",
    "WideEnsemble",
    "amortize",
    "answer_posterior",
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
    "GuidedGeneration",
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
_POTENTIALS = (
    "GrammarPotential",
    "JudgePotential",
    "LikelihoodPotential",
    "RegexPotential",
    "RewardPotential",
    "VerifierPotential",
)


def __getattr__(name: str) -> Any:
    """Load estimators (and with them scikit-learn) and language models on first use."""
    if name in _ESTIMATORS:
        from probkit.models import sbl

        return getattr(sbl, name)
    if name in _LANGUAGE:
        from probkit.models import language

        return getattr(language, name)
    if name in _POTENTIALS:
        from probkit.models.language import potentials

        return getattr(potentials, name)
    if name == "answer_posterior":
        from probkit.models.language.answers import answer_posterior

        return answer_posterior
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
