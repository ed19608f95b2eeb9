"""Closed-form acquisition functions for Student-t posteriors and finite mixtures.

BoTorch's analytic acquisition functions assume Gaussians. These take any posterior of one point and
one output that is Gaussian, Student-t or a finite mixture of either, as scale-mixture models give.

Expected improvement of a mixture is the weighted sum of those of its components. With
z = (mean - best) / scale, that of a Student-t law with df > 1 is
scale (z F(z) + (df + z^2) / (df - 1) f(z)), F and f its standard distribution function and density
(Shah, Wilson and Ghahramani, "Student-t Processes as Alternatives to Gaussian Processes", AISTATS
2014, section 4), and that of a Gaussian its limit scale (z Phi(z) + phi(z)).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor
from torch.distributions import Distribution, Normal

from probkit import distributions as D
from probkit._botorch_posterior import PredictivePosterior
from probkit.distributions.student_t import student_log_prob
from probkit.errors import CapabilityError, DataError, ShapeError

__all__ = [
    "LogStudentTExpectedImprovement",
    "StudentTExpectedImprovement",
    "StudentTUpperConfidenceBound",
]


class _Components(NamedTuple):
    """The law of one entry as a mixture.

    Attributes:
        loc: [component, *batch].
        scale: [component, *batch].
        df: [component, *batch]; None for Gaussians.
        log_weights: [component], normalised.
    """

    loc: Tensor
    scale: Tensor
    df: Tensor | None
    log_weights: Tensor


def _components(posterior: Posterior) -> _Components:
    """Read the law of one point and one output.

    Raises:
        CapabilityError: The posterior has no such form, or several outputs.
    """
    if isinstance(posterior, PredictivePosterior):
        if tuple(posterior.event_shape) != (1, 1):
            raise CapabilityError(
                f"expected one point and one output, got (q, m) = {tuple(posterior.event_shape)}; "
                "pass a posterior_transform that makes one output of several"
            )
        full = posterior.amplitude.shape
        loc = posterior.loc[..., 0, 0].expand(full)
        scale = posterior.amplitude * posterior.scale_tril[..., 0, 0].abs()
        return _Components(loc, scale, posterior.df, posterior.predictive.log_weights)
    if isinstance(posterior, GPyTorchPosterior):
        mean, variance = posterior.mean, posterior.variance
        if tuple(mean.shape[-2:]) != (1, 1):
            raise CapabilityError(
                f"expected one point and one output, got (q, m) = {tuple(mean.shape[-2:])}; pass a "
                "posterior_transform that makes one output of several"
            )
        one = torch.zeros(1, dtype=mean.dtype, device=mean.device)
        return _Components(mean[None, ..., 0, 0], variance[None, ..., 0, 0].sqrt(), None, one)
    raise CapabilityError(
        f"a closed form needs a Gaussian, a Student-t law or a mixture of them, got "
        f"{type(posterior).__name__}; use a Monte Carlo form, for example qLogExpectedImprovement"
    )


def _align(log_weights: Tensor, like: Tensor) -> Tensor:
    return log_weights.to(like).reshape(-1, *(1,) * (like.ndim - 1))


def _standard_improvement(z: Tensor, df: Tensor | None) -> Tensor:
    """E[(z + T)+] for a standard Student-t (or, without df, Gaussian) variable T."""
    if df is None:
        return z * torch.special.ndtr(z) + torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    if bool((df <= 1).any()):
        raise DataError(
            f"expected improvement is infinite for df <= 1, got df = {float(df.min()):g}; use "
            "StudentTUpperConfidenceBound, or a scale law with alpha > 1/2"
        )
    density = student_log_prob(df, 1, z.square(), torch.zeros_like(z)).exp()
    return z * D.student_t_cdf(df, z) + (df + z.square()) / (df - 1) * density


def _log_standard_improvement(z: Tensor, df: Tensor | None) -> Tensor:
    """Log of :func:`_standard_improvement`, for Gaussians down to z = -1e6."""
    if df is not None:
        return _standard_improvement(z, df).clamp_min(torch.finfo(z.dtype).tiny).log()
    near = _standard_improvement(z.clamp_min(-1.0), None).log()
    t = (-z).clamp_min(1.0)
    # phi(z) + z Phi(z) = phi(t) (1 - t Phi(-t) / phi(t)); the ratio is a scaled erfc.
    ratio = t * math.sqrt(0.5 * math.pi) * torch.special.erfcx(t / math.sqrt(2.0))
    far = -0.5 * t.square() - 0.5 * math.log(2 * math.pi) + torch.log1p(-ratio)
    return torch.where(z > -1.0, near, far)


class _OnePoint(AcquisitionFunction):
    """What the acquisition functions of this module share."""

    def __init__(
        self,
        model: Model,
        *,
        maximize: bool = True,
        posterior_transform: PosteriorTransform | None = None,
    ) -> None:
        super().__init__(model=model)
        self.maximize = bool(maximize)
        self.posterior_transform = posterior_transform

    def _law(self, X: Tensor) -> _Components:
        posterior = self.model.posterior(X, posterior_transform=self.posterior_transform)
        return _components(posterior)

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Refuse pending points, for which there is no closed form.

        Raises:
            CapabilityError: There are some.
        """
        if X_pending is not None:
            raise CapabilityError(
                f"{type(self).__name__} has no closed form with pending points; use "
                "qLogExpectedImprovement"
            )


