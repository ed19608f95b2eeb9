"""Convolutional kernels on cache-tiled PyTorch: the reference backend, for CPU and GPU.

For each shift between rows of pixels (:mod:`probkit.kernels.backends.conv_dense`), a tile of pairs
of images goes through all layers in place, in buffers that stay in the cache, and what the head
sums over is added to the result. Covariances between pixels are never stored: memory beyond the
result [n, m] is one tile and the variances of all pixels. The backward pass recomputes each tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.kernels.backends.activations import Activation, activation_of
from probkit.kernels.backends.conv_dense import (
    TAPS,
    Layout,
    box_,
    pooled,
    pooled_variance,
    variances,
    windows,
)
from probkit.kernels.backends.tiles import element, tiles
from probkit.kernels.backends.torch_dense import mirror_upper
from probkit.numerics import check_allocation

__all__ = ["POOLINGS", "SMALL", "conv_nngp", "conv_ntk"]

POOLINGS = ("flatten", "gap")
"""Heads: flatten all pixels, or global average pooling."""

SMALL = 2**14
"""Problems of at most this many pairs of pixels are computed whole where gradients are wanted."""

_TILE_CPU = 2**18  # entries for each thread: three float64 buffers of 2 MiB, few calls for each
_TILE_GPU = 2**24
_MAX_THREADS = 8
_COLUMNS = 512  # longer rows do not make a tile faster


def conv_nngp(
    x1: Tensor,
    x2: Tensor | None,
    weight_var: Tensor,
    bias_var: Tensor,
    *,
    pooling: str = "flatten",
    activation: str = "relu",
    diag: bool = False,
) -> Tensor:
    """Covariance of the outputs of an infinitely wide convolutional network, drawn from the prior.

    Steps 0, ..., L - 1 are 3 x 3 convolutions of stride one, zero outside of the image, each
    followed by the activation; step L is a dense layer on top of the pooled pixels. All tensors
    have one dtype (float32 or float64), live on one device, and their batch dims are broadcast.
    Gradients flow to all of them; second derivatives too, where the activation has them.

    Args:
        x1: Images [*batch, n, H, W, C].
        x2: Images [*batch, m, H, W, C], or None for ``x1``: then the result is exactly symmetric.
        weight_var: Variance of the weights times fan-in, for each step [*batch, L + 1].
        bias_var: Variance of the biases, for each step [*batch, L + 1].
        pooling: Name in :data:`POOLINGS`.
        activation: Name in :data:`probkit.kernels.backends.activations.ACTIVATIONS`.
        diag: Only image i of ``x1`` with image i of ``x2`` (n = m).

    Returns:
        K [*batch, n, m], or [*batch, n] for ``diag``.

    Raises:
        DataError: Unknown activation or pooling, or what cannot fit into memory.

    Example:
        >>> x = torch.ones(1, 2, 2, 1, dtype=torch.float64)
        >>> one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> conv_nngp(x, None, one, zero)  # four of nine taps see the image, ReLU halves
        tensor([[0.2222]], dtype=torch.float64)
    """
    return _kernel(x1, x2, weight_var, bias_var, activation, pooling, tangent=False, diag=diag)


def conv_ntk(
    x1: Tensor,
    x2: Tensor | None,
    weight_var: Tensor,
    bias_var: Tensor,
    *,
    pooling: str = "flatten",
    activation: str = "relu",
    diag: bool = False,
) -> Tensor:
    """Neural tangent kernel of the same network, all layers trained.

    Arguments, result and errors are those of :func:`conv_nngp`. Where two patches coincide, the
    ReLU tangent kernel has the slope of a square root, so rounding of K by 1e-16 shows as 1e-9.

    Example:
        >>> x = torch.ones(1, 2, 2, 1, dtype=torch.float64)
        >>> one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> conv_ntk(x, None, one, zero)
        tensor([[0.4444]], dtype=torch.float64)
    """
    return _kernel(x1, x2, weight_var, bias_var, activation, pooling, tangent=True, diag=diag)


class _Inputs(NamedTuple):
    """Tensors that a result is computed from, all with the batch dims of the result."""

    x1: Tensor  # [*batch, H, W, C, n]
    x2: Tensor | None  # [*batch, H, W, C, m]; None for x1
    w: Tensor  # [*batch, steps]
    b: Tensor  # [*batch, steps]
    k1: Tensor  # [*batch, steps - 1, H, W, n]
    k2: Tensor | None  # [*batch, steps - 1, H, W, m]; None for k1
    diagonal: Tensor | None  # [*batch, n]; None where x1 and x2 differ, and for pairs


class _Options(NamedTuple):
    activation: Activation
    tangent: bool
    layout: Layout
    above: bool = False  # only pairs of pixels of which the second one comes later in the image

    def shifts(self, height: int) -> range:
        """Shifts between rows of pixels."""
        if not self.layout.across:
            return range(1)
        return range(0 if self.above else 1 - height, height)

    def dense(self, shift: int) -> dict[str, Any]:
        """Options of :func:`pooled`."""
        above = self.above and shift == 0  # further down, all columns come later
        return {
            "activation": self.activation,
            "tangent": self.tangent,
            "layout": self.layout,
            "above": above,
        }


def _kernel(
    x1: Tensor,
    x2: Tensor | None,
    w: Tensor,
    b: Tensor,
    activation: str,
    pooling: str,
    *,
    tangent: bool,
    diag: bool,
) -> Tensor:
    """Sums over the pixels, then the last layer."""
    law = activation_of(activation)
    if pooling not in POOLINGS:
        accepted = ", ".join(map(repr, POOLINGS))
        raise DataError(f"pooling: expected one of {accepted}, got {pooling!r}")
    height, width = x1.shape[-3:-1]
    count = (height * width) ** (2 if pooling == "gap" else 1)
    inputs = [x1] if x2 is None else [x1, x2]
    batch = np.broadcast_shapes(*(x.shape[:-4] for x in inputs), w.shape[:-1], b.shape[:-1])
    _check_memory(inputs, batch, w.shape[-1] - 1, law, pooling, diag)
    # pixels first
    inputs = [
        x.movedim(-4, -1).contiguous().expand(*batch, *x.shape[-3:], x.shape[-4]) for x in inputs
    ]
    w, b = w.expand(*batch, w.shape[-1]), b.expand(*batch, b.shape[-1])
    options = _Options(law, tangent, Layout(across=pooling == "gap", pairs=False))
    total = _totals(inputs, w, b, options, diag)
    last_w, last_b = w[..., -1, None] / count, b[..., -1, None]
    if not diag:
        last_w, last_b = last_w[..., None], last_b[..., None]
    return last_w * total + last_b


def _check_memory(
    inputs: list[Tensor],
    batch: tuple[int, ...],
    convolutions: int,
    law: Activation,
    pooling: str,
    diag: bool,
) -> None:
    """Refuse what cannot fit: the result, what each pixel keeps, and a tile."""
    x = inputs[0]
    n, m = x.shape[-4], inputs[-1].shape[-4]
    height, width, channels = x.shape[-3:]
    pixels, images = height * width, sum(each.shape[-4] for each in inputs)
    # two copies of the images and, for one batch element at a time, factors of the variances
    factors = convolutions * len(law.factors(x.new_ones(1)))
    kept = pixels * images * (2 * channels + factors + math.prod(batch) * convolutions)
    result = math.prod((*batch, n)) * (1 if diag else m)
    tile = 4 * max(pixels * (width if pooling == "gap" else 1), _budget(x))
    check_allocation(
        (kept + result + tile) * x.element_size(),
        f"convolutional kernel matrix {[*batch, n, m]} of images {[height, width, x.shape[-1]]}",
        device=x.device,
    )


def _totals(inputs: list[Tensor], w: Tensor, b: Tensor, options: _Options, diag: bool) -> Tensor:
    """Sums over all shifts [*batch, n, m], or [*batch, n] for ``diag``."""
    law, tangent, layout, _ = options
    x1, x2 = inputs[0], inputs[-1]
    k1 = variances(x1, w, b, law)
    if len(inputs) == 2:
        k2 = variances(x2, w, b, law)
        chosen = options._replace(layout=layout._replace(pairs=diag))
        return _compute(_Inputs(x1, x2, w, b, k1, k2, None), chosen)
    diagonal = pooled_variance(k1, w, law, tangent=tangent)
    if layout.across:
        # of an image with itself, opposite shifts see the same pairs of pixels
        half = options._replace(layout=layout._replace(pairs=True), above=True)
        diagonal = diagonal + 2 * _compute(_Inputs(x1, x1, w, b, k1, k1, None), half)
    if diag:
        return diagonal
    return _compute(_Inputs(x1, None, w, b, k1, None, diagonal), options)


def _compute(given: _Inputs, options: _Options) -> Tensor:
    """Take the way that fits the size."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if wanted and _entries(given, options) <= SMALL:
        return _whole(given, options)
    return _Tiled.apply(options, *given)


