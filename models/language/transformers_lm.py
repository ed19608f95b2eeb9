"""Language models of transformers in this process, their attention cache forked by index."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.extras import require
from probkit.models.language.chat import messages_of, prompt_value
from probkit.models.language.decoding import Decoder, Draft
from probkit.models.language.kv_cache import PrefixCache
from probkit.models.language.meter import Meter
from probkit.models.language.protocol import (
    Capabilities,
    Continuation,
    Law,
    Prefix,
    Prompt,
    Usage,
)
from probkit.models.language.sampling import check_pairs, check_request, uniforms
from probkit.models.language.token_text import TokenText
from probkit.rng import scope

__all__ = ["TransformersLM"]

Ids = tuple[int, ...]


class TransformersLM:
    """A causal language model of transformers.

    The prompt is read once. Keys and values stay between calls and are forked by index when
    particles are copied; a prefix that is not known any more is read again, with the same result up
    to rounding. Tokens are drawn in float64 from the log-softmax of the logits.

    Args:
        model: A loaded causal model, a local folder or the name of a repository, or a GGUF file
            (its weights are de-quantised; needs ``gguf``).
        tokenizer: Its tokenizer; None where ``model`` is a path or a name.
        device: Where it computes; None leaves a loaded model where it is, and is the CPU else.
        dtype: Of the weights; None leaves those of a loaded model, and is float32 else.
        end: Ids of further tokens that end the sequence, besides those that the model names.
        batch: At most so many sequences are computed at once.
        cache_bytes: Memory for keys and values that are kept between calls.

    Attributes:
        context: Number of tokens that the model reads, the answer included.
        end_ids: Ids of the tokens that end the sequence.
        model: The model of transformers.
        tokenizer: Its tokenizer.

    Raises:
        MissingExtraError: transformers is not installed.
        DataError: No such model, no tokenizer, or damaged weights.
        CapabilityError: A model whose layers do not attend to everything before.

    Example:
        Read once, continue twice::

            lm = TransformersLM("HuggingFaceTB/SmolLM2-135M-Instruct")
            prefix = lm.start([{"role": "user", "content": "Name a prime number."}])
            rng = torch.Generator().manual_seed(0)
            lm.generate([prefix, prefix], max_tokens=20, rng=rng)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        end: Sequence[int] = (),
        batch: int = 64,
        cache_bytes: int = 2**29,
    ) -> None:
        require("transformers", extra="llm")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise DataError(f"TransformersLM: expected batch >= 1, got {batch!r}")
        if isinstance(model, str | Path):
            model, found = _load(model, dtype or torch.float32)
            tokenizer = found if tokenizer is None else tokenizer
        elif dtype is not None:
            model = model.to(dtype)
        if tokenizer is None:
            raise DataError(
                "TransformersLM: a loaded model needs its tokenizer: "
                "TransformersLM(model, tokenizer)"
            )
        self.model = model.eval() if device is None else model.eval().to(device)
        self.tokenizer = tokenizer
        config = model.config.get_text_config(decoder=True)
        self.context = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self._size, self._batch = int(config.vocab_size), batch
        self.end_ids = _end_ids(model, tokenizer, end, self._size)
        self._text = TokenText(tokenizer, self._size, self.end_ids)
        self._meter, self._lock = Meter(), threading.RLock()
        with torch.no_grad():
            self._cache = PrefixCache(self.model, self.context, cache_bytes)

    def __repr__(self) -> str:
        return f"TransformersLM({type(self.model).__name__}, {self._size} tokens)"

    def forget(self) -> None:
        """Free the keys and values that are kept between calls."""
        with self._lock:
            self._cache.forget()

    # ---------------------------------------------------------------- the protocol

    @property
    def capabilities(self) -> Capabilities:
        """Everything."""
        return Capabilities(True, True, True, True, True, True, self._size)

    @property
    def usage(self) -> Usage:
        """What was spent since the model was made."""
        return self._meter.total

    @property
    def vocabulary(self) -> Sequence[str]:
        """Text of each token id; of those that end the sequence, the empty string.

        A token that holds a part of a character has replacement characters as its text.
        """
        return self._text.vocabulary

    def start(self, prompt: Prompt) -> Prefix:
        """Return the prefix of a prompt, nothing generated yet.

        A chat whose last message is the assistant's is continued within that message.

        Raises:
            CapabilityError: A chat, and the tokenizer has no chat template.
            DataError: An empty prompt, or one that leaves no room in the context.
        """
        value = prompt_value(prompt)
        if isinstance(value, str):
            ids = self.tokenizer(value)["input_ids"]
        else:
            ids = self._plain_ids(self._rendered(value))
        if not ids:
            raise DataError(f"start: expected a prompt of at least one token, {value!r} has none")
        if len(ids) >= self.context:
            raise DataError(
                f"start: the prompt has {len(ids)} tokens and the model reads {self.context}, the "
                "answer included; shorten the prompt"
            )
        return Prefix(value, tuple(ids), len(ids))

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

        The end of the context ends a step with the reason "length". A token that completes a stop
        string belongs to the step with all its text.

        Raises:
            DataError: A prefix that fills the context already.
        """
        check_request(prefixes, stop, max_tokens, rng)
        u = uniforms(rng, len(prefixes), max_tokens).tolist()
        drafts = []
        for k, prefix in enumerate(prefixes):
            ids = self._ids(prefix)
            room = self.context - len(ids)
            if room < 1:
                raise DataError(
                    f"generate: prefix {k} has {len(ids)} tokens and the model reads "
                    f"{self.context}; nothing can follow it"
                )
            drafts.append(Draft(prefix, ids, u[k][:room]))
        decoder = Decoder(self._cache, self._text, self.end_ids, law, base, tuple(stop))
        with self._working(sum(len(draft.ids) for draft in drafts)) as spent:
            for part in _parts(drafts, self._batch):
                decoder.run(part)
            steps = [draft.result() for draft in drafts]
            spent.append(sum(step.n_tokens for step in steps))
        return steps

    def score(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log p(step | prefix) [n], float64.

        Several tokens that end the sequence count as one event.

        Raises:
            DataError: A step that does not fit into the context, or a token that does not exist.
        """
        check_pairs(prefixes, steps)
        asked = []
        for k, (prefix, step) in enumerate(zip(prefixes, steps, strict=True)):
            head, tail = self._ids(prefix), self._step_ids(step)
            ended = step.reason == "end"
            ids = head + tail if ended else head + tail[:-1]
            if len(ids) > self.context:
                raise DataError(
                    f"score: prefix and step {k} have {len(ids)} tokens and the model reads "
                    f"{self.context}"
                )
            if tail or ended:
                asked.append((k, ids, tail, ended))
        total = torch.zeros(len(steps), dtype=torch.float64)
        with self._working(sum(len(ids) for _, ids, *_ in asked)):
            for part in _parts(asked, self._batch):
                counts = [len(tail) + ended for _, _, tail, ended in part]
                _, logits = self._cache.read([ids for _, ids, *_ in part], counts)
                for (k, _, tail, ended), rows in zip(part, logits, strict=True):
                    total[k] = self._log_prob(torch.log_softmax(rows.double(), -1), tail, ended)
        return total

    def next_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return normalised next-token log probabilities [n, token], float64."""
        ids = [self._ids(prefix) for prefix in prefixes]
        table = torch.zeros(len(ids), self._size, dtype=torch.float64)
        with self._working(sum(map(len, ids))):
            for rows in _parts(range(len(ids)), self._batch):
                _, logits = self._cache.read([ids[k] for k in rows], [1] * len(rows))
                table[list(rows)] = torch.log_softmax(torch.cat(logits).double(), -1).cpu()
        return table

    # ---------------------------------------------------------------- parts

    @contextlib.contextmanager
    def _working(self, read: int) -> Iterator[list[int]]:
        """One call at a time, without gradients; what it cost is added at its end."""
        spent: list[int] = []
        with self._lock, torch.no_grad():
            begun, before = time.perf_counter(), self._cache.computed
            yield spent
            cached = read - (self._cache.computed - before)
        seconds = time.perf_counter() - begun
        self._meter.add(Usage(read, cached, sum(spent), 1, seconds=seconds))

    def _log_prob(self, log_probs: Tensor, tail: Ids, ended: bool) -> float:
        """Sum the log probabilities of given tokens, and of the end, along rows."""
        index = torch.tensor(tail, dtype=torch.long, device=log_probs.device)
        total = log_probs[: len(tail)].gather(-1, index[:, None]).sum()
        if ended:
            total = total + log_probs[-1, list(self.end_ids)].logsumexp(-1)
        return float(total)

    def _rendered(self, prompt: tuple[tuple[str, str], ...]) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise CapabilityError(
                "start: the tokenizer has no chat template; write the chat as raw text"
            )
        ours = prompt[-1][0] == "assistant"
        text: str = self.tokenizer.apply_chat_template(
            messages_of(prompt),
            tokenize=False,
            add_generation_prompt=not ours,
            continue_final_message=ours,
        )
        return text

    def _plain_ids(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids(self, prefix: Prefix) -> Ids:
        """Token ids of a prefix; those of its text where it holds none."""
        ids = prefix.tokens
        if not ids:
            ids = self.start(_prompt(prefix)).tokens + self._plain_ids(prefix.text)
        self._check_ids(ids)
        return ids

    def _step_ids(self, step: Continuation) -> Ids:
        ids = step.tokens or (self._plain_ids(step.text) if step.text else ())
        self._check_ids(ids)
        return ids

    def _check_ids(self, ids: Ids) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self._size):
            wrong = next(token for token in ids if not 0 <= token < self._size)
            raise DataError(
                f"TransformersLM: unknown token {wrong}; expected ids from 0 to {self._size - 1}: "
                "do the tokens come from another model?"
            )


def _prompt(prefix: Prefix) -> Prompt:
    return prefix.prompt if isinstance(prefix.prompt, str) else messages_of(prefix.prompt)


def _parts(items: Sequence[Any], size: int) -> Iterator[Any]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _end_ids(model: Any, tokenizer: Any, more: Sequence[int], size: int) -> Ids:
    """Ids that end the sequence, as model, tokenizer and caller name them."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    found |= set(more)
    wrong = [token for token in found if not 0 <= token < size]
    if wrong:
        raise DataError(f"TransformersLM: expected ids below {size} in end, got {wrong}")
    return tuple(sorted(found))


def _load(source: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load model and tokenizer from a folder, a repository or a GGUF file.

    Raises:
        DataError: It cannot be loaded; the message holds the reason.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, str] = {}
    place = str(source)
    if place.endswith(".gguf"):
        require("gguf", extra="llm")
        path = Path(place)
        if not path.is_file():
            raise DataError(f"TransformersLM: there is no file {place!r}")
        place, options = str(path.parent), {"gguf_file": path.name}
    try:
        with scope(rng=0, foreign=True), _without_bars():
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"TransformersLM: cannot load {str(source)!r}: {reason}") from error
    return model, tokenizer


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers, and its reader of GGUF files, from drawing progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
