"""Eight schools, non-centred."""

from __future__ import annotations

from benchmarks.hmc._sampling import benchmark_of

_PROFILE = (
    "Profile of probkit's NUTS, 64 chains, 24 leaves a transition: 17 % of the time goes to "
    "leapfrog steps with their gradients, 50 % to the tree (U-turn criterion, choice of leaves, "
    "masks of ended chains), 33 % to Python between the programs. HMC has no tree."
)
BENCHMARK = benchmark_of("eight schools", accept=0.8, notes=(_PROFILE,))
