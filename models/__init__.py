"""Models: one file or folder a family."""

from __future__ import annotations

from probkit.models.nngp import ScaleMixtureNNGP, ScaleProposal
from probkit.models.scale_laws import (
    BurrXII,
    Gamma,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    PointMass,
)

__all__ = [
    "BurrXII",
    "Gamma",
    "HalfCauchy",
    "InverseGamma",
    "LogNormal",
    "PointMass",
    "ScaleMixtureNNGP",
    "ScaleProposal",
]
