"""Inference algorithms: one file each, driven by :func:`probkit.infer`."""

from __future__ import annotations

from probkit.inference.direct import Direct
from probkit.inference.guides import Fixed, FullRank, LowRank, MeanField
from probkit.inference.importance import ImportanceSampling
from probkit.inference.map import MAP
from probkit.inference.svi import SVI

__all__ = [
    "MAP",
    "SVI",
    "Direct",
    "Fixed",
    "FullRank",
    "ImportanceSampling",
    "LowRank",
    "MeanField",
]
