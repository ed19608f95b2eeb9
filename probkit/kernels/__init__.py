"""Kernels: GPyTorch kernels of our own, and functions that treat any kernel as a function."""

from __future__ import annotations

from probkit.kernels.backends import backend
from probkit.kernels.nngp import NNGPKernel

__all__ = ["NNGPKernel", "backend"]
