"""Language models without a network: scripted answers with faults, and exact laws over answers."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.language.chat import prompt_value
from probkit.models.language.meter import Meter
from probkit.models.language.protocol import (
    Budget,
    Capabilities,
    Continuation,
    Law,
    Prefix,
    Prompt,
    Reason,
    Usage,
)
from probkit.models.language.sampling import (
    DEAD_END,
    allowed_mask,
    check_request,
    law_log_probs,
    stop_end,
    uniforms,
)
from probkit.rng import seed_of, stream

__all__ = ["FiniteLM", "OracleLM", "Script"]

REFUSAL = "I'm sorry, but I can't help with that."
"""What a refusal says."""

MALFORMED = (
    "",
    "nan ##",
    " 1e309 ##",
    " 0.5.1 ##",
    " about a half ##",
    "##",
    '{"x": }',
    "[{",
    " x: one, y ##",
    " __import__('os').getcwd() ##",
)
"""What malformed answers say."""

_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_CHARACTERS = ("\n", *map(chr, range(32, 127)))


@runtime_checkable
class Script(Protocol):
    """Anything that answers prompts."""

    def answer(self, prompt: str, rng: torch.Generator) -> str:
        """Return the text that follows a prompt; the messages of a chat come as paragraphs."""
        ...


class OracleLM:
    """A scripted language model whose answers fail at given rates, for tests and robustness runs.

    An answer is drawn whole from the script, then cut at a stop string or the number of tokens. The
    script decides what is random; temperature and nucleus are taken and not used, as by servers
    that ignore them, but for temperature 0, which always gives the same answer. There are no log
    probabilities. Tokens are characters.

    Args:
        script: Answers prompts: a :class:`Script`, or a function ``(prompt, rng) -> text``.
        malformed: Rate of answers that follow no grammar (``"nan"``, ``"0.5.1"``, half a JSON
            object, nothing at all).
        refusals: Rate of refusals in words.
        out_of_range: Rate of answers whose numbers are a thousand times too large.
        timeouts: Rate of requests that fail for good.
        context: Longest prompt, in characters; None for no limit.
        budget: Nothing is answered once it is spent.

    Raises:
        DataError: Rates that are no probabilities or sum to more than 1.

    Example:
        >>> lm = OracleLM(lambda prompt, rng: " 42 ##", malformed=0.5)
        >>> prefixes = [lm.start("6 times 7: ##")] * 4
        >>> rng = torch.Generator().manual_seed(1)
        >>> [step.text for step in lm.generate(prefixes, stop=["##"], max_tokens=20, rng=rng)]
        [' 42 ##', ' 42 ##', ' about a half ##', ' 42 ##']
    """

    def __init__(
        self,
        script: Script | Callable[[str, torch.Generator], str],
        *,
        malformed: float = 0.0,
        refusals: float = 0.0,
        out_of_range: float = 0.0,
        timeouts: float = 0.0,
        context: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        rates = {
            "timeouts": timeouts,
            "refusals": refusals,
            "malformed": malformed,
            "out_of_range": out_of_range,
        }
        for name, rate in rates.items():
            if not 0.0 <= rate <= 1.0:
                raise DataError(f"OracleLM: expected {name} in [0, 1], got {rate!r}")
        if sum(rates.values()) > 1.0 + 1e-12:
            raise DataError(f"OracleLM: expected rates that sum to at most 1, got {rates!r}")
        if not isinstance(script, Script) and not callable(script):
            raise CapabilityError(
                f"OracleLM: expected a script with answer(prompt, rng), or a function, got "
                f"{type(script).__name__}"
            )
        self.script, self.rates, self.context, self.budget = script, rates, context, budget
        self._answer = script.answer if isinstance(script, Script) else script
        self._meter = Meter()

    def __repr__(self) -> str:
        faults = "".join(f", {name}={rate:g}" for name, rate in self.rates.items() if rate)
        return f"OracleLM({type(self.script).__name__}{faults})"

    @property
    def capabilities(self) -> Capabilities:
        """The same seed gives the same text."""
        return Capabilities(seed=True)

    @property
    def usage(self) -> Usage:
        """What was spent since the model was made."""
        return self._meter.total

    @property
    def vocabulary(self) -> Sequence[str]:
        """Empty: an oracle has no next-token distributions."""
        return ()

    def start(self, prompt: Prompt) -> Prefix:
        """Return the prefix of a prompt, nothing generated yet.

        Raises:
            DataError: An empty prompt, or one longer than ``context``.
        """
        value = prompt_value(prompt)
        length = len(_text(value))
        if self.context is not None and length > self.context:
            raise DataError(
                f"start: the prompt has {length} characters, the context holds {self.context}; "
                "shorten it"
            )
        return Prefix(value)

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
        """Answer each prefix; see :class:`LanguageModel`.

        Raises:
            CapabilityError: ``law.allowed`` is given.
        """
        begun = time.perf_counter()
        check_request(prefixes, stop, max_tokens, rng)
        if law.allowed is not None:
            raise CapabilityError("OracleLM has no logits, which Law.allowed needs; use MarkovLM")
        seed, asked, steps = seed_of(rng), set[object](), []
        for k, prefix in enumerate(prefixes):
            length = 0 if prefix.prompt in asked else len(_text(prefix.prompt))
            asked.add(prefix.prompt)
            planned = Usage(prompt_tokens=length, calls=1)
            if self.budget is not None and self.budget.spent(self.usage, planned) is not None:
                steps.append(Continuation((), "", math.nan, math.nan, "budget", 0))
                continue
            own = stream(0) if law.temperature == 0.0 else stream(seed, k)
            step = self._one(prefix, stop, max_tokens, own)
            failed = int(step.reason == "failed")
            self._meter.add(Usage(length, 0, step.n_tokens, 1, failures=failed))
            steps.append(step)
        self._meter.add(Usage(seconds=time.perf_counter() - begun))
        return steps

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Not known.

        Raises:
            CapabilityError: Always.
        """
        raise _no_logits("score")

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Not known.

        Raises:
            CapabilityError: Always.
        """
        raise _no_logits("next_log_probs")

    def _one(
        self, prefix: Prefix, stop: Sequence[str], max_tokens: int, rng: torch.Generator
    ) -> Continuation:
        fault = self._fault(float(torch.rand((), generator=rng, dtype=torch.float64)))
        if fault == "timeouts":
            return Continuation((), "", math.nan, math.nan, "failed", 0)
        if fault == "refusals":
            text = REFUSAL
        elif fault == "malformed":
            text = MALFORMED[int(torch.randint(len(MALFORMED), (), generator=rng))]
        else:
            text = self._answer(_text(prefix.prompt) + prefix.text, rng)
        if fault == "out_of_range":
            text = _NUMBER.sub(lambda found: f"{1000 * float(found[0]) + 1007:g}", text)
        text, reason = _cut(text, stop, max_tokens)
        return Continuation((), text, math.nan, math.nan, reason, len(text) + (reason == "end"))

    def _fault(self, u: float) -> str | None:
        """Which fault, if any, a uniform number stands for."""
        for name, rate in self.rates.items():
            if u < rate:
                return name
            u -= rate
        return None


def _no_logits(what: str) -> CapabilityError:
    return CapabilityError(
        f"{what}: OracleLM has answers but no log probabilities; use FiniteLM with a law over "
        "answers, or MarkovLM"
    )


def _text(prompt: str | tuple[tuple[str, str], ...]) -> str:
    """A prompt as one text; messages are paragraphs."""
    return prompt if isinstance(prompt, str) else "\n\n".join(content for _, content in prompt)


def _cut(text: str, stop: Sequence[str], most: int) -> tuple[str, Reason]:
    """Cut a text after its first stop string, or after so many characters."""
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if ends and min(ends) <= most:
        return text[: min(ends)], "stop"
    return (text, "end") if len(text) < most else (text[:most], "length")


class _Answers:
    """A finite law over answers as a tree of tokens, by bisection in the sorted sequences."""

    def __init__(self, law: Mapping[str, float], vocabulary: Mapping[str, int], end: int) -> None:
        total = math.fsum(law.values())
        if not law or min(law.values()) < 0 or not math.isclose(total, 1.0, abs_tol=1e-9):
            raise DataError(
                f"FiniteLM: expected a law {{answer: probability}} that sums to 1, got {len(law)} "
                f"answers with the sum {total:g}"
            )
        rows = sorted((*_tokenised(text, vocabulary), end) for text in law)
        masses = {(*_tokenised(text, vocabulary), end): p for text, p in law.items()}
        self.rows = rows
        self.cumulative = np.concatenate([[0.0], np.cumsum([masses[row] for row in rows])])
        self.size = end + 1
        self._known: dict[tuple[int, ...], Tensor] = {}

    def log_probs(self, tokens: tuple[int, ...]) -> Tensor:
        """Log probabilities of the token after generated ones, [token]; the end after the end."""
        if tokens not in self._known:
            self._known[tokens] = self._compute(tokens)
        return self._known[tokens]

    def _compute(self, tokens: tuple[int, ...]) -> Tensor:
        import bisect

        depth = len(tokens)
        low = bisect.bisect_left(self.rows, tokens)
        high = bisect.bisect_left(self.rows, (*tokens, self.size))
        probs = torch.zeros(self.size, dtype=torch.float64)
        while low < high:
            token = self.rows[low][depth]
            after = bisect.bisect_left(self.rows, (*tokens, token + 1), low, high)
            probs[token] = self.cumulative[after] - self.cumulative[low]
            low = after
        return (probs / probs.sum()).log() if probs.sum() > 0 else probs.log()


class FiniteLM:
    """A language model with a known law over finitely many answers to each prompt.

    Every probability is exact, over any tokens: the tokens are the printable characters and those
    given, an answer is cut into the longest token that fits, from left to right, and next-token
    probabilities follow by conditioning the law on the tokens generated so far.

    Args:
        law: Function of a prompt: answers and their probabilities, which sum to 1.
        tokens: Further tokens of several characters, such as ``"12"`` or ``" ##"``.

    Raises:
        DataError: An empty token.

    Example:
        >>> lm = FiniteLM(lambda prompt: {" 12": 0.5, " 17": 0.25, " 3": 0.25}, tokens=["12"])
        >>> lm.next_log_probs([lm.start("a number:")]).exp().max().item()
        1.0
        >>> step = Continuation((), " 12", 0.0, 0.0, "end", 3)
        >>> lm.score([lm.start("a number:")], [step]).exp().item()
        0.5
    """

    def __init__(
        self, law: Callable[[str], Mapping[str, float]], *, tokens: Sequence[str] = ()
    ) -> None:
        if any(not isinstance(token, str) or not token for token in tokens):
            raise DataError(f"FiniteLM: expected tokens that are not empty, got {list(tokens)!r}")
        texts = (*dict.fromkeys((*_CHARACTERS, *tokens)), "")
        self._vocabulary, self._end = texts, len(texts) - 1
        self._index = {text: k for k, text in enumerate(texts)}
        self._meter = Meter()

        @lru_cache(maxsize=256)
        def answers(prompt: str) -> _Answers:
            return _Answers(law(prompt), self._index, self._end)

        self._answers = answers

    @property
    def capabilities(self) -> Capabilities:
        """Everything, exactly."""
        return Capabilities(True, True, True, True, True, True, len(self._vocabulary))

    @property
    def usage(self) -> Usage:
        """What was spent since the model was made."""
        return self._meter.total

    @property
    def vocabulary(self) -> Sequence[str]:
        """Text of each token; the last one is the end of the sequence."""
        return self._vocabulary

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
        u = uniforms(rng, len(prefixes), max_tokens).numpy()
        known: dict[object, tuple[np.ndarray, Tensor, Tensor]] = {}
        steps = [
            self._one(prefix, stop, max_tokens, law, base, u[k], known)
            for k, prefix in enumerate(prefixes)
        ]
        self._spend(prefixes, sum(step.n_tokens for step in steps), begun)
        return steps

    def _one(
        self,
        prefix: Prefix,
        stop: Sequence[str],
        most: int,
        law: Law,
        base: Law | None,
        u: np.ndarray,
        known: dict[object, tuple[np.ndarray, Tensor, Tensor]],
    ) -> Continuation:
        tokens, text, log_q, log_p = prefix.generated, "", 0.0, 0.0
        for t in range(most):
            cumulative, under, other = self._table(prefix, tokens, text, law, base, known)
            if not cumulative[-1] > 0:
                return DEAD_END
            token = int(np.searchsorted(cumulative, u[t] * cumulative[-1], side="right"))
            token = min(token, int(np.searchsorted(cumulative, cumulative[-1], side="left")))
            log_q, log_p = log_q + float(under[token]), log_p + float(other[token])
            if token == self._end:
                return self._step(prefix, tokens, text, log_q, log_p, "end", t + 1)
            tokens, new = (*tokens, token), self._vocabulary[token]
            text += new
            if stop_end(text, len(new), stop):
                return self._step(prefix, tokens, text, log_q, log_p, "stop", t + 1)
        return self._step(prefix, tokens, text, log_q, log_p, "length", most)

    def _table(
        self,
        prefix: Prefix,
        tokens: tuple[int, ...],
        text: str,
        law: Law,
        base: Law | None,
        known: dict[object, tuple[np.ndarray, Tensor, Tensor]],
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Cumulative probabilities and log probabilities of the next token, under both laws."""
        key = (prefix.prompt, tokens)
        free = law.allowed is None and (base is None or base.allowed is None)
        if not free or key not in known:
            longer = Prefix(
                prefix.prompt,
                prefix.tokens[: prefix.start] + tokens,
                prefix.start,
                prefix.text + text,
            )
            log_probs = self._answers(_text(prefix.prompt)).log_probs(tokens)[None]
            size = len(self._vocabulary)
            under = law_log_probs(log_probs, law, allowed_mask(law, [longer], size))[0]
            other = (
                under
                if base is None
                else law_log_probs(log_probs, base, allowed_mask(base, [longer], size))[0]
            )
            known[key] = (under.exp().cumsum(-1).numpy(), under, other)
        return known[key]

    def _step(
        self,
        prefix: Prefix,
        tokens: tuple[int, ...],
        text: str,
        log_q: float,
        log_p: float,
        reason: Reason,
        count: int,
    ) -> Continuation:
        new = tokens[len(prefix.generated) :]
        return Continuation(new, text, log_q, log_p, reason, count)

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log p(step | prefix), [n]."""
        begun = time.perf_counter()
        if len(prefixes) != len(steps):
            raise ShapeError(
                f"score: expected one step for each prefix, got {len(prefixes)} prefixes and "
                f"{len(steps)} steps"
            )
        total = torch.zeros(len(steps), dtype=torch.float64)
        for k, (prefix, step) in enumerate(zip(prefixes, steps, strict=True)):
            answers = self._answers(_text(prefix.prompt))
            new = step.tokens or _tokenised(step.text, self._index)
            tokens = prefix.generated or _tokenised(prefix.text, self._index)
            for token in (*new, self._end) if step.reason == "end" else new:
                total[k] += answers.log_probs(tokens)[token]
                tokens = (*tokens, token)
        self._spend(prefixes, 0, begun)
        return total

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return normalised next-token log probabilities [n, token]."""
        begun = time.perf_counter()
        rows = [self._answers(_text(p.prompt)).log_probs(p.generated) for p in prefixes]
        self._spend(prefixes, 0, begun)
        return torch.stack(rows)

    def _spend(self, prefixes: Sequence[Prefix], generated: int, begun: float) -> None:
        read = len({prefix.prompt for prefix in prefixes})
        seconds = time.perf_counter() - begun
        self._meter.add(Usage(read, 0, generated, 1, seconds=seconds))


def _tokenised(text: str, index: Mapping[str, int]) -> tuple[int, ...]:
    """Cut a text into the longest tokens, from left to right."""
    longest = max(map(len, index))
    ids, place = [], 0
    while place < len(text):
        for size in range(min(longest, len(text) - place), 0, -1):
            token = index.get(text[place : place + size])
            if token is not None:
                ids.append(token)
                place += size
                break
        else:
            raise DataError(
                f"FiniteLM: the character {text[place]!r} of the answer {text!r} is no token; "
                "pass it in tokens="
            )
    return tuple(ids)
