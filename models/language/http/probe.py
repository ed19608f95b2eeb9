"""Finds out what a server can do by asking it, with a few short requests."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from probkit.errors import DataError
from probkit.models.language.http.ledger import OverBudgetError
from probkit.models.language.http.profile import Endpoint, ServerProfile
from probkit.models.language.http.requests import Ask
from probkit.models.language.http.schema import Answer
from probkit.models.language.http.transport import FailedError, RefusedError

__all__ = ["Probe", "is_ids", "useless"]

Asker = Callable[[Endpoint, Ask], Awaitable[Answer]]


class Getter(Protocol):
    """Sends a request that costs nothing; see :meth:`Transport.ask`."""

    def __call__(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None = None,
        *,
        valid: Callable[[dict[str, Any]], bool],
    ) -> Awaitable[dict[str, Any]]: ...


_TEXT = "Numbers: one two three four five six"
_SHORT = "a"
_CHAT = (("user", "Count from one to ten in words."),)
_UNLIKELY = "Zq7 4#"  # no answer begins with this unless it was put there
_TOKENS = 8
_TIMES = 4
_TEMPLATE = 4  # prompt tokens from which the single letter has been wrapped into a template
_SAME = 0.05  # nats by which log probabilities of one token may differ from batch to batch


class Probe:
    """Asks one server what it can do.

    A feature that the server refuses is absent. A feature whose request fails for good for other
    reasons counts as absent too, with a note; only where nothing can be generated at all is that an
    error.

    Args:
        api: Address of the endpoints, ``.../v1``.
        root: Address of the server's own endpoints.
        model: Name of the model; None for the only one that the server has.
        variable: Environment variable of the API key, for messages.
        ask: Generates.
        get: Sends a request that costs nothing.
    """

    def __init__(
        self, api: str, root: str, model: str | None, variable: str | None, ask: Asker, get: Getter
    ) -> None:
        self.api, self.root, self.variable = api, root, variable
        self.model = model
        self._ask_raw, self._get = ask, get
        self._notes: list[str] = []

    async def run(self, routes: tuple[str, ...]) -> ServerProfile:
        """Probe.

        Args:
            routes: Of "completions" and "chat", those to look at.

        Returns:
            The profile.

        Raises:
            DataError: The address, the key or the model is wrong, nothing answers, or the budget
                does not pay for probing.
        """
        try:
            names, context = await self._models()
            server = await self._server()
            model = self._chosen(names)
            self.model = model
            refusals: list[RefusedError] = []
            raw = chat = None
            end_token = -1
            if server == "llama.cpp":
                told, end_token = await self._llama_facts()
                context = told or context
                raw = chat = await self._llama(refusals)
                if raw is None:
                    server = "llama.cpp behind another path"
            if raw is None:
                if "completions" in routes:
                    raw = await self._completions(refusals)
                if "chat" in routes:
                    chat = await self._templated(raw) or await self._chat(refusals)
            if raw is None and chat is None:
                raise self._useless(refusals, names)
            return ServerProfile(server, model, context, raw, chat, end_token, tuple(self._notes))
        except OverBudgetError as error:
            raise DataError(
                f"OpenAILM: the budget does not pay for probing the server ({error}); raise it, or "
                "hand over the profile of an earlier probe with profile="
            ) from None
        except RefusedError as error:
            raise self._useless([error], ()) from None
        except FailedError as error:
            raise DataError(
                f"OpenAILM: expected a server at {self.api}, got no usable answer: {error}; check "
                "base_url and that the server runs"
            ) from None

    # ---------------------------------------------------------------- about the server

    async def _models(self) -> tuple[tuple[str, ...], int | None]:
        """Names of the models, and the context of ours."""
        try:
            url = f"{self.api}/models"
            value = await self._get("GET", url, valid=lambda v: bool(v.get("data")))
        except RefusedError as error:
            if error.status in (401, 403):
                raise
            return (), None
        except FailedError:
            if self.model is None:
                raise
            return (), None  # the next request tells whether anything answers
        data = value.get("data")
        rows = [row for row in data if isinstance(row, dict)] if isinstance(data, list) else []
        names = tuple(str(row["id"]) for row in rows if "id" in row)
        ours = [row for row in rows if row.get("id") == self.model] or rows[:1]
        length = ours[0].get("max_model_len") if ours else None
        return names, length if isinstance(length, int) and length > 0 else None

    async def _server(self) -> str:
        if await self._props() is not None:
            return "llama.cpp"
        url = f"{self.root}/version"
        try:
            value = await self._get("GET", url, valid=lambda v: isinstance(v.get("version"), str))
        except FailedError:
            return "OpenAI-compatible"
        return f"version {value['version']}"

    async def _props(self) -> dict[str, Any] | None:
        """Properties of a llama.cpp server; None for others."""
        url, name = f"{self.root}/props", "default_generation_settings"
        try:
            return await self._get("GET", url, valid=lambda v: isinstance(v.get(name), dict))
        except FailedError:
            return None

    def _chosen(self, names: tuple[str, ...]) -> str:
        if self.model is not None:
            return self.model
        if len(names) == 1:
            return names[0]
        listed = ", ".join(map(repr, names[:8])) or "none"
        raise DataError(
            f"OpenAILM: expected model= for {self.api}, which lists {len(names)} models "
            f"({listed}); name one"
        )

    def _useless(self, refusals: Sequence[RefusedError], names: Sequence[str]) -> DataError:
        return useless(self.api, self.model, self.variable, refusals, names)

    # ---------------------------------------------------------------- llama.cpp

    async def _llama_facts(self) -> tuple[int | None, int]:
        """Length of the context, and id of the end of the sequence."""
        props = await self._props() or {}
        length = props.get("default_generation_settings", {}).get("n_ctx")
        end, ids = props.get("eos_token"), None
        if isinstance(end, str) and end:
            ids = await self._tokens({"content": end, "parse_special": True, "add_special": False})
        return (
            length if isinstance(length, int) and length > 0 else None,
            ids[0] if ids is not None and len(ids) == 1 else -1,
        )

    async def _llama(self, refusals: list[RefusedError]) -> Endpoint | None:
        """llama.cpp's own endpoint, which takes and tells token ids."""
        end = Endpoint(
            "llama.cpp", prefill="raw", token_ids=True, logprobs=True, stops="told", neutral=True
        )
        try:
            first = await self._ask(end, Ask(_TEXT, max_tokens=2, temperature=0.0, logprobs=1))
        except RefusedError as error:
            if error.status in (401, 403):
                raise
            refusals.append(error)
            return None
        if not first.ids or not first.pieces:
            return None
        end = replace(end, law_of_logprobs=await self._law(end, Ask(_TEXT)), top_logprobs=20)
        force = {"logit_bias": [[first.ids[0], 1000.0]]}
        forced = await self._try(end, Ask(_TEXT, temperature=0.0, logprobs=1, extra=force))
        if forced is not None and forced.ids == first.ids[:1] and forced.pieces:
            same = abs(forced.pieces[0].log_prob - first.pieces[0].log_prob) < _SAME
            end = replace(end, scores="forced" if same else "")
        return replace(end, seed=await self._seeded(end, Ask(_TEXT)))

    # ---------------------------------------------------------------- /completions

    async def _completions(self, refusals: list[RefusedError]) -> Endpoint | None:
        end = Endpoint("completions", prefill="raw")
        try:
            short = await self._ask(end, Ask(_SHORT, temperature=0.0))
        except RefusedError as error:
            if error.status in (401, 403):
                raise
            refusals.append(error)
            return None
        if short.prompt_tokens is not None and short.prompt_tokens > _TEMPLATE:
            self._notes.append(
                "/completions wraps prompts into a chat template, so raw text is not continued"
            )
            return None
        end = await self._common(end, Ask(_TEXT))
        end = await self._token_ids(end)
        return await self._scores(end)

    async def _token_ids(self, end: Endpoint) -> Endpoint:
        """Whether ids come with answers, are taken as prompts, and prompts can be tokenised."""
        wanted = {"return_token_ids": True}
        answer = await self._try(
            end, Ask(_TEXT, max_tokens=4, temperature=0.0, logprobs=1, extra=wanted)
        )
        if answer is None or not answer.ids or not answer.pieces:
            return end
        ids = await self._tokens({"model": self.model, "prompt": _TEXT})
        if ids is None:
            return end
        again = await self._try(
            end, Ask(tuple(ids), max_tokens=4, temperature=0.0, logprobs=1, extra=wanted)
        )
        same = again is not None and again.ids == answer.ids
        return replace(end, token_ids=same)

    async def _scores(self, end: Endpoint) -> Endpoint:
        extra = {"prompt_logprobs": 0}
        answer = await self._try(end, Ask(_TEXT, extra=extra))
        rows = answer.raw.get("prompt_logprobs") if answer is not None else None
        if end.token_ids and isinstance(rows, list) and len(rows) > 1 and rows[-1]:
            return replace(end, scores="prompt_logprobs")
        answer = await self._try(end, Ask(_TEXT, logprobs=1, extra={"echo": True}))
        if answer is not None and answer.text.startswith(_TEXT) and len(answer.pieces) > 2:
            middle = answer.pieces[1:-1]
            if all(math.isfinite(piece.log_prob) for piece in middle):
                return replace(end, scores="echo")
        return end

    # ---------------------------------------------------------------- chats

    async def _templated(self, raw: Endpoint | None) -> Endpoint | None:
        """Chats through their template, as token ids, where the server applies it for us."""
        if raw is None or not raw.token_ids:
            return None
        messages = [{"role": role, "content": text} for role, text in _CHAT]
        body = {"model": self.model, "messages": messages, "add_generation_prompt": True}
        return None if await self._tokens(body) is None else raw

    async def _chat(self, refusals: list[RefusedError]) -> Endpoint | None:
        end = Endpoint("chat")
        ask = Ask(_CHAT, max_tokens=_TOKENS, temperature=0.0)
        try:
            try:
                fresh = await self._ask(end, ask)
            except RefusedError as error:
                if "max_completion_tokens" not in error.message:
                    raise
                end = replace(end, limit="max_completion_tokens")
                fresh = await self._ask(end, ask)
        except RefusedError as error:
            if error.status in (401, 403):
                raise
            refusals.append(error)
            return None
        end = await self._common(end, Ask(_CHAT))
        return await self._prefill(end, fresh.text)

    async def _prefill(self, end: Endpoint, fresh: str) -> Endpoint:
        """How, if at all, the server continues an assistant message."""
        for style in ("continue", "plain", "prefix"):
            trial = replace(end, prefill=style)
            ask = Ask(_CHAT, _UNLIKELY, max_tokens=_TOKENS, temperature=0.0)
            answer = await self._try(trial, ask)
            if answer is None:
                continue
            if answer.text.startswith(_UNLIKELY):
                return replace(trial, repeats_prefill=True)
            if await self._goes_on(trial, fresh):
                return trial
        self._notes.append("chats begin a new answer instead of continuing a partial one")
        return end

    async def _goes_on(self, end: Endpoint, fresh: str) -> bool:
        """Whether the rest of an answer follows its first part, rather than its beginning."""
        for cut in range(len(fresh) // 2, len(fresh) - 1):
            rest = fresh[cut:][:4]
            # At this place going on and beginning anew give different texts.
            if rest and rest.strip() == rest and not fresh.startswith(rest):
                ask = Ask(_CHAT, fresh[:cut], max_tokens=_TOKENS, temperature=0.0)
                answer = await self._try(end, ask)
                return answer is not None and answer.text.startswith(rest)
        return False

    # ---------------------------------------------------------------- what both endpoints share

    async def _common(self, end: Endpoint, ask: Ask) -> Endpoint:
        greedy = ask._replace(max_tokens=_TOKENS, temperature=0.0)
        neutral = replace(end, neutral=True)
        if await self._try(neutral, greedy) is not None:
            end = neutral
        for k in (20, 5, 1):
            answer = await self._try(end, greedy._replace(logprobs=k))
            if answer is not None and answer.pieces:
                most = max(len(piece.top) for piece in answer.pieces)
                end = replace(end, logprobs=True, top_logprobs=min(k, most))
                end = replace(end, law_of_logprobs=await self._law(end, ask))
                break
        end = replace(end, seed=await self._seeded(replace(end, seed=True), ask))
        several = await self._try(end, ask._replace(extra={"n": 2}))
        choices = several is not None and several.choices == 2
        end = replace(end, n=choices)
        return await self._stops(end, greedy)

    async def _law(self, end: Endpoint, ask: Ask) -> Any:
        """Whether log probabilities are told before or after the temperature."""
        tops = []
        for temperature in (1.0, 2.0):
            for _ in range(_TIMES):  # an answer may be drawn that ends before its first token
                answer = await self._try(end, ask._replace(temperature=temperature, logprobs=2))
                if answer is None or (answer.pieces and answer.pieces[0].top):
                    break
            if answer is None or not answer.pieces or not answer.pieces[0].top:
                return "unknown"
            tops.append(answer.pieces[0].top)
        shared = [name for name in tops[0] if name in tops[1]]
        if not shared:
            return "unknown"
        gap = max(abs(tops[0][name] - tops[1][name]) for name in shared)
        # The best token alone: at temperature 2 its log probability falls unless it was certain.
        if gap < 0.02:
            return "raw" if max(tops[0].values()) < -0.1 else "unknown"
        return "scaled"

    async def _seeded(self, end: Endpoint, ask: Ask) -> bool:
        """Whether equal seeds give equal texts, and other seeds other ones."""
        texts = []
        for seed in (11, 11, 12, 13):
            answer = await self._try(
                end, ask._replace(max_tokens=_TOKENS, temperature=1.0, seed=seed)
            )
            if answer is None:
                return False
            texts.append(answer.text)
        return texts[0] == texts[1] and len(set(texts)) > 1

    async def _stops(self, end: Endpoint, greedy: Ask) -> Endpoint:
        """Whether stop strings are included, told or dropped."""
        answer = await self._try(end, greedy)
        text = "" if answer is None else answer.text
        stop = text[len(text) // 2 :][:3]
        if not stop or text.startswith(stop):
            return end
        included = replace(end, stops="included")
        stopped = await self._try(included, greedy._replace(stop=(stop,)))
        if stopped is not None and stopped.text.endswith(stop) and stopped.finish == "stop":
            return included
        stopped = await self._try(end, greedy._replace(stop=(stop,)))
        if stopped is not None and stopped.finish == "stop" and stopped.stop == stop:
            return replace(end, stops="told")
        return end

    # ---------------------------------------------------------------- asking

    async def _ask(self, end: Endpoint, ask: Ask) -> Answer:
        return await self._ask_raw(end, ask)

    async def _try(self, end: Endpoint, ask: Ask) -> Answer | None:
        """Ask for a feature; None where the server refuses it."""
        try:
            return await self._ask_raw(end, ask)
        except RefusedError:
            return None
        except FailedError as error:
            self._notes.append(f"a feature could not be probed: {error}")
            return None

    async def _tokens(self, body: Mapping[str, Any]) -> list[int] | None:
        """Ask for the tokens of a text; None where the server does not tell."""
        url = f"{self.root}/tokenize"
        try:
            value = await self._get("POST", url, body, valid=lambda v: is_ids(v.get("tokens")))
        except FailedError:
            return None
        return list(value["tokens"])


def is_ids(value: object) -> bool:
    """Tell whether something is a list of token ids, at least one."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in value)
    )


def useless(
    api: str,
    model: str | None,
    variable: str | None,
    refusals: Sequence[RefusedError],
    names: Sequence[str] = (),
) -> DataError:
    """Return the error that says what is wrong with address, key or model.

    Args:
        api: Address of the endpoints.
        model: Name that was given.
        variable: Environment variable of the API key.
        refusals: What the server said.
        names: Models that it lists.
    """
    said = "; ".join(dict.fromkeys(str(error) for error in refusals))
    if any(error.status in (401, 403) for error in refusals):
        where = variable or "a variable named with api_key_env="
        return DataError(
            f"OpenAILM: {api} refused the API key ({said}); put a valid one into the environment "
            f"({where})"
        )
    if model is not None and names and model not in names:
        listed = ", ".join(map(repr, names[:8]))
        return DataError(
            f"OpenAILM: expected a model that {api} lists ({listed}), got {model!r} ({said})"
        )
    return DataError(
        f"OpenAILM: {api} generates neither from /completions nor from /chat/completions ({said}); "
        "check base_url (most servers want .../v1) and model"
    )
