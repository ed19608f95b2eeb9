"""PaRIS: smoothed expectations of additive functionals, step by step, at linear cost.

The functional is h_0(x_0) + sum_t h_t(x_(t-1), x_t). Every particle carries tau, an estimate of the
functional's expectation given that the path ends in it; a few backward draws update tau in each
step, so no path is stored and none degenerates (Olsson & Westerborn 2017). The Parisian particle
Gibbs sampler repeats this around a reference path and so removes the bias of a small number of
particles geometrically (Cardoso et al. 2023).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError, NumericsWarning, ShapeError
from probkit.files import storable
from probkit.inference.smc.backward import BackwardDraws, backward_draws, needs_transition
from probkit.inference.smc.cloud import Cloud, reweight, spawn
from probkit.inference.smc.filters import (
    check_count,
    check_share,
    filter_step,
    find_proposal,
    from_tree,
    named,
    number_of_steps,
    population_source,
    step_stats,
    to_tree,
    trace_dims,
)
from probkit.inference.smc.gibbs import check_functional, check_local
from probkit.inference.smc.particles import Particles, is_tensors, join, take
from probkit.inference.smc.resampling import Resampler, multinomial, resolve
from probkit.posterior import Evidence, Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws, Population
from probkit.tree import Tree, map_tensors

__all__ = ["Functional", "PPG", "PaRIS", "Smoothed", "paris_update", "smooth"]

Functional = Callable[[int, Any, Any, Any], Tensor]


def first_update(functional: Functional, old: Particles, new: Particles, data: Any) -> Tensor:
    """Return tau [particle, *out] after step 0, of pairs that belong together."""
    return _checked(functional(0, old, new, data), len_of=new)


def paris_update(
    tau: Tensor,
    drawn: Tensor,
    functional: Functional,
    t: int,
    old: Particles,
    new: Particles,
    data: Any,
) -> Tensor:
    """Return tau [new, *out]: the mean of tau_J + h_t(x_J, x') over the backward draws J.

    Args:
        tau: [old, *out].
        drawn: [new, draw] positions among ``old``.
        functional: h(t, old, new, data) of pairs, [n, *out].
        t: The step.
        old: Particles before it.
        new: Particles after it.
        data: The data.
    """
    n, draws = drawn.shape
    flat = drawn.flatten()
    owner = torch.arange(n, device=flat.device).repeat_interleave(draws)
    added = _checked(functional(t, take(old, flat), take(new, owner), data), len_of=flat)
    total = tau.index_select(0, flat) + added
    return total.reshape(n, draws, *tau.shape[1:]).mean(1)


def _checked(values: Tensor, *, len_of: Any) -> Tensor:
    from probkit.inference.smc.particles import count

    n = count(len_of)
    if not isinstance(values, Tensor) or values.ndim < 1 or values.shape[0] != n:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(f"functional: expected values [n={n}, *out] for n pairs, got {got}")
    return values.double()


def weighted_mean(cloud: Cloud, tau: Tensor) -> Tensor:
    """Return sum_i w_i tau_i [*out]."""
    return torch.tensordot(cloud.weights, tau, dims=1)


class Smoothed(NamedTuple):
    """A smoothed additive functional.

    Attributes:
        value: [*out] estimate of the functional's posterior expectation.
        log_evidence: Scalar log evidence estimate.
    """

    value: Tensor
    log_evidence: Tensor


def smooth(
    model: Any,
    data: Any,
    functional: Functional,
    n: int,
    *,
    draws: int = 2,
    resampler: str | Resampler = "systematic",
    ess_threshold: float = 0.5,
    exact: bool | None = None,
    rng: torch.Generator,
) -> Smoothed:
    """Run PaRIS to the end of the data.

    Arguments as for :class:`PaRIS`.
    """
    needs_transition(model, "PaRIS", "Use ParticleFilter(paths=True)")
    cloud = spawn(model, n, data, rng=rng)
    tau = torch.zeros(n)
    for t in range(number_of_steps(model, data)):
        before = cloud
        cloud, _ = filter_step(
            model, t, cloud, data, resampler=resampler, ess_threshold=ess_threshold, rng=rng
        )
        tau, _ = _advance(model, t, before, cloud, tau, functional, draws, data, exact, rng)
    return Smoothed(weighted_mean(cloud, tau), cloud.log_evidence)


def _advance(
    model: Any,
    t: int,
    before: Cloud,
    after: Cloud,
    tau: Tensor,
    functional: Functional,
    draws: int,
    data: Any,
    exact: bool | None,
    rng: torch.Generator,
) -> tuple[Tensor, int]:
    """Update tau by step ``t``; also return the number of transition densities looked at.

    Equally weighted starting particles are not resampled, so in step 0 pairs belong together.
    """
    if t == 0:
        return first_update(functional, before.particles, after.particles, data), 0
    drawn = backward_draws(model, t, before, after.particles, draws, data, exact=exact, rng=rng)
    tau = paris_update(tau, drawn.ancestors, functional, t, before.particles, after.particles, data)
    return tau, drawn.evaluations


@storable
@dataclass(frozen=True)
class PaRIS(Sampler):
    """Smooth an additive functional while filtering.

    Needs ``log_transition``; where the model also has ``log_transition_bound`` (and declares
    ``local_weights``), backward draws are made by accept-reject, at a cost linear in ``n``.

    Args:
        n: Particles.
        functional: h(t, old, new, data) -> [n, *out] of pairs of particles before and after step
            ``t``; in step 0, ``old`` is what ``start`` returned. None takes the model's
            ``additive``.
        draws: Backward draws of each particle. One is no better than following the ancestry: the
            variance then grows with the square of the number of steps.
        resampler: Scheme, as in :class:`ParticleFilter`.
        ess_threshold: As in :class:`ParticleFilter`.
        guided: As in :class:`ParticleFilter`.
        exact: Look at all particles for each backward draw, at a cost quadratic in ``n``; None does
            so for few particles only, and False always tries accept-reject first.

    Returns (through ``infer``):
        The weighted particles of the last step. ``sample_stats`` hold ``smoothed`` [chain, *out],
        the estimate; ``smoothed_trace`` [chain, step, *out], the one after each step; the
        statistics of the filter; and ``backward_evaluations`` [chain, step], the number of
        transition densities looked at.

    Example:
        >>> from probkit import infer
        >>> from probkit.models.state_space import StochasticVolatility
        >>> y = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
        >>> total = PaRIS(100, lambda t, old, new, data: new)
        >>> infer(StochasticVolatility(), y, total, rng=0).sample_stats["smoothed"].shape
        torch.Size([1])
    """

    n: int = 1000
    functional: Functional | None = None
    draws: int = 2
    resampler: str | Resampler = "systematic"
    ess_threshold: float = 0.5
    guided: bool = False
    exact: bool | None = None

    needs = ("sites", "steps", "start", "extend", "log_weight", "log_transition")
    accepts_guide = True

    def __post_init__(self) -> None:
        check_count("PaRIS", n=self.n, draws=self.draws)
        check_share("PaRIS", ess_threshold=self.ess_threshold)
        resolve(self.resampler)

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Start the particles."""
        number_of_steps(problem.model, problem.data)
        find_proposal(problem, self.guided, "PaRIS")
        check_functional(self.functional, problem.model, "PaRIS")
        warn_of_single_draws("PaRIS", self.draws)
        with torch.no_grad():
            cloud = spawn(problem.model, self.n, problem.data, rng=rngs[0])
        return {"t": 0, "cloud": to_tree(cloud), "tau": torch.zeros(self.n)}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Filter by one step, then update tau."""
        t, before = state["t"], from_tree(state["cloud"])
        model, data = problem.model, problem.data
        functional = check_functional(self.functional, model, "PaRIS")
        with torch.no_grad():
            cloud, ancestors = filter_step(
                model,
                t,
                before,
                data,
                resampler=self.resampler,
                ess_threshold=self.ess_threshold,
                proposal=find_proposal(problem, self.guided, "PaRIS"),
                rng=rngs[0],
            )
            tau, evaluations = _advance(
                model,
                t,
                before,
                cloud,
                state["tau"],
                functional,
                self.draws,
                data,
                self.exact,
                rngs[0],
            )
            estimate = weighted_mean(cloud, tau)
        keep = {
            **step_stats(cloud, ancestors is not None),
            "smoothed_trace": estimate[None, None],
            "backward_evaluations": torch.tensor([[evaluations]]),
        }
        state = {"t": t + 1, "cloud": to_tree(cloud), "tau": tau}
        done = t + 1 >= number_of_steps(model, data)
        return Step(state, done, keep, {"ess": float(cloud.ess)})

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Collect the estimate and the traces."""
        cloud = from_tree(state["cloud"])
        return make_posterior(
            problem,
            population_source(cloud),
            log_evidence=Evidence(cloud.log_evidence.reshape(1), "estimate"),
            sample_stats={**kept, "smoothed": kept["smoothed_trace"][:, -1]},
            stat_dims=trace_dims(kept),
        )


def warn_of_single_draws(who: str, draws: int) -> None:
    """Warn that one backward draw degenerates like the ancestry."""
    if draws == 1:
        warnings.warn(
            f"{who}: with draws=1 the estimate degenerates like traced ancestries; use draws=2",
            NumericsWarning,
            stacklevel=6,
        )


# --------------------------------------------------------------------------- particle Gibbs


class ParisianSweep(NamedTuple):
    """What one Parisian sweep leaves.

    Attributes:
        value: [*out] estimate of the smoothed functional.
        path: The next reference, a population of T particles.
        log_evidence: Scalar; unbiased only without a reference.
    """

    value: Tensor
    path: Particles
    log_evidence: Tensor


def parisian_sweep(
    model: Any,
    data: Any,
    n: int,
    functional: Functional,
    reference: Particles | None,
    *,
    draws: int = 2,
    exact: bool | None = None,
    rng: torch.Generator,
) -> ParisianSweep:
    """Run PaRIS with one particle of every step, at a random slot, taken from ``reference``.

    The first backward draw of each particle also extends a path; one of the paths, drawn by final
    weight, is the next reference. That is conditional SMC with backward sampling, so the paths form
    a Markov chain whose stationary law is the posterior.
    """
    cloud = spawn(model, n, data, rng=rng)
    tau = torch.zeros(n)
    visited, parents = [], []
    for t in range(number_of_steps(model, data)):
        before = cloud
        chosen = take(before.particles, multinomial(before.weights, n, rng)) if t else None
        old = before.particles if chosen is None else chosen
        new = model.extend(t, old, data, rng=rng)
        if reference is not None:
            slot = torch.randint(n, (1,), generator=rng, device=rng.device)
            new = _overwrite(new, slot, take(reference, torch.tensor([t])))
        # The weights look at the new state alone, so the pairing with ``old`` does not matter.
        log_increments = model.log_weight(t, old, new, data).double()
        equal = torch.full((n,), -math.log(n), dtype=torch.float64, device=rng.device)
        cloud = reweight(Cloud(new, equal, before.log_evidence), log_increments, step=t)
        drawn = BackwardDraws(torch.arange(n, device=rng.device).unsqueeze(1), 0)
        if t == 0:
            tau = first_update(functional, before.particles, new, data)
        else:
            drawn = backward_draws(model, t, before, new, draws, data, exact=exact, rng=rng)
            tau = paris_update(tau, drawn.ancestors, functional, t, before.particles, new, data)
        visited.append(new)
        parents.append(drawn.ancestors[:, 0])
    last = multinomial(cloud.weights, 1, rng)
    return ParisianSweep(
        weighted_mean(cloud, tau), _trace(visited, parents, last), cloud.log_evidence
    )


def _overwrite(particles: Particles, slot: Tensor, one: Particles) -> Particles:
    """Put the single particle ``one`` at ``slot`` [1]."""
    from probkit.inference.smc.particles import count

    n = count(particles)
    index = torch.arange(n, device=slot.device)
    index[slot] = n
    return take(join([particles, one]), index)


def _trace(visited: list[Particles], parents: list[Tensor], index: Tensor) -> Particles:
    path = []
    for particles, ancestors in zip(visited[::-1], parents[::-1], strict=True):
        path.append(take(particles, index))
        index = ancestors[index]
    return join(path[::-1])


@storable
@dataclass(frozen=True)
class PPG(Sampler):
    """Parisian particle Gibbs: smoothed functionals whose bias falls with every sweep.

    Args:
        n: Particles, the reference included.
        functional: As in :class:`PaRIS`; ``old`` of step 0 carries no information here.
        draws: Backward draws of each particle.
        sweeps: Sweeps to keep in each chain.
        warmup: Sweeps to drop first; a handful removes the bias.
        exact: As in :class:`PaRIS`.

    Returns (through ``infer``):
        Draws of the reference path, site "path" [chain, draw, step, *] (objects: a population of
        the last particles). ``sample_stats`` hold ``smoothed_trace`` [chain, draw, *out], the
        estimate of each sweep, and ``smoothed`` [chain, *out], their mean.

    Example:
        >>> from probkit import infer
        >>> from probkit.models.state_space import StochasticVolatility
        >>> y = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
        >>> total = PPG(10, lambda t, old, new, data: new, sweeps=5)
        >>> infer(StochasticVolatility(), y, total, rng=0).sample_stats["smoothed"].shape
        torch.Size([1])
    """

    n: int = 50
    functional: Functional | None = None
    draws: int = 2
    sweeps: int = 100
    warmup: int = 10
    exact: bool | None = None

    needs = ("sites", "steps", "start", "extend", "log_weight", "log_transition")

    def __post_init__(self) -> None:
        check_count("PPG", n=self.n, least=2)
        check_count("PPG", draws=self.draws, sweeps=self.sweeps)
        check_count("PPG", warmup=self.warmup, least=0)

    def total(self) -> int:
        """Number of sweeps."""
        return self.warmup + self.sweeps

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Check the model; the first sweep is plain PaRIS."""
        number_of_steps(problem.model, problem.data)
        check_functional(self.functional, problem.model, "PPG")
        check_local(problem.model, "PPG")
        warn_of_single_draws("PPG", self.draws)
        return {"sweep": 0, "reference": None, "objects": []}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one sweep."""
        with torch.no_grad():
            sweep = parisian_sweep(
                problem.model,
                problem.data,
                self.n,
                check_functional(self.functional, problem.model, "PPG"),
                state["reference"],
                draws=self.draws,
                exact=self.exact,
                rng=rngs[0],
            )
        number, keep, objects = state["sweep"] + 1, None, state["objects"]
        if number > self.warmup:
            keep = {"smoothed_trace": sweep.value[None, None]}
            if is_tensors(sweep.path):
                keep["path"] = map_tensors(lambda x: x[None, None], named(sweep.path, "path"))
            else:
                objects = [*objects, take(sweep.path, torch.tensor([-1]))[0]]
        state = {"sweep": number, "reference": sweep.path, "objects": objects}
        return Step(state, number >= self.total(), keep)

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Average the sweeps."""
        trace = kept["smoothed_trace"]
        if "path" in kept:
            source: Any = Draws(kept["path"])
        else:
            sweeps = trace.shape[1]
            weights = torch.full((1, sweeps), 1.0 / sweeps, dtype=torch.float64).log()
            source = Population([state["objects"][:sweeps]], weights)
        stats = {"smoothed_trace": trace, "smoothed": trace.mean(1)}
        return make_posterior(problem, source, sample_stats=stats)


def require_bounded(values: Tensor, what: str) -> None:
    """Check that estimates are finite.

    Raises:
        DataError: They are not.
    """
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"{what} is not finite; use more particles or values nearer the data")
