"""Pest control: a sequence of pesticides for a chain of stations."""

from __future__ import annotations

import numpy as np

from probkit.bo.outcomes import Outcomes
from probkit.bo.parameters import Categorical
from probkit.bo.problems.base import Problem
from probkit.bo.space import Params, Space
from probkit.errors import DataError

__all__ = ["PestControl"]

_SIMULATIONS = 100
_LIMIT = 0.1
_START = (1.0, 30.0)  # Beta laws, by their two parameters.
_SPREAD = (1.0, 17.0 / 3.0)
_STRENGTH = np.array([2.0, 3.0, 3.0, 5.0]) / 7.0
_TOLERANCE = np.array([1.0, 2.5, 2.0, 0.5]) / 7.0
_PRICE = np.array([1.0, 0.8, 0.7, 0.5])
_DISCOUNT = np.array([0.2, 0.3, 0.3, 0.0])
_SEED = 1


class PestControl(Problem):
    """Which of four pesticides, if any, to use at each stage; minimise the cost.

    Oh, Tomczak, Gavves and Welling, "Combinatorial Bayesian optimization using the graph Cartesian
    product", NeurIPS 2019. The share of infested products grows by a random rate at stages without
    treatment, and shrinks by one that falls as pests grow used to a pesticide. The cost is what the
    pesticides cost, less a discount for buying much of one, and the number of stages at which more
    than a tenth is infested, averaged over 100 simulations with the same random numbers throughout.

    Args:
        stages: Number of stages.

    Example:
        >>> problem = PestControl()
        >>> round(problem({f"stage_{k}": 3 for k in range(25)})["cost"], 2)
        12.28
    """

    def __init__(self, stages: int = 25) -> None:
        if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
            raise DataError(f"stages: expected a whole number >= 1, got {stages!r}")
        self.stages = stages
        self.space = Space({f"stage_{k}": Categorical([0, 1, 2, 3, 4]) for k in range(stages)})
        self.outcomes = Outcomes({"cost": "min"})

    def evaluate(self, params: Params) -> dict[str, float]:
        """Simulate the plan."""
        plan = np.array([int(params[f"stage_{k}"]) for k in range(self.stages)])
        infested = _beta(*_START)
        strength = _STRENGTH.copy()
        exceeded, paid = 0.0, 0.0
        for action in plan:
            exceeded += float((infested > _LIMIT).mean())
            if action == 0:
                infested = infested + _beta(*_SPREAD) * (1.0 - infested)
                continue
            kind = action - 1
            infested = (1.0 - _beta(1.0, strength[kind])) * infested
            strength[kind] += _TOLERANCE[kind] / self.stages
            share = float((plan == action).sum()) / self.stages
            paid += float(_PRICE[kind] * (1.0 - _DISCOUNT[kind] * share))
        return {"cost": paid + exceeded}


def _beta(first: float, second: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Draw one number for each simulation; the same uniform numbers at every call."""
    return np.random.RandomState(_SEED).beta(first, second, size=_SIMULATIONS)
