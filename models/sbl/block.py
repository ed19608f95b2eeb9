"""Block sparsity along chosen modes: neighbours share their prior variances.

In a coupled mode the variances are C_b g with C_b = I + beta (first off-diagonals), g >= 0, so that
an index that is in use lifts its neighbours (PC-KroSBL, pattern-coupled; He & Joseph, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from probkit.models.sbl.kronecker_updates import fix_scale, mean_weights, relative_change
from probkit.models.sbl.mode_products import contract_all_but

__all__ = ["block_step", "coupling_matrix"]

_CYCLES, _TOLERANCE = 9, 1e-4
_OFFSET = 1e-5  # keeps every coupled variance positive, relative to the largest


def coupling_matrix(positions: Tensor, beta: float) -> Tensor:
    """C_b [n, n] of the indices at ``positions``: 1 on the diagonal, beta between neighbours.

    Example:
        >>> coupling_matrix(torch.tensor([0, 1, 3]), 0.5).tolist()
        [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    gap = (positions[:, None] - positions).abs()
    eye = torch.eye(len(positions), dtype=torch.float64, device=positions.device)
    return eye + beta * (gap == 1).double()


def block_step(
    moment: Tensor,
    variances: Sequence[Tensor],
    coupling: Sequence[float],
    positions: Sequence[Tensor],
) -> list[Tensor]:
    """Cycle over the modes; a coupled one takes the nearest C_b g with g >= 0.

    Args:
        moment: T [row, n_1, ..., n_I].
        variances: Current variances [row, n_i].
        coupling: beta of each mode; 0 for an uncoupled one, which is updated as in AM.
        positions: Place of each kept index in its mode, [n_i].

    Returns:
        New variances [row, n_i]. The evidence need not rise.
    """
    parts = list(variances)
    for _ in range(_CYCLES):
        old = parts
        for mode, beta in enumerate(coupling):
            target = contract_all_but(moment, [mean_weights(part) for part in parts], mode)
            if beta:
                target = _nearest(target, coupling_matrix(positions[mode], beta))
            parts = [
                torch.where(part > 0, target, 0.0) if k == mode else part
                for k, part in enumerate(parts)
            ]
        parts = fix_scale(parts)
        if bool((relative_change(parts, old) < _TOLERANCE).all()):
            break
    return parts


def _nearest(target: Tensor, coupling: Tensor) -> Tensor:
    """Offset + C_b g, with the g >= 0 that makes C_b g nearest to ``target`` [row, n]."""
    matrix = coupling.cpu().numpy()
    rows = target.cpu().numpy()
    fitted = [matrix @ scipy.optimize.nnls(matrix, row)[0] for row in rows]
    result = torch.as_tensor(np.stack(fitted)).to(target)
    return result + _OFFSET * result.amax(-1, keepdim=True)
