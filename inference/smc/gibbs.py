"""Particle Gibbs: a Markov chain of whole state paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference.smc import hooks
from probkit.inference.smc.backward import backward_draws, needs_transition
from probkit.inference.smc.cloud import Cloud, ExtinctionError, increments, reweight, spawn
from probkit.inference.smc.filters import (
    check_count,
    cost_stats,
    find_proposal,
    from_tree,
    named,
    named_costs,
    number_of_steps,
    to_tree,
)
from probkit.inference.smc.particles import Particles, count, is_tensors, join, put_last, take
from probkit.inference.smc.resampling import multinomial
from probkit.posterior import Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws, Population
from probkit.tree import Tree, map_tensors

__all__ = ["ParticleGibbs", "Sweep", "SweepEnded", "conditional_sweep"]


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


class SweepEnded(Exception):
    """A sweep that could not be brought to its end.

    Attributes:
        viable: The last weighted cloud.
        reason: Why, in words.
    """

    def __init__(self, reason: str, viable: Cloud) -> None:
        super().__init__(reason)
        self.reason, self.viable = reason, viable


def conditional_sweep(
    model: Any,
    data: Any,
    n: int,
    reference: Particles | None,
    *,
    ancestor_sampling: bool = True,
    proposal: Any = None,
    stop: Callable[[], str] | None = None,
    rng: torch.Generator,
) -> Sweep:
    """Run ``n`` particles, one of them bound to ``reference``, and draw a path by final weights.

    With a reference this is a Markov kernel that leaves the posterior of paths invariant for every
    n >= 2 (Andrieu, Doucet & Holenstein 2010). Ancestor sampling draws anew, at every step, which
    particle the rest of the reference continues (Lindsten, Jordan & Schoen 2014).

    Particles that hold their whole past (partial answers) need two hooks for that,
    ``log_future(t, particles, path, data)``: the log of transitions and potentials of the path's
    steps after ``t`` if they followed each particle; and ``graft(t, particle, path, data)``: the
    path with its beginning replaced by a particle's. A sweep ends as soon as the model says that
    all particles are finished; what follows in the path repeats its last entry.

    Args:
        model: A ``Sequential`` model.
        data: The data.
        n: Particles, the reference included.
        reference: A path as :class:`Sweep` returns it; None runs an ordinary filter.
        ancestor_sampling: Needs ``log_transition``.
        proposal: As in :func:`probkit.inference.smc.extend`.
        stop: Asked before every step; what it returns, unless empty, ends the sweep.
        rng: Stream.

    Returns:
        The sweep.

    Raises:
        ExtinctionError: All particles died (only without a reference).
        SweepEnded: The same for models that report it, or the sweep could not go on.
    """
    steps = number_of_steps(model, data)
    cloud = spawn(model, n, data, rng=rng)
    if reference is not None:
        cloud = Cloud(_bind(cloud.particles, reference, 0), cloud.log_weights, cloud.log_evidence)
    visited, parents, ess = [cloud.particles], [], []
    for t in range(steps):
        if stop is not None and (reason := stop()):
            raise SweepEnded(reason, cloud)
        ancestors = _ancestors(model, t, cloud, reference, ancestor_sampling, data, rng)
        if reference is not None and t > 0 and hooks.grafts(model):
            heir = take(cloud.particles, ancestors[-1:])[0]
            reference = model.graft(t, heir, reference, data)
        old = take(cloud.particles, ancestors)
        new = _moved(model, t, old, reference, data, proposal, rng)
        if reason := hooks.interrupted(model, new):
            raise SweepEnded(reason, cloud)
        log_increments = increments(model, t, old, new, data, proposal=proposal)
        equal = torch.full_like(cloud.log_weights, -torch.log(torch.tensor(float(n))).item())
        before = cloud
        try:
            cloud = reweight(Cloud(new, equal, cloud.log_evidence), log_increments, step=t)
        except ExtinctionError as error:
            if not hooks.reports_extinction(model):
                raise
            raise SweepEnded(f"extinct: {error}", before) from None
        visited.append(new)
        parents.append(ancestors)
        ess.append(cloud.ess)
        if hooks.all_finished(model, new):
            break
    last = multinomial(cloud.weights, 1, rng)
    path, renewed = _trace(visited, parents, last, n)
    if reference is None:
        renewed = torch.ones_like(renewed)
    missing = steps - len(ess)
    if missing > 0:
        path = join([path, *[_rest(model, len(ess), path, data, rng)] * missing])
        renewed = torch.cat([renewed, renewed[-1:].expand(missing)])
    return Sweep(path, cloud.log_evidence, torch.stack(ess + ess[-1:] * missing), renewed)


def _moved(
    model: Any,
    t: int,
    old: Particles,
    reference: Particles | None,
    data: Any,
    proposal: Any,
    rng: torch.Generator,
) -> Particles:
    """Particles after step ``t``, the reference's in the last slot."""
    mover = model.extend if proposal is None else proposal.propose
    if reference is None:
        return mover(t, old, data, rng=rng)
    if hooks.grafts(model):  # lists of objects; the slot of the reference need not be drawn
        return [*mover(t, old[:-1], data, rng=rng), reference[t + 1]]
    return _bind(mover(t, old, data, rng=rng), reference, t + 1)


