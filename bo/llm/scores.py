"""Scores as text: printed with fixed decimals, read by one grammar wherever they come from.

A score is a decimal number without an exponent that is followed by white space, a delimiter or the
end of the text; two spaces and an opening delimiter may precede it. The same rule reads sampled
answers and prunes the tree of digits, so both have the same law.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from torch import Tensor

from probkit.bo.llm.formats import DELIMITER

__all__ = ["ReadScore", "Scale", "plausible", "print_score", "read_score", "score_decimals"]

#: A number may have so many digits before its point.
_MOST_DIGITS = 15
#: Steps between the smallest and the largest score that the decimals resolve.
_STEPS = 10_000

_DIGITS = f"[0-9]{{1,{_MOST_DIGITS}}}"
_SCORE = re.compile(rf" {{0,2}}(?:## {{0,2}})?(?P<number>-?{_DIGITS}(?:\.[0-9]+)?)(?=[\s#]|$)")
_PARTIAL = re.compile(rf" {{0,2}}(?:#?|(?:## {{0,2}})?(?:-?|-?{_DIGITS}(?:\.[0-9]*)?))")


class ReadScore(NamedTuple):
    """A score that was read, or why not.

    Attributes:
        value: The score; NaN where it was rejected.
        reason: Why it was rejected; empty where it was not.
    """

    value: float
    reason: str = ""


class Scale(NamedTuple):
    """The scale of scores seen so far.

    Attributes:
        low: The smallest.
        high: The largest.
        unit: Their range; where all are equal their size, and 1 for zeros.
    """

    low: float
    high: float
    unit: float

    @classmethod
    def of(cls, scores: Tensor) -> Scale:
        """Measure the scale of scores [row]."""
        low, high = float(scores.min()), float(scores.max())
        return cls(low, high, (high - low) or abs(high) or 1.0)


def plausible(scale: Scale, reach: float) -> tuple[float, float]:
    """Return the interval outside which an answer is taken for a slip.

    Args:
        scale: Of the scores seen.
        reach: How many times their range an answer may lie beyond them.
    """
    return scale.low - reach * scale.unit, scale.high + reach * scale.unit


def score_decimals(scores: Tensor, least: int = 6, steps: int = _STEPS) -> int:
    """Return how many decimals to print.

    Args:
        scores: Scores seen, [row].
        least: At least so many.
        steps: Resolve at least so many steps between the smallest and the largest score.

    Example:
        >>> import torch
        >>> small = torch.tensor([0.0, 1e-6], dtype=torch.float64)
        >>> score_decimals(torch.tensor([0.2, 0.5])), score_decimals(small)
        (6, 10)
    """
    return max(least, math.ceil(-math.log10(Scale.of(scores).unit / steps) - 1e-9))


def print_score(value: float, decimals: int) -> str:
    """Print a score with fixed decimals; zero has no sign.

    Example:
        >>> print_score(0.9120879, 6), print_score(-1e-9, 2)
        ('0.912088', '0.00')
    """
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if not float(text) else text


def read_score(
    text: str,
    decimals: int,
    *,
    cut: bool = False,
    between: tuple[float, float] = (-math.inf, math.inf),
) -> ReadScore:
    """Read the score that an answer begins with, to its first ``decimals`` decimals.

    Args:
        text: The answer, after the delimiter that opens it.
        decimals: Decimals that count; further ones are cut.
        cut: Whether the text was cut off, so that a number at its end may lack digits.
        between: Smallest and largest score to accept.

    Example:
        >>> read_score(" 0.912 ##", 3).value, read_score("0.5.1", 3).reason
        (0.912, 'not a number')
    """
    found = _SCORE.match(text)
    if found is None:
        return ReadScore(math.nan, "not a number")
    number = found["number"]
    if cut and found.end() == len(text) and not is_complete(number, decimals):
        return ReadScore(math.nan, "cut off")
    value = float(shortened(number, decimals))
    if not between[0] <= value <= between[1]:
        return ReadScore(math.nan, "out of range")
    return ReadScore(value)


def is_complete(number: str, decimals: int) -> bool:
    """Whether a number has all its decimals."""
    _, point, fraction = number.partition(".")
    return bool(point) and len(fraction) >= max(decimals, 1)


def shortened(number: str, decimals: int) -> str:
    """Cut the decimals of a number that are too many."""
    whole, point, fraction = number.partition(".")
    return f"{whole}.{fraction[:decimals]}" if point and decimals else whole


def can_grow(text: str) -> bool:
    """Whether a text is the beginning of an answer that holds a score, not yet ended."""
    return _PARTIAL.fullmatch(text) is not None


def ended(text: str) -> str | None:
    """The number of an answer that has ended; None where it holds none."""
    found = _SCORE.match(text)
    return None if found is None else found["number"]


def number_of(text: str) -> str:
    """The number that an answer which can grow has reached so far; empty before its first sign."""
    return text.strip(f" {DELIMITER[0]}")
