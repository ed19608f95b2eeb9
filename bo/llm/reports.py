"""What became of the answers that a language model was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from probkit.models.language.protocol import Usage

__all__ = ["AnswerReport", "report_of"]


@dataclass(frozen=True)
class AnswerReport:
    """Counts of answers; reports add up with ``+``.

    Attributes:
        asked: Answers asked for.
        parsed: Answers that follow the grammar, whatever their values.
        accepted: Answers that were used: parsed, in range and, for points, new.
        reasons: Why the others were not, with counts: ``"not a number"``, ``"out of range"``,
            ``"unknown parameter"``, ``"failed"``, ``"budget"``, ...
        usage: What the answers cost.

    Example:
        >>> AnswerReport(4, 3, 2, {"no delimiter": 1, "out of range": 1}) + AnswerReport(1, 1, 1)
        AnswerReport(5 asked, 4 parsed, 3 accepted; 1 no delimiter, 1 out of range)
    """

    asked: int = 0
    parsed: int = 0
    accepted: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    usage: Usage = Usage()

    @property
    def in_range(self) -> int:
        """Parsed answers whose values may be used, duplicates included."""
        return self.accepted + self.duplicates

    @property
    def duplicates(self) -> int:
        """Points that were known already."""
        return self.reasons.get("duplicate", 0)

    def __add__(self, other: AnswerReport) -> AnswerReport:
        return AnswerReport(
            self.asked + other.asked,
            self.parsed + other.parsed,
            self.accepted + other.accepted,
            dict(Counter(self.reasons) + Counter(other.reasons)),
            self.usage + other.usage,
        )

    def __repr__(self) -> str:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        counts = f"{self.asked} asked, {self.parsed} parsed, {self.accepted} accepted"
        return f"AnswerReport({counts}{'; ' + why if why else ''})"


#: Reasons of answers that could be read, but not used.
_READ = frozenset({"out of range", "not finite", "not whole", "unknown choice", "duplicate"})


def report_of(reasons: Iterable[str], usage: Usage = Usage()) -> AnswerReport:  # noqa: B008
    """Count answers by their reasons; an empty reason is an answer that was used.

    Args:
        reasons: One for each answer.
        usage: What they cost.
    """
    counts = Counter(reasons)
    accepted = counts.pop("", 0)
    asked = accepted + sum(counts.values())
    parsed = accepted + sum(count for reason, count in counts.items() if reason in _READ)
    return AnswerReport(asked, parsed, accepted, dict(counts), usage)
