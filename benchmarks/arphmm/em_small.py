"""EM of switching autoregressions of 2 features; see the module imported."""

from __future__ import annotations

from benchmarks.arphmm._iteration import benchmark
from benchmarks.harness.spec import Goal

BENCHMARK = benchmark(2, Goal("at most 1.3 times dynamax's CPU time", 1.3))
