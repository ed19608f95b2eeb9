"""Distribution and quantile functions of any one-dimensional law, and marginals of joint ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import pyro.distributions
import scipy.special
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit.distributions._roots import apply_scipy, find_quantile, implicit_derivative
from probkit.distributions.joint_normal import JointNormal
from probkit.distributions.multivariate import (
    MultiOutputNormal,
    MultiOutputStudentT,
    MultivariateStudentT,
    ScaledMultivariateNormal,
)
from probkit.distributions.student_t import StudentT, student_t_cdf, student_t_icdf
from probkit.errors import CapabilityError, DataError

__all__ = [
    "cdf",
    "icdf",
    "marginals",
    "require_probability",
    "require_univariate",
    "support_bounds",
]


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
        >>> import torch
        >>> import torch.distributions as td
        >>> cdf(td.Normal(0.0, 1.0), torch.tensor(0.0)).item()
        0.5
    """
    require_univariate(dist, "cdf")
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
    return apply_scipy(scipy.special.betainc, dist.concentration1, dist.concentration0, value)


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
        >>> import math
        >>> import torch
        >>> import torch.distributions as td
        >>> one = torch.ones((), dtype=torch.float64)
        >>> round(icdf(td.Gamma(one, one), 0.5 * one).item(), 12) == round(math.log(2.0), 12)
        True
    """
    require_univariate(dist, "icdf")
    require_probability(q)
    try:
        result: Tensor = dist.icdf(q)
    except NotImplementedError:
        result = find_quantile(
            lambda x: cdf(dist, x), dist.log_prob, q, dist.batch_shape, *support_bounds(dist)
        )
    return result


@icdf.register
def _(dist: td.Normal, q: Tensor) -> Tensor:
    require_probability(q)
    return dist.loc + dist.scale * torch.special.ndtri(q)


@icdf.register
def _(dist: td.LogNormal, q: Tensor) -> Tensor:
    require_probability(q)
    return (dist.loc + dist.scale * torch.special.ndtri(q)).exp()


@icdf.register
def _(dist: td.StudentT, q: Tensor) -> Tensor:
    require_probability(q)
    return dist.loc + dist.scale * student_t_icdf(dist.df, q)


@icdf.register
def _(dist: td.Gamma, q: Tensor) -> Tensor:
    require_probability(q)
    a, q = torch.broadcast_tensors(dist.concentration, q)
    return _gamma_quantile(scipy.special.gammaincinv, torch.special.gammainc, a, q) / dist.rate


@icdf.register
def _(dist: td.InverseGamma, q: Tensor) -> Tensor:
    require_probability(q)
    a, q = torch.broadcast_tensors(dist.concentration, q)
    return dist.rate / _gamma_quantile(scipy.special.gammainccinv, torch.special.gammaincc, a, q)


icdf.register(pyro.distributions.InverseGamma, icdf.dispatch(td.InverseGamma))


@icdf.register
def _(dist: td.Beta, q: Tensor) -> Tensor:
    require_probability(q)
    _refuse_gradients(dist, q, "Beta icdf")
    return apply_scipy(scipy.special.betaincinv, dist.concentration1, dist.concentration0, q)


def _gamma_quantile(
    inverse: Callable[..., Any], forward: Callable[[Tensor, Tensor], Tensor], a: Tensor, q: Tensor
) -> Tensor:
    if torch.is_grad_enabled() and a.requires_grad:
        # torch has no derivative of the incomplete gamma function in its shape parameter.
        raise CapabilityError(
            "quantiles of gamma laws have no derivative in the concentration; detach it first"
        )
    z = apply_scipy(inverse, a, q.detach())
    if not q.requires_grad:
        return z
    density = ((a - 1) * torch.log(z) - z - torch.lgamma(a)).exp()
    sign = 1.0 if forward is torch.special.gammainc else -1.0
    return implicit_derivative(z, -q, sign * density)


def _refuse_gradients(dist: Distribution, value: Tensor, what: str) -> None:
    """Raise rather than return a result that silently drops gradients."""
    tensors = [value, *(getattr(dist, name) for name in ("concentration1", "concentration0"))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise CapabilityError(f"{what} has no derivatives; detach its arguments first")


def require_univariate(dist: Distribution, what: str) -> None:
    """Raise a CapabilityError when ``dist`` has event dimensions."""
    if len(dist.event_shape) > 0:
        raise CapabilityError(
            f"{what} needs a one-dimensional law, got {type(dist).__name__} with event shape "
            f"{tuple(dist.event_shape)}; take marginals(dist) first"
        )


def require_probability(q: Tensor) -> None:
    """Raise a DataError when an entry lies outside [0, 1]."""
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise DataError("probabilities must lie in [0, 1]; quantiles of other values do not exist")


def support_bounds(dist: Distribution) -> tuple[Tensor | float, Tensor | float]:
    """Return the lower and upper end of a one-dimensional law's support (infinite if open).

    Raises:
        CapabilityError: the support is not an interval of real numbers.

    Example:
        >>> import torch.distributions as td
        >>> support_bounds(td.Uniform(1.0, 3.0))
        (tensor(1.), tensor(3.))
        >>> support_bounds(td.HalfNormal(1.0))
        (0.0, inf)
    """
    support: Any = dist.support
    while hasattr(support, "base_constraint"):  # independent, mixture
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
        >>> import torch
        >>> import torch.distributions as td
        >>> marginals(td.MultivariateNormal(torch.zeros(3), torch.eye(3))).batch_shape
        torch.Size([3])
    """
    if len(dist.event_shape) == 0:
        return dist
    raise CapabilityError(f"the marginals of {type(dist).__name__} are not known; use samples")


@marginals.register(td.Independent)
def _(dist: Any) -> Distribution:
    return marginals(dist.base_dist)


@marginals.register(JointNormal)
@marginals.register(td.MultivariateNormal)
@marginals.register(td.LowRankMultivariateNormal)
def _(dist: Any) -> Distribution:
    return pyro.distributions.Normal(dist.mean, dist.variance.sqrt(), validate_args=False)


@marginals.register(MultiOutputNormal)
@marginals.register(ScaledMultivariateNormal)
def _(dist: Any) -> Distribution:
    return pyro.distributions.Normal(dist.loc, dist.marginal_scale(), validate_args=False)


@marginals.register(MultivariateStudentT)
@marginals.register(MultiOutputStudentT)
def _(dist: Any) -> Distribution:
    df = dist.df.reshape(dist.batch_shape + (1,) * len(dist.event_shape)).expand(dist.loc.shape)
    return StudentT(df, dist.loc, dist.marginal_scale(), validate_args=False)
