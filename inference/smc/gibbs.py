"""Particle Gibbs: a Markov chain of whole state paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference.smc.backward import backward_draws, needs_transition
from probkit.inference.smc.cloud import Cloud, increments, reweight, spawn
from probkit.inference.smc.filters import (
    check_count,
    find_proposal,
    named,
    number_of_steps,
)
from probkit.inference.smc.particles import Particles, is_tensors, join, put_last, take
from probkit.inference.smc.resampling import multinomial
from probkit.posterior import Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws, Population
from probkit.tree import Tree, map_tensors

__all__ = ["ParticleGibbs", "Sweep", "conditional_sweep"]


class Sweep(NamedTuple):
    """What one (conditional) particle sweep leaves.

    Attributes:
        path: The new path: a population of T + 1 particles, the one before the first step first.
        log_evidence: Log evidence estimate, a scalar. Unbiased only without a reference.
        ess: [step] effective sample sizes.
        renewed: [step] whether the new path left the reference; all True without one.
    """

    path: Particles
    log_evidence: Tensor
    ess: Tensor
    renewed: Tensor


def conditional_sweep(
    model: Any,
    data: Any,
    n: int,
    reference: Particles | None,
    *,
    ancestor_sampling: bool = True,
    proposal: Any = None,
    rng: torch.Generator,
) -> Sweep:
    """Run ``n`` particles, one of them bound to ``reference``, and draw a path by final weights.

    With a reference this is a Markov kernel that leaves the posterior of paths invariant for every
    n >= 2 (Andrieu, Doucet & Holenstein 2010). Ancestor sampling draws anew, at every step, which
    particle the rest of the reference continues (Lindsten, Jordan & Schoen 2014).

    Args:
        model: A ``Sequential`` model.
        data: The data.
        n: Particles, the reference included.
        reference: A path as :class:`Sweep` returns it; None runs an ordinary filter.
        ancestor_sampling: Needs ``log_transition``.
        proposal: As in :func:`probkit.inference.smc.extend`.
        rng: Stream.

    Returns:
        The sweep.
    """
    mover = model.extend if proposal is None else proposal.propose
    steps = number_of_steps(model, data)
    cloud = spawn(model, n, data, rng=rng)
    if reference is not None:
        cloud = Cloud(_bind(cloud.particles, reference, 0), cloud.log_weights, cloud.log_evidence)
    visited, parents, ess = [cloud.particles], [], []
    for t in range(steps):
        ancestors = _ancestors(model, t, cloud, reference, ancestor_sampling, data, rng)
        old = take(cloud.particles, ancestors)
        new = mover(t, old, data, rng=rng)
        if reference is not None:
            new = _bind(new, reference, t + 1)
        log_increments = increments(model, t, old, new, data, proposal=proposal)
        equal = torch.full_like(cloud.log_weights, -torch.log(torch.tensor(float(n))).item())
        cloud = reweight(Cloud(new, equal, cloud.log_evidence), log_increments, step=t)
        visited.append(new)
        parents.append(ancestors)
        ess.append(cloud.ess)
    last = multinomial(cloud.weights, 1, rng)
    path, renewed = _trace(visited, parents, last, n)
    if reference is None:
        renewed = torch.ones_like(renewed)
    return Sweep(path, cloud.log_evidence, torch.stack(ess), renewed)


def _bind(particles: Particles, reference: Particles, position: int) -> Particles:
    """Put the reference's particle number ``position`` into the last slot."""
    return put_last(particles, take(reference, torch.tensor([position])))


def _ancestors(
    model: Any,
    t: int,
    cloud: Cloud,
    reference: Particles | None,
    ancestor_sampling: bool,
    data: Any,
    rng: torch.Generator,
) -> Tensor:
    """Ancestors [particle] of step ``t``; the last slot belongs to the reference."""
    n = cloud.n
    if t == 0:
        return torch.arange(n, device=cloud.log_weights.device)
    if reference is None:
        return multinomial(cloud.weights, n, rng)
    if ancestor_sampling:
        one = take(reference, torch.tensor([t + 1]))
        own = backward_draws(model, t, cloud, one, 1, data, exact=True, rng=rng).ancestors[0]
    else:
        own = torch.tensor([n - 1], device=cloud.log_weights.device)
    return torch.cat([multinomial(cloud.weights, n - 1, rng), own])


def _trace(
    visited: list[Particles], parents: list[Tensor], index: Tensor, n: int
) -> tuple[Particles, Tensor]:
    """Follow particle ``index`` [1] back, and tell where it is not in the last slot."""
    path, free = [take(visited[-1], index)], [index != n - 1]
    for particles, ancestors in zip(visited[-2::-1], parents[::-1], strict=True):
        index = ancestors[index]
        path.append(take(particles, index))
        free.append(index != n - 1)
    return join(path[::-1]), torch.cat(free[-2::-1])


