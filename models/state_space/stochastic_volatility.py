"""The stochastic-volatility model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.models.state_space.base import StateSpaceModel
from probkit.models.state_space.normals import standard_normal
from probkit.numerics import check_finite

__all__ = ["StochasticVolatility"]

_LOG_2PI = math.log(2 * math.pi)


@storable
@dataclass(frozen=True)
class StochasticVolatility(StateSpaceModel):
    """x_t = a x_(t-1) + s e_t, y_t = b exp(x_t / 2) u_t, e and u standard normal (Taylor 1982).

    x_0 has the stationary law N(0, s^2 / (1 - a^2)). Data: returns y [step], NaN where missing.

    Args:
        persistence: a, between -1 and 1.
        volatility: s, standard deviation of the steps of the log variance.
        scale: b, standard deviation of a return at x = 0.
        prior: Laws of the unknown parameters, by field name.

    Example:
        >>> states, y = StochasticVolatility(0.95, 0.3).simulate_path(4, rng=0)
        >>> y.shape
        torch.Size([1, 4])
    """

    persistence: Tensor | float = 0.95
    volatility: Tensor | float = 0.3
    scale: Tensor | float = 1.0
    prior: Mapping[str, Distribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("persistence", "volatility", "scale"):
            value = as_tensor(getattr(self, name), name=name).double()
            inside = value.abs() < 1 if name == "persistence" else value > 0
            if value.ndim != 0 or not bool(inside):
                raise DataError(
                    "StochasticVolatility: expected numbers -1 < persistence < 1, volatility > 0 "
                    f"and scale > 0, got {name}={getattr(self, name)!r}"
                )
            object.__setattr__(self, name, value)

    def prepare(self, data: Any) -> Tensor:
        """Take y as floats [step]."""
        y = as_tensor(data, name="y")
        y = y if y.is_floating_point() else y.double()
        if y.ndim != 1:
            raise ShapeError(f"StochasticVolatility: expected y [step], got {tuple(y.shape)}")
        check_finite(y.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), "y", ("step",))
        return y

    def _initial_sd(self) -> Tensor:
        a, s = torch.as_tensor(self.persistence), torch.as_tensor(self.volatility)
        return s / (1 - a.square()).sqrt()

    def sample_initial(self, n: int, *, like: Tensor, rng: torch.Generator) -> Tensor:
        """Draw x_0 [n] from the stationary law."""
        noise = standard_normal((n,), rng=rng, dtype=like.dtype, device=like.device)
        return noise * self._initial_sd().to(like)

    def sample_next(self, old: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw x_(t+1) [n]."""
        noise = standard_normal(old.shape, rng=rng, dtype=old.dtype, device=old.device)
        return self.persistence * old + self.volatility * noise

    def sample_observation(self, state: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw y_t [n]."""
        noise = standard_normal(state.shape, rng=rng, dtype=state.dtype, device=state.device)
        return self.scale * (0.5 * state).exp() * noise

    def log_initial(self, new: Tensor) -> Tensor:
        """Return log p(x_0) [n]."""
        return _log_normal(new, self._initial_sd())

    def log_next(self, old: Tensor, new: Tensor) -> Tensor:
        """Return log N(x_(t+1); a x_t, s^2) [n]."""
        return _log_normal(new - self.persistence * old, torch.as_tensor(self.volatility))

    def log_observation(self, y: Tensor, state: Tensor) -> Tensor:
        """Return log N(y_t; 0, b^2 exp(x_t)) [n]; zero where y_t is missing."""
        if bool(torch.isnan(y)):
            return torch.zeros_like(state)
        log_sd = torch.as_tensor(self.scale).log() + 0.5 * state
        return -0.5 * (y * (-log_sd).exp()).square() - log_sd - 0.5 * _LOG_2PI

    def log_transition_bound(self, t: int, data: Tensor) -> Tensor:
        """Return the largest log transition density of step ``t``."""
        sd = self._initial_sd() if t == 0 else torch.as_tensor(self.volatility)
        return -sd.log() - 0.5 * _LOG_2PI


def _log_normal(difference: Tensor, sd: Tensor) -> Tensor:
    return -0.5 * (difference / sd).square() - sd.log() - 0.5 * _LOG_2PI
