"""Language models: back ends behind one protocol, and guided generation as a probability model."""

from __future__ import annotations

from probkit.models.language.protocol import (
    Budget,
    Capabilities,
    Continuation,
    LanguageModel,
    Law,
    Prefix,
    Usage,
)

__all__ = [
    "Budget",
    "Capabilities",
    "Continuation",
    "LanguageModel",
    "Law",
    "Prefix",
    "Usage",
]
