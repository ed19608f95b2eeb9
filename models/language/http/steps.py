"""From an answer to a step: where it ends, what it is worth, and which tokens it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from probkit.models.language.http.profile import Endpoint
from probkit.models.language.http.schema import Answer, MalformedError, Piece
from probkit.models.language.protocol import Continuation, Law, Reason

__all__ = ["last_token_needed", "step_of", "strip_prefill"]

_BASE = Law()


class _Draft(NamedTuple):
    """A step in the making; ``complete`` tells whether ``pieces`` cover all of it."""

    text: str
    reason: Reason
    pieces: tuple[Piece, ...]
    ids: tuple[int, ...]
    complete: bool
    n_tokens: int


def strip_prefill(answer: Answer, partial: str) -> Answer:
    """Cut off the partial answer that a server repeats.

    Raises:
        MalformedError: The answer does not begin with it.
    """
    if not answer.text.startswith(partial):
        raise MalformedError("an answer that does not begin with the partial answer")
    return answer._replace(text=answer.text[len(partial) :])


def last_token_needed(answer: Answer) -> bool:
    """Tell whether the text of the last token must be asked for: a stop string lies within it."""
    return answer.finish == "stop" and bool(answer.ids) and bool(answer.stop)


def step_of(
    answer: Answer,
    endpoint: Endpoint,
    *,
    stop: Sequence[str],
    server_stops: bool,
    law: Law,
    base: Law | None,
    last_token: str | None = None,
) -> Continuation:
    """Return the step that an answer tells of.

    Args:
        answer: Of the server, the partial answer cut off.
        endpoint: How it was asked.
        stop: Stop strings.
        server_stops: Whether the server was given them; else they are looked for here.
        law: The answer was drawn from.
        base: Law that ``log_p`` is wanted under; None for ``law``.
        last_token: Text of the last token, where a stop string may end inside it.
    """
    draft = _whole(answer)
    if stop and not server_stops:
        draft = _cut(draft, stop)
    elif draft.reason == "stop" and stop:
        draft = _closed(draft, answer.stop, stop, last_token, endpoint)
    if draft.reason == "stop" and not (stop and draft.text):
        # With no stop string to put back this was the end of the sequence.
        draft = draft._replace(reason="end", complete=False)
    log_q, log_p = _log_probs(draft, endpoint, law, base)
    return Continuation(
        draft.ids if endpoint.token_ids else (),
        draft.text,
        log_q,
        log_p,
        draft.reason,
        draft.n_tokens,
    )


def _whole(answer: Answer) -> _Draft:
    """Everything that was generated; the token that ends the sequence is taken off the ids."""
    pieces, ids = answer.pieces, answer.ids
    count = answer.completion_tokens
    if count is None:
        count = len(ids) or len(pieces) or math.ceil(len(answer.text.encode()) / 4)
    if answer.finish == "length":
        return _Draft(answer.text, "length", pieces, ids, len(pieces) == count, count)
    if answer.finish == "stop":
        return _Draft(answer.text, "stop", pieces, ids, len(pieces) == count, count)
    if answer.finish == "end":
        told = _tells_end(answer)
        last = told or (bool(ids) and len(ids) == answer.completion_tokens)
        return _Draft(answer.text, "end", pieces, ids[:-1] if last else ids, told, count)
    # A stop string or the end of the sequence: whoever sent stop strings takes it for the former.
    told = _tells_end(answer)
    reason: Reason = "end" if told else "stop"
    return _Draft(answer.text, reason, pieces, ids[:-1] if told else ids, told, count)


def _tells_end(answer: Answer) -> bool:
    """Whether the last piece is the end of the sequence, which is no part of the text."""
    if not answer.pieces:
        return False
    if answer.finish == "end" and len(answer.pieces) == len(answer.ids) == answer.completion_tokens:
        return True
    before = _joined(answer.pieces[:-1])
    return before is not None and before.decode(errors="replace") == answer.text


def _cut(draft: _Draft, stop: Sequence[str]) -> _Draft:
    """End a step after the first token with which its text holds a stop string."""
    if draft.reason == "stop":  # none was sent, so the sequence ended
        draft = draft._replace(reason="end")
    if not any(s in draft.text for s in stop):
        return draft
    wanted = [s.encode() for s in stop]
    text = b""
    for k, piece in enumerate(draft.pieces):
        if piece.text is None:
            break
        text += piece.text
        if any(s in text for s in wanted):
            if not draft.text.startswith(text.decode(errors="ignore")):
                break  # the pieces are not those of the text
            return _Draft(
                text.decode(errors="replace"),
                "stop",
                draft.pieces[: k + 1],
                draft.ids[: k + 1],
                True,
                k + 1,
            )
    ends = [draft.text.index(s) + len(s) for s in stop if s in draft.text]
    kept = draft.text[: min(ends)]
    share = math.ceil(draft.n_tokens * len(kept) / len(draft.text))
    return _Draft(kept, "stop", (), (), False, max(1, share))


def _closed(
    draft: _Draft, told: str, stop: Sequence[str], last_token: str | None, endpoint: Endpoint
) -> _Draft:
    """Put back the stop string that a server left out, and what its last token says after it."""
    text = draft.text
    if endpoint.stops == "included":
        closing = told or next((s for s in stop if text.endswith(s)), "")
        if last_token is None and draft.pieces and draft.pieces[-1].text is not None:
            last_token = draft.pieces[-1].text.decode(errors="replace")
    else:
        closing = told or (stop[0] if len(stop) == 1 and text else "")
        text += closing
    if closing and last_token is not None and draft.ids:
        text += _rest(last_token, closing)
    joined = _joined(draft.pieces)
    complete = draft.complete or (joined is not None and bool(closing) and joined == text.encode())
    return draft._replace(text=text, complete=complete)


def _rest(token: str, stop: str) -> str:
    r"""What a token says after the stop string that ends inside it.

    Example:
        >>> _rest("\n\n", "\n"), _rest("b. A", "a b."), _rest("x", "x")
        ('\n', ' A', '')
    """
    if stop in token:
        return token[token.index(stop) + len(stop) :]
    for k in range(min(len(token), len(stop)), 0, -1):
        if token[:k] == stop[-k:]:
            return token[k:]
    return ""


def _joined(pieces: Sequence[Piece]) -> bytes | None:
    parts = [piece.text for piece in pieces]
    return None if None in parts else b"".join(part for part in parts if part is not None)


def _log_probs(
    draft: _Draft, endpoint: Endpoint, law: Law, base: Law | None
) -> tuple[float, float]:
    """Log probabilities of a step under its law and under another one; NaN where unknown."""
    total = math.fsum(piece.log_prob for piece in draft.pieces) if draft.complete else math.nan
    if not draft.pieces:
        total = math.nan
    if endpoint.law_of_logprobs == "unknown" and law != _BASE:
        total = math.nan
    plain = law == _BASE
    if law.temperature == 0.0:
        log_q = 0.0  # the one text that this law has
    elif plain or (endpoint.law_of_logprobs == "scaled" and law.top_p == 1.0):
        log_q = total
    else:
        log_q = math.nan
    if base is None or base == law:
        return log_q, log_q
    known = base == _BASE and (plain or endpoint.law_of_logprobs == "raw")
    return log_q, total if known else math.nan
