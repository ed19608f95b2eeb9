"""Calibration of the surrogates at the end of the stored cells."""

from __future__ import annotations

import statistics

from benchmarks.bo.regret import _groups
from benchmarks.harness.spec import Quality, Value

__all__: list[str] = []


def _evaluate(quick: bool) -> list[Value]:
    values = []
    for (problem, method), cells in _groups().items():
        known = [cell.calibration for cell in cells if cell.calibration]
        if not known:
            continue
        for name in ("50 %", "95 %", "NLL"):
            what = name if name == "NLL" else f"coverage of {name} intervals"
            values.append(
                Value(
                    f"{problem}, {method}, {what}",
                    statistics.median(c[name] for c in known),
                    note=f"{len(known)} seeds",
                )
            )
    return values


BENCHMARK = Quality(
    title="Bayesian optimisation, calibration",
    question=(
        "At the end of a study: how often do central intervals of trials left out hold the value "
        "told (five folds; the points crowd around the optimum), and at what log density?"
    ),
    evaluate=_evaluate,
    packages=("botorch", "torch"),
)
