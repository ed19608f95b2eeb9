"""What a server can do, as probing found it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probkit.files import storable
from probkit.models.language.protocol import Capabilities

__all__ = ["Endpoint", "ServerProfile"]


@storable
@dataclass(frozen=True)
class Endpoint:
    """One way to ask a server, and what it can do that way.

    Attributes:
        way: ``/completions``, ``/chat/completions``, or llama.cpp's own ``/completion``.
        prefill: How a partial answer is continued: raw text or tokens; an assistant message at the
            end of a chat, with nothing more ("plain"), with vLLM's ``continue_final_message``
            ("continue") or with ``"prefix": true`` ("prefix"); "" for not at all.
        repeats_prefill: Answers begin with the partial answer, which is cut off again.
        token_ids: Prompts are sent, and answers come, as token ids.
        logprobs: Log probabilities of generated tokens.
        law_of_logprobs: "raw": at temperature 1 whatever is asked for; "scaled": after temperature.
        top_logprobs: Alternatives for a token.
        scores: Where the log probabilities of given text come from: "prompt_logprobs" (vLLM),
            "echo" (``/completions``), "forced" (llama.cpp, one request a token); "" for nowhere.
        seed: The same seed gives the same text.
        n: Several answers to one request.
        stops: Stop strings are "included", or left out but "told", or "dropped" without a word.
        neutral: Takes parameters that switch the server's own sampling defaults off.
        limit: Field of the number of tokens.
    """

    way: Literal["completions", "chat", "llama.cpp"]
    prefill: Literal["", "raw", "plain", "continue", "prefix"] = ""
    repeats_prefill: bool = False
    token_ids: bool = False
    logprobs: bool = False
    law_of_logprobs: Literal["raw", "scaled", "unknown"] = "unknown"
    top_logprobs: int = 0
    scores: Literal["", "prompt_logprobs", "echo", "forced"] = ""
    seed: bool = False
    n: bool = False
    stops: Literal["included", "told", "dropped"] = "dropped"
    neutral: bool = False
    limit: str = "max_tokens"

    @property
    def capabilities(self) -> Capabilities:
        """The same in the words of the protocol."""
        return Capabilities(
            logprobs=self.logprobs,
            prefill=bool(self.prefill),
            prompt_logprobs=bool(self.scores),
            logits=False,
            seed=self.seed,
            kv_fork=False,
            top_logprobs=self.top_logprobs,
        )


@storable
@dataclass(frozen=True)
class ServerProfile:
    """A server, probed.

    Attributes:
        server: What it calls itself, as far as it does.
        model: Name of the model.
        context: Tokens that fit into its context; None where it does not say.
        raw: How raw text is continued; None where that is impossible.
        chat: How chats are continued; None where that is impossible.
        end_token: Id of the end of the sequence; -1 where unknown.
        notes: What a reader should know.
    """

    server: str
    model: str
    context: int | None = None
    raw: Endpoint | None = None
    chat: Endpoint | None = None
    end_token: int = -1
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        context = "unknown" if self.context is None else f"{self.context} tokens"
        lines = [f"{self.server}, model {self.model!r}, context {context}"]
        for name, end in (("raw text", self.raw), ("chats", self.chat)):
            if end is None:
                lines.append(f"  {name}: not continued")
                continue
            able = [
                f"partial answers: {end.prefill or 'no'}"
                + (", repeated by the server" if end.repeats_prefill else ""),
                f"log-probs: {end.law_of_logprobs if end.logprobs else 'no'}"
                + (f", {end.top_logprobs} alternatives" if end.top_logprobs else ""),
                f"scores: {end.scores or 'no'}",
                f"token ids: {'yes' if end.token_ids else 'no'}",
                f"seed: {'yes' if end.seed else 'no'}",
                f"n: {'yes' if end.n else 'no'}",
                f"stop strings: {end.stops}",
                f"server's sampling defaults: {'switched off' if end.neutral else 'in force'}",
            ]
            lines.append(f"  {name}: {end.way}; " + "; ".join(able))
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)
