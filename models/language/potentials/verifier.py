"""A function of one's own as a potential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.models.language.potentials.base import Kind
from probkit.models.language.potentials.ratings import log_scores, prompt_text
from probkit.models.language.protocol import Continuation, Prefix

__all__ = ["VerifierPotential"]


@storable
@dataclass(frozen=True)
class VerifierPotential:
    """Rates text by a function: a unit test, a rule, a simulator, a classifier.

    Args:
        function: Text -> score: a bool, a number in [0, 1], or (``scale="log"``) a log weight. It
            is given strings only and must not change anything.
        kind: What the score means. "per_step": G_t, how good the last step is, so that an answer
            is worth the product of its steps. "value": V_t, how good the answer so far is as a
            whole, so that only the last value counts. The two give different targets; a score of
            the whole prefix under "per_step" counts early steps again at every later one.
        sees: "answer", the generated text; "step", the new text only (per_step); "all", prompt and
            generated text.
        scale: "probability" or "log".
        high: Weight of the score 1.
        low: Weight of the score 0; scores between are mapped linearly. ``high=0.98, low=0.02``
            makes a rule soft: a step that breaks it is 49 times less likely, not impossible.
        final: Another function for texts that end there; None for the same. Under "per_step" the
            end of the sequence counts as such, not the ``final`` strings of ``Steps``.
        batched: Whether the functions take a list of texts and return as many scores.

    A step that adds no text (the end of the sequence alone) has G = 1 unless ``final`` is given.

    Raises:
        DataError: An option out of range; later, a score that is no number or out of range.
        CapabilityError: ``kind="value"`` with ``sees="step"``.

    Example:
        >>> short = VerifierPotential(lambda text: len(text) < 3, kind="value", low=0.1)
        >>> prefixes = [Prefix("go", text="ab"), Prefix("go", text="abc")]
        >>> short.log_value(prefixes, [False, False]).exp()
        tensor([1.0000, 0.1000], dtype=torch.float64)
    """

    function: Callable[[Any], Any]
    kind: Kind = "per_step"
    sees: Literal["answer", "step", "all"] = "answer"
    scale: Literal["probability", "log"] = "probability"
    high: float = 1.0
    low: float = 0.0
    final: Callable[[Any], Any] | None = None
    batched: bool = False

    def __post_init__(self) -> None:
        who = "VerifierPotential"
        if not callable(self.function) or not (self.final is None or callable(self.final)):
            raise DataError(f"{who}: expected a function of a text, got {self.function!r}")
        for name, known in (
            ("kind", ("per_step", "value")),
            ("sees", ("answer", "step", "all")),
            ("scale", ("probability", "log")),
        ):
            if getattr(self, name) not in known:
                raise DataError(
                    f"{who}: expected {name} {' or '.join(map(repr, known))}, got "
                    f"{getattr(self, name)!r}"
                )
        if not 0.0 <= self.low < self.high <= 1.0:
            raise DataError(
                f"{who}: expected 0 <= low < high <= 1, got low={self.low!r}, high={self.high!r}"
            )
        if self.scale == "log" and (self.low, self.high) != (0.0, 1.0):
            raise DataError(f"{who}: low and high are for scale='probability'; leave them out")
        if self.kind == "value" and self.sees == "step":
            raise CapabilityError(
                f"{who}: a value rates whole prefixes; use sees='answer', or kind='per_step'"
            )

    def log_step(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log G of each step, [n]."""
        texts = [self._seen(p, step.text) for p, step in zip(prefixes, steps, strict=True)]
        ends = [step.reason == "end" for step in steps]
        rated = [
            bool(step.text) or (e and self.final is not None) for step, e in _pairs(steps, ends)
        ]
        return self._log(texts, ends, rated)

    def log_value(self, prefixes: Sequence[Prefix], finished: Sequence[bool]) -> Tensor:
        """Return log V of each prefix, [n]."""
        texts = [self._seen(prefix, "") for prefix in prefixes]
        return self._log(texts, list(finished), [True] * len(texts))

    def _seen(self, prefix: Prefix, new: str) -> str:
        before = {"step": "", "answer": prefix.text, "all": ""}[self.sees]
        if self.sees == "all":
            before = prompt_text(prefix) + prefix.text
        return before + new

    def _log(self, texts: list[str], ends: list[bool], rated: list[bool]) -> Tensor:
        result = torch.zeros(len(texts), dtype=torch.float64)
        for function, at_end in ((self.function, False), (self.final or self.function, True)):
            chosen = [k for k, end in enumerate(ends) if end == at_end and rated[k]]
            if chosen:
                result[chosen] = self._scores(function, [texts[k] for k in chosen])
        return result

    def _scores(self, function: Callable[[Any], Any], texts: list[str]) -> Tensor:
        who, is_probability = "VerifierPotential", self.scale == "probability"
        values = function(texts) if self.batched else [function(text) for text in texts]
        scores = log_scores(who, values, texts, probability=is_probability)
        if not is_probability or (self.low, self.high) == (0.0, 1.0):
            return scores
        return (self.low + (self.high - self.low) * scores.exp()).log()


def _pairs(steps: Sequence[Continuation], ends: Sequence[bool]) -> list[tuple[Continuation, bool]]:
    return list(zip(steps, ends, strict=True))
