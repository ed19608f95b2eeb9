"""Language models behind any server that speaks the OpenAI schema."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register
from probkit.models.language.chat import prompt_value
from probkit.models.language.http.client import Client, ClientOptions
from probkit.models.language.http.ledger import Ledger, OverBudgetError, Prices
from probkit.models.language.http.profile import Endpoint, ServerProfile
from probkit.models.language.http.requests import Ask
from probkit.models.language.http.retry import Retries
from probkit.models.language.http.schema import (
    Answer,
    MalformedError,
    Piece,
    alternatives,
    prompt_log_probs,
)
from probkit.models.language.http.steps import last_token_needed, step_of
from probkit.models.language.http.transport import FailedError, RefusedError, check_url
from probkit.models.language.protocol import (
    Budget,
    Capabilities,
    Continuation,
    Law,
    Prefix,
    Prompt,
    Usage,
)
from probkit.models.language.sampling import check_request
from probkit.rng import seed_of

__all__ = ["OpenAILM"]

_LOG = logging.getLogger("probkit.language")
_T = TypeVar("_T")
_Job = Callable[[], Coroutine[Any, Any, Any]]
_LISTED = 2000  # alternatives among which a token is looked up
_FAILED = Continuation((), "", math.nan, math.nan, "failed", 0)
_OVER = Continuation((), "", 0.0, 0.0, "budget", 0)
_ROUTES = {
    "auto": ("completions", "chat"),
    "completions": ("completions",),
    "chat": ("chat",),
}


class OpenAILM:
    """A language model behind HTTP: vLLM, llama.cpp, Ollama, or a hosted service.

    The server is probed once, on first use, with a few short requests: whether it continues raw
    text, or a partial answer inside a chat; which log probabilities, seeds, stop strings and token
    ids it tells. ``lm.report()`` shows what was found.

    The API key is read from the environment, never passed as an argument; it stands in no
    representation, error, log, transcript or file, and is blotted out of what a server returns.

    A request that fails for good comes back as a step with the reason "failed"; one that could pass
    the budget is not sent and comes back with the reason "budget". Only the first contact raises:
    a wrong address, key or model is an error then.

    Log probabilities are the server's. Servers tell them at temperature 1 (vLLM by default,
    llama.cpp) or after the temperature; ``log_q`` and ``log_p`` are NaN where they cannot be had
    from what it tells, such as the former at another temperature on the first kind of servers.

    Args:
        base_url: Address, such as ``"http://127.0.0.1:8000/v1"``.
        model: Name; None where the server has one model only.
        api_key_env: Name of the environment variable with the API key; None to send no key. Where
            the variable is not set no key is sent.
        budget: Limits on everything this object sends, probing and repeated requests included. The
            worst case of a request is reserved before it is sent. Of an answer that got lost the
            worst case counts as spent.
        prices: For ``usage.money`` and ``Budget(money=...)``.
        concurrency: Requests under way at once.
        timeout: Of one sending, in seconds.
        deadline: Of one call of ``generate`` or ``score``, with all repeats, in seconds.
        retries: When to send again after status 429 or 5xx, a timeout, a broken connection or a
            malformed answer.
        route: "completions" for raw text, "chat" for chat messages, "auto" for what the server has.
        stops: "server" sends stop strings to the server, "client" looks for them in answers of
            ``max_tokens`` tokens, which costs the rest. "auto" takes the server only where it tells
            whether, and by which string, it was stopped.
        extra_body: More fields of every request, such as ``{"reasoning_effort": "none"}``. Fields
            that change the sampling change the model that log probabilities speak of.
        profile: ``lm.profile`` of an earlier object, to save the probing.

    Raises:
        DataError: A value that cannot be used.

    Example:
        >>> lm = OpenAILM("http://127.0.0.1:8000/v1", "some-model", api_key_env=None)
        >>> lm
        OpenAILM('http://127.0.0.1:8000/v1', 'some-model', api_key_env=None)
        >>> lm.usage.calls
        0
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        budget: Budget | None = None,
        prices: Prices | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        deadline: float = 600.0,
        retries: Retries | None = None,
        route: Literal["auto", "completions", "chat"] = "auto",
        stops: Literal["auto", "server", "client"] = "auto",
        extra_body: Mapping[str, Any] | None = None,
        profile: ServerProfile | None = None,
    ) -> None:
        self.base_url = check_url(base_url)
        self.model, self.api_key_env = model, api_key_env
        self.budget = Budget() if budget is None else budget
        self.prices = prices
        self.concurrency, self.timeout, self.deadline = concurrency, timeout, deadline
        self.retries = Retries() if retries is None else retries
        self.route, self.stops = route, stops
        self.extra_body = dict(extra_body or {})
        _check(self)
        self._ledger = Ledger(self.budget, Prices() if prices is None else prices)
        options = ClientOptions(
            self.base_url,
            model,
            api_key_env,
            concurrency,
            timeout,
            self.retries,
            self.extra_body,
        )
        self._client = Client(options, self._ledger, profile)
        self._given_profile = profile
        self._closing = weakref.finalize(self, self._client.close)

    def __repr__(self) -> str:
        return f"OpenAILM({self.base_url!r}, {self.model!r}, api_key_env={self.api_key_env!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_tree, (_to_tree(self),)

    def __enter__(self) -> OpenAILM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close all connections; the next call opens new ones."""
        self._client.close()

    # ---------------------------------------------------------------- what it can do and has done

    @property
    def profile(self) -> ServerProfile:
        """What probing found; the first look at it probes.

        Raises:
            DataError: The address, the key or the model is wrong, or nothing answers.
        """
        return self._timed(lambda: self._client.profile(_ROUTES[self.route]))

    @property
    def capabilities(self) -> Capabilities:
        """What the server can do with raw text, or with chats where it takes nothing else."""
        return self._main.capabilities

    @property
    def usage(self) -> Usage:
        """What was spent since the model was made, probing included."""
        return self._ledger.usage

    @property
    def vocabulary(self) -> Sequence[str]:
        """Servers do not tell it: empty."""
        return ()

    def report(self) -> str:
        """Return in words what was found about the server, and what was spent."""
        found, used = str(self.profile), self.usage
        spent = (
            f"{used.calls} requests and {used.retries} repeats, {used.prompt_tokens} prompt tokens "
            f"({used.cached_tokens} cached), {used.completion_tokens} generated, "
            f"{used.failures} failures, {used.seconds:.1f} s"
        )
        money = "" if self.prices is None else f", {used.money:.6g} in money"
        return f"{found}\n  spent: {spent}{money}"

    # ---------------------------------------------------------------- the protocol

    def start(self, prompt: Prompt) -> Prefix:
        """Return the prefix of a prompt, nothing generated yet.

        Raises:
            DataError: An empty prompt, or one that does not fit into the context.
        """
        value = prompt_value(prompt)
        profile = self.profile
        endpoint = self._endpoint(value, profile)
        if not endpoint.token_ids:
            return Prefix(value)
        until = time.monotonic() + self.deadline
        try:
            job = partial(self._client.prompt_ids, endpoint, profile.model, value)
            ids = self._client.run(partial(_before, until, job))
        except (FailedError, TimeoutError):
            return Prefix(value)  # asked for again when it is continued
        if profile.context is not None and len(ids) >= profile.context:
            raise DataError(
                f"start: expected a prompt of fewer than {profile.context} tokens, the context of "
                f"{profile.model!r}, got {len(ids)}; shorten it"
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

        Every request carries a seed of its own, drawn from ``rng``; where the server has no seeds
        (``capabilities.seed``) its answers are not reproducible.

        Raises:
            CapabilityError: ``law.allowed``; a partial answer where the server begins new ones.
            DataError: At first use, a wrong address, key or model.
        """
        check_request(prefixes, stop, max_tokens, rng)
        for each in (law, base):
            if each is not None and each.allowed is not None:
                raise CapabilityError(
                    "Law.allowed needs a language model with logits; OpenAILM has none. Use "
                    "TransformersLM or LlamaCppLM, or forbid by a potential"
                )
        seeds = _seeds(rng, len(prefixes))
        if not prefixes:
            return []
        profile = self.profile
        for prefix in prefixes:
            self._require_prefill(prefix, profile)
            self._server_stops(self._endpoint(prefix.prompt, profile), tuple(stop))
        until, over = self._until()
        if until is None:
            return [_OVER] * len(prefixes)
        jobs = [
            partial(self._step, profile, prefix, tuple(stop), max_tokens, law, base, seed, until)
            for prefix, seed in zip(prefixes, seeds, strict=True)
        ]
        return self._together(jobs, until, over)

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log p(step | prefix) at temperature 1, [n], float64.

        A step whose request failed for good, or that the budget forbade to send, has NaN: it is
        unknown, not impossible. llama.cpp takes one request a token.

        Raises:
            CapabilityError: The server does not tell log probabilities of given text, or not of
                the end of the sequence.
            ShapeError: Not one step a prefix.
        """
        if len(prefixes) != len(steps):
            raise ShapeError(
                f"score: expected one step for each prefix, got {len(prefixes)} prefixes and "
                f"{len(steps)} steps"
            )
        profile = self.profile
        for prefix, step in zip(prefixes, steps, strict=True):
            endpoint = self._endpoint(prefix.prompt, profile)
            if not endpoint.scores:
                raise CapabilityError(
                    "score needs a language model with prompt_logprobs; this server has none. Use "
                    "vLLM, llama.cpp's own server, TransformersLM or LlamaCppLM"
                )
            if step.reason == "end" and (endpoint.scores == "echo" or self._end(profile) < 0):
                raise CapabilityError(
                    "score: this server does not tell the token that ends a sequence, so steps "
                    'with the reason "end" cannot be scored; use TransformersLM or LlamaCppLM'
                )
        until, _ = self._until()
        if until is None or not len(steps):
            return torch.full((len(steps),), math.nan, dtype=torch.float64)
        jobs = [
            partial(self._scored, profile, prefix, step, until)
            for prefix, step in zip(prefixes, steps, strict=True)
        ]
        totals = self._together(jobs, until, math.nan)
        return torch.tensor(totals, dtype=torch.float64)

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Servers tell some alternatives only: see :meth:`top_log_probs`.

        Raises:
            CapabilityError: Always.
        """
        raise CapabilityError(
            "next_log_probs needs a language model with logits; OpenAILM has none. Use "
            "lm.top_log_probs(prefixes) for the most probable tokens, TransformersLM or LlamaCppLM"
        )

    def top_log_probs(self, prefixes: Sequence[Prefix]) -> list[dict[str, float]]:
        """Return log probabilities of the most probable next tokens, at temperature 1, by text.

        Args:
            prefixes: n prefixes.

        Returns:
            n mappings with up to ``capabilities.top_logprobs`` tokens each; their probabilities sum
            to less than one. An empty one stands for a request that failed, or was not sent.

        Raises:
            CapabilityError: The server does not tell alternatives.
        """
        profile = self.profile
        for prefix in prefixes:
            if not self._endpoint(prefix.prompt, profile).top_logprobs:
                raise CapabilityError(
                    "top_log_probs needs a language model with top_logprobs; this server tells none"
                )
            self._require_prefill(prefix, profile)
        until, _ = self._until()
        if until is None or not len(prefixes):
            return [{} for _ in prefixes]
        jobs = [partial(self._tops, profile, prefix, until) for prefix in prefixes]
        return self._together(jobs, until, {})

    # ---------------------------------------------------------------- one request

    async def _step(
        self,
        profile: ServerProfile,
        prefix: Prefix,
        stop: tuple[str, ...],
        max_tokens: int,
        law: Law,
        base: Law | None,
        seed: int,
        until: float,
    ) -> Continuation:
        endpoint = self._endpoint(prefix.prompt, profile)
        server_stops = self._server_stops(endpoint, stop)
        try:
            ask = await self._prompted(endpoint, profile, prefix)
            ask = ask._replace(
                max_tokens=max_tokens,
                temperature=float(law.temperature),
                top_p=float(law.top_p),
                seed=seed,
                stop=stop if server_stops else (),
                logprobs=0 if endpoint.logprobs else None,
            )
            answer = await self._client.answer(endpoint, profile.model, ask, until)
            last = None
            if endpoint.way == "llama.cpp":
                if answer.completion_tokens not in (None, len(answer.ids)):
                    answer = await self._with_all_tokens(endpoint, profile, ask, until)
                if last_token_needed(answer):
                    last = await self._client.token_text(answer.ids[-1])
        except FailedError as error:
            if isinstance(error, RefusedError) and self._client.unheard:
                raise self._client.misdirected(error) from None
            _LOG.warning("a request failed for good: %s", error)
            return _FAILED
        except OverBudgetError:
            return _OVER
        step = step_of(
            answer,
            endpoint,
            stop=stop,
            server_stops=server_stops,
            law=law,
            base=base,
            last_token=last,
        )
        if step.reason == "end" and len(answer.ids) == len(step.tokens) + 1:
            self._client.end_token = answer.ids[-1]
        return step

    async def _tops(self, profile: ServerProfile, prefix: Prefix, until: float) -> dict[str, float]:
        endpoint = self._endpoint(prefix.prompt, profile)
        try:
            ask = await self._prompted(endpoint, profile, prefix)
            ask = ask._replace(logprobs=endpoint.top_logprobs)
            answer = await self._client.answer(endpoint, profile.model, ask, until)
        except (FailedError, OverBudgetError) as error:
            _LOG.warning("a request for alternatives was not answered: %s", error)
            return {}
        return dict(answer.pieces[0].top) if answer.pieces else {}

    async def _scored(
        self, profile: ServerProfile, prefix: Prefix, step: Continuation, until: float
    ) -> float:
        endpoint = self._endpoint(prefix.prompt, profile)
        try:
            if endpoint.scores == "echo":
                return await self._echoed(endpoint, profile, prefix, step, until)
            before = await self._ids(endpoint, profile, prefix)
            target = step.tokens
            if not target and step.text:
                target = await self._client.text_ids(endpoint, profile.model, step.text)
            if step.reason == "end":
                target = (*target, self._end(profile))
            if endpoint.scores == "prompt_logprobs":
                ask = Ask(before + target, extra={"prompt_logprobs": 0})
                answer = await self._client.answer(endpoint, profile.model, ask, until)
                rows = prompt_log_probs(answer)[len(before) :]
                return math.fsum(row[token] for row, token in zip(rows, target, strict=True))
            pieces = await self._forced(endpoint, profile, before, target, until)
            return math.fsum(piece.log_prob for piece in pieces)
        except (FailedError, OverBudgetError, MalformedError, KeyError, ValueError) as error:
            _LOG.warning("a step could not be scored: %s", error)
            return math.nan

    async def _forced(
        self,
        endpoint: Endpoint,
        profile: ServerProfile,
        before: tuple[int, ...],
        target: tuple[int, ...],
        until: float,
    ) -> list[Piece]:
        """Score tokens on llama.cpp: each is forced by a bias that its log probability ignores."""
        pieces = []
        for k, token in enumerate(target):
            ask = Ask(
                before + target[:k],
                temperature=0.0,
                logprobs=1,
                extra={"logit_bias": [[token, 1000.0]]},
            )
            answer = await self._client.answer(endpoint, profile.model, ask, until)
            if answer.ids == (token,) and answer.pieces:
                log_prob = answer.pieces[0].log_prob
            elif not answer.ids:  # withheld, for it ends inside a character
                log_prob = await self._listed(endpoint, profile, before + target[:k], token, until)
            else:
                raise FailedError("a forced token came back as another one")
            pieces.append(Piece(None, token, log_prob, {}))
        return pieces

    async def _listed(
        self,
        endpoint: Endpoint,
        profile: ServerProfile,
        before: tuple[int, ...],
        token: int,
        until: float,
    ) -> float:
        """Look a token up among the alternatives to another one that is forced."""
        other = (await self._client.text_ids(endpoint, profile.model, "a"))[0]
        listed = {"stream": False, "n_probs": _LISTED, "logit_bias": [[other, 1000.0]]}
        ask = Ask(before, temperature=0.0, extra=listed)
        answer = await self._client.answer(endpoint, profile.model, ask, until)
        try:
            found = alternatives(answer).get(token)
        except MalformedError as error:
            raise FailedError(str(error)) from None
        if found is None:
            raise FailedError(f"a token is not among the {_LISTED} most probable ones")
        return found

    async def _with_all_tokens(
        self, endpoint: Endpoint, profile: ServerProfile, ask: Ask, until: float
    ) -> Answer:
        """Ask llama.cpp again, by the same seed, for an answer with every token id.

        Its streams leave out tokens that end inside a character (of an emoji, say).
        """
        again = ask._replace(extra={"stream": False})
        answer = await self._client.answer(endpoint, profile.model, again, until)
        if len(answer.ids) != answer.completion_tokens or not isinstance(ask.prompt, tuple):
            raise FailedError("llama.cpp does not tell all tokens of an answer")
        if endpoint.scores != "forced":
            return answer
        before = tuple(int(token) for token in ask.prompt if isinstance(token, int))
        try:
            pieces = await self._forced(endpoint, profile, before, answer.ids, until)
        except (FailedError, OverBudgetError):
            return answer  # good without log probabilities
        return answer._replace(pieces=tuple(pieces))

    async def _echoed(
        self,
        endpoint: Endpoint,
        profile: ServerProfile,
        prefix: Prefix,
        step: Continuation,
        until: float,
    ) -> float:
        """Score by an echoed prompt; the tokens must break where the step begins."""
        before = len(f"{prefix.prompt}{prefix.text}".encode())
        after = before + len(step.text.encode())
        ask = Ask(f"{prefix.prompt}{prefix.text}{step.text}", logprobs=1, extra={"echo": True})
        answer = await self._client.answer(endpoint, profile.model, ask, until)
        place = 0
        found: list[float] = []
        for piece in answer.pieces:
            if place == before or (found and place < after):
                found.append(piece.log_prob)
            if place >= after or piece.text is None:
                break
            place += len(piece.text)
            if place == after:
                break
        if place != after or not found:
            raise FailedError("the tokens of the echoed text do not break where the step begins")
        return math.fsum(found)

    async def _prompted(self, endpoint: Endpoint, profile: ServerProfile, prefix: Prefix) -> Ask:
        """The request that continues a prefix, its law still to be set."""
        if endpoint.token_ids:
            return Ask(await self._ids(endpoint, profile, prefix))
        if endpoint.way == "chat":
            return Ask(prefix.prompt, prefix.text)
        return Ask(f"{prefix.prompt}{prefix.text}")

    async def _ids(
        self, endpoint: Endpoint, profile: ServerProfile, prefix: Prefix
    ) -> tuple[int, ...]:
        """Token ids of a prefix as they were generated."""
        if prefix.start:
            opening = prefix.tokens[: prefix.start]
        else:
            opening = await self._client.prompt_ids(endpoint, profile.model, prefix.prompt)
        generated = prefix.generated
        if prefix.text and not generated:
            generated = await self._client.text_ids(endpoint, profile.model, prefix.text)
        return opening + generated

    # ---------------------------------------------------------------- parts

    def _end(self, profile: ServerProfile) -> int:
        """Id of the end of the sequence, told by the server or seen at the end of an answer."""
        return profile.end_token if profile.end_token >= 0 else self._client.end_token

    @property
    def _main(self) -> Endpoint:
        profile = self.profile
        endpoint = profile.raw or profile.chat
        assert endpoint is not None  # else probing raised
        return endpoint

    def _endpoint(self, prompt: object, profile: ServerProfile) -> Endpoint:
        """How a prompt is sent. Raw text goes into a user message where nothing else is taken."""
        if isinstance(prompt, str):
            return self._main
        if profile.chat is None:
            raise CapabilityError(
                "OpenAILM: expected raw text, for this server takes no chats by the route "
                f"{self.route!r}, got messages; put them into one text, or choose another route="
            )
        return profile.chat

    def _require_prefill(self, prefix: Prefix, profile: ServerProfile) -> None:
        if prefix.text and not self._endpoint(prefix.prompt, profile).prefill:
            raise CapabilityError(
                "generate: continuing a partial answer needs a language model with prefill; this "
                "server begins a new answer instead. Use a server with /completions (vLLM, "
                "llama.cpp), or take whole answers in one step"
            )

    def _server_stops(self, endpoint: Endpoint, stop: tuple[str, ...]) -> bool:
        if not stop or self.stops == "client":
            return False
        if self.stops == "auto":
            return endpoint.stops != "dropped"
        if endpoint.stops == "dropped" and len(stop) > 1:
            raise CapabilityError(
                f"generate: the server does not tell which of {len(stop)} stop strings ended a "
                'step; give one, or take stops="client"'
            )
        return True

    def _until(self) -> tuple[float | None, Continuation]:
        """When a call that begins now must end, and what then comes back; None for no time left."""
        now, limit = time.monotonic(), self.budget.seconds
        if limit is None:
            return now + self.deadline, _FAILED
        left = limit - self.usage.seconds
        if left <= 0:
            return None, _OVER
        return now + min(left, self.deadline), _OVER if left < self.deadline else _FAILED

    def _together(self, jobs: Sequence[_Job], until: float, late: _T) -> list[_T]:
        return self._timed(lambda: self._client.run(lambda: _all(jobs, until, late)))

    def _timed(self, work: Callable[[], _T]) -> _T:
        begun = time.perf_counter()
        try:
            return work()
        finally:
            self._ledger.add(Usage(seconds=time.perf_counter() - begun))


