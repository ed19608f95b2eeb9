"""A scalar health indicator from many sensors, learned on units that ran to failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable

__all__ = ["HealthIndicator"]


@storable
@dataclass(frozen=True)
class HealthIndicator:
    """A linear map of standardised sensors that falls from about 1 (new) to 0 (failed).

    Attributes:
        mean: [sensor] means over all training cycles.
        sd: [sensor] standard deviations; 1 for the sensors that are left out.
        weights: [1 + sensor] intercept and coefficients; 0 for sensors that never change.

    Example:
        >>> cycles = torch.arange(50.0).double()
        >>> sensors = torch.stack([cycles, 0 * cycles], 1)
        >>> indicator = HealthIndicator.fit([sensors], cap=49)
        >>> [round(h, 3) for h in indicator(sensors)[[0, -1]].tolist()]
        [1.0, 0.0]
    """

    mean: Tensor
    sd: Tensor
    weights: Tensor

    @classmethod
    def fit(
        cls,
        sensors: Sequence[Any],
        *,
        target: Literal["linear", "exponential"] = "linear",
        cap: float = 125.0,
        ridge: float = 1e-6,
    ) -> HealthIndicator:
        """Regress a health target on the sensors of all units.

        With r_t cycles left, "linear" takes min(r_t, cap) / cap: damage shows only in the last
        ``cap`` cycles. "exponential" takes 1 - 0.05^(r_t / (0.95 T)) (Ramasso 2014, "Investigating
        computational geometry for failure prognostics"), which knows the whole life T.

        Args:
            sensors: One array [cycle, sensor] for each unit, the last row at failure.
            target: Which target.
            cap: Cycles before failure at which health starts to fall ("linear").
            ridge: Ridge penalty on standardised coefficients, relative to the number of cycles.

        Raises:
            DataError: Values are not finite, or no sensor ever changes.
        """
        units = [_sensors(one, f"unit {n}") for n, one in enumerate(sensors)]
        if not units:
            raise DataError("HealthIndicator: expected at least one unit, got none")
        widths = {one.shape[1] for one in units}
        if len(widths) > 1:
            raise ShapeError(f"HealthIndicator: expected equal sensors, got {sorted(widths)}")
        rows = torch.cat(units)
        mean, sd = rows.mean(0), rows.std(0)
        live = sd > 1e-9 * mean.abs().clamp_min(1.0)
        if not bool(live.any()):
            raise DataError("HealthIndicator: every sensor is constant; nothing shows the damage")
        sd = torch.where(live, sd, 1.0)
        x = torch.where(live, (rows - mean) / sd, 0.0)
        x = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        health = torch.cat([_target(len(one), target, cap) for one in units]).to(x)
        penalty = ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        penalty[0, 0] = 0.0
        gram = x.mT @ x + penalty
        dead = torch.cat([torch.zeros(1, dtype=torch.bool), ~live])
        gram[dead, dead] = 1.0
        weights = torch.linalg.solve(gram, x.mT @ health)
        return cls(mean, sd, torch.where(dead, 0.0, weights))

    def __call__(self, sensors: Any) -> Tensor:
        """Return the indicator [cycle] of one unit's sensors [cycle, sensor]."""
        rows = _sensors(sensors, "sensors")
        if rows.shape[1] != len(self.mean):
            raise ShapeError(
                f"HealthIndicator: expected [cycle, sensor={len(self.mean)}], got "
                f"{tuple(rows.shape)}"
            )
        return self.weights[0] + ((rows - self.mean) / self.sd) @ self.weights[1:]


def _target(cycles: int, kind: str, cap: float) -> Tensor:
    """Health [cycle] of a unit that lived ``cycles`` cycles."""
    left = torch.arange(cycles - 1, -1, -1, dtype=torch.float64)
    if kind == "linear":
        return left.clamp_max(cap) / cap
    if kind == "exponential":
        return 1.0 - 0.05 ** (left / (0.95 * cycles))
    raise DataError(f"target: expected 'linear' or 'exponential', got {kind!r}")


def _sensors(value: Any, name: str) -> Tensor:
    rows = as_tensor(value, name=name).double()
    if rows.ndim != 2 or len(rows) == 0:
        raise ShapeError(f"{name}: expected [cycle, sensor], got {tuple(rows.shape)}")
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        t, s = bad[0].tolist()
        raise DataError(f"{name}: expected finite sensors, got {rows[t, s]} at [{t}, {s}]")
    return rows
