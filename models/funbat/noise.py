"""How observations scatter around f: what a sweep needs to know of a likelihood.

A sweep replaces the log likelihood by a bound that is quadratic in f,
sum_n (linear_n f_n - precision_n f_n^2 / 2) + const, whose coefficients a likelihood gives from its
own variational factors. It then updates those factors from E[f] and E[f^2].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints
from torch.distributions import Gamma as GammaLaw
from torch.distributions import StudentT as StudentTLaw

from probkit.errors import DataError
from probkit.files import storable
from probkit.model import Site, Values
from probkit.tree import Tree

__all__ = ["GaussianNoise", "Noise", "StudentTNoise"]


class Noise(Protocol):
    """A likelihood of y given f; a frozen, storable dataclass of options.

    Its state is a tree whose tensors have a leading [copy] dim: independent fits side by side.

    Attributes:
        standardise: Whether y may be shifted and scaled before it is fitted.
    """

    @property
    def standardise(self) -> bool:
        """Whether y may be shifted and scaled."""
        return True

    def check(self, y: Tensor) -> None:
        """Refuse values [entry] that the likelihood cannot have."""

    def start(self, y: Tensor, copies: int) -> Tree:
        """Return the state to begin with, for y [entry] on the scale of the fit."""
        ...

    def quadratic(self, state: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return precision [copy, entry or 1] and linear [copy, entry]."""
        ...

    def absorb(
        self, state: Tree, y: Tensor, mean: Tensor, second: Tensor, *, hold: bool
    ) -> tuple[Tree, Tensor]:
        """Update from E[f] and E[f^2] [copy, entry].

        Args:
            state: The state.
            y: Values [entry] on the scale of the fit.
            mean: E[f] [copy, entry].
            second: E[f^2] [copy, entry].
            hold: Keep the scale of the noise where it is (in the first sweeps).

        Returns:
            The new state, and the likelihood's part of the evidence bound [copy]: the expected log
            likelihood less the divergence of the noise's own factors from their prior.
        """
        ...

    def law(self, state: Tree, mean: Tensor, variance: Tensor) -> Distribution:
        """Return the law of a new y where f has these moments [copy, *]."""
        ...

    def sites(self, y: Tensor) -> Mapping[str, Site]:
        """Name the unknowns of the noise."""
        ...

    def marginals(self, state: Tree) -> Mapping[str, Distribution]:
        """Return the variational factors of the sites [copy]."""
        ...

    def log_prior(self, values: Values) -> Tensor:
        """Return the log density of the sites [*batch]."""
        ...

    def log_likelihood(self, y: Tensor, f: Tensor, values: Values) -> Tensor:
        """Return log p(y | f) [*batch, entry], f [*batch, entry]."""
        ...

    def sample_prior(self, n: int, *, rng: torch.Generator) -> Values:
        """Draw the sites [n]."""
        ...

    def sample(self, f: Tensor, values: Values, *, rng: torch.Generator) -> Tensor:
        """Draw y [*batch, entry]."""
        ...


