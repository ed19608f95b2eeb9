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


LAYERS = {"relu": relu, "erf": erf}


def pair(x, y, stds, activation, residual=False):
    """(kernel, tangent kernel) of two rows; ``stds`` is [(weight std, bias std)] of each step."""
    layer = LAYERS[activation]
    (w, b), *rest = stds
    K, k1, k2 = (
        w * w * sum(u * v for u, v in zip(p, q, strict=True)) / len(p) + b * b
        for p, q in ((x, y), (x, x), (y, y))
    )
    theta = K
    for step, (w, b) in enumerate(rest, start=1):
        keep = 1 if residual and step < len(rest) else 0
        new, slope = layer(K, k1, k2)
        k1, k2 = (keep * k + w * w * layer(k, k, k)[0] + b * b for k in (k1, k2))
        theta = keep * theta + w * w * new + b * b + w * w * theta * slope
        K = keep * K + w * w * new + b * b
    return K, theta


def matrix(x1, x2, stds, activation="relu", tangent=False, residual=False):
    rows1, rows2 = x1.tolist(), x2.tolist()
    return x1.new_tensor(
        [[pair(p, q, stds, activation, residual)[tangent] for q in rows2] for p in rows1]
    )


def convolve(K, w, b, height, width):
    """A 3 x 3 convolution of {(pixel, pixel): covariance}, one entry and one tap at a time."""
    pixels = [(i, j) for i in range(height) for j in range(width)]
    out = {}
    for p in pixels:
        for q in pixels:
            total = 0.0
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    shifted = (p[0] + down, p[1] + right), (q[0] + down, q[1] + right)
                    total += K.get(shifted, 0.0)
            out[p, q] = w * w / 9 * total + b * b
    return out


def conv_pair(x, y, stds, activation, pooling):
    """(kernel, tangent kernel) of two images [H][W][C] as nested lists."""
    layer, height, width = LAYERS[activation], len(x), len(x[0])
    pixels = [(i, j) for i in range(height) for j in range(width)]

    def inner(one, two):
        return {
            (p, q): sum(u * v for u, v in zip(one[p[0]][p[1]], two[q[0]][q[1]], strict=True))
            / len(one[0][0])
            for p in pixels
            for q in pixels
        }

    *lower, (last_w, last_b) = stds
    K, own1, own2 = inner(x, y), inner(x, x), inner(y, y)
    theta = dict.fromkeys(K, 0.0)
    for w, b in lower:
        K, own1, own2 = (convolve(k, w, b, height, width) for k in (K, own1, own2))
        through = convolve(theta, w, 0.0, height, width)
        theta = {pq: K[pq] + through[pq] for pq in K}
        moments = {(p, q): layer(K[p, q], own1[p, p], own2[q, q]) for p, q in K}
        theta = {pq: theta[pq] * moments[pq][1] for pq in K}
        own1 = {(p, q): layer(k, own1[p, p], own1[q, q])[0] for (p, q), k in own1.items()}
        own2 = {(p, q): layer(k, own2[p, p], own2[q, q])[0] for (p, q), k in own2.items()}
        K = {pq: value for pq, (value, _) in moments.items()}
    chosen = [(p, q) for p, q in K if pooling == "gap" or p == q]
    mean = sum(K[pq] for pq in chosen) / len(chosen)
    mean_theta = sum(theta[pq] for pq in chosen) / len(chosen)
    kernel = last_w**2 * mean + last_b**2
    return kernel, kernel + last_w**2 * mean_theta


def conv_matrix(x1, x2, stds, pooling, activation="relu", tangent=False):
    images1, images2 = x1.tolist(), x2.tolist()
    return x1.new_tensor(
        [[conv_pair(p, q, stds, activation, pooling)[tangent] for q in images2] for p in images1]
    )


@pytest.fixture(scope="session")
def naive_matrix():
    return matrix


@pytest.fixture(scope="session")
def naive_conv_matrix():
    return conv_matrix


@pytest.fixture
def points():
    """points(n, d, seed) -> normal inputs [n, d] in float64."""

    def draw(*shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return draw
