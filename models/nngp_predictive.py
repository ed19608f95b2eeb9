"""From the law of standardised rows to the predictive that users see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit import distributions as D
from probkit.models.standardise import Scaling
from probkit.predictive import Analytic, Mixture, Predictive

__all__ = ["Part", "as_predictive", "assemble", "rescaled", "shifted"]


@dataclass(frozen=True)
class Part:
    """The law of some rows, or of one output, that share a scale.

    Attributes:
        dist: A law over [(node,) hyper, batch, *obs].
        log_weights: Log weights [node, hyper, 1] of the quadrature nodes; None where there are
            none.
        positions: Which rows (or which output) they are [k].
    """

    dist: Distribution
    log_weights: Tensor | None
    positions: Tensor


def shifted(dist: Distribution, mean: Tensor | None, *, wide: bool) -> Distribution:
    """Add a prior mean [hyper, batch, row] to the locations of a law.

    Args:
        dist: Law over [(node,) hyper, batch, row] or, if ``wide``, [..., row, output].
        mean: The mean; None for zero.
        wide: Whether there is an output dim.
    """
    if mean is None:
        return dist
    given: dict[str, Any] = dict(D.constructor_arguments(dist))
    given["loc"] = given["loc"] + (mean.unsqueeze(-1) if wide else mean)
    rebuilt: Distribution = type(dist)(**given, validate_args=False)
    return rebuilt


def rescaled(dist: Distribution, scaling: Scaling) -> Distribution:
    """Map a predictive of standardised targets back to their original scale."""
    mean, sd = scaling.y_mean, scaling.y_sd
    if bool((sd == 1).all()) and bool((mean == 0).all()):
        return dist
    if isinstance(dist, D.StudentT):
        return D.StudentT(dist.df, dist.loc * sd + mean, dist.scale * sd, validate_args=False)
    if isinstance(dist, torch.distributions.Normal):
        return type(dist)(dist.loc * sd + mean, dist.scale * sd, validate_args=False)
    given = dict(dist.stored_arguments())  # type: ignore[attr-defined]
    given["loc"] = given["loc"] * sd + mean
    if sd.ndim == 0:
        given["amplitude"] = given["amplitude"] * sd
    else:
        given["output_scale"] = given["output_scale"] * sd
    rebuilt: Distribution = type(dist)(**given, validate_args=False)
    return rebuilt


def as_predictive(
    dist: Distribution,
    node_weights: Tensor | None,
    hyper_weights: Tensor | None,
    lead: torch.Size,
) -> Predictive:
    """Turn a law over [(node,) hyper, batch, *obs] into a predictive over [*lead, *obs].

    Components are the hyper-parameter draws, times the quadrature nodes where there are any.
    """
    hyper, size = dist.batch_shape[:2] if node_weights is None else dist.batch_shape[1:3]
    weights = torch.zeros(hyper, dtype=torch.float64) if hyper_weights is None else hyper_weights
    if node_weights is not None:
        weights = weights.to(node_weights) + node_weights.expand(-1, hyper, size)[..., 0]
        weights = weights.flatten()
        dist = D.flatten_batch(dist, 2)
    if len(weights) == 1:
        return Analytic(D.map_batch(dist, lambda v: v.reshape(lead + v.shape[2:])))
    dist = D.map_batch(dist, lambda v: v.reshape(v.shape[:1] + lead + v.shape[2:]))
    return Mixture(dist, weights)


def assemble(
    parts: Sequence[Part],
    hyper_weights: Tensor | None,
    lead: torch.Size,
    *,
    axis: int,
    stacked: bool,
) -> Predictive:
    """Join independent parts into one predictive over [*lead, *obs].

    Parts are independent given the hyper-parameters, of which each draw is one component; the
    nodes of a part are mixed inside it.

    Args:
        parts: Their positions are together 0, 1, ....
        hyper_weights: Log weights [hyper]; None for equal ones.
        lead: Batch dims of the inputs.
        axis: Dim of the rows or outputs that the positions count, from the end.
        stacked: Whether that dim is new: one part an output.
    """
    if len(parts) == 1 and not stacked:
        return as_predictive(parts[0].dist, parts[0].log_weights, hyper_weights, lead)
    hyper = max(part.dist.batch_shape[0 if part.log_weights is None else 1] for part in parts)
    single = hyper == 1
    laws = [_law_of(part, lead, single=single) for part in parts]
    whole = D.IndependentBlocks(laws, [p.positions for p in parts], axis=axis, stacked=stacked)
    if single:
        return Analytic(whole)
    weights = torch.zeros(hyper, dtype=torch.float64) if hyper_weights is None else hyper_weights
    return Mixture(whole, weights)


def _law_of(part: Part, lead: torch.Size, *, single: bool) -> Distribution:
    """Bring one part to [(hyper,) *lead, *obs], its nodes mixed."""
    weights = part.log_weights
    if weights is None:
        return D.map_batch(
            part.dist, lambda v: v.reshape((() if single else v.shape[:1]) + lead + v.shape[2:])
        )
    kept = 1 if single else 2
    components = D.map_batch(
        part.dist, lambda v: v.reshape(v.shape[:1] + v.shape[1:kept] + lead + v.shape[3:])
    )
    missing = len(components.batch_shape) - kept
    weights = weights.reshape(len(weights), -1)  # [node, hyper]
    weights = weights.reshape((len(weights), *weights.shape[1:kept], *(1,) * missing))
    return D.FiniteMixture(components, weights)