def _positive(owner: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise DataError(f"{owner}: expected a finite {name} > 0, got {value!r}")


_PRECISION = "noise_precision"


class _PrecisionNoise:
    """What the two families with an unknown precision share."""

    shape: float
    rate: float

    @property
    def standardise(self) -> bool:
        """Y may be shifted and scaled."""
        return True

    def check(self, y: Tensor) -> None:
        """Accept every real number."""

    def sites(self, y: Tensor) -> Mapping[str, Site]:
        """The precision."""
        return {_PRECISION: Site((), constraints.positive)}

    def marginals(self, state: Tree) -> Mapping[str, Distribution]:
        """Gamma factors [copy]."""
        return {_PRECISION: GammaLaw(state["shape"], state["rate"], validate_args=False)}

    def _prior(self, like: Tensor) -> GammaLaw:
        return GammaLaw(like.new_tensor(self.shape), like.new_tensor(self.rate))

    def log_prior(self, values: Values) -> Tensor:
        """Log density of the precision [*batch]."""
        prior = GammaLaw(
            values[_PRECISION].new_tensor(self.shape),
            values[_PRECISION].new_tensor(self.rate),
            validate_args=False,
        )
        return prior.log_prob(values[_PRECISION])

    def sample_prior(self, n: int, *, rng: torch.Generator) -> Values:
        """Draw the precision [n]."""
        from probkit.rng import scope

        with scope(rng=rng):
            drawn = self._prior(torch.zeros((), dtype=torch.float64)).sample(torch.Size([n]))
        return {_PRECISION: drawn}

    def _minus_divergence(self, state: Tree) -> Tensor:
        """E[log p(tau)] - E[log q(tau)] [copy]."""
        a, b = state["shape"], state["rate"]
        return -torch.distributions.kl_divergence(
            GammaLaw(a, b, validate_args=False), self._prior(a)
        )


@storable
@dataclass(frozen=True)
class GaussianNoise(_PrecisionNoise):
    """y ~ N(f, 1 / tau), tau ~ Gamma(shape, rate), for standardised y.

    Args:
        shape: Shape of the prior of the precision.
        rate: Its rate. Large values keep the noise from being small: with 1 and N entries, tau
            cannot exceed about N / 2.
    """

    shape: float = 1e-3
    rate: float = 1e-3

    def __post_init__(self) -> None:
        _positive("GaussianNoise", shape=self.shape, rate=self.rate)

    def start(self, y: Tensor, copies: int) -> Tree:
        """E[tau] = 10 / var(y): noise so small that the first sweeps cannot explain all by it."""
        a = y.new_full((copies,), self.shape + len(y) / 2)
        return {"shape": a, "rate": a * y.square().mean().clamp_min(1e-6) / 10}

    def quadratic(self, state: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        """The expected precision, the same for all entries."""
        tau = (state["shape"] / state["rate"]).unsqueeze(-1)
        return tau, tau * y

    def absorb(
        self, state: Tree, y: Tensor, mean: Tensor, second: Tensor, *, hold: bool
    ) -> tuple[Tree, Tensor]:
        """Update the factor of the precision, unless held."""
        # sum E[(y - f)^2]; never below the sum of variances, whatever rounding does.
        residual = ((y - mean).square() + (second - mean.square()).clamp_min(0)).sum(-1)
        if not hold:
            state = {
                "shape": torch.full_like(state["shape"], self.shape + len(y) / 2),
                "rate": self.rate + residual / 2,
            }
        a, b = state["shape"], state["rate"]
        expected_log = torch.digamma(a) - b.log() - math.log(2 * math.pi)
        bound = (len(y) * expected_log - a / b * residual) / 2
        return state, bound + self._minus_divergence(state)

    def law(self, state: Tree, mean: Tensor, variance: Tensor) -> Distribution:
        """Normal, the noise at its expected precision."""
        noise = (state["rate"] / state["shape"]).reshape(-1, *[1] * (mean.ndim - 1))
        return Normal(mean, (variance + noise).sqrt(), validate_args=False)

    def log_likelihood(self, y: Tensor, f: Tensor, values: Values) -> Tensor:
        """Normal log density [*batch, entry]."""
        tau = values[_PRECISION].unsqueeze(-1)
        return (tau.log() - math.log(2 * math.pi) - tau * (y - f).square()) / 2

    def sample(self, f: Tensor, values: Values, *, rng: torch.Generator) -> Tensor:
        """Draw y [*batch, entry]."""
        normal = torch.randn(f.shape, generator=rng, dtype=f.dtype, device=f.device)
        return f + normal * values[_PRECISION].rsqrt().unsqueeze(-1)


@storable
@dataclass(frozen=True)
class StudentTNoise(_PrecisionNoise):
    """y ~ t_df(f, 1 / tau): heavy tails, an outlier counts less the farther out it lies.

    A scale mixture: y ~ N(f, 1 / (tau w)), w ~ Gamma(df / 2, df / 2), with a factor for each w.

    Args:
        df: Degrees of freedom; where to begin if they are learned.
        learn_df: Whether to learn them by the evidence bound.
        shape: Shape of the prior of the precision.
        rate: Its rate.
    """

    df: float = 4.0
    learn_df: bool = True
    shape: float = 1e-3
    rate: float = 1e-3

    def __post_init__(self) -> None:
        _positive("StudentTNoise", df=self.df, shape=self.shape, rate=self.rate)

    def start(self, y: Tensor, copies: int) -> Tree:
        """As with Gaussian noise, all weights one."""
        a = y.new_full((copies,), self.shape + len(y) / 2)
        return {
            "shape": a,
            "rate": a * y.square().mean().clamp_min(1e-6) / 10,
            "df": y.new_full((copies,), self.df),
            "weight": y.new_ones(copies, len(y)),
        }

    def quadratic(self, state: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        """Expected precision times expected weights."""
        precision = (state["shape"] / state["rate"]).unsqueeze(-1) * state["weight"]
        return precision, precision * y

    def absorb(
        self, state: Tree, y: Tensor, mean: Tensor, second: Tensor, *, hold: bool
    ) -> tuple[Tree, Tensor]:
        """Update degrees of freedom and weights; take the bound; update the precision."""
        residual = (y - mean).square() + (second - mean.square()).clamp_min(0)
        a, b = state["shape"], state["rate"]
        tau = (a / b).unsqueeze(-1)
        df = state["df"]
        if self.learn_df and not hold:
            df = _best_df(df, tau * residual)
        half = df.unsqueeze(-1) / 2
        weight = (half + 0.5) / (half + tau * residual / 2)
        expected_log = torch.digamma(a) - b.log() - math.log(2 * math.pi)
        bound = len(y) * expected_log / 2 + _df_terms(df, tau * residual)
        bound = bound + self._minus_divergence(state)
        new = {**state, "df": df, "weight": weight}
        if not hold:
            new["shape"] = torch.full_like(a, self.shape + len(y) / 2)
            new["rate"] = self.rate + (weight * residual).sum(-1) / 2
        return new, bound

    def law(self, state: Tree, mean: Tensor, variance: Tensor) -> Distribution:
        """Student-t whose variance is that of f plus the noise (where both are finite).

        The sum of a normal and a Student-t has no closed form. Far in the tails the noise decides;
        so the degrees of freedom are kept and the squared scales added.
        """
        shape = (-1, *[1] * (mean.ndim - 1))
        noise = (state["rate"] / state["shape"]).reshape(shape)
        df = state["df"].reshape(shape).expand(mean.shape)
        return StudentTLaw(df, mean, (variance + noise).sqrt(), validate_args=False)

    def log_likelihood(self, y: Tensor, f: Tensor, values: Values) -> Tensor:
        """Student-t log density [*batch, entry], at the degrees of freedom given."""
        scale = values[_PRECISION].rsqrt().unsqueeze(-1)
        df = f.new_tensor(self.df)
        return StudentTLaw(df, f, scale, validate_args=False).log_prob(y)

    def sample(self, f: Tensor, values: Values, *, rng: torch.Generator) -> Tensor:
        """Draw y [*batch, entry]."""
        from probkit.rng import scope

        scale = values[_PRECISION].rsqrt().unsqueeze(-1)
        with scope(rng=rng):
            return StudentTLaw(f.new_tensor(self.df), f, scale, validate_args=False).sample()


def _df_terms(df: Tensor, scaled: Tensor) -> Tensor:
    """The part of the bound that depends on df, the weights at their optimum [copy].

    Args:
        df: [copy].
        scaled: E[tau] E[(y - f)^2] [copy, entry].
    """
    half = df / 2
    constant = half * half.log() + torch.lgamma(half + 0.5) - torch.lgamma(half)
    logs = (half.unsqueeze(-1) + scaled / 2).log().sum(-1)
    return scaled.shape[-1] * constant - (half + 0.5) * logs


def _best_df(df: Tensor, scaled: Tensor, steps: int = 12) -> Tensor:
    """Search df along a log scale near the present value; never worse than it [copy]."""
    offsets = torch.linspace(-0.5, 0.5, steps + 1, dtype=df.dtype, device=df.device)
    candidates = (df.unsqueeze(-1) * offsets.exp()).clamp(1.0, 200.0)
    values = torch.stack([_df_terms(one, scaled) for one in candidates.unbind(-1)], -1)
    return candidates.gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1)
