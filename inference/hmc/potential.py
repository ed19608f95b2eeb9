"""The potential energy of all chains together, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probkit.density import log_joint_of
from probkit.errors import CapabilityError, DataError
from probkit.unconstrained import Unconstrained

__all__ = ["FAILURES", "Potential"]

# What factorisations raise for a matrix that is not positive definite.
FAILURES = (torch.linalg.LinAlgError, DataError)  # type: ignore[attr-defined]


class Potential:
    """U(q) = -log p(values(q), data) - log |d values / d q| for every chain at once.

    One evaluation of the batched log joint and one gradient of its sum serve all chains, because
    chains do not see each other. A point at which the density is zero or not a number, or whose
    gradient is not finite, has potential +inf and gradient zero: a trajectory that meets it ends
    as a divergence. So does a point at which a matrix cannot be factorised.

    Args:
        model: A HasLogJoint model.
        data: Its data.

    Attributes:
        free: The map between site values and the flat vector.

    Example:
        >>> from torch.distributions import constraints
        >>> from probkit.model import Site
        >>> class Exponential:
        ...     def sites(self, data):
        ...         return {"x": Site((), constraints.positive)}
        ...     def log_joint(self, values, data, *, scale=1.0):
        ...         return -values["x"]
        >>> energy, gradient = Potential(Exponential(), None)(torch.zeros(2, 1))
        >>> energy, gradient
        (tensor([1., 1.]), tensor([[0.],
                [0.]]))
    """

    def __init__(self, model: Any, data: Any) -> None:
        self.model, self.data = model, data
        self.free = Unconstrained(model.sites(data))

    def log_density(self, position: Tensor) -> Tensor:
        """Return the log density [chain] of flat vectors [chain, D], Jacobian included."""
        values, log_det = self.free.constrain(position)
        return log_joint_of(self.model, values, self.data) + log_det

    def raw(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return potential [chain] and gradient [chain, D] as they come, finite or not.

        Raises:
            CapabilityError: The log joint does not depend on the values differentiably.
        """
        with torch.enable_grad():
            leaf = position.detach().requires_grad_()
            energy = -self.log_density(leaf)
            if not energy.requires_grad:
                raise CapabilityError(
                    f"log_joint of {type(self.model).__name__} is not differentiable: expected a "
                    "result that carries gradients to the values; compute it with torch operations"
                )
            (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), gradient

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return potential [chain] and gradient [chain, D] at ``position`` [chain, D]."""
        try:
            energy, gradient = self.raw(position)
        except FAILURES:
            energy, gradient = self._one_by_one(position)
        if bool(torch.isfinite(energy.sum() + gradient.sum())):
            return energy, gradient
        bad = ~(torch.isfinite(energy) & torch.isfinite(gradient).all(-1))
        return energy.masked_fill(bad, torch.inf), gradient.masked_fill(bad[:, None], 0.0)

    def _one_by_one(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate chain by chain, so that one that fails leaves the others alone."""
        energies, gradients = [], []
        for row in position.split(1):
            try:
                energy, gradient = self.raw(row)
            except FAILURES:
                energy, gradient = row.new_full((1,), torch.inf), torch.zeros_like(row)
            energies.append(energy)
            gradients.append(gradient)
        return torch.cat(energies), torch.cat(gradients)
