"""NUTS on thirteen Pyro programs against reference draws."""

from __future__ import annotations

from benchmarks.harness.spec import Quality, Value


def _evaluate(quick: bool) -> list[Value]:
    from benchmarks.posteriordb._quality import evaluate

    return evaluate("program", quick)


BENCHMARK = Quality(
    title="Reference posteriors, Pyro programs",
    question=(
        "Do mean, sd and quantiles by NUTS on FromPyro agree with posteriordb's reference draws, "
        "every z score under the 99 % Bonferroni bound over all comparisons?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "pyro-ppl", "arviz"),
    timeout=36000.0,
)
