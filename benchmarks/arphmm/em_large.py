"""EM of switching autoregressions of 14 features; see the module imported."""

from __future__ import annotations

from benchmarks.arphmm._iteration import benchmark
from benchmarks.harness.spec import Goal

BENCHMARK = benchmark(14, Goal("at most 0.75 of dynamax's CPU time", 0.75))
