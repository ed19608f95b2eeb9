"""Is an observed curve one that the prior over learning curves can explain?

Each observed value is predicted from at least four fifths of what came before it: prefixes of 0, 1,
2, ..., 8, 10, 12, 15, ... values predict the values up to a quarter further. Where the prior holds,
the probability u = P(y_t <= observed | prefix) is uniform, whatever the prefix; the smaller of u
and 1 - u, times two and times the number of values (Bonferroni), is a p-value of the whole curve.
The number of forward passes grows with the logarithm of the length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import NumericsWarning
from probkit.models.pfn.bars import BarDistribution
from probkit.models.pfn.curves import Curves

__all__ = ["OutOfPriorWarning", "PriorCheck", "check_prior", "falling"]

LEVEL = 1e-3  # curves with smaller p-values are surprising


class OutOfPriorWarning(NumericsWarning):
    """Curves that the prior cannot explain, so that predictions of them are not calibrated."""


@dataclass(frozen=True)
class PriorCheck:
    """Score of the observed part of curves.

    Attributes:
        p_value: [curve] of the hypothesis that the prior made the curve; 1 of an empty curve.
        log_score: [curve] mean log density (nats a value) of the values predicted, on the
            network's scale.
        surprising: [curve] whether the p-value is below one in a thousand.
    """

    p_value: Tensor
    log_score: Tensor
    surprising: Tensor


@torch.no_grad()
def check_prior(law: Callable[[Curves, Tensor], BarDistribution], curves: Curves) -> PriorCheck:
    """Score the observed part of curves under the prior.

    Args:
        law: Returns the law of the normalised metric, given curves and steps [curve, step].
        curves: The curves.
    """
    n = len(curves)
    smallest = torch.ones(n, dtype=torch.float64, device=curves.device)
    total = torch.zeros_like(smallest)
    prefix = 0
    while prefix < curves.t.shape[1]:
        rows = (curves.lengths > prefix).nonzero().squeeze(1)
        following = max(prefix + 1, prefix * 5 // 4)
        stop = min(following, curves.t.shape[1])
        part = curves[rows]
        observed = part._with(
            part.t[:, :prefix], part.y[:, :prefix], part.lengths.clamp_max(prefix), part.normalizer
        )
        valid = part.valid[:, prefix:stop]
        steps = torch.where(valid, part.t[:, prefix:stop], float(curves.horizon)).double()
        y = part.normalized[:, prefix:stop].to(torch.float32)
        bars = law(observed, steps)
        y = y.to(bars.borders.device)
        u = bars.cdf(y).double().to(curves.device)
        tail = torch.where(valid, 2 * torch.minimum(u, 1 - u), 1.0).amin(1)
        score = torch.where(valid, bars.log_prob(y).double().to(curves.device), 0.0).sum(1)
        smallest[rows] = torch.minimum(smallest[rows], tail)
        total[rows] += score
        prefix = following
    count = curves.lengths.clamp_min(1)
    p_value = (smallest * count).clamp_max(1.0)
    return PriorCheck(p_value, total / count, p_value < LEVEL)


def falling(curves: Curves) -> Tensor:
    """Return [curve] whether a curve of five or more values gets worse from end to end.

    The mean of the last third is worse than that of the first third by more than the spread of
    both, on the scale where larger is better.
    """
    y, valid = curves.normalized, curves.valid
    lengths = curves.lengths[:, None]
    place = torch.arange(y.shape[1], device=y.device)
    third = (lengths / 3).ceil()
    start, end = valid & (place < third), valid & (place >= lengths - third)

    def mean_and_spread(mask: Tensor) -> tuple[Tensor, Tensor]:
        count = mask.sum(1).clamp_min(1)
        mean = torch.where(mask, y, 0.0).sum(1) / count
        spread = torch.where(mask, y - mean[:, None], 0.0).square().sum(1) / count
        return mean, spread.sqrt()

    (first, first_sd), (last, last_sd) = mean_and_spread(start), mean_and_spread(end)
    return (curves.lengths >= 5) & (first - last > first_sd + last_sd + 0.02)
