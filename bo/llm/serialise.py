"""Configurations as text and back, by a grammar that accepts nothing else.

Three forms of one configuration, for prompts and for answers::

    max_depth is 15, act is relu                 a row of examples
    ## max_depth: 15, act: relu ##               an answer between delimiters
    {"max_depth": 15, "act": "relu"}             an answer as a JSON object

What is printed is rounded; what is read must name every active parameter once, and no other, with
values inside the bounds. Text is never evaluated, and no text makes reading raise.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from probkit.bo.parameters import Categorical, Float, Int, Parameter
from probkit.bo.space import Params, Space
from probkit.errors import DataError

__all__ = ["DELIMITER", "Parsed", "Serialiser", "read_number"]

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
#: Longer answers are not read.
_LONGEST_ANSWER = 100_000

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class Parsed(NamedTuple):
    """A configuration that was read, or why not.

    Attributes:
        params: The configuration; None where it was rejected.
        reason: Why it was rejected; empty where it was not.
    """

    params: dict[str, Any] | None
    reason: str = ""


class _Rejected(Exception):
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


class Serialiser:
    """Prints configurations of a space and reads them back.

    Args:
        space: The space.
        decimals: ``"auto"`` resolves a thousandth of each range (and the lower bound); ``"bound"``
            prints as many decimals as the lower bound has; or decimals by name. Numbers on a
            logarithmic scale get four significant digits with ``"auto"``.
        warp: Print the base-10 logarithm of floats on a logarithmic scale.
        anonymous: Print X1, X2, ... in place of the names.

    Raises:
        DataError: Names or choices that could not be told from the delimiters, are too long, or
            print alike.

    Example:
        >>> from probkit.bo import Categorical, Float, Int, Space
        >>> space = Space(depth=Int(1, 15), rate=Float(1e-4, 1, log=True),
        ...               act=Categorical(["relu", "tanh"]))
        >>> to_text = Serialiser(space)
        >>> to_text.answer({"depth": 3, "rate": 0.0123456, "act": "tanh"})
        '## depth: 3, rate: 0.01235, act: tanh ##'
        >>> to_text.parse("depth: 3, rate: 0.01235, act: tanh ##").params
        {'depth': 3, 'rate': 0.01235, 'act': 'tanh'}
        >>> to_text.parse("depth: 99, rate: 0.01235, act: tanh ##").reason
        'out of range'
    """

    def __init__(
        self,
        space: Space,
        *,
        decimals: Literal["auto", "bound"] | Mapping[str, int] = "auto",
        warp: bool = False,
        anonymous: bool = False,
    ) -> None:
        if isinstance(decimals, str) and decimals not in ("auto", "bound"):
            raise DataError(
                f"decimals: expected 'auto', 'bound' or a mapping of names, got {decimals!r}"
            )
        if not isinstance(decimals, str):
            unknown = [name for name in decimals if name not in space.names]
            if unknown:
                raise DataError(
                    f"decimals: unknown parameters: {', '.join(map(str, unknown))}; the space has "
                    f"{', '.join(space.names)}"
                )
        self.space, self.decimals, self.warp, self.anonymous = space, decimals, warp, anonymous
        shown = [f"X{k + 1}" for k in range(len(space))] if anonymous else space.names
        for name in space.names if not anonymous else ():
            _check_label(name, "parameter name")
        self._shown = dict(zip(space.names, shown, strict=True))
        self._own = {alias: name for name, alias in self._shown.items()}
        self._when = {row["name"]: row.get("when") for row in space.to_json()}
        self._formats = {
            name: _format_of(name, parameter, decimals, warp)
            for name, parameter in space.parameters.items()
        }

    # ------------------------------------------------------------------ printing

    def values(self, params: Params) -> dict[str, str]:
        """Return the printed value of each active parameter, by printed name.

        Raises:
            DataError: Params that are not of the space.
        """
        known = self.space.check(params)
        return {self._shown[name]: self._formats[name].text(known[name]) for name in known}

    def row(self, params: Params) -> str:
        """Return a configuration as in a row of examples."""
        return ", ".join(f"{name} is {value}" for name, value in self.values(params).items())

    def answer(self, params: Params) -> str:
        """Return a configuration between delimiters."""
        inside = ", ".join(f"{name}: {value}" for name, value in self.values(params).items())
        return f"{DELIMITER} {inside} {DELIMITER}"

    def to_json(self, params: Params) -> str:
        """Return a configuration as a JSON object."""
        known = self.space.check(params)
        parts = [
            f"{json.dumps(self._shown[name])}: {self._formats[name].json(value)}"
            for name, value in known.items()
        ]
        return "{" + ", ".join(parts) + "}"

    def longest(self) -> str:
        """Return a row as long as any, with all parameters."""
        return ", ".join(
            f"{self._shown[name]} is {form.longest()}" for name, form in self._formats.items()
        )

    def rounded(self, params: Params) -> dict[str, Any]:
        """Return the configuration that is printed: values to their printed precision."""
        known = self.space.check(params)
        return {
            name: self._formats[name].read(self._formats[name].text(v)) for name, v in known.items()
        }

    def describe(self) -> str:
        """Return one line for each parameter: type, range, precision and condition."""
        lines = []
        for row in self.space.to_json():
            line = f"- {self._shown[row['name']]}: {self._formats[row['name']].describe()}"
            if "when" in row:
                parent = row["when"]["parent"]
                texts = [self._formats[parent].text(v) for v in row["when"]["values"]]
                line += f"; only if {self._shown[parent]} is {' or '.join(texts)}"
            lines.append(line)
        return "\n".join(lines)

    # ------------------------------------------------------------------ reading

    def parse(self, text: str) -> Parsed:
        """Read an answer between delimiters, the first of which may belong to the prompt.

        Args:
            text: ``"name: value, name: value ##"``.
        """
        return self._guarded(text, self._parse_answer)

    def parse_row(self, text: str) -> Parsed:
        """Read a configuration as :meth:`row` prints it."""
        return self._guarded(text, lambda line: self._read(_pairs(line, " is ")))

    def parse_json(self, text: str) -> Parsed:
        """Read an answer that holds one JSON object; text around it is skipped."""
        return self._guarded(text, self._parse_object)

    def parse_json_list(self, text: str) -> list[Parsed]:
        """Read an answer that holds a JSON list of objects, as far as it goes.

        Returns:
            One entry for each object; one entry with a reason where there is no list.
        """
        if len(text) > _LONGEST_ANSWER:
            return [Parsed(None, "too long")]
        begin = text.find("[")
        if begin < 0:
            return [Parsed(None, "not json")]
        found, place = [], begin + 1
        while True:
            while place < len(text) and text[place] in ", \t\r\n":
                place += 1
            if place >= len(text) or text[place] == "]":
                break
            try:
                tree, place = _DECODER.raw_decode(text, place)
            except (ValueError, RecursionError):
                found.append(Parsed(None, "not json"))
                break
            except _Rejected as rejected:
                found.append(Parsed(None, str(rejected)))
                break
            found.append(self._guarded(tree, self._read_object))
        return found or [Parsed(None, "not json")]

    def _guarded(self, text: Any, read: Any) -> Parsed:
        if isinstance(text, str) and len(text) > _LONGEST_ANSWER:
            return Parsed(None, "too long")
        try:
            return Parsed(read(text))
        except _Rejected as rejected:
            return Parsed(None, str(rejected))

    def _parse_answer(self, text: str) -> dict[str, Any]:
        body = text.strip().removeprefix(DELIMITER)
        inside, delimiter, _ = body.partition(DELIMITER)
        if not delimiter:
            raise _Rejected("no delimiter")
        return self._read(_pairs(inside, ":"))

    def _parse_object(self, text: str) -> dict[str, Any]:
        begin = text.find("{")
        if begin < 0:
            raise _Rejected("not json")
        try:
            tree, _ = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError):
            raise _Rejected("not json") from None
        return self._read_object(tree)

    def _read_object(self, tree: Any) -> dict[str, Any]:
        if not isinstance(tree, _Object):
            raise _Rejected("not an object")
        return self._read([(name, _json_text(self._format(name), v)) for name, v in tree.pairs])

    def _format(self, shown: str) -> _Format:
        if shown not in self._own:
            raise _Rejected("unknown parameter")
        return self._formats[self._own[shown]]

    def _read(self, pairs: list[tuple[str, str]]) -> dict[str, Any]:
        """Turn printed names and values into params."""
        found: dict[str, Any] = {}
        for shown, text in pairs:
            value = self._format(shown).read(text)
            if self._own[shown] in found:
                raise _Rejected("repeated parameter")
            found[self._own[shown]] = value
        for name in self._needed(found):
            if name not in found:
                raise _Rejected("missing parameter")
        try:
            return self.space.check(found)
        except DataError:  # a parameter too many: its condition does not hold
            raise _Rejected("inactive parameter") from None

    def _needed(self, found: Params) -> list[str]:
        """Names of the parameters that are active for the values found."""

        def active(name: str) -> bool:
            when = self._when[name]
            if when is None:
                return True
            parent = when["parent"]
            return active(parent) and any(_same(found.get(parent), v) for v in when["values"])

        return [name for name in self._when if active(name)]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


# ---------------------------------------------------------------------- one parameter


class _Format(ABC):
    """How the values of one parameter are printed and read."""

    @abstractmethod
    def text(self, value: Any) -> str:
        """A value as it is printed."""

    def json(self, value: Any) -> str:
        """A value as JSON."""
        return self.text(value)

    @abstractmethod
    def read(self, text: str) -> Any:
        """The value of a text; raises ``_Rejected``."""

    @abstractmethod
    def describe(self) -> str:
        """Type, range and precision in words."""

    @abstractmethod
    def longest(self) -> str:
        """A text as long as that of any value."""


class _Whole(_Format):
    """Whole numbers."""

    def __init__(self, parameter: Int) -> None:
        self.parameter = parameter

    def text(self, value: Any) -> str:
        return str(value)

    def read(self, text: str) -> int:
        value = _finite(text)
        if not value.is_integer():
            raise _Rejected("not whole")
        if not self.parameter.low <= value <= self.parameter.high:
            raise _Rejected("out of range")
        return int(value)

    def longest(self) -> str:
        return max(str(self.parameter.low), str(self.parameter.high), key=len)

    def describe(self) -> str:
        scale = ", on a logarithmic scale" if self.parameter.log else ""
        return f"whole number from {self.parameter.low} to {self.parameter.high}{scale}"


class _Fixed(_Format):
    """Numbers with a fixed number of decimals."""

    def __init__(self, parameter: Float, decimals: int) -> None:
        self.low, self.high, self.decimals = parameter.low, parameter.high, decimals

    def text(self, value: Any) -> str:
        step = Decimal(1).scaleb(-self.decimals)
        printed = Decimal(f"{value:.{self.decimals}f}")
        return f"{_inside(printed, step, self.low, self.high):f}"

    def read(self, text: str) -> float:
        value = _finite(text)
        if not self.low <= value <= self.high:
            raise _Rejected("out of range")
        return value

    def longest(self) -> str:
        return max(self.text(self.low), self.text(self.high), key=len)

    def describe(self) -> str:
        return (
            f"number from {self.low:.15g} to {self.high:.15g}, {_count(self.decimals, 'decimal')}"
        )


class _SignificantDigits(_Format):
    """Numbers with a fixed number of significant digits, without an exponent."""

    def __init__(self, parameter: Float) -> None:
        self.low, self.high = parameter.low, parameter.high

    def text(self, value: Any) -> str:
        printed = Decimal(f"{value:.{_SIGNIFICANT - 1}e}")
        step = Decimal(1).scaleb(printed.adjusted() - _SIGNIFICANT + 1)
        inside = _inside(printed, step, self.low, self.high)
        return f"{inside:f}"

    def read(self, text: str) -> float:
        value = _finite(text)
        if not self.low <= value <= self.high:
            raise _Rejected("out of range")
        return value

    def longest(self) -> str:
        # Small numbers have leading zeros, large ones no point.
        return max(self.text(self.low), self.text(self.high), f"{1:.{_SIGNIFICANT - 1}f}", key=len)

    def describe(self) -> str:
        return (
            f"number from {_plain(self.low)} to {_plain(self.high)}, on a logarithmic scale, "
            f"{_SIGNIFICANT} significant digits"
        )


class _Warped(_Format):
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


class _Choice(_Format):
    """Choices, each by its exact text."""

    def __init__(self, name: str, parameter: Categorical) -> None:
        self.ordered = parameter.ordered
        self.texts = [(choice, _choice_text(choice)) for choice in parameter.choices]
        for choice, _ in self.texts:
            if isinstance(choice, str):
                _check_label(choice, f"choice of {name!r}", colon=True)
        if len({text for _, text in self.texts}) < len(self.texts):
            raise DataError(
                f"parameter {name!r}: expected choices that print differently, got "
                f"{[choice for choice, _ in self.texts]!r}"
            )

    def text(self, value: Any) -> str:
        return next(text for choice, text in self.texts if _same(choice, value))

    def json(self, value: Any) -> str:
        return json.dumps(value)

    def read(self, text: str) -> Any:
        for choice, printed in self.texts:
            if printed == text.strip():
                return choice
        raise _Rejected("unknown choice")

    def longest(self) -> str:
        return max((text for _, text in self.texts), key=len)

    def describe(self) -> str:
        order = ", in this order" if self.ordered else ""
        return f"one of {' | '.join(text for _, text in self.texts)}{order}"


def _format_of(
    name: str, parameter: Parameter, decimals: str | Mapping[str, int], warp: bool
) -> _Format:
    if isinstance(parameter, Int):
        return _Whole(parameter)
    if isinstance(parameter, Categorical):
        return _Choice(name, parameter)
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


def _finite(text: str) -> float:
    """The number of a text; rejects what is none, and what is not finite."""
    stripped = text.strip()
    if len(stripped) > _LONGEST or not _NUMBER.fullmatch(stripped):
        raise _Rejected("not a number")
    value = float(stripped)
    if not math.isfinite(value):
        raise _Rejected("not finite")
    return value


# ---------------------------------------------------------------------- text and JSON


def _check_label(text: str, what: str, *, colon: bool = False) -> None:
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


def _pairs(body: str, separator: str) -> list[tuple[str, str]]:
    """Split ``name<separator>value, ...``."""
    pairs = []
    for part in body.strip().split(","):
        name, found, value = part.partition(separator)
        if not found:
            raise _Rejected("no name and value")
        pairs.append((name.strip(), value.strip()))
    return pairs


class _Object:
    """A JSON object with all its pairs, repeated names included."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _constant(text: str) -> Any:
    raise _Rejected("not finite")


def _number_text(text: str) -> _NumberText:
    return _NumberText(text)


class _NumberText(str):
    """A JSON number as it was written."""

    __slots__ = ()


_DECODER = json.JSONDecoder(
    object_pairs_hook=_Object,
    parse_constant=_constant,
    parse_float=_number_text,
    parse_int=_number_text,
)


def _json_text(form: _Format, value: Any) -> str:
    """The text that a JSON value stands for in the grammar of one parameter."""
    if isinstance(form, _Choice):
        if isinstance(value, _NumberText):
            number = _finite(value)
            near = [t for c, t in form.texts if not isinstance(c, bool | str) and c == number]
            return near[0] if near else str(value)
        if isinstance(value, str):
            strings = [text for choice, text in form.texts if isinstance(choice, str)]
            if value not in strings:
                raise _Rejected("unknown choice")
            return value
        if isinstance(value, bool) or value is None:
            return json.dumps(value)
        raise _Rejected("unknown choice")
    if not isinstance(value, _NumberText):
        raise _Rejected("not a number")
    return str(value)
