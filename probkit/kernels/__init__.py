"""Kernels: GPyTorch kernels of our own, and functions that treat any kernel as a function."""

from __future__ import annotations

from probkit.kernels.backends import backend
from probkit.kernels.functional import Hyper, evaluate, hyperparameters
from probkit.kernels.nngp import NNGPKernel
from probkit.kernels.partition import PartitionedKernel, partitioned
from probkit.kernels.products import product
from probkit.kernels.state_space import Matern, Periodic, StateSpace, state_space
from probkit.kernels.storing import kernel_config, kernel_from_config

__all__ = [
    "Hyper",
    "Matern",
    "NNGPKernel",
    "PartitionedKernel",
    "Periodic",
    "StateSpace",
    "backend",
    "evaluate",
    "hyperparameters",
    "kernel_config",
    "kernel_from_config",
    "partitioned",
    "product",
    "state_space",
]
