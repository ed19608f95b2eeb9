r"""Gram matrices in float32 from sums of bfloat16 products, which tensor cores compute fast.

A float32 number is a sum of bfloat16 numbers of falling size, x = h + m + l + ...; products of two
bfloat16 numbers are exact in float32. With the terms that are kept,

- ``"bf16x3"``: h h' + h m' + m h', each entry within :math:`2^{-15} \sum_k |x_k x'_k|` of exact;
- ``"bf16x6"``: all products down to the size of m m' and h l', within
  :math:`2^{-21} \sum_k |x_k x'_k|`, about what one float32 product of a few inputs loses.

To this comes the rounding of the float32 sums. The layers of a ReLU or erf network do not amplify
the error: the slope of F is at most 1/2 for ReLU and 4 / pi for erf, times the weight variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["BOUNDS", "split", "split_gram"]

_TERMS = {"bf16x3": 2, "bf16x6": 3}

BOUNDS = {"bf16x3": 2.0**-15, "bf16x6": 2.0**-21}
"""Largest error of an entry, in units of the sum of the absolute products."""


def split(x: Tensor, terms: int) -> list[Tensor]:
    """Split float32 numbers into ``terms`` bfloat16 numbers, each the rest of those before.

    Example:
        >>> h, m = split(torch.tensor([1.001]), 2)
        >>> abs(float(h.float() + m.float() - 1.001)) < 1e-5
        True
    """
    parts = []
    for _ in range(terms):
        part = x.bfloat16()
        parts.append(part)
        x = x - part.float()
    return parts


def split_gram(x1: Tensor, x2: Tensor, precision: str) -> Tensor:
    """Inner products [n, m] of the rows of two float32 matrices.

    Args:
        x1: Rows [n, d].
        x2: Rows [m, d].
        precision: "bf16x3" or "bf16x6".

    Raises:
        DataError: Unknown precision, or rows that are not float32.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> split_gram(x, x, "bf16x3")
        tensor([[5.]])
    """
    if precision not in _TERMS:
        accepted = ", ".join(map(repr, _TERMS))
        raise DataError(f"split_gram: expected one of {accepted}, got {precision!r}")
    if x1.dtype != torch.float32 or x2.dtype != torch.float32:
        raise DataError(
            f"split_gram: expected float32 rows, got {x1.dtype} and {x2.dtype}; float64 has no "
            "split, use the exact Gram matrix"
        )
    terms = _TERMS[precision]
    left, right = split(x1, terms), split(x2, terms)
    # the smallest products first, so that they are not lost in the largest
    pairs = [(i, j) for i in range(terms) for j in range(terms) if i + j < terms]
    total = x1.new_zeros(len(x1), len(x2))
    for i, j in sorted(pairs, key=sum, reverse=True):
        total += _product(left[i], right[j])
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T in float32: on tensor cores, or with the same exact products on the CPU."""
    if a.is_cuda:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return a.float() @ b.float().T
