"""A Bayesian neural network with two layers of 50."""

from __future__ import annotations

from benchmarks.hmc._sampling import benchmark_of

BENCHMARK = benchmark_of("BNN 2x50", accept=0.8, draws=(200, 50))
