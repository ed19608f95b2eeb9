"""Scale mixtures of Gaussian processes as pure functions of a Gram matrix.

Given the variance sigma^2 everything is Gaussian, y | sigma^2 ~ N(0, sigma^2 K), with one sigma^2
for all rows and all outputs. Evidence, posterior and predictions follow from a law of sigma^2 in
closed form (inverse gamma: a Student-t process; point mass: the Gaussian process) or by quadrature
over log sigma^2, which costs O(1) per node once K is factorised.

Source: Lee, Yun, Yang and Lee, "Scale Mixtures of Neural Network Gaussian Processes" (ICLR 2022).

Shapes: [*batch] leads everywhere and broadcasts; n rows, C outputs, m test rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pyro.distributions import Normal
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution

from probkit import distributions as D
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register, storable
from probkit.inference.quadrature import LogQuadrature, integrate_log
from probkit.models.scale_laws import InverseGamma, OtherLaw, PointMass, ScaleLaw
from probkit.numerics import (
    check_allocation,
    lgamma_difference,
    safe_cholesky,
)

__all__ = [
    "Conditional",
    "PaddedStats",
    "PredictiveParts",
    "ScalePosterior",
    "SpectralStats",
    "SufficientStats",
    "conditional",
    "importance_proposal",
    "log_evidence",
    "log_evidence_inverse_gamma",
    "posterior_inverse_gamma",
    "predictive",
    "quadrature",
    "scale_posterior",
    "spectral_predictive",
    "spectral_stats",
    "sufficient_stats",
]

Change = Callable[[Tensor], Tensor]


# --------------------------------------------------------------------------- statistics


class ScaleStats(Protocol):
    """What the likelihood of sigma^2 needs to know of the data."""

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape [*batch]."""
        ...

    @property
    def reference(self) -> Tensor:
        """A tensor with the dtype and device of the data."""
        ...

    def log_likelihood(self, u: Tensor) -> Tensor:
        """Return log p(y | sigma^2 = exp u) for u [*sample, *batch]."""
        ...

    def map_batch(self, shape: torch.Size, change: Change) -> Any:
        """Expand to batch shape ``shape`` and apply ``change`` to the leading batch dims."""
        ...


