"""A flat law on a support: the stand-in for sites whose density comes from elsewhere."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

__all__ = ["Flat"]


class Flat(dist.ImproperUniform):
    """The improper uniform law, with starting points in place of draws.

    ``log_prob`` is zero everywhere. ``sample`` gives ``start``, or a point that is uniform on
    [-2, 2] in unconstrained space, which is what initialisers of samplers and AutoGuides ask for;
    it is not a draw from any prior.

    Args:
        support: Where the values lie.
        batch_shape: Batch shape.
        event_shape: Event shape.
        start: A value [*batch, *event] to start from.
        dtype: Precision of the starting points.
    """

    def __init__(
        self,
        support: Constraint,
        batch_shape: tuple[int, ...],
        event_shape: tuple[int, ...],
        *,
        start: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._start = start
        self._dtype = dtype
        super().__init__(support, torch.Size(batch_shape), torch.Size(event_shape))

    @constraints.dependent_property
    def support(self) -> Constraint:
        """The support."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flat:
        """Return the law with another batch shape."""
        shape = torch.Size(batch_shape)
        start = None if self._start is None else self._start.expand(shape + self.event_shape)
        return Flat(self._support, shape, self.event_shape, start=start, dtype=self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero, in the dtype of ``value``."""
        shape = value.shape[: value.ndim - self.event_dim]
        return value.new_zeros(torch.broadcast_shapes(shape, self.batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return starting points [*sample, *batch, *event]."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        if self._start is not None:
            return self._start.expand(shape).clone()
        bijection = biject_to(self._support)
        free = 4.0 * torch.rand(bijection.inverse_shape(shape), dtype=self._dtype) - 2.0
        return bijection(free)
