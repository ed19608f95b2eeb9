"""Dense and residual kernels on cache-tiled PyTorch: the reference backend, for CPU and GPU.

A Gram matrix is computed tile by tile: each tile goes through all layers, in place, in buffers that
stay in the cache, and is written once. When both inputs are the same, only tiles on and above the
diagonal are computed; the result is exactly symmetric and its diagonal is exactly the variances.
The backward pass recomputes each tile and never stores a layer of the whole matrix. Small problems
skip the tiling.

Products with a matrix go the same way and never hold more of it than a tile.

Any other backend offers the same functions: :func:`nngp`, :func:`ntk` and their products, the
convolutional :func:`~probkit.kernels.backends.conv_tiled.conv_nngp` and
:func:`~probkit.kernels.backends.conv_tiled.conv_ntk`, and the stationary
:func:`~probkit.kernels.backends.stationary_tiled.stationary` with its product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probkit.kernels.backends.activations import activation_of
from probkit.kernels.backends.conv_tiled import conv_nngp, conv_ntk
from probkit.kernels.backends.network_inputs import (
    Inputs,
    Options,
    broadcast,
    with_variances,
)
from probkit.kernels.backends.stationary_tiled import stationary, stationary_product
from probkit.kernels.backends.tiles import element, fill, multiply, tile_shape, tiles
from probkit.kernels.backends.torch_dense import (
    covariances,
    mirror_upper,
    paired,
)
from probkit.numerics import check_allocation

__all__ = [
    "SMALL",
    "TiledMatrix",
    "TiledProduct",
    "conv_nngp",
    "conv_ntk",
    "nngp",
    "nngp_product",
    "ntk",
    "ntk_product",
    "stationary",
    "stationary_product",
]

SMALL = 2**14
"""Matrices of at most this many entries are computed whole."""


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
    options = Options(activation_of(activation), tangent=False, residual=residual)
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
    options = Options(activation_of(activation), tangent=True, residual=residual)
    return _kernel(x1, x2, weight_var, bias_var, options, diag)


def nngp_product(
    x1: Tensor,
    x2: Tensor | None,
    vectors: Tensor,
    weight_var: Tensor,
    bias_var: Tensor,
    *,
    activation: str = "relu",
    residual: bool = False,
) -> Tensor:
    """Product of :func:`nngp` with vectors; the matrix is never stored.

    Gradients flow to all tensors; the backward pass computes each tile again. Second derivatives
    are not available.

    Args:
        x1: Inputs [*batch, n, d].
        x2: Inputs [*batch, m, d], or None for ``x1``: half the tiles are computed.
        vectors: Vectors [*batch, m, r].
        weight_var: As for :func:`nngp` [*batch, steps].
        bias_var: As for :func:`nngp` [*batch, steps].
        activation: As for :func:`nngp`.
        residual: As for :func:`nngp`.

    Returns:
        K @ vectors [*batch, n, r].

    Raises:
        DataError: Unknown activation.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> v = torch.ones(2, 1, dtype=torch.float64)
        >>> bool(torch.equal(nngp_product(x, None, v, one, zero), nngp(x, None, one, zero) @ v))
        True
    """
    options = Options(activation_of(activation), tangent=False, residual=residual)
    return _product(x1, x2, vectors, weight_var, bias_var, options)


def ntk_product(
    x1: Tensor,
    x2: Tensor | None,
    vectors: Tensor,
    weight_var: Tensor,
    bias_var: Tensor,
    *,
    activation: str = "relu",
    residual: bool = False,
) -> Tensor:
    """Product of :func:`ntk` with vectors; arguments, result and errors of :func:`nngp_product`.

    Example:
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> ntk_product(x, None, 3 * x, one, zero)
        tensor([[3.]], dtype=torch.float64)
    """
    options = Options(activation_of(activation), tangent=True, residual=residual)
    return _product(x1, x2, vectors, weight_var, bias_var, options)


def _kernel(
    x1: Tensor, x2: Tensor | None, w: Tensor, b: Tensor, options: Options, diag: bool
) -> Tensor:
    """Broadcast the batch dims, then take the shortest way that fits the size."""
    x1, x2, w, b = broadcast(x1, x2, w, b)
    n, m = x1.shape[-2], (x1 if x2 is None else x2).shape[-2]
    if not diag:
        size = math.prod((*x1.shape[:-1], m)) * x1.element_size()
        check_allocation(size, f"kernel matrix {[*x1.shape[:-1], m]}", device=x1.device)
    given = with_variances(x1, x2, w, b, options)
    if diag and given.x2 is not None and given.k2 is not None:
        return paired(x1, given.x2, w, b, given.k1, given.k2, **options._asdict())
    if diag:
        assert given.diagonal is not None
        return given.diagonal
    if n * m <= SMALL:
        return _whole(given, options)
    return TiledMatrix.apply(options, *given)


def _product(
    x1: Tensor, x2: Tensor | None, vectors: Tensor, w: Tensor, b: Tensor, options: Options
) -> Tensor:
    """Broadcast the batch dims, then multiply tile by tile."""
    x1, x2, w, b = broadcast(x1, x2, w, b, vectors.shape[:-2])
    given = with_variances(x1, x2, w, b, options)
    return TiledProduct.apply(options, vectors.expand(*x1.shape[:-2], -1, -1), *given)


def _whole(given: Inputs, options: Options) -> Tensor:
    """The whole matrix [*batch, n, m] at once; for one input, mirrored from its upper triangle."""
    x1, x2, w, b, k1, k2, diagonal = given
    if x2 is not None and k2 is not None:
        return covariances(x1, x2, w, b, k1, k2, **options._asdict())
    assert diagonal is not None
    return mirror_upper(covariances(x1, x1, w, b, k1, k1, **options._asdict()), diagonal)


class TiledMatrix(torch.autograd.Function):
    """Tiled matrix with a backward pass by recomputation."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor | None) -> Tensor:
        """Fill the matrix."""
        ctx.save_for_backward(*tensors)
        ctx.options = options
        given = Inputs(*tensors)  # type: ignore[arg-type]
        batch, n = given.x1.shape[:-2], given.x1.shape[-2]
        out = given.x1.new_empty(*batch, n, n if given.x2 is None else given.x2.shape[-2])
        for index in np.ndindex(*batch):
            one = element(given, index)
            fill(out[index], _NetworkTiles(one, options).tile, one.diagonal)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute each tile again."""
        (G,) = grads
        needed = ctx.needs_input_grad[1:]
        given = Inputs(*ctx.saved_tensors)
        if torch.is_grad_enabled():  # double backward: keep the layers
            return None, *_differentiable_gradients(G, given, needed, ctx.options)
        found = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None
            for t, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        for index in np.ndindex(*G.shape[:-2]):
            target = [None if t is None else t[index] for t in found]
            _accumulate(_of_matrix(G[index]), element(given, index), target, ctx.options)
        return None, *found


class TiledProduct(torch.autograd.Function):
    """Product with a tiled matrix; backward by recomputation, too."""

    @staticmethod
    def forward(ctx: Any, options: Options, vectors: Tensor, *tensors: Tensor | None) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(vectors, *tensors)
        ctx.options = options
        given = Inputs(*tensors)  # type: ignore[arg-type]
        out = vectors.new_empty(*given.x1.shape[:-1], vectors.shape[-1])
        for index in np.ndindex(*given.x1.shape[:-2]):
            one = element(given, index)
            multiply(out[index], _NetworkTiles(one, options).tile, one.diagonal, vectors[index])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute each tile again."""
        (G,) = grads
        vectors, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        given = Inputs(*tensors)
        to_vectors = torch.empty_like(vectors) if ctx.needs_input_grad[1] else None
        found = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None
            for t, need in zip(tensors, needed, strict=True)
        ]
        for index in np.ndindex(*G.shape[:-2]):
            one = element(given, index)
            if to_vectors is not None:
                turned = _transposed(one)
                source = _NetworkTiles(turned, ctx.options)
                multiply(to_vectors[index], source.tile, one.diagonal, G[index])
            if any(needed):
                target = [None if t is None else t[index] for t in found]
                upstream = _of_outer(G[index], vectors[index])
                _accumulate(upstream, one, target, ctx.options)
        return None, to_vectors, *found


