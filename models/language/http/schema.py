"""Answers of servers, checked field by field before any of it is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

__all__ = [
    "Answer",
    "MalformedError",
    "Piece",
    "alternatives",
    "parse_chat",
    "parse_completion",
    "parse_llama",
    "prompt_log_probs",
    "read_json",
]

Finish = Literal["stop", "end", "either", "length"]
"""Why a server ended: a stop string, the end of the sequence, one of these two, or the length."""

_FINISH: dict[str, Finish] = {
    "length": "length",
    "max_tokens": "length",
    "stop": "either",
    "end_turn": "either",
    "eos": "end",
    "eos_token": "end",
    "stop_sequence": "stop",
}


class MalformedError(Exception):
    """An answer that does not follow the schema; asking again may help."""


class Piece(NamedTuple):
    """One generated token.

    Attributes:
        text: Its bytes; None where the server does not tell.
        id: -1 where the server does not tell.
        log_prob: As the server tells it.
        top: Alternatives at its place: log probability by text.
    """

    text: bytes | None
    id: int
    log_prob: float
    top: Mapping[str, float]


class Answer(NamedTuple):
    """One generated text.

    Attributes:
        text: As the server gave it.
        finish: Why it ended.
        stop: The stop string that ended it; empty where the server does not tell.
        pieces: Tokens with log probabilities; empty where the server does not tell.
        ids: Token ids, that of the end of the sequence included; empty where unknown.
        prompt_ids: Token ids of the prompt; empty where unknown.
        prompt_tokens: None where the server does not count.
        cached_tokens: Of these.
        completion_tokens: None where the server does not count.
        choices: Number of answers.
        raw: The choice as it came.
    """

    text: str
    finish: Finish
    stop: str = ""
    pieces: tuple[Piece, ...] = ()
    ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    completion_tokens: int | None = None
    choices: int = 1
    raw: Mapping[str, Any] = {}


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a body that must be one JSON object.

    Raises:
        MalformedError: It is not.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise MalformedError("the body is no JSON") from None
    if not isinstance(value, dict):
        raise MalformedError("the body is no JSON object")
    if isinstance(value.get("error"), dict | str):
        raise MalformedError("the body is an error under the status 200")
    return value


def parse_completion(body: bytes) -> Answer:
    """Parse an answer of ``/completions``.

    Raises:
        MalformedError: It does not follow the schema.
    """
    value = read_json(body)
    choice = _choice(value)
    return _answer(value, choice, _typed(choice, "text", str, None))


def parse_chat(body: bytes) -> Answer:
    """Parse an answer of ``/chat/completions``.

    Raises:
        MalformedError: It does not follow the schema.
    """
    value = read_json(body)
    choice = _choice(value)
    message = choice.get("message")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        raise MalformedError("a choice without a message of text")
    return _answer(value, choice, message.get("content") or "")


def parse_llama(body: bytes) -> Answer:
    """Parse an answer of llama.cpp's own ``/completion``, mostly a stream that was read to its end.

    Unlike the OpenAI endpoints it tells the tokens of stop strings, and which of them ended it. A
    stream keeps the tokens of broken characters to itself; an answer in one piece tells all ids,
    but not the log probabilities of stop strings, so none are read from it.

    Raises:
        MalformedError: It does not follow the schema, or breaks off.
    """
    texts: list[str] = []
    ids: list[int] = []
    pieces: list[Piece] = []
    last: dict[str, Any] = {}
    if body.lstrip().startswith(b"{"):
        last = read_json(body)
        return _llama_answer(last, _typed(last, "content", str, None), _ids(last.get("tokens")), [])
    for line in body.split(b"\n"):
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            if line.startswith(b"error:"):
                raise MalformedError("an error in the stream")
            continue
        last = read_json(line[len(b"data: ") :])
        texts.append(_typed(last, "content", str, ""))
        if last.get("stop") is True:
            break
        ids.extend(_ids(last.get("tokens", [])))
        pieces.extend(_content_pieces(_typed(last, "completion_probabilities", list, [])))
    else:
        raise MalformedError("the stream breaks off")
    return _llama_answer(last, "".join(texts), ids, pieces)


def _llama_answer(
    last: Mapping[str, Any], text: str, ids: list[int], pieces: list[Piece]
) -> Answer:
    kinds: dict[object, Finish] = {"word": "stop", "eos": "end", "limit": "length"}
    finish = kinds.get(last.get("stop_type"))
    if finish is None:
        raise MalformedError("an answer without the reason of its end")
    timings = _typed(last, "timings", dict, {})
    return Answer(
        text,
        finish,
        _typed(last, "stopping_word", str, ""),
        tuple(pieces) if len(pieces) == len(ids) else (),
        tuple(ids),
        (),
        _count(last, "tokens_evaluated"),
        _count(timings, "cache_n") or 0,
        _count(last, "tokens_predicted"),
        1,
        last,
    )


def prompt_log_probs(answer: Answer) -> list[dict[int, float]]:
    """Return vLLM's log probabilities of prompt tokens: one mapping from token id a token.

    The first one is empty, for nothing precedes it.

    Raises:
        MalformedError: They are missing, or of another shape.
    """
    rows = answer.raw.get("prompt_logprobs")
    if not isinstance(rows, list):
        raise MalformedError("no log probabilities of the prompt")
    found = []
    for row in rows:
        if not isinstance(row, dict | None):
            raise MalformedError("prompt_logprobs of another shape")
        try:
            found.append({int(k): _log_prob(_member(v, "logprob")) for k, v in (row or {}).items()})
        except ValueError:
            raise MalformedError("a token id that is no number") from None
    return found


def alternatives(answer: Answer) -> dict[int, float]:
    """Return log probabilities by id of what llama.cpp lists at the first place of an answer.

    Raises:
        MalformedError: The list is missing, or of another shape.
    """
    rows = _typed(answer.raw, "completion_probabilities", list, [])
    listed = _member(rows[0], "top_logprobs") if rows else None
    if not isinstance(listed, list):
        raise MalformedError("no alternatives to a token")
    return {int(_member(row, "id")): _log_prob(_member(row, "logprob")) for row in listed}


def _answer(value: Mapping[str, Any], choice: Mapping[str, Any], text: str) -> Answer:
    finish = _FINISH.get(choice.get("finish_reason") or "")
    if finish is None:
        raise MalformedError(f"the finish_reason {str(choice.get('finish_reason'))[:40]!r}")
    stop = ""
    if finish == "either" and "stop_reason" in choice:  # vLLM
        told = choice["stop_reason"]
        finish = "stop" if isinstance(told, str) else "end"
        stop = told if isinstance(told, str) else ""
    pieces = _pieces(choice.get("logprobs"))
    ids = tuple(_ids(choice.get("token_ids") or []))
    if not ids and pieces and all(piece.id >= 0 for piece in pieces):
        ids = tuple(piece.id for piece in pieces)
    if ids and pieces and len(ids) == len(pieces):
        pieces = tuple(p._replace(id=i) for p, i in zip(pieces, ids, strict=True))
    usage = value.get("usage") or {}
    if not isinstance(usage, dict):
        raise MalformedError("a usage that is no object")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        text,
        finish,
        stop,
        pieces,
        ids,
        tuple(_ids(choice.get("prompt_token_ids") or value.get("prompt_token_ids") or [])),
        _count(usage, "prompt_tokens"),
        (_count(details, "cached_tokens") or 0) if isinstance(details, dict) else 0,
        _count(usage, "completion_tokens"),
        len(value["choices"]),
        choice,
    )


def _choice(value: Mapping[str, Any]) -> dict[str, Any]:
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise MalformedError("no choices")
    return choices[0]


def _pieces(value: object) -> tuple[Piece, ...]:
    """Tokens of either form: the lists of ``/completions``, or the objects of chats."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise MalformedError("logprobs that are no object")
    if "content" in value:
        content = value["content"]
        if not isinstance(content, list | None):
            raise MalformedError("logprobs.content that is no list")
        return tuple(_content_pieces(content or []))
    tokens, log_probs = value.get("tokens") or [], value.get("token_logprobs") or []
    tops = value.get("top_logprobs") or [None] * len(tokens)
    if not all(isinstance(x, list) for x in (tokens, log_probs, tops)):
        raise MalformedError("logprobs of another shape")
    if not len(tokens) == len(log_probs) == len(tops):
        raise MalformedError("logprobs of unequal lengths")
    found = []
    for token, log_prob, top in zip(tokens, log_probs, tops, strict=True):
        if not isinstance(token, str) or not isinstance(top, dict | None):
            raise MalformedError("logprobs of another shape")
        # The first token of an echoed prompt has none.
        number = math.nan if log_prob is None else _log_prob(log_prob)
        alternatives = {str(k): _log_prob(v) for k, v in (top or {}).items()}
        found.append(Piece(_bytes(token), _spelt_id(token), number, alternatives))
    return tuple(found)