@storable
@dataclass(frozen=True)
class SufficientStats:
    """What y | sigma^2 ~ N(0, sigma^2 K) depends on.

    Attributes:
        quadratic: q_c = y_c' K^-1 y_c for each output [*batch, C].
        log_det: log det K [*batch].
        n: Number of rows; a floating tensor [*batch] where it differs between batch elements.
    """

    quadratic: Tensor
    log_det: Tensor
    n: int | Tensor

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return int(self.quadratic.shape[-1])

    @property
    def count(self) -> int | Tensor:
        """Number of observed values, n C."""
        return self.n * self.outputs

    @property
    def is_empty(self) -> bool:
        """Whether there is no data at all."""
        return not bool((torch.as_tensor(self.count) > 0).any())

    @property
    def total(self) -> Tensor:
        """Sum of the quadratic forms over outputs [*batch]."""
        return self.quadratic.sum(-1)

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape [*batch]."""
        return torch.broadcast_shapes(self.quadratic.shape[:-1], self.log_det.shape)

    @property
    def reference(self) -> Tensor:
        """A tensor with the dtype and device of the data."""
        return self.log_det

    def constant(self) -> Tensor:
        """The part -(n C log 2 pi + C log det K) / 2 of every log likelihood [*batch]."""
        return -0.5 * (self.count * math.log(2 * math.pi) + self.outputs * self.log_det)

    def log_likelihood(self, u: Tensor) -> Tensor:
        """Return log p(y | sigma^2 = exp u) for u [*sample, *batch]."""
        if self.is_empty:
            return torch.zeros_like(u) + self.constant()
        # Capped so that all-zero targets give 0 x finite, not 0 x inf, however small sigma^2 is.
        precision = torch.exp((-u).clamp(max=700.0 if u.dtype == torch.float64 else 85.0))
        return self.constant() - 0.5 * self.count * u - 0.5 * self.total * precision

    def map_batch(self, shape: torch.Size, change: Change) -> SufficientStats:
        """Expand to batch shape ``shape`` and apply ``change`` to the leading batch dims."""
        quadratic = self.quadratic.expand(shape + self.quadratic.shape[-1:])
        n = self.n if isinstance(self.n, int) else change(self.n.expand(shape))
        return SufficientStats(change(quadratic), change(self.log_det.expand(shape)), n)


def sufficient_stats(cholesky: Tensor, y: Tensor) -> SufficientStats:
    """Reduce data to the quadratic forms and the log determinant.

    Args:
        cholesky: Lower factor of K [*batch, n, n].
        y: Targets [*batch, n, C].

    Raises:
        ShapeError: the numbers of rows differ.

    Example:
        >>> stats = sufficient_stats(2 * torch.eye(3), torch.ones(3, 1))
        >>> stats.total.item(), stats.count
        (0.75, 3)
    """
    _check_rows(cholesky, y, "Cholesky factor")
    z = torch.linalg.solve_triangular(cholesky, y, upper=False)
    log_det = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return SufficientStats(z.square().sum(-2), log_det, y.shape[-2])


def _check_rows(matrix: Tensor, y: Tensor, what: str) -> None:
    square = matrix.ndim >= 2 and matrix.shape[-1] == matrix.shape[-2]
    if not square or y.ndim < 2 or y.shape[-2] != matrix.shape[-1]:
        raise ShapeError(
            f"expected {what} [*batch, n, n] and y [*batch, n, C] with equal n, got "
            f"{tuple(matrix.shape)} and {tuple(y.shape)}; give a single output as y[:, None]"
        )


# --------------------------------------------------------------------------- evidence


def log_evidence_inverse_gamma(
    stats: SufficientStats, concentration: Tensor, rate: Tensor
) -> Tensor:
    """Log marginal likelihood under sigma^2 ~ InverseGamma(alpha, beta), in closed form.

    With N = n C: lnGamma(alpha + N/2) - lnGamma(alpha) - N/2 ln(2 pi beta) - C/2 log det K
    - (alpha + N/2) log1p(q / (2 beta)). It stays accurate for alpha, beta -> infinity, where it
    tends to the Gaussian process with variance beta / alpha.

    Returns:
        Log density of y [*batch].

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> stats = SufficientStats(torch.zeros(1).double(), 0 * one, 2)
        >>> round(log_evidence_inverse_gamma(stats, one, one).exp().item() * 2 * math.pi, 12)
        1.0
    """
    half = 0.5 * stats.count
    return (
        stats.constant()
        + lgamma_difference(concentration, half)
        - half * torch.log(rate)
        - (concentration + half) * torch.log1p(stats.total / (2 * rate))
    )


def posterior_inverse_gamma(
    stats: SufficientStats, concentration: Tensor, rate: Tensor
) -> InverseGamma:
    """Posterior InverseGamma(alpha + n C / 2, beta + q / 2) of sigma^2.

    Example:
        >>> stats = SufficientStats(torch.tensor([6.0]), torch.tensor(0.0), 4)
        >>> posterior_inverse_gamma(stats, torch.tensor(2.0), torch.tensor(1.0)).mean
        tensor(1.3333)
    """
    return InverseGamma(
        concentration + 0.5 * stats.count, rate + 0.5 * stats.total, validate_args=False
    )


def quadrature(law: ScaleLaw, stats: ScaleStats) -> LogQuadrature:
    """Integrate p(y | sigma^2) p(sigma^2) over u = log sigma^2.

    Args:
        law: Law of sigma^2 with a density.
        stats: Statistics of the data, batch shape broadcast with the law's.

    Returns:
        Nodes u [node, *batch] with normalised posterior weights, and the log evidence [*batch].

    Example:
        >>> from probkit.models.scale_laws import BurrXII
        >>> stats = SufficientStats(torch.tensor([1.0]).double(), torch.tensor(0.0).double(), 1)
        >>> quadrature(BurrXII(2.0, 1.0), stats).nodes.shape
        torch.Size([301])
    """
    return _integrate(law, stats, 0.0)


def _integrate(law: ScaleLaw, stats: ScaleStats, tilt: Tensor | float) -> LogQuadrature:
    """Integrate sigma^(2 tilt) p(y | sigma^2) p(sigma^2)."""
    change = _change_of_variable(law)

    def log_integrand(t: Tensor) -> Tensor:
        u, log_slope = change(t)
        return law.log_prob_of_log(u) + stats.log_likelihood(u) + log_slope + tilt * u

    like = stats.reference
    result = integrate_log(
        log_integrand,
        batch_shape=torch.broadcast_shapes(law.batch_shape, stats.batch_shape),
        dtype=like.dtype,
        device=like.device,
    )
    if change is _identity:
        return result
    with torch.no_grad():
        nodes, log_slope = change(result.nodes)
    return replace(result, nodes=nodes, log_density=result.log_density - log_slope)


def _identity(t: Tensor) -> tuple[Tensor, Tensor]:
    return t, torch.zeros_like(t)


def _change_of_variable(law: ScaleLaw) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Map u = log sigma^2 as a function of t on the whole line, with log du/dt.

    A density that ends abruptly would spoil the trapezoid rule; in t it decays smoothly.
    """
    if not isinstance(law, OtherLaw):
        return _identity
    lower, upper = (torch.as_tensor(b, dtype=torch.float64).log() for b in law.bounds)
    below, above = bool(torch.isfinite(lower).all()), bool(torch.isfinite(upper).all())

    def between(t: Tensor) -> tuple[Tensor, Tensor]:
        span = upper - lower
        return (
            lower + span * torch.sigmoid(t),
            torch.log(span) + F.logsigmoid(t) + F.logsigmoid(-t),
        )

    def from_below(t: Tensor) -> tuple[Tensor, Tensor]:
        return lower - F.logsigmoid(-t), F.logsigmoid(t)

    def from_above(t: Tensor) -> tuple[Tensor, Tensor]:
        return upper + F.logsigmoid(t), F.logsigmoid(-t)

    if below and above:
        return between
    return from_below if below else from_above if above else _identity


