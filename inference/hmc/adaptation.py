"""The running state of a block of chains, and how a warm-up transition changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.inference.hmc.leapfrog import Point
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.moments import Moments, pooled
from probkit.inference.hmc.path import PathLength
from probkit.inference.hmc.potential import Potential
from probkit.inference.hmc.step_size import (
    DualAveraging,
    first_step_size,
    pooled_step_size,
    shared_acceptance,
)
from probkit.inference.hmc.windows import windows_of
from probkit.rng import randn
from probkit.tree import Tree

__all__ = ["ChainState", "adapt"]


@dataclass(frozen=True)
class ChainState:
    """Everything that a block of chains carries from one transition to the next.

    Attributes:
        draw: Number of finished transitions, warm-up included.
        point: Where the chains are.
        step: Step sizes [chain].
        inverse_mass: [D] or [D, D].
        averaging: Search for the step size.
        moments: Moments of the current window.
        path: Search for the path length; None where it is fixed or there is none.
        divergences: Divergent transitions after warm-up, over all chains.
        engine: "eager", "compiled", or "compiling" before the first transition.
    """

    draw: int
    point: Point
    step: Tensor
    inverse_mass: Tensor
    averaging: DualAveraging
    moments: Moments
    path: PathLength | None = None
    divergences: int = 0
    engine: str = "eager"

    def tree(self) -> Tree:
        """Return the state as nested dicts of tensors and scalars."""
        return {
            "draw": self.draw,
            "point": self.point._asdict(),
            "step": self.step,
            "inverse_mass": self.inverse_mass,
            "averaging": self.averaging._asdict(),
            "moments": self.moments._asdict(),
            "path": None if self.path is None else self.path._asdict(),
            "divergences": self.divergences,
            "engine": self.engine,
        }

    @staticmethod
    def of(tree: Tree) -> ChainState:
        """Rebuild a state from :meth:`tree`."""
        parts: dict[str, Any] = dict(tree)
        parts["point"] = Point(**tree["point"])
        parts["averaging"] = DualAveraging(**tree["averaging"])
        parts["moments"] = Moments(**tree["moments"])
        parts["path"] = None if tree["path"] is None else PathLength(**tree["path"])
        return ChainState(**parts)


def adapt(
    state: ChainState,
    acceptance: Tensor,
    potential: Potential,
    *,
    target: float,
    warmup: int,
    adapt_mass: bool,
    rngs: Sequence[torch.Generator],
) -> ChainState:
    """Learn step sizes and mass matrix from one warm-up transition.

    Every chain first searches for its own step size, so that one in a difficult place helps itself
    and harms no other; from the end of the early windows on, chains that are near the median learn
    together. The mass matrix is estimated from the trusted chains at the end of each window, and
    the search for step sizes then begins anew.

    Args:
        state: After the transition; ``draw`` counts it.
        acceptance: Mean acceptance probabilities [chain] of the transition.
        potential: Energy and gradient.
        target: Acceptance to aim at.
        warmup: Number of warm-up transitions.
        adapt_mass: Whether windows change the mass matrix.
        rngs: One stream per chain.
    """
    acceptance = shared_acceptance(acceptance, state.averaging.log_step)
    averaging = state.averaging.update(acceptance, target)
    state = replace(state, averaging=averaging, step=averaging.log_step.exp())
    windows = windows_of(warmup)
    if adapt_mass and windows.holds(state.draw):
        point = state.point
        state = replace(state, moments=state.moments.add(point.position, point.energy))
        if state.draw in windows.ends:
            early = windows.is_early(state.draw + 1)
            state = _close_window(state, potential, rngs, pool=not early)
            if state.path is not None and state.draw == windows.scaled_at:
                state = replace(state, path=state.path.restart(torch.pi))
    if state.draw == warmup:
        state = replace(state, step=pooled_step_size(state.averaging.log_average.exp()))
        if state.path is not None:
            kept = state.path._replace(log_length=state.path.log_average)
            state = replace(state, path=kept)
    return state


def _close_window(
    state: ChainState, potential: Potential, rngs: Sequence[torch.Generator], *, pool: bool
) -> ChainState:
    """Take the mass matrix of the window, and search for step sizes anew."""
    variance = _usable(pooled(state.moments), state.inverse_mass)
    momentum = randn(
        rngs,
        state.point.position.shape[1:],
        dtype=state.point.position.dtype,
        device=state.point.position.device,
    )
    step = first_step_size(
        potential, Metric(variance), state.point, momentum, state.averaging.log_average.exp()
    )
    if pool:
        step = pooled_step_size(step)
    return replace(
        state,
        inverse_mass=variance,
        step=step,
        averaging=DualAveraging.start(step),
        moments=Moments.empty(state.point.position, variance.ndim == 2),
    )


def _usable(variance: Tensor | None, old: Tensor) -> Tensor:
    """Return the new estimate; the old matrix where there is none or it cannot be factorised."""
    if variance is None or not bool(torch.isfinite(variance).all()):
        return old
    if variance.ndim == 2 and int(torch.linalg.cholesky_ex(variance).info) != 0:
        return torch.diag(variance.diagonal())
    return variance
