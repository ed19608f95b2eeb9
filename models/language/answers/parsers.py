"""From text to answers: text is data, read by parsers and never evaluated.

A parser takes a text and returns a hashable answer, or None where there is none. Any function of
that kind will do; these are the common ones.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probkit.errors import DataError
from probkit.files import storable

__all__ = ["JsonField", "RegexGroup", "boxed", "last_number"]

_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![\d)])[-+\N{MINUS SIGN}])?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?![\d.]))?(?![A-Za-z_])"
)
_LONGEST = 300  # digits of a number
_OPENINGS = 64  # objects tried in one text, the last ones first
_KNOWN = frozenset(("type", "minimum", "maximum", "enum", "minLength", "maxLength", "pattern"))
_TYPES: Mapping[str, tuple[type, ...]] = {
    "number": (int, float),
    "integer": (int,),
    "string": (str,),
    "boolean": (bool,),
}


def _as_number(text: str) -> int | float | None:
    """Read a decimal number; None where it is too long or too large."""
    plain = text.replace(",", "").replace("\N{MINUS SIGN}", "-")
    if len(plain) > _LONGEST:
        return None
    value = float(plain)
    if not math.isfinite(value):
        return None
    if re.fullmatch(r"[-+]?\d+(?:\.0*)?", plain):
        return int(plain.partition(".")[0])
    return int(value) if value.is_integer() else value


def last_number(text: str) -> int | float | None:
    """Return the last number of a text; equal numbers are equal answers (7, 7.0 and 7.00 are one).

    Commas between thousands, signs and exponents are read; digits inside words are not.

    Example:
        >>> last_number("3 + 4 = 7.00, so the answer is 7."), last_number("x2 is none")
        (7, None)
    """
    found = None
    for match in _NUMBER.finditer(text):
        number = _as_number(match[0])
        found = found if number is None else number
    return found


def boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}`` of a text, braces balanced.

    Example:
        >>> boxed(r"so \boxed{\frac{1}{2}} it is"), boxed(r"\boxed{1")
        ('\\frac{1}{2}', None)
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip()
    return None


@storable
@dataclass(frozen=True)
class RegexGroup:
    r"""Reads a group of a pattern's matches.

    Args:
        pattern: In the syntax of ``re``.
        group: Number or name of the group; 0 is the whole match.
        last: Whether the last match counts, not the first.

    Raises:
        DataError: Not a pattern, or it has no such group.

    Example:
        >>> RegexGroup(r"Answer: (\w+)")("Answer: yes. No. Answer: no")
        'no'
    """

    pattern: str
    group: int | str = 1
    last: bool = True

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise DataError(
                f"RegexGroup: expected a regular expression, got {self.pattern!r}: {error}"
            ) from None
        known = {*range(compiled.groups + 1), *compiled.groupindex}
        if self.group not in known:
            raise DataError(
                f"RegexGroup: {self.pattern!r} has no group {self.group!r}; it has "
                f"{', '.join(map(str, sorted(known, key=str)))}"
            )

    def __call__(self, text: str) -> str | None:
        """Return the group's text; None where nothing matches."""
        found = None
        for match in re.finditer(self.pattern, text):
            found = match[self.group]
            if not self.last:
                break
        return None if found is None else found.strip()


@storable
@dataclass(frozen=True)
class JsonField:
    """Reads a field of the last JSON object in a text that obeys a schema.

    Args:
        name: Name of the field.
        schema: Of the field, the part of JSON Schema that concerns scalars: "type" ("number",
            "integer", "string", "boolean"), "minimum", "maximum", "enum", "minLength",
            "maxLength", "pattern".

    Raises:
        DataError: A schema with other words.

    Example:
        >>> grade = JsonField("grade", {"type": "integer", "minimum": 1, "maximum": 6})
        >>> grade('I would say {"grade": 2}.'), grade('{"grade": 7}'), grade('{"grade": "2"}')
        (2, None, None)
    """

    name: str
    schema: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.schema) - _KNOWN)
        kind = self.schema.get("type")
        if unknown or kind not in _TYPES:
            trouble = f"the words {', '.join(unknown)}" if unknown else f"type {kind!r}"
            raise DataError(
                f"JsonField: expected a schema with type {', '.join(sorted(_TYPES))} and of "
                f"{', '.join(sorted(_KNOWN))}, got {trouble}"
            )

    def __call__(self, text: str) -> Hashable | None:
        """Return the field's value; None where no object has a valid one."""
        for found in _objects(text):
            if self.name in found and self._obeys(found[self.name]):
                value: Hashable = found[self.name]
                if isinstance(value, float) and value.is_integer():
                    value = int(value)
                return value
        return None

    def _obeys(self, value: Any) -> bool:
        schema, kind = self.schema, self.schema["type"]
        if isinstance(value, bool) != (kind == "boolean") or not isinstance(value, _TYPES[kind]):
            return False
        if "enum" in schema and value not in schema["enum"]:
            return False
        if isinstance(value, str):
            short = len(value) < schema.get("minLength", 0)
            long = len(value) > schema.get("maxLength", math.inf)
            pattern = schema.get("pattern")
            return not (short or long or (pattern and not re.search(pattern, value)))
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        number: Any = value
        return bool(low <= number <= high and math.isfinite(number))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    """JSON objects of a text, the last one first; not those inside another."""
    found: list[Mapping[str, Any]] = []
    starts = [place for place, character in enumerate(text) if character == "{"]
    place = 0
    for start in starts[-_OPENINGS:]:
        if start < place:
            continue
        try:
            value, place = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        found.append(value)
    return iter(found[::-1])


def texts_of(particles: Sequence[Any]) -> list[str]:
    """Return the generated text of each particle; a particle that is a text stands for itself."""
    return [getattr(particle, "text", particle) for particle in particles]