def log_evidence(law: ScaleLaw, stats: ScaleStats) -> Tensor:
    """Log marginal likelihood log p(y) under any law of sigma^2.

    Closed form for an inverse gamma (with the noise inside the scale) and a point mass, quadrature
    otherwise.

    Args:
        law: Law of sigma^2.
        stats: From :func:`sufficient_stats` or :func:`spectral_stats`.

    Returns:
        Log density [*batch], differentiable in the law's parameters and the statistics.

    Example:
        >>> stats = SufficientStats(torch.tensor([1.0]).double(), torch.tensor(0.0).double(), 1)
        >>> normal = log_evidence(PointMass(1.0), stats)
        >>> round(normal.item(), 9) == round(-0.5 - 0.5 * math.log(2 * math.pi), 9)
        True
    """
    if isinstance(law, InverseGamma) and isinstance(stats, SufficientStats):
        return log_evidence_inverse_gamma(stats, law.concentration, law.rate)
    if isinstance(law, PointMass):
        return stats.log_likelihood(torch.log(law.value))
    return quadrature(law, stats).log_integral


# --------------------------------------------------------------------------- posterior of sigma^2


class ScalePosterior(ScaleLaw):
    """Posterior of sigma^2 by quadrature: density, moments and quantiles.

    Args:
        law: Prior law of sigma^2.
        stats: Statistics of the data.
        quadrature: Result of :func:`quadrature` for the two.

    Attributes:
        nodes: sigma^2 at the nodes [node, *batch].
        log_weights: Their normalised log weights [node, *batch].
        log_evidence: log p(y) [*batch].
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, law: ScaleLaw, stats: ScaleStats, quadrature: LogQuadrature) -> None:
        self.law, self.stats, self.quadrature = law, stats, quadrature
        self.nodes = quadrature.nodes.exp()
        self.log_weights = quadrature.log_weights
        self.log_evidence = quadrature.log_integral
        Distribution.__init__(
            self, quadrature.log_integral.shape, torch.Size(), validate_args=False
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScalePosterior:
        """Return the law with batch shape ``batch_shape``."""
        shape = torch.Size(batch_shape)
        return self._rebuilt(shape, lambda value: value)

    def map_batch(self, change: Change) -> ScalePosterior:
        """Apply ``change`` to the leading batch dims of every part."""
        return self._rebuilt(self.batch_shape, change)

    def _rebuilt(self, shape: torch.Size, change: Change) -> ScalePosterior:
        def by_node(value: Tensor) -> Tensor:
            wide = value.reshape(
                value.shape[:1] + (1,) * (len(shape) + 1 - value.ndim) + value.shape[1:]
            ).expand(value.shape[:1] + shape)
            return change(wide.movedim(0, -1)).movedim(-1, 0)

        q = self.quadrature
        parts = LogQuadrature(
            by_node(q.nodes),
            by_node(q.log_weights),
            by_node(q.log_density),
            change(q.log_integral.expand(shape)),
            change(q.error.expand(shape)),
        )
        law = D.map_batch(self.law.expand(shape), change)
        return ScalePosterior(law, self.stats.map_batch(shape, change), parts)

    def log_prob_of_log(self, u: Tensor) -> Tensor:
        """Log density of log sigma^2."""
        prior = self.law.log_prob_of_log(u)
        return prior + self.stats.log_likelihood(u) - self.log_evidence

    @property
    def mean(self) -> Tensor:
        """Posterior mean of sigma^2 [*batch]; infinite where the tail makes it so."""
        return self._log_moment(1).exp()

    @property
    def variance(self) -> Tensor:
        """Posterior variance of sigma^2 [*batch]; infinite where the tail makes it so."""
        first, second = self._log_moment(1), self._log_moment(2)
        exists = torch.isfinite(second)
        twice = torch.where(exists, 2 * first, 0.0)
        return torch.where(exists, twice.exp() * torch.expm1(second - twice), torch.inf)

    def _log_moment(self, k: int) -> Tensor:
        """Log E[sigma^(2k) | y] by a quadrature of its own, since it may sit far in the tail."""
        like = self.log_evidence.detach()
        far = torch.tensor([350.0, 700.0], dtype=like.dtype, device=like.device)
        far = far.reshape(-1, *(1,) * like.ndim).expand(-1, *like.shape)
        with torch.no_grad():
            ends = self.log_prob_of_log(far)
        # The moment exists where the density of log sigma^2 falls faster than exp(-k u).
        slope = (ends[1] - ends[0]) / (far[1] - far[0])
        exists = ~(slope >= -k - 1e-9)
        tilt = torch.where(exists, float(k), 0.0).to(like.dtype)
        moment = _integrate(self.law, self.stats, tilt).log_integral - self.log_evidence
        return torch.where(exists, moment, torch.inf)

    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes, distribution function and density of log sigma^2, each [*batch, node]."""
        u, log_w, log_f = (
            value.detach().movedim(0, -1).contiguous()
            for value in (self.quadrature.nodes, self.log_weights, self.quadrature.log_density)
        )
        # Fourth-order increments of the integral from equally spaced values (in the map's t).
        w = F.pad(log_w.exp(), (1, 1))
        step = (13 * (w[..., 1:-2] + w[..., 2:-1]) - w[..., :-3] - w[..., 3:]) / 24
        total = F.pad(step.clamp_min(0), (1, 0)).cumsum(-1)
        return u, total / total[..., -1:], log_f.exp()

    def _cdf_of_log(self, u: Tensor) -> Tensor:
        nodes, total, density = self._table()
        x = u.unsqueeze(-1)
        lead = (1,) * (x.ndim - nodes.ndim)
        nodes, total, density = (
            v.reshape(lead + v.shape).expand(x.shape[:-1] + v.shape[-1:])
            for v in (nodes, total, density)
        )
        right = torch.searchsorted(nodes.contiguous(), x.detach().contiguous())
        right = right.clamp(1, nodes.shape[-1] - 1)
        (x0, x1), (f0, f1), (p0, p1) = (
            (v.gather(-1, right - 1), v.gather(-1, right)) for v in (nodes, total, density)
        )
        h = x1 - x0
        s = ((x - x0) / h).clamp(0, 1)
        cubic = (
            f0 * (1 + 2 * s) * (1 - s).square()
            + f1 * s.square() * (3 - 2 * s)
            + h * s * (1 - s) * (p0 * (1 - s) - p1 * s)
        )
        return torch.minimum(torch.maximum(cubic, f0), f1).squeeze(-1)

    def cdf(self, value: Tensor) -> Tensor:
        """P(sigma^2 <= value | y), by cubic interpolation between nodes (error about 1e-6)."""
        return self._cdf_of_log(
            torch.log(value).expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        )

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of sigma^2, the inverse of :meth:`cdf`."""
        nodes = self.quadrature.nodes
        u = D.find_quantile(
            self._cdf_of_log,
            self.log_prob_of_log,
            value,
            self.batch_shape,
            nodes[0],
            nodes[-1],
        )
        return u.exp()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw by inverting the distribution function, from the global stream."""
        shape = self._extended_shape(torch.Size(sample_shape))
        like = self.log_evidence
        return self.icdf(torch.rand(shape, dtype=like.dtype, device=like.device))


