"""The posterior of one learning curve by tempered sequential Monte Carlo: to polish and to check.

The network approximates the posterior predictive of :class:`CurvePrior`; here the thirteen
parameters of one curve are sampled instead. It takes a thousand times longer, and it is not exact
either: low-noise curves have thin posteriors, so several independent runs are made and their spread
is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from probkit import distributions as D
from probkit.driver import infer
from probkit.errors import DataError
from probkit.models.pfn.bars import BarDistribution, borders_from_sample
from probkit.models.pfn.curve_predictive import CurvePredictive
from probkit.models.pfn.curve_prior import CurvePrior, mean_curve
from probkit.models.pfn.curves import GRID, Curves
from probkit.posterior import Posterior
from probkit.rng import Rng, stream

__all__ = ["PolishedCurve", "curve_posterior", "polish", "sampled_scores"]


_BORDER_SAMPLE = 40_000  # numbers that the borders of polished bars are chosen from


@dataclass(frozen=True)
class PolishedCurve:
    """A curve extrapolated by sampling its parameters.

    Attributes:
        predictive: Laws of the metric, as the network gives them.
        posterior: Draws [run, particle, *site] of the parameters, on the prior's scale.
        spread: [step] standard deviation over the runs of the predicted mean, on the prior's scale
            from 0 to 1; NaN of a single run.
    """

    predictive: CurvePredictive
    posterior: Posterior
    spread: Tensor


def curve_posterior(
    t: Tensor,
    y: Tensor,
    *,
    n: int = 2000,
    moves: int = 9,
    last_moves: int = 45,
    runs: int = 3,
    rng: Rng,
    dtype: torch.dtype = torch.float64,
) -> Posterior:
    """Sample the parameters of one curve given its observed part.

    Args:
        t: [step] steps on the prior's grid 1, ..., 100.
        y: [step] values on the prior's scale.
        n: Particles of a run.
        moves: Metropolis-Hastings steps at each temperature.
        last_moves: Steps at temperature 1.
        runs: Independent runs.
        rng: Seed or generator.
        dtype: Precision.

    Returns:
        Draws [run, particle, *site], and an estimate of the log evidence of each run.
    """
    from probkit.inference import SMC

    sampler = SMC(n, moves=moves, last_moves=last_moves, kernel="differential_evolution")
    data = (t.to(dtype), y.to(dtype))
    return infer(CurvePrior(dtype=dtype), data, sampler, rng=rng, chains=runs)


def sampled_scores(post: Posterior, t: Tensor, y: Tensor) -> Tensor:
    """Return [run, step] the log predictive density log mean_s N(y_t; f_s(t), sigma_s).

    Args:
        post: What :func:`curve_posterior` returned.
        t: [step] future steps.
        y: [step] values there.
    """
    law = _components(post, t)
    scores = law.log_prob(y.to(law.loc))
    return scores.logsumexp(1) - math.log(scores.shape[1])


@torch.no_grad()
def polish(
    curves: Curves,
    x: Any = None,
    *,
    n: int = 2000,
    runs: int = 3,
    bars: int = 1000,
    rng: Rng,
) -> PolishedCurve:
    """Extrapolate one curve by sampling its parameters, in the form that the network predicts.

    The mixture over particles is written as bars of its own, finer than the network's.

    Args:
        curves: One curve, observed in part.
        x: [step] future steps; None takes all up to the horizon.
        n: Particles of a run.
        runs: Independent runs, pooled.
        bars: Resolution of the laws.
        rng: Seed or generator.

    Raises:
        DataError: There is more than one curve, or no step is left.

    Example:
        >>> from probkit.models.pfn import CurveNormalizer, Curves
        >>> seen = Curves(None, [0.31, 0.42, 0.49, 0.54], CurveNormalizer.accuracy(), horizon=20)
        >>> fine = polish(seen, torch.tensor([10.0, 20.0]), n=200, runs=2, rng=0)
        >>> fine.predictive.median.shape, fine.spread.shape
        (torch.Size([2]), torch.Size([2]))
    """
    if len(curves) != 1:
        raise DataError(f"polish: expected one curve, got {len(curves)}; take curves[k]")
    last = float(curves.last)
    steps = torch.arange(last + 1, curves.horizon + 1) if x is None else torch.as_tensor(x)
    steps = steps.to(torch.float64)
    if not steps.numel() or bool((steps <= last).any()) or bool((steps > curves.horizon).any()):
        raise DataError(
            f"polish: expected steps after the last observed one ({last:g}) and up to "
            f"horizon={curves.horizon}"
        )
    count = int(curves.lengths)
    post = curve_posterior(
        curves.grid_t[0, :count], curves.normalized[0, :count], n=n, runs=runs, rng=rng
    )
    law = _components(post, (steps / curves.every).clamp(1, GRID))
    repeats = -(-_BORDER_SAMPLE // law.loc.numel())
    noise = torch.randn(
        (repeats, *law.loc.shape), generator=stream(rng, "bars"), dtype=law.loc.dtype
    )
    borders = borders_from_sample(law.loc + law.scale * noise, bars, floor=0.05)
    flat = Normal(law.loc.flatten(0, 1), law.scale.flatten(0, 1), validate_args=False)
    equal = torch.full((flat.loc.shape[0],), -math.log(flat.loc.shape[0]), dtype=flat.loc.dtype)
    inner = borders[1:-1].to(flat.loc)
    below = torch.stack([D.mixture_cdf(flat, equal, border) for border in inner], -1)
    edge = torch.zeros_like(below[:, :1])
    mass = torch.cat([edge, below, edge + 1], 1).diff(dim=1).clamp_min(1e-30)
    bars_law = BarDistribution(borders, mass.log()[None], validate_args=False)
    predictive = CurvePredictive(
        bars_law, curves.normalizer, steps[None], curves.single, curves.dtype
    )
    return PolishedCurve(predictive, post, law.loc.mean(1).std(0))


def _components(post: Posterior, t: Tensor) -> Normal:
    """The normal law of each particle at steps ``t``, [run, particle, step]."""
    values = post.draws
    at = t.to(values["weight"])
    scale = values["log_noise"].exp().unsqueeze(-1)
    loc = mean_curve(values, at)
    return Normal(loc, scale.expand_as(loc), validate_args=False)
