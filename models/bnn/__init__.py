"""Bayesian neural networks: the model, the network as pure functions, and its predictions."""

from __future__ import annotations

from probkit.models.bnn.model import BNN
from probkit.models.bnn.network import Layer

__all__ = ["BNN", "Layer"]