def _transposed(given: Inputs) -> Inputs:
    """The inputs of the transposed matrix."""
    if given.x2 is None or given.k2 is None:
        return given
    return given._replace(x1=given.x2, x2=given.x1, k1=given.k2, k2=given.k1)


# --------------------------------------------------------------------------- forward


class _NetworkTiles:
    """Tiles of one matrix [n, m], each taken through all layers in buffers of its own."""

    def __init__(self, given: Inputs, options: Options) -> None:
        x1, x2, w, b, k1, k2, _ = given
        self.options, self.x1 = options, x1
        self.gains, self.biases = w.tolist(), b.tolist()
        self.right = ((x1 if x2 is None else x2) * (self.gains[0] / x1.shape[-1])).T
        factors = options.activation.factors
        self.rows = [tuple(f[:, None] for f in factors(k)) for k in k1[:-1]]
        if k2 is None:
            self.columns = [tuple(f.T for f in row) for row in self.rows]
        else:
            self.columns = [tuple(f[None, :] for f in factors(k)) for k in k2[:-1]]
        shape = tile_shape(x1)
        count = 3 + options.tangent + options.residual
        self.buffers = [x1.new_empty(shape[0] * max(shape)) for _ in range(count)]

    def tile(self, i0: int, i1: int, j0: int, j1: int) -> Tensor:
        """Rows i0 to i1, columns j0 to j1; overwritten by the next call."""
        size = (i1 - i0, j1 - j0)
        views = [buffer[: size[0] * size[1]].view(size) for buffer in self.buffers]
        torch.mm(self.x1[i0:i1], self.right[:, j0:j1], out=views[0])
        views[0].add_(self.biases[0])
        rows = [tuple(f[i0:i1] for f in factors) for factors in self.rows]
        columns = [tuple(f[:, j0:j1] for f in factors) for factors in self.columns]
        return _run_steps(views, rows, columns, self.gains, self.biases, self.options)


