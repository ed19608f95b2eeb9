"""Sequential Monte Carlo from composable pieces."""

from __future__ import annotations

from probkit.inference.smc.cloud import (
    Cloud,
    ExtinctionError,
    extend,
    move,
    resample,
    reweight,
    spawn,
)
from probkit.inference.smc.filters import ParticleFilter, filter_step, log_evidence_estimate
from probkit.inference.smc.proposal import Proposal
from probkit.inference.smc.resampling import (
    RESAMPLERS,
    multinomial,
    residual,
    stratified,
    systematic,
)
from probkit.inference.smc.tempered import SMC

__all__ = [
    "RESAMPLERS",
    "SMC",
    "Cloud",
    "ExtinctionError",
    "ParticleFilter",
    "Proposal",
    "extend",
    "filter_step",
    "log_evidence_estimate",
    "move",
    "multinomial",
    "resample",
    "residual",
    "reweight",
    "spawn",
    "stratified",
    "systematic",
]
