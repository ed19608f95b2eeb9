"""M-steps of plain sparse Bayesian learning: each takes the moments at g and returns a new g.

All are written with shrink_j = 1 - Sigma_jj / g_j = g_j h_j^H C^{-1} h_j, the share of weight j
that the data determine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.models.sbl.moments import Moments

__all__ = ["em_update", "mackay_update", "mm_update"]


def em_update(moments: Moments, variance: Tensor) -> Tensor:
    """g_j = E|x_j|^2: never lowers the evidence, slowly."""
    return torch.where(variance > 0, moments.second_moment(), 0.0)


def mackay_update(moments: Moments, variance: Tensor) -> Tensor:
    """g_j = |E x_j|^2 / shrink_j: MacKay's fixed point, fast, not monotone."""
    shrink = (variance * moments.leverage).clamp_min(torch.finfo(variance.dtype).tiny)
    return torch.where(variance > 0, moments.mean_square() / shrink, 0.0)


def mm_update(moments: Moments, variance: Tensor) -> Tensor:
    """g_j <- g_j |h_j^H C^{-1} y| / sqrt(h_j^H C^{-1} h_j): monotone and fast.

    It minimises the bound of L that is linear in g for log |C| and in 1 / g for y^H C^{-1} y.
    """
    leverage = moments.leverage.clamp_min(torch.finfo(variance.dtype).tiny)
    ratio = (moments.projection_square() / leverage).sqrt()
    return torch.where(variance > 0, variance * ratio, 0.0)
