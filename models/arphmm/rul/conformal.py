"""Conformal calibration of predicted lives on units that were held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.rng import Rng, draw_count, stream

__all__ = ["CalibratedLife", "ConformalLife"]

_FEW = 20  # calibration units below which a 90 % interval has no finite-sample guarantee


@storable
@dataclass(frozen=True)
class ConformalLife:
    """Recalibration by probability integral transforms of held-out units.

    If F is the predicted cdf and u_(1) < ... < u_(n) are the values F_i(life_i) of n exchangeable
    units that were not fitted to, the recalibrated cdf is G(F(.)), G the line through
    (0, 0), (u_(i), i / (n + 1)), (1, 1): between its knots this is the conformal predictive
    distribution (Vovk, Gammerman, Shafer 2005; Chernozhukov, Wuthrich and Zhu 2021 for PITs).
    Intervals between knots cover a new exchangeable unit with exactly their nominal probability,
    whatever F was.

    Attributes:
        knots: Sorted transforms [unit].
    """

    knots: Tensor

    @classmethod
    def fit(cls, predicted: Any, lives: Any) -> ConformalLife:
        """Take transforms of held-out units.

        Args:
            predicted: A predictive over [unit].
            lives: What happened [unit], capped as the predictive's target is.

        Raises:
            ShapeError: The two do not fit together.
            DataError: There are fewer than 20 units.
        """
        life = as_tensor(lives, name="lives").to(torch.float64)
        u = predicted.cdf(life).double()
        if u.shape != life.shape or u.ndim != 1:
            raise ShapeError(
                f"ConformalLife: expected lives [unit] as predicted, got {tuple(life.shape)} "
                f"against {tuple(u.shape)}"
            )
        if len(u) < _FEW:
            raise DataError(
                f"ConformalLife: expected at least {_FEW} held-out units (fewer cannot vouch for "
                f"a 90 % interval), got {len(u)}"
            )
        return cls(u.sort().values)

    def __call__(self, predicted: Any) -> CalibratedLife:
        """Recalibrate a predictive over [unit]."""
        return CalibratedLife(predicted, self.knots)


@dataclass(frozen=True)
class CalibratedLife:
    """A recalibrated predictive of lives, which are never negative.

    Attributes:
        base: The predictive before calibration.
        knots: Sorted transforms of the calibration units.
        dims: As the base has them.
        coords: As the base has them.
    """

    base: Any
    knots: Tensor
    dims: tuple[str, ...] = ()
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def _line(self) -> tuple[Tensor, Tensor]:
        """The points (transform, level) that the recalibration joins."""
        n = len(self.knots)
        ends = self.knots.new_tensor([0.0, 1.0])
        x = torch.cat([ends[:1], self.knots, ends[1:]])
        return x, torch.linspace(0.0, 1.0, n + 2, dtype=x.dtype, device=x.device)

    def cdf(self, y: Tensor | float) -> Tensor:
        """P(life <= y)."""
        transform, level = self._line()
        value = torch.as_tensor(y, dtype=transform.dtype)
        found = _interpolate(self.base.cdf(value).to(transform), transform, level)
        return torch.where(value < 0, 0.0, found)

    def quantile(self, q: Tensor | float | Sequence[float]) -> Tensor:
        """Quantiles [*q, *obs], at least zero."""
        transform, level = self._line()
        wanted = torch.as_tensor(q, dtype=transform.dtype)
        eps = 1e-9  # the base may have unbounded support
        inner = _interpolate(wanted, level, transform).clamp(eps, 1 - eps)
        found: Tensor = self.base.quantile(inner)
        return found.clamp_min(0.0)

    @property
    def mean(self) -> Tensor:
        """Mean [*obs], the average of 199 equally spaced quantiles."""
        return self.quantile(_grid()).mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance [*obs], from the same quantiles."""
        return self.quantile(_grid()).var(0, correction=0)

    @property
    def probs(self) -> Tensor:
        """Not offered: lives are numbers."""
        raise DataError("probs exist for categorical predictives only; use cdf")

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density [*obs]: that of the base times the slope of the recalibration."""
        transform, level = self._line()
        place = torch.searchsorted(transform, self.base.cdf(y).to(transform).contiguous())
        place = place.clamp(1, len(transform) - 1)
        rise = level[place] - level[place - 1]
        run = (transform[place] - transform[place - 1]).clamp_min(1e-12)
        density: Tensor = self.base.log_prob(y)
        return density + (rise / run).log()

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Draw [n, *obs], by inversion."""
        shape = (draw_count(n), *self.base.mean.shape)
        generator = stream(rng, "life")
        level = torch.rand(shape, generator=generator, dtype=self.knots.dtype)
        transform, grid = self._line()
        inner = _interpolate(level, grid, transform).clamp(1e-9, 1 - 1e-9)
        return torch.stack([_diagonal(self.base, row) for row in inner]).clamp_min(0.0)


def _diagonal(predicted: Any, levels: Tensor) -> Tensor:
    """Quantile of each entry [*obs] at its own level [*obs]."""
    found: Tensor = predicted.quantile(levels.flatten())
    flat = found.reshape(levels.numel(), -1)
    return flat.diagonal().reshape(levels.shape)


def _grid() -> Tensor:
    return (torch.arange(199, dtype=torch.float64) + 0.5) / 199


def _interpolate(x: Tensor, xp: Tensor, fp: Tensor) -> Tensor:
    """Piecewise linear interpolation at ``x`` of increasing points."""
    place = torch.searchsorted(xp, x.contiguous()).clamp(1, len(xp) - 1)
    run = (xp[place] - xp[place - 1]).clamp_min(1e-300)
    share = ((x - xp[place - 1]) / run).clamp(0.0, 1.0)
    return fp[place - 1] + share * (fp[place] - fp[place - 1])
