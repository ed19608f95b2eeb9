"""Draws from any distribution with an explicit generator."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import pyro.distributions
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from probkit.distributions._random import inverse_chi, randn_like
from probkit.distributions.multivariate import (
    MultiOutputNormal,
    MultiOutputStudentT,
    MultivariateStudentT,
    ScaledMultivariateNormal,
)
from probkit.rng import scope, stream

__all__ = [
    "sample",
]


def sample(
    dist: Distribution, shape: tuple[int, ...] = (), *, generator: torch.Generator
) -> Tensor:
    """Draw from any distribution with an explicit generator.

    The common laws use torch's sampling functions that accept a generator; all others run inside
    :func:`probkit.rng.scope`, which leaves the global stream as it was. Draws are detached.

    Args:
        dist: A distribution [*batch] with event shape [*event].
        shape: Leading shape of the draws.
        generator: Source of randomness; it advances. If it lives on another device than the
            parameters of a common law, a child stream on that device is spawned from it.

    Returns:
        Draws [*shape, *batch, *event].

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> g = torch.Generator().manual_seed(0)
        >>> sample(td.Normal(torch.zeros(3), 1.0), (5,), generator=g).shape
        torch.Size([5, 3])
    """
    with torch.no_grad():
        draws: Tensor = _draw(dist, torch.Size(shape), generator)
    return draws


def _on(like: Tensor, generator: torch.Generator) -> torch.Generator:
    if like.device.type == generator.device.type:
        return generator
    return stream(generator, "device", device=like.device)


@singledispatch
def _draw(dist: Distribution, shape: torch.Size, generator: torch.Generator) -> Tensor:
    with scope(rng=generator):
        return dist.sample(shape)


@_draw.register
def _(dist: td.Normal, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = randn_like(dist.loc, dist._extended_shape(shape), _on(dist.loc, generator))
    return dist.loc + dist.scale * noise


@_draw.register
def _(dist: td.LogNormal, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = randn_like(dist.loc, dist._extended_shape(shape), _on(dist.loc, generator))
    return (dist.loc + dist.scale * noise).exp()


@_draw.register
def _(dist: td.Gamma, shape: torch.Size, generator: torch.Generator) -> Tensor:
    a = dist.concentration.expand(dist._extended_shape(shape))
    z = torch._standard_gamma(a.contiguous(), generator=_on(a, generator))
    return z.clamp_min(torch.finfo(z.dtype).tiny) / dist.rate


@_draw.register(td.InverseGamma)
@_draw.register(pyro.distributions.InverseGamma)
def _(dist: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    gamma = td.Gamma(dist.concentration, dist.rate, validate_args=False)
    return 1 / _draw(gamma, shape, generator)


@_draw.register
def _(dist: td.StudentT, shape: torch.Size, generator: torch.Generator) -> Tensor:
    full = dist._extended_shape(shape)
    generator = _on(dist.loc, generator)
    noise = randn_like(dist.loc, full, generator)
    return dist.loc + dist.scale * noise * inverse_chi(dist.df.expand(full), generator)


@_draw.register
def _(dist: td.MultivariateNormal, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = randn_like(dist.loc, dist._extended_shape(shape), _on(dist.loc, generator))
    return dist.loc + (dist.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)


@_draw.register(MultiOutputNormal)
@_draw.register(MultiOutputStudentT)
@_draw.register(MultivariateStudentT)
@_draw.register(ScaledMultivariateNormal)
def _(dist: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    draws: Tensor = dist._draw(shape, _on(dist.loc, generator))
    return draws


@_draw.register(td.Independent)
def _(dist: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    draws: Tensor = _draw(dist.base_dist, shape, generator)
    return draws
