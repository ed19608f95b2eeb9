"""Kernels as JSON and tensors: no pickle, no code.

:func:`kernel_config` describes a kernel by the names of known classes and their options, with every
tensor beside it; :func:`kernel_from_config` builds it again, bit by bit the same. Known are the
kernels in :data:`STORABLE` (ours and stock ones of GPyTorch), the constraints of GPyTorch and the
priors in :data:`PRIORS`. Importing this module also makes these kernels storable inside other
objects (:func:`probkit.files.register`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gpytorch import constraints as gpytorch_constraints
from gpytorch import kernels as gpytorch_kernels
from gpytorch import priors as gpytorch_priors
from gpytorch.constraints import Interval
from gpytorch.kernels import Kernel
from gpytorch.priors import Prior
from torch import Tensor, nn

from probkit import files
from probkit.errors import DataError
from probkit.kernels.functional import prior_targets
from probkit.kernels.nngp import NNGPKernel
from probkit.kernels.state_space import Matern, Periodic

__all__ = ["PRIORS", "STORABLE", "kernel_config", "kernel_from_config"]

PRIORS: Mapping[str, tuple[str, ...]] = {
    "GammaPrior": ("concentration", "rate"),
    "HalfCauchyPrior": ("scale",),
    "HalfNormalPrior": ("scale",),
    "LogNormalPrior": ("loc", "scale"),
    "NormalPrior": ("loc", "scale"),
    "UniformPrior": ("low", "high"),
}
"""Priors that can be stored, and their parameters."""

_CONSTRAINTS = ("Positive", "GreaterThan", "LessThan", "Interval")
_ELSEWHERE = "pass the kernel again when loading"


def _common(kernel: Kernel) -> dict[str, Any]:
    columns = kernel.active_dims
    return {
        "batch_shape": list(kernel._batch_shape),
        "active_dims": None if columns is None else columns.tolist(),
    }


def _stationary(kernel: Kernel) -> dict[str, Any]:
    return {**_common(kernel), "ard_num_dims": kernel.ard_num_dims}


def _periodic(kernel: Kernel) -> dict[str, Any]:
    options = _stationary(kernel)
    if options["ard_num_dims"] is None:  # GPyTorch distinguishes None from absent here
        del options["ard_num_dims"]
    return options


def _matern(kernel: Kernel) -> dict[str, Any]:
    return {**_stationary(kernel), "nu": kernel.nu}


def _nngp(kernel: Kernel) -> dict[str, Any]:
    names = ("depth", "activation", "arch", "backend")
    own = {name: getattr(kernel, name) for name in names}
    if kernel.image_shape is not None:
        own |= {"image_shape": list(kernel.image_shape), "pooling": kernel.pooling}
    per_layer = [name for name in ("w_std", "b_std") if getattr(kernel, name).shape[-1] > 1]
    if per_layer:
        own["per_layer"] = per_layer
    return {**_common(kernel), **own, "learn": list(kernel.learn)}


_OPTIONS: Mapping[type[Kernel], Callable[[Kernel], dict[str, Any]]] = {
    NNGPKernel: _nngp,
    gpytorch_kernels.RBFKernel: _stationary,
    gpytorch_kernels.MaternKernel: _matern,
    gpytorch_kernels.RQKernel: _stationary,
    gpytorch_kernels.PeriodicKernel: _periodic,
    gpytorch_kernels.LinearKernel: _stationary,
    gpytorch_kernels.CosineKernel: _common,
    gpytorch_kernels.ScaleKernel: _common,
    gpytorch_kernels.AdditiveKernel: lambda kernel: {},
    gpytorch_kernels.ProductKernel: lambda kernel: {},
    Matern: lambda kernel: {**_common(kernel), "nu": kernel.nu},
    Periodic: lambda kernel: {
        **_common(kernel),
        "period": kernel.period,
        "harmonics": kernel.harmonics,
    },
}

STORABLE: Mapping[str, type[Kernel]] = {cls.__name__: cls for cls in _OPTIONS}
"""Kernels that can be stored, by their name in a file."""


def kernel_config(kernel: Kernel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describe a kernel by names, options and tensors.

    Returns:
        A description that ``json`` can write, and the tensors it needs by name.

    Raises:
        DataError: The kernel, a constraint or a prior is of a class that files do not know; pass
            the kernel again when loading.

    Example:
        >>> config, tensors = kernel_config(gpytorch_kernels.RBFKernel())
        >>> config["class"], tensors["raw_lengthscale"]
        ('RBFKernel', tensor([[0.]]))
        >>> kernel_from_config(config, tensors).lengthscale.shape
        torch.Size([1, 1])
    """
    tensors: dict[str, Tensor] = {}
    first_seen: dict[int, str] = {}
    return _describe(kernel, "", tensors, first_seen), tensors


