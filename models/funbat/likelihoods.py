"""Labels and counts: likelihoods with a quadratic bound, so that a sweep never lowers the ELBO.

Under q the function f is a sum of products of Gaussians. An exponential rate would have an infinite
expectation under it, so counts take the softplus link, whose curvature is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution
from torch.nn.functional import logsigmoid, softplus

from probkit.errors import DataError
from probkit.files import storable
from probkit.model import Site, Values
from probkit.models.funbat.counts import MixedPoisson, normal_nodes, unit_softplus
from probkit.rng import scope
from probkit.tree import Tree

__all__ = ["BernoulliNoise", "PoissonNoise"]


class _NoUnknowns:
    """What likelihoods without parameters of their own share."""

    @property
    def standardise(self) -> bool:
        """Whether y may be shifted and scaled: not here."""
        return False

    def sites(self, y: Tensor) -> Mapping[str, Site]:
        """No site."""
        return {}

    def marginals(self, state: Tree) -> Mapping[str, Distribution]:
        """No factor."""
        return {}

    def log_prior(self, values: Values) -> Tensor:
        """Zero."""
        like = next(iter(values.values()), torch.zeros((), dtype=torch.float64))
        return like.new_zeros(())

    def sample_prior(self, n: int, *, rng: torch.Generator) -> Values:
        """Draw nothing."""
        return {}


@storable
@dataclass(frozen=True)
class BernoulliNoise(_NoUnknowns):
    """Labels 0 and 1: P(y = 1) = sigmoid(f + offset).

    The bound is that of Jaakkola and Jordan (2000, "Bayesian parameter estimation via variational
    methods", equation 9), which Polya-Gamma augmentation (Polson, Scott and Windle 2013) gives as
    well: with c^2 = E[(f + offset)^2] the expected variable is tanh(c / 2) / (2 c).

    Args:
        offset: Log odds where f = 0; those of the base rate, say.

    Example:
        >>> noise = BernoulliNoise()
        >>> state = noise.start(torch.tensor([0.0, 1.0], dtype=torch.float64), copies=1)
        >>> noise.quadratic(state, torch.tensor([0.0, 1.0], dtype=torch.float64))[1].tolist()
        [[-0.5, 0.5]]
    """

    offset: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.offset, int | float) or not math.isfinite(self.offset):
            raise DataError(f"BernoulliNoise: expected a finite offset, got {self.offset!r}")

    def check(self, y: Tensor) -> None:
        """Refuse values other than 0 and 1."""
        bad = (y != 0) & (y != 1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise DataError(
                f"BernoulliNoise: expected labels 0 and 1, got {y[row].item():g} in row {row}"
            )

    def start(self, y: Tensor, copies: int) -> Tree:
        """Expected Polya-Gamma variables as at f = 0."""
        c = y.new_full((copies, len(y)), abs(self.offset))
        return {"weight": _polya_gamma_mean(c)}

    def quadratic(self, state: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        """Precision E[omega], linear y - 1/2 - E[omega] offset."""
        weight = state["weight"]
        return weight, y - 0.5 - weight * self.offset

    def absorb(
        self, state: Tree, y: Tensor, mean: Tensor, second: Tensor, *, hold: bool
    ) -> tuple[Tree, Tensor]:
        """Tighten the bound at the present moments."""
        shifted = mean + self.offset
        c = (shifted.square() + (second - mean.square()).clamp_min(0)).sqrt()
        # -log(2 cosh(c / 2)) = log sigmoid(c) - c / 2
        bound = ((y - 0.5) * shifted + logsigmoid(c) - c / 2).sum(-1)
        return {"weight": _polya_gamma_mean(c)}, bound

    def law(self, state: Tree, mean: Tensor, variance: Tensor) -> Distribution:
        """Bernoulli with the expected probability, by Gauss-Hermite quadrature."""
        nodes, weights = normal_nodes(mean)
        f = mean.unsqueeze(-1) + variance.clamp_min(0).sqrt().unsqueeze(-1) * nodes
        probs = (torch.sigmoid(f + self.offset) @ weights).clamp(0, 1)
        return Bernoulli(probs=probs, validate_args=False)

    def log_likelihood(self, y: Tensor, f: Tensor, values: Values) -> Tensor:
        """Log probability [*batch, entry]."""
        return logsigmoid((2 * y - 1) * (f + self.offset))

    def sample(self, f: Tensor, values: Values, *, rng: torch.Generator) -> Tensor:
        """Draw y [*batch, entry]."""
        uniform = torch.rand(f.shape, generator=rng, dtype=f.dtype, device=f.device)
        return (uniform < torch.sigmoid(f + self.offset)).to(f.dtype)


def _polya_gamma_mean(c: Tensor) -> Tensor:
    """E[omega] of PG(1, c), tanh(c / 2) / (2 c); 1/4 at c = 0."""
    safe = c.clamp_min(1e-4)
    return torch.where(c > 1e-4, torch.tanh(safe / 2) / (2 * safe), 0.25 - c.square() / 48)


@storable
@dataclass(frozen=True)
class PoissonNoise(_NoUnknowns):
    """Counts: y ~ Poisson(level softplus(f + b)), with b such that the rate is ``level`` at f = 0.

    Above its level the rate grows linearly in f, far below it falls exponentially. The negative log
    likelihood is convex with bounded curvature, so that its tangent parabola at E[f] bounds it
    (Seeger and Bouchard 2012, "Fast variational Bayesian inference for non-conjugate matrix
    factorization models", section 3); the curvature is the smallest that serves each count.

    Args:
        level: Rate where f = 0; the mean count, say.

    Example:
        >>> noise = PoissonNoise(level=3.0)
        >>> one = torch.zeros(1, 1, dtype=torch.float64)
        >>> round(noise.law({}, one, one).mean.item(), 6)
        3.0
    """

    level: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.level, int | float) or not 0 < self.level < math.inf:
            raise DataError(f"PoissonNoise: expected a finite level > 0, got {self.level!r}")

    def check(self, y: Tensor) -> None:
        """Refuse values other than 0, 1, 2, ...."""
        bad = (y < 0) | (y != y.round())
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise DataError(
                f"PoissonNoise: expected counts 0, 1, 2, ..., got {y[row].item():g} in row {row}"
            )

    def start(self, y: Tensor, copies: int) -> Tree:
        """Tangents at f = 0."""
        curvature = self._largest_curvature(y).expand(copies, -1)
        return {"curvature": curvature.clone(), "point": torch.zeros_like(curvature)}

    def quadratic(self, state: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        """The parabola that touches the log likelihood at the tangent points."""
        point, curvature = state["point"], state["curvature"]
        link, slope = unit_softplus(point)
        return curvature, curvature * point + slope * (y / link - self.level)

    def absorb(
        self, state: Tree, y: Tensor, mean: Tensor, second: Tensor, *, hold: bool
    ) -> tuple[Tree, Tensor]:
        """Move the tangent points to E[f], where the bound is tightest."""
        variance = (second - mean.square()).clamp_min(0)
        bound = self.log_likelihood(y, mean, {}) - state["curvature"] * variance / 2
        return {**state, "point": mean}, bound.sum(-1)

    def law(self, state: Tree, mean: Tensor, variance: Tensor) -> Distribution:
        """Poisson whose log rate varies with f."""
        level = torch.full_like(mean, self.level)
        return MixedPoisson(mean, variance.clamp_min(0).sqrt(), level)

    def log_likelihood(self, y: Tensor, f: Tensor, values: Values) -> Tensor:
        """Log probability [*batch, entry]."""
        rate = self.level * unit_softplus(f)[0]
        return torch.xlogy(y, rate) - rate - torch.lgamma(y + 1)

    def sample(self, f: Tensor, values: Values, *, rng: torch.Generator) -> Tensor:
        """Draw y [*batch, entry]."""
        with scope(rng=rng):
            return torch.poisson(self.level * unit_softplus(f)[0])

    def _largest_curvature(self, y: Tensor) -> Tensor:
        """Supremum over f of minus the second derivative of log p(y | f) [entry]."""
        counts, place = y.unique(return_inverse=True)
        g = torch.linspace(-15.0, 15.0, 3001, dtype=y.dtype, device=y.device)
        link, slope = softplus(g), torch.sigmoid(g)
        second = slope * (1 - slope)
        per_count = (slope.square() - second * link) / link.square()
        largest = (self.level * second + counts.unsqueeze(-1) * per_count).amax(-1)
        # The grid is within 2e-6 of the maximum.
        return (largest * (1 + 1e-5))[place]
