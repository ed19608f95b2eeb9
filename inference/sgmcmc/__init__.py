"""Stochastic-gradient Markov chain Monte Carlo: posterior draws from gradients on minibatches."""

from __future__ import annotations

from probkit.inference.sgmcmc.schedules import Constant, Cyclical, PolynomialDecay
from probkit.inference.sgmcmc.sghmc import SGHMC
from probkit.inference.sgmcmc.sgld import SGLD

__all__ = ["SGHMC", "SGLD", "Constant", "Cyclical", "PolynomialDecay"]
