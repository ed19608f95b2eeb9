"""M-steps for prior variances of Kronecker form, g = g_1 kron ... kron g_I.

Each takes the second moments T [*batch, n_1, ..., n_I] and seeks the g that minimises
Q(g) = sum_j [log g_j + T_j / g_j], which is not convex in the factors. Entries with g_i[a] = 0 are
pruned: they stay zero and take no part.

The scale is fixed by ||g_i||_2 = 1 for i < I; the last factor carries it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probkit.models.sbl.mode_products import contract_all_but

__all__ = [
    "alternate",
    "alternating_step",
    "fix_scale",
    "flat_variances",
    "mean_weights",
    "rank_one_step",
    "relative_change",
]


def flat_variances(sizes: Sequence[int], like: Tensor) -> list[Tensor]:
    """Start with g_j = 1 for every j: g_i = 1 / sqrt(N_i), the last one carrying the scale."""
    scale = 1.0
    parts = []
    for size in sizes[:-1]:
        parts.append(torch.full((size,), size**-0.5, dtype=like.dtype, device=like.device))
        scale *= size**0.5
    parts.append(torch.full((sizes[-1],), scale, dtype=like.dtype, device=like.device))
    return parts


def fix_scale(variances: Sequence[Tensor]) -> list[Tensor]:
    """Give the factors before the last unit norm; their product does not change."""
    parts, scale = [], None
    for variance in variances[:-1]:
        norm = variance.norm(dim=-1, keepdim=True)
        norm = torch.where(norm > 0, norm, 1.0)
        parts.append(variance / norm)
        scale = norm if scale is None else scale * norm
    last = variances[-1] if scale is None else variances[-1] * scale
    return [*parts, last]


def relative_change(new: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
    """||g_new - g_old|| / ||g_old|| of the full products [*batch], from the factors alone."""
    new_norm = _product([a.square().sum(-1) for a in new])
    old_norm = _product([b.square().sum(-1) for b in old])
    cross = _product([(a * b).sum(-1) for a, b in zip(new, old, strict=True)])
    square = (new_norm - 2 * cross + old_norm).clamp_min(0)
    return (square / old_norm.clamp_min(torch.finfo(square.dtype).tiny)).sqrt()


def _product(factors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(factors)).prod(0)


def mean_weights(variance: Tensor) -> Tensor:
    """Return 1 / g_i[a] over the number of active entries; zero where pruned."""
    active = variance > 0
    inverse = torch.where(active, 1 / torch.where(active, variance, 1.0), 0.0)
    return inverse / active.sum(-1, keepdim=True).clamp_min(1)


def alternate(moment: Tensor, variances: Sequence[Tensor], modes: Sequence[int]) -> list[Tensor]:
    """One exact minimisation of Q over each factor in ``modes``, in turn.

    g_i[a] is the mean of T[.., a, ..] / prod_{k != i} g_k over all other (active) indices.
    """
    parts = list(variances)
    weights = [mean_weights(part) for part in parts]
    for mode in modes:
        update = contract_all_but(moment, weights, mode)
        parts[mode] = torch.where(parts[mode] > 0, update, 0.0)
        weights[mode] = mean_weights(parts[mode])
    return parts


def alternating_step(
    moment: Tensor,
    variances: Sequence[Tensor],
    *,
    cycles: int = 50,
    tolerance: float = 1e-5,
) -> list[Tensor]:
    """AM-KroSBL: cycle over the factors until they stand still (He & Joseph, 2024).

    Every cycle lowers Q, so that EM with this M-step never lowers the evidence.

    Args:
        moment: T [*batch, n_1, ..., n_I].
        variances: Current g_i [*batch, n_i].
        cycles: Largest number of cycles; 1 gives the earlier "KSBL" step.
        tolerance: Relative change of g at which to stop.
    """
    parts = list(variances)
    order = range(len(parts))
    for _ in range(cycles):
        new = fix_scale(alternate(moment, parts, order))
        settled = bool((relative_change(new, parts) < tolerance).all())
        parts = new
        if settled:
            break
    return parts


def rank_one_step(moment: Tensor, variances: Sequence[Tensor]) -> list[Tensor]:
    """SVD-KroSBL: project T on the tensors of rank one, mode after mode (He & Joseph, 2024).

    The leading singular vectors of a non-negative matrix can be taken non-negative (Perron). One
    pass; it need not lower Q.
    """
    modes = len(variances)
    lead = moment.shape[: moment.ndim - modes]
    rest = moment.reshape(*lead, -1)
    parts = []
    for variance in variances[:-1]:
        matrix = rest.reshape(*lead, variance.shape[-1], -1)
        vector = _leading_left_vector(matrix)
        parts.append(torch.where(variance > 0, vector, 0.0))
        rest = (vector.unsqueeze(-2) @ matrix).squeeze(-2).abs()
    parts.append(torch.where(variances[-1] > 0, rest, 0.0))
    return fix_scale(parts)


def _leading_left_vector(matrix: Tensor) -> Tensor:
    """Leading left singular vector [*batch, n] of non-negative matrices [*batch, n, rest]."""
    if matrix.shape[-2] > matrix.shape[-1]:
        _, right = torch.linalg.eigh(matrix.mT @ matrix)
        vector = (matrix @ right[..., -1:]).squeeze(-1).abs()
    else:
        _, left = torch.linalg.eigh(matrix @ matrix.mT)
        vector = left[..., -1].abs()
    norm = vector.norm(dim=-1, keepdim=True)
    return vector / torch.where(norm > 0, norm, 1.0)
