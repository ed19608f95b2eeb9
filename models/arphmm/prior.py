"""The prior of switching autoregressions: Dirichlet rows and matrix-normal inverse-Wishart regimes.

For state k, with V0 = ridge * I and P regressors,

    initial ~ Dirichlet(initial), transition_k ~ Dirichlet(transition + sticky on the diagonal),
    W_k | S_k ~ MatrixNormal(M0, S_k, V0^-1),   S_k ~ InverseWishart(dof, Psi0).

A shared covariance is drawn once. A diagonal one has independent entries with the laws that an
inverse Wishart matrix gives its diagonal, S_dd ~ InverseGamma((dof - D + 1) / 2, Psi0_dd / 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.models.arphmm.supports import Covariance
from probkit.numerics import safe_cholesky

__all__ = ["SwitchingPrior", "log_dirichlet", "log_regimes"]


@storable
@dataclass(frozen=True)
class SwitchingPrior:
    """Prior of an :class:`~probkit.models.ARPHMM`.

    Args:
        initial: Dirichlet concentration of the initial probabilities.
        transition: Dirichlet concentration of each allowed transition.
        sticky: Added to the concentration of staying in a state.
        ridge: Precision of the weights relative to that of the noise, V0 = ridge * I.
        mean: Prior mean M0 of the weights [feature, regressor]; None for zero.
        dof: Degrees of freedom of the inverse Wishart law; None for D + 2, where Psi0 is the prior
            mean of the covariance.
        scale: Psi0: a positive number times the identity, variances [feature], or a matrix
            [feature, feature]; in squared units of the data.

    Raises:
        DataError: A parameter is out of range.

    Example:
        >>> SwitchingPrior(sticky=10.0).transition
        1.0
    """

    initial: float = 1.0
    transition: float = 1.0
    sticky: float = 0.0
    ridge: float = 0.01
    mean: Tensor | None = None
    dof: float | None = None
    scale: float | Tensor = 0.1

    def __post_init__(self) -> None:
        for name in ("initial", "transition", "ridge"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise DataError(f"SwitchingPrior: expected {name} > 0, got {value}")
        if not (math.isfinite(self.sticky) and self.sticky >= 0):
            raise DataError(f"SwitchingPrior: expected sticky >= 0, got {self.sticky}")
        if self.mean is not None:
            object.__setattr__(self, "mean", as_tensor(self.mean, name="mean").double())
        if not isinstance(self.scale, int | float):
            object.__setattr__(self, "scale", as_tensor(self.scale, name="scale").double())
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        variances = scale.diagonal() if scale.ndim == 2 else scale
        if not bool((variances > 0).all() & torch.isfinite(scale).all()):
            raise DataError(f"SwitchingPrior: expected scale > 0, got {self.scale}")

    @classmethod
    def for_data(cls, data: Any, *, order: int, share: float = 0.5, **others: Any) -> Any:
        """Return a prior whose scale is a share of the noise of one autoregression of all data.

        Args:
            data: :class:`Sequences`, one array, or a list of arrays.
            order: Lag order of the autoregression.
            share: Share of its residual variances that Psi0 takes on its diagonal.
            others: Further fields of the prior.
        """
        from probkit.models.arphmm.lagged import lagged
        from probkit.models.arphmm.sequences import as_sequences

        rows = lagged(as_sequences(data), order=order, states=None)
        used = rows.design[rows.usable]
        x, y = used[:, : rows.regressors], used[:, rows.regressors :]
        residual = y - x @ torch.linalg.lstsq(x, y).solution
        variances = residual.square().mean(0).clamp_min(1e-12 * y.var(0).clamp_min(1e-12))
        return cls(scale=share * variances.double(), **others)

    def matrices(self, features: int, regressors: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return M0 [feature, regressor] and Psi0 [feature, feature], in the dtype of ``like``.

        Raises:
            ShapeError: ``mean`` or ``scale`` does not fit the data.
            DataError: ``scale`` is not positive definite, or ``dof`` is too small.
        """
        mean = torch.zeros(features, regressors) if self.mean is None else self.mean
        if tuple(mean.shape) != (features, regressors):
            raise ShapeError(
                f"SwitchingPrior: expected mean [feature={features}, regressor={regressors}], got "
                f"{tuple(mean.shape)}"
            )
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        if scale.ndim == 2 and tuple(scale.shape) != (features, features):
            raise ShapeError(
                f"SwitchingPrior: expected scale [feature={features}, feature={features}], got "
                f"{tuple(scale.shape)}"
            )
        if scale.ndim == 1 and len(scale) != features:
            raise ShapeError(
                f"SwitchingPrior: expected scale [feature={features}], got {tuple(scale.shape)}"
            )
        matrix = scale if scale.ndim == 2 else torch.diag_embed(scale.expand(features))
        if int(torch.linalg.cholesky_ex(matrix).info):
            raise DataError("SwitchingPrior: expected a positive definite scale matrix")
        self.degrees(features)
        return mean.to(like), matrix.to(like)

    def degrees(self, features: int) -> float:
        """Return the degrees of freedom for ``features`` features.

        Raises:
            DataError: They do not exceed D - 1, so that the law is improper.
        """
        dof = features + 2.0 if self.dof is None else float(self.dof)
        if not dof > features - 1:
            raise DataError(
                f"SwitchingPrior: expected dof > {features - 1} for {features} features, got {dof}"
            )
        return dof

    def concentrations(self, mask: Tensor, like: Tensor) -> Tensor:
        """Return Dirichlet concentrations [state, state]; 0 where a transition is forbidden."""
        allowed = mask.to(like)
        stay = torch.eye(len(mask), dtype=like.dtype, device=like.device)
        return allowed * (self.transition + self.sticky * stay)


