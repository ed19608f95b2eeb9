"""What partial answers are rated by."""

from __future__ import annotations

from probkit.models.language.potentials.base import (
    Potential,
    StepPotential,
    ValuePotential,
    kind_of,
)
from probkit.models.language.potentials.combine import All, AsSteps, Power
from probkit.models.language.potentials.constraints import GrammarPotential, RegexPotential
from probkit.models.language.potentials.judge import JudgePotential
from probkit.models.language.potentials.likelihood import LikelihoodPotential, ModelLikelihood
from probkit.models.language.potentials.masks import tokens_where
from probkit.models.language.potentials.reward import RewardPotential
from probkit.models.language.potentials.verifier import VerifierPotential

__all__ = [
    "All",
    "AsSteps",
    "GrammarPotential",
    "JudgePotential",
    "LikelihoodPotential",
    "ModelLikelihood",
    "Potential",
    "Power",
    "RegexPotential",
    "RewardPotential",
    "StepPotential",
    "ValuePotential",
    "VerifierPotential",
    "kind_of",
    "tokens_where",
]
