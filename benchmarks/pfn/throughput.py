"""Predictions of 4096 ragged learning curves in one call, beside one call for each."""

from __future__ import annotations

from benchmarks.harness.spec import Agreement, Benchmark, Comparison, Contender, Goal
from benchmarks.pfn import _curves

BENCHMARK = Benchmark(
    title="Learning curves: 4096 in one call",
    question=(
        "How long does a prediction of the final value take for each of 4096 curves of 5 epochs to "
        "a longest of 10, 20 or 50, all in one call, against calls of the same network curve by "
        "curve?"
    ),
    workloads=tuple({"B": 4096, "queries": 1, "longest": longest} for longest in (10, 20, 50)),
    gpu_workloads=tuple({"B": b, "queries": 1, "longest": 50} for b in (4096, 65536)),
    contenders=(
        Contender("one call", _curves.together, ("probkit", "torch"), devices=("cpu", "cuda")),
        Contender(
            "a call a curve", _curves.one_by_one, ("probkit", "torch"), devices=("cpu", "cuda")
        ),
    ),
    comparisons=(
        Comparison(
            ours="one call",
            peer="a call a curve",
            agreement=Agreement(("medians of the first curve",), atol=1e-4),
            goal=Goal("at most a tenth of the time", 0.1),
        ),
    ),
    repeats=5,
    unit="curve",
    notes=(
        "The calls curve by curve are timed on 64 of the curves; times are per curve.",
        "One call saves what a small call spends on overhead, not the arithmetic, which grows with "
        "the epochs observed: with 50 of them it is what one core can multiply that counts.",
    ),
)
