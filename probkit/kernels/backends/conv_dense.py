r"""Convolutional kernels in plain differentiable PyTorch, one shift between pixels at a time.

A network of 3 x 3 convolutions with zero padding carries the covariances :math:`K[p, p']` between
pixel p of one image and pixel p' of another (Novak et al., 2019, eq. 7):

.. math:: K_0[p, p'] = b_0 + \frac{w_0}{9} \sum_\delta
                       \frac{1}{C} \langle x_{p + \delta}, x'_{p' + \delta} \rangle, \quad
          K_l[p, p'] = b_l + \frac{w_l}{9} \sum_\delta F(K_{l-1}[p + \delta, p' + \delta]).

Neither the convolution nor the activation changes the shift :math:`p' - p`, so each shift is a
problem of its own, a map over the window of pixels p for which both p and p' lie in the image: it
is filtered by a 3 x 3 box and put through F. Flattening needs the shift 0 alone, a map [H, W];
global average pooling averages over all of them. There, only shifts between rows of pixels are
taken one at a time, and all columns of pixels are paired at once: a map [h, W, W'] whose filter
runs down the rows and along the diagonals of the columns. The tangent kernel follows

.. math:: \Theta_l[p, p'] = K_l[p, p'] + \frac{w_l}{9} \sum_\delta
                            (\Theta_{l-1} \circ \dot F(K_{l-1}))[p + \delta, p' + \delta].

Images are [*batch, H, W, C, n] here: pixels lead, so that a matrix of pairs of images is the
innermost part of everything, and a shift by a pixel is a shift by a whole matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.kernels.backends.activations import Activation

__all__ = [
    "TAPS",
    "Layout",
    "box_",
    "pooled",
    "pooled_variance",
    "variances",
    "windows",
]

TAPS = 9
"""Pixels under the filter."""


class Layout(NamedTuple):
    """Which pairs of pixels and of images a map holds.

    Attributes:
        across: All pairs of columns of pixels, [h, W, W'], instead of equal ones, [h, W].
        pairs: Only image i with image i (n = m), [n], instead of all pairs of images, [n, m].
    """

    across: bool
    pairs: bool

    @property
    def pixel_dims(self) -> int:
        """Number of dims of the pixels."""
        return 3 if self.across else 2


def windows(shift: int, height: int) -> tuple[slice, slice]:
    """Rows of pixels of the first image that have a partner, and their partners ``shift`` below.

    Example:
        >>> windows(-1, 3)
        (slice(1, 3, None), slice(0, 2, None))
    """
    top, other, size = max(0, -shift), max(0, shift), height - abs(shift)
    return slice(top, top + size), slice(other, other + size)


# --------------------------------------------------------------------------- box filter


def box_(K: Tensor, work: Tensor, dim: int, across: bool) -> None:
    """Replace every entry by the sum over the 3 x 3 shifts of its two pixels.

    Entries outside count as zero. Four passes over the data.

    Args:
        K: Contiguous; rows of pixels are dim ``dim``, columns follow.
        work: Scratch of the same shape.
        dim: Where the pixels start, from the front or from the back.
        across: Whether the columns are pairs of columns.
    """
    _add_neighbours(K, work, (dim,))
    _add_neighbours(work, K, (dim + 1, dim + 2) if across else (dim + 1,))


def _add_neighbours(source: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
    """Write source[i - 1] + source[i] + source[i + 1] to ``out``, i running along all ``dims``."""
    last = source.shape[dims[0]] - 1
    if last == 0:
        out.copy_(source)
        return
    before, after, lower, upper = source, source, out, out
    for dim in dims:
        before, after = before.narrow(dim, 0, last), after.narrow(dim, 1, last)
        lower, upper = lower.narrow(dim, 0, last), upper.narrow(dim, 1, last)
        out.select(dim, last).copy_(source.select(dim, last))
    torch.add(before, after, out=lower)
    upper.add_(before)


class _Box(torch.autograd.Function):
    """The box filter out of place; it is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, K: Tensor, dim: int, across: bool) -> Tensor:
        ctx.where = dim, across
        out = K.clone(memory_format=torch.contiguous_format)
        box_(out, torch.empty_like(out), dim, across)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (G,) = grads
        return _Box.apply(G, *ctx.where), None, None


def _box(K: Tensor, dim: int, across: bool = False) -> Tensor:
    return _Box.apply(K, dim, across)


# --------------------------------------------------------------------------- variances


