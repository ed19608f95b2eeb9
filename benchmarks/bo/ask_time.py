"""CPU seconds of an ask, from the stored cells."""

from __future__ import annotations

import statistics

from benchmarks.bo._cells import NETWORKS, Cell
from benchmarks.bo.regret import _groups
from benchmarks.harness.spec import Quality, Value

__all__: list[str] = []


def _first(cells: list[Cell]) -> float:
    return statistics.median(cell.ask_cpu_s[0] for cell in cells)


def _evaluate(quick: bool) -> list[Value]:
    values = []
    for (problem, method), cells in _groups().items():
        cold = 1 if method in NETWORKS else 0  # their first fit has nothing to start from
        asks = [statistics.mean(cell.ask_cpu_s[cold:]) for cell in cells]
        bar = 0.2 if method == "gp" and problem in ("Branin", "Hartmann6") else None
        if method == "hmc" and problem == "Branin":
            bar = 1.5
        values.append(
            Value(
                f"{problem}, {method}",
                statistics.median(asks),
                reference=bar,
                rule="at most",
                note=f"median over {len(cells)} seeds of the mean over the asks of a study"
                + (f"; the first, left out, {_first(cells):.3g}" if cold else ""),
            )
        )
    return values


BENCHMARK = Quality(
    title="Bayesian optimisation, time of an ask",
    question="How many CPU seconds does the choice of the next point take, one thread?",
    evaluate=_evaluate,
    packages=("botorch", "optuna", "torch"),
)
