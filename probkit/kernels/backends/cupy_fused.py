"""Dense and residual network kernels, and stationary ones, as fused CUDA kernels.

Each entry is computed in registers, from the inner product (or distance) of two rows to the last
layer, and written once; products with vectors and the backward pass compute entries again instead
of storing them. The numbers are those of :mod:`~probkit.kernels.backends.torch_tiled` to rounding:
1e-12 relative in float64, 1e-5 in float32.

What has no kernel of its own goes to the tiled PyTorch functions, which run on CUDA, too: tanh,
convolutions, the backward pass of tangent kernels and of more than 17 layers, second derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.kernels.backends import stationary_tiled, torch_tiled
from probkit.kernels.backends.activations import activation_of
from probkit.kernels.backends.conv_tiled import conv_nngp, conv_ntk
from probkit.kernels.backends.cuda_source import ACTIVATIONS, name_of
from probkit.kernels.backends.launcher import Launch, check_cupy, launch
from probkit.kernels.backends.network_inputs import Inputs, Options, broadcast, with_variances
from probkit.kernels.backends.split_gram import BOUNDS, split_gram
from probkit.kernels.backends.tiles import element
from probkit.numerics import check_allocation

__all__ = ["MAX_STEPS", "TILE", "Fused"]

TILE = 64
"""Entries along each side of a tile; the sources have the same number."""

MAX_STEPS = 17
"""Layers, the input layer included, that the backward kernel has room for."""

_VECTORS = 16  # right-hand sides of one pass of a product


class Fused:
    """The ``"cupy"`` backend: the functions of :mod:`~probkit.kernels.backends.torch_tiled`.

    Args:
        gram: How inner products are computed: "exact", in the precision of the data; or "bf16x3"
            and "bf16x6", for float32 data of many columns, on tensor cores with the error that
            :mod:`~probkit.kernels.backends.split_gram` states.
        launch: Runs a kernel; by default through CuPy.

    Raises:
        DataError: Unknown ``gram``.

    Example:
        >>> Fused(gram="bf16x3").gram
        'bf16x3'
    """

    conv_nngp = staticmethod(conv_nngp)
    conv_ntk = staticmethod(conv_ntk)

    def __init__(self, gram: str = "exact", *, launch: Launch = launch) -> None:
        if gram not in ("exact", *BOUNDS):
            accepted = ", ".join(map(repr, ("exact", *BOUNDS)))
            raise DataError(f"gram: expected one of {accepted}, got {gram!r}")
        self.gram, self.launch = gram, launch

    # ----------------------------------------------------------------------------- networks

    def nngp(
        self,
        x1: Tensor,
        x2: Tensor | None,
        weight_var: Tensor,
        bias_var: Tensor,
        *,
        activation: str = "relu",
        residual: bool = False,
        diag: bool = False,
    ) -> Tensor:
        """See :func:`~probkit.kernels.backends.torch_tiled.nngp`."""
        given: Any = {"activation": activation, "residual": residual}
        if diag or not self._takes(activation, x1, x2, weight_var, bias_var):
            return torch_tiled.nngp(x1, x2, weight_var, bias_var, diag=diag, **given)
        return self._matrix(x1, x2, weight_var, bias_var, tangent=False, **given)

    def ntk(
        self,
        x1: Tensor,
        x2: Tensor | None,
        weight_var: Tensor,
        bias_var: Tensor,
        *,
        activation: str = "relu",
        residual: bool = False,
        diag: bool = False,
    ) -> Tensor:
        """See :func:`~probkit.kernels.backends.torch_tiled.ntk`."""
        given: Any = {"activation": activation, "residual": residual}
        if diag or not self._takes(activation, x1, x2, weight_var, bias_var):
            return torch_tiled.ntk(x1, x2, weight_var, bias_var, diag=diag, **given)
        return self._matrix(x1, x2, weight_var, bias_var, tangent=True, **given)

    def nngp_product(
        self,
        x1: Tensor,
        x2: Tensor | None,
        vectors: Tensor,
        weight_var: Tensor,
        bias_var: Tensor,
        *,
        activation: str = "relu",
        residual: bool = False,
    ) -> Tensor:
        """See :func:`~probkit.kernels.backends.torch_tiled.nngp_product`."""
        given: Any = {"activation": activation, "residual": residual}
        if not self._takes(activation, x1, x2, vectors, weight_var, bias_var):
            return torch_tiled.nngp_product(x1, x2, vectors, weight_var, bias_var, **given)
        return self._network_product(x1, x2, vectors, weight_var, bias_var, False, **given)

    def ntk_product(
        self,
        x1: Tensor,
        x2: Tensor | None,
        vectors: Tensor,
        weight_var: Tensor,
        bias_var: Tensor,
        *,
        activation: str = "relu",
        residual: bool = False,
    ) -> Tensor:
        """See :func:`~probkit.kernels.backends.torch_tiled.ntk_product`."""
        given: Any = {"activation": activation, "residual": residual}
        if not self._takes(activation, x1, x2, vectors, weight_var, bias_var):
            return torch_tiled.ntk_product(x1, x2, vectors, weight_var, bias_var, **given)
        return self._network_product(x1, x2, vectors, weight_var, bias_var, True, **given)

    def _takes(self, activation: str, *tensors: Tensor | None) -> bool:
        """Whether there is a kernel for this activation; refuses what no kernel can read."""
        check_tensors(*tensors)
        if self.launch is launch:
            check_cupy(next(t.device for t in tensors if t is not None))
        return activation_of(activation).name in ACTIVATIONS

    def _matrix(
        self,
        x1: Tensor,
        x2: Tensor | None,
        w: Tensor,
        b: Tensor,
        *,
        tangent: bool,
        activation: str,
        residual: bool,
    ) -> Tensor:
        options = Options(activation_of(activation), tangent=tangent, residual=residual)
        x1, x2, w, b = broadcast(x1, x2, w, b)
        m = (x1 if x2 is None else x2).shape[-2]
        size = math.prod((*x1.shape[:-1], m)) * x1.element_size()
        check_allocation(size, f"kernel matrix {[*x1.shape[:-1], m]}", device=x1.device)
        return _NetworkMatrix.apply((self, options), *with_variances(x1, x2, w, b, options))

    def _network_product(
        self,
        x1: Tensor,
        x2: Tensor | None,
        vectors: Tensor,
        w: Tensor,
        b: Tensor,
        tangent: bool,
        *,
        activation: str,
        residual: bool,
    ) -> Tensor:
        options = Options(activation_of(activation), tangent=tangent, residual=residual)
        x1, x2, w, b = broadcast(x1, x2, w, b, vectors.shape[:-2])
        given = with_variances(x1, x2, w, b, options)
        vectors = vectors.expand(*x1.shape[:-2], *vectors.shape[-2:])
        return _NetworkProduct.apply((self, options), vectors, *given)

    # --------------------------------------------------------------------------- stationary

    def stationary(
        self,
        x1: Tensor,
        x2: Tensor | None,
        lengthscale: Tensor,
        *,
        family: str,
        diag: bool = False,
    ) -> Tensor:
        """See :func:`~probkit.kernels.backends.stationary_tiled.stationary`."""
        self._check_stationary(family, x1, x2, lengthscale)
        if diag:
            return stationary_tiled.stationary(x1, x2, lengthscale, family=family, diag=True)
        a, b = stationary_tiled.scaled(x1, x2, lengthscale)
        shape = (*a.shape[:-1], (a if b is None else b).shape[-2])
        size = math.prod(shape) * a.element_size()
        check_allocation(size, f"kernel matrix {list(shape)}", device=a.device)
        return _StationaryMatrix.apply((self, family), a, b)

    def stationary_product(
        self,
        x1: Tensor,
        x2: Tensor | None,
        vectors: Tensor,
        lengthscale: Tensor,
        *,
        family: str,
    ) -> Tensor:
        """See :func:`~probkit.kernels.backends.stationary_tiled.stationary_product`."""
        self._check_stationary(family, x1, x2, vectors, lengthscale)
        a, b = stationary_tiled.scaled(x1, x2, lengthscale, vectors.shape[:-2])
        vectors = vectors.expand(*a.shape[:-2], *vectors.shape[-2:])
        return _StationaryProduct.apply((self, family), vectors, a, b)

    def _check_stationary(self, family: str, *tensors: Tensor | None) -> None:
        stationary_tiled.check_family(family)
        check_tensors(*tensors)
        if self.launch is launch:
            check_cupy(next(t.device for t in tensors if t is not None))


def check_tensors(*tensors: Tensor | None) -> None:
    """Refuse tensors that the kernels cannot read together; strides are of no matter.

    Raises:
        DataError: Several devices or dtypes, or a dtype other than float32 and float64.

    Example:
        >>> check_tensors(torch.zeros(2), None, torch.ones(3))
    """
    given = [t for t in tensors if t is not None]
    devices = sorted({str(t.device) for t in given})
    if len(devices) > 1:
        raise DataError(
            f"backend 'cupy': expected all tensors on one device, got {', '.join(devices)}; move "
            "them with .to(device)"
        )
    dtypes = sorted({str(t.dtype) for t in given})
    if len(dtypes) > 1 or given[0].dtype not in (torch.float32, torch.float64):
        raise DataError(
            f"backend 'cupy': expected float32 or float64 throughout, got {', '.join(dtypes)}; use "
            ".float() or .double()"
        )


# --------------------------------------------------------------------------------- networks


class _NetworkMatrix(torch_tiled.TiledMatrix):
    """Matrix [*batch, n, m], forward and backward in one kernel each."""

    @staticmethod
    def forward(ctx: Any, how: Any, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.how, ctx.options = how, how[1]
        given = Inputs(*tensors)  # type: ignore[arg-type]
        m = (given.x1 if given.x2 is None else given.x2).shape[-2]
        out = given.x1.new_empty(*given.x1.shape[:-1], m)
        for index in np.ndindex(*given.x1.shape[:-2]):
            _fill_network(out[index], element(given, index), *how)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, options = Inputs(*ctx.saved_tensors), ctx.options
        if torch.is_grad_enabled() or options.tangent or given.w.shape[-1] > MAX_STEPS:
            return torch_tiled.TiledMatrix.backward(ctx, *grads)
        (G,) = grads
        found = [None if t is None else torch.zeros_like(t.contiguous()) for t in given]
        for index in np.ndindex(*G.shape[:-2]):
            target = [None if t is None else t[index] for t in found]
            _backward_network(G[index].clone(), element(given, index), target, *ctx.how)
        needed = ctx.needs_input_grad[1:]
        return None, *(t if need else None for t, need in zip(found, needed, strict=True))


class _NetworkProduct(torch_tiled.TiledProduct):
    """Product [*batch, n, r]; backward by tiled recomputation."""

    @staticmethod
    def forward(ctx: Any, how: Any, vectors: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(vectors, *tensors)
        ctx.options = how[1]
        given = Inputs(*tensors)  # type: ignore[arg-type]
        out = vectors.new_empty(*given.x1.shape[:-1], vectors.shape[-1])
        for index in np.ndindex(*given.x1.shape[:-2]):
            _multiply_network(out[index], element(given, index), vectors[index], *how)
        return out


def _arguments(given: Inputs, options: Options) -> tuple[Tensor, Tensor, list[Any], list[Any]]:
    """Rows, columns, and what the kernels take before and after the number of features."""
    x1, x2, w, b, k1, k2, _ = given
    other = x1 if x2 is None else x2
    rows = _factors(k1, options)
    columns = rows if k2 is None else _factors(k2, options)
    gains = w.clone()
    gains[0] /= x1.shape[-1]
    layers = [rows, columns, gains.contiguous(), b.contiguous(), len(w)]
    sizes = [len(x1), len(other)]
    return x1.contiguous(), other.contiguous(), sizes, layers


def _factors(k: Tensor, options: Options) -> Tensor:
    """Factors of the variances [step, n] of all steps but the last: [step - 1, n, factor]."""
    return torch.stack(options.activation.factors(k[:-1]), -1).contiguous()


def _instance(kernel: str, x: Tensor, options: Options, *, tangent: bool = True) -> str:
    choices = (options.tangent, options.residual) if tangent else (options.residual,)
    return name_of(kernel, x.dtype, options.activation.name, *choices)


def _fill_network(out: Tensor, given: Inputs, fused: Fused, options: Options) -> None:
    """Write one matrix [n, m]."""
    x1, x2, sizes, layers = _arguments(given, options)
    if fused.gram != "exact" and x1.dtype == torch.float32:
        out.copy_(split_gram(x1, x2, fused.gram))
        blocks = min(-(-out.numel() // 256), 2**16)
        fused.launch(_instance("network_map", x1, options), (blocks, 1), [*sizes, *layers, out])
        if given.diagonal is not None:
            out.diagonal().copy_(given.diagonal)
        return
    diagonal = None if given.diagonal is None else given.diagonal.contiguous()
    arguments = [x1, x2, *sizes, x1.shape[1], *layers, diagonal, out]
    blocks = _blocks(*sizes, symmetric=diagonal is not None)
    fused.launch(_instance("network_matrix", x1, options), (blocks, 1), arguments)


def _multiply_network(
    out: Tensor, given: Inputs, vectors: Tensor, fused: Fused, options: Options
) -> None:
    """Write one product [n, r]."""
    x1, x2, sizes, layers = _arguments(given, options)
    diagonal = None if given.diagonal is None else given.diagonal.contiguous()
    right = vectors.contiguous()
    arguments = [x1, x2, *sizes, x1.shape[1], *layers, diagonal, right, right.shape[1], out]
    grid = (-(-len(x1) // TILE), -(-right.shape[1] // _VECTORS))
    fused.launch(_instance("network_product", x1, options), grid, arguments)


def _backward_network(
    G: Tensor, given: Inputs, found: list[Tensor | None], fused: Fused, options: Options
) -> None:
    """Add the gradients of sum(G * matrix) of one matrix [n, m]; ``G`` is overwritten."""
    x1, x2, sizes, layers = _arguments(given, options)
    to_x1, to_x2, to_w, to_b, to_k1, to_k2, to_diagonal = found
    if to_diagonal is not None:
        to_diagonal += G.diagonal()
        G.diagonal().zero_()
    rows, columns = (torch.zeros_like(k[:-1]) for k in (given.k1, _second(given)))
    gains, biases = torch.zeros_like(given.w), torch.zeros_like(given.b)
    upstream = G.contiguous()
    arguments = [x1, x2, *sizes, x1.shape[1], *layers, upstream, gains, biases, rows, columns]
    name = _instance("network_backward", x1, options, tangent=False)
    fused.launch(name, (_blocks(*sizes, symmetric=False), 1), arguments)
    gains[0] /= x1.shape[1]  # the first gain was divided by the number of features
    symmetric = given.x2 is None
    pairs = [
        (to_w, gains),
        (to_b, biases),
        (to_x1, upstream @ x2),
        (to_x1 if symmetric else to_x2, upstream.T @ x1),
        (None if to_k1 is None else to_k1[:-1], rows),
        (_but_last(to_k1 if symmetric else to_k2), columns),
    ]
    for target, value in pairs:
        if target is not None:
            target += value


def _second(given: Inputs) -> Tensor:
    """Variances of the columns."""
    return given.k1 if given.k2 is None else given.k2


def _but_last(k: Tensor | None) -> Tensor | None:
    return None if k is None else k[:-1]


def _blocks(n: int, m: int, *, symmetric: bool) -> int:
    """Number of tiles, or of those on and above the diagonal."""
    down, across = -(-n // TILE), -(-m // TILE)
    return down * (down + 1) // 2 if symmetric else down * across


# ------------------------------------------------------------------------------- stationary


class _StationaryMatrix(torch.autograd.Function):
    """Matrix [*batch, n, m] of scaled inputs."""

    @staticmethod
    def forward(ctx: Any, how: Any, a: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.how = how
        fused, family = how
        out = a.new_empty(*a.shape[:-1], (a if b is None else b).shape[-2])
        for index in np.ndindex(*a.shape[:-2]):
            one = a[index].contiguous()
            other = one if b is None else b[index].contiguous()
            diagonal = None if b is not None else one.new_ones(len(one))
            sizes = (len(one), len(other))
            fused.launch(
                name_of("stationary_matrix", a.dtype, family),
                (_blocks(*sizes, symmetric=b is None), 1),
                [one, other, *sizes, one.shape[1], diagonal, out[index]],
            )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (G,) = grads
        a, b = ctx.saved_tensors
        fused, family = ctx.how
        to_a, to_b = torch.zeros_like(a), None if b is None else torch.zeros_like(b)
        for index in np.ndindex(*a.shape[:-2]):
            one = a[index].contiguous()
            other = one if b is None else b[index].contiguous()
            weight = G[index].clone(memory_format=torch.contiguous_format)
            sizes = (len(one), len(other))
            fused.launch(
                name_of("stationary_backward", a.dtype, family),
                (_blocks(*sizes, symmetric=False), 1),
                [one, other, *sizes, one.shape[1], weight],
            )
            weight *= 2.0
            rows, columns = weight.sum(1, keepdim=True), weight.sum(0)[:, None]
            to_a[index] += rows * one - weight @ other
            target = to_a if to_b is None else to_b
            target[index] += columns * other - weight.T @ one
        return None, to_a, to_b


class _StationaryProduct(stationary_tiled.TiledProduct):
    """Product [*batch, n, r]; backward by tiled recomputation."""

    @staticmethod
    def forward(ctx: Any, how: Any, vectors: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(vectors, a, b)
        fused, ctx.family = how
        out = vectors.new_empty(*a.shape[:-1], vectors.shape[-1])
        for index in np.ndindex(*a.shape[:-2]):
            one = a[index].contiguous()
            other = one if b is None else b[index].contiguous()
            diagonal = None if b is not None else one.new_ones(len(one))
            right = vectors[index].contiguous()
            sizes = [len(one), len(other), one.shape[1]]
            fused.launch(
                name_of("stationary_product", a.dtype, ctx.family),
                (-(-len(one) // TILE), -(-right.shape[1] // _VECTORS)),
                [one, other, *sizes, diagonal, right, right.shape[1], out[index]],
            )
        return out
