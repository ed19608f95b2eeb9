"""Inference algorithms: one file or folder each, driven by :func:`probkit.infer`.

Message passing on chains, as pure functions, is in :mod:`probkit.inference.message_passing`; the
pieces of particle methods are in :mod:`probkit.inference.smc`.
"""

from __future__ import annotations

from probkit.inference.deep_ensemble import DeepEnsemble
from probkit.inference.direct import Direct
from probkit.inference.em import EM
from probkit.inference.gibbs import Gibbs
from probkit.inference.guides import Fixed, FullRank, LowRank, MeanField
from probkit.inference.hmc import HMC, NUTS
from probkit.inference.importance import ImportanceSampling
from probkit.inference.laplace import Laplace, LaplaceNormal
from probkit.inference.map import MAP
from probkit.inference.passing import MessagePassing
from probkit.inference.search import DVTS, BeamSearch, BestOfN, Greedy, SelfConsistency
from probkit.inference.sgmcmc import SGHMC, SGLD, Constant, Cyclical, PolynomialDecay
from probkit.inference.smc import (
    PPG,
    SMC,
    Entropic,
    ParallelTempering,
    PaRIS,
    ParticleFilter,
    ParticleGibbs,
    ParticleMarginalMH,
    ScoreAscent,
)
from probkit.inference.svi import SVI

__all__ = [
    "DVTS",
    "EM",
    "HMC",
    "MAP",
    "NUTS",
    "PPG",
    "SGHMC",
    "SGLD",
    "SMC",
    "SVI",
    "BeamSearch",
    "BestOfN",
    "Constant",
    "Cyclical",
    "DeepEnsemble",
    "Direct",
    "Entropic",
    "Fixed",
    "FullRank",
    "Gibbs",
    "Greedy",
    "ImportanceSampling",
    "Laplace",
    "LaplaceNormal",
    "LowRank",
    "MeanField",
    "MessagePassing",
    "PaRIS",
    "ParallelTempering",
    "ParticleFilter",
    "ParticleGibbs",
    "ParticleMarginalMH",
    "PolynomialDecay",
    "ScoreAscent",
    "SelfConsistency",
]
