"""The No-U-Turn sampler, all chains in lock-step."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.hmc import lockstep
from probkit.inference.hmc.adaptation import ChainState
from probkit.inference.hmc.base import HamiltonianSampler
from probkit.inference.hmc.engine import Engine, close, make_pieces
from probkit.inference.hmc.lockstep import LockstepTree
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.path import PathLength
from probkit.inference.hmc.potential import Potential
from probkit.inference.hmc.tree import Transition, draw_tree, uniforms_needed
from probkit.inference.hmc.windows import windows_of

__all__ = ["NUTS"]

_EARLY_DEPTH = 6
_PROBE_DEPTH = 4


@storable
@dataclass(frozen=True)
class NUTS(HamiltonianSampler):
    """Hamiltonian Monte Carlo that ends its paths where they turn back.

    Multinomial sampling of the trajectory and the generalised U-turn criterion (Betancourt 2017),
    after Hoffman and Gelman (2014). All chains double together in one tensor program; chains whose
    path has ended leave the batch.

    Statistics per draw, under ArviZ's names: lp (log density of the unconstrained vector),
    acceptance_rate, step_size, n_steps, tree_depth, energy, energy_error, diverging.

    Args:
        draws: Draws kept for each chain.
        warmup: Transitions before, which adapt step sizes and mass matrix and are dropped.
        accept: Mean acceptance to aim at. Chains in lock-step wait for the deepest tree; the high
            default keeps depths alike. Raise it against divergences.
        dense: Adapt a full mass matrix, for strongly correlated posteriors.
        step_size: First step size; None searches for one. With ``warmup=0`` the one to use.
        inverse_mass: First inverse mass matrix, the posterior's variances [D] in the unconstrained
            space or, with ``dense``, its covariance [D, D].
        adapt_mass: Whether the warm-up changes the mass matrix.
        start: An earlier posterior over the same sites (any sampler's): chains start at its draws,
            with its variances as inverse mass matrix and its step size. A short warm-up then does.
        chunk: Transitions between reports.
        block: Chains in one state. A chain's draws are the same alone and among others for equal
            ``block``; None puts all chains in one state, and they share one adaptation.
        compile: True compiles the transitions for this model and data (C++ compiler needed; some
            ten seconds, remembered for equal models and data, and on disk); "auto" does for runs of
            10,000 transitions or more; False never. Draws agree with eager ones up to rounding.
            Where anything fails the run goes on eagerly; ``attrs["engine"]`` says which it was.
        max_depth: Doublings at most: a path has up to 2^max_depth - 1 steps.

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
        >>> post = infer(Coin(), (7, 3), NUTS(50, warmup=50), rng=0, chains=4)
        >>> post.draws["p"].shape
        torch.Size([4, 50])
    """

    accept: float = 0.9
    max_depth: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_depth <= 15:
            raise DataError(f"NUTS: expected max_depth from 1 to 15, got {self.max_depth}")

    @property
    def _compiles(self) -> bool:
        # The trunk of a compiled tree holds two doublings.
        return super()._compiles and self.max_depth >= 2

    @property
    def _uniforms(self) -> int:
        return uniforms_needed(self.max_depth)

    def _transition(
        self,
        engine: Engine,
        metric: Metric,
        state: ChainState,
        momentum: Tensor,
        uniforms: Tensor,
    ) -> tuple[Transition, PathLength | None]:
        early = self.adapt_mass and windows_of(self.warmup).is_early(state.draw + 1)
        depth = min(self.max_depth, _EARLY_DEPTH) if early else self.max_depth
        if engine.tools is not None:
            draw = engine.tools.draw
        else:
            draw = functools.partial(draw_tree, engine.potential)
        return draw(metric, state.point, momentum, state.step, uniforms, depth), None

    def _compiled(self, potential: Potential, position: Tensor) -> LockstepTree:
        return LockstepTree(make_pieces(potential, lockstep.pieces, position))

    def _agrees(self, potential: Potential, tools: LockstepTree, run: ChainState) -> bool:
        """Draw one tree of three or four doublings both ways."""
        point = run.point
        uniforms = point.position.new_full((len(run.step), uniforms_needed(_PROBE_DEPTH)), 0.3)
        momentum = torch.ones_like(point.position)
        rest = (Metric(run.inverse_mass), point, momentum, run.step, uniforms, _PROBE_DEPTH)
        one, other = draw_tree(potential, *rest), tools.draw(*rest)
        return close([*one.point, *one.stats.values()], [*other.point, *other.stats.values()])
