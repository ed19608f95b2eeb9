"""Joint laws on rows and outputs in which one scale is shared by all entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit.distributions._random import inverse_chi, randn_like
from probkit.distributions.student_t import spread_factor, student_log_prob
from probkit.errors import ShapeError

__all__ = [
    "MultiOutputNormal",
    "MultiOutputStudentT",
    "MultivariateStudentT",
    "ScaledMultivariateNormal",
]

_POSITIVE_DIAGONAL = constraints.lower_cholesky


class _MultiOutput(TorchDistribution):
    """Laws of loc + amplitude scale_tril Z diag(output_scale) on [row, output].

    All but ``amplitude`` (and ``df``) are kept unexpanded (batch dims of size 1 where they do not
    vary), so that a mixture over thousands of amplitudes holds one factor.
    """

    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def _set(
        self,
        loc: Tensor,
        scale_tril: Tensor,
        amplitude: Tensor | float,
        output_scale: Tensor | float,
        extra_batch: torch.Size,
        validate_args: bool | None,
    ) -> torch.Size:
        rows = loc.shape[-2] if loc.ndim >= 2 else None
        if rows is None or scale_tril.ndim < 2 or scale_tril.shape[-2:] != (rows, rows):
            raise ShapeError(
                "expected loc [*batch, row, output] and scale_tril [*batch, row, row], got "
                f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        amplitude = torch.as_tensor(amplitude, dtype=loc.dtype, device=loc.device)
        each = torch.as_tensor(output_scale, dtype=loc.dtype, device=loc.device)
        each = each.unsqueeze(0) if each.ndim == 0 else each
        batch = torch.broadcast_shapes(
            loc.shape[:-2],
            scale_tril.shape[:-2],
            amplitude.shape,
            each.shape[:-1],
            extra_batch,
        )
        self._loc = _padded(loc, len(batch) + 2)
        self._tril = _padded(scale_tril, len(batch) + 2)
        self._output_scale = _padded(each, len(batch) + 1)
        self.amplitude = amplitude.expand(batch)
        Distribution.__init__(self, batch, loc.shape[-2:], validate_args=False)
        self._validate_args = bool(validate_args)
        return batch

    @property
    def loc(self) -> Tensor:
        """Location [*batch, row, output]."""
        return self._loc.expand(self.batch_shape + self.event_shape)

    @property
    def scale_tril(self) -> Tensor:
        """Lower factor [*batch, row, row] of the row scale matrix at amplitude 1."""
        return self._tril.expand(self.batch_shape + self._tril.shape[-2:])

    @property
    def output_scale(self) -> Tensor:
        """Factor [*batch, output] on the scale of each output."""
        return self._output_scale.expand(self.batch_shape + self.event_shape[1:])

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return int(self.event_shape[1])

    def marginal_scale(self) -> Tensor:
        """Scale [*batch, row, output] of each entry."""
        rows = self._tril.square().sum(-1, keepdim=True).sqrt()
        scale = self.amplitude[..., None, None] * rows * self._output_scale.unsqueeze(-2)
        return scale.expand(self.batch_shape + self.event_shape)

    def _half_log_det(self) -> Tensor:
        rows = self._tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        outputs = self._output_scale.expand(*self._output_scale.shape[:-1], self.outputs)
        n = self.event_shape[0]
        return self.outputs * (rows + n * self.amplitude.log()) + n * outputs.log().sum(-1)

    def _squared_distance(self, value: Tensor) -> Tensor:
        centred = (value - self._loc) / self._output_scale.unsqueeze(-2)
        z = _on_columns(_solve, self._tril, centred)
        return z.square().sum((-2, -1)) / self.amplitude.square()

    def _noise(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        noise = randn_like(self._loc, shape + self.batch_shape + self.event_shape, generator)
        rows = _on_columns(torch.matmul, self._tril, noise)
        return self.amplitude[..., None, None] * rows * self._output_scale.unsqueeze(-2)

    def stored_arguments(self) -> dict[str, Tensor]:
        """Constructor arguments, unexpanded."""
        return {
            "loc": self._loc,
            "scale_tril": self._tril,
            "amplitude": self.amplitude,
            "output_scale": self._output_scale,
        }

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the law with batch shape ``batch_shape``."""
        arguments = self.stored_arguments()
        arguments["amplitude"] = self.amplitude.expand(torch.Size(batch_shape))
        return type(self)(**arguments, validate_args=False)

    def select_batch(self, index: Tensor | int) -> Any:
        """Index the leading batch dim; parameters that do not vary along it are not copied."""
        full = len(self.batch_shape)
        rebuilt = {}
        for name, value in self.stored_arguments().items():
            constant = value.shape[0] == 1 and self.batch_shape[0] > 1 and value.ndim > full
            if constant:
                rebuilt[name] = value[0] if isinstance(index, int) else value
            else:
                rebuilt[name] = value[index]
        return type(self)(**rebuilt, validate_args=False)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Apply ``change`` to the leading dims of each parameter [*batch, *parameter].

        A parameter that is constant along the first batch dim has size 1 there, so ``change`` may
        reshape the dims after it but not index it.
        """
        full = len(self.batch_shape)
        rebuilt = {}
        for name, value in self.stored_arguments().items():
            first = value.shape[:1] if full and value.ndim > full else self.batch_shape[:1]
            wide = value.expand(first + self.batch_shape[1:] + value.shape[full:])
            rebuilt[name] = change(wide)
        return type(self)(**rebuilt, validate_args=False)

    def flatten_batch(self, n: int) -> Any:
        """Merge the first ``n`` batch dims; parameters constant along all of them stay so."""
        full = len(self.batch_shape)
        rebuilt = {}
        for name, value in self.stored_arguments().items():
            constant = value.ndim > full and all(size == 1 for size in value.shape[:n])
            if not constant:
                value = value.expand(self.batch_shape + value.shape[full:])
            rebuilt[name] = value.flatten(0, n - 1)
        return type(self)(**rebuilt, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, row, output] from the global stream, differentiably."""
        return self._draw(torch.Size(sample_shape), None)

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        raise AssertionError("every final class draws")


