"""What a language model is to probkit: prefixes go in, continuations with their log laws come out.

A language model holds no conversation: every call names the prefixes that it continues, and a
prefix is a value. What a back end remembers between calls (attention caches, connections) only
saves work; the numbers are the same without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import register, storable

__all__ = [
    "Budget",
    "Capabilities",
    "Continuation",
    "LanguageModel",
    "Law",
    "Prefix",
    "Prompt",
    "Reason",
    "Usage",
    "extended",
    "require_capability",
]

Prompt = str | Sequence[Mapping[str, str]]
"""Raw text, or the messages of a chat: ``[{"role": "user", "content": "..."}]``."""

Reason = Literal["stop", "length", "end", "failed", "budget"]
"""Why a continuation ended: a stop string, its number of tokens, the model's end of sequence, a
request that failed for good, or a budget that forbade to send it."""


class Prefix(NamedTuple):
    """A prompt and what was generated after it.

    Attributes:
        prompt: Raw text, or a chat as pairs (role, content).
        tokens: Token ids of prompt and generated text together, exactly as they were generated
            (text is never tokenised again); empty for servers that do not tell them.
        start: Number of prompt tokens among them.
        text: The generated text.
    """

    prompt: str | tuple[tuple[str, str], ...]
    tokens: tuple[int, ...] = ()
    start: int = 0
    text: str = ""

    @property
    def generated(self) -> tuple[int, ...]:
        """Token ids after the prompt."""
        return self.tokens[self.start :]


class Continuation(NamedTuple):
    """One generated step.

    Attributes:
        tokens: New token ids, the stop string's included; empty where they are unknown.
        text: New text, the stop string included.
        log_q: Log probability of the step, its end included, under the law it was drawn from;
            NaN where unknown.
        log_p: The same under the base law; equal to ``log_q`` where no other base was named.
        reason: Why it ended.
        n_tokens: Number of generated tokens (an estimate where the server does not say).
    """

    tokens: tuple[int, ...]
    text: str
    log_q: float
    log_p: float
    reason: Reason
    n_tokens: int


def extended(prefix: Prefix, step: Continuation) -> Prefix:
    """Return the prefix after a step.

    Example:
        >>> step = Continuation((7,), " b", -0.5, -0.5, "length", 1)
        >>> extended(Prefix("a", (3,), 1), step)
        Prefix(prompt='a', tokens=(3, 7), start=1, text=' b')
    """
    return Prefix(prefix.prompt, prefix.tokens + step.tokens, prefix.start, prefix.text + step.text)


@storable
@dataclass(frozen=True)
class Law:
    """How tokens are drawn from a model's next-token distribution.

    The order is: forbid what ``allowed`` excludes, divide the logits by ``temperature``, keep the
    smallest set of probability ``top_p``, renormalise.

    Args:
        temperature: Above 0; 0 takes the most probable token (ties by the smallest id).
        top_p: In (0, 1].
        allowed: None, or a function of a :class:`Prefix` that returns a mask [token] of the tokens
            that may follow. Needs a back end with ``logits``.

    Raises:
        DataError: A value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    allowed: Callable[[Prefix], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise DataError(f"Law: expected a finite temperature >= 0, got {self.temperature!r}")
        if not 0.0 < self.top_p <= 1.0:
            raise DataError(f"Law: expected 0 < top_p <= 1, got {self.top_p!r}")


@storable
@dataclass(frozen=True)
class Capabilities:
    """What a back end can do.

    Attributes:
        logprobs: Log probabilities of generated tokens.
        prefill: Continues a partial answer exactly, token for token or character for character.
        prompt_logprobs: ``score``: log probabilities of given text.
        logits: ``next_log_probs``: whole next-token distributions, and so ``Law.allowed``.
        seed: The same seed gives the same text.
        kv_fork: Continuing many prefixes with a common part computes that part once.
        top_logprobs: Number of alternatives that are reported for a token; 0 for none.
    """

    logprobs: bool = False
    prefill: bool = False
    prompt_logprobs: bool = False
    logits: bool = False
    seed: bool = False
    kv_fork: bool = False
    top_logprobs: int = 0


@storable
@dataclass(frozen=True)
class Usage:
    """What calls have cost. Usages add up with ``+``; ``-`` gives what was spent between two.

    Attributes:
        prompt_tokens: Tokens read.
        cached_tokens: Of these, tokens that were not computed again.
        completion_tokens: Tokens generated.
        calls: Requests, retries not counted.
        retries: Requests that were sent again.
        failures: Requests that failed for good.
        seconds: Wall-clock time inside calls, in seconds.
        money: At the back end's prices, in their currency.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0
    retries: int = 0
    failures: int = 0
    seconds: float = 0.0
    money: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@storable
@dataclass(frozen=True)
class Budget:
    """Limits; None is no limit.

    Args:
        tokens: Prompt and completion tokens together.
        completion_tokens: Generated tokens.
        money: In the currency of the back end's prices.
        seconds: Wall-clock time inside calls.
        calls: Requests.

    Raises:
        DataError: A negative limit.

    Example:
        >>> Budget(completion_tokens=100).spent(Usage(completion_tokens=120))
        'completion_tokens: 120 of 100 used'
    """

    tokens: int | None = None
    completion_tokens: int | None = None
    money: float | None = None
    seconds: float | None = None
    calls: int | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            limit = getattr(self, each.name)
            if limit is not None and not limit >= 0:
                raise DataError(f"Budget: expected {each.name} >= 0 or None, got {limit!r}")

    def spent(self, usage: Usage, planned: Usage | None = None) -> str | None:
        """Return which limit is reached, in words; None while there is room.

        Args:
            usage: Used so far.
            planned: What is about to be used at most; then a limit counts as reached where it would
                be passed, else where nothing is left of it.
        """
        after = usage if planned is None else usage + planned
        for each in fields(self):
            limit = getattr(self, each.name)
            if limit is None:
                continue
            used, would = getattr(usage, each.name), getattr(after, each.name)
            if (planned is None and used >= limit) or (planned is not None and would > limit):
                return f"{each.name}: {used:g} of {limit:g} used"
        return None


@runtime_checkable
class LanguageModel(Protocol):
    """Any source of text with a probability law.

    Attributes:
        capabilities: What it can do.
        usage: Spent since it was made; grows with every call.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the back end can do."""
        ...

    @property
    def usage(self) -> Usage:
        """What was spent since the model was made."""
        ...

    def start(self, prompt: Prompt) -> Prefix:
        """Return the prefix of a prompt, nothing generated yet.

        Raises:
            DataError: An empty prompt, or one that does not fit into the context.
        """
        ...

    def generate(
        self,
        prefixes: Sequence[Prefix],
        *,
        stop: Sequence[str] = (),
        max_tokens: int,
        law: Law = Law(),
        base: Law | None = None,
        rng: torch.Generator,
    ) -> list[Continuation]:
        """Continue each prefix by one step, independently.

        A step ends with the first of: a stop string in the new text, ``max_tokens`` tokens, the end
        of the sequence. The k-th continuation depends on the seed, k and the prefixes only.

        Args:
            prefixes: n prefixes; equal ones are allowed and get different continuations.
            stop: Stop strings; they belong to the step that they end.
            max_tokens: At most so many tokens.
            law: Drawn from.
            base: Law whose log probability is reported as ``log_p``; None for ``law`` itself.
            rng: Stream.

        Returns:
            n continuations. A request that failed for good, or that a budget forbade, comes back
            with the reason "failed" or "budget" and no text; it never raises.

        Raises:
            CapabilityError: The back end cannot do what is asked.
        """
        ...

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log p(step | prefix) at temperature 1 of given steps, [n], float64.

        A step with the reason "end" includes the end of the sequence. Text is used where a step
        holds no tokens.
        """
        ...

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return normalised next-token log probabilities [n, token], float64.

        The end of the sequence is among the tokens; ``vocabulary`` tells their text.
        """
        ...

    @property
    def vocabulary(self) -> Sequence[str]:
        """Text of each token id; of the end of the sequence, the empty string."""
        ...


def require_capability(lm: LanguageModel, flag: str, purpose: str, remedy: str) -> None:
    """Check that a back end can do something.

    Args:
        lm: The back end.
        flag: Name of the field of :class:`Capabilities`.
        purpose: What needs it.
        remedy: How to do without, or which back ends have it.

    Raises:
        CapabilityError: It cannot.
    """
    if not getattr(lm.capabilities, flag):
        raise CapabilityError(
            f"{purpose} needs a language model with {flag}; {type(lm).__name__} has none. {remedy}"
        )


def _to_tree(prefix: Prefix) -> dict[str, object]:
    return {**prefix._asdict(), "tokens": list(prefix.tokens)}


def _from_tree(tree: Mapping[str, Any]) -> Prefix:
    return Prefix(tree["prompt"], tuple(tree["tokens"]), tree["start"], tree["text"])


register(Prefix, "Prefix", _to_tree, _from_tree)
