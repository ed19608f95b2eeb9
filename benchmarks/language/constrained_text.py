"""Twelve tokens of SmolLM2 without the letter e: independent draws against particles."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value
from benchmarks.language._cells import load_all
from benchmarks.language._constrained import PARTICLES, TABLE, TOKENS

__all__: list[str] = []


def _log_mean(log_z: list[float]) -> tuple[float, float]:
    """Log of the mean evidence, and its standard error."""
    top = max(log_z)
    ratios = [math.exp(value - top) for value in log_z]
    mean = statistics.fmean(ratios)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else math.nan
    return top + math.log(mean), error / mean


def _evaluate(quick: bool) -> list[Value]:
    cells: list[Any] = load_all(TABLE)
    if not cells:
        raise Unavailable(
            "no cells are stored: python -m benchmarks.language constrained runs them"
        )
    values = []
    for way in ("independent", "bootstrap", "masked"):
        found = [cell[way] for cell in cells]
        alive = [f["alive"] for f in found]
        died = [f["extinct_at_token"] for f in found if f["extinct_at_token"] is not None]
        note = f"{len(found)} runs, {min(alive)} to {max(alive)}"
        if died:
            note += f"; {len(died)} runs died out, at token {min(died)} to {max(died)}"
        values.append(
            Value(
                f"{way}: particles of {PARTICLES} alive after {TOKENS} tokens, mean",
                statistics.fmean(alive),
                note=note,
            )
        )
        if way != "independent":
            distinct = [f["distinct"] for f in found]
            values.append(
                Value(
                    f"{way}: distinct texts, mean",
                    statistics.fmean(distinct),
                    note=f"{min(distinct)} to {max(distinct)}",
                )
            )
            # a run that died out has evidence zero
            log_z = [-math.inf if f["log_z"] is None else f["log_z"] for f in found]
            mean, error = _log_mean(log_z)
            lived = [v for v in log_z if v > -math.inf]
            values.append(
                Value(
                    f"{way}: log evidence",
                    mean,
                    note=f"standard error {error:.2f}; single runs {min(lived):.1f} to "
                    f"{max(lived):.1f}",
                )
            )
    return values


BENCHMARK = Quality(
    title="Constrained text, SmolLM2-135M",
    question=(
        f"How many of {PARTICLES} particles write {TOKENS} tokens without the letter e, and how "
        "probable is such a text?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "transformers"),
)
