"""Units that wear out through hidden stages, seen by several sensors, with known lives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.rng import Rng, stream

__all__ = ["Degradation", "simulate_degradation"]

_LEVELS = (1.0, 0.7, 0.35, 0.0)  # health that each stage is drawn to
_PULL = 0.08  # share of the way to it that is made in a cycle


class Degradation(NamedTuple):
    """Simulated units that ran to failure.

    Attributes:
        sensors: One array [cycle, sensor] for each unit.
        lives: Cycles left [cycle], 0 at the last.
        stages: Hidden stage [cycle], 0 (healthy) to 3 (failing).
        health: Hidden health [cycle].
    """

    sensors: tuple[Tensor, ...]
    lives: tuple[Tensor, ...]
    stages: tuple[Tensor, ...]
    health: tuple[Tensor, ...]


def simulate_degradation(
    units: int,
    *,
    sensors: int = 6,
    noise: float = 0.35,
    stay: tuple[float, ...] = (0.985, 0.97, 0.95),
    rng: Rng,
) -> Degradation:
    """Simulate a left-to-right chain of four stages whose last one ends in failure.

    Health follows h_t = h_(t-1) + 0.08 (level of the stage - h_(t-1)) + small noise, and a unit
    fails when it falls below 0.1. Each sensor is a fixed multiple of health plus noise; the last
    one never changes.

    Args:
        units: Number of units.
        sensors: Number of sensors, at least two.
        noise: Standard deviation of the sensors' noise, in units of the health's range.
        stay: Probability of staying another cycle in each stage but the last.
        rng: Seed or generator.

    Raises:
        DataError: There are no units, or fewer than two sensors.

    Example:
        >>> found = simulate_degradation(2, rng=0)
        >>> [len(x) == len(r) for x, r in zip(found.sensors, found.lives)]
        [True, True]
    """
    if units < 1 or sensors < 2:
        raise DataError(
            f"simulate_degradation: expected units >= 1 and sensors >= 2, got {units}, {sensors}"
        )
    generator = stream(rng, "degradation")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    slopes = normal(sensors).sign() * (0.5 + normal(sensors).abs())
    offsets = 10 * normal(sensors)
    found: tuple[list[Tensor], ...] = ([], [], [], [])
    for _ in range(units):
        stages, health = _one_unit(stay, generator)
        clean = offsets + slopes * health[:, None]
        seen = clean + noise * slopes.abs() * normal(len(health), sensors)
        seen[:, -1] = offsets[-1]
        left = torch.arange(len(health) - 1, -1, -1, dtype=torch.float64)
        for kept, value in zip(found, (seen, left, stages, health), strict=True):
            kept.append(value)
    return Degradation(*(tuple(values) for values in found))


def _one_unit(stay: tuple[float, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stages and health of one unit, up to failure."""
    stage, health = 0, 1.0
    stages: list[int] = []
    values: list[float] = []
    while health > 0.1 or len(values) < 20:
        if stage < len(stay):
            stage += int(float(torch.rand((), generator=generator)) > stay[stage])
        shake = 0.01 * float(torch.randn((), generator=generator))
        health += _PULL * (_LEVELS[stage] - health) + shake
        stages.append(stage)
        values.append(health)
    return torch.tensor(stages), torch.tensor(values, dtype=torch.float64)
