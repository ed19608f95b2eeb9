"""Fast marginal likelihood maximisation: one weight at a time, from the empty model.

Tipping and Faul, "Fast marginal likelihood maximisation for sparse Bayesian models" (AISTATS
2003), for real and circular complex data, several snapshots, and a batch of problems at once. The
matrix K = C^{-1} is kept by rank-one updates, in the smaller of two forms: as the products
P = H^H C^{-1} H [N, N], or as C^{-1} [M, M].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.models.sbl.moments import abs_square

__all__ = ["FastState", "best_changes", "fast_passes"]


@dataclass(frozen=True)
class FastState:
    """Where the search stands.

    Attributes:
        variance: g [problem, N]; zero for weights outside the model.
        leverage: S_j = h_j^H C^{-1} h_j [problem, N].
        projection: Q_j = h_j^H C^{-1} y [problem, snapshot, N].
        kernel: P [problem, N, N] or C^{-1} [problem, M, M].
        gain: Gain in log evidence of the last change [problem].
    """

    variance: Tensor
    leverage: Tensor
    projection: Tensor
    kernel: Tensor
    gain: Tensor


def best_changes(
    variance: Tensor, leverage: Tensor, power: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """The best prior variance of each weight, all others kept, and the gain in log evidence.

    With s, q^2 the leverage and power of weight j in the model without it, the evidence of g_j is
    ell(g) = weight * [-log(1 + g s) + q^2 g / (1 + g s)], largest at g = (q^2 - s) / s^2 where
    that is positive, else at 0: adding, re-estimating and deleting are one formula.

    Args:
        variance: g [*batch, N].
        leverage: S [*batch, N].
        power: |Q|^2, averaged over snapshots [*batch, N].
        weight: Log evidence in units of that bracket: 1/2 a snapshot, 1 if complex.

    Returns:
        The variances [*batch, N] and the gains [*batch, N] >= 0.
    """
    tiny = torch.finfo(variance.dtype).tiny
    left = (1 - variance * leverage).clamp_min(1e-12)  # 1 / (1 + g s)
    s = leverage / left
    q2 = power / left.square()
    best = torch.where(s > 0, (q2 - s).clamp_min(0) / s.square().clamp_min(tiny), 0.0)

    def bracket(g: Tensor) -> Tensor:
        return q2 * g / (1 + g * s) - torch.log1p(g * s)

    return best, weight * (bracket(best) - bracket(variance)).clamp_min(0)


def fast_passes(
    dictionary: Tensor,
    state: FastState,
    *,
    changes: int,
    tolerance: float,
    weight: float,
) -> tuple[FastState, Tensor]:
    """Make up to ``changes`` changes of one weight each, always the one that gains most.

    Args:
        dictionary: H [problem, M, N] or [M, N].
        state: From a fresh E-step; `kernel` has N or M rows, which tells its form.
        changes: Largest number of changes.
        tolerance: Stop where the largest gain in log evidence is below it.
        weight: As in :func:`best_changes`.

    Returns:
        The new state, and whether each problem has converged [problem].
    """
    variance, kernel = state.variance.clone(), state.kernel.clone()
    leverage, projection = state.leverage.clone(), state.projection.clone()
    rows = torch.arange(len(variance), device=variance.device)
    columns = variance.shape[-1]
    in_weights = kernel.shape[-1] == columns
    gain = torch.full_like(variance[:, 0], torch.inf)
    for _ in range(changes):
        power = abs_square(projection).mean(-2)
        best, gains = best_changes(variance, leverage, power, weight)
        gain, chosen = gains.max(-1)
        running = gain > tolerance
        if not bool(running.any()):
            break
        step = torch.where(running, best[rows, chosen] - variance[rows, chosen], 0.0)
        scale = step / (1 + step * leverage[rows, chosen])
        if in_weights:
            column = kernel[rows, :, chosen]  # H^H C^{-1} h_j
            kernel -= scale[:, None, None] * column[:, :, None] * column.conj()[:, None, :]
        else:
            atom = (
                dictionary[..., chosen].mT if dictionary.ndim == 2 else dictionary[rows, :, chosen]
            )
            solved = (kernel @ atom.unsqueeze(-1)).squeeze(-1)
            kernel -= scale[:, None, None] * solved[:, :, None] * solved.conj()[:, None, :]
            column = (dictionary.mH @ solved.unsqueeze(-1)).squeeze(-1)
        leverage -= scale[:, None] * abs_square(column)
        projected = projection[rows, :, chosen]  # h_j^H C^{-1} y
        projection -= scale[:, None, None] * projected[:, :, None] * column[:, None, :]
        variance[rows, chosen] += step
        # A deletion leaves rounding errors; zero means zero.
        variance[rows, chosen] = torch.where(
            running & (best[rows, chosen] == 0), 0.0, variance[rows, chosen]
        )
    leverage.clamp_min_(0)
    return FastState(variance, leverage, projection, kernel, gain), gain <= tolerance
