"""Maximum a posteriori hyper-parameters of exact Gaussian processes, for the sizes of a study.

The same objective as ``ExactMarginalLogLikelihood`` with the model's priors, evaluated on dense
matrices: at 50 points GPyTorch's lazy tensors cost several times what the algebra does. Positive
parameters that their constraint leaves as they are move on a log scale, where the objective is well
conditioned, and a fit can start from the last one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from probkit.bo.surrogates.dense_gp import covariance
from probkit.errors import DataError
from probkit.numerics import safe_cholesky
from probkit.rng import scope

__all__ = ["fit_map", "hyper_parameters", "log_posterior"]

_GRADIENT = 1e-2
_TOLERANCE = 1e-7
_ITERATIONS = 200
_REFUSED = 1e12


class _Entry(NamedTuple):
    """One raw parameter of a model.

    Attributes:
        name: Its name.
        value: The parameter.
        logarithmic: Whether it moves on a log scale.
        low: Smallest value.
        high: Largest value.
    """

    name: str
    value: nn.Parameter
    logarithmic: bool
    low: float
    high: float


def log_posterior(model: Any) -> Tensor:
    """Return the log marginal likelihood plus the log priors of a single-output exact GP.

    Args:
        model: With ``mean_module``, ``covar_module``, ``likelihood`` and training data, in train
            mode, without batch dims.
    """
    x = model.transform_inputs(model.train_inputs[0])
    y = model.train_targets
    K = covariance(model.covar_module, x)
    noise = model.likelihood.noise.expand(len(y))
    with scope(quiet=True):
        L, _ = safe_cholesky(K + torch.diag_embed(noise))
    white = torch.linalg.solve_triangular(L, (y - model.mean_module(x))[:, None], upper=False)
    total = -0.5 * white.square().sum() - L.diagonal().log().sum()
    total = total - 0.5 * len(y) * math.log(2 * math.pi)
    for _, module, prior, closure, _ in model.named_priors():
        total = total + prior.log_prob(closure(module)).sum()
    return total


def hyper_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the raw parameters, by name: what a later fit starts from."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def fit_map(
    model: Any, starts: Sequence[Mapping[str, Tensor]] = (), *, own_start: bool = True
) -> float:
    """Set the hyper-parameters to a mode of their posterior, and the model to eval mode.

    Args:
        model: As for :func:`log_posterior`.
        starts: Starting points, as :func:`hyper_parameters` gives them; those of another shape are
            passed over.
        own_start: Whether the values that the model has are a starting point, too; they are where
            there is no other.

    Returns:
        The log posterior density reached, the best over the starting points.

    Raises:
        DataError: It is not finite at any starting point.
    """
    model.train()
    entries = _entries(model)
    if not entries:
        with torch.no_grad():
            value = float(log_posterior(model))
        model.eval()
        return value
    points = [_vector(entries, start) for start in starts if _fits(entries, start)]
    if own_start or not points:
        points.append(_vector(entries, {}))
    bounds = [pair for entry in entries for pair in _bounds(entry)]
    best: tuple[float, np.ndarray[Any, Any]] | None = None
    for point in points:
        found = minimize(
            _objective,
            point,
            args=(model, entries),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"gtol": _GRADIENT, "ftol": _TOLERANCE, "maxiter": _ITERATIONS},
        )
        if found.fun < _REFUSED and (best is None or found.fun < best[0]):
            best = (float(found.fun), found.x)
    if best is None:
        raise DataError(
            "the marginal likelihood is not finite at any starting point of the hyper-parameters; "
            "check the outcomes, or give them noise"
        )
    _place(entries, best[1])
    model.eval()
    return -best[0]


def _entries(model: Any) -> list[_Entry]:
    entries = []
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        constraint = model.constraint_for_parameter_name(name)
        low, high, logarithmic = -math.inf, math.inf, False
        if constraint is not None and not constraint.enforced:
            low, high = float(constraint.lower_bound), float(constraint.upper_bound)
            logarithmic = low >= 0
        entries.append(_Entry(name, value, logarithmic, low, high))
    return entries


def _fits(entries: Sequence[_Entry], start: Mapping[str, Tensor]) -> bool:
    return all(e.name in start and start[e.name].shape == e.value.shape for e in entries)


def _vector(
    entries: Sequence[_Entry], start: Mapping[str, Tensor]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    parts = []
    for entry in entries:
        value = start.get(entry.name, entry.value).detach().double().flatten()
        value = value.clamp(max(entry.low, 1e-12) if entry.logarithmic else entry.low, entry.high)
        parts.append((value.log() if entry.logarithmic else value).numpy())
    return np.concatenate(parts)


def _bounds(entry: _Entry) -> list[tuple[float, float]]:
    low, high = entry.low, entry.high
    if entry.logarithmic:
        low = math.log(low) if low > 0 else math.log(1e-12)
        high = math.log(high) if high < math.inf else math.inf
    return [(low, high)] * entry.value.numel()


def _place(entries: Sequence[_Entry], point: np.ndarray[Any, Any]) -> None:
    """Write a vector into the parameters."""
    begin = 0
    for entry in entries:
        part = torch.as_tensor(point[begin : begin + entry.value.numel()].copy())
        part = part.exp().clamp(entry.low, entry.high) if entry.logarithmic else part
        entry.value.data.copy_(part.reshape(entry.value.shape))
        begin += entry.value.numel()


def _objective(
    point: np.ndarray[Any, Any], model: Any, entries: Sequence[_Entry]
) -> tuple[float, np.ndarray[Any, Any]]:
    """Return minus the log posterior and its gradient in the moving coordinates."""
    _place(entries, point)
    values = [entry.value for entry in entries]
    try:
        with torch.enable_grad():
            loss = -log_posterior(model)
            gradient = torch.autograd.grad(loss, values, allow_unused=True)
    except DataError:
        return _REFUSED, np.zeros_like(point)
    parts = []
    for entry, slope in zip(entries, gradient, strict=True):
        slope = torch.zeros_like(entry.value) if slope is None else slope
        parts.append((slope * entry.value.detach() if entry.logarithmic else slope).flatten())
    flat = torch.cat(parts).double().numpy()
    if not (math.isfinite(float(loss.detach())) and np.isfinite(flat).all()):
        return _REFUSED, np.zeros_like(point)
    return float(loss.detach()), flat
