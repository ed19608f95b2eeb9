"""Dense and residual kernels on cache-tiled PyTorch: the reference backend, for CPU and GPU.

A Gram matrix is computed tile by tile: each tile goes through all layers, in place, in buffers that
stay in the cache, and is written once. When both inputs are the same, only tiles on and above the
diagonal are computed; the result is exactly symmetric and its diagonal is exactly the variances.
The backward pass recomputes each tile and never stores a layer of the whole matrix. Small problems
skip the tiling.

Any other backend offers the same functions: :func:`nngp` and :func:`ntk`, and the convolutional
:func:`~probkit.kernels.backends.conv_tiled.conv_nngp` and
:func:`~probkit.kernels.backends.conv_tiled.conv_ntk`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probkit.kernels.backends.activations import Activation, activation_of
from probkit.kernels.backends.conv_tiled import conv_nngp, conv_ntk
from probkit.kernels.backends.tiles import element, tiles, write_mirrored
from probkit.kernels.backends.torch_dense import (
    covariances,
    mirror_upper,
    paired,
    tangent_variance,
    variances,
)
from probkit.numerics import check_allocation

__all__ = ["SMALL", "conv_nngp", "conv_ntk", "nngp", "ntk"]

SMALL = 2**14
"""Matrices of at most this many entries are computed whole."""

_TILE_CPU = (128, 512)  # rows for each thread, columns: three float64 buffers of 512 KiB
_MAX_THREADS = 8  # more threads share the tiles of this many
_TILE_GPU = (4096, 4096)


def nngp(
    x1: Tensor,
    x2: Tensor | None,
    weight_var: Tensor,
    bias_var: Tensor,
    *,
    activation: str = "relu",
    residual: bool = False,
    diag: bool = False,
) -> Tensor:
    """Covariance of the outputs of an infinitely wide network, its weights drawn from the prior.

    Step 0 is the input layer, K = w[0] x1 x2^T / d + b[0]; each later step is an activation and a
    dense layer, K <- w[l] F(K) + b[l]; in a residual network all steps but the first and the last
    are blocks with a skip connection, K <- K + w[l] F(K) + b[l]. All tensors have one dtype
    (float32 or float64), live on one device, and their batch dims are broadcast. Gradients flow to
    all of them; second derivatives too, where the activation has them (ReLU: zero by rule at
    coinciding points).

    Args:
        x1: Inputs [*batch, n, d].
        x2: Inputs [*batch, m, d], or None for ``x1``: then the result is exactly symmetric.
        weight_var: Variance of the weights times fan-in, for each step [*batch, steps].
        bias_var: Variance of the biases, for each step [*batch, steps].
        activation: Name in :data:`probkit.kernels.backends.activations.ACTIVATIONS`.
        residual: Whether the steps between the first and the last are residual blocks.
        diag: Only row i of ``x1`` with row i of ``x2`` (n = m).

    Returns:
        K [*batch, n, m], or [*batch, n] for ``diag``.

    Raises:
        DataError: Unknown activation, or a matrix that cannot fit into memory.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> nngp(x, None, one, zero, diag=True)
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    options = _Options(activation_of(activation), tangent=False, residual=residual)
    return _kernel(x1, x2, weight_var, bias_var, options, diag)


def ntk(
    x1: Tensor,
    x2: Tensor | None,
    weight_var: Tensor,
    bias_var: Tensor,
    *,
    activation: str = "relu",
    residual: bool = False,
    diag: bool = False,
) -> Tensor:
    """Neural tangent kernel of the same network, all layers trained.

    Arguments, result and errors are those of :func:`nngp`. Close to coinciding rows of two
    different inputs the ReLU tangent kernel has the slope of a square root, so rounding of K by
    1e-16 shows as 1e-9; with ``x2=None`` the diagonal is exact.

    Example:
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> ntk(x, None, one, zero)
        tensor([[1.]], dtype=torch.float64)
    """
    options = _Options(activation_of(activation), tangent=True, residual=residual)
    return _kernel(x1, x2, weight_var, bias_var, options, diag)


class _Inputs(NamedTuple):
    """Tensors that a matrix is computed from, all with the batch dims of the result."""

    x1: Tensor  # [*batch, n, d]
    x2: Tensor | None  # [*batch, m, d]; None for x1
    w: Tensor  # [*batch, steps]
    b: Tensor  # [*batch, steps]
    k1: Tensor  # [*batch, steps, n]
    k2: Tensor | None  # [*batch, steps, m]; None for k1
    diagonal: Tensor | None  # [*batch, n]; None where x1 and x2 differ


class _Options(NamedTuple):
    activation: Activation
    tangent: bool
    residual: bool


