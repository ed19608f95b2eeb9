"""An independent reference: the kernels again, one pair of rows at a time, in plain Python."""

from __future__ import annotations

import math

import pytest

# GPyTorch's first look at a batch shape imports it, and it adds a warning filter.
import sympy  # noqa: F401
import torch


def relu(K, k1, k2):
    if k1 == 0 or k2 == 0:
        return 0.0, 0.25
    c = max(-1.0, min(1.0, K / math.sqrt(k1 * k2)))
    theta = math.acos(c)
    value = math.sqrt(k1 * k2) * (math.sin(theta) + (math.pi - theta) * c) / (2 * math.pi)
    return value, (math.pi - theta) / (2 * math.pi)


def erf(K, k1, k2):
    product = (1 + 2 * k1) * (1 + 2 * k2)
    value = 2 / math.pi * math.asin(2 * K / math.sqrt(product))
    return value, 4 / math.pi / math.sqrt(product - 4 * K * K)


def pair(x, y, stds, activation):
    """(kernel, tangent kernel) of two rows; ``stds`` is [(weight std, bias std)] of each step."""
    layer = {"relu": relu, "erf": erf}[activation]
    (w, b), *rest = stds
    K, k1, k2 = (
        w * w * sum(u * v for u, v in zip(p, q, strict=True)) / len(p) + b * b
        for p, q in ((x, y), (x, x), (y, y))
    )
    theta = K
    for w, b in rest:
        new, slope = layer(K, k1, k2)
        k1, k2 = (w * w * layer(k, k, k)[0] + b * b for k in (k1, k2))
        K = w * w * new + b * b
        theta = K + w * w * theta * slope
    return K, theta


def matrix(x1, x2, stds, activation="relu", tangent=False):
    rows1, rows2 = x1.tolist(), x2.tolist()
    return x1.new_tensor([[pair(p, q, stds, activation)[tangent] for q in rows2] for p in rows1])


@pytest.fixture(scope="session")
def naive_matrix():
    return matrix


@pytest.fixture
def points():
    """points(n, d, seed) -> normal inputs [n, d] in float64."""

    def draw(*shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return draw
