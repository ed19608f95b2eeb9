"""Regret of every method after 50 evaluations, from the stored cells."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.bo._cells import NETWORK_PROBLEMS, NETWORKS, PROBLEMS, Cell, stored
from benchmarks.harness.spec import Quality, Unavailable, Value

__all__: list[str] = []

#: Bars of the default path, free of noise, after 10 + 40 evaluations.
_BARS = {("Branin", "gp"): 3e-4, ("Hartmann6", "gp"): 3e-3}


def _groups() -> dict[tuple[str, str], list[Cell]]:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in stored():
        groups.setdefault((cell.problem, cell.method), []).append(cell)
    if not groups:
        raise Unavailable("no cells are stored: python -m benchmarks.bo runs them")
    order = [p for p in (*PROBLEMS, *NETWORK_PROBLEMS)]
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def _evaluate(quick: bool) -> list[Value]:
    groups = _groups()
    values = []
    for (problem, method), cells in groups.items():
        last = [cell.quality[-1] for cell in cells]
        low, high = _quartiles(last)
        bar = _BARS.get((problem, method))
        note = f"{len(cells)} seeds, quartiles {low:.3g} to {high:.3g}"
        if method != "gp":
            note += _beside_gp(cells, groups.get((problem, "gp"), []), method in NETWORKS)
        values.append(
            Value(
                f"{problem}, {method}, {len(cells[0].quality)} evaluations",
                statistics.median(last),
                reference=bar,
                rule="at most",
                note=note,
            )
        )
    return values


def _beside_gp(cells: list[Cell], process: list[Cell], tell: bool) -> str:
    """How often a method ends below the Gaussian process, from the same points and as late."""
    at = len(cells[0].quality) - 1
    regret = {cell.seed: cell.quality[at] for cell in process}
    pairs = [(c.quality[-1], regret[c.seed]) for c in cells if c.seed in regret]
    if not pairs:
        return ""
    won, lost = sum(ours < gp for ours, gp in pairs), sum(ours > gp for ours, gp in pairs)
    median = f" ({statistics.median(gp for _, gp in pairs):.3g} by then)" if tell else ""
    return f"; below gp{median} on {won}, above on {lost}"


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    cut: list[Any] = statistics.quantiles(values, n=4, method="inclusive")
    return cut[0], cut[2]


BENCHMARK = Quality(
    title="Bayesian optimisation, regret",
    question=(
        "What is the median regret after ten common initial points and 40 more (networks: 20 "
        "more), free of noise (of BraninCurrin: the share of the largest hypervolume that is "
        "missing)? Ours: gp, ibnn and the networks; peers: BoTorch's default, Optuna's GPSampler "
        "and TPE, random: who is ahead?"
    ),
    evaluate=_evaluate,
    packages=("botorch", "optuna", "torch"),
)