def variances(x: Tensor, weight_var: Tensor, bias_var: Tensor, activation: Activation) -> Tensor:
    """Variance of every pixel after each convolution.

    Args:
        x: Images [*batch, H, W, C, n].
        weight_var: Weight variances [*batch, steps], the last layer last.
        bias_var: Bias variances [*batch, steps].
        activation: What follows each convolution.

    Returns:
        k [*batch, steps - 1, H, W, n].
    """
    w, b = weight_var[..., None, None, None] / TAPS, bias_var[..., None, None, None]
    k = (x * x).mean(-2)
    found: list[Tensor] = []
    for step in range(w.shape[-4] - 1):
        k = activation.variance(k) if found else k
        k = _box(w[..., step, :, :, :] * k, -3) + b[..., step, :, :, :]
        found.append(k)
    return torch.stack(found, dim=-4)


def pooled_variance(
    k: Tensor, weight_var: Tensor, activation: Activation, *, tangent: bool
) -> Tensor:
    """Sum of the last F over the pixels of each image with themselves: [*batch, n].

    Args:
        k: :func:`variances` [*batch, steps - 1, H, W, n].
        weight_var: Weight variances [*batch, steps].
        activation: What follows each convolution.
        tangent: Sum F plus the tangent kernel times dF/dK instead.
    """
    total = activation.variance(k[..., -1, :, :, :])
    if tangent:
        w = weight_var[..., None, None, None] / TAPS
        theta = k[..., 0, :, :, :]
        for step in range(k.shape[-4]):
            if step > 0:
                theta = k[..., step, :, :, :] + _box(w[..., step, :, :, :] * theta, -3)
            theta = theta * activation.derivative_variance(k[..., step, :, :, :])
        total = total + theta
    return total.sum((-3, -2))


# --------------------------------------------------------------------------- covariances


def pooled(
    x1: Tensor,
    x2: Tensor,
    weight_var: Tensor,
    bias_var: Tensor,
    k1: Tensor,
    k2: Tensor,
    activation: Activation,
    *,
    layout: Layout,
    tangent: bool,
    above: bool = False,
) -> Tensor:
    """Sum of the last F over the window of one shift between rows of pixels.

    Args:
        x1: Rows of pixels of the first images [*batch, h, W, C, n].
        x2: Their partners in the second images [*batch, h, W, C, m].
        weight_var: [*batch, steps], the last layer last.
        bias_var: [*batch, steps].
        k1: :func:`variances` of the same pixels [*batch, steps - 1, h, W, n].
        k2: [*batch, steps - 1, h, W, m].
        activation: What follows each convolution.
        layout: Pairs of pixels and of images.
        tangent: Sum F plus the tangent kernel times dF/dK instead.
        above: Of all pairs of columns, sum those with the second one to the right.

    Returns:
        [*batch, n, m], or [*batch, n] for pairs.
    """
    across, pairs = layout
    if across:  # pair the columns
        x1, x2 = x1.unsqueeze(-3), x2.unsqueeze(-4)
        k1, k2 = k1.unsqueeze(-2), k2.unsqueeze(-3)
    if pairs:  # n matrices of one row and one column
        K = (x1 * x2).mean(-2)[..., None, None]
        k1, k2 = k1[..., None, None], k2[..., None, None]
    else:
        K = x1.mT @ x2 / x1.shape[-2]
        k1, k2 = k1.unsqueeze(-1), k2.unsqueeze(-2)
    inner = layout.pixel_dims + (3 if pairs else 2)  # dims after the batch
    gains = weight_var.reshape(*weight_var.shape, *(1,) * inner) / TAPS
    biases = bias_var.reshape(*bias_var.shape, *(1,) * inner)
    theta = torch.zeros_like(K)
    for step in range(gains.shape[-inner - 1] - 1):
        gain, bias, row, column = (t.select(-inner - 1, step) for t in (gains, biases, k1, k2))
        row = row.expand(*K.shape[:-1], 1)
        column = column.expand(*K.shape[:-2], 1, K.shape[-1])
        K = _box(gain * K, -inner, across) + bias
        if tangent:
            theta = K + _box(gain * theta, -inner, across) if step > 0 else K
            theta = theta * activation.derivative(K, row, column)
        K = activation.covariance(K, row, column)
    total = (K + theta if tangent else K).sum(-inner)  # [*batch, W(, W'), images]
    if above:
        width = total.shape[1 - inner]
        to_the_right = torch.ones(width, width, dtype=K.dtype, device=K.device).triu(1)
        total = total * to_the_right.reshape(width, width, *(1,) * (inner - 3))
    total = total.sum(tuple(range(1 - inner, layout.pixel_dims - inner)))
    return total[..., 0, 0] if pairs else total
