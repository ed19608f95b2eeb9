"""Posterior laws of the weights: element-wise marginals, and a joint law with exact draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from probkit.distributions.quantiles import marginals
from probkit.errors import CapabilityError
from probkit.files import register
from probkit.models.sbl.kronecker_e_step import kronecker_spectrum
from probkit.models.sbl.linear_algebra import hermitian_cholesky, solve_with_factor
from probkit.models.sbl.missing import MaskedCovariance
from probkit.models.sbl.mode_products import mode_products, outer
from probkit.models.sbl.moments import abs_square
from probkit.models.sbl.problem import moments_of
from probkit.models.sbl.pruning import Reduction, reduce

__all__ = ["ComplexNormal", "WeightLaw", "complex_number", "elementwise_law", "weight_law"]


_CHUNK = 2_000_000  # numbers drawn at a time


class _ComplexNumber(Constraint):
    """Any finite complex number; it has no map to a real vector, so gradient samplers refuse it."""

    def check(self, value: Tensor) -> Tensor:
        return torch.isfinite(value.real) & torch.isfinite(value.imag)


complex_number = _ComplexNumber()


class ComplexNormal(TorchDistribution):
    """Circular complex normal CN(loc, scale^2): real and imaginary part have variance scale^2 / 2.

    The density is with respect to the plane: exp(-|z - loc|^2 / scale^2) / (pi scale^2).

    Args:
        loc: Complex mean [*batch].
        scale: Root of E|z - loc|^2 [*batch], real.

    Example:
        >>> law = ComplexNormal(torch.tensor(1 + 2j), torch.tensor(2.0))
        >>> law.variance, law.real.scale
        (tensor(4.), tensor(1.4142))
    """

    arg_constraints = {"loc": complex_number, "scale": constraints.nonnegative}
    support = complex_number
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The complex mean [*batch]."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """E|z - mean|^2 [*batch], real."""
        return self.scale.square()

    @property
    def real(self) -> td.Normal:
        """Law of the real part."""
        return td.Normal(self.loc.real, self.scale / math.sqrt(2), validate_args=False)

    @property
    def imag(self) -> td.Normal:
        """Law of the imaginary part."""
        return td.Normal(self.loc.imag, self.scale / math.sqrt(2), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch]."""
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)),
            dtype=self.loc.dtype,
            device=self.loc.device,
        )
        return self.loc + self.scale * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the plane [*batch]."""
        variance = self.scale.square()
        return -abs_square(value - self.loc) / variance - (math.pi * variance).log()

    def expand(self, batch_shape: Any, _instance: Any = None) -> ComplexNormal:
        """Return the law with batch shape ``batch_shape``."""
        shape = torch.Size(batch_shape)
        return ComplexNormal(self.loc.expand(shape), self.scale.expand(shape), validate_args=False)


def elementwise_law(mean: Tensor, variance: Tensor) -> td.Normal | ComplexNormal:
    """Normal or circular complex normal marginals; a pruned weight has scale zero."""
    law = ComplexNormal if mean.is_complex() else td.Normal
    return law(mean, variance.sqrt(), validate_args=False)


class WeightLaw(TorchDistribution):
    """The joint posterior of all weights, N(mean, Sigma), without Sigma.

    x | y ~ (C)N with x_j ~ (C)N(0, g_j) a priori, g = g_1 kron ... kron g_I, and data
    y = (H_1 kron ... kron H_I) x + n. Draws are exact, by perturbation ("Matheron's rule"): with
    x' from the prior and n' from the noise, x' + G H^H C^{-1} (y - H x' - n') follows the
    posterior. With several modes C^{-1} is applied through the spectra of the factors.

    Args:
        factors: H_i [*problem, M_i, N_i]; one for plain problems.
        variances: g_i [*batch, *problem, N_i].
        noise_var: s2 [*batch, *problem].
        y: [*problem, snapshot, M_1, ..., M_I].
        mean: Posterior mean [*batch, *problem, snapshot, N_1, ..., N_I].
        variance: Posterior variances [*batch, *problem, N_1, ..., N_I].
        log_evidence: log p(y | g, s2) [*batch, *problem].
        observed: 1.0 where y was seen [*problem, M_1, ..., M_I]; None where all of it was.
        shared: Whether the snapshot dim belongs to the event: [*problem, N_1, ..., N_I, snapshot].

    The event is [*problem, N_1, ..., N_I] (and [snapshot] at the end where ``shared``).
    """

    arg_constraints: dict[str, Constraint] = {}
    has_rsample = False

    def __init__(
        self,
        factors: Sequence[Tensor],
        variances: Sequence[Tensor],
        noise_var: Tensor,
        y: Tensor,
        mean: Tensor,
        variance: Tensor,
        log_evidence: Tensor,
        observed: Tensor | None = None,
        shared: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.factors, self.variances = list(factors), list(variances)
        self.log_evidence, self.observed = log_evidence, observed
        self.noise_var, self.y, self.shared = noise_var, y, shared
        self._moments = mean, variance
        problem = y.ndim - 1 - len(self.factors)
        self.problem_dims = problem
        batch = noise_var.shape[: noise_var.ndim - problem]
        event = self._public(mean).shape[len(batch) :]
        super().__init__(batch, event, validate_args=False)

    @property
    def support(self) -> Constraint:
        """All numbers of the data's field."""
        base = complex_number if self.y.is_complex() else constraints.real
        return constraints.independent(base, len(self.event_shape))

    def _public(self, weights: Tensor) -> Tensor:
        """[..., snapshot, N_1, ..., N_I] -> the event's layout."""
        dim = weights.ndim - 1 - len(self.factors)
        return weights.movedim(dim, -1) if self.shared else weights.squeeze(dim)

    @property
    def sizes(self) -> tuple[int, ...]:
        """N_1, ..., N_I."""
        return tuple(int(factor.shape[-1]) for factor in self.factors)

    @property
    def internal_mean(self) -> Tensor:
        """Posterior mean [*batch, *problem, snapshot, N_1, ..., N_I]."""
        return self._moments[0]

    @property
    def mean(self) -> Tensor:
        """Posterior mean [*batch, *event]."""
        return self._public(self._moments[0])

    @property
    def variance(self) -> Tensor:
        """Posterior variances [*batch, *event]."""
        variance = self._moments[1].unsqueeze(-1 - len(self.factors))
        return self._public(variance.expand(self._moments[0].shape))

    def marginal(self) -> td.Normal | ComplexNormal:
        """Element-wise law with batch shape [*batch, *event]."""
        return elementwise_law(self.mean, self.variance)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event], in chunks of bounded size."""
        shape = torch.Size(sample_shape)
        total = shape.numel()
        size = self._moments[0].numel() + self.batch_shape.numel() * self.y.numel()
        chunk = max(1, _CHUNK // size)
        with torch.no_grad():
            back = self._back_projection()
            draws = [self._draw(back, min(chunk, total - k)) for k in range(0, total, chunk)]
        return torch.cat(draws).reshape(shape + self.batch_shape + self.event_shape)

    def _draw(self, back: Callable[[Tensor], Tensor], count: int) -> Tensor:
        modes = len(self.factors)
        root = outer([part.sqrt() for part in self.variances]).unsqueeze(-modes - 1)
        shape = (count, *self._moments[0].shape)
        prior = root * torch.randn(shape, dtype=self.y.dtype, device=self.y.device)
        field = mode_products(prior, [factor.unsqueeze(-3) for factor in self.factors])
        noise = torch.randn(field.shape, dtype=field.dtype, device=field.device)
        scale = self.noise_var.sqrt().reshape(self.noise_var.shape + (1,) * (modes + 1))
        return self._public(prior + root.square() * back(self.y - field - scale * noise))

    def _back_projection(self) -> Callable[[Tensor], Tensor]:
        """The map from a misfit [..., snapshot, M_1, ..., M_I] to H^H C^{-1} misfit."""
        if self.observed is not None:
            system = self.masked_covariance()
            return lambda misfit: system.back(system.solve(system.mask * misfit))
        if len(self.factors) == 1:
            return self._dense_back_projection()
        modes = len(self.factors)
        spectrum = kronecker_spectrum(self.factors, self.variances, self.noise_var)

        def apply(misfit: Tensor) -> Tensor:
            turned = mode_products(misfit, [vector.mH.unsqueeze(-3) for vector in spectrum.vectors])
            solved = turned / spectrum.values.unsqueeze(-modes - 1)
            return mode_products(solved, [part.unsqueeze(-3) for part in spectrum.crossed])

        return apply

    def masked_covariance(self) -> MaskedCovariance:
        """The covariance of the observed entries."""
        assert self.observed is not None
        return MaskedCovariance(self.factors, self.variances, self.noise_var, self.observed)

    def _dense_back_projection(self) -> Callable[[Tensor], Tensor]:
        """One Cholesky factor of size M or N, whichever is less."""
        (dictionary,), (variance,) = self.factors, self.variances
        rows, columns = dictionary.shape[-2:]
        noise = self.noise_var.unsqueeze(-1)
        root = variance.sqrt().unsqueeze(-1)
        if rows <= columns:
            inner = (dictionary * variance.unsqueeze(-2)) @ dictionary.mH
        else:
            inner = root * (dictionary.mH @ dictionary) * root.mT
        factor = hermitian_cholesky(inner + torch.diag_embed(noise.expand(inner.shape[:-1])))

        def in_data(misfit: Tensor) -> Tensor:
            return (dictionary.mH @ solve_with_factor(factor, misfit.mT)).mT

        def in_weights(misfit: Tensor) -> Tensor:
            fit = root * solve_with_factor(factor, root * (dictionary.mH @ misfit.mT))
            error = misfit.mT - dictionary @ fit
            return (dictionary.mH @ error).mT / noise.unsqueeze(-1)

        return in_data if rows <= columns else in_weights

    def log_prob(self, value: Tensor) -> Tensor:
        """Refuse: a law with pruned weights has no density; see :meth:`marginal`."""
        raise CapabilityError(
            "the joint law of the weights gives draws and marginals, no density; use marginal()"
        )

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> WeightLaw:
        """Apply ``change`` to the leading batch dims of what varies along them."""
        mean, variance = self._moments
        return WeightLaw(
            self.factors,
            [change(part) for part in self.variances],
            change(self.noise_var),
            self.y,
            change(mean),
            change(variance),
            change(self.log_evidence),
            self.observed,
            self.shared,
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> WeightLaw:
        """Return the law with batch shape ``batch_shape``."""
        old, new = len(self.batch_shape), torch.Size(batch_shape)
        return self.map_batch(lambda value: value.expand(new + value.shape[old:]))


def weight_law(
    factors: Sequence[Tensor],
    variances: Sequence[Tensor],
    noise_var: Tensor,
    y: Tensor,
    observed: Tensor | None = None,
    shared: bool = False,
) -> WeightLaw:
    """Condition on y: one E-step on the columns in use, zeros elsewhere.

    Arguments as those of :class:`WeightLaw`.
    """
    reduction = reduce(variances)
    small, kept = reduction.columns(factors), reduction.columns(variances)
    moments = moments_of(small, kept, noise_var, y, observed)
    sizes = [int(factor.shape[-1]) for factor in factors]
    return WeightLaw(
        factors=[factor.contiguous() for factor in factors],
        variances=[part.contiguous() for part in variances],
        noise_var=noise_var.contiguous(),
        y=y.contiguous(),
        mean=_spread(moments.mean, reduction, sizes),
        variance=_spread(moments.variance, reduction, sizes),
        log_evidence=moments.log_evidence.contiguous(),
        observed=observed,
        shared=shared,
    )


def _spread(tensor: Tensor, reduction: Reduction, sizes: Sequence[int]) -> Tensor:
    """Put the columns in use back to their places in every mode."""
    modes = len(sizes)
    for mode, (keep, size) in enumerate(zip(reduction.kept, sizes, strict=True)):
        if keep is not None:
            dim = tensor.ndim - modes + mode
            shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
            tensor = tensor.new_zeros(shape).index_copy(dim, keep, tensor)
    return tensor.contiguous()


@marginals.register
def _(dist: WeightLaw) -> Distribution:
    return dist.marginal()


def _to_tree(law: WeightLaw) -> dict[str, Any]:
    mean, variance = law._moments
    return {
        "factors": law.factors,
        "variances": law.variances,
        "noise_var": law.noise_var,
        "y": law.y,
        "mean": mean,
        "variance": variance,
        "log_evidence": law.log_evidence,
        "observed": law.observed,
        "shared": law.shared,
    }


register(WeightLaw, "WeightLaw", _to_tree, lambda tree: WeightLaw(**tree))
register(
    ComplexNormal,
    "ComplexNormal",
    lambda law: {"loc": law.loc, "scale": law.scale},
    lambda tree: ComplexNormal(**tree, validate_args=False),
)