def log_dirichlet(probs: Tensor, concentration: Tensor) -> Tensor:
    """Log Dirichlet density [*] of rows [*, entry] whose concentration may be zero for some.

    Entries of concentration zero are no coordinates: the law is that of the others.
    """
    part = concentration > 0
    a = torch.where(part, concentration, 1.0)
    terms = torch.xlogy(a - 1.0, torch.where(part, probs, 1.0)) - torch.lgamma(a)
    return torch.lgamma(concentration.sum(-1)) + terms.sum(-1)


def log_regimes(
    prior: SwitchingPrior, weights: Tensor, covariance: Tensor, kind: Covariance
) -> Tensor:
    """Log prior density [*batch] of weights [*batch, K, D, P] and covariances [*batch, K, D, D].

    The density of a covariance matrix is stated for its lower triangle, as Wishart densities are.
    """
    states, features, regressors = weights.shape[-3:]
    mean, scale = prior.matrices(features, regressors, weights)
    dof = prior.degrees(features)
    factor, _ = safe_cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, weights - mean, upper=False)
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    normal = 0.5 * (
        features * regressors * (math.log(prior.ridge) - math.log(2.0 * math.pi))
        - regressors * log_det
        - prior.ridge * white.square().sum((-2, -1))
    )
    if kind == "diag":
        noise = _log_inverse_gamma(
            covariance.diagonal(dim1=-2, dim2=-1), (dof - features + 1) / 2, scale.diagonal() / 2
        ).sum(-1)
    else:
        noise = _log_inverse_wishart(factor, log_det, dof, scale)
    if kind == "shared":
        return normal.sum(-1) + noise[..., 0]
    return (normal + noise).sum(-1)


def _log_inverse_gamma(x: Tensor, shape: float, rate: Tensor) -> Tensor:
    """Log density of x under an inverse gamma law."""
    return shape * rate.log() - math.lgamma(shape) - (shape + 1) * x.log() - rate / x


def _log_inverse_wishart(factor: Tensor, log_det: Tensor, dof: float, scale: Tensor) -> Tensor:
    """Log density [*] of S = factor factor^T under InverseWishart(dof, scale)."""
    order = scale.shape[-1]
    root = torch.linalg.cholesky(scale)
    white = torch.linalg.solve_triangular(factor, root.expand_as(factor), upper=False)
    half = torch.tensor(dof / 2, dtype=factor.dtype, device=factor.device)
    return (
        dof * root.diagonal().log().sum()
        - 0.5 * dof * order * math.log(2.0)
        - torch.mvlgamma(half, order)
        - 0.5 * (dof + order + 1) * log_det
        - 0.5 * white.square().sum((-2, -1))
    )
