"""Recording what a language model answers, and answering from the record."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.language.chat import prompt_value
from probkit.models.language.meter import Meter
from probkit.models.language.protocol import (
    Capabilities,
    Continuation,
    LanguageModel,
    Law,
    Prefix,
    Prompt,
    Usage,
)
from probkit.models.language.sampling import check_request
from probkit.models.language.transcript import (
    FORMAT,
    Json,
    Writer,
    continuation_from_json,
    continuation_to_json,
    generate_request,
    key_of,
    next_request,
    read_transcript,
    score_request,
    table_from_json,
    table_to_json,
    usage_to_json,
)
from probkit.rng import seed_of

__all__ = ["RecordingLM", "ReplayLM"]


class RecordingLM:
    """A language model whose calls are written to a transcript.

    Every call advances the stream by one number, from which the model's own stream is seeded; so
    runs on the transcript (:class:`ReplayLM`) draw the same random numbers elsewhere.

    Args:
        lm: The model that answers.
        path: Transcript; an existing one of the same kind of model is continued.

    Raises:
        DataError: The file is no transcript, or one of another model.

    Example:
        >>> import tempfile
        >>> from probkit.models.language import MarkovLM
        >>> path = Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> lm = RecordingLM(MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]]), path)
        >>> prefix = lm.start("go")
        >>> step = lm.generate([prefix], max_tokens=3, rng=torch.Generator().manual_seed(0))[0]
        >>> again = ReplayLM(path)
        >>> rng = torch.Generator().manual_seed(0)
        >>> again.generate([again.start("go")], max_tokens=3, rng=rng)[0] == step
        True
    """

    def __init__(self, lm: LanguageModel, path: str | Path) -> None:
        self.lm = lm
        self._lock = threading.RLock()
        header = {
            "call": "transcript",
            "format": FORMAT,
            "model": type(lm).__name__,
            "capabilities": asdict(lm.capabilities),
        }
        self._writer = Writer(path, header)
        self._vocabulary: Sequence[str] | None = None

    def __repr__(self) -> str:
        return f"RecordingLM({self.lm!r}, {self._writer.path.name!r})"

    @property
    def capabilities(self) -> Capabilities:
        """What the recorded model can do."""
        return self.lm.capabilities

    @property
    def usage(self) -> Usage:
        """What the recorded model has spent."""
        return self.lm.usage

    @property
    def vocabulary(self) -> Sequence[str]:
        """The recorded model's; written when it is first asked for."""
        if self._vocabulary is None:
            self._vocabulary = self.lm.vocabulary
            self._writer.write({"call": "vocabulary", "texts": list(self._vocabulary)})
        return self._vocabulary

    def start(self, prompt: Prompt) -> Prefix:
        """Return the prefix of a prompt, nothing generated yet."""
        prefix = self.lm.start(prompt)
        self._writer.prompt(prefix)
        return prefix

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
        """Continue each prefix by one step; see :class:`LanguageModel`."""
        check_request(prefixes, stop, max_tokens, rng)
        seed = seed_of(rng)
        own = torch.Generator(device=rng.device).manual_seed(seed)

        def call() -> list[Continuation]:
            return self.lm.generate(
                prefixes, stop=stop, max_tokens=max_tokens, law=law, base=base, rng=own
            )

        request = generate_request(prefixes, stop, max_tokens, law, base)
        return self._recorded(
            prefixes,
            {**request, "seed": seed},
            call,
            lambda steps: [continuation_to_json(step) for step in steps],
        )

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log p(step | prefix) [n]; see :class:`LanguageModel`."""
        request = score_request(prefixes, steps)
        return self._recorded(
            prefixes, request, lambda: self.lm.score(prefixes, steps), table_to_json
        )

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return next-token log probabilities [n, token]; see :class:`LanguageModel`."""
        request = next_request(prefixes)
        return self._recorded(
            prefixes, request, lambda: self.lm.next_log_probs(prefixes), table_to_json
        )

    def _recorded(
        self,
        prefixes: Sequence[Prefix],
        request: Json,
        call: Callable[[], Any],
        to_json: Callable[[Any], Any],
    ) -> Any:
        """Make a call, and write it down once it is answered."""
        with self._lock:
            before = self.lm.usage
            answer = call()
            for prefix in prefixes:
                self._writer.prompt(prefix)
            spent = usage_to_json(self.lm.usage - before)
            self._writer.write({**request, "answer": to_json(answer), "usage": spent})
        return answer