def _entries(given: _Inputs, options: _Options) -> int:
    """Pairs of pixels of pairs of images."""
    x1, x2 = given.x1, given.x1 if given.x2 is None else given.x2
    pixels = x1.shape[-4] * x1.shape[-3]
    images = math.prod(x1.shape[:-4]) * x1.shape[-1]
    across, pairs = options.layout
    return images * (1 if pairs else x2.shape[-1]) * (pixels**2 if across else pixels)


def _whole(given: _Inputs, options: _Options) -> Tensor:
    """All pairs of images at once, one shift after the other, for autograd."""
    x1, x2, w, b, k1, k2, diagonal = given
    second, other = (x1, k1) if x2 is None or k2 is None else (x2, k2)
    parts = []
    for shift in options.shifts(x1.shape[-4]):
        rows, partners = windows(shift, x1.shape[-4])
        parts.append(
            pooled(
                x1[..., rows, :, :, :],
                second[..., partners, :, :, :],
                w,
                b,
                k1[..., rows, :, :],
                other[..., partners, :, :],
                **options.dense(shift),
            )
        )
    total = torch.stack(parts).sum(0)
    return total if diagonal is None else mirror_upper(total, diagonal)


class _Tiled(torch.autograd.Function):
    """Sums of tiles with a backward pass by recomputation."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        given = _Inputs(*tensors)  # type: ignore[arg-type]
        batch, n = given.x1.shape[:-4], given.x1.shape[-1]
        m = n if given.x2 is None else given.x2.shape[-1]
        out = given.x1.new_zeros(*batch, n, *(() if options.layout.pairs else (m,)))
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
        for index in np.ndindex(*given.x1.shape[:-4]):
            target = [None if t is None else t[index] for t in found]
            _accumulate(G[index], element(given, index), target, ctx.options)
        return None, *found


# --------------------------------------------------------------------------- tiles


class _Tile(NamedTuple):
    """Where a tile sits: rows of pixels of some images, and what they are paired with."""

    shift: int
    pixels: slice
    images: slice
    other_pixels: slice
    other_images: slice


def _budget(x: Tensor) -> int:
    """Entries of a tile."""
    if x.device.type == "cpu":
        return _TILE_CPU * min(torch.get_num_threads(), _MAX_THREADS)
    return _TILE_GPU


def _tiles_of(given: _Inputs, options: _Options) -> Iterator[_Tile]:
    """All tiles of all shifts, for one batch element."""
    height, width, _, n = given.x1.shape
    m = n if given.x2 is None else given.x2.shape[-1]
    across, pairs = options.layout
    for shift in options.shifts(height):
        pixels, others = windows(shift, height)
        count = (height - abs(shift)) * width * (width if across else 1)
        shape = _tile_shape(max(1, _budget(given.x1) // count), n, m, pairs, given.x2 is None)
        if pairs:
            for i in range(0, n, shape[0]):
                images = slice(i, min(i + shape[0], n))
                yield _Tile(shift, pixels, images, others, images)
            continue
        for i0, i1, j0, j1 in tiles(n, m, shape, given.x2 is None):
            yield _Tile(shift, pixels, slice(i0, i1), others, slice(j0, j1))


def _tile_shape(size: int, n: int, m: int, pairs: bool, symmetric: bool) -> tuple[int, int]:
    """First and second images of a tile that may hold ``size`` pairs."""
    if pairs:
        return size, size
    columns = max(1, min(size, m, _COLUMNS))
    rows = min(size // columns, columns)
    if symmetric:  # half of the square on the diagonal is computed in vain
        rows = min(rows, -(-columns // 6))
    return max(1, rows), columns


# --------------------------------------------------------------------------- forward


_Images = slice | Tensor  # which images: a range, or an index for each pair


def _blocks(given: _Inputs, options: _Options) -> Iterator[tuple[Any, _Images, _Images]]:
    """Where a block of the result goes, its first images and its second images.

    Of all pairs of columns of pixels (``across``) a few pairs of images fill a tile. They stand in
    one line, each pair of images with the indexes of both: no pair is computed twice, and nothing
    is broadcast over short rows.
    """
    height, width, _, n = given.x1.shape
    m = n if given.x2 is None else given.x2.shape[-1]
    across, pairs = options.layout
    size = max(1, _budget(given.x1) // (height * width * (width if across else 1)))
    if pairs:
        for start in range(0, n, size):
            images = slice(start, min(start + size, n))
            yield images, images, images
    elif across:
        for i, j in _pairs_of_images(n, m, size, given.x2 is None, given.x1.device):
            yield (i, j), i, j
    else:
        shape = _tile_shape(size, n, m, pairs, given.x2 is None)
        for i0, i1, j0, j1 in tiles(n, m, shape, given.x2 is None):
            rows, columns = slice(i0, i1), slice(j0, j1)
            yield (rows, columns), rows, columns


def _pairs_of_images(
    n: int, m: int, size: int, above: bool, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indexes of all pairs, ``size`` at a time; those above the diagonal for one input."""
    in_row = torch.arange(n - 1, -1, -1) if above else torch.full((n,), m)
    stops = in_row.cumsum(0)
    total = int(stops[-1]) if n else 0
    for start in range(0, total, size):
        position = torch.arange(start, min(start + size, total))
        i = torch.searchsorted(stops, position, right=True)
        j = position - (stops - in_row)[i] + (i + 1 if above else 0)
        yield i.to(device), j.to(device)