def _run_steps(
    buffers: list[Tensor],
    rows: list[tuple[Tensor, ...]],
    columns: list[tuple[Tensor, ...]],
    gains: list[float],
    biases: list[float],
    options: Options,
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


class _Upstream(NamedTuple):
    """Gradient of a matrix [n, m], tile by tile, and its diagonal."""

    shape: tuple[int, int]
    tile: Callable[[int, int, int, int], Tensor]
    diagonal: Callable[[], Tensor]


def _of_matrix(G: Tensor) -> _Upstream:
    """The gradient ``G`` itself."""
    shape = (G.shape[0], G.shape[1])
    return _Upstream(shape, lambda i0, i1, j0, j1: G[i0:i1, j0:j1], G.diagonal)


def _of_outer(left: Tensor, right: Tensor) -> _Upstream:
    """The gradient left right^T of a product, never stored."""
    return _Upstream(
        (left.shape[0], right.shape[0]),
        lambda i0, i1, j0, j1: left[i0:i1] @ right[j0:j1].T,
        lambda: (left * right).sum(-1),
    )


def _accumulate(G: _Upstream, given: Inputs, found: list[Tensor | None], options: Options) -> None:
    """Add the gradients of sum(G * matrix) of one matrix [n, m] to ``found``, tile by tile."""
    x1, x2, w, b, k1, k2, _ = given
    grad_x1, grad_x2, grad_w, grad_b, grad_k1, grad_k2, grad_diagonal = found
    symmetric = x2 is None or k2 is None
    if x2 is None or k2 is None:
        x2, k2, grad_x2, grad_k2 = x1, k1, grad_x1, grad_k1
        if grad_diagonal is not None:
            grad_diagonal += G.diagonal()
    for i0, i1, j0, j1 in tiles(*G.shape, tile_shape(x1), symmetric):
        upstream = G.tile(i0, i1, j0, j1)
        if symmetric:
            upstream = upstream + G.tile(j0, j1, i0, i1).T
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
    options: Options,
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
    G: Tensor, given: Inputs, needed: tuple[bool, ...], options: Options
) -> tuple[Tensor | None, ...]:
    """Gradients as differentiable functions of ``G`` and of all tensors."""
    # new nodes, so that no gradient runs on from one tensor to another that it was computed from
    alias = [None if t is None else t.view_as(t) for t in given]
    K = _whole(Inputs(*alias), options)  # type: ignore[arg-type]
    wanted = [t for t, need in zip(alias, needed, strict=True) if need and t is not None]
    values = iter(torch.autograd.grad(K, wanted, G, create_graph=True))
    return tuple(next(values) if need else None for need in needed)
