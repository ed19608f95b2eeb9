"""What counts as failure, and how long it takes: by simulation, or exactly for an end state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.model import Values
from probkit.predictive import Analytic, Empirical
from probkit.rng import Rng

__all__ = ["Failure", "phase_type_life", "simulate_life"]


@storable
@dataclass(frozen=True)
class Failure:
    """When a unit has failed: its state is reached, or a feature falls to a level.

    Args:
        state: Number of the end state.
        level: A feature at or below it means failure.
        feature: Which feature.
        horizon: Steps that are looked ahead; longer lives count as this.

    Raises:
        DataError: Neither state nor level is given.
    """

    state: int | None = None
    level: float | None = None
    feature: int = 0
    horizon: int = 500

    def __post_init__(self) -> None:
        if self.state is None and self.level is None:
            raise DataError("Failure: expected a state, a level, or both, got neither")
        if self.horizon < 1:
            raise DataError(f"Failure: expected horizon >= 1, got {self.horizon}")

    def steps_until(self, y: Tensor, states: Tensor) -> Tensor:
        """Return the number of steps [path] until failure along paths y [path, step, feature].

        Paths that never fail get the number of steps.
        """
        failed = torch.zeros(states.shape, dtype=torch.bool, device=states.device)
        if self.state is not None:
            failed = failed | (states == self.state)
        if self.level is not None:
            failed = failed | (y[..., self.feature] <= self.level)
        steps = failed.shape[1]
        first = torch.where(failed, torch.arange(1, steps + 1, device=failed.device), steps)
        return first.amin(1)


def require_failure(failure: Failure | None) -> Failure:
    """Return the definition, or explain that one is needed.

    Raises:
        CapabilityError: There is none.
    """
    if failure is None:
        raise CapabilityError(
            "remaining life needs a definition of failure: ARPHMM(..., "
            "failure=Failure(state=...) or Failure(level=...)), or fit a LifeRegression"
        )
    return failure


def simulate_life(
    model: Any, posterior: Any, sequence: Any, failure: Failure, *, paths: int = 1000, rng: Rng
) -> Empirical:
    """Simulate futures until they fail.

    Args:
        model: An :class:`~probkit.models.ARPHMM`.
        posterior: Its posterior; draws share the paths.
        sequence: One sequence so far.
        failure: What counts as failure.
        paths: Number of futures.
        rng: Seed or generator.

    Returns:
        Draws of the remaining life in steps, a scalar.
    """
    future, states = model.simulate_future(
        posterior, sequence, horizon=failure.horizon, paths=paths, rng=rng
    )
    life = failure.steps_until(future.values, states)
    return Empirical(life.to(future.values.dtype))


def phase_type_life(values: Values, filtered: Tensor, failure: Failure) -> Analytic:
    """Exact law of the number of steps until the end state is entered.

    With Q the transitions among the other states, P(life > h) = p Q^h 1 for filtered probabilities
    p; the mean over an unlimited horizon is p (I - Q)^-1 1.

    Args:
        values: Draws [draw, *site].
        filtered: p(z_t | y_1, ..., y_t) of each draw [draw, K].
        failure: With an end state.

    Returns:
        A categorical law over 0, ..., horizon (0: failed already; horizon: that long or longer),
        averaged over draws.

    Raises:
        CapabilityError: Failure is not defined by a state.
        DataError: There is no such state.
    """
    if failure.state is None:
        raise CapabilityError("phase_type_life needs Failure(state=...); simulate_life takes both")
    states = filtered.shape[-1]
    if not 0 <= failure.state < states:
        raise DataError(f"Failure: expected a state 0..{states - 1}, got {failure.state}")
    alive = [k for k in range(states) if k != failure.state]
    stay = values["transition"][:, alive][:, :, alive]
    now = filtered[:, alive]
    survival = [torch.ones_like(now[:, 0]), now.sum(-1)]  # P(life >= 0), P(life >= 1)
    for _ in range(failure.horizon - 1):
        now = (now[:, None] @ stay)[:, 0]
        survival.append(now.sum(-1))
    tail = torch.stack(survival, -1).mean(0)  # P(life >= h), h = 0..horizon
    probs = torch.cat([tail[:-1] - tail[1:], tail[-1:]]).clamp_min(0.0)
    return Analytic(Categorical(probs=probs / probs.sum()))