register(
    ScalePosterior,
    "ScalePosterior",
    lambda p: {"law": p.law, "stats": p.stats, "quadrature": vars(p.quadrature)},
    lambda tree: ScalePosterior(tree["law"], tree["stats"], LogQuadrature(**tree["quadrature"])),
)


def scale_posterior(law: ScaleLaw, stats: ScaleStats) -> ScaleLaw:
    """Posterior of sigma^2 given the data.

    Returns:
        An InverseGamma (for an inverse gamma prior with the noise inside the scale), the PointMass
        itself, or a :class:`ScalePosterior`.

    Example:
        >>> stats = SufficientStats(torch.tensor([6.0]).double(), torch.tensor(0.0).double(), 4)
        >>> scale_posterior(InverseGamma(2.0, 1.0), stats).rate.item()
        4.0
    """
    if isinstance(law, PointMass):
        return law.expand(torch.broadcast_shapes(law.batch_shape, stats.batch_shape))
    if isinstance(law, InverseGamma) and isinstance(stats, SufficientStats):
        return posterior_inverse_gamma(stats, law.concentration, law.rate)
    return ScalePosterior(law, stats, quadrature(law, stats))


# --------------------------------------------------------------------------- importance sampling


def importance_proposal(stats: SufficientStats) -> InverseGamma:
    """Return InverseGamma(n C / 2, q / 2), the likelihood as a law of sigma^2.

    Weights under it are proportional to p(sigma^2) sigma^2: all else cancels.

    Raises:
        DataError: there are no data or all targets are zero, so that the likelihood is no law.

    Example:
        >>> stats = SufficientStats(torch.tensor([6.0]), torch.tensor(0.0), 4)
        >>> importance_proposal(stats).rate
        tensor(3.)
    """
    total = stats.total
    count = torch.as_tensor(stats.count, dtype=total.dtype, device=total.device)
    if bool((count == 0).any()) or bool((total <= 0).any()):
        raise DataError(
            "the likelihood of sigma^2 is no law without data or when all targets are zero; "
            "sample from the prior instead"
        )
    return InverseGamma((0.5 * count).expand(total.shape), 0.5 * total)


