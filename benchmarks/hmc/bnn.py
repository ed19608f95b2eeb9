"""A Bayesian neural network with two layers of 50."""

from __future__ import annotations

from benchmarks.hmc._sampling import benchmark_of

BENCHMARK = benchmark_of(
    "BNN 2x50",
    accept=0.8,
    draws=(200, 50),
    depth=7,
    notes=("Paths of all NUTS sides have at most 127 steps; probkit's HMC at most 512.",),
)
