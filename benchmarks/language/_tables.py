"""Cells of outcomes as values with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.spec import Value

__all__ = ["by_method"]


def by_method(cells: Sequence[Any], of: str = "") -> list[Value]:
    """Return one value for each method and N: the share of problems that it solves.

    Args:
        cells: Each with a list of ``outcomes``.
        of: Said after the number of problems.
    """
    from probkit.calibration import wilson
    from probkit.models.language.answers import expected_calibration_error

    groups: dict[tuple[int, str], list[Any]] = {}
    for cell in cells:
        for outcome in cell["outcomes"]:
            groups.setdefault((outcome["n"], outcome["method"]), []).append(outcome)
    values = []
    for (n, method), found in sorted(groups.items(), key=lambda item: item[0][0]):
        share = sum(o["right"] for o in found) / len(found)
        low, high = wilson(round(share * len(found)), len(found))
        tokens = sum(o["tokens"] for o in found) / len(found)
        note = (
            f"{len(found)} problems {of}".strip()
            + f", 95 % interval {low:.3f} to {high:.3f}, {tokens:.0f} tokens a problem"
        )
        if method in ("PF", "PG", "SC", "WBoN"):
            error = expected_calibration_error(
                [o["confidence"] for o in found], [o["right"] for o in found]
            )
            note += f"; calibration error of its confidence {error:.2f}"
        values.append(Value(f"{method}, N = {n}", share, note=note))
    return values
