"""Scores of a process reward model as potentials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable
from probkit.models.language.potentials.base import Kind
from probkit.models.language.potentials.ratings import (
    as_number,
    check_clip,
    log_scores,
    prompt_text,
    shown,
)
from probkit.models.language.protocol import Continuation, Prefix, extended

__all__ = ["RewardPotential"]

Aggregation = Literal["product", "min", "last", "model"]


@storable
@dataclass(frozen=True)
class RewardPotential:
    """A process reward model: probabilities that the steps so far are right.

    The aggregation decides the kind, so that no score is counted twice:

    - "product" (per_step): G_t is the score of step t, and an answer is worth the product (the
      binary "accepted" observations of Puri et al., arXiv 2502.01618, eq. 2);
    - "min", "last" (value): V_t is the smallest, or the last, score of the steps so far;
    - "model" (value): V_t is the one score that the model gives to the whole prefix.

    Args:
        reward: (prompt, answer so far) -> scores in [0, 1] of the steps so far, or one score:
            of the last step under "product" and "last", of the whole prefix under "model". With
            ``batched`` it takes two lists and returns a list of these.
        aggregation: See above.
        clip: Scores are brought into [clip, 1 - clip]; at 0, a score of 0 kills for good.
        batched: See ``reward``.

    Raises:
        DataError: An unknown aggregation or ``clip``; later, a score outside [0, 1], no score at
            all, or one score where "min" needs them all.

    Example:
        >>> reward = RewardPotential(lambda prompt, answer: [0.9, 0.5, 0.8], aggregation="min")
        >>> reward.log_value([Prefix("2 + 2?", text="...")], [True]).exp().item()
        0.5
    """

    reward: Callable[[Any, Any], Any]
    aggregation: Aggregation = "product"
    clip: float = 1e-4
    batched: bool = False

    def __post_init__(self) -> None:
        if not callable(self.reward):
            raise DataError(f"RewardPotential: expected a function, got {self.reward!r}")
        if self.aggregation not in ("product", "min", "last", "model"):
            raise DataError(
                "RewardPotential: expected aggregation 'product', 'min', 'last' or 'model', got "
                f"{self.aggregation!r}"
            )
        check_clip("RewardPotential", self.clip)

    @property
    def kind(self) -> Kind:
        """A product rates steps, the others whole prefixes."""
        return "per_step" if self.aggregation == "product" else "value"

    def log_step(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return the log score of each step, [n]; 0 for a step without text."""
        after = [extended(p, step) for p, step in zip(prefixes, steps, strict=True)]
        scores = self._log(after)
        empty = [k for k, step in enumerate(steps) if not step.text]
        scores[empty] = 0.0
        return scores

    def log_value(self, prefixes: Sequence[Prefix], finished: Sequence[bool]) -> Tensor:
        """Return the log of the aggregated scores of each prefix, [n]."""
        return self._log(prefixes)

    def _log(self, prefixes: Sequence[Prefix]) -> Tensor:
        prompts, texts = [prompt_text(p) for p in prefixes], [p.text for p in prefixes]
        if self.batched:
            found = list(self.reward(prompts, texts))
        else:
            found = [self.reward(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        if len(found) == len(texts):
            found = [self._one(scores, text) for scores, text in zip(found, texts, strict=True)]
        return log_scores("RewardPotential", found, texts, probability=True, clip=self.clip)

    def _one(self, scores: Any, text: str) -> float:
        """Aggregate the scores of one prefix, each checked."""
        who = "RewardPotential"
        if isinstance(scores, Tensor):
            scores = scores.tolist()
        if not isinstance(scores, Sequence):
            if self.aggregation == "min":
                raise DataError(
                    f"{who}: aggregation='min' needs the scores of all steps, got one number for "
                    f"the text {shown(text)}; return a list"
                )
            return as_number(who, scores, text)
        if not scores or (self.aggregation == "model" and len(scores) != 1):
            expected = "one score" if self.aggregation == "model" else "at least one score"
            raise DataError(
                f"{who}: expected {expected} for the text {shown(text)}, got {len(scores)}"
            )
        numbers = log_scores(who, scores, [text] * len(scores), probability=True).exp().tolist()
        return min(numbers) if self.aggregation == "min" else numbers[-1]
