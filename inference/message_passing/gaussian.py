"""The inputs of a linear-Gaussian chain in one canonical form, and its single steps.

z_1 ~ N(m_1, P_1), z_(t+1) = A_t z_t + N(0, Q_t), and a factor in u_t = H_t z_t at each step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.inference.message_passing.gaussian_sites import (
    GaussianObservations,
    Sites,
    Weights,
)
from probkit.numerics import check_finite

__all__ = ["GaussianChain", "canonical_gaussian", "symmetric", "times", "update"]

_ENTRIES = ("step", "entry")


class GaussianChain(NamedTuple):
    """Inputs in full shape: every tensor has the batch and the step dimension.

    Attributes:
        initial_mean: m_1 [*batch, S].
        initial_cov: P_1 [*batch, S, S].
        transition: A_t [*batch, T - 1, S, S].
        noise: Q_t [*batch, T - 1, S, S].
        observation: H_t [*batch, T, r, S].
        sites: Factors in u_t, with matrices [*batch, T, r, r].
    """

    initial_mean: Tensor
    initial_cov: Tensor
    transition: Tensor
    noise: Tensor
    observation: Tensor
    sites: Sites


def canonical_gaussian(
    initial_mean: Tensor,
    initial_cov: Tensor,
    transition: Tensor,
    noise: Tensor,
    sites: Sites,
    observation: Tensor | None,
) -> GaussianChain:
    """Check shapes and expand the inputs of a linear-Gaussian chain (without copying).

    Raises:
        ShapeError: the shapes do not fit together, or T is 0.
        DataError: a value is not finite (NaN is allowed in observations), or no float.
    """
    values = sites.values
    if values.ndim < 2 or values.shape[-1] == 0:
        raise ShapeError(f"expected sites with values [*batch, T, r], got {tuple(values.shape)}")
    *batch, steps, r = values.shape
    if steps == 0:
        raise ShapeError(
            f"expected at least one step in the sites [*batch, T, r], got T = 0 in "
            f"{tuple(values.shape)}; drop empty sequences"
        )
    states = initial_mean.shape[-1] if initial_mean.ndim else 0
    square, nothing = (states, states), ()
    if observation is None:
        if r > states:
            raise ShapeError(f"expected r <= S = {states} without observation H, got r = {r}")
        observation = torch.eye(states, dtype=values.dtype, device=values.device)[:r]
    chain = GaussianChain(
        _full(initial_mean, batch, nothing, (states,), "initial_mean [*batch, S]"),
        _full(initial_cov, batch, nothing, square, "initial_cov [*batch, S, S]"),
        _full(transition, batch, (steps - 1,), square, "transition [*batch, (T - 1,) S, S]"),
        _full(noise, batch, (steps - 1,), square, "noise [*batch, (T - 1,) S, S]"),
        _full(observation, batch, (steps,), (r, states), "observation [*batch, (T,) r, S]"),
        sites.with_matrices(
            _full(sites.matrices, batch, (steps,), (r, r), "site matrices [*batch, (T,) r, r]")
        ),
    )
    if isinstance(sites, GaussianObservations):  # NaN is missing
        check_finite(values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), "y", _ENTRIES)
    else:
        check_finite(values, "eta", _ENTRIES)
    for name in GaussianChain._fields[:-1]:
        tensor = getattr(chain, name)
        if tensor.dtype != values.dtype:
            raise DataError(f"expected {name} in {values.dtype} like the sites, got {tensor.dtype}")
        check_finite(tensor, name)
    check_finite(chain.sites.matrices, "site matrices", ("step", "row", "column"))
    return chain


def _full(
    tensor: Tensor, batch: list[int], time: tuple[int, ...], core: tuple[int, ...], name: str
) -> Tensor:
    """Expand to [*batch, *time, *core]; a tensor without time dimension is repeated over it.

    A tensor varies with time when it has all batch dimensions and one more.
    """
    varying = len(time) == 1 and tensor.ndim == len(batch) + 1 + len(core)
    try:
        if tensor.shape[tensor.ndim - len(core) :] != core:
            raise RuntimeError
        if varying:
            if tensor.shape[len(batch)] != time[0]:
                raise RuntimeError
            return tensor.expand(*batch, *time, *core)
        whole = tensor.expand(*batch, *core)
    except RuntimeError as error:
        sizes = ", ".join(str(n) for n in (*batch, *(f"({n})" for n in time), *core))
        raise ShapeError(f"expected {name} = ({sizes}), got {tuple(tensor.shape)}") from error
    return whole.unsqueeze(len(batch)).expand(*batch, *time, *core) if time else whole


def symmetric(M: Tensor) -> Tensor:
    """(M + M') / 2."""
    return (M + M.mT) / 2


def times(M: Tensor, v: Tensor) -> Tensor:
    """Matrix times vector, [..., n, k] and [..., k]."""
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def update(
    mean: Tensor, cov: Tensor, H: Tensor, PH: Tensor, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Condition beliefs N(mean, cov) on factors; the covariance in Joseph's form.

    Args:
        mean: [..., S].
        cov: [..., S, S].
        H: [..., r, S].
        PH: cov H' [..., S, r].
        weights: Of the factors against H cov H'.
    """
    gain = PH @ weights.precision
    moved = mean + times(PH, weights.shift - times(weights.precision, times(H, mean)))
    keep = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device) - gain @ H
    return moved, symmetric(keep @ cov @ keep.mT + PH @ weights.spread @ PH.mT)
