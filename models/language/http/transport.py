"""Requests over HTTP: bounded in number and time, repeated where that can help."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from time import monotonic
from types import ModuleType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from probkit.errors import DataError
from probkit.extras import require
from probkit.models.language.http.ledger import Ledger, Plan
from probkit.models.language.http.retry import Retries, retry_after
from probkit.models.language.http.schema import MalformedError, read_json
from probkit.models.language.http.secret import Secret
from probkit.models.language.protocol import Usage

__all__ = ["Call", "FailedError", "RefusedError", "Reply", "Transport", "check_url"]

_LOG = logging.getLogger("probkit.language")
_LARGEST = 1 << 26  # bytes of a body
_NEVER_COMPUTED = frozenset({429, 503})  # the server turned the request away unread
_AGAIN = frozenset({408, 409, 425, 429})  # and every status from 500
_SPENT = ("insufficient_quota", "billing_hard_limit_reached")

_T = TypeVar("_T")


class FailedError(Exception):
    """A request that got no usable answer however often it was sent."""


class RefusedError(FailedError):
    """A request that the server will never answer.

    Attributes:
        status: HTTP status.
        message: What the server said, shortened, the key blotted out.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status, self.message = status, message


class _LostError(Exception):
    """One sending that went wrong.

    Attributes:
        paid: Whether the server may have computed an answer.
        wait: Seconds that it asked to wait.
    """

    def __init__(self, why: str, *, paid: bool, wait: float = 0.0) -> None:
        super().__init__(why)
        self.paid, self.wait = paid, wait


class Reply(NamedTuple):
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Call:
    """A request that generates.

    Attributes:
        url: Whole address.
        body: Sent as JSON.
        plan: The most that it can cost.
    """

    url: str
    body: Mapping[str, Any]
    plan: Plan