def _kernel(
    x1: Tensor, x2: Tensor | None, w: Tensor, b: Tensor, options: _Options, diag: bool
) -> Tensor:
    """Broadcast the batch dims, then take the shortest way that fits the size."""
    activation, tangent, residual = options
    inputs = [x1] if x2 is None else [x1, x2]
    # not torch.broadcast_shapes, whose first call imports sympy
    batch = np.broadcast_shapes(*(x.shape[:-2] for x in inputs), w.shape[:-1], b.shape[:-1])
    inputs = [x.expand(*batch, *x.shape[-2:]) for x in inputs]
    w, b = w.expand(*batch, w.shape[-1]), b.expand(*batch, b.shape[-1])
    n, m = inputs[0].shape[-2], inputs[-1].shape[-2]
    if not diag:
        size = math.prod((*batch, n, m)) * x1.element_size()
        check_allocation(size, f"kernel matrix {[*batch, n, m]}", device=x1.device)
    k1 = variances(inputs[0], w, b, activation, residual=residual)
    if x2 is None:
        diagonal = k1[..., -1, :]
        if tangent:
            diagonal = tangent_variance(k1, w, activation, residual=residual)
        if diag:
            return diagonal
        given = _Inputs(inputs[0], None, w, b, k1, None, diagonal)
    else:
        k2 = variances(inputs[1], w, b, activation, residual=residual)
        if diag:
            return paired(inputs[0], inputs[1], w, b, k1, k2, **options._asdict())
        given = _Inputs(inputs[0], inputs[1], w, b, k1, k2, None)
    if n * m <= SMALL:
        return _whole(given, options)
    return _Tiled.apply(options, *given)


def _whole(given: _Inputs, options: _Options) -> Tensor:
    """The whole matrix [*batch, n, m] at once; for one input, mirrored from its upper triangle."""
    x1, x2, w, b, k1, k2, diagonal = given
    if x2 is not None and k2 is not None:
        return covariances(x1, x2, w, b, k1, k2, **options._asdict())
    assert diagonal is not None
    return mirror_upper(covariances(x1, x1, w, b, k1, k1, **options._asdict()), diagonal)


class _Tiled(torch.autograd.Function):
    """Tiled matrix with a backward pass by recomputation."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        given = _Inputs(*tensors)  # type: ignore[arg-type]
        batch, n = given.x1.shape[:-2], given.x1.shape[-2]
        out = given.x1.new_empty(*batch, n, n if given.x2 is None else given.x2.shape[-2])
        for index in np.ndindex(*batch):
            _fill(out[index], element(given, index), options)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (G,) = grads
        needed = ctx.needs_input_grad[1:]
        given = _Inputs(*ctx.saved_tensors)
        if torch.is_grad_enabled():  # double backward: keep the layers
            return None, *_differentiable_gradients(G, given, needed, ctx.options)
        found = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None
            for t, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        for index in np.ndindex(*G.shape[:-2]):
            target = [None if t is None else t[index] for t in found]
            _accumulate(G[index], element(given, index), target, ctx.options)
        return None, *found


# --------------------------------------------------------------------------- tiles


def _tile_shape(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile."""
    if x.device.type == "cpu":
        rows, columns = _TILE_CPU
        return rows * min(torch.get_num_threads(), _MAX_THREADS), columns
    return _TILE_GPU


# --------------------------------------------------------------------------- forward


def _fill(out: Tensor, given: _Inputs, options: _Options) -> None:
    """Write one matrix [n, m]."""
    x1, x2, w, b, k1, k2, diagonal = given
    activation = options.activation
    gains, biases = w.tolist(), b.tolist()
    right = ((x1 if x2 is None else x2) * (gains[0] / x1.shape[-1])).T
    rows = [tuple(f[:, None] for f in activation.factors(k)) for k in k1[:-1]]
    if k2 is None:
        columns = [tuple(f.T for f in factors) for factors in rows]
    else:
        columns = [tuple(f[None, :] for f in activation.factors(k)) for k in k2[:-1]]
    shape = _tile_shape(x1)
    buffers = [
        x1.new_empty(shape[0] * max(shape)) for _ in range(3 + options.tangent + options.residual)
    ]
    for i0, i1, j0, j1 in tiles(out.shape[0], out.shape[1], shape, x2 is None):
        size = (i1 - i0, j1 - j0)
        views = [buffer[: size[0] * size[1]].view(size) for buffer in buffers]
        torch.mm(x1[i0:i1], right[:, j0:j1], out=views[0])
        views[0].add_(biases[0])
        tile = _run_steps(
            views,
            [tuple(f[i0:i1] for f in factors) for factors in rows],
            [tuple(f[:, j0:j1] for f in factors) for factors in columns],
            gains,
            biases,
            options,
        )
        if x2 is None:
            write_mirrored(out, tile, i0, i1, j0, j1)
        else:
            out[i0:i1, j0:j1] = tile
    if diagonal is not None:
        out.diagonal().copy_(diagonal)


