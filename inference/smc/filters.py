"""Particle filters: bootstrap and guided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference.smc import hooks
from probkit.inference.smc.cloud import Cloud, ExtinctionError, extend, resample, reweight, spawn
from probkit.inference.smc.entropic import Entropic, tempered_resample
from probkit.inference.smc.genealogy import paths, record, survivors
from probkit.inference.smc.particles import Particles, is_tensors
from probkit.inference.smc.resampling import Resampler, resolve
from probkit.model import lacks
from probkit.posterior import Evidence, Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws, Population
from probkit.tree import Tree, map_tensors

__all__ = ["ParticleFilter", "filter_step", "log_evidence_estimate", "number_of_steps"]

GUIDED = ("propose", "log_proposal", "log_transition")


def filter_step(
    model: Any,
    t: int,
    cloud: Cloud,
    data: Any,
    *,
    resampler: str | Resampler = "systematic",
    ess_threshold: float = 0.5,
    proposal: Any = None,
    tempering: Entropic | None = None,
    rng: torch.Generator,
) -> tuple[Cloud, Tensor | None]:
    """Resample where needed, extend by step ``t``, reweight.

    Returns:
        The cloud after the step, and the ancestors [particle] (None where nothing was resampled).
    """
    ancestors: Tensor | None
    progress = 0.0 if tempering is None else t / number_of_steps(model, data)
    if tempering is not None and tempering.applies(cloud, progress):
        temperature = tempering.temperature(cloud, progress)
        cloud, ancestors = tempered_resample(cloud, resampler, temperature, rng=rng)
    else:
        cloud, ancestors = resample(cloud, resampler, rng=rng, threshold=ess_threshold)
    new, log_increments = extend(model, t, cloud.particles, data, rng=rng, proposal=proposal)
    moved = Cloud(new, cloud.log_weights, cloud.log_evidence)
    return reweight(moved, log_increments, step=t), ancestors


def log_evidence_estimate(
    model: Any,
    data: Any,
    n: int,
    *,
    resampler: str | Resampler = "systematic",
    ess_threshold: float = 0.5,
    rng: torch.Generator,
) -> Tensor:
    """Run one bootstrap filter and return the log of its unbiased evidence estimate, a scalar.

    Minus infinity where all particles died.
    """
    cloud = spawn(model, n, data, rng=rng)
    for t in range(number_of_steps(model, data)):
        try:
            cloud, _ = filter_step(
                model,
                t,
                cloud,
                data,
                resampler=resampler,
                ess_threshold=ess_threshold,
                rng=rng,
            )
        except ExtinctionError:
            return torch.full_like(cloud.log_evidence, -torch.inf)
    return cloud.log_evidence


def number_of_steps(model: Any, data: Any) -> int:
    """Return the number of steps of a ``Sequential`` model.

    Raises:
        DataError: There is none.
    """
    steps = int(model.steps(data))
    if steps < 1:
        raise DataError(
            f"{type(model).__name__}: expected data of at least one step, got {steps} steps"
        )
    return steps


def find_proposal(problem: Problem, guided: bool, sampler: str) -> Any:
    """Return who proposes: the guide, the model itself when ``guided``, or None (bootstrap).

    Raises:
        CapabilityError: The proposal, or the model's transition density, is not there.
    """
    model, guide = problem.model, problem.guide
    if guide is None and not guided:
        return None
    proposal = model if guide is None else guide
    missing = [*lacks(proposal, GUIDED[:2]), *lacks(model, GUIDED[2:])]
    if missing:
        raise CapabilityError(
            f"a guided {sampler} needs propose and log_proposal (model or guide) and the model's "
            f"log_transition; {type(proposal).__name__} on {type(model).__name__} lacks "
            f"{', '.join(missing)}. Use guided=False and no guide"
        )
    return proposal


@storable
@dataclass(frozen=True)
class ParticleFilter(Sampler):
    """Sequential importance resampling for ``Sequential`` models.

    The evidence estimate is unbiased for every resampler and threshold. Each chain is an
    independent group of particles, so that ``chains=10`` gives the evidence an error bar
    (:func:`probkit.inference.smc.diagnostics.evidence`).

    Args:
        n: Particles of a group.
        resampler: "systematic", "stratified", "residual", "multinomial", or a function
            (weights, n, rng) -> ancestors.
        ess_threshold: Resample before a step where the effective sample size is below
            ``ess_threshold * n``; 0 is importance sampling, 1 resamples at every step.
        guided: Move by the model's ``propose`` in place of ``extend``. A
            :class:`~probkit.inference.smc.Proposal` given as ``infer(guide=)`` does the same.
        paths: Return whole trajectories, traced back through the ancestry, in place of the
            particles of the last step.
        ancestry: Remember who descends from whom, for the statistic ``unique_ancestors``.
        tempering: Soften early resampling (:class:`~probkit.inference.smc.Entropic`); the estimates
            stay unbiased.

    A model may tell when its particles are finished, what they cost, and that a budget is used up
    (:mod:`probkit.inference.smc.hooks`); the run then ends early. Traces of chains that ended
    before the longest one repeat their last value (costs: zero).

    Returns (through ``infer``):
        Weighted particles. Tensors and lists of objects as a ``Population``; named tensors and
        ``paths`` (site "path" [chain, particle, step, *]) as weighted draws. ``sample_stats`` hold
        ``ess``, ``log_evidence_trace``, ``resampled`` and ``unique_ancestors``, all [chain, step];
        for models that may end early also ``steps_taken`` [chain] and ``extinct_at`` [chain] (the
        step at which all particles died, -1 where they did not), and ``cost_*`` [chain, step] for
        metered ones. ``attrs["stopped"]`` and ``attrs["usage"]`` then have an entry for each chain.

    Example:
        >>> from probkit import infer
        >>> from probkit.models.state_space import StochasticVolatility
        >>> y = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
        >>> post = infer(StochasticVolatility(), y, ParticleFilter(100), rng=0, chains=2)
        >>> post.log_weights.shape, post.log_evidence.value.shape
        (torch.Size([2, 100]), torch.Size([2]))
    """

    n: int = 1000
    resampler: str | Resampler = "systematic"
    ess_threshold: float = 0.5
    guided: bool = False
    paths: bool = False
    ancestry: bool = True
    tempering: Entropic | None = None

    needs = ("sites", "steps", "start", "extend", "log_weight")
    accepts_guide = True

    def __post_init__(self) -> None:
        check_count("ParticleFilter", n=self.n)
        check_share("ParticleFilter", ess_threshold=self.ess_threshold)
        resolve(self.resampler)
        if not isinstance(self.tempering, Entropic | None):
            raise DataError(
                f"ParticleFilter: expected tempering=Entropic(...) or None, got {self.tempering!r}"
            )

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Start the particles."""
        number_of_steps(problem.model, problem.data)
        find_proposal(problem, self.guided, "ParticleFilter")
        with torch.no_grad():
            cloud = spawn(problem.model, self.n, problem.data, rng=rngs[0])
        if self.paths and not is_tensors(cloud.particles):
            raise CapabilityError(
                "ParticleFilter(paths=True) needs tensor particles; objects can carry their own "
                "history: leave out paths"
            )
        return {"t": 0, "cloud": to_tree(cloud), "genealogy": [], "spent": {}, "extinct_at": -1}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one step of the model."""
        model, t, extinct_at = problem.model, state["t"], -1
        viable = from_tree(state["cloud"])
        ancestors: Tensor | None = None
        if hooks.exhausted(model, state["spent"]) is not None:  # only before the first step
            cloud, cost = viable, dict.fromkeys(hooks.metered(model), 0.0)
        else:
            before = hooks.metered(model)
            with torch.no_grad():
                try:
                    cloud, ancestors = self._advance(problem, t, viable, rngs[0])
                except ExtinctionError:
                    if not hooks.reports_extinction(model):
                        raise
                    cloud, extinct_at = _extinct(viable), t
            cost = hooks.spent_since(model, before)
        genealogy = state["genealogy"]
        if self.ancestry or self.paths:
            values = cloud.particles if self.paths else None
            genealogy = record(genealogy, self.n, ancestors, values)
        spent = {name: state["spent"].get(name, 0) + value for name, value in cost.items()}
        done = (
            t + 1 >= number_of_steps(model, problem.data)
            or extinct_at >= 0
            or hooks.all_finished(model, cloud.particles)
            or hooks.exhausted(model, spent) is not None
        )
        keep = {**step_stats(cloud, ancestors is not None), **cost_stats(cost)}
        state = {
            "t": t + 1,
            "cloud": to_tree(cloud),
            "genealogy": genealogy,
            "spent": spent,
            "extinct_at": extinct_at,
        }
        return Step(state, done, keep, {"ess": float(cloud.ess)})

    def _advance(
        self, problem: Problem, t: int, cloud: Cloud, rng: torch.Generator
    ) -> tuple[Cloud, Tensor | None]:
        return filter_step(
            problem.model,
            t,
            cloud,
            problem.data,
            resampler=self.resampler,
            ess_threshold=self.ess_threshold,
            proposal=find_proposal(problem, self.guided, "ParticleFilter"),
            tempering=self.tempering,
            rng=rng,
        )

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Collect the weighted particles and the traces."""
        cloud = from_tree(state["cloud"])
        stats = named_costs(kept, state["spent"])
        if self.ancestry or self.paths:
            stats["unique_ancestors"] = survivors(state["genealogy"]).unsqueeze(0)
        if self.paths:
            source: Any = weighted_draws(paths(state["genealogy"]), "path", cloud.log_weights)
        else:
            source = population_source(cloud)
        dims = trace_dims(stats)
        attrs: dict[str, Any] = {}
        if hooks.can_finish_early(problem.model):
            steps = number_of_steps(problem.model, problem.data)
            stats = {name: padded(name, value, steps) for name, value in stats.items()}
            stats["steps_taken"] = torch.tensor([state["t"]])
            stats["extinct_at"] = torch.tensor([state["extinct_at"]])
            attrs["stopped"] = (_why(problem.model, state, cloud),)
        if state["spent"]:
            attrs["usage"] = (dict(state["spent"]),)
        return make_posterior(
            problem,
            source,
            log_evidence=Evidence(cloud.log_evidence.reshape(1), "estimate"),
            sample_stats=stats,
            stat_dims=dims,
            attrs=attrs,
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Cut the traces to the longest chain, where chains may end early."""
        stats = dict(posterior.sample_stats)
        if "steps_taken" not in stats:
            return posterior
        longest = int(stats["steps_taken"].max())
        for name, dims in trace_dims(stats).items():
            if dims[0] == "step":
                stats[name] = stats[name][:, :longest]
        return replace(posterior, sample_stats=stats)


def _extinct(viable: Cloud) -> Cloud:
    """The last particles with weight, and evidence zero."""
    nothing = torch.full_like(viable.log_evidence, -torch.inf)
    dead = Cloud(viable.particles, viable.log_weights, nothing)
    vars(dead)["ess"] = torch.zeros_like(viable.log_evidence)
    return dead


def _why(model: Any, state: Tree, cloud: Cloud) -> str:
    """Say why a chain ended before all of its particles were finished; empty where they are."""
    if state["extinct_at"] >= 0:
        return f"extinct: every particle has weight zero after step {state['extinct_at']}"
    limit = hooks.exhausted(model, state["spent"])
    if limit is not None and not hooks.all_finished(model, cloud.particles):
        return f"budget: {limit}"
    return hooks.state_of(model, cloud.particles)


# --------------------------------------------------------------------------- shared by samplers


def step_stats(cloud: Cloud, resampled: bool) -> dict[str, Tensor]:
    """Statistics of one filter step, each [chain=1, step=1]."""
    return {
        "ess": cloud.ess.reshape(1, 1),
        "log_evidence_trace": cloud.log_evidence.reshape(1, 1),
        "resampled": torch.full((1, 1), resampled, device=cloud.log_weights.device),
    }


def cost_stats(cost: Mapping[str, float]) -> dict[str, Tensor]:
    """Costs of one step in one tensor [chain=1, step=1, cost]; nothing for models without a meter.

    One tensor in place of many keeps the overhead of a step low; :func:`named_costs` takes it
    apart.
    """
    if not cost:
        return {}
    return {"cost": torch.tensor([[list(cost.values())]], dtype=torch.float64)}


def named_costs(stats: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Replace the statistic "cost" by one [chain, step] for each name; seconds are left out.

    Time differs between equal runs, and all statistics are to be equal.
    """
    rest = {name: value for name, value in stats.items() if name != "cost"}
    columns = zip(names, stats["cost"].unbind(-1), strict=True) if "cost" in stats else ()
    return rest | {f"cost_{name}": column for name, column in columns if name != "seconds"}


def padded(name: str, trace: Tensor, steps: int) -> Tensor:
    """Fill a trace [chain, step, *] up to ``steps`` with its last value; a cost with zeros."""
    missing = steps - trace.shape[1]
    if missing <= 0:
        return trace
    last = trace[:, -1:].expand(-1, missing, *trace.shape[2:])
    return torch.cat([trace, torch.zeros_like(last) if name.startswith("cost_") else last], 1)


def trace_dims(stats: Mapping[str, Tensor], along: str = "step") -> dict[str, tuple[str, ...]]:
    """Name the dims after the chain of traces [chain, step, *rest], for the export."""
    return {
        name: (along, *(f"{name}_dim_{i}" for i in range(value.ndim - 2)))
        for name, value in stats.items()
        if value.ndim >= 2
    }


def to_tree(cloud: Cloud) -> Tree:
    """Write a cloud as a tree, for sampler states."""
    return {
        "particles": cloud.particles,
        "log_weights": cloud.log_weights,
        "log_evidence": cloud.log_evidence,
        "ess": cloud.ess,
    }


def from_tree(tree: Tree) -> Cloud:
    """Rebuild a cloud from :func:`to_tree`."""
    cloud = Cloud(tree["particles"], tree["log_weights"], tree["log_evidence"])
    vars(cloud)["ess"] = tree["ess"]  # fills the cached property
    return cloud


def population_source(cloud: Cloud) -> Draws | Population:
    """Wrap the particles of one chain: named tensors as draws, anything else as a population."""
    particles = cloud.particles
    if isinstance(particles, Mapping) and is_tensors(particles):
        return weighted_draws(particles, "particle", cloud.log_weights)
    if isinstance(particles, Mapping | tuple):
        particles = rows(particles, cloud.n)
    return Population([particles], cloud.log_weights.unsqueeze(0))


def weighted_draws(particles: Particles, name: str, log_weights: Tensor | None) -> Draws:
    """Wrap tensor particles [particle, *] of one chain as (weighted) draws.

    Named tensors keep their names; others are called ``name`` (tuples ``name_0``, ``name_1``, ...).
    """
    weights = None if log_weights is None else log_weights.unsqueeze(0)
    with_chain = map_tensors(lambda tensor: tensor.unsqueeze(0), named(particles, name))
    return Draws(with_chain, weights)


def named(particles: Particles, name: str) -> dict[str, Any]:
    """Flatten a tree of tensors into one mapping."""
    if isinstance(particles, Mapping):
        return {
            key: value
            for part, inner in particles.items()
            for key, value in named(inner, str(part)).items()
        }
    if isinstance(particles, tuple):
        return {
            key: value
            for number, inner in enumerate(particles)
            for key, value in named(inner, f"{name}_{number}").items()
        }
    return {name: particles}


def rows(particles: Particles, n: int) -> list[Any]:
    """Turn a tree of columns into a list of ``n`` trees, one for each particle."""
    if isinstance(particles, Mapping):
        columns = {key: rows(part, n) for key, part in particles.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(n)]
    if isinstance(particles, tuple):
        return [tuple(row) for row in zip(*(rows(part, n) for part in particles), strict=True)]
    return list(particles)


def check_count(who: str, *, least: int = 1, **counts: int) -> None:
    """Check whole numbers of at least ``least``."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(f"{who}: expected a whole {name} >= {least}, got {value!r}")


def check_share(who: str, **shares: float) -> None:
    """Check numbers between 0 and 1."""
    for name, value in shares.items():
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise DataError(f"{who}: expected 0 <= {name} <= 1, got {value!r}")
