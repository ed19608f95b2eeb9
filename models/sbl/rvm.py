"""Sparse Bayesian classification: the relevance vector machine by Laplace's approximation."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import ConvergenceWarning, DataError, ShapeError

__all__ = ["SparseLogistic", "fit_sparse_logistic", "moderated_sigmoid"]

_NEWTON_STEPS = 50
_NEWTON_TOLERANCE = 1e-8
_SMALLEST = 1e-12  # prior variance below which a column is dropped, relative to the largest
_LEVERAGE = 1e-8  # 1 - a_j Sigma_jj at which the data says nothing about a weight


@dataclass(frozen=True)
class SparseLogistic:
    """Weights of a sparse logistic regression, Gaussian around their mode.

    Attributes:
        active: Columns in use [active].
        mean: Modes of their weights [active].
        covariance: Inverse Hessian at the mode [active, active].
        precision: Fitted prior precisions [active].
        log_evidence: Laplace's approximation of the log evidence, a scalar.
        iterations: Updates of the precisions.
        converged: Whether they had settled.
    """

    active: Tensor
    mean: Tensor
    covariance: Tensor
    precision: Tensor
    log_evidence: Tensor
    iterations: int
    converged: bool

    def activation(self, design: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [row] of the linear predictor at new rows [row, column]."""
        part = design[:, self.active]
        mean = part @ self.mean
        return mean, ((part @ self.covariance) * part).sum(1)


def moderated_sigmoid(mean: Tensor, variance: Tensor) -> Tensor:
    """Probability that a Gaussian activation gives class one.

    sigmoid(m / sqrt(1 + pi v / 8)) (MacKay 1992, "The evidence framework applied to classification
    networks"): uncertain activations are pulled to one half.

    Example:
        >>> moderated_sigmoid(torch.tensor(2.0), torch.tensor(0.0)).item() == torch.sigmoid(
        ...     torch.tensor(2.0)
        ... ).item()
        True
    """
    return torch.sigmoid(mean / (1 + math.pi / 8 * variance).sqrt())


def fit_sparse_logistic(
    design: Tensor,
    target: Tensor,
    *,
    max_iter: int = 200,
    tolerance: float = 1e-3,
    precision: float = 1.0,
) -> SparseLogistic:
    """Fit P(t = 1) = sigmoid(Phi w), w_j ~ N(0, 1 / a_j), precisions by the evidence.

    Newton steps find the mode of the weights; with S the inverse Hessian there, the precisions
    become a_j = (1 - a_j S_jj) / w_j^2 (Tipping 2001, section 3). Columns whose precision diverges
    leave the model and do not return.

    Args:
        design: Phi [row, column], float64.
        target: 0 or 1 [row].
        max_iter: Largest number of updates of the precisions.
        tolerance: Stop when no log precision moves by more.
        precision: Precision that all columns start from.

    Raises:
        ShapeError: The target does not fit the design.
        DataError: There is one class only.

    Warns:
        ConvergenceWarning: The precisions had not settled.

    Example:
        >>> x = torch.linspace(-2, 2, 40, dtype=torch.float64)
        >>> design = torch.stack([torch.ones_like(x), x, x**2, x**3], 1)
        >>> fit = fit_sparse_logistic(design, (x + 0.1 * x.sin() > 0.05).double())
        >>> 1 in fit.active
        True
    """
    if target.shape != design.shape[:1]:
        raise ShapeError(f"expected a target [row={len(design)}], got {tuple(target.shape)}")
    if not 0 < float(target.sum()) < len(target):
        raise DataError("expected both classes 0 and 1, the target holds one only")
    active = torch.arange(design.shape[1], device=design.device)
    prior = torch.full((len(active),), float(precision), dtype=design.dtype, device=design.device)
    weights = torch.zeros_like(prior)
    converged, iteration = False, 0
    for iteration in range(1, max_iter + 1):  # noqa: B007
        weights, factor, _ = _mode(design[:, active], target, prior, weights)
        variance = torch.cholesky_inverse(factor).diagonal()
        known = (1 - prior * variance).clamp_min(_LEVERAGE)
        updated = known / weights.square().clamp_min(torch.finfo(prior.dtype).tiny)
        kept = updated < updated.amin() / _SMALLEST
        settled = (updated[kept] / prior[kept]).log().abs().amax() < tolerance
        active, prior, weights = active[kept], updated[kept], weights[kept]
        if bool(settled) and bool(kept.all()):
            converged = True
            break
    if not converged:
        warnings.warn(
            f"the precisions of a sparse classification had not settled after {max_iter} updates; "
            "raise max_iter or tolerance",
            ConvergenceWarning,
            stacklevel=3,
        )
    weights, factor, log_joint = _mode(design[:, active], target, prior, weights)
    log_evidence = log_joint + 0.5 * prior.log().sum() - factor.diagonal().log().sum()
    return SparseLogistic(
        active, weights, torch.cholesky_inverse(factor), prior, log_evidence, iteration, converged
    )


def _mode(
    design: Tensor, target: Tensor, precision: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise the log joint by damped Newton steps.

    Returns:
        The mode [column], the factor of the negative Hessian there, and the log joint.
    """
    weights = start
    value = _log_joint(design, target, precision, weights)
    factor = torch.linalg.cholesky(_hessian(design, precision, weights))
    for _ in range(_NEWTON_STEPS):
        probability = torch.sigmoid(design @ weights)
        gradient = design.mT @ (target - probability) - precision * weights
        step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        decrement = float(gradient @ step)  # twice the gain that the quadratic promises
        size = 1.0
        while size > 1e-6:
            new = weights + size * step
            new_value = _log_joint(design, target, precision, new)
            if bool(new_value >= value + 1e-4 * size * decrement) or decrement < _NEWTON_TOLERANCE:
                break
            size /= 2
        weights, value = new, new_value
        factor = torch.linalg.cholesky(_hessian(design, precision, weights))
        if decrement < _NEWTON_TOLERANCE:
            break
    return weights, factor, value


def _log_joint(design: Tensor, target: Tensor, precision: Tensor, weights: Tensor) -> Tensor:
    """Sum of log Bernoulli terms minus w^T A w / 2."""
    activation = design @ weights
    likelihood = target * activation - torch.nn.functional.softplus(activation)
    return likelihood.sum() - 0.5 * (precision * weights.square()).sum()


def _hessian(design: Tensor, precision: Tensor, weights: Tensor) -> Tensor:
    """Phi^T B Phi + A, B = p (1 - p)."""
    probability = torch.sigmoid(design @ weights)
    curved = design * (probability * (1 - probability))[:, None]
    return design.mT @ curved + torch.diag(precision)
