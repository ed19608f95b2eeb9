"""An OpenAI-compatible server with an exact Markov language model behind it.

One character is one token. What follows the last "|" of a prompt is text of the chain.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from probkit.models.language.markov import MarkovLM
from probkit.models.language.protocol import Law, Prefix
from support.http_server import HttpServer, Request, json_response

SYMBOLS = ("a", "b", "c", "\n")


def chain(end: float = 0.1) -> MarkovLM:
    """Greedy text: a b c a b c ...; every symbol may follow every other."""
    transition = [
        [0.1, 0.6, 0.1, 0.2],
        [0.2, 0.1, 0.5, 0.2],
        [0.6, 0.1, 0.1, 0.2],
        [0.4, 0.3, 0.2, 0.1],
    ]
    return MarkovLM([0.5, 0.3, 0.1, 0.1], transition, end=end, symbols=SYMBOLS)


@dataclass(frozen=True)
class Variant:
    completions: bool = True
    templated: bool = False  # /completions wraps its prompts, as Ollama does
    chat: str = ""  # "", "prefill", "repeat", "continue", "prefix", "fresh"
    logprobs: bool = True
    scaled: bool = False  # log probabilities after the temperature
    seed: bool = True
    vllm: bool = False  # token ids, prompt_logprobs, included stops, /tokenize
    tells_stop: bool = False
    echo: bool = False
    strict: bool = False  # unknown fields are refused, as by OpenAI
    usage: bool = True
    key: str = ""  # wanted; repeated by error messages, as careless servers do
    model: str = "markov"
    context: int = 200


KNOWN = {
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature"),
    *("top_p", "seed", "stop", "logprobs", "top_logprobs", "n", "echo"),
}


class OpenAIServer(HttpServer):
    """Counts what it really computes."""

    def __init__(self, variant: Variant = Variant(), lm: MarkovLM | None = None) -> None:
        super().__init__()
        self.variant, self.lm = variant, chain() if lm is None else lm
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.prompt_tokens = self.completion_tokens = 0
        self.busy = self.most_busy = 0
        self.delay = 0.0
        self.lock = threading.Lock()

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def with_variant(self, **changes: Any) -> None:
        self.variant = replace(self.variant, **changes)

    async def handle(self, request: Request, writer: asyncio.StreamWriter) -> None:
        self.headers.append(request.headers)
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            if self.delay and request.method == "POST":
                await asyncio.sleep(self.delay)
            status, value = self.answer(request)
        finally:
            self.busy -= 1
        writer.write(json_response(status, value))

    # ------------------------------------------------------------------------ endpoints

    def answer(self, request: Request) -> tuple[int, Any]:
        v = self.variant
        given = request.headers.get("authorization", "")
        if v.key and given != f"Bearer {v.key}":
            return 401, {"error": {"message": f"Incorrect API key provided: {given}"}}
        if request.path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": v.model, "max_model_len": v.context}]}
        body = json.loads(request.body) if request.body else {}
        if request.path == "/tokenize" and v.vllm:
            if "messages" in body:
                return 200, {"tokens": self.encode(self.chat_text(body["messages"], "|"))}
            return 200, {"tokens": self.encode(body["prompt"])}
        if request.path == "/v1/completions" and v.completions:
            return self.generate(body, chat=False)
        if request.path == "/v1/chat/completions" and v.chat:
            return self.generate(body, chat=True)
        return 404, {"error": {"message": f"no such path {request.path}"}}

    def generate(self, body: dict[str, Any], chat: bool) -> tuple[int, Any]:
        v = self.variant
        if body.get("model") != v.model:
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist."}}
        if v.strict and (unknown := set(body) - KNOWN):
            return 400, {"error": {"message": f"Unknown parameter: {sorted(unknown)[0]}"}}
        self.requests.append(body)
        repeated = ""
        if chat:
            prompt, repeated = self.chat_prompt(body)
        else:
            raw = body["prompt"]
            prompt = raw if isinstance(raw, str) else self.decode(raw)
        if len(prompt) > v.context:
            return 400, {"error": {"message": f"the maximum context length is {v.context} tokens"}}
        top = None
        if v.logprobs and body.get("logprobs") is not None and body["logprobs"] is not False:
            top = body.get("top_logprobs", 0) if chat else body["logprobs"]
            if top > 5:
                return 400, {"error": {"message": "logprobs: at most 5"}}
        read = len(prompt) + (20 if v.templated else 0)
        choices, written = [], 0
        for index in range(body.get("n", 1)):
            choice, n = self.choice(body, prompt, repeated, top, chat, index)
            choices.append(choice)
            written += n
        with self.lock:
            self.prompt_tokens += read
            self.completion_tokens += written
        usage = {"prompt_tokens": read, "completion_tokens": written}
        usage["total_tokens"] = read + written
        value = {"object": "chat.completion" if chat else "text_completion", "choices": choices}
        return 200, value | ({"usage": usage} if v.usage else {})

    # ------------------------------------------------------------------------ one choice

    def choice(self, body, prompt, repeated, top, chat, index) -> tuple[dict[str, Any], int]:
        v = self.variant
        stop = body.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        seed = body.get("seed") if v.seed else None
        seed = random.SystemRandom().getrandbits(60) if seed is None else seed + index
        law = Law(temperature=body.get("temperature", 1.0), top_p=body.get("top_p", 1.0))
        tail = self.tail(prompt)
        step = self.lm.generate(
            [self.prefix(tail)],
            stop=stop,
            max_tokens=max(1, body.get("max_tokens", body.get("max_completion_tokens", 16))),
            law=law,
            rng=torch.Generator().manual_seed(seed),
        )[0]
        tokens = list(step.tokens)
        rows = self.rows(tail, tokens, law)
        text, told = step.text, None
        if step.reason == "end" and v.vllm:
            tokens.append(len(SYMBOLS))
            rows = self.rows(tail, tokens, law)
        if step.reason == "stop":
            said = next(s for s in stop if step.text.endswith(s))
            told = said
            if not (v.vllm and body.get("include_stop_str_in_output")):
                text = text[: -len(said)]
                if not v.vllm:
                    tokens = tokens[: len(text)]
                    rows = rows[: len(text)]
        choice: dict[str, Any] = {"index": index}
        choice["finish_reason"] = "length" if step.reason == "length" else "stop"
        if v.vllm or v.tells_stop:
            choice["stop_reason"] = told
        names = [SYMBOLS[k] if k < len(SYMBOLS) else "<end>" for k in tokens]
        if chat:
            choice["message"] = {"role": "assistant", "content": repeated + text}
        else:
            choice["text"] = text
        if top is not None:
            choice["logprobs"] = self.logprobs(names, tokens, rows, top, chat)
        if body.get("echo") and v.echo:
            self.echo(choice, prompt, names, rows, tokens)
        if v.vllm and body.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": self.encode(prompt)}
        if v.vllm and body.get("prompt_logprobs") is not None:
            ends = isinstance(body["prompt"], list) and body["prompt"][-1] == len(SYMBOLS)
            choice["prompt_logprobs"] = self.prompt_rows(prompt, ends)
        return choice, step.n_tokens

    def rows(self, tail: str, tokens: list[int], law: Law) -> list[torch.Tensor]:
        """Log probabilities of every token at each place."""
        found = []
        for k in range(len(tokens)):
            text = tail + "".join(SYMBOLS[t] for t in tokens[:k])
            row = self.lm.next_log_probs([self.prefix(text)])[0]
            if self.variant.scaled and law.temperature > 0:
                row = torch.log_softmax(row / law.temperature, -1)
            found.append(row)
        return found

    def logprobs(self, names, tokens, rows, top, chat) -> dict[str, Any]:
        numbers = [float(row[t]) for row, t in zip(rows, tokens, strict=True)]
        tops = [self.top(row, top) for row in rows]
        if not chat:
            return {"tokens": names, "token_logprobs": numbers, "top_logprobs": tops}
        content = []
        for name, number, others in zip(names, numbers, tops, strict=True):
            alternatives = [{"token": k, "logprob": x} for k, x in others.items()]
            content.append({"token": name, "logprob": number, "top_logprobs": alternatives})
        return {"content": content}

    def top(self, row: torch.Tensor, k: int) -> dict[str, float]:
        best = row.topk(min(k, len(row))).indices.tolist()
        return {("<end>" if t == len(SYMBOLS) else SYMBOLS[t]): float(row[t]) for t in best}

    def echo(self, choice, prompt, names, rows, tokens) -> None:
        before: list[float | None] = [None]
        before += [self.log_prob_at(prompt, k) for k in range(1, len(prompt))]
        logged = choice["logprobs"]
        choice["text"] = prompt + choice["text"]
        logged["tokens"] = [*prompt, *names]
        logged["token_logprobs"] = before + logged["token_logprobs"]
        logged["top_logprobs"] = [None] * len(prompt) + logged["top_logprobs"]

    def prompt_rows(self, prompt: str, ends: bool) -> list[dict[str, Any] | None]:
        ids = self.encode(prompt)
        rows: list[dict[str, Any] | None] = [None]
        for k in range(1, len(prompt)):
            rows.append({str(ids[k]): {"logprob": self.log_prob_at(prompt, k), "rank": 1}})
        if ends:
            row = self.lm.next_log_probs([self.prefix(self.tail(prompt))])[0]
            rows.append({str(len(SYMBOLS)): {"logprob": max(float(row[-1]), -1e4), "rank": 1}})
        return rows

    def log_prob_at(self, prompt: str, k: int) -> float:
        code = self.encode(prompt)[k]
        if "|" not in prompt[:k] or code > len(SYMBOLS):
            return -3.0  # words of the prompt; the chain knows nothing about them
        row = self.lm.next_log_probs([self.prefix(self.tail(prompt[:k]))])[0]
        return float(row[code])

    # ------------------------------------------------------------------------ texts

    def tail(self, prompt: str) -> str:
        """Text of the chain at the end of a prompt; anything else starts it anew."""
        after = prompt.rpartition("|")[2] if "|" in prompt else ""
        return after if all(c in SYMBOLS for c in after) else ""

    def prefix(self, text: str) -> Prefix:
        return Prefix("|", self.lm.tokenize(text), 0, text)

    def chat_text(self, messages, opening: str) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + opening

    def chat_prompt(self, body: dict[str, Any]) -> tuple[str, str]:
        messages, kind = body["messages"], self.variant.chat
        last = messages[-1]
        partial = last["content"] if last["role"] == "assistant" else ""
        goes_on = {
            "prefill": True,
            "repeat": True,
            "continue": body.get("continue_final_message") is True,
            "prefix": last.get("prefix") is True,
            "fresh": False,
        }[kind]
        if not partial or not goes_on:
            return self.chat_text(messages, "|"), ""
        prompt = self.chat_text(messages[:-1], "|") + partial
        return prompt, partial if kind == "repeat" else ""

    def encode(self, text: str) -> list[int]:
        known = {c: k for k, c in enumerate(SYMBOLS)}
        return [known.get(c, len(SYMBOLS) + 1 + ord(c)) for c in text]

    def decode(self, ids: list[int]) -> str:
        ends = len(SYMBOLS)
        return "".join(
            SYMBOLS[k] if k < ends else "" if k == ends else chr(k - ends - 1) for k in ids
        )
