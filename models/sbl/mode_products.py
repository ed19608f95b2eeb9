"""Products of a tensor with one matrix for each mode, batched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["contract_all_but", "mode_products", "outer", "outer_sum"]


def mode_products(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each mode by its matrix: the product with (A_1 kron ... kron A_I), never formed.

    Each step contracts the leading mode by one matrix product and moves it to the end, so that
    after I steps the modes are in their old order; BLAS reads the transposed operand in place.

    Args:
        tensor: [*batch, d_1, ..., d_I].
        matrices: A_i [*batch, n_i, d_i], one for each mode; batch dims broadcast.

    Returns:
        [*batch, n_1, ..., n_I].

    Example:
        >>> a, b, x = torch.rand(2, 3), torch.rand(4, 5), torch.rand(3, 5)
        >>> torch.allclose(mode_products(x, [a, b]), a @ x @ b.T)
        True
    """
    modes = len(matrices)
    batch = torch.broadcast_shapes(
        tensor.shape[: tensor.ndim - modes], *(matrix.shape[:-2] for matrix in matrices)
    )
    sizes = tensor.shape[tensor.ndim - modes :]
    flat = tensor.reshape(*tensor.shape[: tensor.ndim - modes], sizes.numel())
    for matrix in matrices:
        lead = flat.shape[:-1]
        unfolded = flat.reshape(*lead, matrix.shape[-1], -1)
        product = unfolded.mT @ matrix.mT
        flat = product.reshape(*product.shape[:-2], -1)
    return flat.reshape(*batch, *(matrix.shape[-2] for matrix in matrices))


def outer(vectors: Sequence[Tensor]) -> Tensor:
    """Return v_1 o ... o v_I [*batch, n_1, ..., n_I] of vectors [*batch, n_i].

    Example:
        >>> outer([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])]).tolist()
        [[1.0, 10.0], [2.0, 20.0]]
    """
    result = vectors[0]
    for depth, vector in enumerate(vectors[1:], start=1):
        spread = vector.reshape(*vector.shape[:-1], *[1] * depth, vector.shape[-1])
        result = result.unsqueeze(-1) * spread
    return result


def outer_sum(vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum over modes [*batch, n_1, ..., n_I] of vectors [*batch, n_i]."""
    result = vectors[0]
    for depth, vector in enumerate(vectors[1:], start=1):
        spread = vector.reshape(*vector.shape[:-1], *[1] * depth, vector.shape[-1])
        result = result.unsqueeze(-1) + spread
    return result


def contract_all_but(tensor: Tensor, vectors: Sequence[Tensor], mode: int) -> Tensor:
    """Contract every mode but one with its vector.

    Args:
        tensor: [*batch, n_1, ..., n_I].
        vectors: [*batch, n_i] for each mode; that of ``mode`` is not used.
        mode: The mode that stays.

    Returns:
        [*batch, n_mode].

    Example:
        >>> x = torch.arange(6.0).reshape(2, 3)
        >>> contract_all_but(x, [torch.ones(2), torch.ones(3)], 1).tolist()
        [3.0, 5.0, 7.0]
    """
    modes = len(vectors)
    lead = tensor.shape[: tensor.ndim - modes]
    kept = tensor.shape[tensor.ndim - modes + mode]
    flat = tensor.reshape(*lead, -1)
    for vector in vectors[:mode]:  # leading modes: vector times matrix
        matrix = flat.reshape(*flat.shape[:-1], vector.shape[-1], -1)
        flat = (vector.unsqueeze(-2) @ matrix).squeeze(-2)
    for vector in reversed(vectors[mode + 1 :]):  # trailing modes: matrix times vector
        matrix = flat.reshape(*flat.shape[:-1], -1, vector.shape[-1])
        flat = (matrix @ vector.unsqueeze(-1)).squeeze(-1)
    return flat.reshape(*flat.shape[:-1], kept)
