"""How the values of one parameter are printed and read."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from probkit.bo.parameters import Categorical, Float, Int, Parameter
from probkit.errors import DataError

__all__ = ["read_number"]

DELIMITER = "##"
"""What encloses answers."""

#: Significant digits of numbers on a logarithmic scale.
_SIGNIFICANT = 4
#: Numbers are printed finely enough for so many steps between their bounds.
_STEPS = 1000
#: More decimals than these are never taken from a bound.
_MOST_DECIMALS = 6
#: Longer names, choices and numbers are refused.
_LONGEST = 64

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class Rejected(Exception):
    """Carries the reason from where text is rejected to where that is counted."""


def read_number(text: str) -> float | None:
    """Return the finite number that a text is, in whole; None for anything else.

    Example:
        >>> [read_number(t) for t in ("-1.5e-3", "1e309", "nan", "0.5.1", "1_000", "٣")]
        [-0.0015, None, None, None, None, None]
    """
    text = text.strip()
    if len(text) > _LONGEST or not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


class Format(ABC):
    """How the values of one parameter are printed and read."""

    @abstractmethod
    def text(self, value: Any) -> str:
        """A value as it is printed."""

    def json(self, value: Any) -> str:
        """A value as JSON."""
        return self.text(value)

    @abstractmethod
    def read(self, text: str) -> Any:
        """The value of a text; raises ``Rejected``."""

    @abstractmethod
    def describe(self) -> str:
        """Type, range and precision in words."""

    @abstractmethod
    def longest(self) -> str:
        """A text as long as that of any value."""


class _Whole(Format):
    """Whole numbers."""

    def __init__(self, parameter: Int) -> None:
        self.parameter = parameter

    def text(self, value: Any) -> str:
        return str(value)

    def read(self, text: str) -> int:
        value = finite(text)
        if not value.is_integer():
            raise Rejected("not whole")
        if not self.parameter.low <= value <= self.parameter.high:
            raise Rejected("out of range")
        return int(value)

    def longest(self) -> str:
        return max(str(self.parameter.low), str(self.parameter.high), key=len)

    def describe(self) -> str:
        scale = ", on a logarithmic scale" if self.parameter.log else ""
        return f"whole number from {self.parameter.low} to {self.parameter.high}{scale}"


class _Fixed(Format):
    """Numbers with a fixed number of decimals."""

    def __init__(self, parameter: Float, decimals: int) -> None:
        self.low, self.high, self.decimals = parameter.low, parameter.high, decimals

    def text(self, value: Any) -> str:
        step = Decimal(1).scaleb(-self.decimals)
        printed = Decimal(f"{value:.{self.decimals}f}")
        return f"{_inside(printed, step, self.low, self.high):f}"

    def read(self, text: str) -> float:
        value = finite(text)
        if not self.low <= value <= self.high:
            raise Rejected("out of range")
        return value

    def longest(self) -> str:
        return max(self.text(self.low), self.text(self.high), key=len)

    def describe(self) -> str:
        return (
            f"number from {self.low:.15g} to {self.high:.15g}, {_count(self.decimals, 'decimal')}"
        )


class _SignificantDigits(Format):
    """Numbers with a fixed number of significant digits, without an exponent."""

    def __init__(self, parameter: Float) -> None:
        self.low, self.high = parameter.low, parameter.high

    def text(self, value: Any) -> str:
        printed = Decimal(f"{value:.{_SIGNIFICANT - 1}e}")
        step = Decimal(1).scaleb(printed.adjusted() - _SIGNIFICANT + 1)
        inside = _inside(printed, step, self.low, self.high)
        return f"{inside:f}"

    def read(self, text: str) -> float:
        value = finite(text)
        if not self.low <= value <= self.high:
            raise Rejected("out of range")
        return value

    def longest(self) -> str:
        # Small numbers have leading zeros, large ones no point.
        return max(self.text(self.low), self.text(self.high), f"{1:.{_SIGNIFICANT - 1}f}", key=len)

    def describe(self) -> str:
        return (
            f"number from {_plain(self.low)} to {_plain(self.high)}, on a logarithmic scale, "
            f"{_SIGNIFICANT} significant digits"
        )


class _Warped(Format):
    """Base-10 logarithms with a fixed number of decimals."""

    def __init__(self, parameter: Float, decimals: int) -> None:
        self.low, self.high = parameter.low, parameter.high
        self.logs = _Fixed(Float(math.log10(self.low), math.log10(self.high)), decimals)

    def text(self, value: Any) -> str:
        return self.logs.text(math.log10(value))

    def read(self, text: str) -> float:
        # The power of a printed bound may pass the bound by rounding.
        return min(max(10.0 ** self.logs.read(text), self.low), self.high)

    def longest(self) -> str:
        return self.logs.longest()

    def describe(self) -> str:
        return f"base-10 logarithm of the value, {self.logs.describe()}"


class ChoiceFormat(Format):
    """Choices, each by its exact text."""

    def __init__(self, name: str, parameter: Categorical) -> None:
        self.ordered = parameter.ordered
        self.texts = [(choice, _choice_text(choice)) for choice in parameter.choices]
        for choice, _ in self.texts:
            if isinstance(choice, str):
                check_label(choice, f"choice of {name!r}", colon=True)
        if len({text for _, text in self.texts}) < len(self.texts):
            raise DataError(
                f"parameter {name!r}: expected choices that print differently, got "
                f"{[choice for choice, _ in self.texts]!r}"
            )

    def text(self, value: Any) -> str:
        return next(text for choice, text in self.texts if same(choice, value))

    def json(self, value: Any) -> str:
        return json.dumps(value)

    def read(self, text: str) -> Any:
        for choice, printed in self.texts:
            if printed == text.strip():
                return choice
        raise Rejected("unknown choice")

    def longest(self) -> str:
        return max((text for _, text in self.texts), key=len)

    def describe(self) -> str:
        order = ", in this order" if self.ordered else ""
        return f"one of {' | '.join(text for _, text in self.texts)}{order}"


def format_of(
    name: str, parameter: Parameter, decimals: str | Mapping[str, int], warp: bool
) -> Format:
    if isinstance(parameter, Int):
        return _Whole(parameter)
    if isinstance(parameter, Categorical):
        return ChoiceFormat(name, parameter)
    assert isinstance(parameter, Float)
    given = None if isinstance(decimals, str) else decimals.get(name)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 0):
        raise DataError(f"decimals of {name!r}: expected a whole number >= 0, got {given!r}")
    if parameter.log and warp:
        low, high = math.log10(parameter.low), math.log10(parameter.high)
        return _Warped(parameter, _resolving(low, high, _STEPS) if given is None else given)
    if given is not None or decimals == "bound":
        wanted = _decimals(parameter.low) if given is None else given
        # Two printed values at least, else there is nothing to choose.
        return _Fixed(parameter, max(wanted, _resolving(parameter.low, parameter.high, 2)))
    if parameter.log:
        return _SignificantDigits(parameter)
    fine = _resolving(parameter.low, parameter.high, _STEPS)
    return _Fixed(parameter, max(fine, min(_decimals(parameter.low), _MOST_DECIMALS)))


def _decimals(value: float) -> int:
    """Decimals of the shortest text of a number."""
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    return max(0, -exponent)


def _resolving(low: float, high: float, steps: int) -> int:
    """Decimals that resolve so many steps between two numbers."""
    return max(0, math.ceil(-math.log10((high - low) / steps) - 1e-9))


def _inside(printed: Decimal, step: Decimal, low: float, high: float) -> Decimal:
    """Move a rounded number by one step where rounding has led over a bound."""
    if float(printed) > high:
        printed -= step
    elif float(printed) < low:
        printed += step
    return printed


def _plain(value: float) -> str:
    """A number without an exponent."""
    return f"{Decimal(repr(value)).normalize():f}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _choice_text(choice: Any) -> str:
    return choice if isinstance(choice, str) else json.dumps(choice)


def finite(text: str) -> float:
    """The number of a text; rejects what is none, and what is not finite."""
    stripped = text.strip()
    if len(stripped) > _LONGEST or not _NUMBER.fullmatch(stripped):
        raise Rejected("not a number")
    value = float(stripped)
    if not math.isfinite(value):
        raise Rejected("not finite")
    return value


def check_label(text: str, what: str, *, colon: bool = False) -> None:
    """Refuse names and choices that the grammar could not tell from its own signs."""
    if len(text) > _LONGEST:
        raise DataError(
            f"{what}: expected at most {_LONGEST} characters, got {len(text)}: {text[:20]!r}...; "
            "rename it, or use anonymous=True"
        )
    forbidden = [sign for sign in (DELIMITER, "#", ",", '"', "`", " is ") if sign in text]
    forbidden += [":"] if ":" in text and not colon else []
    forbidden += [
        repr(c)[1:-1] for c in text if unicodedata.category(c).startswith(("C", "Zl", "Zp"))
    ]
    if forbidden or text != text.strip() or not text:
        found = forbidden[0] if forbidden else "spaces at its ends"
        raise DataError(
            f"{what}: {text!r} contains {found}, which delimits answers; rename it"
            + ("" if what.startswith("choice") else ", or use anonymous=True")
        )


def same(a: Any, b: Any) -> bool:
    """Whether two choices are one; 1 and True are two."""
    return type(a) is type(b) and bool(a == b)
