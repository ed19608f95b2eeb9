"""Quality of surrogates on recorded evaluations, from the stored cells."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value

__all__: list[str] = []

_WHAT = {
    "nrmse": "root mean squared error over the range",
    "log_density": "mean log density, no term left out",
    "coverage_68": "coverage of 68 % intervals",
    "coverage_95": "coverage of 95 % intervals",
}


def _evaluate(quick: bool) -> list[Value]:
    from benchmarks.bo._llm_cells import PREDICTORS, ROWS, stored

    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for plan, found in stored("quality"):
        groups.setdefault((plan.method, int(plan.model.split()[-1])), []).append(found)
    if not groups:
        raise Unavailable("no cells are stored: python -m benchmarks.bo._llm_run quality")
    values = []
    for method in PREDICTORS:
        for n in ROWS:
            cells = groups.get((method, n), [])
            if not cells:
                continue
            seconds = statistics.mean(cell["seconds"] for cell in cells)
            valid = statistics.mean(cell["valid"] for cell in cells)
            for key, what in _WHAT.items():
                values.append(
                    Value(
                        f"{method}, n = {n}: {what}",
                        statistics.mean(cell[key] for cell in cells),
                        note=f"{len(cells)} tasks, 20 queries each, {seconds:.1f} s, "
                        f"{valid:.0%} of the answers valid",
                    )
                )
    return values


BENCHMARK = Quality(
    title="Language models as surrogates, quality of predictions",
    question=(
        "How well are 20 recorded evaluations predicted from n others by a Gaussian process, by "
        "SmolLM2-135M (sampled answers, and digit by digit), and by the hybrid of both (few tasks: "
        "the count stands with each number)?"
    ),
    evaluate=_evaluate,
    packages=("botorch", "torch", "transformers"),
)
