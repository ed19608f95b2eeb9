"""A correlated normal in 100 dimensions."""

from __future__ import annotations

from benchmarks.hmc._sampling import benchmark_of

BENCHMARK = benchmark_of("normal 100", accept=0.8)