def check_url(base_url: str) -> str:
    """Return an address without its closing slash.

    Raises:
        DataError: No address of HTTP, or one with a password, a query or a fragment in it.
    """
    parts = urlsplit(base_url) if isinstance(base_url, str) else urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(
            "OpenAILM: expected base_url as http://host:port/v1 or https://host/v1, got "
            f"{base_url!r}"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise DataError(
            "OpenAILM: expected base_url without user name, password, query or fragment; put the "
            "API key into an environment variable and name it with api_key_env="
        )
    return base_url.rstrip("/")


class Transport:
    """Sends requests. All methods that send run on the event loop it is opened on.

    Args:
        host: Address that tells whether system proxies are used: never for loopback.
        secret: API key.
        ledger: Every sending of a generating request is admitted and settled there.
        retries: When to send again.
        concurrency: Requests under way at once.
        timeout: Of one sending, in seconds.
    """

    def __init__(
        self,
        host: str,
        secret: Secret,
        ledger: Ledger,
        retries: Retries,
        concurrency: int,
        timeout: float,
    ) -> None:
        self._secret, self._ledger, self._retries = secret, ledger, retries
        self._timeout = timeout
        self._slots = asyncio.Semaphore(concurrency)
        self._not_before = 0.0
        httpx = _httpx()
        loopback = urlsplit(host).hostname in ("localhost", "127.0.0.1", "::1")
        self._httpx = httpx
        self._client = httpx.AsyncClient(
            headers={**secret.headers, "User-Agent": "probkit"},
            timeout=None,  # every sending stands under a timeout of its own, body included
            limits=httpx.Limits(max_connections=concurrency + 4),
            follow_redirects=False,  # the key goes to nobody else
            trust_env=not loopback,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def ask(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None = None,
        *,
        valid: Callable[[dict[str, Any]], bool],
    ) -> dict[str, Any]:
        """Send a request that generates nothing and costs nothing; returns its JSON.

        Args:
            method: Of HTTP.
            url: Whole address.
            body: Sent as JSON.
            valid: Tells whether an answer is one.

        Raises:
            RefusedError: The server will never answer it.
            FailedError: No valid answer, however often it was sent.
        """
        repeat = 0
        while True:
            try:
                async with self._slots:
                    await self._cool()
                    value = read_json((await self._once(method, url, body)).body)
                if not valid(value):
                    raise MalformedError("the answer of another request")
                return value
            except (MalformedError, _LostError) as problem:
                repeat = await self._before_repeat(repeat, problem)

    async def generate(
        self,
        call: Call,
        parse: Callable[[bytes], _T],
        count: Callable[[_T], Usage],
        until: float = inf,
    ) -> _T:
        """Send a request that generates, within the budget, until its answer can be parsed.

        Args:
            call: The request.
            parse: Reads the body; raises MalformedError where asking again may help.
            count: What the answer cost, without money.
            until: Monotonic time after which no repeat starts.

        Raises:
            OverBudgetError: The budget forbids to send it, or to send it again.
            RefusedError: The server will never answer it.
            FailedError: No usable answer, however often it was sent.
        """
        repeat = 0
        try:
            while True:
                try:
                    async with self._slots:
                        await self._cool(until)
                        return await self._paid(call, parse, count, repeat > 0)
                except (MalformedError, _LostError) as problem:
                    repeat = await self._before_repeat(repeat, problem, until)
        except (FailedError, asyncio.CancelledError):
            self._ledger.add(Usage(failures=1))
            raise

    async def _paid(
        self, call: Call, parse: Callable[[bytes], _T], count: Callable[[_T], Usage], again: bool
    ) -> _T:
        """One sending, reserved before and settled after, whatever happens in between."""
        ticket = await self._ledger.admit(call.plan, repeat=again)
        try:
            reply = await self._once("POST", call.url, call.body)
            answer = parse(reply.body)
            self._ledger.settle(ticket, count(answer))
            return answer
        except (_LostError, RefusedError) as problem:
            if isinstance(problem, RefusedError) or not problem.paid:
                self._ledger.settle(ticket, Usage())
            raise
        finally:
            self._ledger.lost(ticket)  # nothing, where it is settled already

    async def _once(self, method: str, url: str, body: Mapping[str, Any] | None) -> Reply:
        httpx = self._httpx
        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._read(method, url, body)
        except TimeoutError:
            raise _LostError(f"no answer in {self._timeout:g} s", paid=True) from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            raise _LostError("no connection", paid=False) from None
        except httpx.HTTPError as error:
            # The text of such an error names no header, but may quote the server.
            raise _LostError(f"the connection broke ({type(error).__name__})", paid=True) from None
        if 200 <= reply.status < 300:
            return reply
        message = _message(reply.body)
        again = reply.status in _AGAIN or reply.status >= 500
        if not again or any(word.encode() in reply.body for word in _SPENT):
            raise RefusedError(reply.status, message)
        wait = retry_after(reply.headers)
        if wait:
            self._not_before = max(self._not_before, monotonic() + wait)
        paid = reply.status not in _NEVER_COMPUTED and reply.status >= 500
        raise _LostError(f"HTTP {reply.status}: {message}", paid=paid, wait=wait)

    async def _read(self, method: str, url: str, body: Mapping[str, Any] | None) -> Reply:
        async with self._client.stream(method, url, json=body) as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > _LARGEST:
                    raise MalformedError("a body without end")
            headers = {key.lower(): value for key, value in response.headers.items()}
            return Reply(response.status_code, headers, self._secret.wipe(b"".join(parts)))

    async def _cool(self, until: float = inf) -> None:
        """Wait until the time before which the server asked not to be called."""
        while (left := self._not_before - monotonic()) > 0:
            if self._not_before > until:
                raise FailedError(f"the server asks to wait {left:.3g} s, more than is left")
            await asyncio.sleep(left)

    async def _before_repeat(self, repeat: int, problem: Exception, until: float = inf) -> int:
        """Wait for the next repeat and return its number.

        Raises:
            FailedError: There is none.
        """
        repeat += 1
        if repeat > self._retries.most:
            raise FailedError(f"{problem} (sent {repeat} times)") from None
        _LOG.debug("repeat %d: %s", repeat, problem)
        asked = problem.wait if isinstance(problem, _LostError) else 0.0
        pause = self._retries.pause(repeat, asked)
        if monotonic() + pause > until:
            raise FailedError(f"{problem} (no time is left to send it again)") from None
        await asyncio.sleep(pause)
        return repeat


def _httpx() -> ModuleType:
    """Import httpx; what it draws from Python's global stream while it loads is put back."""
    state = random.getstate()
    module = require("httpx", extra="llm")
    random.setstate(state)
    return module


def _message(body: bytes) -> str:
    """What an error body says, in one short line."""
    try:
        value = json.loads(body)
        error = value.get("error", value) if isinstance(value, dict) else value
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        text = body.decode(errors="replace")
    line = " ".join(str(text).split())
    return line[:300] or "no message"
