"""A Markov chain over a handful of symbols as a language model: every probability is exact."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.files import register
from probkit.models.language.chat import prompt_value
from probkit.models.language.meter import Meter
from probkit.models.language.protocol import (
    Capabilities,
    Continuation,
    Law,
    Prefix,
    Prompt,
    Reason,
    Usage,
    extended,
)
from probkit.models.language.sampling import (
    DEAD_END,
    allowed_mask,
    check_pairs,
    check_request,
    draw_tokens,
    law_log_probs,
    stop_end,
    uniforms,
)

__all__ = ["MarkovLM"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_REASONS: tuple[Reason, ...] = ("length", "stop", "end", "failed")
_LENGTH, _STOP, _END, _FAILED = range(4)


class MarkovLM:
    """A Markov chain that generates symbols, for tests, teaching and demonstrations.

    Text is a row of symbols. The prompt is an opening that the chain does not read: the first
    symbol after it is drawn from ``initial``, every further one from the row of ``transition`` that
    belongs to the last symbols, after the chain has not ended there. Token k is ``symbols[k]``; the
    last token id is the end of the sequence.

    Args:
        initial: Law of the first symbol [symbol]. For a chain of order r, the r laws of the first
            symbols: tables [symbol], [symbol, symbol], ..., given what precedes.
        transition: Probabilities [symbol, symbol]; for order r a table of r + 1 such dimensions,
            the last one summing to one.
        end: Probability that the sequence ends after a symbol: one number, or one each [symbol].
        symbols: Texts of the symbols, none the beginning of another; None for a, b, c, ...

    Raises:
        ShapeError: Tables that do not fit together.
        DataError: Probabilities out of range, rows that do not sum to one, or symbols that cannot
            be told apart.

    Example:
        >>> lm = MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
        >>> prefixes = [lm.start("go")] * 2
        >>> rng = torch.Generator().manual_seed(0)
        >>> [step.text for step in lm.generate(prefixes, max_tokens=4, rng=rng)]
        ['bbbb', 'bbaa']
        >>> abb = Continuation((), "abb", 0.0, 0.0, "length", 3)
        >>> bool(lm.score(prefixes[:1], [abb]).exp().isclose(torch.tensor(0.04).double()))
        True
    """

    def __init__(
        self,
        initial: Any,
        transition: Any,
        *,
        end: Any = 0.0,
        symbols: Sequence[str] | None = None,
    ) -> None:
        self.transition = torch.as_tensor(transition, dtype=torch.float64)
        shape = self.transition.shape
        if self.transition.ndim < 2 or len(set(shape)) != 1:
            raise ShapeError(
                "MarkovLM: expected transition [symbol, symbol], one more dimension for each "
                f"further order, got shape {list(shape)}"
            )
        self.order, size = self.transition.ndim - 1, shape[0]
        self.initial = _openings(initial, self.order, size)
        self.end = _ends(end, size)
        self.symbols = _symbols(symbols, size)
        for name, table in (("initial", self.initial), ("transition", (self.transition,))):
            for each in table:
                _check_rows(name, each)
        self._chain = _Chain.of(self.initial, self.transition, self.end)
        self._laws: dict[tuple[float, float], Tensor] = {}
        self._meter = Meter()

    def __repr__(self) -> str:
        return f"MarkovLM(symbols={list(self.symbols)}, order={self.order})"

    # ---------------------------------------------------------------- the protocol

    @property
    def capabilities(self) -> Capabilities:
        """Everything, exactly."""
        return Capabilities(True, True, True, True, True, True, len(self.symbols) + 1)

    @property
    def usage(self) -> Usage:
        """What was spent since the model was made."""
        return self._meter.total

    @property
    def vocabulary(self) -> Sequence[str]:
        """The symbols, and the empty string for the end of the sequence."""
        return (*self.symbols, "")

    def start(self, prompt: Prompt) -> Prefix:
        """Return the prefix of a prompt, nothing generated yet.

        Raises:
            DataError: An empty prompt.
        """
        return Prefix(prompt_value(prompt))

    def generate(
        self,
        prefixes: Sequence[Prefix],
        *,
        stop: Sequence[str] = (),
        max_tokens: int,
        law: Law = Law(),  # noqa: B008 (frozen)
        base: Law | None = None,
        rng: torch.Generator,
    ) -> list[Continuation]:
        """Continue each prefix by one step; see :class:`LanguageModel`."""
        begun = time.perf_counter()
        check_request(prefixes, stop, max_tokens, rng)
        n, end = len(prefixes), len(self.symbols)
        u = uniforms(rng, n, max_tokens)
        masked = law.allowed is not None or (base is not None and base.allowed is not None)
        completes, may_complete = self._closing(stop)
        state = self._states(prefixes)
        tokens = torch.full((n, max_tokens), -1)
        log_q, log_p = torch.zeros(2, n, dtype=torch.float64)
        reason = torch.full((n,), _LENGTH)
        alive = torch.arange(n)
        for t in range(max_tokens):
            here = state[alive]
            seen = [self._after(prefixes[k], tokens[k, :t]) for k in alive.tolist() if masked]
            table = self._under(law, here, seen)
            drawn = draw_tokens(table, u[alive, t])
            step = table.gather(-1, drawn[:, None])[:, 0]
            log_q[alive] += step
            if base is not None:
                log_p[alive] += self._under(base, here, seen).gather(-1, drawn[:, None])[:, 0]
            tokens[alive, t] = drawn
            why = torch.where(drawn == end, _END, torch.where(completes[drawn], _STOP, _LENGTH))
            why[step == -torch.inf] = _FAILED
            for i in ((why == _LENGTH) & may_complete[drawn]).nonzero()[:, 0].tolist():
                text = self._text(tokens[alive[i], : t + 1].tolist())
                if stop_end(text, len(self.symbols[int(drawn[i])]), stop):
                    why[i] = _STOP
            reason[alive] = why
            on = why == _LENGTH
            alive, drawn, here = alive[on], drawn[on], here[on]
            if not len(alive):
                break
            state[alive] = self._chain.after[here, drawn]
        steps = self._continuations(tokens, log_q, log_q if base is None else log_p, reason)
        self._spend(prefixes, sum(step.n_tokens for step in steps), begun)
        return steps

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log p(step | prefix) [n]; symbols that the chain cannot emit have -inf.

        Raises:
            DataError: Text that is no row of symbols.
        """
        begun = time.perf_counter()
        check_pairs(prefixes, steps)
        chain, end = self._chain, len(self.symbols)
        total = torch.zeros(len(steps), dtype=torch.float64)
        states = self._states(prefixes).tolist()
        for k, (state, step) in enumerate(zip(states, steps, strict=True)):
            for token in self._ids(step.tokens) or self.tokenize(step.text):
                total[k] += chain.log_probs[state, token]
                state = int(chain.after[state, token])
            if step.reason == "end":
                total[k] += chain.log_probs[state, end]
        self._spend(prefixes, 0, begun)
        return total

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return normalised next-token log probabilities [n, token]; the end is the last one."""
        begun = time.perf_counter()
        table = self._chain.log_probs[self._states(prefixes)]
        self._spend(prefixes, 0, begun)
        return table

    # ---------------------------------------------------------------- exact answers

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Return the ids of the symbols that a text is made of.

        Raises:
            DataError: The text is no row of symbols.
        """
        ids, place = [], 0
        while place < len(text):
            found = [k for k, s in enumerate(self.symbols) if text.startswith(s, place)]
            if not found:
                raise DataError(
                    f"MarkovLM: no symbol of {list(self.symbols)} stands at character {place} of "
                    f"{text!r}"
                )
            ids.append(found[0])
            place += len(self.symbols[found[0]])
        return tuple(ids)

    def outcomes(
        self,
        max_tokens: int,
        *,
        prefix: Prefix | None = None,
        stop: Sequence[str] = (),
        law: Law = Law(),  # noqa: B008 (frozen)
    ) -> list[Continuation]:
        """Return every step of positive probability with its log probabilities.

        Args:
            max_tokens: At most so many tokens; there are up to ``len(symbols) ** max_tokens``.
            prefix: What they follow; None for a fresh start.
            stop: Stop strings.
            law: Law of ``log_q``; ``log_p`` is the chain's own.

        Returns:
            The possible results of ``generate``; the exponentials of ``log_q`` sum to one, unless
            ``law.allowed`` leads into dead ends.

        Example:
            >>> lm = MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], end=[0.0, 1.0])
            >>> [(s.text, s.reason) for s in lm.outcomes(2)]
            [('aa', 'length'), ('ab', 'length'), ('b', 'end')]
        """
        origin = Prefix("") if prefix is None else prefix
        end = len(self.symbols)
        found: list[Continuation] = []
        stack = [Continuation((), "", 0.0, 0.0, "length", 0)]
        while stack:
            step = stack.pop()
            here = extended(origin, step)
            state = self._states([here])
            q = self._under(law, state, [here])[0].tolist()
            p = self._chain.log_probs[state][0].tolist()
            for token in reversed(range(end + 1)):
                if q[token] == -torch.inf:
                    continue
                log_q, log_p = step.log_q + q[token], step.log_p + p[token]
                if token == end:
                    found.append(Continuation(*step[:2], log_q, log_p, "end", step.n_tokens + 1))
                    continue
                text = step.text + self.symbols[token]
                stopped = stop_end(text, len(self.symbols[token]), stop)
                longer = Continuation(
                    (*step.tokens, token),
                    text,
                    log_q,
                    log_p,
                    "stop" if stopped else "length",
                    step.n_tokens + 1,
                )
                done = stopped or longer.n_tokens == max_tokens
                (found if done else stack).append(longer)
        return sorted(found, key=lambda step: step.tokens)

    # ---------------------------------------------------------------- parts

    def _states(self, prefixes: Sequence[Prefix]) -> Tensor:
        """States of the chain after prefixes, [n]."""
        states = self._chain.states
        ends = [
            p.generated[-self.order :] if p.tokens or not p.text else self._history(p)
            for p in prefixes
        ]
        try:
            return torch.tensor([states[history] for history in ends], dtype=torch.long)
        except KeyError:
            for history in ends:
                self._ids(history)
            raise

    def _history(self, prefix: Prefix) -> tuple[int, ...]:
        """The last symbols of a prefix that holds no tokens, read from its text."""
        return self.tokenize(prefix.text)[-self.order :]

    def _ids(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        for token in tokens:
            if not 0 <= token < len(self.symbols):
                raise DataError(
                    f"MarkovLM: unknown token {token}; expected ids of symbols, 0 to "
                    f"{len(self.symbols) - 1}"
                )
        return tokens

    def _under(self, law: Law, state: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
        """Log probabilities of the next token under a law, [n, token]."""
        if law.allowed is not None:
            table = self._chain.log_probs[state]
            return law_log_probs(table, law, allowed_mask(law, prefixes, table.shape[-1]))
        key = (law.temperature, law.top_p)
        if key == (1.0, 1.0):
            return self._chain.log_probs[state]
        if key not in self._laws:
            self._laws[key] = law_log_probs(self._chain.log_probs, law)
        return self._laws[key][state]

    def _closing(self, stop: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Which tokens hold a stop string, and which may complete one, [token]."""
        hold = [any(s in symbol for s in stop) for symbol in self.symbols]
        may = [
            any(symbol.startswith(s[-j:]) for s in stop for j in range(1, len(s)))
            for symbol in self.symbols
        ]
        return torch.tensor([*hold, False]), torch.tensor([*may, False])

    def _text(self, ids: Sequence[int]) -> str:
        return "".join([self.symbols[token] for token in ids])

    def _after(self, prefix: Prefix, tokens: Tensor) -> Prefix:
        ids = tokens.tolist()
        text = prefix.text + self._text(ids)
        return Prefix(prefix.prompt, (*prefix.tokens, *ids), prefix.start, text)

    def _continuations(
        self, tokens: Tensor, log_q: Tensor, log_p: Tensor, reason: Tensor
    ) -> list[Continuation]:
        steps = []
        counts = (tokens >= 0).sum(-1).tolist()
        columns = (tokens.tolist(), counts, log_q.tolist(), log_p.tolist(), reason.tolist())
        for row, count, q, p, why in zip(*columns, strict=True):
            if why == _FAILED:
                steps.append(DEAD_END)
                continue
            ids = tuple(row[: count - (why == _END)])
            steps.append(Continuation(ids, self._text(ids), q, p, _REASONS[why], count))
        return steps

    def _spend(self, prefixes: Sequence[Prefix], generated: int, begun: float) -> None:
        read = sum(len(prefix.tokens) for prefix in prefixes)
        seconds = time.perf_counter() - begun
        self._meter.add(Usage(read, read, generated, 1, seconds=seconds))


class _Chain(NamedTuple):
    """A chain of any order over flat states: histories of 0 to ``order`` symbols.

    Attributes:
        log_probs: Of the next token, the end last, [state, token].
        after: State after a symbol, [state, symbol].
        states: State of a history.
    """

    log_probs: Tensor
    after: Tensor
    states: Mapping[tuple[int, ...], int]

    @classmethod
    def of(cls, initial: Sequence[Tensor], transition: Tensor, end: Tensor) -> _Chain:
        """Flatten the tables."""
        size, order = len(end), transition.ndim - 1
        tables = [*initial, transition]
        histories = [
            history
            for length in range(order + 1)
            for history in itertools.product(range(size), repeat=length)
        ]
        index = {history: k for k, history in enumerate(histories)}
        after = [[index[(*h, s)[-order:]] for s in range(size)] for h in histories]
        probs = torch.cat([table.reshape(-1, size) for table in tables])
        stop = torch.stack(
            [end[h[-1]] if h else torch.zeros((), dtype=end.dtype) for h in histories]
        )
        rows = torch.cat([probs * (1 - stop)[:, None], stop[:, None]], -1)
        return cls(rows.log(), torch.tensor(after), index)


def _openings(initial: Any, order: int, size: int) -> tuple[Tensor, ...]:
    """Tables of the first ``order`` symbols."""
    try:
        tables = (
            [torch.as_tensor(initial, dtype=torch.float64)]
            if order == 1 and not _is_nested(initial)
            else [torch.as_tensor(each, dtype=torch.float64) for each in initial]
        )
    except (TypeError, ValueError):
        tables = []
    expected = [(size,) * (k + 1) for k in range(order)]
    if [tuple(table.shape) for table in tables] != expected:
        raise ShapeError(
            f"MarkovLM: expected initial [symbol] with {size} symbols, for a chain of order "
            f"{order} tables of the shapes {[list(shape) for shape in expected]}, got shapes "
            f"{[list(table.shape) for table in tables]}"
        )
    return tuple(tables)


def _is_nested(initial: Any) -> bool:
    return (
        isinstance(initial, list | tuple) and bool(initial) and torch.as_tensor(initial[0]).ndim > 0
    )


def _ends(end: Any, size: int) -> Tensor:
    table = torch.as_tensor(end, dtype=torch.float64)
    if table.ndim > 1 or table.ndim == 1 and len(table) != size:
        raise ShapeError(
            f"MarkovLM: expected end to be one probability or one for each of {size} symbols, got "
            f"shape {list(table.shape)}"
        )
    if not bool(((table >= 0) & (table <= 1)).all()):
        raise DataError(f"MarkovLM: expected probabilities in [0, 1] for end, got {table.tolist()}")
    return table.expand(size).clone()


def _symbols(symbols: Sequence[str] | None, size: int) -> tuple[str, ...]:
    if symbols is None:
        if size > len(_LETTERS):
            raise DataError(f"MarkovLM: name the {size} symbols with symbols=[...]")
        return tuple(_LETTERS[:size])
    names = tuple(symbols)
    if len(names) != size or any(not isinstance(name, str) or not name for name in names):
        raise DataError(f"MarkovLM: expected {size} non-empty texts as symbols, got {list(names)}")
    for k, name in enumerate(names):
        for j, other in enumerate(names):
            if j != k and other.startswith(name):
                raise DataError(
                    f"MarkovLM: the symbol {name!r} begins the symbol {other!r}; their texts could "
                    "not be told apart"
                )
    return names


def _check_rows(name: str, table: Tensor) -> None:
    if not bool((table >= 0).all()):
        raise DataError(f"MarkovLM: expected probabilities >= 0 in {name}, got {table.min()}")
    gap = (table.sum(-1) - 1).abs().max()
    if not bool(gap < 1e-8):
        raise DataError(f"MarkovLM: expected rows of {name} that sum to 1, one is off by {gap:.3g}")


def _to_tree(lm: MarkovLM) -> dict[str, Any]:
    return {
        "initial": list(lm.initial),
        "transition": lm.transition,
        "end": lm.end,
        "symbols": list(lm.symbols),
    }


def _from_tree(tree: Mapping[str, Any]) -> MarkovLM:
    return MarkovLM(tree["initial"], tree["transition"], end=tree["end"], symbols=tree["symbols"])


register(MarkovLM, "MarkovLM", _to_tree, _from_tree)