def kernel_from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Kernel:
    """Build the kernel that :func:`kernel_config` described; values come back exactly.

    Raises:
        DataError: An unknown class, or a tensor that is missing or of another shape.
    """
    return _build(config, "", tensors, {})


# --------------------------------------------------------------------------- describing


def _describe(
    kernel: Kernel, path: str, tensors: dict[str, Tensor], first_seen: dict[int, str]
) -> dict[str, Any]:
    if id(kernel) in first_seen:  # the same kernel in two places
        return {"same_as": first_seen[id(kernel)]}
    first_seen[id(kernel)] = path
    if type(kernel) not in _OPTIONS:
        raise DataError(
            f"cannot store a {type(kernel).__name__}: expected {', '.join(STORABLE)}; {_ELSEWHERE}"
        )
    config: dict[str, Any] = {
        "class": type(kernel).__name__,
        "options": _OPTIONS[type(kernel)](kernel),
    }
    for name, parameter in kernel.named_parameters(recurse=False):
        if first_seen.setdefault(id(parameter), path + name) != path + name:
            raise DataError(
                f"cannot store {path}{name}: it is one parameter with "
                f"{first_seen[id(parameter)]}; {_ELSEWHERE}"
            )
        tensors[path + name] = parameter.detach().clone()
    for name, buffer in kernel.named_buffers(recurse=False):
        if name != "active_dims":
            tensors[path + name] = buffer.detach().clone()
    config["frozen"] = [
        name for name, p in kernel.named_parameters(recurse=False) if not p.requires_grad
    ]
    config["constraints"] = {
        name: _describe_constraint(constraint, f"{path}{name}", tensors)
        for name, constraint in kernel._constraints.items()
    }
    targets = prior_targets(kernel) if kernel._priors else {}
    config["priors"] = {
        name: _describe_prior(kernel._priors[name][0], target, f"{path}{name}", tensors)
        for name, target in targets.items()
    }
    if isinstance(kernel, gpytorch_kernels.ScaleKernel):
        inner = kernel.base_kernel
        config["base_kernel"] = _describe(inner, f"{path}base_kernel.", tensors, first_seen)
    if isinstance(kernel, gpytorch_kernels.AdditiveKernel | gpytorch_kernels.ProductKernel):
        config["kernels"] = [
            _describe(part, f"{path}kernels.{i}.", tensors, first_seen)
            for i, part in enumerate(kernel.kernels)
        ]
    return config


