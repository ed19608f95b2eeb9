"""Language models of llama.cpp in this process, through its prebuilt binding."""

from __future__ import annotations

import functools
import json
import math
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.extras import require
from probkit.models.language.chat import messages_of, prompt_value
from probkit.models.language.meter import Meter
from probkit.models.language.protocol import (
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
    check_pairs,
    check_request,
    draw_tokens,
    law_log_probs,
    stop_end,
    uniforms,
)

__all__ = ["LlamaCppLM"]

Ids = tuple[int, ...]

_END_MARKS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<|endofturn|>",
)
"""Texts of tokens at which llama.cpp may end a sequence; which of them do is found by trying."""

_FORCE = 1e4
"""Added to the logit of a token that is to be chosen; log probabilities are reported without it."""


class LlamaCppLM:
    """A GGUF model run by llama.cpp.

    Steps are drawn one after the other by llama.cpp; what a prompt shares with the last one is not
    read again. Log probabilities are exact: those of tokens that llama.cpp does not report (a part
    of a character) are asked for afterwards. ``next_log_probs``, ``Law.allowed`` and any ``base``
    but the plain law read the whole distribution for every token, which is slow.

    Args:
        path: GGUF file.
        context: Number of tokens that the model reads; None for what it was trained with.
        threads: Of the computation; None for as many as torch uses.

    Attributes:
        context: Number of tokens that the model reads, the answer included.
        end_ids: Ids of the tokens that end the sequence.

    Raises:
        MissingExtraError: The binding is not installed.
        DataError: No such file, or one that cannot be loaded.

    Example:
        Continue a text::

            with LlamaCppLM(smollm2_path()) as lm:
                rng = torch.Generator().manual_seed(0)
                lm.generate([lm.start("One, two,")], max_tokens=4, rng=rng)
    """

    def __init__(
        self, path: str | Path, *, context: int | None = None, threads: int | None = None
    ) -> None:
        binding = require("xllamacpp", extra="llm")
        place = Path(path)
        if not place.is_file():
            raise DataError(f"LlamaCppLM: there is no file {str(path)!r}")
        with place.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise DataError(f"LlamaCppLM: expected a GGUF file, {place.name} is none")
        options = binding.CommonParams()
        options.model.path = str(place)
        options.n_ctx = context or 0
        options.n_parallel = 1
        options.warmup = False
        options.verbosity = 0
        options.cpuparams.n_threads = threads or torch.get_num_threads()
        options.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        try:
            self._server: Any = binding.Server(options)
        except RuntimeError as error:
            raise DataError(f"LlamaCppLM: cannot load {place.name}: {error}") from error
        self._name = place.stem
        self._lock, self._meter = threading.RLock(), Meter()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.context = int(self._ask("/props")["default_generation_settings"]["n_ctx"])
        self._plain_token = self._tokenized("a", special=False)[-1]
        self.end_ids = self._found_ends()

    def __repr__(self) -> str:
        return f"LlamaCppLM({self._name})"

    def close(self) -> None:
        """Free the model."""
        self._server = None

    def __enter__(self) -> LlamaCppLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---------------------------------------------------------------- the protocol

    @property
    def capabilities(self) -> Capabilities:
        """Everything, the whole distribution at a price."""
        return Capabilities(True, True, True, True, True, True, len(self._pieces))

    @property
    def usage(self) -> Usage:
        """What was spent since the model was made."""
        return self._meter.total

    @property
    def vocabulary(self) -> Sequence[str]:
        """Text of each token id; of those that end the sequence, the empty string."""
        return self._texts

    @functools.cached_property
    def _texts(self) -> tuple[str, ...]:
        return tuple(piece.decode(errors="replace") for piece in self._pieces)

    def start(self, prompt: Prompt) -> Prefix:
        """Return the prefix of a prompt, nothing generated yet.

        Raises:
            DataError: An empty prompt, or one that leaves no room in the context.
        """
        value = prompt_value(prompt)
        if isinstance(value, str):
            ids = self._tokenized(value)
        else:
            request = {"messages": messages_of(value)}
            ids = self._tokenized(self._ask("/apply-template", request)["prompt"])
        if not ids:
            raise DataError(f"start: expected a prompt of at least one token, {value!r} has none")
        if len(ids) >= self.context:
            raise DataError(
                f"start: the prompt has {len(ids)} tokens and the model reads {self.context}, the "
                "answer included; shorten the prompt, or give LlamaCppLM a larger context="
            )
        return Prefix(value, ids, len(ids))

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
        """Continue each prefix by one step; see :class:`LanguageModel`.

        Raises:
            DataError: A prefix that fills the context already.
        """
        check_request(prefixes, stop, max_tokens, rng)
        ids = [self._ids(prefix) for prefix in prefixes]
        for k, row in enumerate(ids):
            if len(row) >= self.context:
                raise DataError(
                    f"generate: prefix {k} has {len(row)} tokens and the model reads "
                    f"{self.context}; nothing can follow it"
                )
        u = uniforms(rng, len(prefixes), max_tokens)
        steps: dict[int, Continuation] = {}
        for k in sorted(range(len(ids)), key=ids.__getitem__):  # Neighbours share what they can.
            room = min(max_tokens, self.context - len(ids[k]))
            if law.allowed is not None:
                steps[k] = self._drawn_here(prefixes[k], ids[k], stop, u[k, :room], law, base)
            else:
                steps[k] = self._drawn_there(ids[k], prefixes[k], stop, room, u[k, 0], law, base)
        return [steps[k] for k in range(len(ids))]

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log p(step | prefix) [n], float64; one token a request.

        Raises:
            DataError: A step that does not fit into the context, or a token that does not exist.
        """
        check_pairs(prefixes, steps)
        total = torch.zeros(len(steps), dtype=torch.float64)
        for k, (prefix, step) in enumerate(zip(prefixes, steps, strict=True)):
            ids = self._ids(prefix)
            tail = step.tokens or self._tokenized(step.text, special=False)
            if step.reason == "end":
                tail += self.end_ids[:1]
            if len(ids) + len(tail) > self.context:
                raise DataError(
                    f"score: prefix and step {k} have {len(ids) + len(tail)} tokens and the model "
                    f"reads {self.context}"
                )
            total[k] = sum(self._log_probs(Law(), prefix, ids, tail))
        return total

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return normalised next-token log probabilities [n, token], float64."""
        rows = [self._distribution(self._ids(prefix)) for prefix in prefixes]
        return torch.stack(rows) if rows else torch.zeros(0, len(self._pieces)).double()

    # ---------------------------------------------------------------- drawing

    def _drawn_there(
        self,
        ids: Ids,
        prefix: Prefix,
        stop: Sequence[str],
        room: int,
        u: Tensor,
        law: Law,
        base: Law | None,
    ) -> Continuation:
        """Let llama.cpp draw a step."""
        plain = law.temperature == law.top_p == 1.0
        request = {
            "prompt": list(ids),
            "n_predict": room,
            "stop": list(stop),
            "seed": int(float(u) * 2**31),
            "samplers": ["temperature", "top_p"],
            "temperature": law.temperature,
            "top_p": law.top_p,
            "n_probs": 1,
            "post_sampling_probs": not plain,
        }
        answer = self._streamed(request)
        if answer is None:
            return DEAD_END
        tokens, log_q = answer.tokens, answer.log_probs
        if len(tokens) != answer.made:  # Parts of characters are not reported: ask which.
            found = self._ask("/completion", {**request, "return_tokens": True, "n_probs": 0})
            tokens = tuple(found["tokens"])
            log_q = self._log_probs(law, prefix, ids, tokens)
        log_p = log_q if base is None else self._log_probs(base, prefix, ids, tokens)
        reason: Reason = "length"
        if tokens and tokens[-1] in self.end_ids:
            reason = "end"
            if len(self.end_ids) > 1:
                log_q = [*log_q[:-1], *self._log_probs(law, prefix, ids, tokens, last=True)]
                log_p = log_q if base is None else log_p
            tokens = tokens[:-1]
        text = self._text(prefix, tokens)
        if reason == "length" and stop_end(text, len(text), stop):
            reason = "stop"
        return Continuation(tokens, text, sum(log_q), sum(log_p), reason, answer.made)

    def _drawn_here(
        self,
        prefix: Prefix,
        ids: Ids,
        stop: Sequence[str],
        u: Tensor,
        law: Law,
        base: Law | None,
    ) -> Continuation:
        """Draw a step token by token from whole distributions."""
        tokens: Ids = ()
        text, log_q, log_p = "", 0.0, 0.0
        reason: Reason = "length"
        for number in u:
            here = Prefix(prefix.prompt, ids + tokens, prefix.start, prefix.text + text)
            row = self._distribution(here.tokens)
            under = self._under(law, here, row)
            token = int(draw_tokens(under[None], number[None])[0])
            if under[token] == -torch.inf:
                return DEAD_END
            log_q += self._of(token, under)
            log_p += self._of(token, under if base is None else self._under(base, here, row))
            if token in self.end_ids:
                reason = "end"
                break
            tokens += (token,)
            known = len(text)
            text = self._text(prefix, tokens)
            if stop_end(text, len(text) - known, stop):
                reason = "stop"
                break
        count = len(tokens) + (reason == "end")
        return Continuation(tokens, text, log_q, log_p, reason, count)

    def _under(self, law: Law, prefix: Prefix, row: Tensor) -> Tensor:
        mask = allowed_mask(law, [prefix], len(row))
        return law_log_probs(row, law, None if mask is None else mask[0])

    def _log_probs(
        self, law: Law, prefix: Prefix, ids: Ids, tokens: Ids, *, last: bool = False
    ) -> list[float]:
        """Log probability of each token under a law, or of the last one alone."""
        self._check_ids(tokens)
        result = []
        for k in range(len(tokens) - 1 if last else 0, len(tokens)):
            before, token = ids + tokens[:k], tokens[k]
            found = self._plainly(before, token) if law == Law() else None
            if found is None:
                text = prefix.text + self._text(prefix, tokens[:k])
                here = Prefix(prefix.prompt, before, prefix.start, text)
                found = self._of(token, self._under(law, here, self._distribution(before)))
            result.append(found)
        return result

    def _of(self, token: int, row: Tensor) -> float:
        """Log probability of a token; all ends of the sequence are one event."""
        return float(row[list(self.end_ids)].logsumexp(0) if token in self.end_ids else row[token])

    def _plainly(self, ids: Ids, token: int) -> float | None:
        """Log probability of a token at temperature 1; None for a part of a character."""
        if token not in self.end_ids:
            return self._forced(ids, token)
        ends = [self._forced(ids, end) for end in self.end_ids]
        return float(torch.tensor(ends, dtype=torch.float64).logsumexp(0))

    def _forced(self, ids: Ids, token: int) -> float | None:
        """Log probability of a token at temperature 1; None for a part of a character."""
        answer = self._streamed(
            {
                "prompt": list(ids),
                "n_predict": 1,
                "samplers": ["temperature"],
                "temperature": 1.0,
                "n_probs": 1,
                "logit_bias": [[token, _FORCE]],
            }
        )
        if answer is None:
            raise DataError(
                f"LlamaCppLM: {len(ids)} tokens could not be read; the context holds {self.context}"
            )
        return answer.log_probs[0] if answer.tokens == (token,) else None

    def _distribution(self, ids: Ids) -> Tensor:
        """Log probabilities of all tokens at temperature 1, [token], float64."""
        rows = self._top(ids, len(self._pieces))
        result = torch.full((len(self._pieces),), -torch.inf, dtype=torch.float64)
        result[[row["id"] for row in rows]] = torch.tensor(
            [-math.inf if row["logprob"] is None else row["logprob"] for row in rows]
        ).double()
        return torch.log_softmax(result, 0)

    def _top(self, ids: Ids, count: int) -> list[dict[str, Any]]:
        request = {
            "prompt": list(ids),
            "n_predict": 1,
            "samplers": ["temperature"],
            "temperature": 1.0,
            "n_probs": count,
            "logit_bias": [[self._plain_token, _FORCE]],  # Parts of characters are not reported.
        }
        with self._lock:
            begun = time.perf_counter()
            answer = self._alive.handle_completions(request)
            self._count(answer, begun)
        if "error" in answer:
            raise DataError(f"LlamaCppLM: {answer['error']['message']}")
        rows: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return rows

    # ---------------------------------------------------------------- requests

    @property
    def _alive(self) -> Any:
        if self._server is None:
            raise DataError("LlamaCppLM: the model was closed")
        return self._server

    def _streamed(self, request: Mapping[str, Any]) -> _Drawn | None:
        """Draw a step, and collect what is reported of each token."""
        chunks: list[dict[str, Any]] = []
        with self._lock:
            begun = time.perf_counter()
            self._alive.handle_completions({**request, "stream": True}, chunks.append)
            if not chunks or "error" in chunks[-1]:
                self._meter.add(Usage(calls=1, failures=1, seconds=time.perf_counter() - begun))
                return None
            self._count(chunks[-1], begun)
        told = [row for chunk in chunks for row in _told(chunk)]
        count = int(chunks[-1]["usage"]["completion_tokens"])
        tokens = tuple(row["id"] for row in told)
        return _Drawn(tokens, [_log_prob(row) for row in told], count)

    def _count(self, answer: Mapping[str, Any], begun: float) -> None:
        usage = answer.get("usage", {})
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        read, made = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        seconds = time.perf_counter() - begun
        failures = int("error" in answer)
        self._meter.add(Usage(read, cached, made, 1, failures=failures, seconds=seconds))

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask the server that the binding runs on the loopback interface."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._alive.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with self._opener.open(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    # ---------------------------------------------------------------- tokens and text

    def _tokenized(self, text: str, *, special: bool = True) -> Ids:
        body = {"content": text, "add_special": special, "parse_special": special}
        return tuple(self._ask("/tokenize", body)["tokens"])

    @functools.cached_property
    def _pieces(self) -> tuple[bytes, ...]:
        """Bytes of each token; none of those that end the sequence."""
        rows = self._top((self._plain_token,), 2**20)
        pieces = [b""] * (1 + max(row["id"] for row in rows))
        for row in rows:
            pieces[row["id"]] = bytes(row["bytes"])
            if not row["bytes"] and row["id"] not in self.end_ids:
                found = self._ask("/detokenize", {"tokens": [row["id"]]})["content"]
                pieces[row["id"]] = found.encode()
        return tuple(pieces)

    def _found_ends(self) -> Ids:
        """Ids at which llama.cpp ends a sequence, found by forcing each."""
        marks = dict.fromkeys((self._ask("/props").get("eos_token") or "", *_END_MARKS))
        singles = {ids[0] for mark in marks if mark and len(ids := self._special(mark)) == 1}
        return tuple(sorted(token for token in singles if self._ends(token)))

    def _special(self, mark: str) -> Ids:
        body = {"content": mark, "add_special": False, "parse_special": True}
        return tuple(self._ask("/tokenize", body)["tokens"])

    def _ends(self, token: int) -> bool:
        request = {"prompt": [self._plain_token], "n_predict": 2, "logit_bias": [[token, _FORCE]]}
        with self._lock:
            return self._alive.handle_completions(request)["choices"][0]["finish_reason"] == "stop"

    def _text(self, prefix: Prefix, new: Ids) -> str:
        """Text that new tokens add; a character counts with its last byte."""
        before = b"".join(self._pieces[token] for token in prefix.generated)
        after = before + b"".join(self._pieces[token] for token in new)
        return _complete(after)[len(_complete(before)) :]

    def _ids(self, prefix: Prefix) -> Ids:
        ids = prefix.tokens
        if not ids:
            prompt = prefix.prompt
            start = self.start(prompt if isinstance(prompt, str) else messages_of(prompt))
            ids = start.tokens + self._tokenized(prefix.text, special=False)
        self._check_ids(ids)
        return ids

    def _check_ids(self, ids: Ids) -> None:
        size = len(self._pieces)
        for token in ids:
            if not 0 <= token < size:
                raise DataError(
                    f"LlamaCppLM: unknown token {token}; expected ids from 0 to {size - 1}: do "
                    "the tokens come from another model?"
                )


class _Drawn(NamedTuple):
    """What llama.cpp told of a step: some of its tokens, and how many there are."""

    tokens: Ids
    log_probs: list[float]
    made: int


def _told(chunk: Mapping[str, Any]) -> list[dict[str, Any]]:
    choice = chunk["choices"][0]
    return (choice.get("logprobs") or {}).get("content") or []


def _log_prob(row: Mapping[str, Any]) -> float:
    if "prob" in row:
        return math.log(row["prob"]) if row["prob"] > 0 else -math.inf
    return float(row["logprob"])


def _complete(data: bytes) -> str:
    """Text up to the last complete character."""
    return data.decode(errors="replace").rstrip("\ufffd")
