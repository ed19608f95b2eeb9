"""Running estimates of gradient moments in the warm-up, from which preconditioners are made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GradientMoments"]

_TINY = 1e-20


class GradientMoments(NamedTuple):
    """Exponential averages with a memory that adapts itself (Springenberg et al. 2016, section 4).

    Attributes:
        memory: tau [chain, D], the length of the average in steps.
        mean: Average gradient [chain, D].
        square: Average squared gradient v [chain, D].
    """

    memory: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def start(cls, position: Tensor) -> GradientMoments:
        """Return the estimates before the first gradient, all one."""
        one = torch.ones_like(position)
        return cls(one, one, one)

    def update(self, gradient: Tensor) -> GradientMoments:
        """Move both averages by 1 / (tau + 1) of the way, tau being that before its own update."""
        rate = 1.0 / (self.memory + 1.0)
        memory = self.memory * (1.0 - self.mean.square() / self.square.clamp(min=_TINY)) + 1.0
        return GradientMoments(
            memory,
            self.mean + rate * (gradient - self.mean),
            self.square + rate * (gradient.square() - self.square),
        )

    @property
    def preconditioner(self) -> Tensor:
        """v^(-1/2) [chain, D]."""
        return self.square.clamp(min=_TINY).rsqrt()
