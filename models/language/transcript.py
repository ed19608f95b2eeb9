"""Transcripts: what was asked of a language model and what it answered, one JSON object a line.

The first line tells the format and what the model can do. A line ``prompt`` gives a prompt a short
name; lines ``generate``, ``score`` and ``next_log_probs`` hold one call each: the request, the
answer, what it cost. Nothing else of the model (its address, its keys) is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from probkit.errors import DataError
from probkit.models.language.protocol import Continuation, Law, Prefix, Usage

__all__ = ["Writer", "read_transcript"]

FORMAT = 1

Json = dict[str, Any]


# -------------------------------------------------------------------------------- file


class Writer:
    """Appends whole lines to a transcript, from any thread.

    Args:
        path: File; an existing transcript is continued, a line that a kill cut short is dropped.
        header: First line.

    Raises:
        DataError: The file is no transcript, or one of another model.
    """

    def __init__(self, path: str | Path, header: Json) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._prompts: set[str] = set()
        lines = read_transcript(self.path) if self.path.exists() else []
        if lines:
            _cut(self.path, len(lines))
            if lines[0]["model"] != header["model"]:
                raise DataError(
                    f"RecordingLM: {self.path.name} was recorded with {lines[0]['model']}, not "
                    f"{header['model']}; choose another file"
                )
            self._prompts = {line["name"] for line in lines if line["call"] == "prompt"}
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            self.write(header)

    def write(self, line: Json) -> None:
        """Append a line in one go."""
        data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(file, data)
            finally:
                os.close(file)

    def prompt(self, prefix: Prefix) -> None:
        """Write the prompt of a prefix, unless the transcript holds it already."""
        name = prompt_name(prefix)
        if name not in self._prompts:
            self._prompts.add(name)
            tokens = list(prefix.tokens[: prefix.start])
            self.write({"call": "prompt", "name": name, "prompt": prefix.prompt, "tokens": tokens})


def _cut(path: Path, count: int) -> None:
    """Keep the first lines of a file."""
    lines = path.read_bytes().split(b"\n")[:count]
    whole = b"".join(line + b"\n" for line in lines)
    if path.stat().st_size != len(whole):
        fresh = path.with_name(path.name + ".new")
        fresh.write_bytes(whole)
        os.replace(fresh, path)


def read_transcript(path: str | Path) -> list[Json]:
    """Return the lines of a transcript; a last line that a kill cut short is left out.

    Raises:
        DataError: No such file, or one that is no transcript.
    """
    place = Path(path)
    try:
        parts = place.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"transcript {place.name!r} cannot be read: {error.strerror}") from error
    lines = []
    for number, part in enumerate(parts[:-1], 1):  # What follows the last newline is cut short.
        try:
            line = json.loads(part)
            line["call"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"transcript {place.name!r} is damaged in line {number}") from error
        lines.append(line)
    if lines and (lines[0]["call"] != "transcript" or lines[0].get("format") != FORMAT):
        raise DataError(
            f"{place.name!r} is no transcript of format {FORMAT}; its first line should say so"
        )
    return lines


# -------------------------------------------------------------------------------- requests


def prompt_name(prefix: Prefix) -> str:
    """Return a short name for the prompt of a prefix."""
    content = json.dumps([prefix.prompt, prefix.tokens[: prefix.start]], ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


def _prefix(prefix: Prefix) -> Json:
    tokens = list(prefix.generated)
    return {"prompt": prompt_name(prefix), "text": prefix.text, "tokens": tokens}


def _law(law: Law | None) -> Json | None:
    if law is None:
        return None
    return {
        "temperature": law.temperature,
        "top_p": law.top_p,
        "allowed": law.allowed is not None,
    }


def generate_request(
    prefixes: Sequence[Prefix],
    stop: Sequence[str],
    max_tokens: int,
    law: Law,
    base: Law | None,
) -> Json:
    """Return a call of ``generate`` as it stands in a transcript."""
    return {
        "call": "generate",
        "prefixes": [_prefix(prefix) for prefix in prefixes],
        "stop": list(stop),
        "max_tokens": max_tokens,
        "law": _law(law),
        "base": _law(base),
    }


def score_request(prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Json:
    """Return a call of ``score`` as it stands in a transcript."""
    return {
        "call": "score",
        "prefixes": [_prefix(prefix) for prefix in prefixes],
        "steps": [
            {"text": step.text, "tokens": list(step.tokens), "end": step.reason == "end"}
            for step in steps
        ],
    }


def next_request(prefixes: Sequence[Prefix]) -> Json:
    """Return a call of ``next_log_probs`` as it stands in a transcript."""
    return {"call": "next_log_probs", "prefixes": [_prefix(prefix) for prefix in prefixes]}


REQUEST = ("call", "prefixes", "stop", "max_tokens", "law", "base", "steps")
"""Keys that make a request."""


def key_of(line: Json) -> str:
    """Return a request's content in one string."""
    request = {name: line[name] for name in REQUEST if name in line}
    return json.dumps(request, ensure_ascii=False, sort_keys=True)


# -------------------------------------------------------------------------------- answers


def number_to_json(value: float) -> float | str:
    """Return a float; what JSON has no number for as a word."""
    return value if math.isfinite(value) else repr(value)


def continuation_to_json(step: Continuation) -> Json:
    """Return a continuation as it stands in a transcript."""
    return {
        "text": step.text,
        "tokens": list(step.tokens),
        "log_q": number_to_json(step.log_q),
        "log_p": number_to_json(step.log_p),
        "reason": step.reason,
        "n_tokens": step.n_tokens,
    }


def continuation_from_json(line: Mapping[str, Any]) -> Continuation:
    """Inverse of :func:`continuation_to_json`."""
    return Continuation(
        tuple(line["tokens"]),
        line["text"],
        float(line["log_q"]),
        float(line["log_p"]),
        line["reason"],
        line["n_tokens"],
    )


def table_to_json(table: torch.Tensor) -> list[Any]:
    """Return a tensor of one or two dimensions as lists of numbers."""
    if table.ndim == 1:
        return [number_to_json(value) for value in table.tolist()]
    return [table_to_json(row) for row in table]


def table_from_json(rows: list[Any]) -> torch.Tensor:
    """Inverse of :func:`table_to_json`."""
    if rows and isinstance(rows[0], list):
        return torch.stack([table_from_json(row) for row in rows])
    return torch.tensor([float(value) for value in rows], dtype=torch.float64)


def usage_to_json(usage: Usage) -> Json:
    """Return what a call cost, zeros left out."""
    return {name: value for name, value in asdict(usage).items() if value}
