"""Joint laws on rows and outputs in which one scale is shared by all entries."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from probkit.distributions._random import inverse_chi, randn_like
from probkit.distributions.student_t import spread_factor, student_log_prob
from probkit.errors import ShapeError

__all__ = [
    "MultiOutputNormal",
    "MultiOutputStudentT",
    "MultivariateStudentT",
]


class _MultiOutput(TorchDistribution):
    """Shared shapes of laws on [row, output] whose outputs have one row factor in common."""

    support = constraints.independent(constraints.real, 2)
    has_rsample = True
    loc: Tensor
    scale_tril: Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.event_shape[0])

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return int(self.event_shape[1])

    def _half_log_det(self) -> Tensor:
        return self.outputs * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _squared_distance(self, value: Tensor) -> Tensor:
        diff = value - self.loc
        extra = diff.ndim - self.loc.ndim
        # Sample dimensions become right-hand sides, so that the factor is not copied per sample.
        samples = diff.shape[:extra]
        columns = diff.reshape(-1, *self.loc.shape).movedim(0, -1).flatten(-2)
        z = torch.linalg.solve_triangular(self.scale_tril, columns, upper=False)
        squares = z.square().sum(-2).unflatten(-1, (self.outputs, -1)).sum(-2)
        return squares.movedim(-1, 0).reshape(samples + self.batch_shape)

    def _row_variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1, keepdim=True).expand(self.loc.shape)

    def _check_shapes(self, loc: Tensor, scale_tril: Tensor) -> None:
        n = loc.shape[-2] if loc.ndim >= 2 else None
        if loc.ndim < 2 or scale_tril.ndim < 2 or scale_tril.shape[-2:] != (n, n):
            raise ShapeError(
                "expected loc [*batch, row, output] and scale_tril [*batch, row, row], got "
                f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )


class MultiOutputNormal(_MultiOutput):
    """Normal law on [row, output]: independent outputs with one row covariance.

    Args:
        loc: Mean [*batch, row, output].
        scale_tril: Lower factor of the row covariance [*batch, row, row].

    Raises:
        ShapeError: the shapes do not match.

    Example:
        >>> import torch
        >>> law = MultiOutputNormal(torch.zeros(3, 2), torch.eye(3))
        >>> law.event_shape
        torch.Size([3, 2])
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.lower_cholesky,
    }

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        self._check_shapes(loc, scale_tril)
        batch = torch.broadcast_shapes(loc.shape[:-2], scale_tril.shape[:-2])
        self.loc = loc.expand(batch + loc.shape[-2:])
        self.scale_tril = scale_tril.expand(batch + scale_tril.shape[-2:])
        super().__init__(batch, loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultiOutputNormal:
        """Return the law with batch shape ``batch_shape``."""
        batch = torch.Size(batch_shape)
        loc = self.loc.expand(batch + self.event_shape)
        factor = self.scale_tril.expand(batch + self.scale_tril.shape[-2:])
        return MultiOutputNormal(loc, factor, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean, of the shape of ``loc``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, of the shape of ``loc``."""
        return self._row_variance()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, *event]."""
        if self._validate_args:
            self._validate_sample(value)
        count = self.rows * self.outputs
        constant = 0.5 * count * math.log(2 * math.pi)
        return -0.5 * self._squared_distance(value) - self._half_log_det() - constant

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event] from the global stream, differentiably."""
        return self._draw(torch.Size(sample_shape), None)

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        noise = randn_like(self.loc, self._extended_shape(shape), generator)
        return self.loc + self.scale_tril @ noise


class MultiOutputStudentT(_MultiOutput):
    """Student-t law on [row, output] with ONE scale shared by all rows and outputs.

    The law of loc + sqrt(df / chi2) scale_tril Z with independent standard normal Z and a single
    chi-square of ``df`` degrees of freedom. Outputs are uncorrelated but not independent.

    Args:
        df: Degrees of freedom > 0 [*batch].
        loc: Location [*batch, row, output].
        scale_tril: Lower factor of the row scale matrix [*batch, row, row].

    Raises:
        ShapeError: the shapes do not match.

    Example:
        >>> import torch
        >>> law = MultiOutputStudentT(torch.tensor(5.0), torch.zeros(3, 2), torch.eye(3))
        >>> law.sample((4,)).shape
        torch.Size([4, 3, 2])
    """

    arg_constraints = {
        "df": constraints.positive,
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.lower_cholesky,
    }

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor,
        scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self._check_shapes(loc, scale_tril)
        df = torch.as_tensor(df, dtype=loc.dtype, device=loc.device)
        batch = torch.broadcast_shapes(df.shape, loc.shape[:-2], scale_tril.shape[:-2])
        self.df = df.expand(batch)
        self.loc = loc.expand(batch + loc.shape[-2:])
        self.scale_tril = scale_tril.expand(batch + scale_tril.shape[-2:])
        super().__init__(batch, loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultiOutputStudentT:
        """Return the law with batch shape ``batch_shape``."""
        batch = torch.Size(batch_shape)
        loc = self.loc.expand(batch + self.event_shape)
        factor = self.scale_tril.expand(batch + self.scale_tril.shape[-2:])
        return MultiOutputStudentT(self.df.expand(batch), loc, factor, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The location where df > 1, else NaN."""
        return torch.where(self.df[..., None, None] > 1, self.loc, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Marginal variances [*batch, row, output]; infinite, with a warning, where df <= 2."""
        return self._row_variance() * spread_factor(self.df)[..., None, None]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, *event]."""
        if self._validate_args:
            self._validate_sample(value)
        count = self.rows * self.outputs
        return student_log_prob(self.df, count, self._squared_distance(value), self._half_log_det())

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event] from the global stream, differentiably."""
        return self._draw(torch.Size(sample_shape), None)

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        noise = randn_like(self.loc, self._extended_shape(shape), generator)
        scale = inverse_chi(self.df.expand(shape + self.batch_shape), generator)
        return self.loc + scale[..., None, None] * (self.scale_tril @ noise)


class MultivariateStudentT(TorchDistribution):
    """Multivariate Student-t law: one chi-square per draw, shared by all coordinates.

    Args:
        df: Degrees of freedom > 0 [*batch].
        loc: Location [*batch, n].
        scale_tril: Lower factor of the scale matrix [*batch, n, n] (the covariance is
            df / (df - 2) times the scale matrix).

    Raises:
        ShapeError: the shapes do not match.

    Example:
        >>> import math
        >>> import torch
        >>> law = MultivariateStudentT(4.0, torch.zeros(2).double(), torch.eye(2).double())
        >>> round(law.log_prob(torch.zeros(2).double()).exp().item() * 2 * math.pi, 9)
        1.0
    """

    arg_constraints = {
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor,
        scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self._one = MultiOutputStudentT(df, loc.unsqueeze(-1), scale_tril, validate_args=False)
        self.df, self.scale_tril = self._one.df, self._one.scale_tril
        self.loc = self._one.loc.squeeze(-1)
        super().__init__(self._one.batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultivariateStudentT:
        """Return the law with batch shape ``batch_shape``."""
        wide = self._one.expand(batch_shape)
        return MultivariateStudentT(
            wide.df, wide.loc.squeeze(-1), wide.scale_tril, validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        """The location where df > 1, else NaN."""
        return self._one.mean.squeeze(-1)

    @property
    def variance(self) -> Tensor:
        """Marginal variances [*batch, n]; infinite, with a NumericsWarning, where df <= 2."""
        return self._one.variance.squeeze(-1)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance [*batch, n, n]; infinite, with a NumericsWarning, where df <= 2."""
        scale_matrix = self.scale_tril @ self.scale_tril.mT
        return scale_matrix * spread_factor(self.df)[..., None, None]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, *event]."""
        if self._validate_args:
            self._validate_sample(value)
        return self._one.log_prob(value.unsqueeze(-1))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event] from the global stream, differentiably."""
        return self._one.rsample(sample_shape).squeeze(-1)
