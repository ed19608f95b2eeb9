"""Hamiltonian Monte Carlo with jittered, adapted path lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.hmc.adaptation import ChainState
from probkit.inference.hmc.base import HamiltonianSampler
from probkit.inference.hmc.leapfrog import Phase, kinetic, trajectory
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.path import PathLength, halton
from probkit.inference.hmc.potential import Potential
from probkit.inference.hmc.tree import MAX_ENERGY_ERROR, Transition

__all__ = ["HMC"]

_FIRST_STEPS = 10


@storable
@dataclass(frozen=True)
class HMC(HamiltonianSampler):
    """Hamiltonian Monte Carlo, all chains taking the same number of steps.

    Each transition follows a Halton fraction of the longest path (jitter, so that no period of the
    target is met for ever). The longest path is adapted in the warm-up by the ChEES criterion
    (Hoffman, Radul and Sountsov 2021), over all chains of the block: the sampler for many chains.

    Statistics per draw, under ArviZ's names: lp (log density of the unconstrained vector),
    acceptance_rate, step_size, n_steps, energy, energy_error (of the proposal), diverging.

    Args:
        draws: Draws kept for each chain.
        warmup: Transitions before, which adapt and are dropped.
        accept: Mean acceptance to aim at.
        dense: Adapt a full mass matrix.
        step_size: First step size; None searches for one. With ``warmup=0`` the one to use.
        inverse_mass: First inverse mass matrix, as for :class:`NUTS`.
        adapt_mass: Whether the warm-up changes the mass matrix.
        start: An earlier posterior to start from, as for :class:`NUTS`.
        chunk: Transitions between reports.
        block: Chains in one state, as for :class:`NUTS`.
        length: Longest path, in units in which the posterior has variance one; None adapts it.
        max_steps: Leapfrog steps of one transition at most.

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
        >>> post = infer(Coin(), (7, 3), HMC(50, warmup=50), rng=0, chains=4)
        >>> post.draws["p"].shape
        torch.Size([4, 50])
    """

    length: float | None = None
    max_steps: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length is not None and not 0.0 < self.length < math.inf:
            raise DataError(f"HMC: expected length > 0, got {self.length}")
        if self.max_steps < 1:
            raise DataError(f"HMC: expected max_steps >= 1, got {self.max_steps}")

    @property
    def _uniforms(self) -> int:
        return 1

    def _first_path(self, position: Tensor, step: Tensor, scaled: bool) -> PathLength | None:
        if self.length is not None:
            return None
        # Before the scales are known a few steps must do.
        short = min(math.pi, _FIRST_STEPS * float(step.median()))
        return PathLength.start(math.pi if scaled else short, position)

    def _transition(
        self,
        potential: Potential,
        metric: Metric,
        state: ChainState,
        momentum: Tensor,
        uniforms: Tensor,
    ) -> tuple[Transition, PathLength | None]:
        jitter = halton(state.draw)
        length = self.length if state.path is None else math.exp(state.path.log_length)
        assert length is not None
        steps = math.ceil(min(jitter * length / float(state.step.median()), self.max_steps))
        start = state.point
        start_energy = start.energy + kinetic(momentum)
        end = trajectory(potential, metric, Phase(start, momentum), state.step[:, None], steps)
        error = end.point.energy + kinetic(end.momentum) - start_energy
        diverging = ~(error <= MAX_ENERGY_ERROR)
        error = error.masked_fill(diverging, torch.inf)
        acceptance = error.clamp(min=0.0).neg().exp()
        take = uniforms[:, 0] < acceptance
        point = end.point.where(take, start)
        stats = {
            "lp": -point.energy,
            "acceptance_rate": acceptance,
            "step_size": state.step,
            "n_steps": torch.full_like(diverging, steps, dtype=torch.int64),
            "energy": start_energy + torch.where(take, error, 0.0),
            "energy_error": error,
            "diverging": diverging,
        }
        path = state.path
        warming = self.length is None and state.draw < self.warmup
        if path is not None and warming:
            path = path.update(metric, start.position, end, acceptance, jitter)
        return Transition(point, stats), path
