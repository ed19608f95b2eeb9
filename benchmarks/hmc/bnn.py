"""A Bayesian neural network with two layers of 50."""

from __future__ import annotations

from benchmarks.hmc._sampling import benchmark_of

BENCHMARK = benchmark_of(
    "BNN 2x50",
    accept=0.8,
    draws=(200, 50),
    depth=7,
    notes=(
        "Paths of all NUTS sides have at most 127 steps; probkit's HMC at most 512.",
        "Profile, 64 chains: a transition of probkit's NUTS takes 1.75 CPU seconds for at most 127 "
        "gradients, and one gradient of 64 chains 13.5 ms (eager; 1.07 ms for one chain, which is "
        "68 ms for 64): nothing but gradients counts. Their matrix products take 2.7 ms at the "
        "18 GFlop/s of one core in float64, a tanh of all hidden units 1.1 ms; a fiftieth of "
        "Pyro's time would leave 6 to 7 ms for a gradient with all that belongs to it.",
    ),
)
