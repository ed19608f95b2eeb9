"""A partial answer: the particle of guided generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from probkit.files import register
from probkit.models.language.protocol import Continuation, Prefix, Reason

__all__ = ["Partial", "step_between"]

_DEAD = float("-inf")


class Partial(NamedTuple):
    """A prompt, the answer so far, and what it is worth.

    Attributes:
        prefix: Prompt and generated text.
        finished: Whether the answer ends there; it is never extended or weighted again.
        log_potential: Sum of the log potentials of its steps so far (``per_step``), or the log of
            its value (``value``); minus infinity once the target forbids it.
        log_increment: Log weight increment of the last step: log potential plus ``log_ratio``; 0
            for steps after the end.
        steps: Number of generated steps.
        reason: Why the last step ended; empty before the first. "failed" marks an answer that a
            failing back end cut off, "budget" one that a back end's budget did.
        log_ratio: Log of base law over proposal for the last step; 0 without a proposal.
    """

    prefix: Prefix
    finished: bool = False
    log_potential: float = 0.0
    log_increment: float = 0.0
    steps: int = 0
    reason: Reason | str = ""
    log_ratio: float = 0.0

    @property
    def text(self) -> str:
        """The generated text."""
        return self.prefix.text

    @property
    def dead(self) -> bool:
        """Whether its weight is zero for good."""
        return self.log_potential == _DEAD

    @property
    def idle(self) -> bool:
        """Whether no further step can change it: finished, dead, or stopped by a budget."""
        return self.finished or self.log_potential == _DEAD or self.reason == "budget"


def step_between(old: Partial, new: Partial) -> Continuation:
    """Return the step that led from one partial answer to the next, without its probabilities.

    Example:
        >>> old = Partial(Prefix("a", (3,), 1))
        >>> new = Partial(Prefix("a", (3, 7), 1, " b"), steps=1, reason="length")
        >>> step_between(old, new).text
        ' b'
    """
    tokens = new.prefix.tokens[len(old.prefix.tokens) :]
    text = new.prefix.text[len(old.prefix.text) :]
    unknown = float("nan")
    count = len(tokens) if new.prefix.tokens else len(text)
    reason: Any = new.reason
    return Continuation(tokens, text, unknown, unknown, reason, count)


def _to_tree(partial: Partial) -> dict[str, object]:
    return partial._asdict()


def _from_tree(tree: Mapping[str, Any]) -> Partial:
    return Partial(**tree)


register(Partial, "Partial", _to_tree, _from_tree)
