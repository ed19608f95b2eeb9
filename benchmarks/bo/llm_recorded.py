"""Regret against recorded runs of GPT-3.5 as an optimiser, from the stored cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from benchmarks.harness.spec import Quality, Unavailable, Value

__all__: list[str] = []

_AT = (5, 6, 10, 20, 30)
#: Mean regret of all 125 recorded runs after so many evaluations, counted when the data were put
#: together.
_KNOWN = {5: 0.225, 6: 0.179, 10: 0.116, 20: 0.084, 30: 0.061}


def _evaluate(quick: bool) -> list[Value]:
    from benchmarks.bo._llm_cells import METHODS, stored
    from benchmarks.bo._llm_recorded import DATASETS, recorded

    runs = recorded()
    scales = _scales({key: run.scores for key, run in runs.items()})
    everything = {
        key: _regret(run.scores, *scales[key[:2]], key[0]) for key, run in runs.items()
    }  # fmt: skip
    values = _rows("all 125 recorded runs", everything.values(), _KNOWN)
    ours = {key: curve for key, curve in everything.items() if key[0] in DATASETS}
    values += _rows("the 75 recorded runs whose objectives are at hand", ours.values())
    cells: dict[str, dict[tuple[str, str, int], dict[str, object]]] = {}
    for plan, found in stored("recorded"):
        cells.setdefault(plan.method, {})[plan.data, plan.model, plan.seed] = found
    if not cells:
        raise Unavailable("no cells are stored: python -m benchmarks.bo._llm_run recorded")
    common = sorted(set.intersection(*(set(cells.get(m, {})) for m in METHODS)))
    if common:
        what = f"{len(common)} runs that every method has done"
        values += _rows(f"GPT-3.5, {what}", [everything[key] for key in common])
        for method in METHODS:
            done = {key: cells[method][key] for key in common}
            values += _method_rows(f"{method}, {what}", done, scales)
    for method, done in cells.items():
        if set(done) != set(common):
            values += _method_rows(f"{method}, all its {len(done)} runs", done, scales)
            same = [everything[key] for key in done]
            values += _rows(f"GPT-3.5, the same {len(done)} runs", same)
    return values


def _scales(
    scores: dict[tuple[str, str, int], list[float]],
) -> dict[tuple[str, str], tuple[float, float]]:
    """Smallest and largest score in the recorded runs of each task."""
    pools: dict[tuple[str, str], list[float]] = {}
    for (dataset, model, _), found in scores.items():
        pools.setdefault((dataset, model), []).extend(found)
    return {task: (min(pool), max(pool)) for task, pool in pools.items()}


def _regret(scores: Iterable[float], low: float, high: float, dataset: str) -> list[float]:
    """Regret of the best so far, as a share of the range of the recorded scores of the task.

    Below zero where something better than any recorded score was found.
    """
    minimised = dataset in ("griewank", "ktablet")
    curve, best = [], math.inf
    for score in scores:
        gap = (score - low) if minimised else (high - score)
        best = min(best, gap / (high - low))
        curve.append(best)
    return curve


def _method_rows(
    what: str,
    done: dict[tuple[str, str, int], dict[str, object]],
    scales: dict[tuple[str, str], tuple[float, float]],
) -> list[Value]:
    curves = []
    asks: list[float] = []
    for key, found in done.items():
        curves.append(_regret(found["scores"], *scales[key[:2]], key[0]))  # type: ignore[arg-type]
        asks += found["ask_cpu_s"]  # type: ignore[operator]
    rows = _rows(what, curves)
    rows.append(Value(f"{what}: CPU seconds an ask", statistics.mean(asks)))
    return rows


def _rows(
    what: str, curves: Iterable[list[float]], known: dict[int, float] | None = None
) -> list[Value]:
    whole = list(curves)
    rows = []
    for at in _AT:
        found = [curve[at - 1] for curve in whole]
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        reference = None if known is None else known[at]
        rows.append(
            Value(
                f"{what}: regret after {at}",
                statistics.mean(found),
                reference=reference,
                tolerance=1e-3,
                note=f"standard error {error:.3f}"
                + ("" if reference is None else "; reference: the same count, made independently"),
            )
        )
    return rows


BENCHMARK = Quality(
    title="Bayesian optimisation against recorded runs of a language model",
    question=(
        "From the same five starting points, how far from the best recorded score is the best so "
        "far after 6, 10, 20 and 30 evaluations, as a share of the range of recorded scores of "
        "the task: GPT-3.5 in charge of all three steps (recorded), a Gaussian process, an "
        "infinite network, Optuna's TPE, random search?"
    ),
    evaluate=_evaluate,
    packages=("botorch", "optuna", "scikit-learn", "torch"),
)
