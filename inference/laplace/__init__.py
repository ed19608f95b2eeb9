"""Laplace approximations: a Gaussian around a mode, its evidence, and linearised predictions."""

from __future__ import annotations

from probkit.inference.laplace.guide import LaplaceNormal
from probkit.inference.laplace.layers import HasLayers, OutputCurvature
from probkit.inference.laplace.linearise import Linearised, linearise
from probkit.inference.laplace.sampler import Laplace

__all__ = [
    "HasLayers",
    "Laplace",
    "LaplaceNormal",
    "Linearised",
    "OutputCurvature",
    "linearise",
]
