"""Scale-mixture regression on kernel matrices that are never stored.

The likelihood of sigma^2 needs a quadratic form and a log determinant only; predictions need solves
(see :mod:`probkit.kernels.iterative`). Memory grows with the number of rows, not with its square.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probkit.kernels import functional
from probkit.kernels.iterative import NoisyKernel
from probkit.kernels.partition import partitioned
from probkit.kernels.products import product
from probkit.models import scale_mixture as mix

__all__ = ["conditional", "is_beyond", "reduce_rows", "solve"]

_MATRICES = 3  # of n x n: the kernel, its factor, and one in between


def is_beyond(limit: float | None, rows: int, batch: int) -> bool:
    """Whether dense matrices of float64 would take more than ``limit`` bytes.

    Example:
        >>> is_beyond(2**30, 10_000, 1), is_beyond(None, 10_000, 1)
        (True, False)
    """
    return limit is not None and _MATRICES * 8 * rows**2 * max(1, batch) > limit


def reduce_rows(
    model: Any, x: Tensor, residual: Tensor, settings: Any
) -> tuple[mix.SufficientStats, Tensor]:
    """Reduce targets to the statistics of sigma^2, for each set of hyper-parameters.

    Args:
        model: The regression; its ``kernel`` and ``solver`` are used.
        x: Inputs [row, feature].
        residual: Targets less their prior mean, [row, output] or [*batch, row, output].
        settings: Hyper-parameters [*batch].

    Returns:
        Statistics [*batch], with a scale for each output [*batch, output]; and (K + noise)^-1
        residual [*batch, row, output].
    """
    batch = settings.batch_shape
    wide = residual.expand(*batch, *residual.shape[-2:])
    found = [_noisy(model, x, settings, index).reduce(wide[index]) for index in np.ndindex(*batch)]
    quadratic = torch.stack([one.quadratic for one in found]).reshape(*batch, -1)
    log_det = torch.stack([one.log_det.value for one in found]).reshape(batch)
    solution = torch.stack([one.solution for one in found]).reshape(wide.shape)
    if model.scale_per == "output":
        quadratic, log_det = quadratic.unsqueeze(-1), log_det.unsqueeze(-1)
    return mix.SufficientStats(quadratic, log_det, len(x)), solution


def conditional(model: Any, fitted: Any, asked: Any, limit: float) -> mix.Conditional:
    """Condition the process with sigma^2 = 1 on data, as :func:`mix.conditional` does.

    Args:
        model: The regression.
        fitted: The posterior, hyper-parameters [hyper, 1].
        asked: What is to be predicted, rows [1, batch, row, feature].
        limit: Bytes that the kernel between training rows and a chunk of test rows may take.
    """
    settings, x, rows = fitted.settings, fitted.x, asked.x
    found = []
    for hyper in range(settings.batch_shape[0]):
        noisy = _noisy(model, x, settings, (hyper, 0))
        own = {name: value[hyper, 0] for name, value in settings.kernel.items()}
        noise = settings.noise_var[hyper, 0]
        extra = noise if model.noise_in == "scale" and asked.observation else noise.new_zeros(())
        weights = fitted.conditioned.alpha[hyper, 0]
        for at in rows[0]:
            location = product(model.kernel, at, x, weights, params=own)
            scale = _covariance(model, noisy, own, x, at, asked.joint, extra, limit)
            found.append((location, scale))
    shape = (settings.batch_shape[0], rows.shape[1])
    location, scale = (torch.stack(part).unflatten(0, shape) for part in zip(*found, strict=True))
    if asked.joint:
        unit = scale.diagonal(dim1=-2, dim2=-1).mean(-1)
        return mix.Conditional(location, scale, True, unit)
    return mix.Conditional(location, scale, False)


def solve(model: Any, fitted: Any, right: Tensor) -> Tensor:
    """Return (K + noise)^-1 B for right-hand sides [path, row, output], one set of parameters."""
    noisy = _noisy(model, fitted.x, fitted.settings, (0, 0))
    flat = right.movedim(1, 0).reshape(right.shape[1], -1)
    return noisy.solve(flat).reshape(right.shape[1], len(right), -1).movedim(0, 1)


def _noisy(model: Any, x: Tensor, settings: Any, index: tuple[int, ...]) -> NoisyKernel:
    """K + noise for one set of hyper-parameters."""
    own = {name: value[index] for name, value in settings.kernel.items()}
    operator = partitioned(model.kernel, x, params=own or None, devices=model.solver.devices)
    return NoisyKernel(operator, settings.noise_var[index].to(x), model.solver)


def _covariance(
    model: Any,
    noisy: NoisyKernel,
    own: dict[str, Tensor],
    x: Tensor,
    rows: Tensor,
    joint: bool,
    noise: Tensor,
    limit: float,
) -> Tensor:
    """Covariance [row, row] or variances [row], with exact gradients with respect to the rows."""
    size = len(rows) if joint else max(1, math.floor(limit / (4 * 8 * len(x))))
    parts = []
    for chunk in rows.split(size) if len(rows) else (rows,):
        cross = functional.evaluate(model.kernel, x, chunk, params=own or None)
        solved = noisy.solve(cross.detach())
        prior = functional.evaluate(model.kernel, chunk, params=own or None, diag=not joint)
        if joint:
            # the derivative of c' A^-1 c is 2 (A^-1 c)' dc; its value is counted once
            half = cross.mT @ solved
            explained = half + half.mT - (cross.detach().mT @ solved)
            explained = (explained + explained.mT) / 2
            parts.append(prior - explained + noise * torch.eye(len(chunk)).to(prior))
        else:
            explained = (2 * cross * solved - cross.detach() * solved).sum(0)
            # solves leave errors of the size of their tolerance; a variance is never below that
            least = model.solver.tolerance * prior.detach()
            parts.append(torch.maximum(prior - explained, least) + noise)
    return parts[0] if joint else torch.cat(parts)
