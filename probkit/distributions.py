"""Distributions and free functions that torch and Pyro lack for predictive work.

* :class:`StudentT`, :class:`MultivariateStudentT`, :class:`MultiOutputStudentT` and
  :class:`MultiOutputNormal`: joint laws in which one chi-square is shared by all coordinates.
* :func:`cdf`, :func:`icdf`, :func:`marginals` and :func:`sample` for any distribution.
* ``mixture_*``: finite mixtures whose components lie along the leading batch dimension.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import pyro.distributions
import scipy.special
import torch
import torch.distributions as td
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, constraints

from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.numerics import lgamma_difference
from probkit.rng import scope, stream

__all__ = [
    "MultiOutputNormal",
    "MultiOutputStudentT",
    "MultivariateStudentT",
    "StudentT",
    "cdf",
    "find_quantile",
    "icdf",
    "marginals",
    "mixture_cdf",
    "mixture_icdf",
    "mixture_log_prob",
    "mixture_mean",
    "mixture_variance",
    "sample",
    "student_t_cdf",
    "support_bounds",
]


# --------------------------------------------------------------------------- Student-t laws


def _spread_factor(df: Tensor) -> Tensor:
    """Ratio df / (df - 2), infinite (with a warning) where df <= 2."""
    if bool((df <= 2).any()):
        warnings.warn(
            f"the variance of a Student-t law is infinite for df <= 2, got df={float(df.min()):.4g}"
            "; use quantiles, or a scale law with alpha > 1",
            NumericsWarning,
            stacklevel=4,
        )
    return torch.where(df > 2, df / (df - 2).clamp_min(torch.finfo(df.dtype).tiny), torch.inf)


def _student_log_prob(df: Tensor, n: int, squared_distance: Tensor, half_log_det: Tensor) -> Tensor:
    """Log density of an n-dimensional t law from its Mahalanobis distance and log determinant."""
    return (
        lgamma_difference(df / 2, n / 2)
        - 0.5 * n * (torch.log(df) + math.log(math.pi))
        - half_log_det
        - 0.5 * (df + n) * torch.log1p(squared_distance / df)
    )


class StudentT(pyro.distributions.StudentT):  # type: ignore[misc]
    """Student's t law, accurate at any df, with ``cdf`` and ``icdf``.

    Torch's own class loses digits in ``log_prob`` for large df and has neither ``cdf`` nor
    ``icdf``.

    Args:
        df: Degrees of freedom > 0 [*batch].
        loc: Location [*batch].
        scale: Scale > 0 [*batch].

    Example:
        >>> nu = torch.tensor(4.0, dtype=torch.float64)
        >>> round(StudentT(nu).cdf(torch.zeros(()).double()).item(), 6)
        0.5
    """

    @property
    def variance(self) -> Tensor:
        """scale^2 df / (df - 2); infinite, with a NumericsWarning, where df <= 2."""
        return self.scale.square() * _spread_factor(self.df)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, *event]."""
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        return _student_log_prob(self.df, 1, z.square(), torch.log(self.scale))

    def cdf(self, value: Tensor) -> Tensor:
        """Return the distribution function at ``value``."""
        return student_t_cdf(self.df, (value - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile; gradients flow to loc and scale (and to df through the implicit function)."""
        return self.loc + self.scale * _student_t_icdf(self.df, value)


class _MultiOutput(TorchDistribution):  # type: ignore[misc]
    """Shared shapes of laws on [row, output] whose outputs have one row factor in common."""

    support = constraints.independent(constraints.real, 2)
    has_rsample = True
    loc: Tensor
    scale_tril: Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.event_shape[0])

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return int(self.event_shape[1])

    def _half_log_det(self) -> Tensor:
        return self.outputs * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _squared_distance(self, value: Tensor) -> Tensor:
        diff = value - self.loc
        extra = diff.ndim - self.loc.ndim
        # Sample dimensions become right-hand sides, so that the factor is not copied per sample.
        samples = diff.shape[:extra]
        columns = diff.reshape(-1, *self.loc.shape).movedim(0, -1).flatten(-2)
        z = torch.linalg.solve_triangular(self.scale_tril, columns, upper=False)
        squares = z.square().sum(-2).unflatten(-1, (self.outputs, -1)).sum(-2)
        return squares.movedim(-1, 0).reshape(samples + self.batch_shape)

    def _row_variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1, keepdim=True).expand(self.loc.shape)

    def _check_shapes(self, loc: Tensor, scale_tril: Tensor) -> None:
        n = loc.shape[-2] if loc.ndim >= 2 else None
        if loc.ndim < 2 or scale_tril.ndim < 2 or scale_tril.shape[-2:] != (n, n):
            raise ShapeError(
                "expected loc [*batch, row, output] and scale_tril [*batch, row, row], got "
                f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )


class MultiOutputNormal(_MultiOutput):
    """Normal law on [row, output]: independent outputs with one row covariance.

    Args:
        loc: Mean [*batch, row, output].
        scale_tril: Lower factor of the row covariance [*batch, row, row].

    Raises:
        ShapeError: the shapes do not match.

    Example:
        >>> law = MultiOutputNormal(torch.zeros(3, 2), torch.eye(3))
        >>> law.event_shape
        torch.Size([3, 2])
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.lower_cholesky,
    }

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        self._check_shapes(loc, scale_tril)
        batch = torch.broadcast_shapes(loc.shape[:-2], scale_tril.shape[:-2])
        self.loc = loc.expand(batch + loc.shape[-2:])
        self.scale_tril = scale_tril.expand(batch + scale_tril.shape[-2:])
        super().__init__(batch, loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultiOutputNormal:
        """Return the law with batch shape ``batch_shape``."""
        batch = torch.Size(batch_shape)
        loc = self.loc.expand(batch + self.event_shape)
        factor = self.scale_tril.expand(batch + self.scale_tril.shape[-2:])
        return MultiOutputNormal(loc, factor, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean, of the shape of ``loc``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, of the shape of ``loc``."""
        return self._row_variance()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, *event]."""
        if self._validate_args:
            self._validate_sample(value)
        count = self.rows * self.outputs
        constant = 0.5 * count * math.log(2 * math.pi)
        return -0.5 * self._squared_distance(value) - self._half_log_det() - constant

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event] from the global stream, differentiably."""
        return self._draw(torch.Size(sample_shape), None)

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        noise = _randn_like(self.loc, self._extended_shape(shape), generator)
        return self.loc + self.scale_tril @ noise


class MultiOutputStudentT(_MultiOutput):
    """Student-t law on [row, output] with ONE scale shared by all rows and outputs.

    The law of loc + sqrt(df / chi2) scale_tril Z with independent standard normal Z and a single
    chi-square of ``df`` degrees of freedom. Outputs are uncorrelated but not independent.

    Args:
        df: Degrees of freedom > 0 [*batch].
        loc: Location [*batch, row, output].
        scale_tril: Lower factor of the row scale matrix [*batch, row, row].

    Raises:
        ShapeError: the shapes do not match.

    Example:
        >>> law = MultiOutputStudentT(torch.tensor(5.0), torch.zeros(3, 2), torch.eye(3))
        >>> law.sample((4,)).shape
        torch.Size([4, 3, 2])
    """

    arg_constraints = {
        "df": constraints.positive,
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.lower_cholesky,
    }

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor,
        scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self._check_shapes(loc, scale_tril)
        df = torch.as_tensor(df, dtype=loc.dtype, device=loc.device)
        batch = torch.broadcast_shapes(df.shape, loc.shape[:-2], scale_tril.shape[:-2])
        self.df = df.expand(batch)
        self.loc = loc.expand(batch + loc.shape[-2:])
        self.scale_tril = scale_tril.expand(batch + scale_tril.shape[-2:])
        super().__init__(batch, loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultiOutputStudentT:
        """Return the law with batch shape ``batch_shape``."""
        batch = torch.Size(batch_shape)
        loc = self.loc.expand(batch + self.event_shape)
        factor = self.scale_tril.expand(batch + self.scale_tril.shape[-2:])
        return MultiOutputStudentT(self.df.expand(batch), loc, factor, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The location where df > 1, else NaN."""
        return torch.where(self.df[..., None, None] > 1, self.loc, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Marginal variances [*batch, row, output]; infinite, with a warning, where df <= 2."""
        return self._row_variance() * _spread_factor(self.df)[..., None, None]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, *event]."""
        if self._validate_args:
            self._validate_sample(value)
        count = self.rows * self.outputs
        return _student_log_prob(
            self.df, count, self._squared_distance(value), self._half_log_det()
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event] from the global stream, differentiably."""
        return self._draw(torch.Size(sample_shape), None)

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        noise = _randn_like(self.loc, self._extended_shape(shape), generator)
        scale = _inverse_chi(self.df.expand(shape + self.batch_shape), generator)
        return self.loc + scale[..., None, None] * (self.scale_tril @ noise)


class MultivariateStudentT(TorchDistribution):  # type: ignore[misc]
    """Multivariate Student-t law: one chi-square per draw, shared by all coordinates.

    Args:
        df: Degrees of freedom > 0 [*batch].
        loc: Location [*batch, n].
        scale_tril: Lower factor of the scale matrix [*batch, n, n] (the covariance is
            df / (df - 2) times the scale matrix).

    Raises:
        ShapeError: the shapes do not match.

    Example:
        >>> law = MultivariateStudentT(4.0, torch.zeros(2).double(), torch.eye(2).double())
        >>> round(law.log_prob(torch.zeros(2).double()).exp().item() * 2 * math.pi, 9)
        1.0
    """

    arg_constraints = {
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor,
        scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self._one = MultiOutputStudentT(df, loc.unsqueeze(-1), scale_tril, validate_args=False)
        self.df, self.scale_tril = self._one.df, self._one.scale_tril
        self.loc = self._one.loc.squeeze(-1)
        super().__init__(self._one.batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultivariateStudentT:
        """Return the law with batch shape ``batch_shape``."""
        wide = self._one.expand(batch_shape)
        return MultivariateStudentT(
            wide.df, wide.loc.squeeze(-1), wide.scale_tril, validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        """The location where df > 1, else NaN."""
        return self._one.mean.squeeze(-1)

    @property
    def variance(self) -> Tensor:
        """Marginal variances [*batch, n]; infinite, with a NumericsWarning, where df <= 2."""
        return self._one.variance.squeeze(-1)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance [*batch, n, n]; infinite, with a NumericsWarning, where df <= 2."""
        scale_matrix = self.scale_tril @ self.scale_tril.mT
        return scale_matrix * _spread_factor(self.df)[..., None, None]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, *event]."""
        if self._validate_args:
            self._validate_sample(value)
        return self._one.log_prob(value.unsqueeze(-1))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event] from the global stream, differentiably."""
        return self._one.rsample(sample_shape).squeeze(-1)


def _inverse_chi(df: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw sqrt(df / chi2_df), differentiable in df."""
    # _standard_gamma is the only gamma sampler of torch that accepts a generator.
    half = torch._standard_gamma(df / 2, generator=generator)
    return (0.5 * df / half.clamp_min(torch.finfo(df.dtype).tiny)).sqrt()


def _randn_like(like: Tensor, shape: Any, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


# --------------------------------------------------------------------------- Student-t cdf


def _scipy(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """Apply a SciPy ufunc to tensors, on the device and in the dtype of the last one."""
    last = tensors[-1]
    arrays = [t.detach().to("cpu", torch.float64).numpy() for t in tensors]
    return torch.as_tensor(function(*arrays), dtype=last.dtype, device=last.device)


class _StudentTCdf(torch.autograd.Function):
    """F(t; df) with the density as derivative in t and a five-point difference in df."""

    @staticmethod
    def forward(ctx: Any, df: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(df, t)
        return _scipy(scipy.special.stdtr, df, t)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        df, t = ctx.saved_tensors
        grad_df = grad_t = None
        if ctx.needs_input_grad[1]:
            zero = torch.zeros_like(df)
            grad_t = grad * _student_log_prob(df, 1, t.square(), zero).exp()
        if ctx.needs_input_grad[0]:
            # torch has no derivative of the incomplete beta function in its parameters; the
            # error of this stencil is below 1e-10 relative to the density.
            h = 1e-3
            points = (-2.0, 1 / 12), (-1.0, -2 / 3), (1.0, 2 / 3), (2.0, -1 / 12)
            slope = sum(w * _scipy(scipy.special.stdtr, df * (1 + k * h), t) for k, w in points)
            grad_df = grad * slope / (h * df)
        return grad_df, grad_t


def student_t_cdf(df: Tensor, t: Tensor) -> Tensor:
    """Distribution function of the standard Student-t law, differentiable in both arguments.

    Args:
        df: Degrees of freedom > 0.
        t: Points, broadcast with ``df``.

    Returns:
        Probabilities of the broadcast shape.

    Example:
        >>> student_t_cdf(torch.tensor(1.0).double(), torch.tensor(1.0).double()).item()
        0.75
    """
    df, t = torch.broadcast_tensors(df, t)
    result: Tensor = _StudentTCdf.apply(df, t)  # type: ignore[no-untyped-call]
    return result


def _student_t_icdf(df: Tensor, q: Tensor) -> Tensor:
    df, q = torch.broadcast_tensors(df, q)
    t = _scipy(scipy.special.stdtrit, df.detach(), q.detach())
    # SciPy maps 0 and 1 to finite or infinite values depending on the version.
    t = torch.where(q <= 0, -torch.inf, torch.where(q >= 1, torch.inf, t))
    if not (df.requires_grad or q.requires_grad):
        return t
    density = _student_log_prob(df.detach(), 1, t.square(), torch.zeros_like(t)).exp()
    return _implicit(t, student_t_cdf(df, t) - q, density)


def _implicit(root: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
    """Attach to a root of F(x; theta) = q the derivatives of the implicit function theorem.

    The value stays ``root``; the backward pass sees one Newton step.
    """
    step = (residual.detach() - residual) / slope.detach()
    return root + torch.where(torch.isfinite(root), step, 0.0)


# --------------------------------------------------------------------------- cdf and icdf


@singledispatch
def cdf(dist: Distribution, value: Tensor) -> Tensor:
    """Distribution function of any one-dimensional law.

    Args:
        dist: A distribution with batch shape [*batch] and no event dimensions.
        value: Points [*sample, *batch].

    Returns:
        Probabilities [*sample, *batch].

    Raises:
        CapabilityError: the law has event dimensions or no known distribution function.

    Example:
        >>> cdf(td.Normal(0.0, 1.0), torch.tensor(0.0)).item()
        0.5
    """
    _require_univariate(dist, "cdf")
    try:
        result: Tensor = dist.cdf(value)
    except NotImplementedError as error:
        raise CapabilityError(
            f"no distribution function is known for {type(dist).__name__}; give the class a cdf "
            "method, or use samples"
        ) from error
    return result


@cdf.register
def _(dist: td.Normal, value: Tensor) -> Tensor:
    # torch's Normal.cdf uses 1 + erf, which is 0 below -8.3; ndtr keeps the lower tail.
    return torch.special.ndtr((value - dist.loc) / dist.scale)


@cdf.register
def _(dist: td.LogNormal, value: Tensor) -> Tensor:
    return torch.special.ndtr((torch.log(value) - dist.loc) / dist.scale)


@cdf.register
def _(dist: td.StudentT, value: Tensor) -> Tensor:
    return student_t_cdf(dist.df, (value - dist.loc) / dist.scale)


@cdf.register
def _(dist: td.InverseGamma, value: Tensor) -> Tensor:
    return torch.special.gammaincc(dist.concentration, dist.rate / value)


cdf.register(pyro.distributions.InverseGamma, cdf.dispatch(td.InverseGamma))


@cdf.register
def _(dist: td.Beta, value: Tensor) -> Tensor:
    _refuse_gradients(dist, value, "Beta cdf")
    return _scipy(scipy.special.betainc, dist.concentration1, dist.concentration0, value)


@singledispatch
def icdf(dist: Distribution, q: Tensor) -> Tensor:
    """Quantile function of any one-dimensional law.

    The law's own ``icdf`` where it has one, a SciPy function where one is known, else the inverse
    of :func:`cdf` by a bracketing root search with implicit derivatives.

    Args:
        dist: A distribution with batch shape [*batch] and no event dimensions.
        q: Probabilities in [0, 1], broadcast with [*batch].

    Returns:
        Quantiles of the broadcast shape.

    Raises:
        DataError: ``q`` lies outside [0, 1].
        CapabilityError: the law has event dimensions or no known distribution function.

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> round(icdf(td.Gamma(one, one), 0.5 * one).item(), 12) == round(math.log(2.0), 12)
        True
    """
    _require_univariate(dist, "icdf")
    _require_probability(q)
    try:
        result: Tensor = dist.icdf(q)
    except NotImplementedError:
        result = find_quantile(
            lambda x: cdf(dist, x), dist.log_prob, q, dist.batch_shape, *support_bounds(dist)
        )
    return result


@icdf.register
def _(dist: td.Normal, q: Tensor) -> Tensor:
    _require_probability(q)
    return dist.loc + dist.scale * torch.special.ndtri(q)


@icdf.register
def _(dist: td.LogNormal, q: Tensor) -> Tensor:
    _require_probability(q)
    return (dist.loc + dist.scale * torch.special.ndtri(q)).exp()


@icdf.register
def _(dist: td.StudentT, q: Tensor) -> Tensor:
    _require_probability(q)
    return dist.loc + dist.scale * _student_t_icdf(dist.df, q)


@icdf.register
def _(dist: td.Gamma, q: Tensor) -> Tensor:
    _require_probability(q)
    a, q = torch.broadcast_tensors(dist.concentration, q)
    return _gamma_quantile(scipy.special.gammaincinv, torch.special.gammainc, a, q) / dist.rate


@icdf.register
def _(dist: td.InverseGamma, q: Tensor) -> Tensor:
    _require_probability(q)
    a, q = torch.broadcast_tensors(dist.concentration, q)
    return dist.rate / _gamma_quantile(scipy.special.gammainccinv, torch.special.gammaincc, a, q)


icdf.register(pyro.distributions.InverseGamma, icdf.dispatch(td.InverseGamma))


@icdf.register
def _(dist: td.Beta, q: Tensor) -> Tensor:
    _require_probability(q)
    _refuse_gradients(dist, q, "Beta icdf")
    return _scipy(scipy.special.betaincinv, dist.concentration1, dist.concentration0, q)


def _gamma_quantile(
    inverse: Callable[..., Any], forward: Callable[[Tensor, Tensor], Tensor], a: Tensor, q: Tensor
) -> Tensor:
    if torch.is_grad_enabled() and a.requires_grad:
        # torch has no derivative of the incomplete gamma function in its shape parameter.
        raise CapabilityError(
            "quantiles of gamma laws have no derivative in the concentration; detach it first"
        )
    z = _scipy(inverse, a, q.detach())
    if not q.requires_grad:
        return z
    density = ((a - 1) * torch.log(z) - z - torch.lgamma(a)).exp()
    sign = 1.0 if forward is torch.special.gammainc else -1.0
    return _implicit(z, -q, sign * density)


def _refuse_gradients(dist: Distribution, value: Tensor, what: str) -> None:
    """Raise rather than return a result that silently drops gradients."""
    tensors = [value, *(getattr(dist, name) for name in ("concentration1", "concentration0"))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise CapabilityError(f"{what} has no derivatives; detach its arguments first")


def _require_univariate(dist: Distribution, what: str) -> None:
    if len(dist.event_shape) > 0:
        raise CapabilityError(
            f"{what} needs a one-dimensional law, got {type(dist).__name__} with event shape "
            f"{tuple(dist.event_shape)}; take marginals(dist) first"
        )


def _require_probability(q: Tensor) -> None:
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise DataError("probabilities must lie in [0, 1]; quantiles of other values do not exist")


def support_bounds(dist: Distribution) -> tuple[Tensor | float, Tensor | float]:
    """Return the lower and upper end of a one-dimensional law's support (infinite if open).

    Raises:
        CapabilityError: the support is not an interval of real numbers.

    Example:
        >>> support_bounds(td.Uniform(1.0, 3.0))
        (tensor(1.), tensor(3.))
        >>> support_bounds(td.HalfNormal(1.0))
        (0.0, inf)
    """
    support: Any = dist.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if getattr(support, "is_discrete", False):
        raise CapabilityError(f"{type(dist).__name__} is discrete: its support is no interval")
    if support is constraints.real:
        return -math.inf, math.inf
    lower = getattr(support, "lower_bound", None)
    upper = getattr(support, "upper_bound", None)
    if lower is None and upper is None:
        raise CapabilityError(
            f"the support of {type(dist).__name__} is {support}, expected an interval of reals"
        )
    return (-math.inf if lower is None else lower), (math.inf if upper is None else upper)


# --------------------------------------------------------------------------- root search


def find_quantile(
    distribution_function: Callable[[Tensor], Tensor],
    log_density: Callable[[Tensor], Tensor],
    q: Tensor,
    batch_shape: torch.Size,
    lower: Tensor | float = -math.inf,
    upper: Tensor | float = math.inf,
) -> Tensor:
    """Invert a distribution function by Chandrupatla's bracketing root search, elementwise.

    Source: Chandrupatla, "A new hybrid quadratic/bisection algorithm" (Advances in Engineering
    Software 28, 1997). Derivatives follow from the implicit function theorem.

    Args:
        distribution_function: F on tensors of shape [*q broadcast with *batch].
        log_density: Log of its derivative.
        q: Probabilities, broadcast with [*batch].
        batch_shape: Batch shape of the law.
        lower: End of the search interval, -inf if open; broadcast with the result.
        upper: Other end, inf if open.

    Returns:
        Quantiles of the broadcast shape; some point of the flat part where F is flat.

    Example:
        >>> half = torch.tensor(0.5, dtype=torch.float64)
        >>> law = td.Laplace(torch.tensor(3.0).double(), 1.0)
        >>> x = find_quantile(law.cdf, law.log_prob, half, law.batch_shape)
        >>> round(x.item(), 12)
        3.0
    """
    shape = torch.broadcast_shapes(q.shape, batch_shape)
    target = q.expand(shape)
    with torch.no_grad():
        low, high = (
            torch.as_tensor(end, dtype=q.dtype, device=q.device).expand(shape)
            for end in (lower, upper)
        )
        inner = _interior(target)
        a, b = _bracket(distribution_function, inner, low, high)
        root = _chandrupatla(lambda x: distribution_function(x) - inner, a, b)
    result = root
    if torch.is_grad_enabled():
        residual = distribution_function(root) - target
        if residual.requires_grad:
            result = _implicit(root, residual, log_density(root).detach().exp())
    return torch.where(target <= 0, low, torch.where(target >= 1, high, result))


def _interior(q: Tensor) -> Tensor:
    """Probabilities moved off 0 and 1, where the search would walk to the end of the support."""
    return q.clamp(torch.finfo(q.dtype).tiny, 1 - torch.finfo(q.dtype).eps / 2)


def _bracket(
    f: Callable[[Tensor], Tensor], target: Tensor, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Walk in growing steps from a point inside the support until F has passed the target."""
    start = torch.zeros_like(target)
    start = torch.where(torch.isfinite(lower), lower + 1, start)
    start = torch.where(torch.isfinite(upper), upper - 1, start)
    bounded = torch.isfinite(lower) & torch.isfinite(upper)
    start = torch.where(bounded, 0.5 * (lower + upper), start)
    upwards = f(start) < target
    end = torch.where(upwards, upper, lower)
    direction = torch.where(upwards, 1.0, -1.0).to(target.dtype)
    previous = current = start
    step = 1.0
    for _ in range(510):  # 4^510 is within the range of float64
        value = f(current)
        done = torch.where(upwards, value >= target, value <= target)
        if bool(done.all()):
            break
        # Towards a finite end the distance shrinks; towards an open one the step grows.
        onward = torch.where(
            torch.isfinite(end), end + (start - end) / (4 * step), start + direction * step
        )
        previous = torch.where(done, previous, current)
        current = torch.where(done, current, onward)
        step *= 4
    return torch.minimum(previous, current), torch.maximum(previous, current)


def _chandrupatla(f: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Root of an increasing function between a and b, to the last digits of the dtype."""
    eps = torch.finfo(a.dtype).eps
    fa, fb = f(a), f(b)
    c, fc = a, fa
    t = torch.full_like(a, 0.5)
    best = torch.where(fa.abs() < fb.abs(), a, b)
    for _ in range(2 * 1100):
        x = a + t * (b - a)
        fx = f(x)
        same = torch.sign(fx) == torch.sign(fa)
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        best = torch.where(fa.abs() < fb.abs(), a, b)
        width = (b - a).abs()
        tolerance = 2 * eps * best.abs() + torch.finfo(a.dtype).tiny
        done = (width <= tolerance) | (fa == 0) | ~torch.isfinite(width)
        if bool(done.all()):
            break
        xi = (a - b) / (c - b)
        phi = (fa - fb) / (fc - fb)
        quadratic = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
        step = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        t = torch.where(quadratic & torch.isfinite(step), step, 0.5)
        edge = (0.5 * tolerance / width).clamp(max=0.5)
        t = torch.where(done, 0.0, torch.minimum(torch.maximum(t, edge), 1 - edge))
    return best


# --------------------------------------------------------------------------- marginals


@singledispatch
def marginals(dist: Distribution) -> Distribution:
    """Return the one-dimensional marginals of a joint law, with the event dims as batch dims.

    Args:
        dist: A distribution [*batch] with event shape [*event].

    Returns:
        A distribution with batch shape [*batch, *event] and no event dimensions.

    Raises:
        CapabilityError: the marginals of this class are not known.

    Example:
        >>> marginals(td.MultivariateNormal(torch.zeros(3), torch.eye(3))).batch_shape
        torch.Size([3])
    """
    if len(dist.event_shape) == 0:
        return dist
    raise CapabilityError(f"the marginals of {type(dist).__name__} are not known; use samples")


@marginals.register
def _(dist: td.Independent) -> Distribution:
    return marginals(dist.base_dist)


@marginals.register(td.MultivariateNormal)
@marginals.register(td.LowRankMultivariateNormal)
@marginals.register(MultiOutputNormal)
def _(dist: Any) -> Distribution:
    return pyro.distributions.Normal(dist.mean, dist.variance.sqrt(), validate_args=False)


@marginals.register(MultivariateStudentT)
@marginals.register(MultiOutputStudentT)
def _(dist: Any) -> Distribution:
    scale = dist.scale_tril.square().sum(-1).sqrt()
    df = dist.df.unsqueeze(-1)
    if isinstance(dist, MultiOutputStudentT):
        scale, df = scale.unsqueeze(-1), df.unsqueeze(-1)
    df, scale = df.expand(dist.loc.shape), scale.expand(dist.loc.shape)
    return StudentT(df, dist.loc, scale, validate_args=False)


# --------------------------------------------------------------------------- sampling


def sample(
    dist: Distribution, shape: tuple[int, ...] = (), *, generator: torch.Generator
) -> Tensor:
    """Draw from any distribution with an explicit generator.

    The common laws use torch's sampling functions that accept a generator; all others run inside
    :func:`probkit.rng.scope`, which leaves the global stream as it was. Draws are detached.

    Args:
        dist: A distribution [*batch] with event shape [*event].
        shape: Leading shape of the draws.
        generator: Source of randomness; it advances. If it lives on another device than the
            parameters of a common law, a child stream on that device is spawned from it.

    Returns:
        Draws [*shape, *batch, *event].

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> sample(td.Normal(torch.zeros(3), 1.0), (5,), generator=g).shape
        torch.Size([5, 3])
    """
    with torch.no_grad():
        draws: Tensor = _draw(dist, torch.Size(shape), generator)
    return draws


def _on(like: Tensor, generator: torch.Generator) -> torch.Generator:
    if like.device.type == generator.device.type:
        return generator
    return stream(generator, "device", device=like.device)


@singledispatch
def _draw(dist: Distribution, shape: torch.Size, generator: torch.Generator) -> Tensor:
    with scope(rng=generator):
        return dist.sample(shape)


@_draw.register
def _(dist: td.Normal, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = _randn_like(dist.loc, dist._extended_shape(shape), _on(dist.loc, generator))
    return dist.loc + dist.scale * noise


@_draw.register
def _(dist: td.LogNormal, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = _randn_like(dist.loc, dist._extended_shape(shape), _on(dist.loc, generator))
    return (dist.loc + dist.scale * noise).exp()


@_draw.register
def _(dist: td.Gamma, shape: torch.Size, generator: torch.Generator) -> Tensor:
    a = dist.concentration.expand(dist._extended_shape(shape))
    z = torch._standard_gamma(a.contiguous(), generator=_on(a, generator))
    return z.clamp_min(torch.finfo(z.dtype).tiny) / dist.rate


@_draw.register(td.InverseGamma)
@_draw.register(pyro.distributions.InverseGamma)
def _(dist: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    gamma = td.Gamma(dist.concentration, dist.rate, validate_args=False)
    return 1 / _draw(gamma, shape, generator)


@_draw.register
def _(dist: td.StudentT, shape: torch.Size, generator: torch.Generator) -> Tensor:
    full = dist._extended_shape(shape)
    generator = _on(dist.loc, generator)
    noise = _randn_like(dist.loc, full, generator)
    return dist.loc + dist.scale * noise * _inverse_chi(dist.df.expand(full), generator)


@_draw.register
def _(dist: td.MultivariateNormal, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = _randn_like(dist.loc, dist._extended_shape(shape), _on(dist.loc, generator))
    return dist.loc + (dist.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)


@_draw.register(MultiOutputNormal)
@_draw.register(MultiOutputStudentT)
def _(dist: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    draws: Tensor = dist._draw(shape, _on(dist.loc, generator))
    return draws


@_draw.register
def _(dist: MultivariateStudentT, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return dist._one._draw(shape, _on(dist.loc, generator)).squeeze(-1)


@_draw.register
def _(dist: td.Independent, shape: torch.Size, generator: torch.Generator) -> Tensor:
    draws: Tensor = _draw(dist.base_dist, shape, generator)
    return draws


# --------------------------------------------------------------------------- mixtures


def _split(components: Distribution) -> tuple[int, int]:
    """Numbers of dims after the component dim: all of them, and the event dims among them."""
    if len(components.batch_shape) == 0:
        raise ShapeError("expected components with batch shape [component, *obs], got none")
    event = len(components.event_shape)
    return len(components.batch_shape) - 1 + event, event


def _aligned(log_weights: Tensor, rank: int) -> Tensor:
    """Weights [component] or [component, *obs] with ``rank`` dims after the component dim."""
    missing = rank + 1 - log_weights.ndim
    if missing < 0:
        raise ShapeError(
            f"expected log weights [component, *obs] with at most {rank + 1} dims, got "
            f"{tuple(log_weights.shape)}"
        )
    normal = log_weights - torch.logsumexp(log_weights, 0)
    return normal.reshape(normal.shape + (1,) * missing)


def mixture_log_prob(components: Distribution, log_weights: Tensor, value: Tensor) -> Tensor:
    """Log density of a mixture whose components lie along the leading batch dimension.

    Args:
        components: A distribution with batch shape [component, *obs] and event shape [*event].
        log_weights: Log weights [component] or [component, *obs]; normalised here.
        value: Points [*sample, *obs, *event].

    Returns:
        Log densities [*sample, *obs].

    Example:
        >>> two = td.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        >>> x = mixture_log_prob(two, torch.zeros(2), torch.tensor(0.0))
        >>> bool(torch.isclose(x, two.log_prob(torch.tensor(0.0))[0]))
        True
    """
    rank, event = _split(components)
    log_prob = components.log_prob(value.unsqueeze(value.ndim - rank))
    return torch.logsumexp(log_prob + _aligned(log_weights, rank - event), -(rank - event) - 1)


def mixture_cdf(components: Distribution, log_weights: Tensor, value: Tensor) -> Tensor:
    """Distribution function of a mixture of one-dimensional laws.

    Args:
        components: A distribution with batch shape [component, *obs] and no event dimensions.
        log_weights: Log weights [component] or [component, *obs]; normalised here.
        value: Points [*sample, *obs].

    Returns:
        Probabilities [*sample, *obs].

    Raises:
        CapabilityError: the components have event dimensions or no distribution function.

    Example:
        >>> two = td.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        >>> mixture_cdf(two, torch.zeros(2), torch.tensor(0.0)).item()
        0.5
    """
    _require_univariate(components, "cdf")
    rank, _ = _split(components)
    value = value.expand(torch.broadcast_shapes(value.shape, components.batch_shape[1:]))
    probability = cdf(components, value.unsqueeze(value.ndim - rank))
    return (_aligned(log_weights, rank).exp() * probability).sum(-rank - 1)


def mixture_icdf(components: Distribution, log_weights: Tensor, q: Tensor) -> Tensor:
    """Quantile function of a mixture of one-dimensional laws.

    The extreme quantiles of the components bracket the mixture's one; the root is found by
    :func:`find_quantile`.

    Args:
        components: A distribution with batch shape [component, *obs] and no event dimensions.
        log_weights: Log weights [component] or [component, *obs]; normalised here.
        q: Probabilities [*sample, *obs], broadcast with [*obs].

    Returns:
        Quantiles [*sample, *obs].

    Raises:
        DataError: ``q`` lies outside [0, 1].
        CapabilityError: the components have event dimensions or no distribution function.

    Example:
        >>> two = td.Normal(torch.tensor([-1.0, 1.0]).double(), 1.0)
        >>> round(mixture_icdf(two, torch.zeros(2).double(), torch.tensor(0.5).double()).item(), 9)
        0.0
    """
    _require_univariate(components, "icdf")
    _require_probability(q)
    rank, _ = _split(components)
    obs = components.batch_shape[1:]
    target = q.expand(torch.broadcast_shapes(q.shape, obs))
    with torch.no_grad():
        inner = _interior(target)
        parts = icdf(components, inner.unsqueeze(target.ndim - rank))
        # Components without weight must not widen the bracket.
        live = torch.isfinite(_aligned(log_weights, rank)).expand(parts.shape)
        low = torch.where(live, parts, torch.inf).amin(-rank - 1)
        high = torch.where(live, parts, -torch.inf).amax(-rank - 1)
        slack = 4 * torch.finfo(q.dtype).eps
        low, high = low - slack * low.abs(), high + slack * high.abs()
        root = _chandrupatla(lambda x: mixture_cdf(components, log_weights, x) - inner, low, high)
    result = root
    if torch.is_grad_enabled():
        residual = mixture_cdf(components, log_weights, root) - target
        if residual.requires_grad:
            density = mixture_log_prob(components, log_weights, root).detach().exp()
            result = _implicit(root, residual, density)
    if bool(((target > 0) & (target < 1)).all()):
        return result
    first, last = _mixture_ends(components, root)
    return torch.where(target <= 0, first, torch.where(target >= 1, last, result))


def _mixture_ends(components: Distribution, like: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = (torch.as_tensor(e, dtype=like.dtype) for e in support_bounds(components))
    first = lower.amin(0) if lower.ndim else lower
    last = upper.amax(0) if upper.ndim else upper
    return first.to(like.device).expand(like.shape), last.to(like.device).expand(like.shape)


def _weighted_sum(weight: Tensor, term: Tensor) -> Tensor:
    """Sum over components; a term without weight counts zero even when it is infinite."""
    return torch.where(weight > 0, weight * term, 0.0).sum(0)


def mixture_mean(components: Distribution, log_weights: Tensor) -> Tensor:
    """Mean of a mixture, of shape [*obs, *event].

    Args:
        components: A distribution with batch shape [component, *obs] and event shape [*event].
        log_weights: Log weights [component] or [component, *obs]; normalised here.

    Example:
        >>> mixture_mean(td.Normal(torch.tensor([0.0, 4.0]), 1.0), torch.zeros(2)).item()
        2.0
    """
    weight = _event_weights(components, log_weights)
    return _weighted_sum(weight, components.mean)


def mixture_variance(components: Distribution, log_weights: Tensor) -> Tensor:
    """Variance of a mixture, elementwise, of shape [*obs, *event].

    Args:
        components: A distribution with batch shape [component, *obs] and event shape [*event].
        log_weights: Log weights [component] or [component, *obs]; normalised here.

    Example:
        >>> mixture_variance(td.Normal(torch.tensor([0.0, 4.0]), 1.0), torch.zeros(2)).item()
        5.0
    """
    weight = _event_weights(components, log_weights)
    mean = components.mean
    centre = _weighted_sum(weight, mean)
    return _weighted_sum(weight, components.variance + (mean - centre).square())


def _event_weights(components: Distribution, log_weights: Tensor) -> Tensor:
    rank, event = _split(components)
    weight = _aligned(log_weights, rank - event).exp()
    return weight.reshape(weight.shape + (1,) * event)
