"""Monotone maps of y under which the noise is closer to what the model assumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from probkit.data import as_tensor
from probkit.errors import DataError
from probkit.files import storable
from probkit.predictive import Analytic, Mixture, Predictive
from probkit.rng import Rng

__all__ = ["LogWarp", "Warped"]


@storable
@dataclass(frozen=True)
class LogWarp:
    """z = log(y - lower + margin), for quantities that are bounded below and skewed.

    Args:
        lower: A bound of y; None takes the smallest value in the data of the first fit.
        margin: What is added; None takes 0.3 standard deviations of that data. The smaller it is,
            the more do differences near the bound count.

    Example:
        >>> warp = LogWarp(lower=0.0, margin=1.0)
        >>> z = warp.forward(torch.tensor([0.0, 1.0], dtype=torch.float64))
        >>> [round(v, 6) for v in z.tolist()]
        [0.0, 0.693147]
    """

    lower: float | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.lower is not None and not math.isfinite(self.lower):
            raise DataError(f"LogWarp: expected a finite lower, got {self.lower!r}")
        if self.margin is not None and not 0 < self.margin < math.inf:
            raise DataError(f"LogWarp: expected a finite margin > 0, got {self.margin!r}")

    def fitted(self, y: Tensor) -> LogWarp:
        """Fill in what is not given from y [entry]."""
        lower = float(y.min()) if self.lower is None else self.lower
        margin = self.margin
        if margin is None:
            spread = float(y.std(correction=0))
            margin = 0.3 * spread if spread > 0 else 1.0
        return LogWarp(lower, margin)

    def _numbers(self) -> tuple[float, float]:
        if self.lower is None or self.margin is None:
            raise DataError("LogWarp: lower and margin are open; call fitted(y) first")
        return self.lower, self.margin

    def forward(self, y: Tensor) -> Tensor:
        """Z of y [*].

        Raises:
            DataError: A value at or below ``lower - margin``.
        """
        lower, margin = self._numbers()
        shifted = y - lower + margin
        if bool((shifted <= 0).any()):
            place = int((shifted.flatten() <= 0).nonzero()[0])
            raise DataError(
                f"y must be above {lower - margin:.6g} for LogWarp(lower={lower:.6g}, "
                f"margin={margin:.6g}), got {float(y.flatten()[place]):.6g} at row {place}; give a "
                "smaller lower"
            )
        return shifted.log()

    def inverse(self, z: Tensor) -> Tensor:
        """Y of z [*]."""
        lower, margin = self._numbers()
        return z.exp() + (lower - margin)

    def log_derivative(self, y: Tensor) -> Tensor:
        """Log dz/dy [*]."""
        return -self.forward(y)

    def normal_moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of y where z is normal."""
        lower, margin = self._numbers()
        expected = (mean + variance / 2).exp()
        return expected + (lower - margin), expected.square() * torch.expm1(variance)


@dataclass(frozen=True)
class Warped:
    """The predictive of y = warp^-1(z), for a predictive of z.

    Quantiles map directly: the median of y is the inverse of the median of z.

    Attributes:
        base: The predictive of z, Analytic or Mixture.
        warp: The warp.
    """

    base: Analytic | Mixture
    warp: LogWarp

    @property
    def mean(self) -> Tensor:
        """Mean [*obs]; inf where z has heavy tails: the exponential of a Student-t has none."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Variance [*obs]; inf where z has heavy tails."""
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        dist: Any = self.base.dist
        if not isinstance(dist, Normal):
            infinite = torch.full_like(self.base.quantile(0.5), math.inf)
            return infinite, infinite
        mean, variance = self.warp.normal_moments(dist.mean, dist.variance)
        if isinstance(self.base, Analytic):
            return mean, variance
        weights = self.base.log_weights.exp().reshape(-1, *[1] * (mean.ndim - 1))
        average = (weights * mean).sum(0)
        return average, (weights * (variance + (mean - average).square())).sum(0)

    @property
    def probs(self) -> Tensor:
        """Refuse: y is no class."""
        return self.base.probs

    def quantile(self, q: Tensor | float | Sequence[float]) -> Tensor:
        """Quantiles [*q, *obs] at the levels ``q`` in (0, 1)."""
        return self.warp.inverse(self.base.quantile(q))

    def cdf(self, y: Tensor | float) -> Tensor:
        """P(Y <= y) for each entry; zero below the bound."""
        lower, margin = self.warp._numbers()
        values = as_tensor(y, name="y").double()
        inside = values > lower - margin
        safe = torch.where(inside, values, torch.as_tensor(lower, dtype=values.dtype))
        return torch.where(inside, self.base.cdf(self.warp.forward(safe)), 0.0)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of ``y``; minus infinity below the bound."""
        lower, margin = self.warp._numbers()
        values = as_tensor(y, name="y").double()
        inside = values > lower - margin
        safe = torch.where(inside, values, torch.as_tensor(lower, dtype=values.dtype))
        density = self.base.log_prob(self.warp.forward(safe)) + self.warp.log_derivative(safe)
        return torch.where(inside, density, -math.inf)

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Draw [n, *obs]."""
        return self.warp.inverse(self.base.sample(n, rng=rng))


def warped(base: Analytic | Mixture, warp: LogWarp | None) -> Predictive:
    """Map a predictive back to the scale of y."""
    return base if warp is None else Warped(base, warp)
