"""Logistic regression, 1000 observations of 25 predictors."""

from __future__ import annotations

from benchmarks.hmc._sampling import benchmark_of

BENCHMARK = benchmark_of("logistic", accept=0.9)
