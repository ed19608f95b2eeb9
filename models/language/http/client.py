"""One server: its connections, what is known about it, and requests in its own words."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

from probkit.errors import DataError
from probkit.models.language.chat import messages_of
from probkit.models.language.http.ledger import Ledger, Plan, PromptEstimate
from probkit.models.language.http.loop import BackgroundLoop
from probkit.models.language.http.probe import Probe, is_ids, useless
from probkit.models.language.http.profile import Endpoint, ServerProfile
from probkit.models.language.http.requests import Ask, body_of, size_of
from probkit.models.language.http.retry import Retries
from probkit.models.language.http.schema import (
    Answer,
    MalformedError,
    parse_chat,
    parse_completion,
    parse_llama,
)
from probkit.models.language.http.secret import Secret
from probkit.models.language.http.steps import strip_prefill
from probkit.models.language.http.transport import (
    Call,
    RefusedError,
    Transport,
)
from probkit.models.language.protocol import Usage

__all__ = ["Client", "ClientOptions"]

_T = TypeVar("_T")
_REMEMBERED = 512  # prompts whose tokens are kept


@dataclass(frozen=True)
class ClientOptions:
    """Where a server is and how it is talked to; see :class:`OpenAILM`."""

    base_url: str
    model: str | None
    api_key_env: str | None
    concurrency: int
    timeout: float
    retries: Retries
    extra_body: Mapping[str, Any]


class Client:
    """Talks to one server, from any thread.

    Args:
        options: Where and how.
        ledger: Budget.
        profile: What is known already; None to probe on first use.
    """

    def __init__(
        self, options: ClientOptions, ledger: Ledger, profile: ServerProfile | None
    ) -> None:
        self.options, self.ledger = options, ledger
        self._loop = BackgroundLoop()
        self._process = os.getpid()
        self._transport: Transport | None = None
        self._profile = profile
        self._probing: Probe | None = None
        self._lock = threading.Lock()
        self._estimates = {"chat": PromptEstimate(), "raw": PromptEstimate()}
        self._prompts: dict[object, tuple[int, ...]] = {}
        self._token_texts: dict[int, str] = {}
        self.unheard = True
        self.end_token = -1
        url = options.base_url
        self.root = url.removesuffix("/v1")
        # Of an address without a path, the endpoints stand where all servers have them.
        self.api = url if url.count("/") > 2 else f"{url}/v1"

    # ---------------------------------------------------------------- life

    def run(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run a coroutine that uses this client to its end."""
        return self._loop.run(work)

    def close(self) -> None:
        """Cancel what is under way and close all connections."""
        if os.getpid() != self._process:
            return
        transport, self._transport = self._transport, None
        if transport is not None:
            self._loop.run(transport.aclose)
        self._loop.stop()

    def profile(self, routes: tuple[str, ...]) -> ServerProfile:
        """Return what the server can do; asks it the first time."""
        with self._lock:
            if self._profile is None:
                self._profile = self.run(lambda: self._probed(routes))
            return self._profile

    async def _probed(self, routes: tuple[str, ...]) -> ServerProfile:
        options = self.options
        probe = Probe(
            self.api, self.root, options.model, options.api_key_env, self._ask, self.open.ask
        )
        self._probing = probe
        return await probe.run(routes)

    @property
    def open(self) -> Transport:
        """The connections; only on the event loop."""
        if self._transport is None:
            options = self.options
            self.ledger.rebind()
            self._transport = Transport(
                options.base_url,
                Secret(options.api_key_env),
                self.ledger,
                options.retries,
                options.concurrency,
                options.timeout,
            )
        return self._transport

    # ---------------------------------------------------------------- generating

    async def _ask(self, endpoint: Endpoint, ask: Ask) -> Answer:
        model = self._probing.model if self._probing is not None else self.options.model
        return await self.answer(endpoint, model or "", ask)

    async def answer(self, endpoint: Endpoint, model: str, ask: Ask, until: float = inf) -> Answer:
        """Generate one text.

        Raises:
            OverBudgetError: The budget forbids to send it.
            FailedError: No usable answer.
        """
        urls = {
            "completions": f"{self.api}/completions",
            "chat": f"{self.api}/chat/completions",
            "llama.cpp": f"{self.root}/completion",
        }
        plan = self._plan(endpoint, ask)
        body = body_of(endpoint, model, ask) | dict(self.options.extra_body)
        call = Call(urls[endpoint.way], body, plan)

        def parse(content: bytes) -> Answer:
            answer = _PARSERS[endpoint.way](content)
            if endpoint.repeats_prefill and ask.partial:
                answer = strip_prefill(answer, ask.partial)
            if endpoint.way != "llama.cpp" and answer.text:
                if endpoint.token_ids and not answer.ids:
                    raise MalformedError("an answer without its token ids")
                if endpoint.logprobs and ask.logprobs is not None and not answer.pieces:
                    raise MalformedError("an answer without its log probabilities")
            return answer

        def count(answer: Answer) -> Usage:
            told = answer.completion_tokens
            least = max(len(answer.ids), len(answer.pieces) if not ask.extra.get("echo") else 0)
            prompt = plan.prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens
            return Usage(
                prompt_tokens=prompt,
                cached_tokens=min(prompt, answer.cached_tokens),
                completion_tokens=plan.completion_tokens if told is None else max(told, least),
            )

        answer = await self.open.generate(call, parse, count, until)
        self.unheard = False
        if answer.prompt_tokens is not None and not _is_ids(ask.prompt):
            self._estimate(endpoint).learn(size_of(ask), answer.prompt_tokens)
        return answer

    def _plan(self, endpoint: Endpoint, ask: Ask) -> Plan:
        if _is_ids(ask.prompt):
            prompt = len(ask.prompt)
        else:
            prompt = self._estimate(endpoint).tokens(size_of(ask))
        return Plan(prompt, ask.max_tokens * int(ask.extra.get("n", 1)))

    def _estimate(self, endpoint: Endpoint) -> PromptEstimate:
        return self._estimates["chat" if endpoint.way == "chat" else "raw"]

    def misdirected(self, error: RefusedError) -> DataError:
        """Return the error for a server that refuses the first request."""
        return useless(self.api, self.options.model, self.options.api_key_env, [error])

    # ---------------------------------------------------------------- tokens

    async def prompt_ids(
        self, endpoint: Endpoint, model: str, prompt: str | tuple[tuple[str, str], ...]
    ) -> tuple[int, ...]:
        """Return the token ids of a prompt, a chat's template applied, remembered.

        Raises:
            FailedError: The server does not tell.
        """
        if prompt not in self._prompts:
            if len(self._prompts) >= _REMEMBERED:
                self._prompts.pop(next(iter(self._prompts)))
            self._prompts[prompt] = await self._tokenized(endpoint, model, prompt)
        return self._prompts[prompt]

    async def text_ids(self, endpoint: Endpoint, model: str, text: str) -> tuple[int, ...]:
        """Return the token ids of a text inside a sequence.

        Raises:
            FailedError: The server does not tell.
        """
        if endpoint.way == "llama.cpp":
            return await self._tokens({"content": text, "add_special": False})
        return await self._tokens({"model": model, "prompt": text, "add_special_tokens": False})

    async def token_text(self, token: int) -> str:
        """Return the text of one token (llama.cpp), remembered.

        Raises:
            FailedError: The server does not tell.
        """
        if token not in self._token_texts:
            body = {"tokens": [token]}
            value = await self._post("detokenize", body, lambda v: type(v.get("content")) is str)
            self._token_texts[token] = value["content"]
        return self._token_texts[token]

    async def _tokenized(
        self, endpoint: Endpoint, model: str, prompt: str | tuple[tuple[str, str], ...]
    ) -> tuple[int, ...]:
        if endpoint.way != "llama.cpp":
            if isinstance(prompt, str):
                return await self._tokens({"model": model, "prompt": prompt})
            messages = messages_of(prompt)
            return await self._tokens(
                {"model": model, "messages": messages, "add_generation_prompt": True}
            )
        if not isinstance(prompt, str):
            body = {"messages": messages_of(prompt)}
            value = await self._post("apply-template", body, lambda v: bool(v.get("prompt")))
            prompt = str(value["prompt"])
        return await self._tokens({"content": prompt, "add_special": True, "parse_special": True})

    async def _tokens(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        value = await self._post("tokenize", body, lambda v: is_ids(v.get("tokens")))
        return tuple(value["tokens"])

    async def _post(
        self, name: str, body: Mapping[str, Any], valid: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        return await self.open.ask("POST", f"{self.root}/{name}", body, valid=valid)


_PARSERS = {
    "completions": parse_completion,
    "chat": parse_chat,
    "llama.cpp": parse_llama,
}


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, tuple) and bool(prompt) and isinstance(prompt[0], int)
