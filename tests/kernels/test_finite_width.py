"""Kernels against random networks of finite width.

The covariance of the outputs of a network, given its last features, and its empirical tangent
kernel are averaged over networks. Both averages are off by their standard error, and by a term of
order 1 / width.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from probkit.kernels import NNGPKernel

W_STD, B_STD, LAST_W_STD = 1.4, 0.3, 1.2
ACTIVATIONS = {"relu": torch.relu, "erf": torch.erf, "tanh": torch.tanh}
WIDTH = {"resnet": 512, "flatten": 256, "gap": 256}
NETWORKS = {"resnet": 100, "flatten": 32, "gap": 32}


def dense(h: Tensor, parameters: list[Tensor], w_std: float, b_std: float) -> Tensor:
    """A dense layer [n, fan in] -> [n, width] whose parameters are standard normal."""
    weight, bias = parameters
    return h @ weight.T * (w_std / math.sqrt(weight.shape[1])) + b_std * bias


def convolution(h: Tensor, parameters: list[Tensor]) -> Tensor:
    """A 3 x 3 convolution [n, channels, H, W] with zero padding."""
    weight, bias = parameters
    scale = W_STD / math.sqrt(9 * weight.shape[1])
    return F.conv2d(h, weight * scale, padding=1) + B_STD * bias[:, None, None]


def shapes_of(arch: str, inputs: int) -> list[tuple[int, ...]]:
    """Shapes of all parameters: weight and bias of each layer, and the last weight."""
    width = WIDTH[arch]
    if arch == "resnet":
        lower = [(width, inputs), (width,), (width, width), (width,), (width, width), (width,)]
        return [*lower, (1, width)]
    lower = [(width, inputs, 3, 3), (width,), (width, width, 3, 3), (width,)]
    return [*lower, (1, width * (9 if arch == "flatten" else 1))]


def features(arch: str, x: Tensor, parameters: list[Tensor], activation) -> Tensor:
    """What the last layer sees [n, fan in]."""
    if arch == "resnet":
        h = dense(x, parameters[:2], W_STD, B_STD)
        for block in (2, 4):
            h = h + dense(activation(h), parameters[block : block + 2], W_STD, B_STD)
        return activation(h)
    h = x.movedim(-1, 1)
    for layer in (0, 2):
        h = activation(convolution(h, parameters[layer : layer + 2]))
    return h.flatten(1) if arch == "flatten" else h.mean((-2, -1))


def kernel_of(arch: str, activation: str) -> NNGPKernel:
    stds = {"w_std": W_STD, "b_std": B_STD, "last_w_std": LAST_W_STD, "learn": ()}
    if arch == "resnet":
        return NNGPKernel(2, activation, arch="resnet", **stds)
    return NNGPKernel(2, activation, arch="conv", image_shape=(3, 3, 2), pooling=arch, **stds)


def empirical(arch: str, x: Tensor, activation, generator) -> tuple[Tensor, Tensor]:
    """Covariance and tangent kernel of one network, each [n, n]."""
    parameters = [
        torch.randn(shape, dtype=x.dtype, generator=generator).requires_grad_()
        for shape in shapes_of(arch, x.shape[-1])
    ]
    seen = features(arch, x, parameters, activation)
    scale = LAST_W_STD / math.sqrt(seen.shape[-1])
    outputs = (seen @ parameters[-1].T)[:, 0] * scale
    gradients = [torch.autograd.grad(f, parameters, retain_graph=True) for f in outputs]
    J = torch.stack([torch.cat([g.flatten() for g in each]) for each in gradients])
    return (seen @ seen.T).detach() * scale**2, J @ J.T


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet", "flatten", "gap"])
@pytest.mark.parametrize("activation", ["relu", "erf", "tanh"])
def test_random_networks(arch, activation, points):
    x = points(3, 4) if arch == "resnet" else points(3, 3, 3, 2)
    kernel = kernel_of(arch, activation)
    generator = torch.Generator().manual_seed(11)
    networks = NETWORKS[arch]
    runs = [empirical(arch, x, ACTIVATIONS[activation], generator) for _ in range(networks)]
    limits = kernel(x).to_dense(), kernel.ntk(x)
    for draws, limit in zip(zip(*runs, strict=True), limits, strict=True):
        values = torch.stack(draws)
        error = (values.mean(0) - limit).abs()
        size = (limit.diagonal()[:, None] * limit.diagonal()).sqrt()
        # five standard errors, and the bias of finite width
        bound = 5 * values.std(0) / math.sqrt(networks) + 4 * size / WIDTH[arch]
        assert (error < bound).all()
        # and the test is sharp: an entry that is off by a seventh of the diagonal would be seen
        assert (bound < size / 7).all()
