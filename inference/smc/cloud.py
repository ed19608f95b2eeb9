"""A weighted cloud of particles and the moves that sequential Monte Carlo is made of.

``spawn``, ``extend``, ``reweight``, ``resample`` and ``move`` are pure functions on a
:class:`Cloud`. Particle filters, tempered samplers, particle Gibbs and smoothers are short
compositions of them, and so are samplers of one's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.inference.smc.particles import Particles, count, take
from probkit.inference.smc.resampling import Resampler, Streams, resolve

__all__ = ["Cloud", "ExtinctionError", "extend", "move", "resample", "reweight", "spawn"]


class ExtinctionError(DataError):
    """Every particle has weight zero.

    Attributes:
        step: The step at which they died.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Cloud:
    """Weighted particles.

    Attributes:
        particles: A population of any kind; see :mod:`probkit.inference.smc.particles`.
        log_weights: [*group, particle], normalised: the exponentials of each group sum to one.
        log_evidence: [*group], log of the unbiased estimate of the normalising constant so far.
    """

    particles: Particles
    log_weights: Tensor
    log_evidence: Tensor

    @property
    def n(self) -> int:
        """Number of particles of a group."""
        return int(self.log_weights.shape[-1])

    @functools.cached_property
    def weights(self) -> Tensor:
        """Normalised weights [*group, particle]."""
        return self.log_weights.exp()

    @functools.cached_property
    def ess(self) -> Tensor:
        """Effective sample size 1 / sum w^2, [*group], between 1 and n."""
        return torch.linalg.vecdot(self.weights, self.weights).reciprocal()


def uniform(particles: Particles, log_weights_shape: tuple[int, ...], device: Any) -> Cloud:
    """Return a cloud of equal weights and evidence one."""
    n = log_weights_shape[-1]
    log_weights = torch.full(log_weights_shape, -math.log(n), dtype=torch.float64, device=device)
    return Cloud(particles, log_weights, log_weights.new_zeros(log_weights_shape[:-1]))


def spawn(model: Any, n: int, data: Any, *, rng: torch.Generator) -> Cloud:
    """Start ``n`` particles of a ``Sequential`` model, equally weighted.

    Raises:
        ShapeError: The model returned another number of particles.
    """
    particles = model.start(n, data, rng=rng)
    if count(particles) != n:
        raise ShapeError(
            f"{type(model).__name__}.start: expected {n} particles, got {count(particles)}"
        )
    return uniform(particles, (n,), rng.device)


def extend(
    model: Any,
    t: int,
    particles: Particles,
    data: Any,
    *,
    rng: torch.Generator,
    proposal: Any = None,
) -> tuple[Particles, Tensor]:
    """Advance particles by step ``t``.

    Args:
        model: A ``Sequential`` model.
        t: The step.
        particles: ``n`` particles before it.
        data: The data.
        rng: Stream.
        proposal: None moves by the model's own ``extend``. An object with ``propose(t, old, data,
            rng=)`` and ``log_proposal(t, old, new, data)`` moves by that (a guided filter), and the
            increments carry ``log_transition - log_proposal``.

    Returns:
        The particles after the step, and their log weight increments [n].
    """
    mover = model.extend if proposal is None else proposal.propose
    new = mover(t, particles, data, rng=rng)
    return new, increments(model, t, particles, new, data, proposal=proposal)


def increments(
    model: Any, t: int, old: Particles, new: Particles, data: Any, *, proposal: Any = None
) -> Tensor:
    """Return the log weight increments [n] of moving from ``old`` to ``new`` in step ``t``."""
    log_weight: Tensor = model.log_weight(t, old, new, data)
    if proposal is not None:
        log_weight = (
            log_weight
            + model.log_transition(t, old, new, data)
            - proposal.log_proposal(t, old, new, data)
        )
    return log_weight.to(torch.float64)


