"""Gaussian processes: today's default of BoTorch, the preset of published rankings, noise-free."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from botorch.models.utils.gpytorch_modules import (
    get_gaussian_likelihood_with_gamma_prior,
    get_gaussian_likelihood_with_lognormal_prior,
    get_matern_kernel_with_gamma_prior,
)
from gpytorch.kernels import Kernel, MaternKernel, ProductKernel, ScaleKernel
from gpytorch.priors import GammaPrior
from torch import Tensor

from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.dense_gp import DenseGP
from probkit.bo.surrogates.encoding import Encode
from probkit.bo.surrogates.gp_fit import fit_map, hyper_parameters
from probkit.bo.surrogates.hamming import MixedKernel, smooth_kernel
from probkit.bo.surrogates.outcomes import outcome_transform
from probkit.errors import DataError
from probkit.files import storable
from probkit.rng import Rng

__all__ = ["GPSurrogate", "fit_dense"]

_SEARCH_EVERY = 4  # Rows from one search from the prior's mode to the next.
_EXACT = 1.0001e-6  # Of the variance of the outcomes; GPyTorch rounds what is below 1e-6.


@storable
@dataclass(frozen=True)
class GPSurrogate(Surrogate):
    """An exact Gaussian process, a ``SingleTaskGP``, its hyper-parameters at their MAP values.

    "default" is BoTorch's: no output scale, length scales LogNormal(sqrt(2) + log(d) / 2, sqrt(3)),
    noise LogNormal(-4, 1) above 1e-4. "paper" is BoTorch's of 2023, which published comparisons of
    neural surrogates used: scaled Matern 5/2, length scales Gamma(3, 6), output scale
    Gamma(2, 0.15), noise Gamma(1.1, 0.05). Categories are compared by equality.

    Args:
        preset: "default" or "paper".
        kernel: For the default preset: "rbf", BoTorch's; "matern", Matern 5/2; "auto", the latter
            for outcomes free of noise, where the smoothness of the former makes it too sure.
        noise: "learned", or "none" for outcomes that are exact: then the noise is a millionth of
            their variance, far below the floor of a learned one. Known variances win over both.

    Example:
        >>> from probkit.bo import make_surrogate
        >>> x = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
        >>> model = make_surrogate(GPSurrogate(noise="none"), x, x.sin(), rng=0)
        >>> bool((model.posterior(x).mean - x.sin()).abs().max() < 1e-3)
        True
    """

    preset: Literal["default", "paper"] = "default"
    kernel: Literal["auto", "rbf", "matern"] = "auto"
    noise: Literal["learned", "none"] = "learned"

    def __post_init__(self) -> None:
        if self.preset not in ("default", "paper"):
            raise DataError(f"preset: expected 'default' or 'paper', got {self.preset!r}")
        if self.kernel not in ("auto", "rbf", "matern"):
            raise DataError(f"kernel: expected 'auto', 'rbf' or 'matern', got {self.kernel!r}")
        if self.noise not in ("learned", "none"):
            raise DataError(f"noise: expected 'learned' or 'none', got {self.noise!r}")

    def _smoothness(self, data: TrainingData) -> str:
        if self.kernel != "auto":
            return self.kernel
        exact = self.noise == "none" or (data.Yvar is not None and not bool(data.Yvar.any()))
        return "matern" if exact else "rbf"

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> DenseGP:
        """Fit hyper-parameters from their prior modes and from those of the last round."""
        domain = data.domain
        if self.preset == "default":
            smoothness = self._smoothness(data)
            kernel: Kernel = smooth_kernel(domain.size, domain.categorical, smoothness)
        else:
            kernel = _paper_kernel(data)
        return fit_dense(
            data,
            kernel,
            Encode(domain),
            paper_noise=self.preset == "paper",
            exact=self.noise == "none",
            previous=previous,
        )


def _paper_kernel(data: TrainingData) -> Kernel:
    """Scaled Matern 5/2 with Gamma priors; a factor for the agreement of categories."""
    domain = data.domain
    if not domain.categorical:
        return get_matern_kernel_with_gamma_prior(ard_num_dims=domain.size)
    agreement = MixedKernel(domain.size, domain.categorical)
    agreement.ordinal = ()
    if not domain.ordinal:
        return ScaleKernel(agreement, outputscale_prior=GammaPrior(2.0, 0.15))
    distance = MaternKernel(
        nu=2.5,
        ard_num_dims=len(domain.ordinal),
        active_dims=list(domain.ordinal),
        lengthscale_prior=GammaPrior(3.0, 6.0),
    )
    return ScaleKernel(ProductKernel(distance, agreement), outputscale_prior=GammaPrior(2.0, 0.15))


def fit_dense(
    data: TrainingData,
    kernel: Kernel,
    encode: Encode,
    *,
    paper_noise: bool = False,
    exact: bool = False,
    previous: Mapping[str, Any] | None = None,
) -> DenseGP:
    """Make a Gaussian process of one output and fit what its kernel, mean and noise leave free.

    Args:
        data: One output.
        kernel: Covariance on the encoded inputs.
        encode: Their encoding.
        paper_noise: Whether the noise has the prior Gamma(1.1, 0.05) in place of LogNormal(-4, 1).
        exact: Whether the outcomes are free of noise.
        previous: Hyper-parameters of the last round, to start from as well.
    """
    model = dense_model(data, kernel, encode, paper_noise=paper_noise, exact=exact)
    # The mode of the last round leads to that of this one; now and then all is searched again.
    again = len(data.Y) % _SEARCH_EVERY == 0
    fit_map(model, [] if previous is None else [previous], own_start=again)
    return finished(model)


def finished(model: DenseGP) -> DenseGP:
    """Note the hyper-parameters for the next round and freeze them: gradients go to inputs."""
    model.warm_state = hyper_parameters(model)
    model.requires_grad_(False)
    model.eval()
    return model


def dense_model(
    data: TrainingData,
    kernel: Kernel,
    encode: Encode,
    *,
    paper_noise: bool = False,
    exact: bool = False,
) -> DenseGP:
    """Make a Gaussian process of one output, not fitted; arguments as for :func:`fit_dense`."""
    likelihood = None
    variance = _variance(data, exact)
    if variance is None:
        make = (
            get_gaussian_likelihood_with_gamma_prior
            if paper_noise
            else get_gaussian_likelihood_with_lognormal_prior
        )
        likelihood = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPyTorch says that it rounds tiny variances up.
        return DenseGP(
            data.X,
            data.Y,
            variance,
            likelihood=likelihood,
            covar_module=kernel,
            outcome_transform=outcome_transform(data.outcome, 1),
            input_transform=encode,
        )


def _variance(data: TrainingData, exact: bool) -> Tensor | None:
    """Return the known variances [row, 1], at least that of exact outcomes; None to learn it."""
    if data.Yvar is None and not exact:
        return None
    floor = _EXACT * _spread(data)
    return floor if data.Yvar is None else torch.maximum(data.Yvar, floor)


def _spread(data: TrainingData) -> Tensor:
    """The variance [row, 1] that the outcomes have for the model, in their own units.

    Behind a transform that withstands heavy tails it is not that of the outcomes themselves.
    """
    if data.outcome in ("winsorize", "rank"):
        transform = outcome_transform(data.outcome, 1)
        values, slopes = transform(data.Y, torch.ones_like(data.Y))  # type: ignore[misc]
        spread = values.var(0, keepdim=True) / slopes
    else:
        spread = data.Y.var(0, keepdim=True).expand_as(data.Y).clone()
    return torch.where(spread > 0, spread, 1.0)
