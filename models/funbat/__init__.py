"""Functional Bayesian tensor decomposition: tensors with continuous indexes."""

from __future__ import annotations

from probkit.models.funbat.data import TensorData
from probkit.models.funbat.hyper import HyperPrior
from probkit.models.funbat.likelihoods import BernoulliNoise, PoissonNoise
from probkit.models.funbat.masks import (
    additive,
    full_terms,
    interactions,
    main_effects,
    masked_terms,
)
from probkit.models.funbat.model import Factor, FunBaT
from probkit.models.funbat.noise import GaussianNoise, Noise, StudentTNoise
from probkit.models.funbat.prior import factor_prior, funbat_program
from probkit.models.funbat.selection import (
    StructureChoice,
    choose_structure,
    score_predictions,
)
from probkit.models.funbat.warps import LogWarp, Warped

__all__ = [
    "BernoulliNoise",
    "Factor",
    "FunBaT",
    "GaussianNoise",
    "HyperPrior",
    "LogWarp",
    "Noise",
    "PoissonNoise",
    "StudentTNoise",
    "StructureChoice",
    "TensorData",
    "Warped",
    "additive",
    "choose_structure",
    "factor_prior",
    "full_terms",
    "funbat_program",
    "interactions",
    "main_effects",
    "masked_terms",
    "score_predictions",
]
