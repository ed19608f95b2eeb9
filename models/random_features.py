"""Finite features whose inner products estimate a kernel.

A network of finite width, its last layer left out, gives features of the kernel of the infinitely
wide one; random Fourier features (Rahimi and Recht, NeurIPS 2007) do so for stationary kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, RBFKernel, ScaleKernel
from torch import Tensor

from probkit.errors import CapabilityError
from probkit.kernels import NNGPKernel

__all__ = ["random_features"]

FeatureMap = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, FeatureMap] = {"relu": torch.relu, "erf": torch.erf, "tanh": torch.tanh}


def random_features(
    kernel: Kernel, size: int, columns: int, *, generator: torch.Generator, like: Tensor
) -> FeatureMap:
    """Draw a map phi with E[phi(x)' phi(x')] near K(x, x').

    For networks of one hidden layer and stationary kernels the expectation is exact; deeper ones
    have a bias of order depth / size. The error of one map is of order 1 / sqrt(size).

    Args:
        kernel: An :class:`~probkit.kernels.NNGPKernel` with ``arch`` "mlp" or "resnet", an RBF or
            Matern kernel, a ``ScaleKernel`` of such, or a sum.
        size: Width of the network, or number of frequencies (two features each).
        columns: Number of input columns.
        generator: Source of the weights.
        like: A tensor with the dtype and device of the inputs.

    Returns:
        The map from [*, columns] to [*, feature].

    Raises:
        CapabilityError: No features are known for the kernel.

    Example:
        >>> x = torch.tensor([[0.3], [0.5]], dtype=torch.float64)
        >>> g = torch.Generator().manual_seed(0)
        >>> phi = random_features(RBFKernel().double(), 20_000, 1, generator=g, like=x)(x)
        >>> gap = phi @ phi.T - RBFKernel().double()(x).to_dense().detach()
        >>> bool(gap.abs().max() < 0.01)
        True
    """
    if kernel.active_dims is not None:
        chosen = kernel.active_dims
        inner = _features(kernel, size, len(chosen), generator, like)
        return lambda x: inner(x.index_select(-1, chosen.to(x.device)))
    return _features(kernel, size, columns, generator, like)


def _features(
    kernel: Kernel, size: int, columns: int, generator: torch.Generator, like: Tensor
) -> FeatureMap:
    if isinstance(kernel, AdditiveKernel):
        parts = [
            random_features(part, size, columns, generator=generator, like=like)
            for part in kernel.kernels
        ]
        return lambda x: torch.cat([part(x) for part in parts], -1)
    if isinstance(kernel, ScaleKernel):
        root = kernel.outputscale.detach().to(like).sqrt()
        # It has taken over the columns of its base kernel.
        base = _features(kernel.base_kernel, size, columns, generator, like)
        return lambda x: root * base(x)
    if isinstance(kernel, NNGPKernel) and kernel.arch in ("mlp", "resnet"):
        return _network(kernel, size, columns, generator, like)
    if isinstance(kernel, RBFKernel | MaternKernel):
        return _fourier(kernel, size, columns, generator, like)
    raise CapabilityError(
        f"random features are not known for {type(kernel).__name__}; use prior='exact'"
    )


def _normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _network(
    kernel: NNGPKernel, width: int, columns: int, generator: torch.Generator, like: Tensor
) -> FeatureMap:
    """Draw the hidden layers of one network; its last layer is left to the caller."""
    weight_var, bias_var = (v.detach().to(like) for v in kernel._step_variances(like))
    activation = _ACTIVATIONS[kernel.activation]
    weights, biases = [], []
    for layer in range(kernel.layers):
        fan_in = columns if layer == 0 else width
        scale = (weight_var[..., layer] / fan_in).sqrt()
        weights.append(scale * _normal((fan_in, width), generator, like))
        biases.append(bias_var[..., layer].sqrt() * _normal((width,), generator, like))
    last = weight_var[..., -1].sqrt()
    last_bias = bias_var[..., -1].sqrt()

    def phi(x: Tensor) -> Tensor:
        h = x
        if weights:
            h = x @ weights[0] + biases[0]
            for weight, bias in zip(weights[1:], biases[1:], strict=True):
                step = activation(h) @ weight + bias
                h = h + step if kernel.arch == "resnet" else step
            h = activation(h)
        features = last / math.sqrt(h.shape[-1]) * h
        return torch.cat([features, last_bias.expand(*h.shape[:-1], 1)], -1)

    return phi


def _fourier(
    kernel: Kernel, count: int, columns: int, generator: torch.Generator, like: Tensor
) -> FeatureMap:
    """Cosines and sines at frequencies from the spectral law of the kernel."""
    frequency = _normal((columns, count), generator, like)
    if isinstance(kernel, MaternKernel):
        # The spectral law is a multivariate t of 2 nu degrees of freedom.
        half = torch.full((count,), float(kernel.nu), dtype=like.dtype, device=like.device)
        gamma = torch._standard_gamma(half, generator=generator)
        frequency = frequency * (kernel.nu / gamma).sqrt()
    lengthscale = kernel.lengthscale.detach().to(like).reshape(-1, 1)

    def phi(x: Tensor) -> Tensor:
        angle = x @ (frequency / lengthscale)
        return torch.cat([angle.cos(), angle.sin()], -1) / math.sqrt(count)

    return phi
