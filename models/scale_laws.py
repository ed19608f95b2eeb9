"""Laws of a variance: the mixing laws of scale mixtures.

Every law here is that of sigma^2, the variance that multiplies a Gram matrix; :class:`HalfCauchy`
is stated, as usual, for the standard deviation sigma and pushed forward. Any other torch or Pyro
distribution on the positive reals may be used through :func:`as_scale_law`.

Densities are computed from log sigma^2, so that heavy tails neither overflow nor lose digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions
import torch
import torch.distributions as td
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints, kl_divergence, register_kl

from probkit import distributions as D
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register
from probkit.numerics import lgamma_difference, log_gamma_kernel

__all__ = [
    "BurrXII",
    "Gamma",
    "HalfCauchy",
    "InverseGamma",
    "LogNormal",
    "OtherLaw",
    "PointMass",
    "ScaleLaw",
    "as_scale_law",
]

Number = Tensor | float


class ScaleLaw(TorchDistribution):
    """A law of the variance sigma^2 > 0; its parameters may carry batch dims [*batch].

    Subclasses give the density of u = log sigma^2 and the distribution function. Python numbers
    become float64 tensors; tensors keep their dtype and device.
    """

    support = constraints.positive
    has_rsample = True
    symbols: dict[str, str] = {}

    def _set(self, validate_args: bool | None, **parameters: Number) -> None:
        """Store broadcast parameters, checked by their constraints."""
        given = [p for p in parameters.values() if isinstance(p, Tensor)]
        dtype = given[0].dtype if given and given[0].is_floating_point() else torch.float64
        device = given[0].device if given else None
        tensors = [
            p
            if isinstance(p, Tensor) and p.is_floating_point()
            else torch.as_tensor(p, dtype=dtype, device=device)
            for p in parameters.values()
        ]
        if validate_args is not False:
            for name, value in zip(parameters, tensors, strict=True):
                self._check_parameter(name, value)
        try:
            full = torch.broadcast_tensors(*tensors)
        except RuntimeError as error:
            shapes = ", ".join(
                f"{n} {tuple(t.shape)}" for n, t in zip(parameters, tensors, strict=True)
            )
            raise ShapeError(
                f"{type(self).__name__}: expected parameters of one batch shape, got {shapes}"
            ) from error
        for name, value in zip(parameters, full, strict=True):
            setattr(self, name, value)
        super().__init__(full[0].shape, torch.Size(), validate_args=False)

    def _check_parameter(self, name: str, value: Tensor) -> None:
        constraint = self.arg_constraints[name]
        bad = ~(constraint.check(value) & torch.isfinite(value))
        if bool(bad.any()):
            symbol = f" ({self.symbols[name]})" if name in self.symbols else ""
            want = "> 0" if constraint is constraints.positive else "finite"
            raise DataError(
                f"{type(self).__name__}: {name}{symbol} must be {want}, "
                f"got {float(value.detach()[bad].flatten()[0]):g}"
            )

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScaleLaw:
        """Return the law with batch shape ``batch_shape``."""
        names = self.arg_constraints
        arguments = {name: getattr(self, name).expand(torch.Size(batch_shape)) for name in names}
        return type(self)(**arguments, validate_args=False)

    def log_prob_of_log(self, u: Tensor) -> Tensor:
        """Log density of u = log sigma^2 at ``u`` [*sample, *batch]."""
        raise CapabilityError(f"{type(self).__name__} gives no density")

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of sigma^2 at ``value`` [*sample, *batch]."""
        u = torch.log(value)
        return self.log_prob_of_log(u) - u

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw by inverting the distribution function, differentiably, from the global stream."""
        shape = self._extended_shape(torch.Size(sample_shape))
        like: Tensor = getattr(self, next(iter(self.arg_constraints)))
        q = torch.rand(shape, dtype=like.dtype, device=like.device)
        return D.icdf(self, q.clamp_min(torch.finfo(q.dtype).eps / 4))


# --------------------------------------------------------------------------- named laws


class InverseGamma(ScaleLaw):
    """Inverse gamma law of sigma^2; the mixture is a Student-t process with df = 2 alpha.

    Density beta^alpha / Gamma(alpha) x^(-alpha-1) exp(-beta / x).

    Args:
        concentration: alpha > 0 [*batch].
        rate: beta > 0 [*batch].

    Raises:
        DataError: a parameter is not positive.

    Example:
        >>> InverseGamma(3.0, 4.0).mean
        tensor(2., dtype=torch.float64)
    """

    arg_constraints = {"concentration": constraints.positive, "rate": constraints.positive}
    symbols = {"concentration": "alpha", "rate": "beta"}
    concentration: Tensor
    rate: Tensor

    def __init__(
        self, concentration: Number, rate: Number, validate_args: bool | None = None
    ) -> None:
        self._set(validate_args, concentration=concentration, rate=rate)

    def log_prob_of_log(self, u: Tensor) -> Tensor:
        """Log density of log sigma^2."""
        return log_gamma_kernel(self.concentration, torch.log(self.rate) - u)

    def cdf(self, value: Tensor) -> Tensor:
        """P(sigma^2 <= value)."""
        return torch.special.gammaincc(self.concentration, self.rate / value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of sigma^2."""
        base = td.InverseGamma(self.concentration, self.rate, validate_args=False)
        return D.icdf(base, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw rate / Gamma(alpha, 1), differentiably, from the global stream."""
        a = self.concentration.expand(self._extended_shape(torch.Size(sample_shape)))
        z = torch._standard_gamma(a.contiguous())
        return self.rate / z.clamp_min(torch.finfo(z.dtype).tiny)

    @property
    def mean(self) -> Tensor:
        """Mean beta / (alpha - 1); infinite where alpha <= 1."""
        a = self.concentration
        return torch.where(a > 1, self.rate / torch.where(a > 1, a - 1, 1.0), torch.inf)

    @property
    def mode(self) -> Tensor:
        """Mode beta / (alpha + 1)."""
        return self.rate / (self.concentration + 1)

    @property
    def variance(self) -> Tensor:
        """Variance mean^2 / (alpha - 2); infinite where alpha <= 2."""
        a = self.concentration
        # Harmless denominators where the variance is infinite: no NaN in the backward pass.
        finite = (self.rate / torch.where(a > 2, a - 1, 1.0)).square()
        return torch.where(a > 2, finite / torch.where(a > 2, a - 2, 1.0), torch.inf)

    def entropy(self) -> Tensor:
        """Differential entropy [*batch]."""
        a = self.concentration
        return a + torch.log(self.rate) + torch.lgamma(a) - (1 + a) * torch.digamma(a)


class Gamma(ScaleLaw):
    """Gamma law of sigma^2.

    Args:
        concentration: Shape > 0 [*batch].
        rate: Rate > 0 [*batch].

    Raises:
        DataError: a parameter is not positive.

    Example:
        >>> Gamma(3.0, 4.0).mean
        tensor(0.7500, dtype=torch.float64)
    """

    arg_constraints = {"concentration": constraints.positive, "rate": constraints.positive}
    symbols = {"concentration": "alpha", "rate": "beta"}
    concentration: Tensor
    rate: Tensor

    def __init__(
        self, concentration: Number, rate: Number, validate_args: bool | None = None
    ) -> None:
        self._set(validate_args, concentration=concentration, rate=rate)

    def log_prob_of_log(self, u: Tensor) -> Tensor:
        """Log density of log sigma^2."""
        return log_gamma_kernel(self.concentration, torch.log(self.rate) + u)

    def cdf(self, value: Tensor) -> Tensor:
        """P(sigma^2 <= value)."""
        return torch.special.gammainc(self.concentration, self.rate * value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of sigma^2."""
        return D.icdf(td.Gamma(self.concentration, self.rate, validate_args=False), value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw differentiably from the global stream."""
        a = self.concentration.expand(self._extended_shape(torch.Size(sample_shape)))
        z = torch._standard_gamma(a.contiguous())
        return z.clamp_min(torch.finfo(z.dtype).tiny) / self.rate

    @property
    def mean(self) -> Tensor:
        """Mean concentration / rate."""
        return self.concentration / self.rate

    @property
    def variance(self) -> Tensor:
        """Variance concentration / rate^2."""
        return self.concentration / self.rate.square()


class LogNormal(ScaleLaw):
    """Log-normal law of sigma^2: log sigma^2 ~ Normal(loc, scale).

    Args:
        loc: Mean of log sigma^2 [*batch].
        scale: Standard deviation of log sigma^2 > 0 [*batch].

    Raises:
        DataError: ``scale`` is not positive or ``loc`` not finite.

    Example:
        >>> LogNormal(0.0, 1.0).cdf(torch.ones(()).double()).item()
        0.5
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Number, scale: Number, validate_args: bool | None = None) -> None:
        self._set(validate_args, loc=loc, scale=scale)

    def log_prob_of_log(self, u: Tensor) -> Tensor:
        """Log density of log sigma^2."""
        z = (u - self.loc) / self.scale
        return -0.5 * z.square() - torch.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def cdf(self, value: Tensor) -> Tensor:
        """P(sigma^2 <= value)."""
        return torch.special.ndtr((torch.log(value) - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of sigma^2."""
        return (self.loc + self.scale * torch.special.ndtri(value)).exp()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw differentiably from the global stream."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return (self.loc + self.scale * noise).exp()

    @property
    def mean(self) -> Tensor:
        """Mean exp(loc + scale^2 / 2)."""
        return (self.loc + 0.5 * self.scale.square()).exp()

    @property
    def variance(self) -> Tensor:
        """Variance mean^2 (exp(scale^2) - 1)."""
        return self.mean.square() * torch.expm1(self.scale.square())


class BurrXII(ScaleLaw):
    """Burr type XII law of sigma^2, heavy-tailed with tail index c d.

    Distribution function 1 - (1 + (x / scale)^c)^(-d).

    Args:
        c: First shape > 0 [*batch].
        d: Second shape > 0 [*batch].
        scale: Scale > 0 [*batch].

    Raises:
        DataError: a parameter is not positive.

    Example:
        >>> round(BurrXII(2.0, 1.0).mean.item(), 9) == round(math.pi / 2, 9)
        True
    """

    arg_constraints = {
        "c": constraints.positive,
        "d": constraints.positive,
        "scale": constraints.positive,
    }
    c: Tensor
    d: Tensor
    scale: Tensor

    def __init__(
        self, c: Number, d: Number, scale: Number = 1.0, validate_args: bool | None = None
    ) -> None:
        self._set(validate_args, c=c, d=d, scale=scale)

    def _log_power(self, log_value: Tensor) -> Tensor:
        return self.c * (log_value - torch.log(self.scale))

    def log_prob_of_log(self, u: Tensor) -> Tensor:
        """Log density of log sigma^2."""
        power = self._log_power(u)
        return torch.log(self.c * self.d) + power - (self.d + 1) * _softplus(power)

    def cdf(self, value: Tensor) -> Tensor:
        """P(sigma^2 <= value)."""
        return -torch.expm1(-self.d * _softplus(self._log_power(torch.log(value))))

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of sigma^2."""
        return self.scale * torch.expm1(-torch.log1p(-value) / self.d) ** (1 / self.c)

    def _moment(self, k: int) -> Tensor:
        """E[sigma^(2k)] = scale^k d B(d - k/c, 1 + k/c), infinite where c d <= k."""
        exists = self.c * self.d > k
        rest = torch.where(exists, self.d - k / self.c, 1.0)
        log_beta = torch.lgamma(1 + k / self.c) - lgamma_difference(rest, 1 + k / self.c)
        return torch.where(exists, self.scale**k * self.d * log_beta.exp(), torch.inf)

    @property
    def mean(self) -> Tensor:
        """Mean; infinite where c d <= 1."""
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        """Variance; infinite where c d <= 2."""
        second = self._moment(2)
        first = torch.where(torch.isfinite(second), self._moment(1), 0.0)
        return second - first.square()


class HalfCauchy(ScaleLaw):
    """Law of sigma^2 when the standard deviation sigma is half-Cauchy.

    With x = sigma^2 the density is 1 / (pi scale sqrt(x) (1 + x / scale^2)), the half-Cauchy
    density of sqrt(x) times the Jacobian 1 / (2 sqrt(x)). Mean and variance are infinite.

    Args:
        scale: Scale (median) of sigma > 0 [*batch].

    Raises:
        DataError: ``scale`` is not positive.

    Example:
        >>> round(HalfCauchy(3.0).cdf(torch.tensor(9.0).double()).item(), 12)
        0.5
    """

    arg_constraints = {"scale": constraints.positive}
    scale: Tensor

    def __init__(self, scale: Number, validate_args: bool | None = None) -> None:
        self._set(validate_args, scale=scale)

    def log_prob_of_log(self, u: Tensor) -> Tensor:
        """Log density of log sigma^2."""
        v = u - 2 * torch.log(self.scale)
        return 0.5 * v - _softplus(v) - math.log(math.pi)

    def cdf(self, value: Tensor) -> Tensor:
        """P(sigma^2 <= value)."""
        return 2 / math.pi * torch.atan(value.sqrt() / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of sigma^2."""
        # tan(pi/2) is finite in floating point; the largest quantile is infinite.
        quantile = (self.scale * torch.tan(0.5 * math.pi * value)).square()
        return torch.where(value >= 1, torch.inf, quantile)

    @property
    def mean(self) -> Tensor:
        """Infinite."""
        return torch.full_like(self.scale, torch.inf)

    @property
    def variance(self) -> Tensor:
        """Infinite."""
        return torch.full_like(self.scale, torch.inf)


class PointMass(ScaleLaw):
    """All mass on one variance: the mixture is the plain Gaussian process.

    ``log_prob`` is the log probability of the point, not a density.

    Args:
        value: The variance > 0 [*batch].

    Raises:
        DataError: ``value`` is not positive.

    Example:
        >>> PointMass(2.0).mean
        tensor(2., dtype=torch.float64)
    """

    arg_constraints = {"value": constraints.positive}
    value: Tensor

    def __init__(self, value: Number = 1.0, validate_args: bool | None = None) -> None:
        self._set(validate_args, value=value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero at the point, minus infinity elsewhere."""
        zero = torch.zeros((), dtype=self.value.dtype, device=self.value.device)
        return torch.where(value == self.value, zero, -torch.inf)

    def cdf(self, value: Tensor) -> Tensor:
        """Step at the point."""
        return (value >= self.value).to(self.value.dtype)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the point at any level."""
        return self.value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Repeat the point."""
        return self.value.expand(self._extended_shape(torch.Size(sample_shape)))

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.value

    @property
    def variance(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.value)


class OtherLaw(ScaleLaw):
    """Any torch or Pyro distribution on positive reals, read as the law of sigma^2.

    Made by :func:`as_scale_law`, which checks the support.

    Args:
        base: The distribution; [*batch] without event dims.

    Example:
        >>> law = OtherLaw(td.Weibull(torch.tensor(2.0).double(), 1.5))
        >>> law.batch_shape
        torch.Size([])
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: Distribution, validate_args: bool | None = None) -> None:
        self.base = base
        self.has_rsample = base.has_rsample
        Distribution.__init__(self, base.batch_shape, torch.Size(), validate_args=False)

    @property
    def bounds(self) -> tuple[Number, Number]:
        """Ends of the support in sigma^2."""
        return D.support_bounds(self.base)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OtherLaw:
        """Return the law with batch shape ``batch_shape``."""
        return OtherLaw(self.base.expand(torch.Size(batch_shape)))

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> OtherLaw:
        """Apply ``change`` to the leading batch dims of the base law's parameters."""
        return OtherLaw(D.map_batch(self.base, change))

    def log_prob_of_log(self, u: Tensor) -> Tensor:
        """Log density of log sigma^2."""
        return self.log_prob(u.exp()) + u

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of sigma^2; minus infinity outside the support."""
        lower, upper = (torch.as_tensor(b, dtype=value.dtype) for b in self.bounds)
        info = torch.finfo(value.dtype)
        # Torch laws refuse points outside their support, and 0 or inf at its ends.
        low = torch.clamp(lower * (1 + 4 * info.eps), min=info.tiny).to(value.device)
        high = torch.clamp(upper * (1 - 4 * info.eps), max=info.max).to(value.device)
        inside = torch.minimum(torch.maximum(value, low), high)
        outside = (value < low) & (lower.to(value.device) > 0) | (value > high)
        return torch.where(outside, -torch.inf, self.base.log_prob(inside))

    def cdf(self, value: Tensor) -> Tensor:
        """P(sigma^2 <= value)."""
        return D.cdf(self.base, value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of sigma^2."""
        return D.icdf(self.base, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw differentiably from the global stream."""
        return self.base.rsample(torch.Size(sample_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from the global stream."""
        return self.base.sample(torch.Size(sample_shape))

    @property
    def mean(self) -> Tensor:
        """Mean of the base law."""
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        """Variance of the base law."""
        return self.base.variance


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp x) without the threshold that costs torch's own softplus its last digits."""
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))


# --------------------------------------------------------------------------- conversion


def as_scale_law(law: Distribution) -> ScaleLaw:
    """Return ``law`` as a law of the variance sigma^2.

    Torch's and Pyro's inverse gamma, gamma, log-normal and point mass become the classes of this
    module (and so get closed forms). A half-Cauchy, of whichever package, is that of sigma. All
    others are taken as laws of sigma^2.

    Args:
        law: A distribution [*batch] on positive reals.

    Returns:
        The law of sigma^2, with the same batch shape.

    Raises:
        DataError: ``law`` is no distribution, is not one-dimensional, is discrete, or its support
            reaches below zero.

    Example:
        >>> as_scale_law(td.InverseGamma(torch.tensor(2.0), 1.0)).__class__.__name__
        'InverseGamma'
    """
    if isinstance(law, ScaleLaw):
        return law
    if not isinstance(law, Distribution):
        raise DataError(
            f"a scale law must be a distribution on positive reals, got {type(law).__name__}; "
            "use PointMass(v) for a fixed variance"
        )
    if isinstance(law, td.InverseGamma | pyro.distributions.InverseGamma):
        return InverseGamma(law.concentration, law.rate)
    if isinstance(law, td.Gamma):
        return Gamma(law.concentration, law.rate)
    if isinstance(law, td.LogNormal):
        return LogNormal(law.loc, law.scale)
    if isinstance(law, td.HalfCauchy):
        return HalfCauchy(law.scale)
    if isinstance(law, pyro.distributions.Delta) and len(law.event_shape) == 0:
        return PointMass(law.v)
    if len(law.event_shape) > 0:
        raise DataError(
            f"a scale law must be one-dimensional, got {type(law).__name__} with event shape "
            f"{tuple(law.event_shape)}; put independent scales in the batch shape"
        )
    try:
        lower, _ = D.support_bounds(law)
    except CapabilityError as error:
        raise DataError(f"a scale law must have a density on positive reals: {error}") from error
    if bool((torch.as_tensor(lower) < 0).any()):
        raise DataError(
            f"a scale law must have positive support, got {type(law).__name__} on {law.support}; "
            "use a law of the variance such as InverseGamma, LogNormal or HalfCauchy"
        )
    return OtherLaw(law)


@register_kl(InverseGamma, InverseGamma)
def _kl_inverse_gamma(p: InverseGamma, q: InverseGamma) -> Tensor:
    """KL(IG(a, b) || IG(alpha, beta)), equal to that of the reciprocals' gamma laws."""
    a, b, alpha, beta = p.concentration, p.rate, q.concentration, q.rate
    return (
        (a - alpha) * torch.digamma(a)
        - torch.lgamma(a)
        + torch.lgamma(alpha)
        + alpha * (torch.log(b) - torch.log(beta))
        + a * (beta - b) / b
    )


@register_kl(Gamma, Gamma)
def _kl_gamma(p: Gamma, q: Gamma) -> Tensor:
    return kl_divergence(
        InverseGamma(p.concentration, p.rate, validate_args=False),
        InverseGamma(q.concentration, q.rate, validate_args=False),
    )


@register_kl(LogNormal, LogNormal)
def _kl_log_normal(p: LogNormal, q: LogNormal) -> Tensor:
    return kl_divergence(
        td.Normal(p.loc, p.scale, validate_args=False),
        td.Normal(q.loc, q.scale, validate_args=False),
    )


def _register_laws() -> None:
    for cls in (InverseGamma, Gamma, LogNormal, BurrXII, HalfCauchy, PointMass):
        register(
            cls,
            f"scale.{cls.__name__}",
            D.constructor_arguments,
            lambda tree, cls=cls: cls(**tree),  # type: ignore[misc]
        )
    register(OtherLaw, "scale.OtherLaw", lambda law: {"base": law.base}, lambda t: OtherLaw(**t))


_register_laws()
