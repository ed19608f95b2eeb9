"""Stochastic-gradient Langevin dynamics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.files import storable
from probkit.inference.sgmcmc.base import StochasticGradientSampler
from probkit.inference.sgmcmc.schedules import Stage

__all__ = ["SGLD", "langevin_step"]


def langevin_step(
    position: Tensor, gradient: Tensor, preconditioner: Tensor, noise: Tensor, stage: Stage
) -> Tensor:
    """Return q - (eps / 2) m grad U + sqrt(eps m T) noise (Welling and Teh 2011, equation 4).

    Args:
        position: q [chain, D].
        gradient: Of the potential, scaled to all data, [chain, D].
        preconditioner: Diagonal m [chain, D] or [D].
        noise: Standard normal [chain, D].
        stage: Step size eps and temperature T.
    """
    drift = (0.5 * stage.size) * preconditioner * gradient
    spread = (stage.size * stage.temperature * preconditioner).sqrt()
    return position - drift + spread * noise


@storable
@dataclass(frozen=True)
class SGLD(StochasticGradientSampler):
    """Stochastic-gradient Langevin dynamics (Welling and Teh 2011), without an accept step.

    Draws have a bias of the order of the step size, and on minibatches a further one of the order
    of step size times gradient variance: halve the step size and see what changes. On a normal
    target of precision P and full data the variance of the draws is 1 / (P (1 - step P m / 4)),
    with m the preconditioner.

    Statistics per draw: lp (log density of the unconstrained vector; an unbiased estimate of it on
    minibatches) and step_size.

    Args:
        draws: Draws kept for each chain.
        warmup: Steps before, which are dropped.
        step_size: A number, or a schedule: Constant, PolynomialDecay or Cyclical.
        batch_size: Units of a minibatch; None uses all data. Needs ``plate_size`` and
            ``minibatch``. A :class:`~probkit.loader.Loader` as data brings its own batches.
        thin: Steps from one draw to the next.
        precondition: Learn a diagonal preconditioner, one over the root mean square gradient, in
            the warm-up; it is frozen afterwards, so that no correction term is due.
        preconditioner: Diagonal [D] (over the unconstrained vector) to use or to start from.
        start: An earlier posterior to start from.
        chunk: Steps between reports.
        block: Chains in one state, batched in one tensor program; None carries all together.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> from probkit import infer
        >>> from probkit.model import Model, Site
        >>> class Coin(Model):
        ...     batched = True
        ...     def sites(self, data):
        ...         return {"p": Site((), constraints.unit_interval)}
        ...     def log_joint(self, values, data, *, scale=1.0):
        ...         heads, tails = data
        ...         return heads * values["p"].log() + tails * (-values["p"]).log1p()
        >>> post = infer(Coin(), (7, 3), SGLD(50, warmup=50, step_size=0.1), rng=0, chains=2)
        >>> post.draws["p"].shape
        torch.Size([2, 50])
    """

    def _move(
        self,
        position: Tensor,
        momentum: Tensor,
        gradient: Tensor,
        preconditioner: Tensor,
        noise: Tensor,
        stage: Stage,
    ) -> tuple[Tensor, Tensor, Tensor]:
        moved = langevin_step(position, gradient, preconditioner, noise, stage)
        return moved, momentum, torch.zeros_like(position, dtype=torch.bool)