class _Improvement(_OnePoint):
    """Improvement over the best value so far."""

    best_f: Tensor

    def __init__(
        self,
        model: Model,
        best_f: float | Tensor,
        *,
        maximize: bool = True,
        posterior_transform: PosteriorTransform | None = None,
    ) -> None:
        super().__init__(model, maximize=maximize, posterior_transform=posterior_transform)
        best = torch.as_tensor(best_f, dtype=torch.float64)  # a number would become float32
        if not bool(torch.isfinite(best).all()):
            raise DataError(f"best_f: expected finite numbers, got {best.tolist()}")
        self.register_buffer("best_f", best)

    def _z(self, law: _Components) -> Tensor:
        """Standardised improvement of the mean [component, *batch]."""
        best = self.best_f.to(law.loc)
        if best.ndim > law.loc.ndim - 1:
            raise ShapeError(
                f"best_f: expected a number or [*batch] = {tuple(law.loc.shape[1:])}, got "
                f"{tuple(best.shape)}"
            )
        gap = law.loc - best
        return (gap if self.maximize else -gap) / law.scale


class StudentTExpectedImprovement(_Improvement):
    """Expected improvement, exact for Student-t posteriors and mixtures.

    Args:
        model: A BoTorch model, such as ``posterior.to_botorch()``.
        best_f: Best value so far, a number or [*batch].
        maximize: Whether larger values are better.
        posterior_transform: Makes one output of several.

    Raises:
        DataError: ``best_f`` is not finite; on evaluation, a law without a mean (df <= 1).
        CapabilityError: On evaluation, a posterior of another form.

    Example:
        >>> import probkit as pk
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import ScaleMixtureNNGP
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> post = pk.infer(ScaleMixtureNNGP(NNGPKernel()), (x, x[:, 0].sin()), rng=0)
        >>> ei = StudentTExpectedImprovement(post.to_botorch(), best_f=0.5)
        >>> ei(torch.zeros(3, 1, 1, dtype=torch.float64)).shape
        torch.Size([3])
    """

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """Return the expected improvement [*batch] at ``X`` [*batch, 1, d]."""
        law = self._law(X)
        each = law.scale * _standard_improvement(self._z(law), law.df)
        return (_align(law.log_weights, each).exp() * each).sum(0)


class LogStudentTExpectedImprovement(_Improvement):
    """Logarithm of the expected improvement, which does not underflow far from the optimum.

    Args:
        model: A BoTorch model, such as ``posterior.to_botorch()``.
        best_f: Best value so far, a number or [*batch].
        maximize: Whether larger values are better.
        posterior_transform: Makes one output of several.

    Raises:
        DataError: ``best_f`` is not finite; on evaluation, a law without a mean (df <= 1).
        CapabilityError: On evaluation, a posterior of another form.

    Example:
        >>> import probkit as pk
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import ScaleMixtureNNGP
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> model = pk.infer(ScaleMixtureNNGP(NNGPKernel()), (x, x[:, 0].sin()), rng=0).to_botorch()
        >>> at = torch.zeros(1, 1, 1, dtype=torch.float64)
        >>> plain = StudentTExpectedImprovement(model, best_f=0.5)(at)
        >>> bool(torch.isclose(LogStudentTExpectedImprovement(model, best_f=0.5)(at), plain.log()))
        True
    """

    _log = True

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """Return the log expected improvement [*batch] at ``X`` [*batch, 1, d]."""
        law = self._law(X)
        each = law.scale.log() + _log_standard_improvement(self._z(law), law.df)
        return torch.logsumexp(_align(law.log_weights, each) + each, 0)


class StudentTUpperConfidenceBound(_OnePoint):
    """Quantile of the posterior: an upper confidence bound that honours its tails.

    For a Gaussian, ``level`` = Phi(sqrt(beta)) gives BoTorch's ``UpperConfidenceBound`` with that
    ``beta``; a Student-t law reaches further out for the same level.

    Args:
        model: A BoTorch model, such as ``posterior.to_botorch()``.
        level: Probability that the value lies below the bound (above it, when minimising).
        maximize: Whether larger values are better. Minimising, the acquisition value is minus the
            lower quantile.
        posterior_transform: Makes one output of several.

    Raises:
        DataError: ``level`` lies outside (0, 1).
        CapabilityError: On evaluation, a posterior of another form.

    Example:
        >>> import probkit as pk
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import ScaleMixtureNNGP
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> post = pk.infer(ScaleMixtureNNGP(NNGPKernel()), (x, x[:, 0].sin()), rng=0)
        >>> bound = StudentTUpperConfidenceBound(post.to_botorch(), level=0.9)
        >>> at = torch.zeros(1, 1, dtype=torch.float64)
        >>> bool(torch.isclose(bound(at[None]), post.predict(at, site="f").quantile(0.9)))
        True
    """

    def __init__(
        self,
        model: Model,
        level: float = 0.975,
        *,
        maximize: bool = True,
        posterior_transform: PosteriorTransform | None = None,
    ) -> None:
        super().__init__(model, maximize=maximize, posterior_transform=posterior_transform)
        if not 0.0 < level < 1.0:
            raise DataError(f"level: expected a probability strictly within (0, 1), got {level}")
        self.level = float(level)

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """Return the bound [*batch] at ``X`` [*batch, 1, d]."""
        law = self._law(X)
        level = self.level if self.maximize else 1.0 - self.level
        q = torch.full((), level, dtype=law.loc.dtype, device=law.loc.device)
        dist: Distribution = (
            Normal(law.loc, law.scale, validate_args=False)
            if law.df is None
            else D.StudentT(law.df, law.loc, law.scale, validate_args=False)
        )
        if len(law.log_weights) == 1:
            bound = D.icdf(dist, q)[0]
        else:
            bound = D.mixture_icdf(dist, law.log_weights, q)
        return bound if self.maximize else -bound
