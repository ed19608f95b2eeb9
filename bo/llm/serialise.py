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
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from probkit.bo.llm.formats import (
    DELIMITER,
    ChoiceFormat,
    Format,
    Rejected,
    check_label,
    finite,
    format_of,
    same,
)
from probkit.bo.space import Params, Space
from probkit.errors import DataError

__all__ = ["Parsed", "Serialiser"]

#: Longer answers are not read.
_LONGEST_ANSWER = 100_000


class Parsed(NamedTuple):
    """A configuration that was read, or why not.

    Attributes:
        params: The configuration; None where it was rejected.
        reason: Why it was rejected; empty where it was not.
    """

    params: dict[str, Any] | None
    reason: str = ""


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
            check_label(name, "parameter name")
        self._shown = dict(zip(space.names, shown, strict=True))
        self._own = {alias: name for name, alias in self._shown.items()}
        self._when = {row["name"]: row.get("when") for row in space.to_json()}
        self._formats = {
            name: format_of(name, parameter, decimals, warp)
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
            except Rejected as rejected:
                found.append(Parsed(None, str(rejected)))
                break
            found.append(self._guarded(tree, self._read_object))
        return found or [Parsed(None, "not json")]

    def _guarded(self, text: Any, read: Any) -> Parsed:
        if isinstance(text, str) and len(text) > _LONGEST_ANSWER:
            return Parsed(None, "too long")
        try:
            return Parsed(read(text))
        except Rejected as rejected:
            return Parsed(None, str(rejected))

    def _parse_answer(self, text: str) -> dict[str, Any]:
        body = text.strip().removeprefix(DELIMITER)
        inside, delimiter, _ = body.partition(DELIMITER)
        if not delimiter:
            raise Rejected("no delimiter")
        return self._read(_pairs(inside, ":"))

    def _parse_object(self, text: str) -> dict[str, Any]:
        begin = text.find("{")
        if begin < 0:
            raise Rejected("not json")
        try:
            tree, _ = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError):
            raise Rejected("not json") from None
        return self._read_object(tree)

    def _read_object(self, tree: Any) -> dict[str, Any]:
        if not isinstance(tree, _Object):
            raise Rejected("not an object")
        return self._read([(name, _json_text(self._format(name), v)) for name, v in tree.pairs])

    def _format(self, shown: str) -> Format:
        if shown not in self._own:
            raise Rejected("unknown parameter")
        return self._formats[self._own[shown]]

    def _read(self, pairs: list[tuple[str, str]]) -> dict[str, Any]:
        """Turn printed names and values into params."""
        found: dict[str, Any] = {}
        for shown, text in pairs:
            value = self._format(shown).read(text)
            if self._own[shown] in found:
                raise Rejected("repeated parameter")
            found[self._own[shown]] = value
        for name in self._needed(found):
            if name not in found:
                raise Rejected("missing parameter")
        try:
            return self.space.check(found)
        except DataError:  # a parameter too many: its condition does not hold
            raise Rejected("inactive parameter") from None

    def _needed(self, found: Params) -> list[str]:
        """Names of the parameters that are active for the values found."""

        def active(name: str) -> bool:
            when = self._when[name]
            if when is None:
                return True
            parent = when["parent"]
            return active(parent) and any(same(found.get(parent), v) for v in when["values"])

        return [name for name in self._when if active(name)]


def _pairs(body: str, separator: str) -> list[tuple[str, str]]:
    """Split ``name<separator>value, ...``."""
    pairs = []
    for part in body.strip().split(","):
        name, found, value = part.partition(separator)
        if not found:
            raise Rejected("no name and value")
        pairs.append((name.strip(), value.strip()))
    return pairs


class _Object:
    """A JSON object with all its pairs, repeated names included."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _constant(text: str) -> Any:
    raise Rejected("not finite")


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


def _json_text(form: Format, value: Any) -> str:
    """The text that a JSON value stands for in the grammar of one parameter."""
    if isinstance(form, ChoiceFormat):
        if isinstance(value, _NumberText):
            number = finite(value)
            near = [t for c, t in form.texts if not isinstance(c, bool | str) and c == number]
            return near[0] if near else str(value)
        if isinstance(value, str):
            strings = [text for choice, text in form.texts if isinstance(choice, str)]
            if value not in strings:
                raise Rejected("unknown choice")
            return value
        if isinstance(value, bool) or value is None:
            return json.dumps(value)
        raise Rejected("unknown choice")
    if not isinstance(value, _NumberText):
        raise Rejected("not a number")
    return str(value)
