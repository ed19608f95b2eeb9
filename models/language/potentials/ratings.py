"""Checks on what rating functions return, and the texts that they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.models.language.protocol import Prefix

__all__ = ["as_number", "check_clip", "log_scores", "prompt_text", "shown"]


def shown(text: str, longest: int = 60) -> str:
    """Quote a text for a message, shortened.

    Example:
        >>> shown("a" * 100, longest=5)
        "'aaaaa...'"
    """
    return repr(text if len(text) <= longest else f"{text[:longest]}...")


def prompt_text(prefix: Prefix) -> str:
    """Return the prompt as text; of a chat, the contents of its messages, one a paragraph.

    Example:
        >>> prompt_text(Prefix((("user", "2 + 2?"),)))
        '2 + 2?'
    """
    if isinstance(prefix.prompt, str):
        return prefix.prompt
    return "\n\n".join(content for _, content in prefix.prompt)


def as_number(who: str, value: Any, text: str) -> float:
    """Return a score as a float; booleans count as 0 and 1.

    Raises:
        DataError: It is no number, or NaN.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    number = float(value) if isinstance(value, Real | bool) else math.nan
    if math.isnan(number):
        raise DataError(f"{who}: expected a number for the text {shown(text)}, got {value!r}")
    return number


def log_scores(
    who: str, values: Any, texts: Sequence[str], *, probability: bool, clip: float = 0.0
) -> Tensor:
    """Check scores and take their logarithm.

    Args:
        who: Named in errors.
        values: n scores, a sequence or a tensor [n].
        texts: The n texts that were rated, for errors.
        probability: Whether scores lie in [0, 1] and the logarithm is to be taken; else they are
            logarithms already, finite or minus infinity.
        clip: Probabilities are brought into [clip, 1 - clip].

    Returns:
        [n], float64.

    Raises:
        ShapeError: Not one score for each text.
        DataError: A score is no number, NaN, plus infinity, or outside [0, 1].
    """
    flat = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(flat) != len(texts):
        raise ShapeError(f"{who}: expected {len(texts)} scores, one for each text, got {len(flat)}")
    numbers = [as_number(who, value, text) for value, text in zip(flat, texts, strict=True)]
    for number, text in zip(numbers, texts, strict=True):
        if probability and not 0.0 <= number <= 1.0:
            raise DataError(
                f"{who}: expected scores in [0, 1], got {number:g} for the text {shown(text)}; "
                "rescale them, or return logarithms and say so where the potential takes them"
            )
        if number == math.inf:
            raise DataError(
                f"{who}: expected finite log scores or -inf, got +inf for the text {shown(text)}"
            )
    scores = torch.tensor(numbers, dtype=torch.float64)
    return scores.clamp(clip, 1.0 - clip).log() if probability else scores


def check_clip(who: str, clip: float) -> None:
    """Check a clipping bound of probabilities.

    Raises:
        DataError: It is not in [0, 0.5).
    """
    if not 0.0 <= clip < 0.5:
        raise DataError(f"{who}: expected 0 <= clip < 0.5, got {clip!r}")
