"""Prior laws of the sites of a slate model: normal in the unconstrained space, or half normal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    LogNormal,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    constraints,
)
from torch.distributions.constraints import Constraint

from probkit.errors import DataError
from probkit.files import storable

__all__ = ["Law", "SlatePrior"]

Space = Literal["real", "positive", "unit"]

_LOG_2PI = math.log(2 * math.pi)
_SUPPORTS: dict[str, Constraint] = {
    "real": constraints.real,
    "positive": constraints.positive,
    "unit": constraints.unit_interval,
}


@storable
@dataclass(frozen=True)
class SlatePrior:
    """Scales of the priors of :class:`~probkit.models.slates.SlateGRU`.

    Args:
        group_mean: Standard deviation a of the group means.
        group_scale: Scale b of the half-normal law of the spread of items within a group.
        log_group_scale: (mean, standard deviation) of the log spread, for a log-normal law instead.
        item: Standard deviation of item vectors under the flat prior.
        user: Standard deviation c of users' first states.
        no_click: Standard deviation e of the scores of no click.
        weight: Standard deviation rho of the transition weights.
        gamma: (mean, standard deviation) of the linear transition's memory.
        logit_gamma: (mean, standard deviation) of its logit, for a law on (0, 1) instead.
        multiplier: Standard deviation w of the multiplier of item scores, N(1, w^2), whose
            absolute value counts; None for no multiplier.

    Example:
        >>> SlatePrior(user=2.5, log_group_scale=(-1.0, 1.0)).user
        2.5
    """

    group_mean: float = 1.0
    group_scale: float = 1.0
    log_group_scale: tuple[float, float] | None = None
    item: float = 1.0
    user: float = 0.5
    no_click: float = 1.0
    weight: float = 1.0
    gamma: tuple[float, float] = (0.5, 0.3)
    logit_gamma: tuple[float, float] | None = None
    multiplier: float | None = None

    def __post_init__(self) -> None:
        scales = {
            name: getattr(self, name)
            for name in ("group_mean", "group_scale", "item", "user", "no_click", "weight")
        }
        for name in ("log_group_scale", "gamma", "logit_gamma"):
            pair = getattr(self, name)
            if pair is not None:
                if len(pair) != 2 or not math.isfinite(pair[0]):
                    raise DataError(f"SlatePrior: expected {name}=(mean, sd), got {pair!r}")
                object.__setattr__(self, name, (float(pair[0]), float(pair[1])))
                scales[name] = pair[1]
        if self.multiplier is not None:
            scales["multiplier"] = self.multiplier
        for name, scale in scales.items():
            if not 0 < scale < math.inf:
                raise DataError(
                    f"SlatePrior: expected a standard deviation {name} > 0, got {scale}"
                )


@dataclass(frozen=True)
class Law:
    """The prior of one site.

    In the unconstrained space (the logarithm of a positive site, the logit of one on (0, 1)) its
    entries are independent normals; or the site itself is half normal.

    Attributes:
        shape: Shape of the site.
        dims: Names of its dims.
        loc: Means in the unconstrained space, [] or [*shape].
        scale: Standard deviations there; of a half-normal law, its scale.
        space: "real", "positive" or "unit".
        half: Whether the site is half normal.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    loc: Tensor
    scale: Tensor
    space: Space = "real"
    half: bool = False

    @property
    def support(self) -> Constraint:
        """The constraint of the site's values."""
        return _SUPPORTS[self.space]

    def constrain(self, free: Tensor) -> Tensor:
        """Map unconstrained entries to values."""
        if self.space == "positive":
            return free.exp()
        return torch.sigmoid(free) if self.space == "unit" else free

    def free(self, value: Tensor) -> Tensor:
        """Map values to unconstrained entries."""
        if self.space == "positive":
            return value.log()
        return torch.logit(value) if self.space == "unit" else value

    def log_jacobian(self, value: Tensor) -> Tensor:
        """Return log |d value / d free| [*draw] at values [*draw, *shape]."""
        if self.space == "positive":
            return self._sum(value.log())
        if self.space == "unit":
            return self._sum(value.log() + torch.log1p(-value))
        return value.new_zeros(value.shape[: value.ndim - len(self.shape)])

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density [*draw] of values [*draw, *shape]."""
        if self.half:
            standard = value / self.scale
            return self._sum(math.log(2) - 0.5 * (standard.square() + _LOG_2PI) - self.scale.log())
        standard = (self.free(value) - self.loc) / self.scale
        normal = -0.5 * (standard.square() + _LOG_2PI) - self.scale.log()
        return self._sum(normal.expand(value.shape)) - self.log_jacobian(value)

    def _sum(self, terms: Tensor) -> Tensor:
        return terms.sum(tuple(range(-len(self.shape), 0))) if self.shape else terms

    def divergence(self, loc: Tensor, log_scale: Tensor) -> Tensor:
        """Return KL(q || prior) for normals q in the unconstrained space, summed over the site.

        Args:
            loc: Means of q [*shape].
            log_scale: Log standard deviations of q [*shape].
        """
        variance = (2 * log_scale).exp()
        if self.half:  # q is log-normal, E x^2 = exp(2 m + 2 s^2).
            entropy = loc + log_scale + 0.5 * (1 + _LOG_2PI)
            square = (2 * loc + 2 * variance).exp() / self.scale.square()
            return (0.5 * (square + _LOG_2PI) - math.log(2) + self.scale.log() - entropy).sum()
        ratio = variance / self.scale.square()
        shift = ((loc - self.loc) / self.scale).square()
        return 0.5 * (ratio + shift - 1 - ratio.log()).sum()

    def marginal(self, loc: Tensor, scale: Tensor) -> Distribution:
        """Return the law of the site for normals (loc, scale) in the unconstrained space."""
        if self.space == "positive":
            return LogNormal(loc, scale)
        if self.space == "unit":
            return TransformedDistribution(Normal(loc, scale), [SigmoidTransform()])
        return Normal(loc, scale)

    def start(self) -> Tensor:
        """Return the prior's median in the unconstrained space [*shape]."""
        loc = (0.6744898 * self.scale).log() if self.half else self.loc
        return loc.expand(self.shape).clone()