def _fill(out: Tensor, given: _Inputs, options: _Options) -> None:
    """Write the sums of one batch element to ``out``, which holds zeros."""
    x1, x2, w, b, k1, k2, diagonal = given
    law = options.activation
    gains, biases = (w / TAPS).tolist(), b.tolist()
    right = (x1 if x2 is None else x2) * (gains[0] / x1.shape[-2])
    rows = [law.factors(k) for k in k1]
    columns = rows if k2 is None else [law.factors(k) for k in k2]
    across, pairs = options.layout
    layout = Layout(across, pairs=pairs or across)
    buffers: list[Tensor] = []
    for place, first, second in _blocks(given, options):
        one, two = _aligned(x1, first, layout, 0), _aligned(right, second, layout, 1)
        ones = [[_aligned(f, first, layout, 0) for f in factors] for factors in rows]
        twos = [[_aligned(f, second, layout, 1) for f in factors] for factors in columns]
        if not buffers:  # no block is larger than the first one
            size = math.prod(np.broadcast_shapes(ones[0][0].shape, twos[0][0].shape))
            buffers = [x1.new_empty(size) for _ in range(4 if options.tangent else 3)]
        total = x1.new_zeros(())
        for shift in options.shifts(x1.shape[0]):
            above, below = windows(shift, x1.shape[0])
            left, other = (
                [[f[cut] for f in fs] for fs in which]
                for cut, which in ((above, ones), (below, twos))
            )
            shape = np.broadcast_shapes(left[0][0].shape, other[0][0].shape)
            views = [buffer[: math.prod(shape)].view(shape) for buffer in buffers]
            _gram_(views[0], one[above], two[below], layout.pixel_dims)
            F = _run_steps(views, left, other, gains, biases, options)
            if options.dense(shift)["above"]:
                F = F.permute(0, 3, 1, 2).triu(1).permute(0, 2, 3, 1)
            total = total + F.sum(tuple(range(layout.pixel_dims)))
        out[place] = total
    if diagonal is not None:
        torch.triu(out, 1, out=out)
        out += out.T.clone()
        out.diagonal().copy_(diagonal)


