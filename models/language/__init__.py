"""Language models: back ends behind one protocol, and guided generation as a probability model."""

from __future__ import annotations

from probkit.models.language.guided import GuidedGeneration
from probkit.models.language.markov import MarkovLM
from probkit.models.language.oracle import FiniteLM, OracleLM
from probkit.models.language.partial import Partial
from probkit.models.language.protocol import (
    Budget,
    Capabilities,
    Continuation,
    LanguageModel,
    Law,
    Prefix,
    Usage,
)
from probkit.models.language.smollm import load_smollm2, smollm2_path
from probkit.models.language.steps import Steps
from probkit.models.language.transformers_lm import TransformersLM

__all__ = [
    "Budget",
    "Capabilities",
    "Continuation",
    "FiniteLM",
    "GuidedGeneration",
    "LanguageModel",
    "Law",
    "MarkovLM",
    "OracleLM",
    "Partial",
    "Prefix",
    "Steps",
    "TransformersLM",
    "Usage",
    "load_smollm2",
    "smollm2_path",
]