# --------------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Conditional:
    """Gaussian conditional at test rows for sigma^2 = 1: N(location, V) for each output.

    Attributes:
        location: m = K*' K^-1 y [*batch, m, C].
        scale: V = K** - K*' K^-1 K*, a matrix [*batch, m, m] if joint, its diagonal [*batch, m]
            otherwise.
        joint: Whether ``scale`` is a matrix.
        unit: Mean prior variance of the rows [*batch], the size of what V was subtracted from; None
            where it is that of ``scale``.
    """

    location: Tensor
    scale: Tensor
    joint: bool
    unit: Tensor | None = None


@dataclass(frozen=True)
class PredictiveParts:
    """A predictive distribution, or the components of a mixture.

    Attributes:
        dist: A distribution of shape [*batch, m, C], or components [node, *batch, m, C].
        log_weights: Normalised log weights [node, *batch]; None where ``dist`` is the predictive.
    """

    dist: Distribution
    log_weights: Tensor | None = None


def conditional(
    cholesky: Tensor, y: Tensor, cross: Tensor, test: Tensor, *, joint: bool = False
) -> Conditional:
    """Condition the Gaussian process with sigma^2 = 1 on data.

    Args:
        cholesky: Lower factor of K, noise included [*batch, n, n].
        y: Targets [*batch, n, C].
        cross: Kernel between training and test rows [*batch, n, m].
        test: Kernel of the test rows, plus the noise for new observations: [*batch, m, m] if joint,
            its diagonal [*batch, m] otherwise.
        joint: Whether the dependence between test rows is wanted.

    Raises:
        ShapeError: the shapes do not match.

    Example:
        >>> eye = torch.eye(2).double()
        >>> given = conditional(eye, eye[:, :1], 0.5 * eye, torch.ones(2).double())
        >>> given.location.squeeze(-1).tolist(), given.scale.tolist()
        ([0.5, 0.0], [0.75, 0.75])
    """
    _check_rows(cholesky, y, "Cholesky factor")
    _check_test(cross, test, y.shape[-2], joint)
    half_cross = torch.linalg.solve_triangular(cholesky, cross, upper=False)
    half_y = torch.linalg.solve_triangular(cholesky, y, upper=False)
    location = half_cross.mT @ half_y
    if joint:
        unit = test.diagonal(dim1=-2, dim2=-1).mean(-1)
        return Conditional(location, test - half_cross.mT @ half_cross, True, unit)
    return Conditional(location, _positive(test - half_cross.square().sum(-2), test), False)


def _check_test(cross: Tensor, test: Tensor, n: int, joint: bool) -> None:
    m = cross.shape[-1] if cross.ndim >= 2 else None
    want = (m, m) if joint else (m,)
    if m is None or cross.shape[-2] != n or test.shape[-len(want) :] != want:
        raise ShapeError(
            f"expected cross [*batch, n={n}, m] and test [*batch, {'m, m' if joint else 'm'}], got "
            f"{tuple(cross.shape)} and {tuple(test.shape)}"
        )


def _positive(variance: Tensor, prior: Tensor) -> Tensor:
    """Lift variances that rounding has made zero or negative to the rounding level itself."""
    return torch.maximum(variance, torch.finfo(variance.dtype).eps * prior)


