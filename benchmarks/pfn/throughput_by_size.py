"""Time of a learning-curve prediction by the number of curves in a call and of epochs asked for."""

from __future__ import annotations

from benchmarks.harness.spec import Agreement, Benchmark, Comparison, Contender
from benchmarks.pfn import _curves

BENCHMARK = Benchmark(
    title="Learning curves: time by size of the call",
    question=(
        "How does the time of a prediction fall with the number of curves in a call, for the final "
        "value and for the last fifty epochs?"
    ),
    workloads=tuple({"B": b, "queries": q, "longest": 50} for q in (1, 50) for b in (1, 64, 4096)),
    contenders=(
        Contender("one call", _curves.together, ("probkit", "torch")),
        Contender("a call a curve", _curves.one_by_one, ("probkit", "torch")),
    ),
    comparisons=(
        Comparison(
            ours="one call",
            peer="a call a curve",
            agreement=Agreement(("medians of the first curve",), atol=1e-4),
        ),
    ),
    repeats=3,
    unit="curve",
    notes=(
        "Of many epochs most of the time is arithmetic that a batch cannot save: the gain of one "
        "call is what a small call spends on overhead.",
    ),
)
