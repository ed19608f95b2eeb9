"""Regret with a language model that lies or whose answers break, from the stored cells."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value

__all__: list[str] = []

_AT = (6, 8, 10, 15, 20)


def _evaluate(quick: bool) -> list[Value]:
    from benchmarks.bo._llm_cells import stored

    cells: dict[str, dict[int, Any]] = {}
    for plan, found in stored("guard"):
        cells.setdefault(plan.method, {})[plan.seed] = found
    if "gp" not in cells:
        raise Unavailable("no cells are stored: python -m benchmarks.bo._llm_run guard")
    plain = cells["gp"]
    values = []
    for method, done in cells.items():
        common = sorted(set(done) & set(plain))
        if not common or method == "gp":
            continue
        own, base = ([c[s]["regret"][-1] for s in common] for c in (done, plain))
        same = sum(done[s]["regret"] == plain[s]["regret"] for s in common)
        values.append(
            Value(
                f"{method}: mean final regret over the plain process's",
                statistics.mean(own) / statistics.mean(base),
                reference=1.1 if method == "adversarial" else None,
                rule="at most",
                note=f"{len(common)} seeds; {same} of them with the same regrets throughout",
            )
        )
        values.append(
            Value(
                f"{method}: CPU seconds of a study",
                statistics.mean(done[s]["study_cpu_s"] for s in common),
                note=f"the plain process: {statistics.mean(plain[s]['study_cpu_s'] for s in common):.3g}; "  # noqa: E501
                f"requests: {statistics.mean(done[s]['calls'] for s in common):.0f}",
            )
        )
    for method, done in cells.items():
        for at in _AT:
            logs = [math.log10(max(c["regret"][at - 1], 1e-9)) for c in done.values()]
            mean = statistics.mean(c["regret"][at - 1] for c in done.values())
            values.append(
                Value(
                    f"{method}: regret after {at} evaluations, median",
                    10 ** statistics.median(logs),
                    note=f"{len(done)} seeds, mean {mean:.3g}",
                )
            )
    return values


BENCHMARK = Quality(
    title="Bayesian optimisation with language models that are wrong or broken",
    question=(
        "Branin, 5 + 15 evaluations free of noise: what does a language model cost that says the "
        "opposite of what it knows, from the same initial points and when it chooses half of them; "
        "what does one bring that knows the function up to a standard error of 3 (a hundredth of "
        "its range), and how does that change as 0, 10, 30 and 60 % of the answers are malformed?"
    ),
    evaluate=_evaluate,
    packages=("botorch", "torch"),
)
