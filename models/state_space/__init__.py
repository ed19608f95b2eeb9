"""State-space models for particle methods: linear-Gaussian, stochastic volatility, discrete."""

from __future__ import annotations

from probkit.models.state_space.base import StateSpaceModel
from probkit.models.state_space.discrete_hmm import DiscreteHMM
from probkit.models.state_space.linear_gaussian import LinearGaussian
from probkit.models.state_space.stochastic_volatility import StochasticVolatility

__all__ = ["DiscreteHMM", "LinearGaussian", "StateSpaceModel", "StochasticVolatility"]