def predictive(
    posterior: ScaleLaw, given: Conditional, *, squeeze: bool = False
) -> PredictiveParts:
    """Mix the Gaussian conditional over the posterior of sigma^2.

    An inverse gamma posterior (a, b) gives a Student-t law with df = 2 a, location m and scale
    matrix (b / a) V; a point mass a normal law; any other a mixture of normals over the nodes. All
    rows and outputs share one sigma^2.

    Args:
        posterior: From :func:`scale_posterior` with :class:`SufficientStats`.
        given: From :func:`conditional`.
        squeeze: Leave out the output dim of a single output.

    Returns:
        Marginal laws [*batch, m, C], or, for a joint conditional, laws with event shape [m, C].

    Raises:
        ShapeError: ``squeeze`` with several outputs.
        CapabilityError: ``posterior`` is neither closed nor by quadrature.

    Example:
        >>> given = Conditional(torch.zeros(2, 1), torch.ones(2), False)
        >>> law = predictive(InverseGamma(torch.tensor(3.0), torch.tensor(2.0)), given).dist
        >>> law.df[0].item(), round(law.scale[0].item() ** 2, 6)
        (6.0, 0.666667)
    """
    df: Tensor | None = None
    log_weights: Tensor | None = None
    if isinstance(posterior, InverseGamma):
        df, amplitude = (
            2 * posterior.concentration,
            (posterior.rate / posterior.concentration).sqrt(),
        )
    elif isinstance(posterior, PointMass):
        amplitude = posterior.value.sqrt()
    elif isinstance(posterior, ScalePosterior):
        amplitude, log_weights = (0.5 * posterior.quadrature.nodes).exp(), posterior.log_weights
    else:
        raise CapabilityError(
            f"expected a posterior from scale_posterior, got {type(posterior).__name__}"
        )
    if given.joint:
        tril, _ = safe_cholesky(given.scale, unit=given.unit)
        return PredictiveParts(_joint(df, given.location, tril, amplitude, squeeze), log_weights)
    scale = amplitude.unsqueeze(-1) * given.scale.sqrt()
    return PredictiveParts(_marginal(df, given.location, scale, squeeze), log_weights)


def _marginal(df: Tensor | None, loc: Tensor, scale: Tensor, squeeze: bool) -> Distribution:
    """Laws of each entry from loc [*batch, m, C] and scale [*batch, m]."""
    scale = scale.unsqueeze(-1)
    shape = torch.broadcast_shapes(loc.shape, scale.shape)
    loc, scale = loc.expand(shape), scale.expand(shape)
    if df is not None:
        df = df[..., None, None].expand(shape)
    if squeeze:
        _check_single(loc)
        loc, scale = loc.squeeze(-1), scale.squeeze(-1)
        df = None if df is None else df.squeeze(-1)
    if df is None:
        return Normal(loc, scale, validate_args=False)
    return D.StudentT(df, loc, scale, validate_args=False)


def _joint(
    df: Tensor | None, loc: Tensor, tril: Tensor, amplitude: Tensor | float, squeeze: bool
) -> Distribution:
    """Joint law of all rows and outputs from loc [*batch, m, C] and a factor [*batch, m, m]."""
    if squeeze:
        _check_single(loc)
        single = loc.squeeze(-1)
        if df is None:
            return D.ScaledMultivariateNormal(single, tril, amplitude)
        return D.MultivariateStudentT(df, single, tril, amplitude)
    if df is None:
        return D.MultiOutputNormal(loc, tril, amplitude)
    return D.MultiOutputStudentT(df, loc, tril, amplitude)


def _check_single(loc: Tensor) -> None:
    if loc.shape[-1] != 1:
        raise ShapeError(f"squeeze leaves out the dim of ONE output, got {loc.shape[-1]} outputs")


# --------------------------------------------------------------------------- noise outside


