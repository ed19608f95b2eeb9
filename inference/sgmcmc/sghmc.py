"""Stochastic-gradient Hamiltonian Monte Carlo with adaptive scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.sgmcmc.base import StochasticGradientSampler
from probkit.inference.sgmcmc.schedules import Stage

__all__ = ["SGHMC", "Moved", "underdamped_step"]

_TINY = 1e-16


class Moved(NamedTuple):
    """Where a step of underdamped dynamics ends.

    Attributes:
        position: [chain, D].
        momentum: [chain, D].
        short: [chain, D], whether the noise variance had to be cut off at (almost) zero.
    """

    position: Tensor
    momentum: Tensor
    short: Tensor


def underdamped_step(
    position: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    preconditioner: Tensor,
    noise: Tensor,
    stage: Stage,
    friction: float,
) -> Moved:
    """One step of Springenberg et al. (2016), equations 9 and 10.

    r <- r - eta^2 m grad U - alpha r + N(0, max(2 eta^2 alpha m - eta^4, tiny)), q <- q + r, with
    m = v^(-1/2): the term eta^4 takes out the noise that the gradients bring of their own.

    Args:
        position: q [chain, D].
        momentum: r [chain, D].
        gradient: Of the potential, scaled to all data, [chain, D].
        preconditioner: Diagonal m [chain, D] or [D].
        noise: Standard normal [chain, D].
        stage: Step size eta and temperature, which multiplies the noise variance.
        friction: alpha, the share of the momentum lost in a step.
    """
    square = stage.size**2
    variance = (2.0 * square * friction) * preconditioner - square**2
    floor = _TINY * square
    short = variance < floor
    spread = (stage.temperature * variance.clamp(min=floor)).sqrt()
    momentum = (1.0 - friction) * momentum - square * preconditioner * gradient + spread * noise
    return Moved(position + momentum, momentum, short.expand_as(position))


@storable
@dataclass(frozen=True)
class SGHMC(StochasticGradientSampler):
    """Scale-adapted stochastic-gradient Hamiltonian Monte Carlo (Springenberg et al. 2016).

    Momentum carries the chains further than :class:`SGLD` does. The warm-up estimates the mean
    square v of every gradient entry and so the preconditioner v^(-1/2), which is then frozen.
    There is no accept step: draws have a bias of the order of the step size.

    Statistics per draw: lp (log density of the unconstrained vector; an unbiased estimate of it on
    minibatches) and step_size.

    Args:
        draws: Draws kept for each chain.
        warmup: Steps before, which adapt and are dropped.
        step_size: eta, a number or a schedule: Constant, PolynomialDecay or Cyclical.
        batch_size: Units of a minibatch; None uses all data. Needs ``plate_size`` and
            ``minibatch``. A :class:`~probkit.loader.Loader` as data brings its own batches.
        thin: Steps from one draw to the next.
        precondition: Learn the preconditioner in the warm-up; False leaves it at ``preconditioner``
            or one.
        preconditioner: Diagonal [D] (over the unconstrained vector) to use or to start from.
        start: An earlier posterior to start from.
        chunk: Steps between reports.
        block: Chains in one state, batched in one tensor program; None carries all together.
        friction: alpha, the share of the momentum lost in a step.

    Example:
        >>> SGHMC(200, step_size=0.01, batch_size=32, thin=5).friction
        0.05
    """

    friction: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.friction <= 1.0 or not math.isfinite(self.friction):
            raise DataError(f"SGHMC: expected friction in (0, 1], got {self.friction}")

    def _move(
        self,
        position: Tensor,
        momentum: Tensor,
        gradient: Tensor,
        preconditioner: Tensor,
        noise: Tensor,
        stage: Stage,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return underdamped_step(
            position, momentum, gradient, preconditioner, noise, stage, self.friction
        )
