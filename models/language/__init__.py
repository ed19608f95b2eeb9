"""Language models: back ends behind one protocol, and guided generation as a probability model."""

from __future__ import annotations

from probkit.models.language.markov import MarkovLM
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

__all__ = [
    "Budget",
    "Capabilities",
    "Continuation",
    "LanguageModel",
    "Law",
    "MarkovLM",
    "Prefix",
    "Usage",
    "load_smollm2",
    "smollm2_path",
]
