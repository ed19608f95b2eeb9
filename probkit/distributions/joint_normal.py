"""A normal law on a table, with any covariance between its entries."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints

from probkit.errors import ShapeError

__all__ = ["JointNormal"]


class JointNormal(TorchDistribution):
    """Normal law on [row, output], dependent over rows and outputs.

    Args:
        loc: Mean [*batch, row, output].
        scale_tril: Lower factor of the covariance [*batch, row * output, row * output], outputs
            running fastest.

    Raises:
        ShapeError: The shapes do not match.

    Example:
        >>> law = JointNormal(torch.zeros(3, 2), torch.eye(6))
        >>> law.event_shape, law.variance.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.lower_cholesky,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        size = loc.shape[-2:].numel() if loc.ndim >= 2 else None
        if size is None or scale_tril.ndim < 2 or scale_tril.shape[-2:] != (size, size):
            raise ShapeError(
                "expected loc [*batch, row, output] and scale_tril [*batch, row * output, "
                f"row * output], got {tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        batch = torch.broadcast_shapes(loc.shape[:-2], scale_tril.shape[:-2])
        self.loc = loc.expand(batch + loc.shape[-2:])
        self.scale_tril = scale_tril.expand(batch + scale_tril.shape[-2:])
        super().__init__(batch, loc.shape[-2:], validate_args=validate_args)

    def _flat(self) -> MultivariateNormal:
        return MultivariateNormal(
            self.loc.flatten(-2), scale_tril=self.scale_tril, validate_args=False
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> JointNormal:
        """Return the law with a larger batch shape."""
        batch = torch.Size(batch_shape)
        return JointNormal(
            self.loc.expand(batch + self.event_shape),
            self.scale_tril.expand(batch + self.scale_tril.shape[-2:]),
            validate_args=False,
        )

    @property
    def mean(self) -> Tensor:
        """Mean [*batch, row, output]."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances [*batch, row, output]."""
        return self.scale_tril.square().sum(-1).reshape(self.loc.shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance [*batch, row * output, row * output]."""
        return self.scale_tril @ self.scale_tril.mT

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, row, output]."""
        if self._validate_args:
            self._validate_sample(value)
        density: Tensor = self._flat().log_prob(value.flatten(-2))
        return density

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw differentiably from the global stream."""
        draws: Tensor = self._flat().rsample(torch.Size(sample_shape))
        return draws.reshape(draws.shape[:-1] + self.event_shape)
