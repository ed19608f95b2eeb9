"""Drawing one step for each of a batch of sequences, with the attention cache of a prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probkit.models.language.kv_cache import PrefixCache
from probkit.models.language.protocol import Continuation, Law, Prefix, Reason
from probkit.models.language.sampling import (
    DEAD_END,
    allowed_mask,
    draw_tokens,
    law_log_probs,
    stop_end,
)
from probkit.models.language.token_text import TokenText

__all__ = ["Decoder", "Draft"]

_ROOM = 64
"""Columns that are made ready for a step at once."""


@dataclass
class Draft:
    """A step that is being drawn.

    Attributes:
        prefix: What it continues.
        ids: Token ids of that.
        u: Uniform numbers, one for each token.
        tokens: Drawn so far, the end of the sequence apart.
        text: Theirs.
        log_q: Log probability under the law it is drawn from.
        log_p: The same under the base law.
        reason: Why it ended; None while it has not.
    """

    prefix: Prefix
    ids: tuple[int, ...]
    u: Sequence[float]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    log_q: float = 0.0
    log_p: float = 0.0
    reason: Reason | None = None

    @property
    def here(self) -> Prefix:
        """The prefix as far as it is drawn."""
        tokens = (*self.ids, *self.tokens)
        return Prefix(self.prefix.prompt, tokens, self.prefix.start, self.prefix.text + self.text)

    def result(self) -> Continuation:
        """Return the step."""
        assert self.reason is not None
        if self.reason == "failed":
            return DEAD_END
        count = len(self.tokens) + (self.reason == "end")
        tokens = tuple(self.tokens)
        return Continuation(tokens, self.text, self.log_q, self.log_p, self.reason, count)


@dataclass(frozen=True)
class Decoder:
    """How steps are drawn and where they end.

    Attributes:
        cache: Model and known keys and values.
        text: From ids to text.
        end_ids: Ids that end the sequence.
        law: Drawn from.
        base: Reported as ``log_p``; None for the same.
        stop: Stop strings.
    """

    cache: PrefixCache
    text: TokenText
    end_ids: tuple[int, ...]
    law: Law
    base: Law | None
    stop: tuple[str, ...]

    def run(self, drafts: Sequence[Draft]) -> None:
        """Draw every step to its end; each has room for at least one token."""
        room = min(_ROOM, max(len(draft.u) for draft in drafts))
        block, last = self.cache.read([draft.ids for draft in drafts], [1] * len(drafts), room)
        logits = torch.cat(last)
        rows = list(drafts)
        while True:
            live = [k for k, draft in enumerate(rows) if draft.reason is None]
            self._advance([rows[k] for k in live], logits[live])
            live = [k for k in live if rows[k].reason is None]
            if not live:
                return
            if 2 * len(live) <= len(rows):  # Leave the finished ones behind.
                block = self.cache.fork(block, live, room)
                self.cache.remember(block)
                rows = [rows[k] for k in live]
            new = [tuple(draft.tokens[-1:]) or (0,) for draft in rows]
            grows = [draft.reason is None for draft in rows]
            logits = self.cache.feed(block, new, grows)[:, -1]

    def _advance(self, drafts: Sequence[Draft], logits: Tensor) -> None:
        """Draw the next token of each step."""
        log_probs = torch.log_softmax(logits.double(), -1)
        here = [draft.here for draft in drafts] if self._masked else []
        under_q = self._under(self.law, log_probs, here)
        under_p = under_q if self.base is None else self._under(self.base, log_probs, here)
        u = torch.tensor([draft.u[len(draft.tokens)] for draft in drafts], dtype=torch.float64)
        drawn = draw_tokens(under_q, u)
        ids = drawn.tolist()
        q, p = (self._log_prob(table, drawn) for table in (under_q, under_p))
        for draft, token, log_q, log_p in zip(drafts, ids, q, p, strict=True):
            draft.log_q += log_q
            draft.log_p += log_p
            self._extend(draft, token, dead=log_q == -torch.inf)

    @property
    def _masked(self) -> bool:
        return any(law is not None and law.allowed is not None for law in (self.law, self.base))

    def _under(self, law: Law, log_probs: Tensor, here: Sequence[Prefix]) -> Tensor:
        mask = allowed_mask(law, here, log_probs.shape[-1])
        if mask is None and law.temperature == law.top_p == 1.0:
            return log_probs
        return law_log_probs(log_probs, law, mask)

    def _log_prob(self, table: Tensor, drawn: Tensor) -> list[float]:
        """Log probabilities of what was drawn; all ends of the sequence are one event."""
        result = table.gather(-1, drawn[:, None])[:, 0]
        if self.end_ids:
            ids = torch.tensor(self.end_ids, device=table.device)
            ended = (drawn[:, None] == ids).any(-1)
            result = torch.where(ended, table[:, ids].logsumexp(-1), result)
        return result.tolist()

    def _extend(self, draft: Draft, token: int, *, dead: bool) -> None:
        """Add a token to a step, and say why the step ends, if it does."""
        if dead:
            draft.reason = "failed"
            return
        if token in self.end_ids:
            draft.reason = "end"
        else:
            draft.tokens.append(token)
        full = len(draft.tokens) == len(draft.u)
        if self.stop or full or draft.reason is not None or self._masked:
            known = len(draft.text)
            draft.text = self.text.added(draft.ids, draft.tokens)
            if draft.reason is None and stop_end(draft.text, len(draft.text) - known, self.stop):
                draft.reason = "stop"
        if draft.reason is None and full:
            draft.reason = "length"