def _describe_constraint(
    constraint: Interval, path: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    name = type(constraint).__name__
    known = name in _CONSTRAINTS and type(constraint) is getattr(gpytorch_constraints, name)
    if not known or not _is_plain(constraint):
        raise DataError(
            f"cannot store constraint {path} ({name}): expected one of {', '.join(_CONSTRAINTS)} "
            f"with its own transform or none; {_ELSEWHERE}"
        )
    tensors[f"{path}.lower_bound"] = constraint.lower_bound.detach().clone()
    tensors[f"{path}.upper_bound"] = constraint.upper_bound.detach().clone()
    return {"class": name, "transform": constraint._transform is not None}


def _is_plain(constraint: Interval) -> bool:
    """Whether the transform is GPyTorch's own for this constraint, or none."""
    transform = constraint._transform
    if transform is None or type(constraint) is Interval:
        return transform in (None, torch.sigmoid)
    # copies of a kernel hold copies of this module
    return type(transform) is nn.Softplus and (transform.beta, transform.threshold) == (1, 20)


def _describe_prior(
    prior: Prior, target: str | None, path: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    kind = type(prior).__name__
    known = kind in PRIORS and type(prior) is getattr(gpytorch_priors, kind, None)
    if not known or target is None or getattr(prior, "_transform", None) is not None:
        raise DataError(
            f"cannot store prior {path} ({kind}): expected one of {', '.join(PRIORS)}, without "
            f"transform, on the value of a hyper-parameter; {_ELSEWHERE}"
        )
    for argument in PRIORS[kind]:
        tensors[f"{path}.{argument}"] = getattr(prior, argument).detach().clone()
    return {"class": kind, "on": target}


# --------------------------------------------------------------------------- building


def _build(
    config: Mapping[str, Any],
    path: str,
    tensors: Mapping[str, Tensor],
    built: dict[str, Kernel],
) -> Kernel:
    if "same_as" in config:
        return built[config["same_as"]]
    name = config["class"]
    if name not in STORABLE:
        raise DataError(
            f"unknown kernel {name!r} in the file: expected {', '.join(STORABLE)}; {_ELSEWHERE}"
        )
    kernel = _construct(STORABLE[name], config, path, tensors, built)
    built[path] = kernel
    for key, constraint in config["constraints"].items():
        rebuilt = _build_constraint(constraint, f"{path}{key}", tensors)
        kernel.register_constraint(key.removesuffix("_constraint"), rebuilt)
    for parameter_name, parameter in list(kernel.named_parameters(recurse=False)):
        value = _take(tensors, path + parameter_name, parameter.shape)
        learned = parameter_name not in config["frozen"]
        kernel._parameters[parameter_name] = torch.nn.Parameter(value, requires_grad=learned)
    for buffer_name, buffer in list(kernel.named_buffers(recurse=False)):
        if buffer_name != "active_dims":
            kernel._buffers[buffer_name] = _take(tensors, path + buffer_name, buffer.shape)
    for key, prior in config["priors"].items():
        _register_prior(kernel, key, prior, path, tensors)
    return kernel


def _construct(
    cls: type[Kernel],
    config: Mapping[str, Any],
    path: str,
    tensors: Mapping[str, Tensor],
    built: dict[str, Kernel],
) -> Kernel:
    if "kernels" in config:
        parts = enumerate(config["kernels"])
        return cls(*(_build(part, f"{path}kernels.{i}.", tensors, built) for i, part in parts))
    options = dict(config["options"])
    options["batch_shape"] = torch.Size(options["batch_shape"])
    if options["active_dims"] is not None:
        options["active_dims"] = torch.tensor(options["active_dims"], dtype=torch.long)
    if "base_kernel" in config:
        base = _build(config["base_kernel"], f"{path}base_kernel.", tensors, built)
        if base.active_dims is not None:
            del options["active_dims"]  # a ScaleKernel takes them from its base kernel
        return cls(base, **options)
    if cls is NNGPKernel:  # any positive start will do: what is learned must not be zero
        options |= {"b_std": 1.0, "last_b_std": 1.0}
        layers = options["depth"] + (options["arch"] == "resnet")
        options |= {name: [1.0] * layers for name in options.pop("per_layer", ())}
    return cls(**options)


def _build_constraint(
    config: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor]
) -> Interval:
    lower, upper = (_take(tensors, f"{path}.{end}_bound") for end in ("lower", "upper"))
    if config["class"] not in _CONSTRAINTS:
        raise DataError(
            f"unknown constraint {config['class']!r} in the file: expected one of "
            f"{', '.join(_CONSTRAINTS)}; {_ELSEWHERE}"
        )
    constraint = _new_constraint(config["class"], config["transform"], lower, upper)
    constraint.lower_bound, constraint.upper_bound = lower, upper  # in the dtype they had
    return constraint


def _new_constraint(name: str, transform: bool, lower: Tensor, upper: Tensor) -> Interval:
    bounds: dict[str, tuple[Tensor, ...]] = {
        "Positive": (),
        "GreaterThan": (lower,),
        "LessThan": (upper,),
        "Interval": (lower, upper),
    }
    cls = getattr(gpytorch_constraints, name)
    return cls(*bounds[name]) if transform else cls(*bounds[name], transform=None)


def _register_prior(
    kernel: Kernel,
    name: str,
    config: Mapping[str, Any],
    path: str,
    tensors: Mapping[str, Tensor],
) -> None:
    if config["class"] not in PRIORS:
        raise DataError(
            f"unknown prior {config['class']!r} in the file: expected one of {', '.join(PRIORS)}; "
            f"{_ELSEWHERE}"
        )
    arguments = [_take(tensors, f"{path}{name}.{key}") for key in PRIORS[config["class"]]]
    prior: Prior = getattr(gpytorch_priors, config["class"])(*arguments)
    target = config["on"]
    if target.startswith("_") or not isinstance(getattr(type(kernel), target, None), property):
        raise DataError(
            f"prior {path}{name} in the file: {type(kernel).__name__} has no value {target!r}; "
            f"{_ELSEWHERE}"
        )
    kernel.register_prior(name, prior, target)


def _take(tensors: Mapping[str, Tensor], name: str, shape: torch.Size | None = None) -> Tensor:
    if name not in tensors:
        raise DataError(f"the file lacks tensor {name!r} of a kernel; {_ELSEWHERE}")
    value = tensors[name].detach().clone()
    if shape is not None and value.shape != shape:
        raise DataError(
            f"tensor {name!r} of a kernel: expected {list(shape)}, got {list(value.shape)}; "
            f"{_ELSEWHERE}"
        )
    return value


# --------------------------------------------------------------------------- inside other objects


def _to_tree(kernel: Kernel) -> dict[str, Any]:
    config, tensors = kernel_config(kernel)
    return {"config": config, "tensors": tensors}


def _from_tree(tree: Mapping[str, Any]) -> Kernel:
    return kernel_from_config(tree["config"], tree["tensors"])


for _name, _cls in STORABLE.items():
    files.register(_cls, _name if _cls is NNGPKernel else f"gpytorch.{_name}", _to_tree, _from_tree)
