"""Standardising inputs and targets by training statistics, and mapping predictions back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable

__all__ = ["Scaling", "fit_scaling", "no_scaling"]


@storable
@dataclass(frozen=True)
class Scaling:
    """Affine maps of inputs and targets to zero mean and unit standard deviation.

    Attributes:
        x_mean: [feature].
        x_sd: [feature]; 1 where a feature is constant.
        y_mean: [output], or a scalar for a target without output dim.
        y_sd: The same shape.
    """

    x_mean: Tensor
    x_sd: Tensor
    y_mean: Tensor
    y_sd: Tensor

    def x(self, x: Tensor) -> Tensor:
        """Standardise inputs [*, feature]."""
        return (x - self.x_mean) / self.x_sd

    def y(self, y: Tensor) -> Tensor:
        """Standardise targets [row] or [row, output]."""
        return (y - self.y_mean) / self.y_sd

    def output(self, k: int) -> Scaling:
        """Return the map of one output alone, as a target without output dim."""
        if self.y_mean.ndim == 0:
            return self
        return Scaling(self.x_mean, self.x_sd, self.y_mean[k], self.y_sd[k])

    def log_jacobian(self, y: Tensor) -> Tensor:
        """Log |d standardised / d original| of the targets: minus the sum of their log sds."""
        return -(y.shape[0] * self.y_sd.log()).sum()


def fit_scaling(x: Tensor, y: Tensor) -> Scaling:
    """Take means and standard deviations (divisor n) of the training data.

    Raises:
        DataError: A target is constant, so its scale is unknown.

    Example:
        >>> s = fit_scaling(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 4.0]))
        >>> s.x(torch.tensor([[3.0]])).item(), s.y_sd.item()
        (1.0, 2.0)
    """
    y_sd = y.std(0, correction=0)
    if bool((y_sd == 0).any()):
        where = "" if y_sd.ndim == 0 else f" (output {int((y_sd == 0).int().argmax())})"
        raise DataError(
            f"y{where}: expected a target that varies, got {y.shape[0]} equal values; "
            "pass standardize=False or drop it"
        )
    x_sd = x.std(0, correction=0)
    x_sd = torch.where(x_sd > 0, x_sd, torch.ones_like(x_sd))
    return Scaling(x.mean(0), x_sd, y.mean(0), y_sd)


def no_scaling(x: Tensor, y: Tensor) -> Scaling:
    """Return the identity."""
    return Scaling(
        x.new_zeros(x.shape[1]),
        x.new_ones(x.shape[1]),
        y.new_zeros(y.shape[1:]),
        y.new_ones(y.shape[1:]),
    )
