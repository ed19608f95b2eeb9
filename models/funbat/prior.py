"""The model as a Pyro program, so that any sampler of densities can check message passing.

The program draws each factor at the distinct coordinates of its mode through a dense Cholesky
factor of their covariance, which costs T^3: it is for small data and for composing with other Pyro
code, where message passing is for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probkit.errors import CapabilityError
from probkit.kernels.state_space import StateSpace
from probkit.models.funbat.counts import unit_softplus
from probkit.models.funbat.likelihoods import BernoulliNoise, PoissonNoise
from probkit.models.funbat.model import FunBaT
from probkit.models.funbat.noise import GaussianNoise, StudentTNoise
from probkit.numerics import safe_cholesky

__all__ = ["factor_prior", "multilinear", "funbat_program"]


def factor_prior(model: FunBaT, data: Any, mode: int) -> dist.MultivariateNormal:
    """The prior of one mode's factor, as a Pyro law.

    Args:
        model: The model; its kernels' own length scales and variances are taken.
        data: ``TensorData``, or a pair (index, y).
        mode: Number of the mode.

    Returns:
        A law with batch shape [component], the components that vary, and event shape [point], the
        distinct coordinates of the mode.

    Example:
        >>> law = factor_prior(FunBaT(2, kind="cp"), ([[0.0, 0.5], [1.0, 0.5]], [1.0, 2.0]), 0)
        >>> law.batch_shape, law.event_shape
        (torch.Size([2]), torch.Size([2]))
    """
    whole = model.prepare(data)
    layout = model.layout(whole, {"frame": model._frame(whole)})
    points = layout.grids[mode].points
    covariance = state_space_covariance(layout.spaces[mode], points)
    root, _ = safe_cholesky(covariance)
    components = int(layout.free[mode].sum())
    law = dist.MultivariateNormal(points.new_zeros(len(points)), scale_tril=root)
    return law.expand((components,))


def state_space_covariance(space: StateSpace, points: Tensor) -> Tensor:
    """Covariance [point, point] of a kernel from its state-space form, H A(|d|) P H'."""
    hyper = space.log_hyper.to(points)
    gaps, place = (points.unsqueeze(-1) - points).abs().unique(return_inverse=True)
    A, _ = space.dynamics(gaps, hyper)
    row = space.observation().to(points)
    values = torch.einsum("i,gij,jk,k->g", row, A, space.stationary(hyper), row)
    return values[place]


def multilinear(
    factors: Sequence[Tensor], rows: Tensor, free: Sequence[Tensor], core: Tensor | None
) -> Tensor:
    """Evaluate f [*batch, entry] at grid positions.

    Args:
        factors: Of each mode [*batch, point, component], the components that vary.
        rows: Position of each entry on each grid [entry, mode].
        free: Of each mode, which components vary [r]; the others are one.
        core: [*batch, r_1, ..., r_K]; None for CP.
    """
    parts = []
    for k, (u, varies) in enumerate(zip(factors, free, strict=True)):
        seen = u[..., rows[:, k], :]
        parts.append(seen if bool(varies.all()) else _fill(seen, varies))
    if core is None:
        product = parts[0]
        for part in parts[1:]:
            product = product * part
        return product.sum(-1)
    value = core.unsqueeze(-len(parts) - 1)  # [*batch, 1, r_1, ..., r_K]
    for part in parts:
        shape = (*part.shape, *[1] * (value.ndim - part.ndim))
        value = (value * part.reshape(shape)).sum(part.ndim - 1)
    return value


def _fill(seen: Tensor, varies: Tensor) -> Tensor:
    """Ones [*, r], with the components that vary put in."""
    place = (varies.long().cumsum(0) - 1).clamp_min(0)
    return torch.where(varies, seen[..., place], torch.ones_like(seen[..., :1]))


def funbat_program(model: FunBaT, data: Any) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """Write the model as a Pyro program with standard normal latents.

    Length scales and variances are those of the model's kernels (message passing keeps them with
    ``learn_hyperparameters=False``). Sites: ``white_1``, ... [component, point], standard normal,
    from which the deterministic ``factor_1``, ... follow; ``core``; ``noise_precision`` where the
    noise has one; the deterministic ``f`` and the observed ``y``, both in the units of the data.

    Args:
        model: The model, without a warp.
        data: ``TensorData``, or a pair (index, y).

    Returns:
        The program, ``program(rows, y=None)`` with ``rows`` [entry, mode] positions on the grids,
        and the data for :class:`probkit.FromPyro`: ``{"rows": rows, "y": y}``.

    Raises:
        CapabilityError: The model has a warp, or a likelihood that is not known here.

    Example:
        >>> import probkit as pk
        >>> program, data = funbat_program(FunBaT(1), ([[0.0, 0.5], [1.0, 0.5]], [1.0, 2.0]))
        >>> sorted(pk.FromPyro(program).sites(data))
        ['core', 'noise_precision', 'white_1', 'white_2']
    """
    if model.warp is not None:
        raise CapabilityError("funbat_program knows no warp; transform y and leave warp=None")
    noise = model.noise_model
    if not isinstance(noise, GaussianNoise | StudentTNoise | BernoulliNoise | PoissonNoise):
        raise CapabilityError(f"funbat_program knows no likelihood {type(noise).__name__}")
    whole = model.prepare(data)
    frame = model._frame(whole)
    layout = model.layout(whole, {"frame": frame})
    roots = [factor_prior(model, whole, k).scale_tril for k in range(len(layout.ranks))]
    like, offset, scale = layout.y, frame["offset"], frame["scale"]

    def program(rows: Tensor, y: Tensor | None = None) -> Tensor:
        factors = []
        for k, root in enumerate(roots):
            normal = dist.Normal(like.new_zeros(root.shape[:2]), like.new_ones(())).to_event(2)
            white = pyro.sample(f"white_{k + 1}", normal)
            u = (root @ white.unsqueeze(-1)).squeeze(-1)
            factors.append(pyro.deterministic(f"factor_{k + 1}", u.mT))
        core = None
        if layout.has_core:
            zeros = like.new_zeros(layout.ranks)
            core = pyro.sample(
                "core", dist.Normal(zeros, like.new_ones(())).to_event(len(layout.ranks))
            )
        z = multilinear(factors, rows, layout.free, core)
        pyro.deterministic("f", offset + scale * z)
        law = _observation(noise, z, offset, scale)
        return pyro.sample("y", law.to_event(1), obs=y)

    rows = torch.stack([grid.index for grid in layout.grids], -1)
    return program, {"rows": rows, "y": whole.y}


def _observation(noise: Any, z: Tensor, offset: float, scale: float) -> Any:
    """The law of y [*batch, entry] in the units of the data."""
    if isinstance(noise, BernoulliNoise):
        return dist.Bernoulli(logits=z + noise.offset)
    if isinstance(noise, PoissonNoise):
        return dist.Poisson(noise.level * unit_softplus(z)[0])
    shape, rate = z.new_tensor(noise.shape), z.new_tensor(noise.rate)
    tau = pyro.sample("noise_precision", dist.Gamma(shape, rate))
    sd = scale * tau.rsqrt().unsqueeze(-1)
    if isinstance(noise, StudentTNoise):
        return dist.StudentT(z.new_tensor(noise.df), offset + scale * z, sd)
    return dist.Normal(offset + scale * z, sd)
