"""Normal noise as a function of a seed and a row: the same for a row whichever rows are asked for.

A table of millions of rows then needs no stored noise: a minibatch, a block of candidates or
another process evaluates the rows it has, and all agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["row_noise"]

# Constants of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_STEP = -7046029254386353131
_MIX = (-4658895280553007687, -7723592293110705685)
_LOW = 0xFFFFFFFF


def row_noise(seed: int, rows: Tensor, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return independent standard normals [row, width], each row's a function of seed and number.

    SplitMix64 at the counter of each pair of entries gives 64 bits, Box and Muller's map turns
    them into two normals.

    Args:
        seed: Seed of the table.
        rows: Row numbers [row], any subset of the table in any order.
        width: Entries of a row.
        dtype: Of the result.

    Example:
        >>> table = row_noise(7, torch.arange(5), 3)
        >>> bool((row_noise(7, torch.tensor([4, 2]), 3) == table[[4, 2]]).all())
        True
    """
    pairs = (width + 1) // 2
    counter = rows.long()[:, None] * pairs + torch.arange(1, pairs + 1, device=rows.device)
    bits = _mixed(counter.mul_(_STEP).add_(_scrambled(seed)))
    high = ((bits >> 32) & _LOW).to(dtype).add_(0.5).mul_(2.0**-32)
    angle = (bits & _LOW).to(dtype).mul_(2 * math.pi * 2.0**-32)
    radius = high.log_().mul_(-2.0).clamp_min_(0.0).sqrt_()
    noise = torch.stack((radius * angle.cos(), angle.sin_().mul_(radius)), -1)
    return noise.reshape(len(rows), 2 * pairs)[:, :width]


def _scrambled(seed: int) -> int:
    """Spread the seed over 64 bits, so that neighbouring seeds have streams far apart."""
    return int(_mixed(torch.tensor([seed], dtype=torch.int64) * _STEP)[0])


def _mixed(x: Tensor) -> Tensor:
    """The output function of SplitMix64, in place; shifts are logical."""
    x.bitwise_xor_((x >> 30) & ((1 << 34) - 1)).mul_(_MIX[0])
    x.bitwise_xor_((x >> 27) & ((1 << 37) - 1)).mul_(_MIX[1])
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))