def _rest(model: Any, t: int, path: Particles, data: Any, rng: torch.Generator) -> Particles:
    """What a finished path's last particle is after further steps."""
    last = take(path, torch.tensor([count(path) - 1]))
    return model.extend(t, last, data, rng=rng)


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
    if ancestor_sampling and hooks.grafts(model):
        log_future = model.log_future(t, cloud.particles, reference, data)
        if bool(log_future[-1].isfinite()):
            own = multinomial(torch.softmax(cloud.log_weights + log_future, 0), 1, rng)
        else:
            # Its own past could not be scored (a server may fail): the reference keeps it. Without
            # it among them, a draw from the others would not leave the target as it is.
            own = torch.tensor([n - 1], device=cloud.log_weights.device)
    elif ancestor_sampling:
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
        Models with a meter add ``cost_*`` [chain, draw], ``attrs["usage"]`` and
        ``attrs["stopped"]``; chains that a budget ended are filled up with particles of weight
        zero.

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

    def _sweep(self, problem: Problem, reference: Any, stop: Any, rng: torch.Generator) -> Sweep:
        with torch.no_grad():
            return conditional_sweep(
                problem.model,
                problem.data,
                self.n,
                reference,
                ancestor_sampling=self.ancestor_sampling,
                proposal=find_proposal(problem, self.guided, "ParticleGibbs"),
                stop=stop,
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
        if hooks.grafts(problem.model) and self.ancestor_sampling:
            problem.model.require_future("ParticleGibbs(ancestor_sampling=True)")
        return {"sweep": 0, "reference": None, "objects": [], "spent": {}, "ended": ""}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one sweep."""
        model = problem.model
        if limit := hooks.exhausted(model, state["spent"]):  # only before the first sweep
            return self.without_draws(problem, state, f"budget: {limit}", rngs[0])
        before = hooks.metered(model)
        stop = stop_of(model, state["spent"], before)
        try:
            sweep = self._sweep(problem, state["reference"], stop, rngs[0])
        except SweepEnded as end:
            return self.ended(state, end, hooks.spent_since(model, before))
        cost = hooks.spent_since(model, before)
        return self.after(problem, state, sweep, cost_stats(cost), cost)

    def after(
        self,
        problem: Problem,
        state: Tree,
        sweep: Sweep,
        stats: Mapping[str, Tensor],
        cost: Mapping[str, float],
    ) -> Step:
        """Keep a sweep's path past the warm-up, and see whether the run is complete."""
        done = state["sweep"] + 1
        keep, objects = None, state["objects"]
        if done > 1 + self.warmup:
            keep, last = _kept(sweep)
            keep |= stats
            objects = [*objects, *last]
        spent = _sum(state["spent"], cost)
        limit = hooks.exhausted(problem.model, spent) if done < self.total() else None
        state = {
            **state,
            "sweep": done,
            "reference": sweep.path,
            "objects": objects,
            "spent": spent,
            "ended": f"budget: {limit}" if limit else "",
        }
        info = {"renewed": float(sweep.renewed.double().mean()), "ess": float(sweep.ess.mean())}
        return Step(state, done >= self.total() or limit is not None, keep, info)

    def ended(self, state: Tree, end: SweepEnded, cost: Mapping[str, float]) -> Step:
        """Start once more after an extinction in the warm-up; else end the run."""
        done = state["sweep"] + 1
        spent = _sum(state["spent"], cost)
        state = {**state, "sweep": done, "spent": spent, "viable": to_tree(end.viable)}
        if end.reason.startswith("extinct") and done <= self.warmup:
            return Step(state, False)  # there is no reference yet
        return Step({**state, "ended": end.reason}, True)

    def without_draws(
        self, problem: Problem, state: Tree, reason: str, rng: torch.Generator
    ) -> Step:
        """End a run before its first sweep."""
        cloud = spawn(problem.model, self.n, problem.data, rng=rng)
        return Step({**state, "ended": reason, "viable": to_tree(cloud)}, True)

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Collect the paths."""
        if kept is not None and "path" in kept:
            stats = {name: value for name, value in kept.items() if name != "path"}
            stats = named_costs(stats, state["spent"])
            return make_posterior(problem, Draws(kept["path"]), sample_stats=stats)
        if kept is None:
            kept = no_stats(state, number_of_steps(problem.model, problem.data))
        objects, log_weights = _population(state, int(kept["ess"].shape[1]))
        stats = named_costs(kept, state["spent"])
        attrs: dict[str, Any] = {}
        if hooks.can_finish_early(problem.model):  # chains may differ in length: fill them up
            size = max(self.draws, self.n)
            missing = size - len(objects)
            objects = [*objects, *[objects[-1]] * missing]
            nothing = log_weights.new_full((missing,), -torch.inf)
            log_weights = torch.cat([log_weights, nothing])
            stats = {name: _filled(value, size) for name, value in stats.items()}
            attrs = {"usage": (dict(state["spent"]),), "stopped": (state["ended"],)}
        source = Population([objects], log_weights.unsqueeze(0))
        return make_posterior(problem, source, sample_stats=stats, attrs=attrs)

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Cut chains of objects to the longest one."""
        source = posterior.source
        if not isinstance(source, Population) or not hooks.can_finish_early(problem.model):
            return posterior
        used = int((source.log_weights > -torch.inf).any(0).nonzero().max()) + 1
        cut = Population([chain[:used] for chain in source.particles], source.log_weights[:, :used])
        stats = {name: value[:, :used] for name, value in posterior.sample_stats.items()}
        return replace(posterior, source=cut, sample_stats=stats)


def _kept(sweep: Sweep) -> tuple[dict[str, Any], list[Any]]:
    """What to keep of a sweep: draws and statistics, and the last particle of an object path."""
    steps = torch.arange(1, len(sweep.renewed) + 1, device=sweep.ess.device)
    stats = {"renewed": sweep.renewed[None, None], "ess": sweep.ess[None, None]}
    if not is_tensors(sweep.path):
        return stats, _as_list(take(sweep.path, steps[-1:]))
    path = map_tensors(lambda tensor: tensor[None, None], named(take(sweep.path, steps), "path"))
    return {"path": path, **stats}, []


def stop_of(model: Any, spent: Mapping[str, float], before: Mapping[str, float]) -> Any:
    """Return what tells, between two steps, which limit a chain has reached.

    Args:
        model: The model.
        spent: What the chain had spent when the sweep began.
        before: The model's meter then.
    """
    if not callable(getattr(model, "exhausted", None)):
        return None

    def stop() -> str:
        limit = hooks.exhausted(model, _sum(spent, hooks.spent_since(model, before)))
        return f"budget: {limit}" if limit else ""

    return stop


def _sum(spent: Mapping[str, float], cost: Mapping[str, float]) -> dict[str, float]:
    return {name: spent.get(name, 0) + value for name, value in cost.items()}


def _population(state: Tree, draws: int) -> tuple[list[Any], Tensor]:
    """The last particles of the kept paths, equally weighted.

    A run that ended before the first of them gives the last path, or the particles of the sweep
    that ended it, by their weights.
    """
    objects = state["objects"][:draws]
    if not objects and state["reference"] is not None:
        objects = _as_list(take(state["reference"], torch.tensor([count(state["reference"]) - 1])))
    if not objects:
        cloud = from_tree(state["viable"])
        return list(cloud.particles), cloud.log_weights
    share = 1.0 / len(objects)
    return objects, torch.full((len(objects),), share, dtype=torch.float64).log()


def no_stats(state: Tree, steps: int) -> dict[str, Tensor]:
    """Statistics of no draws."""
    costs = {name: 0.0 for name in state["spent"]}
    return {
        "renewed": torch.zeros(1, 0, steps, dtype=torch.bool),
        "ess": torch.zeros(1, 0, steps, dtype=torch.float64),
        **named_costs({name: value[:, :0] for name, value in cost_stats(costs).items()}, costs),
    }


def _filled(stat: Tensor, size: int) -> Tensor:
    """Fill a statistic [chain, draw, *] up with zeros."""
    missing = stat.new_zeros((stat.shape[0], size - stat.shape[1], *stat.shape[2:]))
    return torch.cat([stat, missing], 1)


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
