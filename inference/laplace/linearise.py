"""Predictions of a network linearised in its weights: a Gaussian process around the mode.

f(x) ~ N(f_mode(x), J(x) Sigma J(x)'), Immer, Korzepa and Bauer (2021), "Improving predictions of
Bayesian neural nets via local linearization", eq. 9; exact for a model that is linear in its
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.guide import Params
from probkit.inference.laplace.guide import LaplaceNormal
from probkit.inference.laplace.layers import Factor, jacobian_factors, row_chunks
from probkit.numerics import check_allocation

__all__ = ["Linearised", "linearise"]

_CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class Linearised:
    """Outputs at some rows, jointly normal, in the network's units.

    Attributes:
        mean: [*lead, row, output].
        covariance: [*lead, row, output, output] of each row with itself; or, when joint,
            [*lead, row * output, row * output], outputs running fastest.
    """

    mean: Tensor
    covariance: Tensor


def linearise(
    guide: LaplaceNormal, params: Params, model: Any, data: Any, x: Tensor, *, joint: bool
) -> Linearised:
    """Linearise a network around the mode of its Laplace approximation.

    Args:
        guide: The guide of a Laplace posterior.
        params: Its parameters, one chain.
        model: The network.
        data: The data it was fitted to (for the shapes of the sites).
        x: Inputs [*lead, row, feature] in the network's units; results are differentiable in them.
        joint: Whether to return the covariance between the rows of each leading element.

    Raises:
        DataError: The covariance between that many rows cannot fit.
    """
    values = guide.centre(params, model, data)
    covariance = params["covariance"]
    flat = x.reshape(-1, x.shape[-1])
    outputs = values[model.layer_names()[-1][1]].shape[-1]
    if joint:
        size = x.shape[-2] * outputs
        root_bytes = x.element_size() * size * len(params["loc"])
        check_allocation(
            2 * root_bytes,
            f"a joint prediction of {x.shape[-2]} rows with {len(params['loc'])} weights "
            "(joint=False needs less)",
            device=x.device,
        )
        mean, factors = jacobian_factors(model, values, flat)
        sets = x.shape[:-2].numel()
        part = max(1, _CHUNK_BYTES // max(1, root_bytes))
        done = [
            _joint(covariance, factors, slice(i * x.shape[-2], (i + part) * x.shape[-2]), size)
            for i in range(0, sets, part)
        ]
        result = torch.cat(done).reshape(*x.shape[:-2], size, size)
    else:
        means, rows = [], []
        width = sum(sum(values[weight].shape) for weight, _ in model.layer_names())
        for chunk in row_chunks(len(flat), x.element_size() * outputs * width):
            f, factors = jacobian_factors(model, values, flat[chunk])
            means.append(f)
            rows.append(covariance.row_covariance(factors))
        mean = torch.cat(means)
        result = torch.cat(rows).reshape(*x.shape[:-1], outputs, outputs)
    return Linearised(mean.reshape(*x.shape[:-1], outputs), result)


def _joint(covariance: Any, factors: Sequence[Factor], rows: slice, size: int) -> Tensor:
    """Return the covariances [set, size, size] of consecutive sets of rows."""
    root = covariance.project([Factor(f.inputs[rows], f.slopes[rows]) for f in factors])
    root = root.reshape(-1, size, root.shape[-1])
    covariances: Tensor = root @ root.mT
    return covariances
