"""Means and variances of a window of the warm-up, pooled over the chains that can be trusted."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "pooled", "trusted"]


class Moments(NamedTuple):
    """Running moments of each chain (Welford 1962).

    Attributes:
        positions: Number of positions.
        mean: [chain, D].
        scatter: Sums of squared deviations [chain, D], or of outer products [chain, D, D].
        energy: Mean potential [chain].
    """

    positions: int
    mean: Tensor
    scatter: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, position: Tensor, dense: bool) -> Moments:
        """Return the moments of nothing, for positions [chain, D]."""
        chains, size = position.shape
        scatter = position.new_zeros((chains, size, size) if dense else (chains, size))
        return cls(0, torch.zeros_like(position), scatter, position.new_zeros(chains))

    def add(self, position: Tensor, energy: Tensor) -> Moments:
        """Add one position [chain, D] and its potential [chain] for every chain."""
        count = self.positions + 1
        before = position - self.mean
        mean = self.mean + before / count
        after = position - mean
        if self.scatter.ndim == 3:
            scatter = torch.baddbmm(self.scatter, before[:, :, None], after[:, None, :])
        else:
            scatter = torch.addcmul(self.scatter, before, after)
        return Moments(count, mean, scatter, self.energy + (energy - self.energy) / count)


def trusted(moments: Moments) -> Tensor:
    """Tell which chains [chain] may speak for the posterior's scale.

    A chain that is stuck far from the others, or still on its way, has a far higher mean potential;
    in its own units the potential of a chain at rest varies by sqrt(D / 2). Chains that never moved
    have nothing to say either. With fewer than three chains nobody is outvoted.
    """
    chains, size = moments.mean.shape
    moved = moments.scatter.reshape(chains, -1).abs().amax(-1) > 0
    if chains < 3:
        return moved
    middle = moments.energy.median()
    spread = 1.4826 * (moments.energy - middle).abs().median()
    near = moments.energy <= middle + 5.0 * (spread + math.sqrt(size / 2.0))
    return moved & near


def pooled(moments: Moments) -> Tensor | None:
    """Return the variances [D] or covariance [D, D] of the trusted chains together.

    Deviations are taken from the mean of all trusted chains, so that windows too short for the
    chains to travel far do not understate the scale. Shrunk, as in Stan, towards 1e-3 with the
    weight of five positions. None where no chain can be trusted.
    """
    keep = trusted(moments)
    chains = int(keep.sum())
    total = chains * moments.positions
    if chains == 0 or total < 2:
        return None
    mean, scatter = moments.mean[keep], moments.scatter[keep].sum(0)
    apart = mean - mean.mean(0)
    if scatter.ndim == 2:
        scatter = scatter + moments.positions * apart.T @ apart
        target = 1e-3 * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
    else:
        scatter = scatter + moments.positions * apart.square().sum(0)
        target = torch.full_like(scatter, 1e-3)
    share = total / (total + 5.0)
    variance = share * scatter / (total - 1) + (1.0 - share) * target
    return 0.5 * (variance + variance.T) if variance.ndim == 2 else variance
