r"""Stationary kernels on cache-tiled PyTorch: distances and map in one pass over each tile.

With the scaled squared distance :math:`s = \sum_k (x_k - x'_k)^2 / \ell_k^2` and
:math:`r = \sqrt s`:

- ``"rbf"``: :math:`e^{-s / 2}`,
- ``"matern12"``: :math:`e^{-r}`,
- ``"matern32"``: :math:`(1 + \sqrt 3 r) e^{-\sqrt 3 r}`,
- ``"matern52"``: :math:`(1 + \sqrt 5 r + 5 s / 3) e^{-\sqrt 5 r}`

(Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, eq. 4.9 and 4.17).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.kernels.backends.tiles import fill, multiply, tile_shape, tiles
from probkit.numerics import check_allocation

__all__ = [
    "FAMILIES",
    "TiledProduct",
    "check_family",
    "scaled",
    "slope_",
    "stationary",
    "stationary_product",
    "value_",
]

FAMILIES = ("rbf", "matern12", "matern32", "matern52")
"""Every family that :func:`stationary` accepts."""


def check_family(family: str) -> None:
    """Refuse unknown families.

    Raises:
        DataError: With the names that are accepted.
    """
    if family not in FAMILIES:
        accepted = ", ".join(map(repr, FAMILIES))
        raise DataError(f"stationary kernel: expected one of {accepted}, got {family!r}")


def stationary(
    x1: Tensor, x2: Tensor | None, lengthscale: Tensor, *, family: str, diag: bool = False
) -> Tensor:
    """Stationary kernel of unit variance.

    All tensors have one dtype (float32 or float64), live on one device, and their batch dims are
    broadcast. Gradients flow to all of them; the backward pass computes each tile again. Second
    derivatives are not available.

    Args:
        x1: Inputs [*batch, n, d].
        x2: Inputs [*batch, m, d], or None for ``x1``: then the result is exactly symmetric.
        lengthscale: Length scales [*batch, d], or [*batch, 1] for one shared by all inputs.
        family: A name in :data:`FAMILIES`.
        diag: Only row i of ``x1`` with row i of ``x2`` (n = m).

    Returns:
        K [*batch, n, m], or [*batch, n] for ``diag``.

    Raises:
        DataError: Unknown family, or a matrix that cannot fit into memory.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> stationary(x, None, torch.ones(1, dtype=torch.float64), family="rbf")
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]], dtype=torch.float64)
    """
    check_family(family)
    a, b = scaled(x1, x2, lengthscale)
    if diag:
        square = (a - (a if b is None else b)).square().sum(-1)
        return _value(square, family)
    shape = (*a.shape[:-1], (a if b is None else b).shape[-2])
    size = math.prod(shape) * a.element_size()
    check_allocation(size, f"kernel matrix {list(shape)}", device=a.device)
    return _Matrix.apply(family, a, b)


def stationary_product(
    x1: Tensor, x2: Tensor | None, vectors: Tensor, lengthscale: Tensor, *, family: str
) -> Tensor:
    """Product of :func:`stationary` with vectors [*batch, m, r]; the matrix is never stored.

    Returns:
        K @ vectors [*batch, n, r].

    Raises:
        DataError: Unknown family.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> stationary_product(x, None, x, one, family="rbf")
        tensor([[0.6065],
                [1.0000]], dtype=torch.float64)
    """
    check_family(family)
    a, b = scaled(x1, x2, lengthscale, vectors.shape[:-2])
    return TiledProduct.apply(family, vectors.expand(*a.shape[:-2], *vectors.shape[-2:]), a, b)


def scaled(
    x1: Tensor, x2: Tensor | None, lengthscale: Tensor, batch: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor | None]:
    """Inputs in units of the length scales, with the same batch dims, and those of ``batch``."""
    a = x1 / lengthscale.unsqueeze(-2)
    b = None if x2 is None else x2 / lengthscale.unsqueeze(-2)
    batch = np.broadcast_shapes(*(x.shape[:-2] for x in (a, b) if x is not None), batch)
    b = None if b is None else b.expand(*batch, *b.shape[-2:])
    return a.expand(*batch, *a.shape[-2:]), b


# ---------------------------------------------------------------------------- maps, in place


def value_(s: Tensor, family: str, work: Tensor) -> None:
    """Replace squared scaled distances by the kernel; ``work`` is scratch of the same shape."""
    if family == "rbf":
        s.mul_(-0.5).exp_()
    elif family == "matern12":
        s.sqrt_().neg_().exp_()
    elif family == "matern32":
        s.mul_(3.0).sqrt_()
        torch.neg(s, out=work).exp_()
        s.add_(1.0).mul_(work)
    else:
        s.mul_(5.0).sqrt_()
        torch.neg(s, out=work).exp_()
        torch.addcmul(s, s, s, value=1 / 3, out=s).add_(1.0).mul_(work)


def slope_(s: Tensor, family: str, work: Tensor) -> None:
    """Replace squared scaled distances by the derivative of the kernel with respect to them."""
    if family == "rbf":
        s.mul_(-0.5).exp_().mul_(-0.5)
    elif family == "matern12":
        # infinite at 0, where it multiplies a difference of zero: zero by rule
        inside = s > 0
        s.sqrt_()
        torch.neg(s, out=work).exp_().mul_(-0.5)
        torch.div(work, s, out=s).masked_fill_(~inside, 0.0)
    elif family == "matern32":
        s.mul_(3.0).sqrt_().neg_().exp_().mul_(-1.5)
    else:
        s.mul_(5.0).sqrt_()
        torch.neg(s, out=work).exp_().mul_(-5 / 6)
        s.add_(1.0).mul_(work)


def _value(s: Tensor, family: str) -> Tensor:
    """The kernel as a differentiable function of squared distances; slope 0 at 0 for Matern 1/2."""
    if family == "rbf":
        return (-0.5 * s).exp()
    inside = s > 0
    r = torch.where(inside, torch.where(inside, s, 1.0).sqrt(), 0.0)
    if family == "matern12":
        return (-r).exp()
    if family == "matern32":
        return (1 + math.sqrt(3) * r) * (-math.sqrt(3) * r).exp()
    return (1 + math.sqrt(5) * r + 5 / 3 * s) * (-math.sqrt(5) * r).exp()


# ------------------------------------------------------------------------------------- tiles


class _Tiles:
    """Tiles of one matrix [n, m] of scaled inputs, each through ``change`` in place."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor | None,
        family: str,
        change: Callable[[Tensor, str, Tensor], None] = value_,
    ) -> None:
        self.a, self.b = a, a if b is None else b
        self.family, self.change = family, change
        rows, columns = tile_shape(a)
        self.buffers = [a.new_empty(rows * max(rows, columns)) for _ in range(2)]

    def tile(self, i0: int, i1: int, j0: int, j1: int) -> Tensor:
        """Rows i0 to i1, columns j0 to j1; overwritten by the next call."""
        size = (i1 - i0, j1 - j0)
        square, work = (buffer[: size[0] * size[1]].view(size) for buffer in self.buffers)
        square.zero_()
        # differences, one input at a time: no cancellation between close rows
        for k in range(self.a.shape[-1]):
            torch.sub(self.a[i0:i1, k, None], self.b[None, j0:j1, k], out=work)
            square.addcmul_(work, work)
        self.change(square, self.family, work)
        return square


