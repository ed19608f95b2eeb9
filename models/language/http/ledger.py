"""What requests may cost, kept before they are sent and settled when they are answered."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import dataclass, replace

from probkit.errors import DataError
from probkit.files import storable
from probkit.models.language.protocol import Budget, Usage

__all__ = ["Ledger", "OverBudgetError", "Plan", "Prices", "PromptEstimate"]


@storable
@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in one currency.

    Args:
        prompt: Of prompt tokens.
        completion: Of generated tokens.
        cached: Of prompt tokens that the server read from its cache; None for the full price.

    Raises:
        DataError: A negative or non-finite price.

    Example:
        >>> Prices(prompt=1.0, completion=4.0, cached=0.5).of(1_000_000, 500_000, 0)
        0.75
    """

    prompt: float = 0.0
    completion: float = 0.0
    cached: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "completion", "cached"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise DataError(f"Prices: expected a finite {name} >= 0, got {value!r}")

    def of(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        """Return what tokens cost; ``cached_tokens`` are among the ``prompt_tokens``."""
        cached = self.prompt if self.cached is None else self.cached
        fresh = prompt_tokens - cached_tokens
        total = fresh * self.prompt + cached_tokens * cached + completion_tokens * self.completion
        return total / 1e6


@dataclass(frozen=True)
class Plan:
    """The most that one sending of a request can cost."""

    prompt_tokens: int
    completion_tokens: int


class OverBudgetError(Exception):
    """A request would pass the budget; it was not sent."""


class Ledger:
    """Keeps a budget: every sending reserves its worst case first.

    Repeats count as sendings of their own. A sending whose answer never came is settled at its
    worst case, for the server may have computed it.

    Args:
        budget: Limits; those on ``seconds`` are the caller's business.
        prices: For money.
    """

    def __init__(self, budget: Budget, prices: Prices) -> None:
        self.budget, self.prices = budget, prices
        self._lock = threading.Lock()
        self._usage = Usage()
        self._reserved: dict[int, Usage] = {}
        self._next = 0
        self._turn: asyncio.Lock | None = None
        self._settled: asyncio.Event | None = None

    def rebind(self) -> None:
        """Forget the event loop it was used on; nothing may be under way."""
        self._turn = self._settled = None

    @property
    def usage(self) -> Usage:
        """What was settled so far."""
        with self._lock:
            return self._usage

    async def admit(self, plan: Plan, *, repeat: bool = False) -> int:
        """Reserve the worst case of one sending; returns the number of the reservation.

        Where it does not fit, it waits for the answers that are under way: they mostly cost less
        than was reserved for them. Requests are served in their order, so which of them a budget
        stops does not depend on how fast answers come.

        Raises:
            OverBudgetError: It does not fit though nothing is under way.
        """
        if self._turn is None or self._settled is None:
            self._turn, self._settled = asyncio.Lock(), asyncio.Event()
        worst = self._worst(plan)
        async with self._turn:
            while True:
                self._settled.clear()
                with self._lock:
                    held = sum(self._reserved.values(), self._usage)
                    # Of a budget, requests that are sent again are requests like others.
                    refusal = self._limits.spent(
                        replace(held, calls=held.calls + held.retries), worst
                    )
                    if refusal is None:
                        self._next += 1
                        sent = Usage(retries=1) if repeat else Usage(calls=1)
                        self._reserved[self._next] = replace(worst, calls=0)
                        self._usage += sent
                        return self._next
                    if not self._reserved:
                        raise OverBudgetError(refusal)
                await self._settled.wait()

    def settle(self, ticket: int, spent: Usage) -> None:
        """Put what a sending did cost in the place of its reservation."""
        money = self.prices.of(spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens)
        with self._lock:
            if self._reserved.pop(ticket, None) is not None:
                self._usage += replace(spent, money=money)
        if self._settled is not None:
            self._settled.set()

    def lost(self, ticket: int) -> None:
        """Settle a sending whose answer never came."""
        with self._lock:
            held = self._reserved.get(ticket, Usage())
        self.settle(ticket, held)

    def add(self, usage: Usage) -> None:
        """Count seconds and failures."""
        with self._lock:
            self._usage += usage

    @property
    def _limits(self) -> Budget:
        return replace(self.budget, seconds=None)

    def _worst(self, plan: Plan) -> Usage:
        prompt, completion = plan.prompt_tokens, plan.completion_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            calls=1,
            money=self.prices.of(prompt, 0, completion),
        )


class PromptEstimate:
    """Tokens of a prompt that only the server can count, from its own earlier counts.

    The estimate is the largest share of tokens to bytes seen so far, on top of what a chat template
    adds at most; one token a byte, which no tokenizer passes, before anything was seen.
    """

    def __init__(self) -> None:
        self._rate = 0.0
        self._extra = 8.0

    def learn(self, size: int, tokens: int) -> None:
        """Take note of a prompt of ``size`` bytes that the server counted."""
        if size < 32:  # mostly what the template adds
            self._extra = max(self._extra, float(tokens))
        else:
            self._rate = max(self._rate, min(1.0, tokens / size))

    def tokens(self, size: int) -> int:
        """Return how many tokens a prompt of ``size`` bytes has at most, as far as is known."""
        return math.ceil(size * (self._rate or 1.0) + self._extra)