def _padded(value: Tensor, ndim: int) -> Tensor:
    return value.reshape((1,) * (ndim - value.ndim) + value.shape)


def _solve(tril: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(tril, columns, upper=False)


def _on_columns(function: Any, tril: Tensor, x: Tensor) -> Tensor:
    """Apply a matrix to x [*lead, row, output] without copying it over dims where it is constant.

    Args:
        function: Of (matrices [*kept, row, row], columns [*kept, row, k]).
        tril: [*batch, row, row], with batch dims of size 1 where constant; as many batch dims as
            ``x`` has, or fewer.
        x: [*lead, row, output].
    """
    lead = x.ndim - 2
    offset = lead - (tril.ndim - 2)
    kept = [d for d in range(offset, lead) if tril.shape[d - offset] > 1]
    folded = [d for d in range(lead) if d not in kept]
    # Batch dims along which x is constant but the matrix is not need a copy of x, not of it.
    sizes = [tril.shape[d - offset] if d in kept else x.shape[d] for d in range(lead)]
    x = x.expand(*sizes, *x.shape[-2:])
    order = [*kept, lead, lead + 1, *folded]
    moved = x.permute(order)
    columns = moved.flatten(len(kept) + 1)
    result = function(tril.reshape([sizes[d] for d in kept] + list(tril.shape[-2:])), columns)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return result.reshape(moved.shape).permute(inverse)


class MultiOutputNormal(_MultiOutput):
    """Normal law on [row, output]: independent outputs with one row covariance.

    Args:
        loc: Mean [*batch, row, output].
        scale_tril: Lower factor of the row covariance at amplitude 1 [*batch, row, row].
        amplitude: Factor > 0 on the standard deviations [*batch].
        output_scale: Factor > 0 on those of each output [*batch, output].

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
        "scale_tril": _POSITIVE_DIAGONAL,
        "amplitude": constraints.positive,
        "output_scale": constraints.independent(constraints.positive, 1),
    }

    def __init__(
        self,
        loc: Tensor,
        scale_tril: Tensor,
        amplitude: Tensor | float = 1.0,
        output_scale: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self._set(loc, scale_tril, amplitude, output_scale, torch.Size(), validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean [*batch, row, output]."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances [*batch, row, output]."""
        return self.marginal_scale().square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, row, output]."""
        if self._validate_args:
            self._validate_sample(value)
        constant = 0.5 * self.event_shape.numel() * math.log(2 * math.pi)
        return -0.5 * self._squared_distance(value) - self._half_log_det() - constant

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return self._loc + self._noise(shape, generator)


class MultiOutputStudentT(_MultiOutput):
    """Student-t law on [row, output] with ONE scale shared by all rows and outputs.

    The law of loc + amplitude sqrt(df / chi2) scale_tril Z with independent standard normal Z and a
    single chi-square of ``df`` degrees of freedom. Outputs are uncorrelated but not independent.

    Args:
        df: Degrees of freedom > 0 [*batch].
        loc: Location [*batch, row, output].
        scale_tril: Lower factor of the row scale matrix at amplitude 1 [*batch, row, row].
        amplitude: Factor > 0 on the scale [*batch].
        output_scale: Factor > 0 on the scale of each output [*batch, output].

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
        "scale_tril": _POSITIVE_DIAGONAL,
        "amplitude": constraints.positive,
        "output_scale": constraints.independent(constraints.positive, 1),
    }

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor,
        scale_tril: Tensor,
        amplitude: Tensor | float = 1.0,
        output_scale: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        df = torch.as_tensor(df, dtype=loc.dtype, device=loc.device)
        batch = self._set(loc, scale_tril, amplitude, output_scale, df.shape, validate_args)
        self.df = df.expand(batch)

    def stored_arguments(self) -> dict[str, Tensor]:
        """Constructor arguments, unexpanded."""
        return {"df": self.df, **super().stored_arguments()}

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultiOutputStudentT:
        """Return the law with batch shape ``batch_shape``."""
        arguments = self.stored_arguments()
        arguments["df"] = self.df.expand(torch.Size(batch_shape))
        return MultiOutputStudentT(**arguments, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The location where df > 1, else NaN."""
        return torch.where(self.df[..., None, None] > 1, self.loc, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Marginal variances [*batch, row, output]; infinite, with a warning, where df <= 2."""
        return self.marginal_scale().square() * spread_factor(self.df)[..., None, None]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, row, output]."""
        if self._validate_args:
            self._validate_sample(value)
        count = self.event_shape.numel()
        distance = self._squared_distance(value)
        return student_log_prob(self.df, count, distance, self._half_log_det())

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        scale = inverse_chi(self.df.expand(shape + self.batch_shape), generator)
        return self._loc + scale[..., None, None] * self._noise(shape, generator)


class _SingleOutput(TorchDistribution):
    """A multi-output law with one output, its output dim left out."""

    support = constraints.real_vector
    has_rsample = True
    _one: Any

    def _wrap(self, one: _MultiOutput, validate_args: bool | None) -> None:
        self._one = one
        Distribution.__init__(self, one.batch_shape, one.event_shape[:1], validate_args=False)
        self._validate_args = bool(validate_args)

    def stored_arguments(self) -> dict[str, Tensor]:
        """Constructor arguments, unexpanded."""
        arguments: dict[str, Tensor] = self._one.stored_arguments()
        del arguments["output_scale"]
        return {**arguments, "loc": arguments["loc"].squeeze(-1)}

    @classmethod
    def _from(cls, one: Any) -> Any:
        law = cls.__new__(cls)
        law._wrap(one, False)
        return law

    @property
    def loc(self) -> Tensor:
        """Location [*batch, n]."""
        return self._one.loc.squeeze(-1)

    @property
    def scale_tril(self) -> Tensor:
        """Lower factor [*batch, n, n] of the scale matrix at amplitude 1."""
        return self._one.scale_tril

    @property
    def amplitude(self) -> Tensor:
        """Factor on the scale [*batch]."""
        return self._one.amplitude

    @property
    def mean(self) -> Tensor:
        """Mean [*batch, n]; NaN where it does not exist."""
        return self._one.mean.squeeze(-1)

    @property
    def variance(self) -> Tensor:
        """Marginal variances [*batch, n]; infinite, with a warning, where they do not exist."""
        return self._one.variance.squeeze(-1)

    def marginal_scale(self) -> Tensor:
        """Scale [*batch, n] of each entry."""
        return self._one.marginal_scale().squeeze(-1)

    def _scale_matrix(self) -> Tensor:
        return self.amplitude.square()[..., None, None] * (self.scale_tril @ self.scale_tril.mT)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, n]."""
        if self._validate_args:
            self._validate_sample(value)
        return self._one.log_prob(value.unsqueeze(-1))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, n] from the global stream, differentiably."""
        return self._draw(torch.Size(sample_shape), None)

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return self._one._draw(shape, generator).squeeze(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the law with batch shape ``batch_shape``."""
        return self._from(self._one.expand(batch_shape))

    def select_batch(self, index: Tensor | int) -> Any:
        """Index the leading batch dim."""
        return self._from(self._one.select_batch(index))

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Apply ``change`` to the leading dims of each parameter [*batch, *parameter]."""
        return self._from(self._one.map_batch(change))

    def flatten_batch(self, n: int) -> Any:
        """Merge the first ``n`` batch dims."""
        return self._from(self._one.flatten_batch(n))


class ScaledMultivariateNormal(_SingleOutput):
    """Multivariate normal law whose amplitude is a batch of its own.

    A mixture over the amplitude, ``ScaledMultivariateNormal(loc, scale_tril, sigma)`` with sigma
    [component], holds and solves with one factor.

    Args:
        loc: Mean [*batch, n].
        scale_tril: Lower factor of the covariance at amplitude 1 [*batch, n, n].
        amplitude: Factor > 0 on the standard deviations [*batch].

    Raises:
        ShapeError: the shapes do not match.

    Example:
        >>> import torch
        >>> sigma = torch.tensor([1.0, 3.0])
        >>> ScaledMultivariateNormal(torch.zeros(2), torch.eye(2), sigma).variance
        tensor([[1., 1.],
                [9., 9.]])
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale_tril": _POSITIVE_DIAGONAL,
        "amplitude": constraints.positive,
    }

    def __init__(
        self,
        loc: Tensor,
        scale_tril: Tensor,
        amplitude: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self._wrap(MultiOutputNormal(loc.unsqueeze(-1), scale_tril, amplitude), validate_args)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance [*batch, n, n]."""
        return self._scale_matrix()


class MultivariateStudentT(_SingleOutput):
    """Multivariate Student-t law: one chi-square per draw, shared by all coordinates.

    Args:
        df: Degrees of freedom > 0 [*batch].
        loc: Location [*batch, n].
        scale_tril: Lower factor of the scale matrix at amplitude 1 [*batch, n, n] (the covariance
            is df / (df - 2) times the scale matrix).
        amplitude: Factor > 0 on the scale [*batch].

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
        "scale_tril": _POSITIVE_DIAGONAL,
        "amplitude": constraints.positive,
    }

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor,
        scale_tril: Tensor,
        amplitude: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        one = MultiOutputStudentT(df, loc.unsqueeze(-1), scale_tril, amplitude)
        self._wrap(one, validate_args)

    @property
    def df(self) -> Tensor:
        """Degrees of freedom [*batch]."""
        return self._one.df

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance [*batch, n, n]; infinite, with a NumericsWarning, where df <= 2."""
        return self._scale_matrix() * spread_factor(self.df)[..., None, None]
