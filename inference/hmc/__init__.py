"""Hamiltonian Monte Carlo: chains batched in one tensor program."""

from __future__ import annotations

from probkit.inference.hmc.hmc import HMC
from probkit.inference.hmc.nuts import NUTS
from probkit.inference.hmc.start import Start

__all__ = ["HMC", "NUTS", "Start"]
