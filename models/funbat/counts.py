"""Counts whose rate is a softplus of a Gaussian: the law of new counts."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

__all__ = ["MixedPoisson", "normal_nodes", "unit_softplus"]

_SHIFT = math.log(math.e - 1)  # softplus(_SHIFT) = 1
_NODES = 40


def unit_softplus(f: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(f + b), with b such that it is one at f = 0, and its derivative."""
    # softplus underflows with e^f; the smallest positive number keeps logarithms finite.
    value = softplus(f + _SHIFT).clamp_min(torch.finfo(f.dtype).tiny)
    return value, torch.sigmoid(f + _SHIFT)


def normal_nodes(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights [node] with sum w g(x) = E[g(x)], x standard normal (Gauss-Hermite)."""
    nodes, weights = _hermite()
    return like.new_tensor(nodes), like.new_tensor(weights)


@functools.cache
def _hermite() -> tuple[Any, Any]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return nodes, weights / weights.sum()


class MixedPoisson(TorchDistribution):
    """y ~ Poisson(level softplus(f + b)), f ~ N(loc, scale^2), softplus(b) = 1.

    Integrals over f are Gauss-Hermite sums of 40 nodes.

    Args:
        loc: Mean of f [*batch].
        scale: Its standard deviation [*batch], not negative.
        level: Rate at f = 0 [*batch].
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.nonnegative,
        "level": constraints.positive,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self, loc: Tensor, scale: Tensor, level: Tensor, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale, self.level = torch.broadcast_tensors(loc, scale, level)
        super().__init__(self.loc.shape, validate_args=False)

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Rates [*batch, node] and the weights of the nodes [node]."""
        nodes, weights = normal_nodes(self.loc)
        f = self.loc.unsqueeze(-1) + self.scale.unsqueeze(-1) * nodes
        return self.level.unsqueeze(-1) * unit_softplus(f)[0], weights

    @property
    def mean(self) -> Tensor:
        """E[rate] [*batch]."""
        rates, weights = self._rates()
        return rates @ weights

    @property
    def variance(self) -> Tensor:
        """E[rate] + Var[rate] [*batch]."""
        rates, weights = self._rates()
        mean = rates @ weights
        return mean + (rates - mean.unsqueeze(-1)).square() @ weights

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability [*sample, *batch]."""
        rates, weights = self._rates()
        count = value.unsqueeze(-1)
        terms = torch.xlogy(count, rates) - rates - torch.lgamma(count + 1)
        return torch.logsumexp(terms + weights.log(), -1)

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y <= value) [*sample, *batch]."""
        rates, weights = self._rates()
        count = value.floor().unsqueeze(-1)
        below = torch.special.gammaincc(count.clamp_min(0) + 1, rates) @ weights
        return torch.where(value < 0, 0.0, below)

    def icdf(self, value: Tensor) -> Tensor:
        """The least count whose distribution function reaches ``value``, by bisection."""
        low = torch.full_like(value + self.loc, -1.0)
        high = (self.mean + 20 * self.variance.sqrt() + 20).ceil().expand(low.shape)
        while bool((self.cdf(high) < value).any()) and float(high.max()) < 1e15:
            high = torch.where(self.cdf(high) < value, 2 * high, high)
        while bool((high - low > 1).any()):
            middle = ((low + high) / 2).floor()
            enough = self.cdf(middle) >= value
            low = torch.where(enough, low, middle)
            high = torch.where(enough, middle, high)
        return high

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch] from the global stream."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            f = self.loc + self.scale * torch.randn(
                shape, dtype=self.loc.dtype, device=self.loc.device
            )
            return torch.poisson(self.level * unit_softplus(f)[0])
