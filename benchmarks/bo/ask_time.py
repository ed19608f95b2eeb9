"""CPU seconds of an ask, from the stored cells."""

from __future__ import annotations

import statistics

from benchmarks.bo._cells import NETWORKS
from benchmarks.bo.regret import _groups
from benchmarks.harness.spec import Quality, Value

__all__: list[str] = []


def _evaluate(quick: bool) -> list[Value]:
    values = []
    for (problem, method), cells in _groups().items():
        asks = [statistics.mean(cell.ask_cpu_s) for cell in cells]
        bar = 0.2 if method == "gp" and problem in ("Branin", "Hartmann6") else None
        if method in NETWORKS and problem == "Branin" and method == "hmc":
            bar = 1.5
        values.append(
            Value(
                f"{problem}, {method}",
                statistics.median(asks),
                reference=bar,
                rule="at most",
                note=f"median over {len(cells)} seeds of the mean over the asks of a study",
            )
        )
    return values


BENCHMARK = Quality(
    title="Bayesian optimisation, time of an ask",
    question="How many CPU seconds does the choice of the next point take, one thread?",
    evaluate=_evaluate,
    packages=("botorch", "optuna", "torch"),
)