@storable
@dataclass(frozen=True)
class SpectralStats:
    """What y | sigma^2 ~ N(0, sigma^2 K + noise I) depends on: the spectrum of K.

    Attributes:
        gram: K without noise [*batch, n, n].
        y: Targets [*batch, n, C].
        noise_var: Noise variance [*batch].
        eigenvalues: Of K, at least 0 [*batch, n]; detached.
        eigenvectors: Of K, in columns [*batch, n, n]; detached.
    """

    gram: Tensor
    y: Tensor
    noise_var: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.y.shape[-2])

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return int(self.y.shape[-1])

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape [*batch]."""
        return self.noise_var.shape

    @property
    def reference(self) -> Tensor:
        """A tensor with the dtype and device of the data."""
        return self.noise_var

    def log_likelihood(self, u: Tensor) -> Tensor:
        """Return log p(y | sigma^2 = exp u) for u [*sample, *batch]; O(n C) for each value."""
        result: Tensor = _SpectralLogLikelihood.apply(
            self.gram, self.y, self.noise_var, u, self.eigenvalues, self.eigenvectors
        )
        return result

    def map_batch(self, shape: torch.Size, change: Change) -> SpectralStats:
        """Expand to batch shape ``shape`` and apply ``change`` to the leading batch dims."""
        rank = len(self.batch_shape)
        parts = (self.gram, self.y, self.noise_var, self.eigenvalues, self.eigenvectors)
        return SpectralStats(*(change(v.expand(shape + v.shape[rank:])) for v in parts))


def spectral_stats(gram: Tensor, y: Tensor, noise_var: Tensor | float) -> SpectralStats:
    """Decompose K once, for noise that the scale does not multiply.

    Args:
        gram: K without noise [*batch, n, n].
        y: Targets [*batch, n, C].
        noise_var: Noise variance > 0 [*batch].

    Returns:
        Statistics whose log likelihood is differentiable (once) in ``gram``, ``y`` and
        ``noise_var``, also where eigenvalues repeat.

    Raises:
        ShapeError: the shapes do not match.
        DataError: the noise variance is not positive.

    Example:
        >>> stats = spectral_stats(torch.eye(3).double(), torch.ones(3, 1).double(), 1.0)
        >>> u = torch.zeros(()).double()
        >>> density = stats.log_likelihood(u).exp().item()
        >>> round(density / (math.exp(-0.75) / (4 * math.pi) ** 1.5), 9)
        1.0
    """
    _check_rows(gram, y, "Gram matrix")
    noise_var = torch.as_tensor(noise_var, dtype=gram.dtype, device=gram.device)
    if not bool((noise_var > 0).all()):
        raise DataError(f"noise_var must be > 0, got {float(noise_var.min()):g}")
    batch = torch.broadcast_shapes(gram.shape[:-2], y.shape[:-2], noise_var.shape)
    with torch.no_grad():
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    return SpectralStats(
        gram.expand(batch + gram.shape[-2:]),
        y.expand(batch + y.shape[-2:]),
        noise_var.expand(batch),
        eigenvalues.clamp_min(0).expand(batch + eigenvalues.shape[-1:]),
        eigenvectors.expand(batch + eigenvectors.shape[-2:]),
    )


@storable
@dataclass(frozen=True)
class PaddedStats:
    """Statistics of matrices of different sizes, filled up to one size with zeros.

    A padding row has eigenvalue zero and target zero, so it adds the density of ``noise_var`` at
    zero, which is taken off again.

    Attributes:
        base: Statistics of the padded matrices.
        padding: Number of padding rows [*batch].
    """

    base: SpectralStats
    padding: Tensor

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape [*batch]."""
        return self.base.batch_shape

    @property
    def reference(self) -> Tensor:
        """A tensor with the dtype and device of the data."""
        return self.base.reference

    def log_likelihood(self, u: Tensor) -> Tensor:
        """Return log p(y | sigma^2 = exp u) for u [*sample, *batch]."""
        extra = -0.5 * self.padding * self.base.outputs
        surplus = extra * (math.log(2 * math.pi) + self.base.noise_var.log())
        return self.base.log_likelihood(u) - surplus

    def map_batch(self, shape: torch.Size, change: Change) -> PaddedStats:
        """Expand to batch shape ``shape`` and apply ``change`` to the leading batch dims."""
        return PaddedStats(self.base.map_batch(shape, change), change(self.padding.expand(shape)))