class ReplayLM:
    """Answers from a transcript, without the model that gave the answers.

    A request is found by its content: prefixes, stop strings, limits, law. Where the same request
    was recorded several times, the one that was drawn with the same seed answers, else the first
    that has not answered yet. Usage adds up to what was recorded, so budgets act as they did.

    Args:
        recorded: Path of a transcript of :class:`RecordingLM`.

    Raises:
        DataError: No transcript there, or a damaged one.
    """

    def __init__(self, recorded: str | Path) -> None:
        self._path = Path(recorded)
        lines = read_transcript(self._path)
        if not lines:
            raise DataError(f"ReplayLM: the transcript {self._path.name!r} is empty")
        self._capabilities = Capabilities(**lines[0]["capabilities"])
        self._prompts: dict[Any, Prefix] = {}
        self._texts: Sequence[str] | None = None
        self._left: dict[str, list[Json]] = defaultdict(list)
        self._lock, self._meter = threading.Lock(), Meter()
        for line in lines[1:]:
            if line["call"] == "prompt":
                value = _prompt(line["prompt"])
                tokens = tuple(line["tokens"])
                self._prompts.setdefault(value, Prefix(value, tokens, len(tokens)))
            elif line["call"] == "vocabulary":
                self._texts = tuple(line["texts"])
            else:
                self._left[key_of(line)].append(line)

    def __repr__(self) -> str:
        return f"ReplayLM({self._path.name!r})"

    @property
    def left(self) -> int:
        """Number of recorded calls that have not answered yet."""
        return sum(map(len, self._left.values()))

    @property
    def capabilities(self) -> Capabilities:
        """What the recorded model could do."""
        return self._capabilities

    @property
    def usage(self) -> Usage:
        """What the replayed calls cost when they were recorded."""
        return self._meter.total

    @property
    def vocabulary(self) -> Sequence[str]:
        """The recorded model's.

        Raises:
            DataError: It was not recorded.
        """
        if self._texts is None:
            raise DataError(
                f"ReplayLM: the vocabulary was not recorded in {self._path.name!r}; record a run "
                "that asks for it"
            )
        return self._texts

    def start(self, prompt: Prompt) -> Prefix:
        """Return the prefix of a recorded prompt.

        Raises:
            DataError: An empty prompt, or one that was not recorded.
        """
        value = prompt_value(prompt)
        if value not in self._prompts:
            raise DataError(
                f"ReplayLM: the prompt {_short(str(value))} was not recorded in {self._path.name!r}"
            )
        return self._prompts[value]

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
        """Return what was recorded for this request.

        Raises:
            DataError: It was not recorded, or not so often.
        """
        check_request(prefixes, stop, max_tokens, rng)
        seed = seed_of(rng)
        request = generate_request(prefixes, stop, max_tokens, law, base)
        return [continuation_from_json(step) for step in self._answer(request, prefixes, seed)]

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return the recorded log p(step | prefix) [n].

        Raises:
            DataError: The request was not recorded.
        """
        return table_from_json(self._answer(score_request(prefixes, steps), prefixes))

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return the recorded next-token log probabilities [n, token].

        Raises:
            DataError: The request was not recorded.
        """
        return table_from_json(self._answer(next_request(prefixes), prefixes))

    def _answer(self, request: Json, prefixes: Sequence[Prefix], seed: int | None = None) -> Any:
        with self._lock:
            waiting = self._left.get(key_of(request), [])
            if not waiting:
                raise DataError(
                    f"ReplayLM: {self._path.name!r} holds no further answer to this request: "
                    f"{request['call']} of {len(prefixes)} prefixes, the first ending in "
                    f"{_short(prefixes[0].text or str(prefixes[0].prompt)) if prefixes else '-'}"
                    f"; {self.left} recorded calls are left"
                )
            place = next((k for k, line in enumerate(waiting) if line.get("seed") == seed), 0)
            line = waiting.pop(place)
        self._meter.add(Usage(**line["usage"]))
        return line["answer"]


def _prompt(value: str | list[list[str]]) -> str | tuple[tuple[str, str], ...]:
    return value if isinstance(value, str) else tuple((role, text) for role, text in value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else "..." + text[-57:])
