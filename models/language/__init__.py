"""Language models: back ends behind one protocol, and guided generation as a probability model."""

from __future__ import annotations

from probkit.models.language.guided import GuidedGeneration
from probkit.models.language.http.ledger import Prices
from probkit.models.language.http.profile import Endpoint, ServerProfile
from probkit.models.language.http.retry import Retries
from probkit.models.language.llama_cpp import LlamaCppLM
from probkit.models.language.markov import MarkovLM
from probkit.models.language.openai_lm import OpenAILM
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
from probkit.models.language.replay import RecordingLM, ReplayLM
from probkit.models.language.smollm import load_smollm2, smollm2_path
from probkit.models.language.steps import Steps
from probkit.models.language.transformers_lm import TransformersLM

__all__ = [
    "Budget",
    "Capabilities",
    "Continuation",
    "Endpoint",
    "FiniteLM",
    "GuidedGeneration",
    "LanguageModel",
    "Law",
    "LlamaCppLM",
    "MarkovLM",
    "OpenAILM",
    "OracleLM",
    "Partial",
    "Prefix",
    "Prices",
    "RecordingLM",
    "ReplayLM",
    "Retries",
    "ServerProfile",
    "Steps",
    "TransformersLM",
    "Usage",
    "load_smollm2",
    "smollm2_path",
]
