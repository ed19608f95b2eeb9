"""Constructor arguments of distributions: indexing and reshaping of batches, and storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pyro.distributions
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from probkit.distributions.multivariate import (
    MultiOutputNormal,
    MultiOutputStudentT,
    MultivariateStudentT,
    ScaledMultivariateNormal,
)
from probkit.distributions.student_t import StudentT
from probkit.errors import CapabilityError, ShapeError
from probkit.files import register

__all__ = ["constructor_arguments", "flatten_batch", "map_batch", "register_storables", "select"]

_D = TypeVar("_D", bound=Distribution)


def constructor_arguments(dist: Distribution) -> dict[str, Tensor]:
    """Return the tensors from which ``type(dist)`` can be built again.

    Each has the shape [*batch, *parameter], the batch dims in full (save for the laws of this
    package that keep constant parameters unexpanded).

    Raises:
        CapabilityError: the class keeps arguments other than its parameters (a base distribution,
            transforms).

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> sorted(constructor_arguments(td.Normal(torch.zeros(2), 1.0)))
        ['loc', 'scale']
    """
    own = getattr(dist, "stored_arguments", None)
    if own is not None:
        return dict(own())
    names = list(dist.arg_constraints)
    if {"probs", "logits"} <= set(names):
        names.remove("probs")
    if isinstance(dist, td.MultivariateNormal):
        # Only one of its three matrices may be given.
        names = ["loc", "scale_tril"]
    found = {name: getattr(dist, name, None) for name in names}
    values = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not names or len(values) < len(names):
        raise CapabilityError(
            f"the parameters of {type(dist).__name__} are not known; use a law that names them in "
            "arg_constraints"
        )
    return {name: _full(dist, name, value) for name, value in values.items()}


def _full(dist: Distribution, name: str, value: Tensor) -> Tensor:
    """Expand a parameter that is stored without all batch dims."""
    try:
        event_dim = dist.arg_constraints[name].event_dim
    except NotImplementedError as error:
        raise CapabilityError(
            f"{type(dist).__name__}.{name} has a shape that depends on other arguments; use a law "
            "whose constraints state theirs"
        ) from error
    return value.expand(dist.batch_shape + value.shape[value.ndim - event_dim :])


def map_batch(dist: _D, change: Callable[[Tensor], Tensor]) -> _D:
    """Rebuild a distribution with ``change`` applied to each parameter [*batch, *parameter].

    ``change`` may touch the leading dims only: index, reshape or permute them.

    Raises:
        CapabilityError: the class cannot be rebuilt from its parameters.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> map_batch(td.Normal(torch.zeros(4), 1.0), lambda value: value[:2]).batch_shape
        torch.Size([2])
    """
    own = getattr(dist, "map_batch", None)
    if own is not None:
        return own(change)
    if isinstance(dist, td.Independent):
        rebuilt: Any = type(dist)(
            map_batch(dist.base_dist, change), dist.reinterpreted_batch_ndims, validate_args=False
        )
        return rebuilt
    arguments: dict[str, Any] = {
        name: change(value) for name, value in constructor_arguments(dist).items()
    }
    return type(dist)(**arguments, validate_args=False)


def select(dist: _D, index: Tensor | int) -> _D:
    """Index the leading batch dim of a distribution.

    Args:
        dist: A distribution with batch shape [k, *batch].
        index: Integers [n], or one integer.

    Returns:
        The distribution with batch shape [n, *batch] (or [*batch] for one integer).

    Raises:
        ShapeError: ``dist`` has no batch dim.
        CapabilityError: its class cannot be rebuilt from its parameters.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> select(td.Normal(torch.arange(3.0), 1.0), torch.tensor([2, 0])).loc.tolist()
        [2.0, 0.0]
    """
    if len(dist.batch_shape) == 0:
        raise ShapeError(f"expected {type(dist).__name__} with batch shape [k, ...], got none")
    own = getattr(dist, "select_batch", None)
    return map_batch(dist, lambda value: value[index]) if own is None else own(index)


def flatten_batch(dist: _D, n: int) -> _D:
    """Merge the first ``n`` batch dims of a distribution into one.

    Raises:
        ShapeError: ``dist`` has fewer than ``n`` batch dims.
        CapabilityError: its class cannot be rebuilt from its parameters.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> flatten_batch(td.Normal(torch.zeros(2, 3, 4), 1.0), 2).batch_shape
        torch.Size([6, 4])
    """
    if len(dist.batch_shape) < n:
        raise ShapeError(
            f"expected {type(dist).__name__} with at least {n} batch dims, "
            f"got batch shape {tuple(dist.batch_shape)}"
        )
    own = getattr(dist, "flatten_batch", None)
    return map_batch(dist, lambda value: value.flatten(0, n - 1)) if own is None else own(n)


_COMMON = (
    *("Normal", "LogNormal", "HalfNormal", "HalfCauchy", "Cauchy", "Laplace", "Gumbel"),
    *("StudentT", "Gamma", "InverseGamma", "Beta", "Exponential", "Weibull", "Pareto"),
    *("Uniform", "Chi2", "Poisson", "Bernoulli", "Categorical", "OneHotCategorical"),
    *("Dirichlet", "MultivariateNormal", "LowRankMultivariateNormal", "VonMises"),
)


def register_storables() -> None:
    """Make the common laws of torch, Pyro and probkit known to :mod:`probkit.files`.

    Calling it again changes nothing.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> from probkit.files import pack, unpack
        >>> register_storables()
        >>> unpack(*pack(td.Normal(torch.tensor(2.0), 1.0))).loc
        tensor(2.)
    """
    for cls in (
        *(StudentT, MultivariateStudentT, ScaledMultivariateNormal),
        *(MultiOutputStudentT, MultiOutputNormal),
    ):
        _register(cls, cls.__name__)
    for name in _COMMON:
        _register(getattr(td, name), f"torch.{name}")
        _register(getattr(pyro.distributions, name), f"pyro.{name}")
    _register_independent(td.Independent, "torch.Independent")
    _register_independent(pyro.distributions.Independent, "pyro.Independent")


def _register_independent(cls: Any, name: str) -> None:
    register(
        cls,
        name,
        lambda dist: {"base": dist.base_dist, "dims": dist.reinterpreted_batch_ndims},
        lambda tree: cls(tree["base"], tree["dims"], validate_args=False),
    )


def _register(cls: type, name: str) -> None:
    register(cls, name, constructor_arguments, lambda tree: cls(**tree, validate_args=False))
