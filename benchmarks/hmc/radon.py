"""Varying intercepts of 85 counties."""

from __future__ import annotations

from benchmarks.hmc._sampling import benchmark_of

BENCHMARK = benchmark_of("radon", accept=0.9, draws=(3000, 500))
