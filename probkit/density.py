"""Batched log joints for samplers, whatever a model offers: one point, or leading dims."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError, NumericsWarning, ShapeError
from probkit.model import Site, Values
from probkit.rng import scope

__all__ = ["check_log_joint", "initial_values", "log_joint_of", "site_dtype"]


def log_joint_of(model: Any, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
    """Evaluate the log joint at values with ONE leading dim: [n, *site] -> [n].

    A model that declares ``batched = True`` is called once with the leading dim; any other model
    is mapped by ``torch.func.vmap``, or called point by point where vmap refuses it (it branches on
    values, or holds an autograd function without a vmap rule). Argument validation of distributions
    is off inside, because it branches on data, which vmap refuses; see :func:`check_log_joint`.

    Args:
        model: A HasLogJoint model.
        values: Site name -> [n, *site], at least one site.
        data: The data, or one batch of it.
        scale: Weight of the terms of the minibatched plate.
    """
    with scope(validate=False):
        if getattr(model, "batched", False):
            result: Tensor = model.log_joint(values, data, scale=scale)
        else:
            result = _map(model, lambda point: model.log_joint(point, data, scale=scale), values)
    return result


#: Models that vmap has refused, by id.
_REFUSED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _map(model: Any, one_point: Callable[[Values], Tensor], values: Values) -> Tensor:
    """Map a function over points [n, *site]."""
    if _REFUSED.get(id(model)) is not model:
        try:
            mapped: Tensor = torch.func.vmap(one_point)(dict(values))
            return mapped
        except RuntimeError as error:
            # Anything else that torch raises is a fault of the model, and says so itself.
            if not any(word in str(error) for word in ("vmap", "functorch")):
                raise
            reason = str(error)
        _REFUSED[id(model)] = model
        warnings.warn(
            f"log_joint of {type(model).__name__} cannot be mapped over points, which are now "
            f"evaluated one after another, slowly ({reason.splitlines()[0][:160]})",
            NumericsWarning,
            stacklevel=4,
        )
    n = len(next(iter(values.values())))
    return torch.stack([one_point({k: v[i] for k, v in values.items()}) for i in range(n)])


def check_log_joint(model: Any, values: Values, data: Any, *, scale: float = 1.0) -> None:
    """Check the log joint at the first of ``values`` [n, *site], argument validation on.

    Raises:
        ShapeError: The log joint of one point is not a scalar, or a model that declares
            ``batched = True`` gives another value among two points than alone.
        DataError: The log joint is NaN or plus infinity there.
    """
    first = {name: value[0] for name, value in values.items()}
    with torch.no_grad():
        single = model.log_joint(first, data, scale=scale)
    name = type(model).__name__
    if single.shape != ():
        raise ShapeError(
            f"log_joint of {name}: expected a scalar for one point, got shape "
            f"{tuple(single.shape)}; sum over all dims"
        )
    if bool(torch.isnan(single)) or bool(torch.isposinf(single)):
        raise DataError(
            f"log_joint of {name} is {float(single)} at the starting point; look at the data and "
            f"at the sites {', '.join(first) or '(none)'}"
        )
    if getattr(model, "batched", False):
        _check_batched(model, values, data, single, scale)


def _check_batched(model: Any, example: Values, data: Any, single: Tensor, scale: float) -> None:
    """Evaluate two points together; the first must repeat its own value."""
    pair = {name: torch.stack([value[0], value[-1]]) for name, value in example.items()}
    with torch.no_grad(), scope(validate=False):
        both = model.log_joint(pair, data, scale=scale)
    if both.shape != (2,):
        raise ShapeError(
            f"{type(model).__name__} declares batched = True: expected log_joint [2] for two "
            f"points, got {tuple(both.shape)}; carry leading dims through, or drop the declaration"
        )
    tolerance = 1e-4 if single.dtype == torch.float32 else 1e-8
    if not torch.allclose(both[0], single, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ShapeError(
            f"{type(model).__name__} declares batched = True, but log_joint of a point depends on "
            f"its neighbours ({float(both[0])} among two, {float(single)} alone)"
        )


def site_dtype(data: Any) -> torch.dtype:
    """Return the dtype for site values: that of the widest real tensor in data, or float64.

    Complex tensors count by the precision of their parts; a data container by its ``dtype``.
    """
    from probkit.tree import leaves

    dtypes = [getattr(leaf, "dtype", None) for leaf in leaves(data)]
    real = [
        dtype.to_real()
        for dtype in dtypes
        if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
    ]
    return functools.reduce(torch.promote_types, real) if real else torch.float64


def initial_values(
    model: Any,
    data: Any,
    sites: Mapping[str, Site],
    n: int,
    *,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Choose ``n`` starting points [n, *site].

    The model's own ``initial_values(data, n, rng=)`` where it has one, else uniform on [-2, 2] in
    the unconstrained space (the convention of Stan), but for the sites that the model's
    ``initial_points(data)`` names, such as ``pyro.param`` with its starting value.
    """
    own = getattr(model, "initial_values", None)
    if callable(own):
        return dict(own(data, n, rng=rng))
    from probkit.unconstrained import Unconstrained

    free = Unconstrained(sites)
    uniform = torch.rand(n, free.size, generator=rng, dtype=site_dtype(data), device=rng.device)
    values = free.values(4.0 * uniform - 2.0)
    points = getattr(model, "initial_points", None)
    for name, point in (points(data) if callable(points) else {}).items():
        values[name] = point.to(values[name]).expand_as(values[name]).clone()
    return values
