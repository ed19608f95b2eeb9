"""Sequential Monte Carlo from composable pieces."""

from __future__ import annotations

from probkit.inference.smc.backward import backward_draws
from probkit.inference.smc.cloud import (
    Cloud,
    ExtinctionError,
    extend,
    move,
    resample,
    reweight,
    spawn,
)
from probkit.inference.smc.diagnostics import EvidenceEstimate, degeneracy, evidence
from probkit.inference.smc.entropic import Entropic, tempered_resample
from probkit.inference.smc.filters import ParticleFilter, filter_step, log_evidence_estimate
from probkit.inference.smc.fisher import Score, ScoreAscent, score
from probkit.inference.smc.gibbs import ParticleGibbs, conditional_sweep
from probkit.inference.smc.parallel import ParallelTempering
from probkit.inference.smc.paris import PPG, PaRIS, parisian_sweep, smooth
from probkit.inference.smc.pmmh import ParticleMarginalMH
from probkit.inference.smc.proposal import Proposal
from probkit.inference.smc.resampling import (
    multinomial,
    residual,
    stratified,
    systematic,
)
from probkit.inference.smc.tempered import SMC

__all__ = [
    "PPG",
    "SMC",
    "Cloud",
    "Entropic",
    "EvidenceEstimate",
    "ExtinctionError",
    "PaRIS",
    "ParallelTempering",
    "ParticleFilter",
    "ParticleGibbs",
    "ParticleMarginalMH",
    "Proposal",
    "Score",
    "ScoreAscent",
    "backward_draws",
    "conditional_sweep",
    "degeneracy",
    "evidence",
    "extend",
    "filter_step",
    "log_evidence_estimate",
    "move",
    "multinomial",
    "parisian_sweep",
    "resample",
    "residual",
    "reweight",
    "score",
    "smooth",
    "spawn",
    "stratified",
    "systematic",
    "tempered_resample",
]
