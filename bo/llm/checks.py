"""Checks that all parts of a search with a language model share."""

from __future__ import annotations

from typing import Any

from probkit.bo.llm.cards import ProblemCard
from probkit.bo.space import Space
from probkit.errors import CapabilityError, DataError

__all__ = ["check_parts"]


def check_parts(what: str, lm: Any, space: Any, card: Any) -> None:
    """Check what all parts need.

    Raises:
        CapabilityError: ``lm`` is no language model.
        DataError: ``space`` or ``card`` is something else.
    """
    if not all(hasattr(type(lm), name) for name in ("start", "generate", "capabilities", "usage")):
        raise CapabilityError(
            f"{what}: expected a language model (start, generate, ...), got {type(lm).__name__}"
        )
    if not isinstance(space, Space):
        raise DataError(f"{what}: expected a Space, got {space!r}; write Space(x=Float(0, 1))")
    if not isinstance(card, ProblemCard):
        raise DataError(f"{what}: expected a ProblemCard, got {card!r}")
