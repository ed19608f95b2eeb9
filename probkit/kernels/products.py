"""Products of kernel matrices with vectors, for matrices that are never stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, RBFKernel, ScaleKernel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from probkit.errors import ShapeError
from probkit.kernels.backends import backend
from probkit.kernels.functional import bind, dense
from probkit.kernels.inputs import check_inputs, one_input
from probkit.kernels.nngp import NNGPKernel

__all__ = ["BLOCK_BYTES", "product"]

BLOCK_BYTES = 2**28
"""Size of the block of rows that is held at a time, for kernels without a tiled product."""

_MATERN = {0.5: "matern12", 1.5: "matern32", 2.5: "matern52"}


def product(
    kernel: Kernel,
    x1: Tensor,
    x2: Tensor | None,
    vectors: Tensor,
    *,
    params: Mapping[str, Tensor] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Multiply the matrix of a kernel with vectors; no more of it than a block is ever held.

    Networks (dense and residual), RBF and Matern kernels, their sums and multiples go tile by tile,
    or through fused CUDA kernels, by the backend of the data's device. Any other kernel is computed
    in blocks of rows. Gradients flow to inputs, vectors and ``params``; the backward pass computes
    everything again.

    Args:
        kernel: Any GPyTorch kernel without batch dims.
        x1: Inputs [n, d].
        x2: Inputs [m, d], or None for ``x1``: then symmetry halves the work where it can.
        vectors: Vectors [m, r].
        params: Constrained hyper-parameters to use in place of the kernel's own.
        block_bytes: Size of the largest block of rows.

    Returns:
        K @ vectors [n, r].

    Raises:
        DataError: Unknown names in ``params``; inputs of an unfit dtype.
        ShapeError: Vectors, inputs or a batch of kernels that do not fit.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> length = torch.tensor(1.0, dtype=torch.float64)
        >>> product(RBFKernel(), x, None, x, params={"lengthscale": length})
        tensor([[0.6065],
                [1.0000]], dtype=torch.float64)
    """
    other = x1 if x2 is None else x2
    check_inputs(x1, other)
    if x1.ndim != 2 or other.ndim != 2 or vectors.ndim != 2 or len(vectors) != len(other):
        raise ShapeError(
            f"product: expected x1 [n, d], x2 [m, d] and vectors [m, r], got {list(x1.shape)}, "
            f"{list(other.shape)} and {list(vectors.shape)}"
        )
    bound, lead = bind(kernel, params or {})
    if tuple(lead) or tuple(bound.batch_shape):
        raise ShapeError(
            f"product: expected one kernel, got a batch {[*lead, *bound.batch_shape]}; multiply "
            "with one at a time"
        )
    same = x2 is None or one_input(x1, x2)
    return _product(bound, x1, None if same else x2, vectors, block_bytes)


def _product(
    kernel: Kernel,
    x1: Tensor,
    x2: Tensor | None,
    vectors: Tensor,
    block_bytes: int,
    *,
    select: bool = True,
) -> Tensor:
    """Walk down a kernel whose parameters are in place."""
    if type(kernel) is AdditiveKernel and kernel.active_dims is None:
        parts = [_product(part, x1, x2, vectors, block_bytes) for part in kernel.kernels]
        return torch.stack(parts).sum(0)
    if type(kernel) is ScaleKernel:
        a, b = _selected(kernel, x1, x2, select)
        # it has taken over the columns of its base kernel
        base = _product(kernel.base_kernel, a, b, vectors, block_bytes, select=False)
        return base * kernel.outputscale.to(vectors)
    if type(kernel) in (RBFKernel, MaternKernel):
        a, b = _selected(kernel, x1, x2, select)
        family = "rbf" if type(kernel) is RBFKernel else _MATERN[kernel.nu]
        lengthscale = kernel.lengthscale.squeeze(-2).to(vectors)
        functions = backend(None, x1.device)
        return functions.stationary_product(a, b, vectors, lengthscale, family=family)
    if type(kernel) is NNGPKernel and kernel.image_shape is None:
        a, b = _selected(kernel, x1, x2, select)
        return kernel.product(a, b, vectors)
    return _in_blocks(kernel, x1, x1 if x2 is None else x2, vectors, block_bytes, select)


def _selected(
    kernel: Kernel, x1: Tensor, x2: Tensor | None, select: bool
) -> tuple[Tensor, Tensor | None]:
    """The columns that a kernel sees."""
    if not select or kernel.active_dims is None:
        return x1, x2
    columns = kernel.active_dims.to(x1.device)
    return x1[:, columns], None if x2 is None else x2[:, columns]


def _in_blocks(
    kernel: Kernel, x1: Tensor, x2: Tensor, vectors: Tensor, block_bytes: int, select: bool
) -> Tensor:
    """Blocks of rows, dense; the backward pass holds one at a time, too."""
    rows = max(1, block_bytes // (len(x2) * x1.element_size()))

    def block(part: Tensor) -> Tensor:
        return dense(kernel, part, x2, False, select=select) @ vectors

    if not torch.is_grad_enabled():
        return torch.cat([block(part) for part in x1.split(rows)])
    return torch.cat(
        [
            checkpoint(block, part, use_reentrant=False, preserve_rng_state=False)
            for part in x1.split(rows)
        ]
    )
