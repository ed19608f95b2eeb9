"""EM of switching autoregressions of 2 features; see the module imported."""

from __future__ import annotations

from benchmarks.arphmm._fit import benchmark
from benchmarks.harness.spec import Goal

BENCHMARK = benchmark(2, Goal("at most a quarter of dynamax's CPU time", 0.25))
