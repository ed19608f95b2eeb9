"""EM of switching autoregressions of 14 features; see the module imported."""

from __future__ import annotations

from benchmarks.arphmm._fit import benchmark
from benchmarks.harness.spec import Goal

BENCHMARK = benchmark(14, Goal("at most half of dynamax's CPU time", 0.5))
