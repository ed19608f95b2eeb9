"""Checks of what kernels are evaluated on."""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError

__all__ = ["check_inputs", "one_input"]


def one_input(x1: Tensor, x2: Tensor) -> bool:
    """Whether one input stands for both, also for gradients."""
    if x1 is x2:
        return True
    if torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad):
        return False
    return x1.shape == x2.shape and torch.equal(x1, x2)


def check_inputs(x1: Tensor, x2: Tensor) -> None:
    """Refuse inputs that no kernel matrix can be computed from.

    Args:
        x1: Inputs [*batch, n, d].
        x2: Inputs [*batch, m, d].

    Raises:
        DataError: Not float32 or float64, or not the same dtype and device.
        ShapeError: Fewer than two dims, no columns, or different columns.
    """
    for x in (x1, x2):
        if x.dtype not in (torch.float32, torch.float64):
            raise DataError(f"expected x in float32 or float64, got {x.dtype}; use x.double()")
        if x.ndim < 2:
            raise ShapeError(f"expected x [*batch, n, d], got {list(x.shape)}; use x[:, None]")
        if x.shape[-1] == 0:
            raise ShapeError(f"expected x [*batch, n, d] with d >= 1 columns, got {list(x.shape)}")
    if x1.shape[-1] != x2.shape[-1]:
        raise ShapeError(
            f"expected x1 [*batch, n, d] and x2 [*batch, m, d] with the same d, "
            f"got d = {x1.shape[-1]} and {x2.shape[-1]}"
        )
    if x1.dtype != x2.dtype or x1.device != x2.device:
        raise DataError(
            f"expected x1 and x2 of one dtype on one device, got {x1.dtype} on {x1.device} and "
            f"{x2.dtype} on {x2.device}; use x2.to(x1)"
        )