async def _before(until: float, job: _Job) -> Any:
    async with asyncio.timeout(until - time.monotonic()):
        return await job()


async def _all(jobs: Sequence[_Job], until: float, late: _T) -> list[_T]:
    """Run requests together; ``late`` stands for those that the deadline cut off."""

    async def one(job: _Job) -> _T:
        try:
            return await _before(until, job)
        except TimeoutError:
            return late

    tasks = [asyncio.ensure_future(one(job)) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # after an error or a cancellation
            task.cancel()


def _seeds(rng: torch.Generator, n: int) -> list[int]:
    """Seeds of n requests; seed k is the same for every n > k."""
    local = torch.Generator().manual_seed(seed_of(rng))
    return torch.randint(0, 2**31 - 1, (n,), generator=local).tolist()


def _check(lm: OpenAILM) -> None:
    if lm.model is not None and (not isinstance(lm.model, str) or not lm.model):
        raise DataError(f"OpenAILM: expected model as a name or None, got {lm.model!r}")
    name = lm.api_key_env
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise DataError(
            "OpenAILM: expected api_key_env as the NAME of an environment variable, such as "
            '"OPENAI_API_KEY", or None; the key itself is never passed'
        )
    whole = isinstance(lm.concurrency, int) and not isinstance(lm.concurrency, bool)
    if not whole or lm.concurrency < 1:
        raise DataError(f"OpenAILM: expected a whole concurrency >= 1, got {lm.concurrency!r}")
    for field in ("timeout", "deadline"):
        value = getattr(lm, field)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise DataError(f"OpenAILM: expected {field} > 0 in seconds, got {value!r}")
    for field, options in (("route", _ROUTES), ("stops", ("auto", "server", "client"))):
        if getattr(lm, field) not in options:
            raise DataError(
                f"OpenAILM: expected {field} as one of {', '.join(options)}, got "
                f"{getattr(lm, field)!r}"
            )
    if lm.budget.money is not None and lm.prices is None:
        raise DataError(
            "OpenAILM: a budget of money needs prices; give prices=Prices(prompt=..., "
            "completion=...) for a million tokens"
        )
    for key in lm.extra_body:
        if not isinstance(key, str) or any(part in key.lower() for part in ("api_key", "auth")):
            raise DataError(
                f"OpenAILM: extra_body holds {key!r}; keys are read from the environment, named "
                "with api_key_env="
            )


def _to_tree(lm: OpenAILM) -> dict[str, Any]:
    return {
        "base_url": lm.base_url,
        "model": lm.model,
        "api_key_env": lm.api_key_env,
        "budget": lm.budget,
        "prices": lm.prices,
        "concurrency": lm.concurrency,
        "timeout": lm.timeout,
        "deadline": lm.deadline,
        "retries": lm.retries,
        "route": lm.route,
        "stops": lm.stops,
        "extra_body": lm.extra_body,
        "profile": lm._given_profile,
    }


def _from_tree(tree: Mapping[str, Any]) -> OpenAILM:
    return OpenAILM(**tree)


register(OpenAILM, "OpenAILM", _to_tree, _from_tree)
