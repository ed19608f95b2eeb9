"""Bodies of requests, one function for each way to ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from probkit.models.language.http.profile import Endpoint

__all__ = ["Ask", "PREFILLS", "body_of", "size_of"]

Messages = tuple[tuple[str, str], ...]

PREFILLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "continue": {"continue_final_message": True, "add_generation_prompt": False},
    "prefix": {},
}
"""Fields that make servers continue an assistant message."""

NEUTRAL: dict[str, float | int] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Fields that switch off what vLLM-like servers would sample with unasked."""


class Ask(NamedTuple):
    """One text to generate.

    Attributes:
        prompt: Raw text, token ids, or a chat.
        partial: What the assistant has said already, in a chat.
        max_tokens: At most so many.
        temperature: Of the law.
        top_p: Of the law.
        seed: None for the server's own.
        stop: Sent to the server.
        logprobs: Number of alternatives to tell; None for no log probabilities.
        extra: More fields.
    """

    prompt: str | tuple[int, ...] | Messages
    partial: str = ""
    max_tokens: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    extra: Mapping[str, Any] = {}


def body_of(endpoint: Endpoint, model: str, ask: Ask) -> dict[str, Any]:
    """Return the JSON of a request."""
    if endpoint.way == "llama.cpp":
        return _llama(ask)
    body: dict[str, Any] = {
        "model": model,
        endpoint.limit: ask.max_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
    }
    if endpoint.seed and ask.seed is not None:
        body["seed"] = ask.seed
    if ask.stop:
        body["stop"] = list(ask.stop)
        if endpoint.stops == "included":
            body["include_stop_str_in_output"] = True
    if endpoint.neutral:
        body |= NEUTRAL
    if endpoint.token_ids:
        body["return_token_ids"] = True
    if endpoint.way == "chat":
        body |= _chat(endpoint, ask)
    else:
        body["prompt"] = ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)
        if ask.logprobs is not None:
            body["logprobs"] = max(1, ask.logprobs)
    return body | dict(ask.extra)


def _chat(endpoint: Endpoint, ask: Ask) -> dict[str, Any]:
    if isinstance(ask.prompt, str):
        pairs: Messages = (("user", ask.prompt),)
    else:
        pairs = ask.prompt  # type: ignore[assignment]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in pairs]
    body: dict[str, Any] = {"messages": messages}
    if ask.partial:
        messages.append({"role": "assistant", "content": ask.partial})
        if endpoint.prefill == "prefix":
            messages[-1]["prefix"] = True
        body |= PREFILLS.get(endpoint.prefill, {})
    if ask.logprobs is not None:
        body["logprobs"] = True
        if ask.logprobs:
            body["top_logprobs"] = ask.logprobs
    return body


def _llama(ask: Ask) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt),
        "n_predict": ask.max_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        # In the order of the law, and nothing else: no top-k, min-p or penalties unasked.
        "samplers": ["temperature", "top_p"],
        "cache_prompt": True,
        "return_tokens": True,
        "stream": True,
        "n_probs": max(1, ask.logprobs or 0),
    }
    if ask.seed is not None:
        body["seed"] = ask.seed
    if ask.stop:
        body["stop"] = list(ask.stop)
    return body | dict(ask.extra)


def size_of(ask: Ask) -> int:
    """Return the size of a prompt in bytes, as the estimate of its tokens takes it."""
    if isinstance(ask.prompt, str):
        return len(ask.prompt.encode()) + len(ask.partial.encode())
    return len(json.dumps(ask.prompt, ensure_ascii=False).encode()) + len(ask.partial.encode())