class _Matrix(torch.autograd.Function):
    """Tiled matrix [*batch, n, m] with a backward pass by recomputation."""

    @staticmethod
    def forward(ctx: Any, family: str, a: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.family = family
        out = a.new_empty(*a.shape[:-1], (a if b is None else b).shape[-2])
        for index in np.ndindex(*a.shape[:-2]):
            one, other = a[index], None if b is None else b[index]
            fill(out[index], _Tiles(one, other, family).tile, _ones(one, other))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (G,) = grads
        a, b = ctx.saved_tensors
        to_a, to_b = torch.zeros_like(a), None if b is None else torch.zeros_like(b)
        for index in np.ndindex(*a.shape[:-2]):
            own = G[index]
            _accumulate(
                partial(_part, own),
                _Tiles(a[index], None if b is None else b[index], ctx.family, slope_),
                to_a[index],
                to_a[index] if to_b is None else to_b[index],
            )
        return None, to_a, to_b


class TiledProduct(torch.autograd.Function):
    """Product with a tiled matrix; backward by recomputation, too."""

    @staticmethod
    def forward(ctx: Any, family: str, vectors: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(vectors, a, b)
        ctx.family = family
        out = vectors.new_empty(*a.shape[:-1], vectors.shape[-1])
        for index in np.ndindex(*a.shape[:-2]):
            one, other = a[index], None if b is None else b[index]
            tile = _Tiles(one, other, family).tile
            multiply(out[index], tile, _ones(one, other), vectors[index])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute each tile again."""
        (G,) = grads
        vectors, a, b = ctx.saved_tensors
        _, wants_vectors, wants_a, wants_b = ctx.needs_input_grad
        to_vectors = torch.empty_like(vectors) if wants_vectors else None
        to_a, to_b = torch.zeros_like(a), None if b is None else torch.zeros_like(b)
        for index in np.ndindex(*a.shape[:-2]):
            one, other = a[index], None if b is None else b[index]
            left, right = G[index], vectors[index]
            if to_vectors is not None:
                first, second = (one, None) if other is None else (other, one)
                tile = _Tiles(first, second, ctx.family).tile
                multiply(to_vectors[index], tile, _ones(first, second), left)
            if wants_a or wants_b:
                _accumulate(
                    partial(_part_of_outer, left, right),
                    _Tiles(one, other, ctx.family, slope_),
                    to_a[index],
                    to_a[index] if to_b is None else to_b[index],
                )
        return None, to_vectors, to_a, to_b


def _part(G: Tensor, i0: int, i1: int, j0: int, j1: int) -> Tensor:
    """A tile of an upstream gradient [n, m]."""
    return G[i0:i1, j0:j1]


def _part_of_outer(left: Tensor, right: Tensor, i0: int, i1: int, j0: int, j1: int) -> Tensor:
    """A tile of the upstream gradient left right^T of a product."""
    return left[i0:i1] @ right[j0:j1].T


def _ones(a: Tensor, b: Tensor | None) -> Tensor | None:
    """The diagonal of a symmetric matrix."""
    return a.new_ones(len(a)) if b is None else None


def _accumulate(
    upstream: Callable[[int, int, int, int], Tensor], slopes: _Tiles, to_a: Tensor, to_b: Tensor
) -> None:
    """Add the gradients of scaled inputs: ds/da = 2 (a - b), ds/db = -2 (a - b)."""
    a, b = slopes.a, slopes.b
    for i0, i1, j0, j1 in tiles(len(a), len(b), tile_shape(a), False):
        weight = slopes.tile(i0, i1, j0, j1).mul_(upstream(i0, i1, j0, j1)).mul_(2.0)
        rows, columns = weight.sum(1, keepdim=True), weight.sum(0)[:, None]
        to_a[i0:i1] += rows * a[i0:i1] - weight @ b[j0:j1]
        to_b[j0:j1] += columns * b[j0:j1] - weight.T @ a[i0:i1]
