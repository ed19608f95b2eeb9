"""What HMC and NUTS have in common: options, warm-up, steps, and the posterior."""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.inference.hmc.adaptation import ChainState, adapt
from probkit.inference.hmc.checks import check_run
from probkit.inference.hmc.engine import Engine, engine_of
from probkit.inference.hmc.leapfrog import Point
from probkit.inference.hmc.metric import Metric, check_inverse_mass
from probkit.inference.hmc.moments import Moments
from probkit.inference.hmc.path import PathLength
from probkit.inference.hmc.potential import Potential
from probkit.inference.hmc.start import Start, starting_points
from probkit.inference.hmc.step_size import DualAveraging, first_step_size
from probkit.inference.hmc.tree import Transition
from probkit.posterior import Posterior, make_posterior
from probkit.rng import randn, scope
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree
from probkit.unconstrained import Unconstrained

__all__ = ["HamiltonianSampler"]

_LOG = logging.getLogger("probkit")
_LONG_RUN = 10_000  # Transitions from which "auto" compiles.

_Rngs = Sequence[torch.Generator]


@dataclass(frozen=True)
class HamiltonianSampler(Sampler):
    """Options and driver methods shared by :class:`HMC` and :class:`NUTS`."""

    draws: int = 1000
    warmup: int = 500
    accept: float = 0.8
    dense: bool = False
    step_size: float | None = None
    inverse_mass: Tensor | None = None
    adapt_mass: bool = True
    start: Start | Posterior | None = None
    chunk: int = 10
    block: int | None = None
    compile: bool | Literal["auto"] = "auto"

    needs = ("sites", "log_joint")

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.draws < 1 or self.warmup < 0 or self.chunk < 1:
            raise DataError(
                f"{name}: expected draws and chunk >= 1 and warmup >= 0, got {self.draws}, "
                f"{self.chunk}, {self.warmup}"
            )
        if not 0.0 < self.accept < 1.0:
            raise DataError(f"{name}: expected accept between 0 and 1, got {self.accept}")
        if self.step_size is not None and not 0.0 < self.step_size < float("inf"):
            raise DataError(f"{name}: expected step_size > 0, got {self.step_size}")
        if self.block is not None and self.block < 1:
            raise DataError(f"{name}: expected block >= 1 or None, got {self.block}")
        if self.compile not in (True, False, "auto"):
            raise DataError(f"{name}: expected compile True, False or 'auto', got {self.compile!r}")
        if isinstance(self.start, Posterior):
            object.__setattr__(self, "start", Start.of(self.start, dense=self.dense))

    # ---------------------------------------------------------------- what a sampler adds

    @property
    @abstractmethod
    def _uniforms(self) -> int:
        """Uniform numbers that one transition of one chain needs."""

    @abstractmethod
    def _transition(
        self,
        engine: Engine,
        metric: Metric,
        state: ChainState,
        momentum: Tensor,
        uniforms: Tensor,
    ) -> tuple[Transition, PathLength | None]:
        """Return the next points [chain], their statistics, and what was learned of the path."""

    @abstractmethod
    def _compiled(self, potential: Potential, position: Tensor) -> Any:
        """Return what transitions use in place of the potential, made of compiled programs."""

    @abstractmethod
    def _agrees(self, potential: Potential, tools: Any, run: ChainState) -> bool:
        """Tell whether compiled tools repeat the eager numbers where the chains are."""

    def _first_path(self, position: Tensor, step: Tensor, scaled: bool) -> PathLength | None:
        """Return the state of the search for the path length, where there is one."""
        return None

    # ---------------------------------------------------------------- driver methods

    def total(self) -> int:
        """Number of steps."""
        return -(-(self.warmup + self.draws) // self.chunk) + self._compiles

    @property
    def _compiles(self) -> bool:
        """Whether transitions shall be compiled."""
        return self.compile is True or (
            self.compile == "auto" and self.warmup + self.draws >= _LONG_RUN
        )

    def init(self, problem: Problem, *, rngs: _Rngs) -> Tree:
        """Find starting points and first step sizes."""
        with scope(quiet=True):
            return self._begin(problem, rngs).tree()

    def _begin(self, problem: Problem, rngs: _Rngs) -> ChainState:
        potential = Potential(problem.model, problem.data)
        size = potential.free.size
        if size == 0:
            raise CapabilityError(
                f"{type(self).__name__}: {type(problem.model).__name__} has no sites to sample"
            )
        assert not isinstance(self.start, Posterior)
        inverse_mass = self._first_inverse_mass(size)
        position = starting_points(potential, rngs, self.start)
        scaled = inverse_mass is not None
        if inverse_mass is None:
            ones = position.new_ones(size)
            inverse_mass = torch.diag(ones) if self.dense else ones
        inverse_mass = inverse_mass.to(position)
        point = Point(position, *potential(position))
        guess = self.step_size or (self.start and self.start.step_size)
        step = position.new_full((len(rngs),), guess or 1.0)
        if guess is None:
            momentum = randn(rngs, (size,), dtype=position.dtype, device=position.device)
            step = first_step_size(potential, Metric(inverse_mass), point, momentum, step)
        return ChainState(
            draw=0,
            point=point,
            step=step,
            inverse_mass=inverse_mass,
            averaging=DualAveraging.start(step),
            moments=Moments.empty(position, self.dense),
            path=self._first_path(position, step, scaled),
            engine="compiling" if self._compiles else "eager",
        )

    def _first_inverse_mass(self, size: int) -> Tensor | None:
        """Return the matrix that was given, checked; None where none was."""
        start = self.start.inverse_mass if isinstance(self.start, Start) else None
        given = self.inverse_mass if self.inverse_mass is not None else start
        return None if given is None else check_inverse_mass(given, size, self.dense)

    def step(self, problem: Problem, state: Tree, *, rngs: _Rngs) -> Step:
        """Make ``chunk`` transitions of every chain."""
        run = ChainState.of(state)
        if run.engine == "compiling":
            # A step of its own, so that the progress line can say what takes so long.
            return Step(replace(run, engine="compiled").tree(), False, None, {"compiling": 1.0})
        with scope(quiet=True):
            return self._advance(problem, run, rngs)

    def _advance(self, problem: Problem, run: ChainState, rngs: _Rngs) -> Step:
        engine = self._engine(problem, run)
        total = self.warmup + self.draws
        count = min(self.chunk, total - run.draw)
        momenta, uniforms = self._random(run.point.position, rngs, count)
        metric = Metric(run.inverse_mass)
        positions: list[Tensor] = []
        stats: list[dict[str, Tensor]] = []
        for number in range(count):
            transition, path = self._attempt(
                engine, metric, run, momenta[:, number], uniforms[:, number]
            )
            run = replace(run, draw=run.draw + 1, point=transition.point, path=path)
            if run.draw <= self.warmup:
                mass = run.inverse_mass
                run = adapt(
                    run,
                    transition.stats["acceptance_rate"],
                    engine.potential,
                    target=self.accept,
                    warmup=self.warmup,
                    adapt_mass=self.adapt_mass,
                    rngs=rngs,
                )
                if run.inverse_mass is not mass:
                    metric = Metric(run.inverse_mass)
            else:
                positions.append(transition.point.position)
                stats.append(transition.stats)
        new = int(torch.stack([s["diverging"] for s in stats]).sum()) if stats else 0
        run = replace(
            run,
            divergences=run.divergences + new,
            engine="eager" if engine.tools is None else "compiled",
        )
        info = {
            "accept": float(transition.stats["acceptance_rate"].mean()),
            "step_size": float(run.step.median()),
            "divergences": float(run.divergences),
        }
        return Step(run.tree(), run.draw >= total, _kept(positions, stats), info)

    def _engine(self, problem: Problem, run: ChainState) -> Engine:
        """Return what evaluates the transitions."""
        position = run.point.position
        build = None
        if run.engine == "compiled":
            build = functools.partial(self._compiled, position=position)
        kind = f"{type(self).__name__} {run.inverse_mass.ndim}"
        agrees = functools.partial(self._agrees, run=run)
        return engine_of(problem, kind, position, build, agrees)

    def _attempt(
        self,
        engine: Engine,
        metric: Metric,
        run: ChainState,
        momentum: Tensor,
        uniforms: Tensor,
    ) -> tuple[Transition, PathLength | None]:
        """Make a transition; where compiled programs fail, eagerly from there on."""
        if engine.tools is not None:
            try:
                return self._transition(engine, metric, run, momentum, uniforms)
            except Exception as error:
                _LOG.info("a compiled transition failed (%s): the run goes on eagerly", error)
                engine.tools = None
        return self._transition(engine, metric, run, momentum, uniforms)

    def _random(self, position: Tensor, rngs: _Rngs, count: int) -> tuple[Tensor, Tensor]:
        """Draw momenta [chain, count, D] and uniforms [chain, count, number] from each stream."""
        chains, size = position.shape
        momenta = position.new_empty(chains, count, size)
        uniforms = position.new_empty(chains, count, self._uniforms)
        for normal, uniform, rng in zip(momenta, uniforms, rngs, strict=True):
            normal.normal_(generator=rng)
            uniform.uniform_(generator=rng)
        return momenta, uniforms

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: _Rngs) -> Posterior:
        """Map the kept positions to site values."""
        free = Unconstrained(problem.model.sites(problem.data))
        return make_posterior(
            problem,
            Draws(free.values(kept["flat"])),
            sample_stats=dict(kept["stats"]),
            attrs={"engine": state["engine"]},
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Warn of what the draws themselves reveal; refuse those that are no posterior."""
        check_run(posterior)
        return posterior


def _kept(positions: list[Tensor], stats: list[dict[str, Tensor]]) -> Tree:
    """Stack what a step keeps along dim 1; None where it keeps nothing."""
    if not positions:
        return None
    names = stats[0]
    return {
        "flat": torch.stack(positions, dim=1),
        "stats": {name: torch.stack([s[name] for s in stats], dim=1) for name in names},
    }
