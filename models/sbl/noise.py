"""The noise variance: where it starts, how it is updated, and how a collapse is noticed.

With more columns than data and one snapshot, variances g and noise s2 compete for the same
residual: the evidence has optima in which s2 is far too small and hundreds of tiny weights
interpolate the noise. The signature is that the weights use up the degrees of freedom of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.models.sbl.moments import Moments, abs_square

__all__ = ["COLLAPSE", "em_noise", "initial_noise", "mackay_noise", "noise_floor"]

COLLAPSE = 0.75
"""Share of the data's degrees of freedom beyond which a learned noise variance is not believed."""


def _power(y: Tensor, modes: int) -> Tensor:
    """Mean |y|^2 of each problem: y [*batch, snapshot, M_1, ..., M_I] -> [*batch]."""
    return abs_square(y).mean(tuple(range(-modes - 1, 0)))


def initial_noise(y: Tensor, modes: int) -> Tensor:
    """0.1 mean |y|^2, [*batch]."""
    return 0.1 * _power(y, modes)


def noise_floor(y: Tensor, modes: int, relative: float) -> Tensor:
    """Smallest noise variance allowed, ``relative`` times mean |y|^2, [*batch]."""
    return relative * _power(y, modes)


def em_noise(moments: Moments, noise_var: Tensor, size: Tensor) -> Tensor:
    """s2 = E||y - H x||^2 / M: the exact M-step, monotone.

    Args:
        moments: At the g and s2 of this E-step.
        noise_var: That s2 [*batch].
        size: M times the number of snapshots [*batch].
    """
    snapshots = moments.mean.shape[-moments.modes - 1]
    return (moments.residual + noise_var * snapshots * moments.freedom) / size


def mackay_noise(moments: Moments, size: Tensor) -> Tensor:
    """s2 = ||y - H mean||^2 / (M - sum_j shrink_j): MacKay's fixed point."""
    snapshots = moments.mean.shape[-moments.modes - 1]
    left = size - snapshots * moments.freedom
    return moments.residual / torch.maximum(left, 0.01 * size)
