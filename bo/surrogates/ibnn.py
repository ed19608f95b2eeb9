"""Infinitely wide Bayesian neural networks as surrogates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpytorch.kernels import Kernel

from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.dense_gp import DenseGP
from probkit.bo.surrogates.encoding import Encode
from probkit.bo.surrogates.gp import fit_dense
from probkit.errors import DataError
from probkit.files import storable
from probkit.kernels import NNGPKernel
from probkit.rng import Rng

__all__ = ["IBNNSurrogate"]


@storable
@dataclass(frozen=True)
class IBNNSurrogate(Surrogate):
    """The Gaussian process that a network tends to as its layers widen.

    Li, Rudner and Wilson, "A Study of Bayesian Neural Network Surrogates for Bayesian
    Optimization", ICLR 2024: depth 3, ReLU, weight variance 10 and bias variance 1.3 (1.6 on
    problems of many dimensions), both fixed; mean and noise are fitted. The prior is not
    stationary, and its cost does not grow with the number of features.

    Args:
        depth: Hidden layers.
        activation: "relu", "erf" or "tanh".
        weight_var: Variance of the weights times fan-in, in every layer.
        bias_var: Variance of the biases, in every layer.
        learn: Whether to fit both variances, too.
        noise: "learned" or "none", as for :class:`GPSurrogate`.

    Example:
        >>> import torch
        >>> from probkit.bo import make_surrogate
        >>> x = torch.rand(12, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> make_surrogate(IBNNSurrogate(), x, x.sum(1), rng=0).posterior(x).mean.shape
        torch.Size([12, 1])
    """

    depth: int = 3
    activation: str = "relu"
    weight_var: float = 10.0
    bias_var: float = 1.3
    learn: bool = False
    noise: str = "learned"

    def __post_init__(self) -> None:
        if self.noise not in ("learned", "none"):
            raise DataError(f"noise: expected 'learned' or 'none', got {self.noise!r}")
        for name in ("weight_var", "bias_var"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise DataError(f"{name}: expected a finite number > 0, got {value!r}")
        self.kernel()  # Checks depth and activation.

    def kernel(self) -> Kernel:
        """Return the covariance function."""
        weight, bias = math.sqrt(self.weight_var), math.sqrt(self.bias_var)
        learn = ("w_std", "b_std") if self.learn else ()
        return NNGPKernel(self.depth, self.activation, weight, bias, weight, bias, learn=learn)

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> DenseGP:
        """Fit mean and noise, and the variances if they are learned."""
        encode = Encode(data.domain, one_hot=True)
        exact = self.noise == "none"
        return fit_dense(data, self.kernel(), encode, exact=exact, previous=previous)
