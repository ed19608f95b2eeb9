"""A trial: one point of the space, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["STATUSES", "Status", "Trial"]

Status = Literal["running", "complete", "failed", "pruned", "cancelled"]

STATUSES: tuple[str, ...] = ("running", "complete", "failed", "pruned", "cancelled")
"""What a trial may be: asked for and not told, told, without result because of its point, stopped
early because it would not have been good, or never evaluated."""


@dataclass(frozen=True)
class Trial:
    """One evaluation of a study, as it was when it was read.

    Attributes:
        number: Its place in the study, from 0.
        params: The point; parameters that are not active are absent.
        status: One of :data:`STATUSES`.
        values: Outcomes by name; None where there are none.
        variances: Variances of the noise in the outcomes, by name; None where not known.
        error: Why it failed, if it said so.
        origin: Where the point came from: "initial", "model", "llm" (proposed by a language model),
            "random" or "attached".
        started: When it was asked for, ISO 8601 in UTC.
        finished: When it was told.
    """

    number: int
    params: Mapping[str, Any]
    status: Status = "running"
    values: Mapping[str, float] | None = field(default=None)
    variances: Mapping[str, float] | None = field(default=None)
    error: str | None = None
    origin: str | None = None
    started: str | None = None
    finished: str | None = None

    def __getitem__(self, name: str) -> Any:
        """Return the value of a parameter."""
        return self.params[name]

    @property
    def value(self) -> float | None:
        """The first outcome; None where there is none."""
        return None if self.values is None else next(iter(self.values.values()))
