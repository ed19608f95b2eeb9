"""Draws from the backward kernel: which particle of the last step a new particle came from.

Given the weighted particles (x_l, w_l) before a step, particle x' after it came from l with
probability proportional to w_l m(x_l, x'), m the transition density. An exact draw looks at all n
particles. Where m is bounded, accept-reject draws l by weight and accepts it with probability
m(x_l, x') / bound (Douc et al. 2011; Olsson & Westerborn 2017). Particles in the tails may need
very many proposals; after n of them the draw is made exactly, which costs no more and keeps the
expected cost of all particles together linear in n up to logarithms (Dau & Chopin 2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.inference.smc.cloud import Cloud
from probkit.inference.smc.particles import Particles, count, take

__all__ = ["BackwardDraws", "backward_draws", "needs_transition"]

_CHUNK = 2**21  # pairs of particles looked at together
_FEW_PAIRS = 2**16  # up to here looking at all pairs is faster than accept-reject


class BackwardDraws(NamedTuple):
    """Backward draws and what they cost.

    Attributes:
        ancestors: [particle, draw] positions before the step.
        evaluations: Number of transition densities looked at.
    """

    ancestors: Tensor
    evaluations: int


def needs_transition(model: Any, who: str, instead: str) -> None:
    """Check that ``model`` has a transition density.

    Raises:
        CapabilityError: It has none.
    """
    if not callable(getattr(model, "log_transition", None)):
        raise CapabilityError(
            f"{who} needs the transition density log_transition(t, old, new, data); "
            f"{type(model).__name__} lacks it. {instead}"
        )


def backward_draws(
    model: Any,
    t: int,
    cloud: Cloud,
    new: Particles,
    draws: int,
    data: Any,
    *,
    exact: bool | None = None,
    rng: torch.Generator,
) -> BackwardDraws:
    """Draw ancestors of ``new`` particles of step ``t`` from the backward kernel.

    Args:
        model: A ``Sequential`` model with ``log_transition``. Accept-reject is used where it also
            has ``log_transition_bound(t, data)`` and declares ``local_weights``: that the weight of
            a step does not look at the state before it.
        t: The step.
        cloud: The weighted particles before the step.
        new: Particles after it.
        draws: Independent draws for each of them.
        data: The data.
        exact: Look at all particles for every draw; None does so for few particles, where it is
            faster, and where accept-reject is impossible.
        rng: Stream.

    Returns:
        The draws.

    Raises:
        DataError: A particle has no possible ancestor, or the bound is none.
    """
    n = count(new)
    bounded = getattr(model, "local_weights", False) and hasattr(model, "log_transition_bound")
    if exact is None:
        exact = n * cloud.n <= _FEW_PAIRS
    if exact or not bounded:
        owner = torch.arange(n, device=cloud.log_weights.device)
        return BackwardDraws(_exact(model, t, cloud, new, owner, draws, data, rng), n * cloud.n)
    return _accept_reject(model, t, cloud, new, n, draws, data, rng)


def _accept_reject(
    model: Any,
    t: int,
    cloud: Cloud,
    new: Particles,
    n: int,
    draws: int,
    data: Any,
    rng: torch.Generator,
) -> BackwardDraws:
    """Propose by weight; those still without ancestor after n proposals are drawn exactly."""
    device = cloud.log_weights.device
    bound = torch.as_tensor(model.log_transition_bound(t, data), dtype=torch.float64)
    cumulative = cloud.weights.cumsum(0)
    index = torch.zeros(n * draws, dtype=torch.int64, device=device)
    pending = torch.arange(n * draws, device=device)
    limit, spent, evaluations = cloud.n, 0, 0
    while len(pending) > 0 and spent < limit:
        # The fewer are left, the more proposals each gets at once: rounds cost alike.
        tries = max(1, min(limit - spent, n * draws // len(pending)))
        proposed = _categorical(cumulative, len(pending) * tries, rng)
        owner = (pending // draws).repeat_interleave(tries)
        density = model.log_transition(t, take(cloud.particles, proposed), take(new, owner), data)
        log_accept = density.double() - bound
        if bool((log_accept > 1e-6).any()):
            raise DataError(
                f"{type(model).__name__}.log_transition_bound({t}) is {float(bound):.6g}, but a "
                f"transition has log density {float(density.max()):.6g}; expected an upper bound"
            )
        uniform = torch.rand(len(proposed), generator=rng, dtype=torch.float64, device=device)
        accepted = (uniform.log() < log_accept).reshape(-1, tries)
        first = accepted.to(torch.int8).argmax(1)
        hit = accepted.any(1)
        chosen = proposed.reshape(-1, tries).gather(1, first.unsqueeze(1)).squeeze(1)
        index[pending[hit]] = chosen[hit]
        pending = pending[~hit]
        spent += tries
        evaluations += len(proposed)
    if len(pending) > 0:
        rest = _exact(model, t, cloud, new, pending // draws, 1, data, rng)
        index[pending] = rest.squeeze(1)
        evaluations += len(pending) * cloud.n
    return BackwardDraws(index.reshape(n, draws), evaluations)


def _exact(
    model: Any,
    t: int,
    cloud: Cloud,
    new: Particles,
    owner: Tensor,
    draws: int,
    data: Any,
    rng: torch.Generator,
) -> Tensor:
    """Draw ancestors [owner, draw] of the new particles ``owner`` [owner], looking at all pairs."""
    rows = max(1, _CHUNK // cloud.n)
    parts = []
    for some in owner.split(rows):
        logits = cloud.log_weights + backward_log_weights(model, t, cloud, new, some, data)
        impossible = torch.isneginf(logits).all(1)
        if bool(impossible.any()):
            raise DataError(
                f"a particle of step {t} has transition density zero from every particle before "
                "it; check log_transition against extend"
            )
        cumulative = torch.softmax(logits, dim=1).cumsum(1)
        uniform = torch.rand(
            len(some), draws, generator=rng, dtype=torch.float64, device=logits.device
        )
        place = uniform * cumulative[:, -1:]
        parts.append(torch.searchsorted(cumulative, place, right=True).clamp_max(cloud.n - 1))
    return torch.cat(parts)


def backward_log_weights(
    model: Any, t: int, cloud: Cloud, new: Particles, owner: Tensor, data: Any
) -> Tensor:
    """Return log m(x_l, x'_i) [owner, particle], plus the log weight where that looks at x_l."""
    n, m = cloud.n, len(owner)
    before = take(cloud.particles, torch.arange(n, device=owner.device).repeat(m))
    after = take(new, owner.repeat_interleave(n))
    log_density = model.log_transition(t, before, after, data)
    if not getattr(model, "local_weights", False):
        log_density = log_density + model.log_weight(t, before, after, data)
    return log_density.double().reshape(m, n)


def _categorical(cumulative: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Draw ``n`` positions by inversion of cumulative weights [particle]."""
    uniform = torch.rand(n, generator=rng, dtype=torch.float64, device=cumulative.device)
    place = uniform * cumulative[-1]
    return torch.searchsorted(cumulative, place, right=True).clamp_max_(len(cumulative) - 1)