def _aligned(t: Tensor, images: _Images, layout: Layout, side: int) -> Tensor:
    """Give chosen images [H, W, *any, n] the dims of a map.

    Those are one for the columns of pixels and one for the images of the other side.
    """
    t = t[..., images]
    if layout.across:
        t = t.unsqueeze(2 - side)
    return t if layout.pairs else t.unsqueeze(-1 - side)


def _gram_(out: Tensor, left: Tensor, right: Tensor, channel_dim: int) -> None:
    """Write the sum over channels of the products to ``out``."""
    channels = zip(left.unbind(channel_dim), right.unbind(channel_dim), strict=True)
    for channel, (one, other) in enumerate(channels):
        if channel == 0:
            torch.mul(one, other, out=out)
        else:
            out.addcmul_(one, other)


def _run_steps(
    buffers: list[Tensor],
    rows: list[list[Tensor]],
    columns: list[list[Tensor]],
    gains: list[float],
    biases: list[float],
    options: _Options,
) -> Tensor:
    """Take the tile ``buffers[0]`` from the inputs to the last F, in place.

    A fourth buffer is for the tangent kernel, whose last product with dF/dK is added.
    """
    K, work, slope, *rest = buffers
    theta = rest[0] if rest else None
    across, last = options.layout.across, len(rows) - 1
    for step, (row, column) in enumerate(zip(rows, columns, strict=True)):
        box_(K, work, 0, across)
        K.add_(biases[step])
        if theta is not None and step == 0:
            theta.copy_(K)
        elif theta is not None:
            box_(theta, work, 0, across)
            theta.add_(K)
        gain = 1.0 if step == last else gains[step + 1]
        options.activation.covariance_(
            K, tuple(row), tuple(column), gain, work, slope, with_derivative=theta is not None
        )
        if theta is not None:
            theta.mul_(slope).mul_(gain)
    return K if theta is None else K.add_(theta)


