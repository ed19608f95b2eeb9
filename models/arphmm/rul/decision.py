"""When to maintain a unit, given the law of its remaining life and what mistakes cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["MaintenancePlan", "plan_maintenance"]


@dataclass(frozen=True)
class MaintenancePlan:
    """Best times and what they cost.

    Attributes:
        time: Steps from now at which to maintain each unit [unit].
        cost: Expected cost at that time [unit].
        risk: Probability that the unit fails before [unit].
    """

    time: Tensor
    cost: Tensor
    risk: Tensor


def plan_maintenance(
    predicted: Any, *, cost_early: float, cost_late: float, cost_failure: float = 0.0
) -> MaintenancePlan:
    """Choose the time that minimises the expected asymmetric cost.

    Maintaining at time s a unit that would live r steps costs ``cost_early`` (r - s) if s <= r
    (life thrown away), and ``cost_failure + cost_late`` (s - r) if it fails before. Without
    ``cost_failure`` the best time is the quantile at cost_early / (cost_early + cost_late), the
    newsvendor's rule; with it, the minimum is found on the law's own quantiles.

    Args:
        predicted: A predictive of lives over [unit].
        cost_early: Cost of each step of unused life.
        cost_late: Cost of each step after the failure.
        cost_failure: Cost of the failure itself.

    Raises:
        DataError: Costs are negative, or nothing is lost by being early or by being late.

    Example:
        >>> from probkit.predictive import Empirical
        >>> lives = Empirical(torch.arange(1.0, 101.0).double()[:, None])
        >>> plan = plan_maintenance(lives, cost_early=1.0, cost_late=9.0)
        >>> round(float(plan.time[0]))
        11
    """
    costs = (cost_early, cost_late, cost_failure)
    if min(costs) < 0 or cost_early <= 0 or cost_late + cost_failure <= 0:
        raise DataError(
            "plan_maintenance: expected cost_early > 0 and cost_late + cost_failure > 0, none "
            f"negative, got {costs}"
        )
    levels = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
    lives = predicted.quantile(levels)  # [level, unit], equally probable lives
    if cost_failure == 0:
        share = torch.tensor([cost_early / (cost_early + cost_late)], dtype=torch.float64)
        times = predicted.quantile(share)
    else:
        times = torch.cat([torch.zeros_like(lives[:1]), lives])
    late = (times[:, None] - lives[None]).clamp_min(0)
    early = (lives[None] - times[:, None]).clamp_min(0)
    fails = (lives[None] < times[:, None]).to(lives)
    cost = (cost_early * early + cost_late * late + cost_failure * fails).mean(1)
    best = cost.argmin(0, keepdim=True)
    time = times.gather(0, best)[0]
    return MaintenancePlan(time, cost.gather(0, best)[0], predicted.cdf(time))
