"""Hamiltonian Monte Carlo with jittered, adapted path lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.hmc import proposal
from probkit.inference.hmc.adaptation import ChainState
from probkit.inference.hmc.base import HamiltonianSampler
from probkit.inference.hmc.engine import Engine, close, make_pieces
from probkit.inference.hmc.leapfrog import Phase, trajectory
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.path import PathLength, halton
from probkit.inference.hmc.potential import Potential
from probkit.inference.hmc.proposal import BlockedPath, settle
from probkit.inference.hmc.tree import Transition

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
        compile: Whether to compile the transitions, as for :class:`NUTS`.
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
        engine: Engine,
        metric: Metric,
        state: ChainState,
        momentum: Tensor,
        uniforms: Tensor,
    ) -> tuple[Transition, PathLength | None]:
        jitter = halton(state.draw)
        length = self.length if state.path is None else math.exp(state.path.log_length)
        assert length is not None
        steps = math.ceil(min(jitter * length / float(state.step.median()), self.max_steps))
        start, step = Phase(state.point, momentum), state.step
        if engine.tools is not None:
            end, settled = engine.tools.propose(metric, start, step, steps, uniforms[:, 0])
        else:
            end = trajectory(engine.potential, metric, start, step[:, None], steps)
            settled = settle(start, end, uniforms[:, 0])
        stats = {
            "lp": -settled.point.energy,
            "acceptance_rate": settled.acceptance,
            "step_size": step,
            "n_steps": torch.full_like(settled.diverging, steps, dtype=torch.int64),
            "energy": settled.energy,
            "energy_error": settled.error,
            "diverging": settled.diverging,
        }
        path = state.path
        warming = self.length is None and state.draw < self.warmup
        if path is not None and warming:
            path = path.update(metric, start.point.position, end, settled.acceptance, jitter)
        return Transition(settled.point, stats), path

    def _compiled(self, potential: Potential, position: Tensor) -> BlockedPath:
        return BlockedPath(make_pieces(potential, proposal.pieces, position))

    def _agrees(self, potential: Potential, tools: BlockedPath, run: ChainState) -> bool:
        """Take one path of five steps both ways."""
        metric, start = (
            Metric(run.inverse_mass),
            Phase(run.point, torch.ones_like(run.point.position)),
        )
        half = torch.full_like(run.step, 0.5)
        end = trajectory(potential, metric, start, run.step[:, None], 5)
        settled = settle(start, end, half)
        other_end, other = tools.propose(metric, start, run.step, 5, half)
        return close(
            [*end.point, end.momentum, *settled.point, *settled[1:]],
            [*other_end.point, other_end.momentum, *other.point, *other[1:]],
        )
