"""What a ``Sequential`` model may tell a particle sampler beyond the four methods it must have.

All of these are optional, and a model without them is sampled as if they did not exist:

- ``finished(particles) -> sequence of bool``: particles that no further step changes. A sampler
  ends when all of them are.
- ``meter() -> {name: number}``: what the model has used up since it was made (tokens, requests,
  money), and ``exhausted(spent) -> str | None``: which limit is reached, given what one chain has
  spent. A sampler then stops before the next step; the particles are validly weighted.
- ``reports_extinction = True``: a population that died out is a result (evidence zero, the last
  particles with weight) in place of an :class:`~probkit.inference.smc.ExtinctionError`.
- ``interrupted(particles) -> str``: why a step was not taken, where what the model stands on gave
  up for good; a sweep of particle Gibbs is then dropped. Empty where all is well.
- ``state_of(particles) -> str``: how a run that left these particles ended, in words.
- ``tempered(power)``: the model with its potentials to a power, and ``log_potential(t, old, new,
  data)``: their logs without the corrections of a proposal; see
  :class:`~probkit.inference.smc.ParallelTempering`.
- ``log_future(t, particles, path, data)``, ``graft(t, particle, path, data)`` and
  ``require_future(who)``: ancestor sampling for particles that hold their whole past; see
  :func:`~probkit.inference.smc.conditional_sweep`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probkit.inference.smc.particles import Particles

__all__ = [
    "all_finished",
    "can_finish_early",
    "exhausted",
    "grafts",
    "interrupted",
    "metered",
    "reports_extinction",
    "spent_since",
    "state_of",
]

Spent = Mapping[str, float]


def can_finish_early(model: Any) -> bool:
    """Tell whether runs of a model may end before its last step."""
    return callable(getattr(model, "finished", None))


def all_finished(model: Any, particles: Particles) -> bool:
    """Tell whether no particle can change any more."""
    return can_finish_early(model) and all(model.finished(particles))


def metered(model: Any) -> Spent:
    """Return what a model has used up so far; nothing where it does not say."""
    meter = getattr(model, "meter", None)
    return dict(meter()) if callable(meter) else {}


def spent_since(model: Any, before: Spent) -> dict[str, float]:
    """Return what a model has used up since an earlier reading.

    Example:
        >>> class Model:
        ...     def meter(self): return {"calls": 5}
        >>> spent_since(Model(), {"calls": 3})
        {'calls': 2}
    """
    return {name: value - before.get(name, 0) for name, value in metered(model).items()}


def exhausted(model: Any, spent: Spent) -> str | None:
    """Return which limit a chain has reached, in words."""
    check = getattr(model, "exhausted", None)
    return check(spent) if callable(check) else None


def reports_extinction(model: Any) -> bool:
    """Tell whether a dead population is a result of the model."""
    return bool(getattr(model, "reports_extinction", False))


def interrupted(model: Any, particles: Particles) -> str:
    """Return why a model could not take its step; empty where it did."""
    ask = getattr(model, "interrupted", None)
    return str(ask(particles)) if callable(ask) else ""


def grafts(model: Any) -> bool:
    """Tell whether particles hold their past, so that a reference must be put onto ancestors."""
    return callable(getattr(model, "graft", None))


def state_of(model: Any, particles: Particles) -> str:
    """Say how a run that left these particles ended; empty where there is nothing to say."""
    describe = getattr(model, "state_of", None)
    return str(describe(particles)) if callable(describe) else ""
