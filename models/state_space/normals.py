"""Standard normals in bulk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["standard_normal"]

_FEW = 4096


def standard_normal(
    shape: Sequence[int], *, rng: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Draw standard normals.

    Large float64 draws on the CPU use the Box-Muller transform on whole tensors, which takes half
    the time of ``torch.randn`` there; all others are ``torch.randn``.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> standard_normal((3, 2), rng=g, dtype=torch.float64, device=torch.device("cpu")).shape
        torch.Size([3, 2])
    """
    total = math.prod(shape)
    if total < _FEW or dtype != torch.float64 or device.type != "cpu":
        return torch.randn(*shape, generator=rng, dtype=dtype, device=device)
    half = (total + 1) // 2
    uniform = torch.rand(2, half, generator=rng, dtype=dtype)
    radius = uniform[0].neg_().log1p_().mul_(-2.0).sqrt_()  # 1 - u is never zero
    angle = uniform[1].mul_(2.0 * math.pi)
    pair = torch.empty(2, half, dtype=dtype)
    torch.cos(angle, out=pair[0])
    torch.sin(angle, out=pair[1])
    return pair.mul_(radius).flatten()[:total].reshape(*shape)
