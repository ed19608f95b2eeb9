"""Hard constraints on text: regular expressions and grammars, weight 0 or 1."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.extras import require
from probkit.files import storable
from probkit.models.language.potentials.masks import AllowedTokens, TokenTrie
from probkit.models.language.potentials.ratings import shown
from probkit.models.language.protocol import Prefix

__all__ = ["GrammarPotential", "RegexPotential"]


def _hard(alive: Sequence[bool]) -> Tensor:
    """Log of 1 for what is alive, of 0 for what is not, [n]."""
    return torch.tensor([0.0 if each else -torch.inf for each in alive], dtype=torch.float64)


@storable
@dataclass(frozen=True)
class RegexPotential:
    r"""1 while the generated text can still become a full match of a pattern, else 0.

    A text that ends must match in full. The syntax is that of the package ``regex`` (a superset of
    ``re``); whether a text can be completed is exact for patterns without look-around and back
    references.

    Args:
        pattern: Anchored at both ends.
        ignore: Characters at the end of a finished text that the match leaves out, such as the
            stop string of the last step.
        timeout: Seconds for one match; patterns that backtrack without end are stopped.

    Raises:
        DataError: Not a pattern; later, a match that takes too long.
        MissingExtraError: The package ``regex`` is not installed.

    Example:
        >>> part = RegexPotential(r"[A-C]{2}-\d+")
        >>> texts = ["A", "AB-", "AB-7", "ABC"]
        >>> part.log_value([Prefix("No.", text=t) for t in texts], [False] * 4).exp().tolist()
        [1.0, 1.0, 1.0, 0.0]
        >>> part.log_value([Prefix("No.", text=t) for t in texts], [True] * 4).exp().tolist()
        [0.0, 0.0, 1.0, 0.0]
    """

    pattern: str
    ignore: str = ""
    timeout: float = 1.0

    kind = "value"

    def __post_init__(self) -> None:
        engine = require("regex", extra="llm")
        try:
            engine.compile(self.pattern)
        except (engine.error, TypeError) as error:
            raise DataError(
                f"RegexPotential: expected a regular expression, got {self.pattern!r}: {error}"
            ) from None

    def matches(self, text: str, *, partial: bool) -> bool:
        """Tell whether a text matches in full, or (``partial``) can be completed to a match."""
        engine = require("regex", extra="llm")
        if not partial and self.ignore:
            text = text.rstrip(self.ignore)
        try:
            found = engine.fullmatch(self.pattern, text, partial=partial, timeout=self.timeout)
        except TimeoutError:
            raise DataError(
                f"RegexPotential: {self.pattern!r} took more than {self.timeout:g} s on "
                f"{shown(text)}; write it without nested repeats"
            ) from None
        return found is not None

    def log_value(self, prefixes: Sequence[Prefix], finished: Sequence[bool]) -> Tensor:
        """Return 0 for texts that (can still) match, minus infinity for others, [n]."""
        return _hard(
            [
                self.matches(prefix.text, partial=not ends)
                for prefix, ends in zip(prefixes, finished, strict=True)
            ]
        )

    def allowed(self, vocabulary: Sequence[str]) -> Callable[[Prefix], Tensor]:
        """Return which tokens may follow a prefix, for ``Law(allowed=...)``.

        Args:
            vocabulary: ``lm.vocabulary``.
        """
        trie = TokenTrie(vocabulary)

        def mask(text: str) -> Tensor:
            ends = self.matches(text, partial=False)
            return trie.mask(lambda more: self.matches(text + more, partial=True), ends=ends)

        return AllowedTokens(mask)


@storable
@dataclass(frozen=True)
class GrammarPotential:
    r"""1 while the generated text can still become a sentence of a grammar, else 0.

    A text that ends must be a sentence. Parsing and token masks are those of the package
    ``llguidance``, which serving engines use for the same purpose.

    Args:
        grammar: Rules in the notation of Lark (``start: ...``; terminals in capitals), a JSON
            schema (a mapping or its text), or a regular expression in Rust's syntax.
        notation: "lark", "json" or "regex".
        ignore: Characters at the end of a finished text that do not belong to the sentence, such
            as the stop string of the last step.

    Raises:
        DataError: A grammar that cannot be read; the message says where.
        MissingExtraError: The package ``llguidance`` is not installed.

    Example:
        >>> sums = GrammarPotential('start: NUM ("+" NUM)*\nNUM: /[0-9]+/')
        >>> texts = ["1", "1+", "1++"]
        >>> sums.log_value([Prefix("=", text=t) for t in texts], [False] * 3).exp().tolist()
        [1.0, 1.0, 0.0]
        >>> sums.log_value([Prefix("=", text=t) for t in texts], [True] * 3).exp().tolist()
        [1.0, 0.0, 0.0]
    """

    grammar: Any
    notation: Literal["lark", "json", "regex"] = "lark"
    ignore: str = ""

    kind = "value"

    def __post_init__(self) -> None:
        if self.notation not in ("lark", "json", "regex"):
            raise DataError(
                "GrammarPotential: expected notation 'lark', 'json' or 'regex', got "
                f"{self.notation!r}"
            )
        matcher = require("llguidance", extra="llm").LLMatcher
        try:
            complaint = matcher.validate_grammar(self._compiled())
        except (ValueError, TypeError) as error:
            complaint = str(error)
        if complaint:
            raise DataError(f"GrammarPotential: cannot read the grammar: {complaint.strip()}")

    def _compiled(self) -> str:
        """The grammar in the parser's own form."""
        matcher = require("llguidance", extra="llm").LLMatcher
        if self.notation == "lark":
            return str(matcher.grammar_from_lark(self.grammar))
        if self.notation == "regex":
            return str(matcher.grammar_from_regex(self.grammar))
        is_mapping = isinstance(self.grammar, Mapping)
        schema = json.dumps(self.grammar) if is_mapping else self.grammar
        return str(matcher.grammar_from_json_schema(schema))

    def _after(self, start: _Start, text: str) -> Any:
        """The parser after a text; None where it cannot be continued to a sentence."""
        data = start.alphabet(text)
        parser = start.parser.deep_copy()
        if data and parser.try_consume_tokens(data) < len(data):
            if parser.is_error():
                raise DataError(
                    f"GrammarPotential: the parser gave up on {shown(text)}: {parser.get_error()}"
                )
            return None
        return parser

    def log_value(self, prefixes: Sequence[Prefix], finished: Sequence[bool]) -> Tensor:
        """Return 0 for texts that are (or can become) sentences, minus infinity else, [n]."""
        start = _start(self._compiled(), ())
        alive = []
        for prefix, ends in zip(prefixes, finished, strict=True):
            text = prefix.text.rstrip(self.ignore) if ends and self.ignore else prefix.text
            parser = self._after(start, text)
            alive.append(parser is not None and (not ends or parser.is_accepting()))
        return _hard(alive)

    def allowed(self, vocabulary: Sequence[str]) -> Callable[[Prefix], Tensor]:
        """Return which tokens may follow a prefix, for ``Law(allowed=...)``.

        Args:
            vocabulary: ``lm.vocabulary``.
        """
        texts = tuple(vocabulary)
        start = _start(self._compiled(), texts)
        ends = torch.tensor([not text for text in texts], dtype=torch.bool)
        places = torch.tensor(start.alphabet.places)
        readable = places >= 0

        def mask(text: str) -> Tensor:
            parser = self._after(start, text)
            if parser is None:
                return torch.zeros_like(ends)
            accepting = torch.tensor(parser.is_accepting())
            if parser.is_stopped():
                return ends & accepting
            bits = torch.frombuffer(bytearray(parser.compute_bitmask()), dtype=torch.uint8)
            allowed = (bits[places // 8] >> (places % 8)) & 1
            return torch.where(ends, accepting, allowed.bool() & readable)

        return AllowedTokens(mask)


class _Alphabet:
    """The distinct texts of a vocabulary and all single bytes: what a parser is fed with.

    Attributes:
        places: For each token of the vocabulary its number here, -1 where it has no text of its
            own (the end, parts of characters).
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        numbers: dict[bytes, int] = {}
        self.places = [
            numbers.setdefault(text.encode(), len(numbers))
            if text and "\N{REPLACEMENT CHARACTER}" not in text
            else -1
            for text in vocabulary
        ]
        self._bytes = [numbers.setdefault(bytes([b]), len(numbers)) for b in range(256)]
        self.tokens = [*numbers, b"\xff<end>"]
        self.eos_token_id = len(numbers)
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._bytes[byte] for byte in data]


class _Start(NamedTuple):
    """A parser at the start of a grammar, and its alphabet."""

    parser: Any
    alphabet: _Alphabet


@lru_cache(maxsize=8)
def _start(grammar: str, vocabulary: tuple[str, ...]) -> _Start:
    package = require("llguidance", extra="llm")
    alphabet = _Alphabet(vocabulary)
    tokenizer = package.LLTokenizer(package.TokenizerWrapper(alphabet))
    return _Start(package.LLMatcher(tokenizer, grammar, log_level=0), alphabet)
