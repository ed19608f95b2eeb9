"""Path lengths of HMC: jitter, and adaptation over all chains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.hmc.leapfrog import Phase
from probkit.inference.hmc.metric import Metric

__all__ = ["PathLength", "halton"]

_RATE, _BETA2, _TINY = 0.025, 0.95, 1e-12
_MOST_CHANGE = 0.35
_INERTIA = 20.0
_MOST_SLOPE = 20.0  # In units of the median over chains.


def halton(index: int) -> float:
    """Return entry ``index`` >= 0 of the base-2 Halton sequence in (0, 1).

    Example:
        >>> [halton(k) for k in range(4)]
        [0.5, 0.25, 0.75, 0.125]
    """
    number, result, weight = index + 1, 0.0, 0.5
    while number:
        result += weight * (number & 1)
        number >>= 1
        weight *= 0.5
    return result


class PathLength(NamedTuple):
    """Stochastic ascent on the expected change of squared distance from the centre.

    The ChEES criterion of Hoffman, Radul and Sountsov (2021), in whitened coordinates, by Adam on
    the logarithm of the longest path. One path length serves all chains.

    Attributes:
        log_length: Log of the current longest path.
        log_average: Log of the averaged longest path, the one to keep.
        square: Adam's running mean of squared gradients.
        updates: Number of updates.
        centre: Running mean [D] of the chains' median positions.
        seen: Number of positions averaged, in transitions.
    """

    log_length: float
    log_average: float
    square: float
    updates: int
    centre: Tensor
    seen: int

    @classmethod
    def start(cls, length: float, position: Tensor) -> PathLength:
        """Begin at a length, with chains at ``position`` [chain, D]."""
        log = math.log(length)
        return cls(log, log, 0.0, 0, position.median(0).values, 1)

    def restart(self, length: float) -> PathLength:
        """Begin again at another length, in new whitened coordinates."""
        log = math.log(length)
        return self._replace(log_length=log, log_average=log, square=0.0, updates=0)

    def update(
        self, metric: Metric, start: Tensor, end: Phase, acceptance: Tensor, jitter: float
    ) -> PathLength:
        """Learn from one transition.

        Args:
            metric: Mass matrix.
            start: Positions [chain, D] before.
            end: Proposals, accepted or not.
            acceptance: Acceptance probabilities [chain] of the proposals.
            jitter: Fraction of the longest path that was taken.
        """
        chains = len(start)
        seen = self.seen + 1
        weight = max(chains / (chains + _INERTIA), 1.0 / seen)
        # The median over chains, and slopes within a bound: a lost chain must not rule the rest.
        centre = self.centre + weight * (start.median(0).values - self.centre)
        before = metric.whiten(start - centre)
        after = metric.whiten(end.point.position - centre)
        gain = after.square().sum(-1) - before.square().sum(-1)
        slope = gain * (after * end.momentum).sum(-1)
        trust = torch.where(torch.isfinite(slope), acceptance, 0.0)
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        bound = _MOST_SLOPE * slope.abs().median()
        slope = slope.clamp(-bound, bound)
        total = float(trust.sum())
        fresh = self._replace(centre=centre, seen=seen)
        if total < 1e-3 * chains:
            return fresh
        mean_slope = float((trust * slope).sum()) / total
        return fresh._climb(jitter * math.exp(self.log_length) * mean_slope)

    def _climb(self, gradient: float) -> PathLength:
        """Take one step of Adam (without momentum) along the gradient by the log length."""
        count = self.updates + 1
        square = _BETA2 * self.square + (1.0 - _BETA2) * gradient**2
        scale = math.sqrt(square / (1.0 - _BETA2**count)) + _TINY
        change = max(-_MOST_CHANGE, min(_MOST_CHANGE, _RATE * gradient / scale))
        log_length = self.log_length + change
        share = count**-0.5
        log_average = share * log_length + (1.0 - share) * self.log_average
        return self._replace(
            log_length=log_length, log_average=log_average, square=square, updates=count
        )