# --------------------------------------------------------------------------- backward


def _accumulate(G: Tensor, given: _Inputs, found: list[Tensor | None], options: _Options) -> None:
    """Add the gradients of sum(G * result) of one batch element to ``found``, tile by tile."""
    x1, x2, w, b, k1, k2, _ = given
    grad_x1, grad_x2, grad_w, grad_b, grad_k1, grad_k2, grad_diagonal = found
    symmetric = x2 is None or k2 is None
    if x2 is None or k2 is None:
        x2, k2, grad_x2, grad_k2 = x1, k1, grad_x1, grad_k1
        if grad_diagonal is not None:
            grad_diagonal += G.diagonal()
        G = (G + G.T).triu_(1)
    every = slice(None)
    for tile in _tiles_of(given, options):
        if options.layout.pairs:
            upstream = G[tile.images]
        else:
            upstream = G[tile.images, tile.other_images]
        if symmetric and not bool(upstream.any()):
            continue
        one = (tile.pixels, ..., tile.images)
        two = (tile.other_pixels, ..., tile.other_images)
        sources = (x1[one], x2[two], w, b, k1[(every, *one)], k2[(every, *two)])
        targets = (
            None if grad_x1 is None else grad_x1[one],
            None if grad_x2 is None else grad_x2[two],
            grad_w,
            grad_b,
            None if grad_k1 is None else grad_k1[(every, *one)],
            None if grad_k2 is None else grad_k2[(every, *two)],
        )
        _accumulate_tile(upstream, sources, targets, options.dense(tile.shift))


def _accumulate_tile(
    upstream: Tensor,
    sources: tuple[Tensor, ...],
    targets: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> None:
    """Compute one tile again, with its layers, and add its gradients to ``targets`` in place."""
    leaves = [
        source.detach().requires_grad_(target is not None)
        for source, target in zip(sources, targets, strict=True)
    ]
    wanted = [(leaf, t) for leaf, t in zip(leaves, targets, strict=True) if t is not None]
    if not wanted:
        return
    x1, x2, w, b, k1, k2 = leaves
    with torch.enable_grad():
        total = pooled(x1, x2, w, b, k1, k2, **options)
    # the weights and the bias of the last layer are not in here
    values = torch.autograd.grad(total, [leaf for leaf, _ in wanted], upstream)
    for value, (_, target) in zip(values, wanted, strict=True):
        target += value


def _differentiable_gradients(
    G: Tensor, given: _Inputs, needed: tuple[bool, ...], options: _Options
) -> tuple[Tensor | None, ...]:
    """Gradients as differentiable functions of ``G`` and of all tensors."""
    x1 = given.x1
    entries = _entries(given, options)
    check_allocation(
        8 * given.k1.shape[-4] * entries * x1.element_size(),  # some eight tensors for each layer
        f"second derivatives of a convolutional kernel over {entries} pairs of pixels",
        device=x1.device,
    )
    # new nodes, so that no gradient runs on from one tensor to another that it was computed from
    alias = [None if t is None else t.view_as(t) for t in given]
    total = _whole(_Inputs(*alias), options)  # type: ignore[arg-type]
    wanted = [t for t, need in zip(alias, needed, strict=True) if need and t is not None]
    values = iter(torch.autograd.grad(total, wanted, G, create_graph=True))
    return tuple(next(values) if need else None for need in needed)
