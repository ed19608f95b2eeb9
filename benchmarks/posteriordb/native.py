"""NUTS on thirteen native log joints against reference draws."""

from __future__ import annotations

from benchmarks.harness.spec import Quality, Value


def _evaluate(quick: bool) -> list[Value]:
    from benchmarks.posteriordb._quality import evaluate

    return evaluate("native", quick)


BENCHMARK = Quality(
    title="Reference posteriors, native log joints",
    question=(
        "Do mean, sd and quantiles by NUTS agree with posteriordb's reference draws, every z "
        "score under the 99 % Bonferroni bound over all comparisons?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "arviz"),
    timeout=36000.0,
)
