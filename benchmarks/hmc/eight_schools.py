"""Eight schools, non-centred."""

from __future__ import annotations

from benchmarks.hmc._sampling import benchmark_of

BENCHMARK = benchmark_of("eight schools", accept=0.8)