@storable
@dataclass(frozen=True)
class ParticleGibbs(Sampler):
    """Draw state paths by conditional sequential Monte Carlo.

    Every sweep runs ``n`` particles of which one follows the last path, and draws the next path.
    The draws have the exact posterior as their stationary law for every ``n >= 2``; more particles
    mix faster.

    Args:
        n: Particles, the reference included.
        draws: Paths to keep in each chain.
        warmup: Sweeps to drop first. The chain starts from an ordinary particle filter.
        ancestor_sampling: Draw anew which particle the reference continues; the early steps of
            long series hardly move without it. Needs ``log_transition``.
        guided: Move by the model's ``propose``; a proposal given as ``infer(guide=)`` does the
            same.

    Returns (through ``infer``):
        Draws of site "path" [chain, draw, step, *] (named tensors keep their names); for particles
        that are other objects, a population of the last particle of each path. ``sample_stats``
        hold ``renewed`` [chain, draw, step], whether a step of the path changed hands, and ``ess``.

    Example:
        >>> from probkit import infer
        >>> from probkit.models.state_space import StochasticVolatility
        >>> y = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
        >>> post = infer(StochasticVolatility(), y, ParticleGibbs(5, draws=20, warmup=0), rng=0)
        >>> post.draws["path"].shape
        torch.Size([1, 20, 3])
    """

    n: int = 20
    draws: int = 1000
    warmup: int = 100
    ancestor_sampling: bool = True
    guided: bool = False

    needs = ("sites", "steps", "start", "extend", "log_weight")
    accepts_guide = True

    def __post_init__(self) -> None:
        check_count("ParticleGibbs", n=self.n, least=2)
        check_count("ParticleGibbs", draws=self.draws)
        check_count("ParticleGibbs", warmup=self.warmup, least=0)

    def total(self) -> int:
        """Number of sweeps."""
        return 1 + self.warmup + self.draws

    def _sweep(self, problem: Problem, reference: Any, rng: torch.Generator) -> Sweep:
        with torch.no_grad():
            return conditional_sweep(
                problem.model,
                problem.data,
                self.n,
                reference,
                ancestor_sampling=self.ancestor_sampling,
                proposal=find_proposal(problem, self.guided, "ParticleGibbs"),
                rng=rng,
            )

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Check what the options need."""
        number_of_steps(problem.model, problem.data)
        find_proposal(problem, self.guided, "ParticleGibbs")
        if self.ancestor_sampling:
            needs_transition(
                problem.model,
                "ParticleGibbs(ancestor_sampling=True)",
                "Use ancestor_sampling=False",
            )
        return {"sweep": 0, "reference": None, "objects": []}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one sweep."""
        sweep = self._sweep(problem, state["reference"], rngs[0])
        done = state["sweep"] + 1
        keep, objects = None, state["objects"]
        if done > 1 + self.warmup:
            steps = torch.arange(1, len(sweep.renewed) + 1, device=sweep.ess.device)
            if is_tensors(sweep.path):
                keep = map_tensors(
                    lambda tensor: tensor[None, None], named(take(sweep.path, steps), "path")
                )
                keep = {"path": keep}
            else:
                keep = {}
                objects = [*objects, *_as_list(take(sweep.path, steps[-1:]))]
            keep["renewed"] = sweep.renewed[None, None]
            keep["ess"] = sweep.ess[None, None]
        state = {"sweep": done, "reference": sweep.path, "objects": objects}
        info = {"renewed": float(sweep.renewed.double().mean()), "ess": float(sweep.ess.mean())}
        return Step(state, done >= self.total(), keep, info)

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Collect the paths."""
        draws = int(kept["renewed"].shape[1])
        if "path" in kept:
            source: Any = Draws(kept["path"])
        else:
            weights = torch.full((1, draws), 1.0 / draws, dtype=torch.float64).log()
            source = Population([state["objects"][:draws]], weights)
        stats = {"renewed": kept["renewed"], "ess": kept["ess"]}
        return make_posterior(problem, source, sample_stats=stats)


def _as_list(particles: Particles) -> list[Any]:
    """The single particle of a population that is no tensor, in a list."""
    if isinstance(particles, list):
        return particles
    from probkit.inference.smc.filters import rows

    return rows(particles, 1)


def check_local(model: Any, who: str) -> None:
    """Check that the weights of ``model`` look at new states only.

    Raises:
        CapabilityError: The model does not declare it.
    """
    if not getattr(model, "local_weights", False):
        raise CapabilityError(
            f"{who} needs weights that look at the new state only; {type(model).__name__} does not "
            "declare local_weights = True"
        )


def check_functional(functional: Any, model: Any, who: str) -> Any:
    """Return the additive functional: the one given, else the model's ``additive``.

    Raises:
        DataError: There is none.
    """
    chosen = functional if functional is not None else getattr(model, "additive", None)
    if not callable(chosen):
        raise DataError(
            f"{who}: expected functional=h(t, old, new, data) -> [n, *out], got "
            f"{functional!r}, and {type(model).__name__} has no method additive"
        )
    return chosen
