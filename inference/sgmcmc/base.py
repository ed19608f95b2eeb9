"""What SGLD and SGHMC have in common: options, feeding, warm-up, checks, and the posterior."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import CapabilityError, ConvergenceWarning, DataError, ShapeError
from probkit.inference.hmc.checks import split_r_hat
from probkit.inference.hmc.potential import FAILURES, Potential
from probkit.inference.hmc.start import Start, starting_points
from probkit.inference.sgmcmc.feed import Feed
from probkit.inference.sgmcmc.gradient import OnBatch, StochasticPotential
from probkit.inference.sgmcmc.moments import GradientMoments
from probkit.inference.sgmcmc.schedules import Plan, Schedule, Stage, as_schedule
from probkit.loader import Loader, Sized
from probkit.model import Batch, Site, lacks
from probkit.posterior import Posterior, make_posterior
from probkit.rng import scope, seed_of
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree
from probkit.unconstrained import Unconstrained

__all__ = ["StochasticGradientSampler"]

_Rngs = Sequence[torch.Generator]
_HIGH_R_HAT = 1.1
_FEWEST_DRAWS = 100


class _Run(NamedTuple):
    """The state of a block of chains.

    Attributes:
        step: Steps taken.
        position: [chain, D].
        momentum: [chain, D], zero where the dynamics have none.
        energy: Potential at ``position`` on the batch that comes next, [chain].
        gradient: Its gradient [chain, D].
        preconditioner: [chain, D].
        moments: Estimates of the warm-up; None where nothing is learned.
        cut: Steps after the warm-up of a chain in which a noise variance was cut off, [chain].
        feed: Place in the data.
        stacked: Whether batches of several chains go through one tensor program.
    """

    step: int
    position: Tensor
    momentum: Tensor
    energy: Tensor
    gradient: Tensor
    preconditioner: Tensor
    moments: GradientMoments | None
    cut: Tensor
    feed: Feed
    stacked: bool

    def tree(self) -> Tree:
        """Return what a checkpoint stores."""
        moments = None if self.moments is None else list(self.moments)
        return {**self._asdict(), "moments": moments, "feed": self.feed.tree()}

    @classmethod
    def of(cls, tree: Tree) -> _Run:
        """Read :meth:`tree` back."""
        moments = None if tree["moments"] is None else GradientMoments(*tree["moments"])
        return cls(**{**tree, "moments": moments, "feed": Feed.of(tree["feed"])})


@dataclass(frozen=True)
class StochasticGradientSampler(Sampler):
    """Options and driver methods shared by :class:`SGLD` and :class:`SGHMC`."""

    draws: int = 1000
    warmup: int = 1000
    step_size: float | Schedule = 0.01
    batch_size: int | None = None
    thin: int = 1
    precondition: bool = True
    preconditioner: Tensor | None = None
    start: Start | Posterior | None = None
    chunk: int = 100
    block: int | None = None

    needs = ("sites", "log_joint")
    accepts_loader = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        batch = 1 if self.batch_size is None else self.batch_size
        block = 1 if self.block is None else self.block
        if min(self.draws, self.thin, self.chunk, batch, block) < 1 or self.warmup < 0:
            raise DataError(
                f"{name}: expected draws, thin, chunk, batch_size and block >= 1 and warmup >= 0, "
                f"got {self.draws}, {self.thin}, {self.chunk}, {self.batch_size}, {self.block}, "
                f"{self.warmup}"
            )
        if isinstance(self.step_size, int | float) and not 0.0 < self.step_size < float("inf"):
            raise DataError(f"{name}: expected step_size > 0, got {self.step_size}")
        self._schedule.steps(self._plan)  # A schedule may not fit the number of draws.
        if isinstance(self.start, Posterior):
            object.__setattr__(self, "start", Start.of(self.start))

    # ---------------------------------------------------------------- what a sampler adds

    @abstractmethod
    def _move(
        self,
        position: Tensor,
        momentum: Tensor,
        gradient: Tensor,
        preconditioner: Tensor,
        noise: Tensor,
        stage: Stage,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next position and momentum, and where noise was cut off, [chain, D] each."""

    # ---------------------------------------------------------------- driver methods

    @property
    def _plan(self) -> Plan:
        return Plan(self.draws, self.warmup, self.thin)

    @property
    def _schedule(self) -> Schedule:
        return as_schedule(self.step_size)

    def total(self) -> int:
        """Number of chunks."""
        return -(-self._schedule.steps(self._plan) // self.chunk)

    def init(self, problem: Problem, *, rngs: _Rngs) -> Tree:
        """Find starting points and the first gradients."""
        with scope(quiet=True):
            return self._begin(problem, rngs).tree()

    def _begin(self, problem: Problem, rngs: _Rngs) -> _Run:
        model, data, name = problem.model, problem.data, type(self).__name__
        self._check_batches(model, data)
        sites = _sites(model, data)
        if Unconstrained(sites).size == 0:
            raise CapabilityError(f"{name}: {type(model).__name__} has no sites to sample")
        loaded = isinstance(data, Loader)
        feed = Feed(tuple(seed_of(rng) for rng in rngs) if loaded else ())
        batches, feed = feed.next(model, data, self.batch_size, rngs)
        assert not isinstance(self.start, Posterior)
        whole = _first_potential(model, data, batches[0], sites)
        position = starting_points(whole, rngs, self.start)
        stacked, energy, gradient = _evaluate_first(model, sites, batches, position)
        self._check_finite(sites, energy, gradient, position, 0)
        preconditioner = self._first_preconditioner(position)
        return _Run(
            step=0,
            position=position,
            momentum=torch.zeros_like(position),
            energy=energy,
            gradient=gradient,
            preconditioner=preconditioner,
            moments=GradientMoments.start(position) if self._learns else None,
            cut=position.new_zeros(len(rngs)),
            feed=feed,
            stacked=stacked,
        )

    @property
    def _learns(self) -> bool:
        return self.precondition and self.warmup > 0

    def _check_batches(self, model: Any, data: Any) -> None:
        name = type(self).__name__
        if self.batch_size is None:
            return
        if isinstance(data, Loader):
            raise DataError(f"{name}: a Loader makes its own batches; leave out batch_size=")
        missing = lacks(model, ("plate_size", "minibatch"))
        if missing:
            raise CapabilityError(
                f"{name}(batch_size=) needs plate_size and minibatch; {type(model).__name__} lacks "
                f"{', '.join(missing)}. Leave it out"
            )

    def _first_preconditioner(self, position: Tensor) -> Tensor:
        if self.preconditioner is None:
            return torch.ones_like(position)
        given = torch.as_tensor(self.preconditioner).to(position)
        if given.shape != position.shape[1:]:
            raise ShapeError(
                f"preconditioner: expected the diagonal [D={position.shape[1]}] over the "
                f"unconstrained vector, got {tuple(given.shape)}"
            )
        if not bool((torch.isfinite(given) & (given > 0)).all()):
            raise DataError("preconditioner: expected finite entries > 0")
        return given.expand_as(position).clone()

    def step(self, problem: Problem, state: Tree, *, rngs: _Rngs) -> Step:
        """Take ``chunk`` steps of every chain."""
        with scope(quiet=True):
            return self._advance(problem, _Run.of(state), rngs)

    def _advance(self, problem: Problem, run: _Run, rngs: _Rngs) -> Step:
        model, data = problem.model, problem.data
        schedule, plan = self._schedule, self._plan
        total = schedule.steps(plan)
        potential = StochasticPotential(model, _sites(model, data), stacked=run.stacked)
        count = min(self.chunk, total - run.step)
        noise = _noise(run.position, rngs, count)
        kept: list[dict[str, Tensor]] = []
        for number in range(count):
            stage = schedule.stage(run.step, plan)
            run = self._learn(run)
            position, momentum, cut = self._move(
                run.position, run.momentum, run.gradient, run.preconditioner, noise[number], stage
            )
            batches, feed = run.feed.next(model, data, self.batch_size, rngs)
            try:
                energy, gradient = potential.on(batches, position)
            except FAILURES as error:
                raise DataError(
                    f"{type(self).__name__}: log_joint failed at step {run.step + 1} ({error}); "
                    f"lower step_size={stage.size:g}, or check the data"
                ) from error
            warm = run.step < plan.warmup
            run = run._replace(
                step=run.step + 1,
                position=position,
                momentum=momentum,
                energy=energy,
                gradient=gradient,
                feed=feed,
                cut=run.cut if warm else run.cut + cut.any(-1),
            )
            self._check_finite(potential.sites, energy, gradient, position, run.step)
            if stage.keep:
                size = torch.full_like(energy, stage.size)
                kept.append({"flat": position, "lp": -energy, "step_size": size})
        info = {"lp": float(-run.energy.mean()), "step_size": stage.size}
        return Step(run.tree(), run.step >= total, _stack(kept), info)

    def _learn(self, run: _Run) -> _Run:
        """Update the preconditioner in the warm-up."""
        if run.moments is None or run.step >= self.warmup:
            return run
        moments = run.moments.update(run.gradient)
        preconditioner = moments.preconditioner
        if self.preconditioner is not None:  # One was given: it leads while little is known.
            share = run.step / self.warmup
            preconditioner = run.preconditioner.lerp(preconditioner, share)
        return run._replace(moments=moments, preconditioner=preconditioner)

    def _check_finite(
        self,
        sites: Mapping[str, Site],
        energy: Tensor,
        gradient: Tensor,
        position: Tensor,
        step: int,
    ) -> None:
        """Raise where the potential, its gradient or the position is not a number."""
        if bool(torch.isfinite(energy.sum() + gradient.sum() + position.sum())):
            return
        fine = torch.isfinite(gradient) & torch.isfinite(position)
        chains = ~(torch.isfinite(energy) & fine.all(-1))
        if not bool(chains.any()):
            return  # The sum alone overflowed.
        chain = int(chains.nonzero()[0])
        bad, far = ~fine[chain], position[chain].abs()
        where = f"the gradient for {_names_of(sites, bad)}"
        if not bool(bad.any()):  # The density alone overflowed: say what lies furthest out.
            where = f"the log density, with {_names_of(sites, far == far.max())} furthest out,"
        raise DataError(
            f"{type(self).__name__}: {where} is not finite in chain {chain} after step {step}; "
            f"lower step_size={self._schedule.stage(max(step - 1, 0), self._plan).size:g}, take "
            "more warmup, or check the log joint there"
        )

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: _Rngs) -> Posterior:
        """Map the kept positions to site values."""
        sites = _sites(problem.model, problem.data)
        if isinstance(problem.data, Loader):
            problem = replace(problem, data=problem.data.example)
        stats = {"lp": kept["lp"], "step_size": kept["step_size"]}
        after = state["step"] - self.warmup
        stats["noise_cut"] = state["cut"] / max(after, 1)
        draws = Draws(Unconstrained(sites).values(kept["flat"]))
        return make_posterior(problem, draws, sample_stats=stats)

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Warn of chains that disagree, and of step sizes too large for the friction."""
        cut = float(posterior.sample_stats["noise_cut"].max())
        if cut > 0.0:
            _warn(
                f"{type(self).__name__}: in {cut:.0%} of the steps gradient noise (as estimated) "
                "exceeded what friction removes, so that draws are too wide; lower step_size or "
                "raise friction"
            )
        chains, draws = next(iter(posterior.draws.values())).shape[:2]
        if chains < 2 or draws < _FEWEST_DRAWS:
            return posterior
        worst = {
            site: float(split_r_hat(value.double().flatten(2)).nan_to_num(1e9).max())
            if value.ndim > 2
            else float(split_r_hat(value.double()[..., None]).nan_to_num(1e9).max())
            for site, value in posterior.draws.items()
            if value.numel()
        }
        site = max(worst, key=lambda name: worst[name])
        if worst[site] > _HIGH_R_HAT:
            _warn(
                f"{type(self).__name__}: the chains disagree (split R-hat {worst[site]:.2f} for "
                f"{site!r}, expected below {_HIGH_R_HAT}); take more draws with a larger thin, or "
                "a larger step_size"
            )
        return posterior


def _warn(text: str) -> None:
    warnings.warn(text, ConvergenceWarning, stacklevel=5)


def _sites(model: Any, data: Any) -> Mapping[str, Site]:
    """The sites of all units."""
    if not isinstance(data, Loader):
        return model.sites(data)
    found = model.sites(data.example)
    if any(site.plate is not None for site in found.values()):
        return Sized(model, data.units).sites(data.example)
    return found


def _first_potential(model: Any, data: Any, batch: Batch, sites: Mapping[str, Site]) -> Potential:
    """What starting points are chosen with: all data where it is at hand, else one batch."""
    if not isinstance(data, Loader):
        return Potential(model, data)
    if any(site.plate is not None for site in sites.values()):
        return Potential(OnBatch(model, batch, sites), batch.data)
    return Potential(model, batch.data)


def _evaluate_first(
    model: Any, sites: Mapping[str, Site], batches: Sequence[Batch], position: Tensor
) -> tuple[bool, Tensor, Tensor]:
    """Return whether batches can be stacked, and potential and gradient at the first point."""
    potential = StochasticPotential(model, sites, stacked=False)
    energy, gradient = potential.on(batches, position)
    if len(batches) == 1:
        return False, energy, gradient
    potential.stacked = True
    try:
        together, slope = potential.on(batches, position)
    except (RuntimeError, ValueError, TypeError):  # The model cannot be mapped over its data.
        return False, energy, gradient
    tolerance = 1e-4 if energy.dtype == torch.float32 else 1e-8
    same = torch.allclose(together, energy, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not same:
        return False, energy, gradient
    return True, together, slope


def _noise(position: Tensor, rngs: _Rngs, count: int) -> Tensor:
    """Draw standard normals [count, chain, D], each chain from its own stream."""
    chains, size = position.shape
    noise = position.new_empty(chains, count, size)
    for row, rng in zip(noise, rngs, strict=True):
        row.normal_(generator=rng)
    return noise.transpose(0, 1)


def _stack(kept: list[dict[str, Tensor]]) -> Tree:
    """Stack what the steps keep along dim 1; None where they keep nothing."""
    if not kept:
        return None
    return {name: torch.stack([entry[name] for entry in kept], dim=1) for name in kept[0]}


def _names_of(sites: Mapping[str, Site], bad: Tensor) -> str:
    """List the sites that own the marked entries [D] of the flat vector."""
    names, begin = [], 0
    for name, site in sites.items():
        end = begin + Unconstrained({name: site}).size
        if bool(bad[begin:end].any()):
            names.append(repr(name))
        begin = end
    return ("site " if len(names) == 1 else "sites ") + ", ".join(names)