def _content_pieces(content: Sequence[Any]) -> list[Piece]:
    found = []
    for entry in content:
        token = _member(entry, "token")
        raw = entry.get("bytes")
        if not isinstance(token, str) or not isinstance(raw, list | None):
            raise MalformedError("logprobs of another shape")
        top = entry.get("top_logprobs") or []
        if not isinstance(top, list):
            raise MalformedError("top_logprobs that are no list")
        alternatives = {
            str(_member(other, "token")): _log_prob(_member(other, "logprob")) for other in top
        }
        try:
            text = _bytes(token) if raw is None else bytes(raw)
        except (TypeError, ValueError):
            raise MalformedError("bytes of a token that are none") from None
        told = entry.get("id", -1)
        number = told if _is_count(told) else _spelt_id(token)
        found.append(Piece(text, number, _log_prob(_member(entry, "logprob")), alternatives))
    return found


def _bytes(token: str) -> bytes | None:
    """Bytes of a token as servers spell it in JSON; None where they do not."""
    if token.startswith("token_id:"):
        return None
    if token.startswith("bytes:"):  # how OpenAI spells a token that is no text on its own
        try:
            return bytes.fromhex(token[len("bytes:") :].replace("\\x", ""))
        except ValueError:
            return None
    return token.encode()


def _spelt_id(token: str) -> int:
    """The id that vLLM writes as text where it is asked to."""
    number = token.removeprefix("token_id:")
    return int(number) if number != token and number.isdecimal() else -1


def _log_prob(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise MalformedError("a log probability that is no number")
    if value > 1e-3:
        raise MalformedError("a log probability above 0")
    return min(float(value), 0.0)


def _member(value: object, name: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise MalformedError(f"an entry without {name}")
    return value[name]


def _typed(value: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    found = value.get(name, default)
    if not isinstance(found, kind):
        raise MalformedError(f"{name} is of another type")
    return found


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(_is_count(x) for x in value):
        raise MalformedError("token ids that are no list of numbers")
    return value


def _count(value: Mapping[str, Any], name: str) -> int | None:
    found = value.get(name)
    if found is None:
        return None
    if not _is_count(found):
        raise MalformedError(f"{name} that is no number of tokens")
    return int(found)