def _run_steps(
    buffers: list[Tensor],
    rows: list[tuple[Tensor, ...]],
    columns: list[tuple[Tensor, ...]],
    gains: list[float],
    biases: list[float],
    options: _Options,
) -> Tensor:
    """Take the tile ``buffers[0]`` through steps 1, 2, ..., in place.

    Buffers four and five, where wanted, hold the tangent kernel and what a block was given.
    """
    K, work, slope, *rest = buffers
    theta = rest.pop(0).copy_(K) if options.tangent else None
    skip = rest.pop(0) if options.residual else None
    last = len(rows)
    for step, (row, column) in enumerate(zip(rows, columns, strict=True), start=1):
        gain = gains[step]
        block = skip is not None and step < last
        if skip is not None and block:
            skip.copy_(K)
        options.activation.covariance_(
            K, row, column, gain, work, slope, with_derivative=options.tangent
        )
        K.add_(biases[step])
        if theta is not None:
            passed = slope.mul_(theta)
            if block:
                theta.add_(passed, alpha=gain).add_(K)
            else:
                torch.add(K, passed, alpha=gain, out=theta)
        if skip is not None and block:
            K.add_(skip)
    return K if theta is None else theta


# --------------------------------------------------------------------------- backward


def _accumulate(G: Tensor, given: _Inputs, found: list[Tensor | None], options: _Options) -> None:
    """Add the gradients of sum(G * matrix) of one matrix [n, m] to ``found``, tile by tile."""
    x1, x2, w, b, k1, k2, _ = given
    grad_x1, grad_x2, grad_w, grad_b, grad_k1, grad_k2, grad_diagonal = found
    symmetric = x2 is None or k2 is None
    if x2 is None or k2 is None:
        x2, k2, grad_x2, grad_k2 = x1, k1, grad_x1, grad_k1
        if grad_diagonal is not None:
            grad_diagonal += G.diagonal()
    for i0, i1, j0, j1 in tiles(G.shape[0], G.shape[1], _tile_shape(x1), symmetric):
        upstream = G[i0:i1, j0:j1]
        if symmetric:
            upstream = upstream + G[j0:j1, i0:i1].T
            if j0 == i0:
                upstream = upstream.triu_(1)
        sources = (x1[i0:i1], x2[j0:j1], w, b, k1[:, i0:i1], k2[:, j0:j1])
        targets = (
            None if grad_x1 is None else grad_x1[i0:i1],
            None if grad_x2 is None else grad_x2[j0:j1],
            grad_w,
            grad_b,
            None if grad_k1 is None else grad_k1[:, i0:i1],
            None if grad_k2 is None else grad_k2[:, j0:j1],
        )
        _accumulate_tile(upstream, sources, targets, options)


def _accumulate_tile(
    upstream: Tensor,
    sources: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    targets: tuple[Tensor | None, ...],
    options: _Options,
) -> None:
    """Compute one tile again, with its layers, and add its gradients to ``targets`` in place."""
    leaves = [
        source.detach().requires_grad_(target is not None)
        for source, target in zip(sources, targets, strict=True)
    ]
    x1, x2, w, b, k1, k2 = leaves
    with torch.enable_grad():
        tile = covariances(x1, x2, w, b, k1, k2, **options._asdict())
    wanted = [(leaf, t) for leaf, t in zip(leaves, targets, strict=True) if t is not None]
    if not wanted:
        return
    values = torch.autograd.grad(tile, [leaf for leaf, _ in wanted], upstream)
    for value, (_, target) in zip(values, wanted, strict=True):
        target += value


def _differentiable_gradients(
    G: Tensor, given: _Inputs, needed: tuple[bool, ...], options: _Options
) -> tuple[Tensor | None, ...]:
    """Gradients as differentiable functions of ``G`` and of all tensors."""
    # new nodes, so that no gradient runs on from one tensor to another that it was computed from
    alias = [None if t is None else t.view_as(t) for t in given]
    K = _whole(_Inputs(*alias), options)  # type: ignore[arg-type]
    wanted = [t for t, need in zip(alias, needed, strict=True) if need and t is not None]
    values = iter(torch.autograd.grad(K, wanted, G, create_graph=True))
    return tuple(next(values) if need else None for need in needed)
