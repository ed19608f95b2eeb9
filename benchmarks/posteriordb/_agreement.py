"""Means, standard deviations and quantiles of draws against those of reference draws.

Each difference is divided by its Monte Carlo error, that of both sides together. With ESS the
effective sample size of the quantity in question (the reference's draws are independent):

* mean: sd / sqrt(ESS of x);
* standard deviation: sd(u) / (2 sd sqrt(ESS of u)), u = (x - mean)^2, by the delta method;
* quantile at level q: sqrt(q (1 - q) / ESS of [x <= quantile]) / density at the quantile.

Spread and density of the reference are those of our draws, which are equal where the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["LEVELS", "Row", "compare", "statistics"]

#: Name in the reference -> level of the quantile.
LEVELS = {"q05": 0.05, "q50": 0.50, "q95": 0.95}
_HALF_WINDOW = 0.02  # of probability, for the density at a quantile


class Row(NamedTuple):
    """One statistic of one parameter.

    Attributes:
        parameter: Name in the reference.
        statistic: "mean", "sd", "q05", "q50" or "q95".
        value: Ours.
        reference: Theirs.
        error: Standard error of the difference.
    """

    parameter: str
    statistic: str
    value: float
    reference: float
    error: float

    @property
    def z(self) -> float:
        """The difference in standard errors; infinite where it is not a number."""
        z = abs(self.value - self.reference) / self.error if self.error > 0 else math.nan
        return z if math.isfinite(z) else math.inf


def statistics() -> tuple[str, ...]:
    """Return the statistics that are compared."""
    return ("mean", "sd", *LEVELS)


def _ess(draws: Any, method: str = "mean", **options: Any) -> float:
    import arviz

    return float(arviz.ess(draws, method=method, **options))


def compare(draws: Mapping[str, Tensor], reference: Mapping[str, Any]) -> list[Row]:
    """Compare every statistic of every parameter of the reference.

    Args:
        draws: Parameter -> [chain, draw].
        reference: Parameter -> {mean, sd, q05, q50, q95, n}.

    Raises:
        KeyError: A parameter has no draws.
    """
    rows = []
    for name, expected in reference.items():
        x = draws[name].detach().cpu().double().numpy()
        n = float(expected["n"])

        def both(spread: float, ess: float, n: float = n) -> float:
            return spread * math.sqrt(1.0 / ess + 1.0 / n)

        mean, sd = float(x.mean()), float(x.std())
        squares = np.square(x - mean)
        slope = float(squares.std()) / (2.0 * sd)
        found = {
            "mean": (mean, both(sd, _ess(x))),
            "sd": (sd, both(slope, _ess(squares))),
        }
        for statistic, level in LEVELS.items():
            low, value, high = np.quantile(x, [level - _HALF_WINDOW, level, level + _HALF_WINDOW])
            density = 2 * _HALF_WINDOW / float(high - low)
            spread = math.sqrt(level * (1.0 - level)) / density
            found[statistic] = (float(value), both(spread, _ess(x, "quantile", prob=level)))
        rows += [
            Row(name, statistic, value, float(expected[statistic]), error)
            for statistic, (value, error) in found.items()
        ]
    return rows
