"""Tests of Monte Carlo results with tolerances that follow from their errors."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["assert_mean", "batch_means", "worst_z", "z_bound"]


def z_bound(count: int = 1, level: float = 1e-4) -> float:
    """Return the bound that |z| of ``count`` tests together exceeds with probability ``level``.

    Bonferroni: each test has level / count, two-sided.

    Example:
        >>> round(z_bound(1, level=0.05), 2)
        1.96
    """
    return NormalDist().inv_cdf(1 - level / (2 * max(count, 1)))


def worst_z(draws: Tensor, expected: Tensor | float) -> float:
    """Return the largest |z| of column means against their expectation.

    Args:
        draws: [draw, *] independent draws.
        expected: [*] expectation, or one number for all columns.
    """
    draws = draws.detach().double().reshape(len(draws), -1)
    target = torch.as_tensor(expected).detach().double().reshape(-1).expand(draws.shape[1])
    error = draws.std(0) / len(draws) ** 0.5
    gap = (draws.mean(0) - target).abs()
    # A column without spread must be exact up to rounding.
    floor = 1e-9 * (1 + target.abs())
    return float((gap / torch.maximum(error, floor)).max()) if draws.shape[1] else 0.0


def assert_mean(draws: Tensor, expected: Tensor | float, what: str, level: float = 1e-4) -> None:
    """Assert that the means of independent ``draws`` [draw, *] agree with ``expected`` [*].

    Example:
        >>> noise = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> assert_mean(noise, torch.zeros(3), "standard normals")
    """
    worst = worst_z(draws, expected)
    bound = z_bound(draws[0].numel(), level)
    assert worst <= bound, f"{what}: |z| = {worst:.1f} exceeds {bound:.1f} of {len(draws)} draws"


def batch_means(draws: Tensor) -> Tensor:
    """Cut correlated chains into long blocks and average each: nearly independent draws.

    Args:
        draws: [chain, draw, *].

    Returns:
        [chain * block, *] means over blocks of about sqrt(draw) draws.
    """
    length = max(1, int(draws.shape[1] ** 0.5))
    blocks = draws.shape[1] // length
    cut = draws[:, : blocks * length].reshape(draws.shape[0], blocks, length, *draws.shape[2:])
    return cut.double().mean(2).flatten(0, 1)
