"""How well a sparse vector was recovered."""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.models.sbl.moments import abs_square

__all__ = ["nmse", "support_recovery_rate"]


def _flat_pair(estimate: Tensor, truth: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    if estimate.shape != truth.shape:
        raise ShapeError(
            f"expected estimate and truth of one shape [*problem, ...], got "
            f"{tuple(estimate.shape)} and {tuple(truth.shape)}"
        )
    if not 1 <= dims <= truth.ndim:
        raise DataError(f"dims: expected 1 to {truth.ndim} dims of one vector, got {dims}")
    return estimate.flatten(-dims), truth.flatten(-dims)


def nmse(estimate: Tensor, truth: Tensor, *, dims: int = 1) -> Tensor:
    """Normalised mean squared error ||estimate - truth||^2 / ||truth||^2.

    Args:
        estimate: [*problem, ...], real or complex.
        truth: The same shape.
        dims: Number of trailing dims that make up one vector (the modes of a tensor).

    Returns:
        [*problem].

    Example:
        >>> nmse(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])).item()
        1.0
    """
    estimate, truth = _flat_pair(estimate, truth, dims)
    return abs_square(estimate - truth).sum(-1) / abs_square(truth).sum(-1)


def support_recovery_rate(
    estimate: Tensor, truth: Tensor, *, dims: int = 1, threshold: float = 1e-3
) -> Tensor:
    """Share of the joint support that both have: |S_est and S_true| / |S_est or S_true|.

    The support of an estimate are the entries above ``threshold`` times its largest; of the truth,
    those that are not zero.

    Args:
        estimate: [*problem, ...], real or complex.
        truth: The same shape.
        dims: Number of trailing dims that make up one vector.
        threshold: Relative threshold.

    Returns:
        [*problem], float64; 1 where both are empty.

    Example:
        >>> support_recovery_rate(torch.tensor([2.0, 1e-6, 0.3]), torch.tensor([1.0, 0, 0])).item()
        0.5
    """
    estimate, truth = _flat_pair(estimate, truth, dims)
    size = estimate.abs()
    found = (size > threshold * size.amax(-1, keepdim=True)) & (size > 0)
    real = truth != 0
    union = (found | real).sum(-1)
    both = (found & real).sum(-1)
    return torch.where(union > 0, both.double() / union.clamp_min(1), 1.0)
