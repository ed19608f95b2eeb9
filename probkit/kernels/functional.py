"""Any GPyTorch kernel as a pure function of its hyper-parameters.

GPyTorch keeps hyper-parameters inside kernel objects, in raw form, and evaluates lazily. Here a
kernel object is only a description: :func:`hyperparameters` lists what can be set, and
:func:`evaluate` computes the dense matrix for given values, one matrix for each draw,
differentiable in the values, without touching the object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    MaternKernel,
    ProductKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.module import Module
from torch import Tensor, nn
from torch.distributions import constraints

from probkit.errors import DataError, ShapeError
from probkit.kernels.inputs import check_inputs

__all__ = ["Hyper", "bind", "dense", "evaluate", "hyperparameters", "prior_targets"]


@dataclass(frozen=True)
class Hyper:
    """One hyper-parameter of a kernel.

    Attributes:
        name: Dotted name of the constrained value, such as ``"base_kernel.lengthscale"``.
        value: Its value, constrained and detached [*shape].
        shape: The kernel's batch dims, then what is left of the parameter without the dims of size
            one that GPyTorch keeps for broadcasting: () for a scalar, (d,) for one value a column.
        support: Where the value lives, as a constraint of ``torch.distributions``.
        prior: The GPyTorch prior on the value, or None.
        raw_name: Name of the raw parameter in ``kernel.named_parameters()``.
        fixed: Whether the raw parameter has ``requires_grad=False``.
    """

    name: str
    value: Tensor
    shape: torch.Size
    support: constraints.Constraint
    prior: Any
    raw_name: str
    fixed: bool


def hyperparameters(kernel: Kernel) -> Mapping[str, Hyper]:
    """List the hyper-parameters of a kernel and of all kernels inside it.

    A parameter that appears in several places is listed once, under its first name.

    Raises:
        DataError: A prior is on some transformation of a parameter, not on its value.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> found = hyperparameters(ScaleKernel(RBFKernel(ard_num_dims=2)))
        >>> {name: tuple(hyper.shape) for name, hyper in found.items()}
        {'outputscale': (), 'base_kernel.lengthscale': (2,)}
    """
    slots = _slots(kernel)
    priors = _priors(kernel)
    return {slot.name: slot.describe(priors.get(slot.name)) for slot in slots}


def evaluate(
    kernel: Kernel,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    diag: bool = False,
) -> Tensor:
    """Compute a kernel matrix, dense, with hyper-parameters given from outside.

    Sums, products and scalings are formed from dense matrices, exactly; other kernels are asked for
    theirs. Values enter as they are: no round trip through the raw parameters, so a value on the
    boundary of its support is used exactly. Second derivatives are right where there are any; a
    Matern kernel with several lengthscales, periodic and cosine kernels raise PyTorch's error that
    ``torch.cdist`` has none.

    Args:
        kernel: Any GPyTorch kernel; it is not changed.
        x1: Inputs [*batch, n, d].
        x2: Inputs [*batch, m, d]; None for ``x1``.
        params: Constrained values by name, as in :func:`hyperparameters`. Each is
            [*draws, *shape] with the shape listed there; the leading ``draws`` are broadcast. A
            hyper-parameter left out keeps the value of the kernel, and its gradient.
        diag: Only row i of ``x1`` with row i of ``x2``.

    Returns:
        [*draws, *kernel batch, n, m], or without m for ``diag``; batch dims of the inputs are
        broadcast against the leading dims.

    Raises:
        DataError: An unknown name; the message lists the known ones. Inputs of an unfit dtype.
        ShapeError: A value that does not end in the shape of its hyper-parameter; inputs that do
            not fit each other.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> lengthscale = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> evaluate(RBFKernel(), x, params={"lengthscale": lengthscale})[:, 0, 1]
        tensor([0.6065, 0.8825], dtype=torch.float64)
    """
    x1 = x1 if x1.ndim > 1 else x1.unsqueeze(-1)
    if x2 is None:
        x2 = x1
    elif x2.ndim == 1:
        x2 = x2.unsqueeze(-1)
    check_inputs(x1, x2)
    bound, lead = bind(kernel, params or {})
    K = dense(bound, x1, x2, diag)
    batch = np.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], (*lead, *_batch_shape(kernel)))
    matrix = K.shape[-1:] if diag else K.shape[-2:]
    return K.expand(*batch, *matrix)


# --------------------------------------------------------------------------- hyper-parameters


@dataclass(frozen=True)
class _Slot:
    """A raw parameter and where it sits."""

    name: str
    raw_name: str
    module: Module
    attribute: str
    parameter: nn.Parameter

    @property
    def constraint(self) -> Interval | None:
        return self.module._constraints.get(f"{self.attribute}_constraint")

    @property
    def batch_shape(self) -> torch.Size:
        if not isinstance(self.module, Kernel):
            return torch.Size([])
        # a ScaleKernel built without a batch shape takes that of its base kernel
        whole = torch.Size(_batch_shape(self.module))
        return whole if self.parameter.shape[: len(whole)] == whole else self.module._batch_shape

    @property
    def core(self) -> torch.Size:
        """Dims of the raw parameter after the batch dims."""
        return self.parameter.shape[len(self.batch_shape) :]

    @property
    def shape(self) -> torch.Size:
        """Dims of the value as users see it: no broadcasting dims of size one."""
        return torch.Size([*self.batch_shape, *(size for size in self.core if size != 1)])

    def value(self) -> Tensor:
        raw, constraint = self.parameter.detach(), self.constraint
        return raw if constraint is None else constraint.transform(raw)

    def describe(self, prior: Any) -> Hyper:
        return Hyper(
            name=self.name,
            value=self.value().reshape(self.shape).clone(),
            shape=self.shape,
            support=_support(self.constraint),
            prior=prior,
            raw_name=self.raw_name,
            fixed=not self.parameter.requires_grad,
        )


def _slots(kernel: Kernel) -> list[_Slot]:
    found = []
    for raw_name, parameter in kernel.named_parameters():
        path, _, attribute = raw_name.rpartition(".")
        name = f"{path}.{attribute.removeprefix('raw_')}".removeprefix(".")
        module = kernel.get_submodule(path)
        found.append(_Slot(name, raw_name, cast(Module, module), attribute, parameter))
    return found


def _priors(kernel: Kernel) -> dict[str, Any]:
    """Priors by the name of the value that they are on."""
    found = {}
    for path, module in kernel.named_modules():
        if not isinstance(module, Kernel) or not module._priors:
            continue
        for name, target in prior_targets(module).items():
            if target is None:
                raise DataError(
                    f"prior {name!r}: expected a prior on the value of one hyper-parameter, "
                    "got one on a function of it; register it on the value"
                )
            found[f"{path}.{target}".removeprefix(".")] = module._priors[name][0]
    return found


def prior_targets(kernel: Kernel) -> dict[str, str | None]:
    """Say which value each prior of this very kernel is on; None for a function of values."""
    slots = [slot for slot in _slots(kernel) if slot.module is kernel]
    # in this copy, a property that returns a value returns this very tensor
    values = {slot.name: slot.value().reshape(slot.shape) for slot in slots}
    bound, _ = bind(kernel, values)
    found: dict[str, str | None] = {}
    for name, (_, closure, _) in kernel._priors.items():
        on = closure(bound)
        names = [slot.name for slot in slots if vars(bound)[slot.attribute] is on]
        found[name] = names[0] if names else None
    return found


def _support(constraint: Interval | None) -> constraints.Constraint:
    """The set that a GPyTorch constraint keeps a value in."""
    if constraint is None:
        return constraints.real
    if isinstance(constraint, Positive):
        return constraints.positive
    lower, upper = (_number(bound) for bound in (constraint.lower_bound, constraint.upper_bound))
    if isinstance(constraint, GreaterThan):
        return constraints.greater_than(lower)
    if isinstance(constraint, LessThan):
        return constraints.less_than(upper)
    return constraints.interval(lower, upper)


def _number(bound: Tensor) -> float | Tensor:
    return bound.item() if bound.numel() == 1 else bound


# --------------------------------------------------------------------------- binding values


def bind(kernel: Kernel, params: Mapping[str, Tensor]) -> tuple[Kernel, tuple[int, ...]]:
    """Copy of the kernel's module tree with ``params`` in place, and the draws' dims."""
    slots = {slot.name: slot for slot in _slots(kernel)}
    for name in params:
        if name not in slots:
            raise DataError(
                f"unknown hyper-parameter {name!r}: expected one of {', '.join(slots) or 'none'}"
            )
    lead = np.broadcast_shapes(
        *(_draws(slots[name], torch.as_tensor(value)) for name, value in params.items())
    )
    total = len(_batch_shape(kernel))
    replaced: dict[int, tuple[Tensor, bool]] = {}
    for slot in slots.values():
        own = slot.batch_shape
        # draws stand before all batch dims, also those that only other parts of the kernel have
        middle = (1,) * (total - len(own)) if lead else ()
        if slot.name in params:
            value = torch.as_tensor(params[slot.name])
            draws = value.shape[: value.ndim - len(slot.shape)]
            value = value.reshape((*draws, *middle, *own, *slot.core))
        else:
            value = slot.parameter
        if lead:
            value = value.expand((*lead, *middle, *own, *slot.core))
        replaced[id(slot.parameter)] = value, slot.name in params
    return _copy(kernel, replaced, lead, total, {}), lead


def _draws(slot: _Slot, value: Tensor) -> tuple[int, ...]:
    """Leading dims of a value, after a check of the others."""
    shape = slot.shape
    if value.ndim < len(shape) or value.shape[value.ndim - len(shape) :] != shape:
        raise ShapeError(
            f"{slot.name}: expected [*draws, *shape] with shape {list(shape)}, "
            f"got {list(value.shape)}"
        )
    return tuple(value.shape[: value.ndim - len(shape)])


def _copy(
    module: nn.Module,
    replaced: Mapping[int, tuple[Tensor, bool]],
    lead: tuple[int, ...],
    total: int,
    seen: dict[int, nn.Module],
) -> Any:
    """Copy a module tree without copying tensors, parameters replaced by values."""
    if id(module) in seen:
        return seen[id(module)]
    new = module.__class__.__new__(module.__class__)
    seen[id(module)] = new
    state = dict(vars(module))
    state["_buffers"] = dict(module._buffers)
    state["_modules"] = {
        name: None if child is None else _copy(child, replaced, lead, total, seen)
        for name, child in module._modules.items()
    }
    state["_parameters"] = {}
    if isinstance(module, Module):
        state["_constraints"] = {name: state["_modules"][name] for name in module._constraints}
    vars(new).update(state)
    for name, parameter in module._parameters.items():
        # plain attributes instead of parameters, so that the graph of the values is kept
        value, given = (None, False) if parameter is None else replaced[id(parameter)]
        vars(new)[name] = _as_raw(new, name, value) if given and value is not None else value
    if lead and isinstance(module, Kernel):
        own = module._batch_shape
        vars(new)["_batch_shape"] = torch.Size([*lead, *(1,) * (total - len(own)), *own])
    return new


def _as_raw(module: Any, name: str, value: Tensor) -> Tensor:
    """Raw tensor whose transform is ``value``: the value itself, where transforms can be off."""
    key = f"{name}_constraint"
    if key not in getattr(module, "_constraints", {}):
        return value
    # its own copy, since one constraint may stand for several parameters
    constraint = _copy(module._constraints[key], {}, (), 0, {})
    home = constraint._modules if "_transform" in constraint._modules else vars(constraint)
    home["_transform"] = None
    if constraint.transform(value) is not value:
        return module._constraints[key].inverse_transform(value)
    module._constraints[key] = module._modules[key] = constraint
    return value


# --------------------------------------------------------------------------- evaluation


def _batch_shape(kernel: Kernel) -> tuple[int, ...]:
    """Batch shape of a kernel and of all kernels inside it."""
    shapes = [m._batch_shape for m in kernel.modules() if isinstance(m, Kernel)]
    return np.broadcast_shapes(*shapes)


def dense(kernel: Kernel, x1: Tensor, x2: Tensor, diag: bool, *, select: bool = True) -> Tensor:
    """Dense matrix of a kernel whose parameters are in place."""
    if select and kernel.active_dims is not None:
        same = x1 is x2
        x1 = x1.index_select(-1, kernel.active_dims)
        x2 = x1 if same else x2.index_select(-1, kernel.active_dims)
    if type(kernel) is AdditiveKernel:
        total = dense(kernel.kernels[0], x1, x2, diag)
        for part in kernel.kernels[1:]:
            total = total + dense(part, x1, x2, diag)
        return total
    if type(kernel) is ProductKernel:
        product = dense(kernel.kernels[0], x1, x2, diag)
        for part in kernel.kernels[1:]:
            product = product * dense(part, x1, x2, diag)
        return product
    if type(kernel) is ScaleKernel:
        # it has taken over the columns of its base kernel
        base = dense(kernel.base_kernel, x1, x2, diag, select=False)
        scale = kernel.outputscale
        return base * (scale[..., None] if diag else scale[..., None, None])
    if kernel.ard_num_dims is not None and kernel.ard_num_dims != x1.shape[-1]:
        raise ShapeError(
            f"{type(kernel).__name__}: expected x [*batch, n, d] with d = ard_num_dims = "
            f"{kernel.ard_num_dims}, got d = {x1.shape[-1]}"
        )
    if type(kernel) in (RBFKernel, MaternKernel) and not diag:
        if kernel.lengthscale.shape[-1] == 1 and not (x1.requires_grad or x2.requires_grad):
            return _isotropic(kernel, x1, x2)
    if any(module is not kernel and isinstance(module, Kernel) for module in kernel.modules()):
        vars(kernel)["_buffers"]["active_dims"] = None  # a copy; chosen above
        K = kernel(x1, x2, diag=diag)
    else:
        K = kernel.forward(x1, x2, diag=diag)
    return K if isinstance(K, Tensor) else K.to_dense()


def _isotropic(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    """RBF or Matern kernel of distances that all draws share.

    The covariance functions that GPyTorch uses here have no second derivative (it comes out as
    zero, silently); these have.
    """
    squared = kernel.covar_dist(x1, x2, square_dist=True)
    if type(kernel) is RBFKernel:
        return torch.exp(squared / (-2 * kernel.lengthscale**2))
    r = squared.sqrt() * (math.sqrt(2 * kernel.nu) / kernel.lengthscale)
    if kernel.nu == 0.5:
        return torch.exp(-r)
    if kernel.nu == 1.5:
        return (1 + r) * torch.exp(-r)
    return (1 + r + r * r / 3) * torch.exp(-r)
