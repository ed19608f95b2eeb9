"""From laws of class scores to probabilities of labels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from probkit import distributions as D
from probkit.errors import CapabilityError
from probkit.predictive import Analytic, Mixture, Predictive

__all__ = ["LabelLaw", "largest_score", "mean_log_softmax"]

_REACH, _POINTS = 9.0, 91  # trapezoid rule for the largest score, a fifth of its sd apart
_LEVELS = 32  # quantile midpoints for a shared scale
_CHUNK = 2**22


class LabelLaw(Categorical):
    """Categorical law of labels; mean and variance are those of the label as a number.

    Example:
        >>> law = LabelLaw(probs=torch.tensor([0.25, 0.75]))
        >>> law.mean.item(), law.variance.item()
        (0.75, 0.1875)
    """

    @property
    def mean(self) -> Tensor:
        """Mean label number."""
        return self.probs @ self._numbers()

    @property
    def variance(self) -> Tensor:
        """Variance of the label number."""
        return self.probs @ self._numbers().square() - self.mean.square()

    def _numbers(self) -> Tensor:
        return torch.arange(self.probs.shape[-1]).to(self.probs)


def mean_log_softmax(draws: Iterable[Tensor]) -> Tensor:
    """Return the log of the mean probabilities [row, class] of scores [draw, row, class].

    Args:
        draws: Parts along the draws.

    Example:
        >>> mean_log_softmax([torch.zeros(5, 1, 2)]).exp()
        tensor([[0.5000, 0.5000]])
    """
    total: Tensor | None = None
    count = 0
    for part in draws:
        term = torch.log_softmax(part, -1).logsumexp(0)
        total = term if total is None else torch.logaddexp(total, term)
        count += len(part)
    assert total is not None
    return total - np.log(count)


def largest_score(scores: Predictive) -> Tensor:
    """Return the probability of each class [*obs, class] to have the largest score.

    Given the shared scale s the scores of the classes are independent normals, so that

        P(c is largest | s) = int phi((t - m_c) / s) prod_{k != c} Phi((t - m_k) / s) dt / s,

    by the trapezoid rule; a Student-t law is mixed over midpoints of the quantiles of its
    chi-squared scale, which all classes share.

    Args:
        scores: Predictive of the scores [*obs, class], of one scale for all classes: normal,
            Student-t, or a mixture of normals with one component for each value of the scale.

    Raises:
        CapabilityError: The predictive is of another kind.

    Example:
        >>> law = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
        >>> largest_score(Analytic(law)).tolist()
        [0.5, 0.5]
    """
    if isinstance(scores, Mixture):
        weights = scores.log_weights.exp()
        parts = D.flatten_batch(scores.dist, 1)
        return _mixed(parts, weights)
    if isinstance(scores, Analytic):
        return _mixed(D.map_batch(scores.dist, lambda v: v[None]), None)
    raise CapabilityError(f"expected scores in closed form, got {type(scores).__name__}")


def _mixed(law: Distribution, weights: Tensor | None) -> Tensor:
    """Average over components [component, *obs, class], equal weights where there are none."""
    if isinstance(law, D.StudentT):
        levels = (torch.arange(_LEVELS, dtype=law.loc.dtype) + 0.5) / _LEVELS
        # df is one number for each component; torch has no quantiles of the chi-squared law.
        df = law.df.reshape(len(law.df), -1)[:, 0]
        half = torch.distributions.Gamma(0.5 * df, torch.full_like(df, 0.5), validate_args=False)
        chi = D.icdf(half, levels.to(df.device)[:, None].expand(-1, len(df)))  # [level, component]
        stretch = (df / chi).sqrt().reshape(_LEVELS, *law.loc.shape[:1], *[1] * (law.loc.ndim - 1))
        loc = law.loc.expand(_LEVELS, *law.loc.shape)
        probability = _largest_normal(loc, law.scale * stretch).mean(0)
    elif isinstance(law, torch.distributions.Normal):
        probability = _largest_normal(law.loc, law.scale)
    else:
        raise CapabilityError(
            f"expected normal or Student-t scores, got {type(law).__name__}; use the rng form"
        )
    if weights is None:
        return probability.mean(0)
    return torch.tensordot(weights.to(probability), probability, dims=1)


def _largest_normal(loc: Tensor, scale: Tensor) -> Tensor:
    """Return P(largest) [*, class] for independent normals of one scale, in parts."""
    shape = loc.shape
    loc, scale = loc.reshape(-1, shape[-1]), scale.expand(shape).reshape(-1, shape[-1])[:, :1]
    size = max(1, _CHUNK // (_POINTS * shape[-1]))
    parts = [_largest_of(m, s) for m, s in zip(loc.split(size), scale.split(size), strict=True)]
    result = torch.cat(parts)
    return (result / result.sum(-1, keepdim=True)).reshape(shape)


def _largest_of(loc: Tensor, scale: Tensor) -> Tensor:
    """Integrate over the value t of the largest score; below its best mean by 9 it never lies."""
    best = loc.max(-1, keepdim=True).values
    grid = torch.linspace(-_REACH, _REACH, _POINTS, dtype=loc.dtype, device=loc.device)
    z = grid - ((loc - best) / scale)[..., None]  # (t - m_c) / s, [row, class, point]
    below = torch.special.log_ndtr(z)
    total = below.sum(-2, keepdim=True) - below - 0.5 * z.square()
    return total.exp().sum(-1)
