"""What an E-step of sparse Bayesian learning returns, whatever form it is computed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Moments", "abs_square", "gaussian_log_evidence"]


@dataclass(frozen=True)
class Moments:
    """Posterior moments of the weights given prior variances g and noise variance s2.

    The weights have I >= 1 modes, kept as tensor dims; plain problems have one. C is the
    covariance of the data, C = s2 I + H diag(g) H^H, and h_j a column of H.

    Attributes:
        mean: E[x] [*batch, snapshot, N_1, ..., N_I].
        variance: diag of the posterior covariance [*batch, N_1, ..., N_I], equal for all snapshots.
        projection: h_j^H C^{-1} y, [*batch, snapshot, N_1, ..., N_I].
        leverage: h_j^H C^{-1} h_j, [*batch, N_1, ..., N_I].
        residual: ||y - H mean||^2, summed over snapshots, [*batch].
        freedom: sum_j (1 - Sigma_jj / g_j), the number of well-determined weights [*batch].
        log_evidence: log p(y | g, s2), [*batch].
    """

    mean: Tensor
    variance: Tensor
    projection: Tensor
    leverage: Tensor
    residual: Tensor
    freedom: Tensor
    log_evidence: Tensor

    @property
    def modes(self) -> int:
        """Number I of modes."""
        return self.variance.ndim - self.residual.ndim

    def second_moment(self) -> Tensor:
        """E|x_j|^2, averaged over snapshots: the T of the M-step, [*batch, N_1, ..., N_I]."""
        return abs_square(self.mean).mean(-self.modes - 1) + self.variance

    def mean_square(self) -> Tensor:
        """|E[x_j]|^2, averaged over snapshots, [*batch, N_1, ..., N_I]."""
        return abs_square(self.mean).mean(-self.modes - 1)

    def projection_square(self) -> Tensor:
        """|h_j^H C^{-1} y|^2, averaged over snapshots, [*batch, N_1, ..., N_I]."""
        return abs_square(self.projection).mean(-self.modes - 1)


def abs_square(tensor: Tensor) -> Tensor:
    """|t|^2, real."""
    if tensor.is_complex():
        return tensor.real.square() + tensor.imag.square()
    return tensor.square()


def gaussian_log_evidence(
    log_det: Tensor, quadratic: Tensor, size: int, snapshots: int, *, is_complex: bool
) -> Tensor:
    """Log density of ``snapshots`` independent draws of N(0, C), or of circular CN(0, C).

    Args:
        log_det: log |C| [*batch].
        quadratic: y^H C^{-1} y, summed over snapshots [*batch].
        size: M, the length of y.
        snapshots: Number of draws.
        is_complex: Circular complex: no factor 1/2, and pi in place of 2 pi.
    """
    unit = math.log(math.pi if is_complex else 2 * math.pi)
    total = -(snapshots * (log_det + size * unit) + quadratic)
    return total if is_complex else total / 2