def reweight(cloud: Cloud, log_increments: Tensor, *, step: int = 0) -> Cloud:
    """Multiply the weights by exp(log_increments) and book the evidence.

    The evidence grows by the weighted mean of the increments, an unbiased factor for every
    resampling rule that looks at the past only.

    Args:
        cloud: The cloud.
        log_increments: [*group, particle], finite or minus infinity.
        step: Named in errors.

    Raises:
        ExtinctionError: All particles of a group have weight zero.
        DataError: An increment is NaN or plus infinity.
        ShapeError: Not one increment for each particle.

    Example:
        >>> cloud = uniform(["a", "b"], (2,), "cpu")
        >>> heavier = reweight(cloud, torch.tensor([0.0, float("-inf")]))
        >>> heavier.weights.tolist(), round(heavier.log_evidence.exp().item(), 3)
        ([1.0, 0.0], 0.5)
    """
    if log_increments.shape != cloud.log_weights.shape:
        raise ShapeError(
            f"log weights of step {step}: expected {list(cloud.log_weights.shape)} "
            f"[*group, particle], got {list(log_increments.shape)}"
        )
    grouped = log_increments.ndim > 1  # an ungrouped cloud needs fewer operations
    log_weights = cloud.log_weights + log_increments
    top = log_weights.amax(-1)
    # A finite largest weight proves that no entry is NaN or plus infinity.
    finite = bool(torch.isfinite(top).all()) if grouped else math.isfinite(top.item())
    if not finite:
        _explain(log_increments, step)
    log_weights -= top.unsqueeze(-1) if grouped else top
    weights = log_weights.exp()
    total = weights.sum(-1)
    log_total = total.log()
    log_weights -= log_total.unsqueeze(-1) if grouped else log_total
    log_evidence = cloud.log_evidence + (top + log_total)
    result = Cloud(cloud.particles, log_weights, log_evidence)
    # Fill the cached property from what is at hand: it saves another pass of exponentials.
    vars(result)["ess"] = total.square() / torch.linalg.vecdot(weights, weights)
    return result


def _explain(log_increments: Tensor, step: int) -> None:
    """Raise the error that a non-finite largest weight stands for."""
    bad = torch.isnan(log_increments) | torch.isposinf(log_increments)
    if bool(bad.any()):
        particle = int(bad.nonzero()[0, -1])
        raise DataError(
            f"log weight of particle {particle} at step {step} is NaN or +inf; expected finite "
            "values or -inf: check log_weight"
        )
    raise ExtinctionError(
        f"every particle has weight zero after step {step}; use more particles, a guided proposal "
        "or softer weights",
        step,
    )


def resample(
    cloud: Cloud,
    scheme: str | Resampler,
    *,
    rng: Streams,
    threshold: float = 1.0,
) -> tuple[Cloud, Tensor | None]:
    """Replace the particles by draws from them where the effective sample size is low.

    Args:
        cloud: The cloud.
        scheme: Name of a scheme, or a function (weights, n, rng) -> ancestors.
        rng: Stream, one for each group of a grouped cloud.
        threshold: Resample where ESS < threshold * n; 0 never does, 1 does whenever the weights
            differ.

    Returns:
        The cloud, equally weighted where it was resampled, and the ancestors [*group, particle];
        None where no group was resampled.
    """
    n = cloud.n
    grouped = cloud.log_weights.ndim > 1
    least = threshold * n * (1 - 1e-9)  # equal weights give n only up to rounding
    low = cloud.ess < least if grouped else cloud.ess.item() < least
    if not (bool(low.any()) if isinstance(low, Tensor) else low):
        return cloud, None
    ancestors = resolve(scheme)(cloud.weights, n, rng)
    log_weights = torch.full_like(cloud.log_weights, -math.log(n))
    if isinstance(low, Tensor):
        stay = torch.arange(n, device=ancestors.device)
        ancestors = torch.where(low.unsqueeze(-1), ancestors, stay)
        log_weights = torch.where(low.unsqueeze(-1), log_weights, cloud.log_weights)
    return Cloud(take(cloud.particles, ancestors), log_weights, cloud.log_evidence), ancestors


def move(cloud: Cloud, kernel: Callable[[Particles], Particles]) -> Cloud:
    """Apply a Markov kernel that leaves the cloud's target invariant; weights stay."""
    return replace(cloud, particles=kernel(cloud.particles))
