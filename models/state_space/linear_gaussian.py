"""The linear-Gaussian state-space model."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.models.state_space.base import StateSpaceModel
from probkit.models.state_space.normals import standard_normal
from probkit.numerics import check_finite

__all__ = ["LinearGaussian"]

_LOG_2PI = math.log(2 * math.pi)


@storable
@dataclass(frozen=True)
class LinearGaussian(StateSpaceModel):
    """x_t = A x_(t-1) + N(0, Q), y_t = C x_t + N(0, R), x_0 ~ N(m, P).

    Numbers stand for 1 x 1 matrices. Data: y [step, feature], NaN where missing. The model proposes
    from p(x_t | x_(t-1), y_t), so it can be filtered with ``guided=True``.

    Args:
        transition: A [state, state].
        transition_cov: Q [state, state], positive definite.
        observation: C [feature, state].
        observation_cov: R [feature, feature], positive definite.
        initial_mean: m [state]; None is zero.
        initial_cov: P [state, state]; None is the stationary covariance.
        prior: Laws of the unknown parameters, by field name.

    Example:
        >>> model = LinearGaussian(0.7, 0.04, 1.0, 1.0)
        >>> states, y = model.simulate_path(5, rng=0)
        >>> y.shape
        torch.Size([1, 5, 1])
    """

    transition: Tensor
    transition_cov: Tensor
    observation: Tensor
    observation_cov: Tensor
    initial_mean: Tensor | None = None
    initial_cov: Tensor | None = None
    prior: Mapping[str, Distribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("transition", "transition_cov", "observation", "observation_cov"):
            object.__setattr__(self, name, _matrix(getattr(self, name), name))
        if self.initial_cov is not None:
            object.__setattr__(self, "initial_cov", _matrix(self.initial_cov, "initial_cov"))
        if self.initial_mean is not None:
            mean = as_tensor(self.initial_mean, name="initial_mean").double().reshape(-1)
            object.__setattr__(self, "initial_mean", mean)
        states, seen = self.transition.shape[0], self.observation.shape[0]
        expected = {
            "transition": (states, states),
            "transition_cov": (states, states),
            "observation": (seen, states),
            "observation_cov": (seen, seen),
            "initial_cov": (states, states),
            "initial_mean": (states,),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ShapeError(
                    f"LinearGaussian: expected {name} of shape {shape} (state={states}, "
                    f"feature={seen}), got {tuple(value.shape)}"
                )
        for name in ("transition_cov", "observation_cov", "initial_cov"):
            value = getattr(self, name)
            if value is not None and int(torch.linalg.cholesky_ex(value).info) != 0:
                raise DataError(f"LinearGaussian: expected a positive definite {name}, got {value}")
        if self.initial_cov is None:
            radius = float(torch.linalg.eigvals(self.transition).abs().max())
            if radius >= 1.0:
                raise DataError(
                    f"LinearGaussian: a transition of spectral radius {radius:.3g} >= 1 has no "
                    "stationary law; give initial_cov"
                )

    def prepare(self, data: object) -> Tensor:
        """Take y as [step, feature]; a vector is one feature."""
        y = as_tensor(data, name="y")
        if not y.is_floating_point():
            y = y.double()
        y = y.unsqueeze(-1) if y.ndim == 1 else y
        if y.ndim != 2 or y.shape[1] != self.observation.shape[0]:
            raise ShapeError(
                f"LinearGaussian: expected y [step, feature={self.observation.shape[0]}], got "
                f"{tuple(y.shape)}"
            )
        check_finite(
            y.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), "y", ("step", "feature")
        )
        return y

    # ------------------------------------------------------------------ laws

    @functools.cached_property
    def initial_law(self) -> tuple[Tensor, Tensor]:
        """Mean [state] and covariance [state, state] of x_0."""
        states = self.transition.shape[0]
        mean = self.transition.new_zeros(states) if self.initial_mean is None else self.initial_mean
        if self.initial_cov is not None:
            return mean, self.initial_cov
        if states == 1:
            return mean, self.transition_cov / (1 - self.transition.square())
        # P = A P A' + Q, row by row: vec P = (I - A kron A)^-1 vec Q.
        kron = torch.kron(self.transition, self.transition)
        eye = torch.eye(states * states, dtype=kron.dtype, device=kron.device)
        flat = torch.linalg.solve(eye - kron, self.transition_cov.reshape(-1))
        covariance = flat.reshape(states, states)
        return mean, 0.5 * (covariance + covariance.mT)

    @functools.cached_property
    def _initial_factor(self) -> Tensor:
        return _factor(self.initial_law[1])

    @functools.cached_property
    def _transition_factor(self) -> Tensor:
        return _factor(self.transition_cov)

    @functools.cached_property
    def _observation_factor(self) -> Tensor:
        return _factor(self.observation_cov)

    def sample_initial(self, n: int, *, like: Tensor, rng: torch.Generator) -> Tensor:
        """Draw x_0 [n, state]."""
        mean = self.initial_law[0].to(like).expand(n, -1)
        return _draw(mean, self._initial_factor.to(like), rng)

    def sample_next(self, old: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw x_(t+1) [n, state]."""
        return _draw(_apply(self.transition.to(old), old), self._transition_factor.to(old), rng)

    def sample_observation(self, state: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw y_t [n, feature]."""
        mean = _apply(self.observation.to(state), state)
        return _draw(mean, self._observation_factor.to(state), rng)

    def log_initial(self, new: Tensor) -> Tensor:
        """Return log N(x_0; m, P) [n]."""
        return _log_normal(new - self.initial_law[0].to(new), self._initial_factor.to(new))

    def log_next(self, old: Tensor, new: Tensor) -> Tensor:
        """Return log N(x_(t+1); A x_t, Q) [n]."""
        factor = self._transition_factor.to(new)
        return _log_linear_normal(new, self.transition.to(new), old, factor)

    def log_observation(self, y: Tensor, state: Tensor) -> Tensor:
        """Return log N(y_t; C x_t, R) [n] over the features that are there."""
        C, factor = self.observation.to(state), self._observation_factor.to(state)
        missing = torch.isnan(y)
        if bool(missing.any()):
            if bool(missing.all()):
                return state.new_zeros(len(state))
            there = (~missing).nonzero().squeeze(1)
            C, y = C[there], y[there]
            factor = _factor(self.observation_cov.to(state)[there][:, there])
        return _log_linear_normal(y, C, state, factor)

    def log_transition_bound(self, t: int, data: Tensor) -> Tensor:
        """Return the largest log transition density of step ``t``, the one at its mean."""
        factor = self._initial_factor if t == 0 else self._transition_factor
        return -factor.diagonal().log().sum() - 0.5 * _LOG_2PI * factor.shape[0]

    # ------------------------------------------------------------------ guided proposal

    def _tilted(self, t: int, old: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [n, state] and Cholesky factor of p(x_t | x_(t-1), y_t)."""
        initial_mean, initial_cov = self.initial_law
        prior_cov = (initial_cov if t == 0 else self.transition_cov).to(old)
        mean = (
            initial_mean.to(old).expand(len(old), -1)
            if t == 0
            else _apply(self.transition.to(old), old)
        )
        there = (~torch.isnan(y)).nonzero().squeeze(1)
        C = self.observation.to(old)[there]
        noise = self.observation_cov.to(old)[there][:, there]
        gain = torch.linalg.solve(C @ prior_cov @ C.mT + noise, C @ prior_cov).mT
        mean = mean + _apply(gain, y[there] - _apply(C, mean))
        covariance = prior_cov - gain @ C @ prior_cov
        return mean, torch.linalg.cholesky(0.5 * (covariance + covariance.mT))

    def propose(self, t: int, particles: Tensor, data: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw x_t given x_(t-1) and y_t."""
        return _draw(*self._tilted(t, particles, data[t]), rng)

    def log_proposal(self, t: int, old: Tensor, new: Tensor, data: Tensor) -> Tensor:
        """Return log p(x_t | x_(t-1), y_t) [n]."""
        mean, factor = self._tilted(t, old, data[t])
        return _log_normal(new - mean, factor)


def _matrix(value: object, name: str) -> Tensor:
    """Turn a number or matrix into a float64 matrix (other precisions of tensors are raised)."""
    tensor = as_tensor(value, name=name).double()
    tensor = tensor.reshape(1, 1) if tensor.numel() == 1 else tensor
    if tensor.ndim != 2:
        raise ShapeError(f"LinearGaussian: expected a matrix {name}, got {tuple(tensor.shape)}")
    return tensor


def _factor(covariance: Tensor) -> Tensor:
    """Lower Cholesky factor; the plain root of a 1 x 1 matrix differentiates much faster."""
    return covariance.sqrt() if covariance.shape == (1, 1) else torch.linalg.cholesky(covariance)


def _apply(matrix: Tensor, rows: Tensor) -> Tensor:
    """Return [n, out] of matrix [out, in] on rows [n, in]."""
    if matrix.shape == (1, 1):
        return rows * matrix[0, 0]
    return rows @ matrix.mT


def _draw(mean: Tensor, factor: Tensor, rng: torch.Generator) -> Tensor:
    """Draw N(mean, factor factor') [n, size]."""
    noise = standard_normal(mean.shape, rng=rng, dtype=mean.dtype, device=mean.device)
    if factor.shape == (1, 1):
        return noise.mul_(factor[0, 0]).add_(mean)
    return _apply(factor, noise).add_(mean)


def _log_linear_normal(value: Tensor, matrix: Tensor, rows: Tensor, factor: Tensor) -> Tensor:
    """Return log N(value; matrix row, factor factor') [n] of rows [n, in].

    Args:
        value: [out] or [n, out].
        matrix: [out, in].
        rows: [n, in].
        factor: Lower Cholesky factor [out, out].
    """
    if factor.shape == (1, 1) and matrix.shape == (1, 1):
        # Two fused passes over the particles; the general path takes six.
        precision = factor[0, 0].reciprocal()
        scaled = value.squeeze(-1) * precision
        whitened = torch.addcmul(scaled, rows.squeeze(-1), -precision * matrix[0, 0])
        constant = -factor[0, 0].log() - 0.5 * _LOG_2PI
        return torch.addcmul(constant, whitened, whitened, value=-0.5)
    return _log_normal(value - _apply(matrix, rows), factor)


def _log_normal(difference: Tensor, factor: Tensor) -> Tensor:
    """Return log N(difference; 0, factor factor') [n] of rows [n, size]."""
    whitened = torch.linalg.solve_triangular(factor, difference.mT, upper=False)
    constant = factor.diagonal().log().sum() + 0.5 * _LOG_2PI * factor.shape[0]
    return -0.5 * whitened.square().sum(0) - constant