class _SpectralLogLikelihood(torch.autograd.Function):
    """log N(y; 0, exp(u) K + noise I) with the derivatives of the matrix formula.

    Autograd through an eigendecomposition divides by differences of eigenvalues, which is NaN for
    repeated rows; the derivative of this function needs no such quotient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gram: Tensor,
        y: Tensor,
        noise_var: Tensor,
        u: Tensor,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
    ) -> Tensor:
        scale = u.exp().unsqueeze(-1)
        d = scale * eigenvalues + noise_var.unsqueeze(-1)  # [*sample, *batch, n]
        projected = eigenvectors.mT @ y  # [*batch, n, C]
        squares = projected.square().sum(-1)
        ctx.save_for_backward(scale, d, projected, squares, eigenvalues, eigenvectors)
        ctx.sample_dims = u.ndim - noise_var.ndim
        outputs = y.shape[-1]
        value = outputs * (d.log() + math.log(2 * math.pi)) + squares / d
        return -0.5 * value.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, d, projected, squares, eigenvalues, eigenvectors = ctx.saved_tensors
        outputs = projected.shape[-1]
        g = grad.unsqueeze(-1)
        samples = list(range(ctx.sample_dims))

        def over_samples(value: Tensor) -> Tensor:
            return value.sum(samples) if samples else value

        grad_gram = grad_y = grad_noise = grad_u = None
        slope = -0.5 * (outputs / d - squares / d.square())  # d value / d d
        if ctx.needs_input_grad[0]:
            r = 1 / d
            left, right = (g * scale * r), r
            if samples:
                left, right = left.flatten(0, samples[-1]), right.flatten(0, samples[-1])
                pairs = torch.einsum("s...i,s...j->...ij", left, right)
            else:
                pairs = left.unsqueeze(-1) * right.unsqueeze(-2)
            core = pairs * (projected @ projected.mT)
            core = core - outputs * torch.diag_embed(over_samples(g * scale * r))
            grad_gram = 0.5 * eigenvectors @ core @ eigenvectors.mT
        if ctx.needs_input_grad[1]:
            grad_y = -eigenvectors @ (over_samples(g / d).unsqueeze(-1) * projected)
        if ctx.needs_input_grad[2]:
            grad_noise = over_samples(g * slope).sum(-1)
        if ctx.needs_input_grad[3]:
            grad_u = (g * slope * scale * eigenvalues).sum(-1)
        return grad_gram, grad_y, grad_noise, grad_u, None, None


def spectral_predictive(
    posterior: ScaleLaw,
    stats: SpectralStats,
    cross: Tensor,
    test: Tensor,
    *,
    joint: bool = False,
    observation: bool = True,
    squeeze: bool = False,
) -> PredictiveParts:
    """Predict with noise outside the scale: a normal mixture whose means differ between nodes.

    Given sigma^2, with K = Q diag(l) Q' and A = K*' Q: mean = A diag(1 / (l + r)) Q' y and variance
    = sigma^2 (K** - A diag(1 / (l + r)) A') (+ noise), where r = noise / sigma^2.

    Args:
        posterior: From :func:`scale_posterior` with ``stats``.
        stats: From :func:`spectral_stats`.
        cross: Kernel between training and test rows [*batch, n, m].
        test: Kernel of the test rows WITHOUT noise: [*batch, m, m] if joint, else its diagonal.
        joint: Whether the dependence between test rows is wanted.
        observation: Whether to predict new observations (noise added) or the latent function.
        squeeze: Leave out the output dim of a single output.

    Returns:
        Components [node, *batch, m, C] with their weights; for a point mass the law itself.
        Gradients flow through ``cross`` and ``test``, not through the eigendecomposition.

    Raises:
        ShapeError: the shapes do not match.
        CapabilityError: ``posterior`` is not from :func:`scale_posterior`.
        DataError: a joint prediction does not fit into memory.
    """
    _check_test(cross, test, stats.n, joint)
    if isinstance(posterior, PointMass):
        scale, log_weights = posterior.value, None
    elif isinstance(posterior, ScalePosterior):
        scale, log_weights = posterior.nodes, posterior.log_weights
    else:
        raise CapabilityError(
            f"expected a posterior from scale_posterior, got {type(posterior).__name__}"
        )
    a = cross.mT @ stats.eigenvectors  # [*batch, m, n]
    projected = stats.eigenvectors.mT @ stats.y  # [*batch, n, C]
    shrink = 1 / (stats.eigenvalues + (stats.noise_var / scale).unsqueeze(-1))  # [node, *batch, n]
    location = a @ (shrink.unsqueeze(-1) * projected)
    noise = (stats.noise_var if observation else torch.zeros_like(stats.noise_var)).unsqueeze(-1)
    if not joint:
        explained = (a.square() @ shrink.unsqueeze(-1)).squeeze(-1)
        variance = scale.unsqueeze(-1) * _positive(test - explained, test) + noise
        return PredictiveParts(_marginal(None, location, variance.sqrt(), squeeze), log_weights)
    m = test.shape[-1]
    check_allocation(
        3 * scale.numel() * m * m * a.element_size(),
        f"joint prediction of {m} rows at {scale.shape[0] if scale.ndim else 1} scales",
        device=a.device,
    )
    explained = (a * shrink.unsqueeze(-2)) @ a.mT
    covariance = scale[..., None, None] * (test - explained) + torch.diag_embed(
        noise.expand(noise.shape[:-1] + (m,))
    )
    unit = scale * test.diagonal(dim1=-2, dim2=-1).mean(-1)
    tril, _ = safe_cholesky(covariance, unit=unit)
    return PredictiveParts(_joint(None, location, tril, 1.0, squeeze), log_weights)
