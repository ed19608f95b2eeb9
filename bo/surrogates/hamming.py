"""A kernel for mixed inputs: ordinal columns by distance, categories by agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel as _Kernel
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from probkit.errors import DataError

__all__ = ["MixedKernel", "smooth_kernel"]

_SMALLEST = 2.5e-2


class MixedKernel(_Kernel):
    """k(x, x') = g(r), r^2 = sum_k (x_k - x'_k)^2 / l_k^2 + sum_c [x_c != x'_c] / l_c^2.

    The second sum is over category codes: different categories are one apart. g is exp(-r^2 / 2)
    or the Matern 5/2 correlation. Every column has a length scale with the prior of
    ``SingleTaskGP``, LogNormal(sqrt(2) + log(d) / 2, sqrt(3)).

    Args:
        features: Number of columns.
        categorical: Columns of category codes.
        smoothness: "rbf" or "matern".
    """

    has_lengthscale = True

    def __init__(
        self, features: int, categorical: Sequence[int] = (), smoothness: str = "rbf"
    ) -> None:
        if smoothness not in ("rbf", "matern"):
            raise DataError(f"smoothness: expected 'rbf' or 'matern', got {smoothness!r}")
        prior = LogNormalPrior(loc=math.sqrt(2) + 0.5 * math.log(features), scale=math.sqrt(3))
        super().__init__(
            ard_num_dims=features,
            lengthscale_prior=prior,
            lengthscale_constraint=GreaterThan(_SMALLEST, transform=None, initial_value=prior.mode),
        )
        self.categorical, self.smoothness = tuple(categorical), smoothness
        self.ordinal = tuple(k for k in range(features) if k not in self.categorical)

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **_: Any
    ) -> Tensor:
        """Return [*batch, n1, n2], or the diagonal [*batch, n]."""
        if diag:
            return torch.ones(
                torch.broadcast_shapes(x1.shape[:-1], x2.shape[:-1]), dtype=x1.dtype
            ).to(x1.device)
        scale = self.lengthscale
        square = self._ordinal(x1, x2, scale)
        if self.categorical:
            codes = list(self.categorical)
            differ = x1[..., :, None, codes] != x2[..., None, :, codes]
            square = square + differ.to(x1) @ scale[..., 0, codes].square().reciprocal()
        if self.smoothness == "rbf":
            return torch.exp(-0.5 * square)
        root = (5 * square.clamp_min(1e-30)).sqrt()
        return (1 + root + root.square() / 3) * torch.exp(-root)

    def _ordinal(self, x1: Tensor, x2: Tensor, scale: Tensor) -> Tensor:
        columns = list(self.ordinal)
        if not columns:
            return x1.new_zeros(*x1.shape[:-1], x2.shape[-2])
        scale = scale[..., columns]
        return self.covar_dist(x1[..., columns] / scale, x2[..., columns] / scale, square_dist=True)


def smooth_kernel(features: int, categorical: Sequence[int] = (), smoothness: str = "rbf") -> Any:
    """Return BoTorch's default kernel, or a :class:`MixedKernel` where there are categories.

    Args:
        features: Number of columns.
        categorical: Columns of category codes.
        smoothness: "rbf" or "matern".
    """
    if categorical:
        return MixedKernel(features, categorical, smoothness)
    return get_covar_module_with_dim_scaled_prior(features, use_rbf_kernel=smoothness == "rbf")
