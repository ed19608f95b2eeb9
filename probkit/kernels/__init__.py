"""Kernels: GPyTorch kernels of our own, and functions that treat any kernel as a function."""

from __future__ import annotations

from probkit.kernels.backends import backend
from probkit.kernels.functional import Hyper, evaluate, hyperparameters
from probkit.kernels.nngp import NNGPKernel
from probkit.kernels.storing import kernel_config, kernel_from_config

__all__ = [
    "Hyper",
    "NNGPKernel",
    "backend",
    "evaluate",
    "hyperparameters",
    "kernel_config",
    "kernel_from_config",
]
