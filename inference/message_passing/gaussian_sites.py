"""What the data say at each step of a linear-Gaussian chain, in natural or in moment form.

A site is a Gaussian factor in u = H z. Both forms answer the same two questions about a factor that
meets a Gaussian belief u ~ N(mean, S): how the belief moves, and how probable the factor is. With

    W = (R + S)^-1 = (I + Lam S)^-1 Lam,    w = (R + S)^-1 y = (I + Lam S)^-1 eta

the posterior of z ~ N(m, P) is m + P H' (w - W H m) with covariance P - P H' W H P. The natural
form never inverts Lam, so it may be singular or zero; the moment form never inverts R.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.numerics import safe_cholesky

__all__ = ["GaussianObservations", "NaturalSites", "Sites", "Weights", "collect_sites", "inverse"]


class Weights(NamedTuple):
    """How a factor moves a belief with covariance S.

    Attributes:
        precision: W = (R + S)^-1 [..., r, r].
        shift: w = (R + S)^-1 y [..., r].
        spread: W R W [..., r, r], which the Joseph form of the covariance update adds.
    """

    precision: Tensor
    shift: Tensor
    spread: Tensor


class NaturalSites(NamedTuple):
    """Factors exp(eta' u - u' Lam u / 2), one for each step; zeros where nothing was observed.

    Attributes:
        eta: Linear terms [*batch, T, r].
        precision: Lam, symmetric positive semi-definite [*batch, T, r, r] (or [*batch, r, r], the
            same at all steps).
    """

    eta: Tensor
    precision: Tensor

    @property
    def values(self) -> Tensor:
        """The linear terms [*batch, T, r]."""
        return self.eta

    @property
    def matrices(self) -> Tensor:
        """The precisions."""
        return self.precision

    def with_matrices(self, matrices: Tensor) -> NaturalSites:
        """The same sites with precisions [*batch, T, r, r]."""
        return self._replace(precision=matrices)

    def weigh(self, S: Tensor) -> Weights:
        """Weights of the factors against beliefs of covariance S [..., r, r]."""
        J = inverse(_identity_plus(self.precision @ S))
        JL = J @ self.precision
        return Weights(_symmetric(JL), (J @ self.eta.unsqueeze(-1)).squeeze(-1), JL @ J.mT)

    def log_evidence(self, mean: Tensor, S: Tensor) -> Tensor:
        """Log of the integral of exp(eta' u - u' Lam u / 2) N(u; mean, S) du [...]."""
        M = _identity_plus(self.precision @ S)
        residual = self.eta - _times(self.precision, mean)
        if S.shape[-1] == 1:
            moved = residual / M.squeeze(-1)
            log_det = M[..., 0, 0].log()
        else:
            factor, pivots, _ = torch.linalg.lu_factor_ex(M)
            moved = torch.linalg.lu_solve(factor, pivots, residual.unsqueeze(-1)).squeeze(-1)
            log_det = factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        linear = (self.eta * mean).sum(-1) - (mean * _times(self.precision, mean)).sum(-1) / 2
        return linear - log_det / 2 + (residual * _times(S, moved)).sum(-1) / 2


class GaussianObservations(NamedTuple):
    """Observations y ~ N(u, R); NaN marks missing entries, singly or for a whole step.

    Attributes:
        y: Observations [*batch, T, r].
        covariance: R, symmetric positive semi-definite [*batch, T, r, r] (or [*batch, r, r], the
            same at all steps).
    """

    y: Tensor
    covariance: Tensor

    @property
    def values(self) -> Tensor:
        """The observations [*batch, T, r]."""
        return self.y

    @property
    def matrices(self) -> Tensor:
        """The noise covariances."""
        return self.covariance

    def with_matrices(self, matrices: Tensor) -> GaussianObservations:
        """The same observations with noise covariances [*batch, T, r, r]."""
        return self._replace(covariance=matrices)

    def weigh(self, S: Tensor) -> Weights:
        """Weights of the observations against beliefs of covariance S [..., r, r]."""
        seen, L = self._factor(S)
        both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
        W = torch.where(both, torch.cholesky_inverse(L), 0.0)
        y = torch.where(seen, self.y, 0.0)
        return Weights(W, _times(W, y), W @ self.covariance @ W)

    def log_evidence(self, mean: Tensor, S: Tensor) -> Tensor:
        """Log N(y; mean, R + S) of the entries that were seen [...]."""
        seen, L = self._factor(S)
        residual = torch.where(seen, self.y - mean, 0.0)
        white = torch.linalg.solve_triangular(L, residual.unsqueeze(-1), upper=False)
        log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = seen.sum(-1).to(S.dtype) * math.log(2 * math.pi)
        return -(white.square().sum((-2, -1)) + log_det + constant) / 2

    def _factor(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """Which entries were seen, and the factor of R + S with unit rows for the others."""
        seen = ~self.y.isnan()
        both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        L, _ = safe_cholesky(torch.where(both, _symmetric(S + self.covariance), eye))
        return seen, L


Sites = NaturalSites | GaussianObservations


def collect_sites(index: Tensor, eta: Tensor, precision: Tensor, steps: int) -> NaturalSites:
    """Add up the factors of several observations that fall on the same step.

    Args:
        index: Step of each observation [N], integers in 0..T-1; a step may occur often or never.
        eta: Linear terms [*batch, N, r].
        precision: Precisions [*batch, N, r, r].
        steps: T.

    Returns:
        Sites of all T steps, zero where there is no observation; differentiable.

    Raises:
        ShapeError: the number of observations differs between the arguments.
        DataError: a step is outside 0..T-1.

    Example:
        >>> one = torch.ones(3, 1)
        >>> collect_sites(torch.tensor([0, 2, 2]), one, one.unsqueeze(-1), 4).eta.flatten().tolist()
        [1.0, 0.0, 2.0, 0.0]
    """
    if index.ndim != 1 or eta.shape[-2] != len(index) or precision.shape[-3] != len(index):
        raise ShapeError(
            f"expected index [N], eta [*batch, N, r], precision [*batch, N, r, r], got "
            f"{tuple(index.shape)}, {tuple(eta.shape)}, {tuple(precision.shape)}"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < steps:
        raise DataError(
            f"index must be in 0..{steps - 1}, got {int(index.min())}..{int(index.max())}"
        )
    empty_eta = eta.new_zeros(*eta.shape[:-2], steps, eta.shape[-1])
    empty = precision.new_zeros(*precision.shape[:-3], steps, *precision.shape[-2:])
    return NaturalSites(empty_eta.index_add(-2, index, eta), empty.index_add(-3, index, precision))


def inverse(M: Tensor) -> Tensor:
    """Inverse of well-conditioned matrices [..., n, n], by formula up to n = 2."""
    if M.shape[-1] == 1:
        return M.reciprocal()
    if M.shape[-1] == 2:
        a, b, c, d = M[..., 0, 0], M[..., 0, 1], M[..., 1, 0], M[..., 1, 1]
        adjugate = torch.stack((d, -b, -c, a), -1).reshape(M.shape)
        return adjugate / (a * d - b * c)[..., None, None]
    return torch.linalg.inv(M)


def _identity_plus(M: Tensor) -> Tensor:
    return M + torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.mT) / 2


def _times(M: Tensor, v: Tensor) -> Tensor:
    """Matrix times vector, [..., n, k] and [..., k]."""
    return (M @ v.unsqueeze(-1)).squeeze(-1)
