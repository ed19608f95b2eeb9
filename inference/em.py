"""Expectation-maximisation: maximum likelihood or a posterior mode, from several starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.errors import CapabilityError, ConvergenceWarning, DataError, NumericsWarning
from probkit.files import storable
from probkit.posterior import Posterior, make_posterior
from probkit.rng import seed_of, stream
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree, leaves, map_tensors
from probkit.unconstrained import Unconstrained

__all__ = ["EM"]

_DROP = 1e-8  # a fall of the objective beyond this, relative to its size, is no rounding error
_DROP_EPS = 100.0  # nor is one beyond this many units of rounding: a sum of 10^4 terms walks so far


@storable
@dataclass(frozen=True)
class EM(Sampler):
    """Alternate the model's ``e_step`` and ``m_step`` until the objective stands still.

    The objective is the log likelihood that ``e_step`` returns, plus ``log_prior`` where the model
    has one: its ``m_step`` then maximises the posterior density. It can never fall; a fall by more
    than 1e-8 of its size (in float32: 1.2e-5, some 100 units of rounding) means that the M-step
    does not maximise, and warns once for each chain.

    All restarts of a chain are advanced together. A model that declares ``batched_em = True`` gets
    them as one batch: parameters, statistics and log likelihoods with a leading [restart] dim.

    ``accelerate="squarem"`` extrapolates from pairs of EM steps in the unconstrained space
    (Varadhan & Roland 2008, scheme S3). An extrapolation that lowers the objective, or leaves the
    space, is replaced by the EM steps it was made from, so the objective still never falls.

    Args:
        max_iter: Largest number of E-steps of a restart.
        tolerance: Stop a restart when an EM step changes the objective by less than
            ``tolerance * max(1, |objective|)``.
        restarts: Starting points of each chain; the best is returned.
        accelerate: "squarem" or None. SQUAREM needs parameters that are the model's sites.
        map: Whether ``log_prior`` is part of the objective; None: where the model has it.

    A model that has ``review(posterior)`` is shown the result, so that it can warn of what only it
    can judge.

    Returns (through ``infer``):
        Draws of shape [chain, 1] marked ``attrs["point_estimate"]``: the best restart's parameters
        (those that ``em_values(params)`` returns, where the model has it). ``sample_stats`` hold
        ``objective``, ``iterations``, ``converged`` and ``drops``, all [chain, restart], and
        ``objective_trace`` [chain, restart, iteration], NaN after the last.

    Raises:
        DataError: No restart has a finite objective.

    Warns:
        ConvergenceWarning: The objective fell, or no restart of a chain converged.
        NumericsWarning: A restart reached an objective that is NaN or infinite and was dropped.

    Example:
        >>> EM(restarts=8, accelerate="squarem").max_iter
        500
    """

    max_iter: int = 500
    tolerance: float = 1e-6
    restarts: int = 1
    accelerate: Literal["squarem"] | None = None
    map: bool | None = None

    needs = ("sites", "em_init", "e_step", "m_step")

    def __post_init__(self) -> None:
        counts = (self.max_iter, self.restarts)
        whole = all(isinstance(count, int) and count >= 1 for count in counts)
        if not whole or not 0 <= self.tolerance < math.inf:
            raise DataError(
                "EM: expected whole max_iter and restarts >= 1 and 0 <= tolerance < inf, got "
                f"{self.max_iter}, {self.restarts}, {self.tolerance}"
            )
        if self.accelerate not in (None, "squarem"):
            raise DataError(f"EM: expected accelerate None or 'squarem', got {self.accelerate!r}")

    # ------------------------------------------------------------------ driver

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Make the starting points, each from its own stream."""
        model = problem.model
        if self.map and not callable(getattr(model, "log_prior", None)):
            raise CapabilityError(
                f"EM(map=True) needs log_prior; {type(model).__name__} lacks it. Use map=None"
            )
        seed = seed_of(rngs[0])
        device = rngs[0].device
        with torch.no_grad():
            starts = [
                model.em_init(problem.data, rng=stream(seed, "restart", k, device=device))
                for k in range(self.restarts)
            ]
        if self.accelerate is not None:
            _check_sites(problem, starts[0])
        fresh = {"objective": None, "iterations": 0, "converged": False, "done": False, "drops": 0}
        return {
            "restarts": [{"params": start, "trace": [], **fresh} for start in starts],
            "warned": False,
        }

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one EM step (or one SQUAREM cycle of three) of every restart still running."""
        restarts = [dict(restart) for restart in state["restarts"]]
        running = [restart for restart in restarts if not restart["done"]]
        warned = state["warned"]
        with torch.no_grad():
            take = self._cycle if self.accelerate == "squarem" else self._plain
            take(_Model(problem, self.map), running)
        for number, restart in enumerate(restarts):
            if restart.pop("failed", False):
                _warn_of_failure(problem, number, restart["iterations"])
            fell = restart.pop("fell", None)
            if fell is not None and not warned:
                _warn_of_fall(problem, number, restart["iterations"], *fell)
                warned = True
        done = all(restart["done"] for restart in restarts)
        best = max(restart["objective"] for restart in restarts)
        info = {"objective": best, "running": float(len(running))}
        return Step({"restarts": restarts, "warned": warned}, done, info=info)

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Every evaluated parameter is an estimate."""
        return any(restart["objective"] is not None for restart in state["restarts"])

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the best restart."""
        restarts = state["restarts"]
        objective = torch.tensor(
            [restart["objective"] for restart in restarts], dtype=torch.float64
        )
        best = restarts[int(objective.argmax())]
        if best["objective"] == -math.inf:
            raise DataError(
                f"EM: no finite objective from {len(restarts)} starts; check the data, em_init and "
                "the M-step (an empty component, a zero variance)"
            )
        values = _values(problem.model, best["params"])
        trace = torch.full((1, len(restarts), self.max_iter), math.nan, dtype=torch.float64)
        for row, restart in zip(trace[0], restarts, strict=True):
            row[: len(restart["trace"])] = torch.tensor(restart["trace"], dtype=torch.float64)
        stats = {
            "objective": objective[None],
            "iterations": torch.tensor([[restart["iterations"] for restart in restarts]]),
            "converged": torch.tensor([[restart["converged"] for restart in restarts]]),
            "drops": torch.tensor([[restart["drops"] for restart in restarts]]),
            "objective_trace": trace,
        }
        return make_posterior(
            problem,
            Draws({name: value[None, None] for name, value in values.items()}),
            sample_stats=stats,
            attrs={"point_estimate": True},
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Cut the traces to the longest restart; warn of chains in which nothing converged."""
        stats = dict(posterior.sample_stats)
        failed = (~stats["converged"].any(1)).nonzero().flatten().tolist()
        if failed:
            warnings.warn(
                f"EM on {type(problem.model).__name__}: no restart of chain "
                f"{', '.join(map(str, failed))} converged within max_iter={self.max_iter}; raise "
                "max_iter or tolerance, or use accelerate='squarem'",
                ConvergenceWarning,
                stacklevel=4,
            )
        review = getattr(problem.model, "review", None)
        if callable(review):
            review(posterior)
        longest = int((~stats["objective_trace"].isnan()).sum(-1).max())
        stats["objective_trace"] = stats["objective_trace"][..., :longest]
        return replace(posterior, sample_stats=stats)

    # ------------------------------------------------------------------ one step

    def _plain(self, model: _Model, running: Sequence[dict[str, Any]]) -> None:
        """Evaluate, then maximise, every running restart."""
        stats, objectives = model.e_steps([restart["params"] for restart in running])
        for restart, objective in zip(running, objectives, strict=True):
            self._note(restart, objective)
        moving = [k for k, restart in enumerate(running) if not restart["done"]]
        for k, params in zip(moving, model.m_steps(stats, moving), strict=True):
            running[k]["params"] = params

    def _note(self, restart: dict[str, Any], objective: float) -> None:
        """Book an objective: has it fallen, has it converged, is it time to stop?"""
        last = restart["objective"]
        if math.isnan(objective) or objective == math.inf:
            restart["failed"], objective = True, -math.inf
        restart["objective"] = objective
        restart["trace"] = [*restart["trace"], objective]
        restart["iterations"] += 1
        if objective == -math.inf:
            restart["done"], restart["converged"] = True, False
            return
        if last is not None:
            scale = max(1.0, abs(last))
            if objective < last - _slack(restart["params"]) * scale:
                restart["drops"] += 1
                restart["fell"] = (last, objective)
            restart["converged"] = abs(objective - last) <= self.tolerance * scale
        restart["done"] = restart["converged"] or restart["iterations"] >= self.max_iter

    def _cycle(self, model: _Model, running: Sequence[dict[str, Any]]) -> None:
        """Two EM steps and an extrapolation from them, for every running restart."""
        first = [restart["params"] for restart in running]
        self._plain(model, running)
        moving = [k for k, restart in enumerate(running) if not restart["done"]]
        second = {k: running[k]["params"] for k in moving}
        still = [running[k] for k in moving]
        if not still:
            return
        self._plain(model, still)
        moving = [k for k in moving if not running[k]["done"]]
        proposals = {
            k: model.extrapolate(first[k], second[k], running[k]["params"]) for k in moving
        }
        trying = [k for k in moving if proposals[k] is not None]
        if not trying:
            return
        stats, objectives = model.e_steps([proposals[k] for k in trying])
        better = [
            place
            for place, (k, objective) in enumerate(zip(trying, objectives, strict=True))
            if math.isfinite(objective) and objective >= running[k]["objective"]
        ]
        for place, params in zip(better, model.m_steps(stats, better), strict=True):
            restart = running[trying[place]]
            # The gain of an extrapolation says nothing about convergence; the next step does.
            restart["objective"] = objectives[place]
            restart["trace"] = [*restart["trace"], objectives[place]]
            restart["params"] = params
        for k in trying:
            running[k]["iterations"] += 1
            running[k]["trace"] = _filled(running[k])
            running[k]["done"] = running[k]["iterations"] >= self.max_iter


def _slack(params: Any) -> float:
    """The relative fall that rounding alone can explain, at the precision of the parameters."""
    floating = [leaf.dtype for leaf in leaves(params) if isinstance(leaf, Tensor)]
    eps = [torch.finfo(dtype).eps for dtype in floating if dtype.is_floating_point]
    return max([_DROP, *(_DROP_EPS * value for value in eps)])


def _filled(restart: Mapping[str, Any]) -> list[float]:
    """The trace with one entry for each E-step; a refused extrapolation repeats the last."""
    trace = restart["trace"]
    return [*trace, *[trace[-1]] * (restart["iterations"] - len(trace))]


class _Model:
    """The model's two steps on several restarts, batched where the model takes batches."""

    def __init__(self, problem: Problem, use_prior: bool | None) -> None:
        self.model, self.data, self.problem = problem.model, problem.data, problem
        self.batched = bool(getattr(problem.model, "batched_em", False))
        has_prior = callable(getattr(problem.model, "log_prior", None))
        self.use_prior = has_prior if use_prior is None else use_prior

    def e_steps(self, params: Sequence[Any]) -> tuple[Any, list[float]]:
        """Return statistics (to be handed to :meth:`m_steps`) and objectives."""
        if self.batched:
            joined = _stack(params)
            stats, log_likelihood = self.model.e_step(joined, self.data)
            objectives = self._objectives(log_likelihood, joined, len(params))
        else:
            pairs = [self.model.e_step(one, self.data) for one in params]
            stats = [pair[0] for pair in pairs]
            objectives = [
                self._objectives(pair[1], one, 1)[0]
                for pair, one in zip(pairs, params, strict=True)
            ]
        return stats, objectives

    def _objectives(self, log_likelihood: Tensor, params: Any, n: int) -> list[float]:
        total = torch.as_tensor(log_likelihood).double()
        if total.numel() != n:
            raise DataError(
                f"e_step of {type(self.model).__name__}: expected {n} log likelihoods, got shape "
                f"{tuple(total.shape)}; batched_em = True asks for one for each [restart]"
            )
        if self.use_prior:
            total = total + self.model.log_prior(_values(self.model, params)).double()
        return [float(value) for value in total.reshape(-1)]

    def m_steps(self, stats: Any, which: Sequence[int]) -> list[Any]:
        """Return the parameters that maximise the statistics number ``which``."""
        if not which:
            return []
        if not self.batched:
            return [self.model.m_step(stats[k], self.data) for k in which]
        index = torch.tensor(which)
        chosen = map_tensors(lambda t: t.index_select(0, index.to(t.device)), stats)
        new = self.model.m_step(chosen, self.data)
        return [_row(new, k) for k in range(len(which))]

    def extrapolate(self, zero: Any, one: Any, two: Any) -> Any:
        """Return zero - 2 a r + a^2 v with r = one - zero, v = two - 2 one + zero, a = -|r| / |v|.

        None where the points leave the unconstrained space, or lie on a line without curvature.
        """
        free = Unconstrained(self.model.sites(self.data))
        try:
            points = [free.flatten(values) for values in (zero, one, two)]
        except DataError:  # on or beyond the boundary of a support
            return None
        step = points[1] - points[0]
        bend = points[2] - points[1] - step
        length = -float(step.norm() / bend.norm())
        if not math.isfinite(length) or length >= -1.0:
            return None  # -1 gives the second EM step itself
        flat = points[0] - 2 * length * step + length**2 * bend
        if not bool(torch.isfinite(flat).all()):
            return None
        return free.values(flat)


def _stack(params: Sequence[Any]) -> Any:
    """Stack trees of one structure along a new leading dim."""
    first = params[0]
    if isinstance(first, Tensor):
        return torch.stack(list(params))
    if isinstance(first, Mapping):
        return {key: _stack([one[key] for one in params]) for key in first}
    if isinstance(first, list | tuple):
        joined = [_stack(list(column)) for column in zip(*params, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    return first


def _row(tree: Any, k: int) -> Any:
    """Return row ``k`` of every tensor."""
    return map_tensors(lambda tensor: tensor[k], tree)


def _values(model: Any, params: Any) -> dict[str, Tensor]:
    """Turn parameters into named values."""
    convert = getattr(model, "em_values", None)
    values = convert(params) if callable(convert) else params
    named = isinstance(values, Mapping) and all(isinstance(v, Tensor) for v in values.values())
    if not named:
        raise CapabilityError(
            f"EM: expected parameters {{name: tensor}} from {type(model).__name__}, got "
            f"{type(values).__name__}; return a mapping, or add em_values(params)"
        )
    return dict(values)


def _check_sites(problem: Problem, params: Any) -> None:
    """Check that parameters are exactly the model's sites."""
    sites = set(problem.model.sites(problem.data))
    named = isinstance(params, Mapping) and sites == set(params)
    if not named or not all(isinstance(leaf, Tensor) for leaf in leaves(params)):
        got = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise CapabilityError(
            f"EM(accelerate='squarem') needs parameters that are the sites {sorted(sites)}, got "
            f"{got}; use accelerate=None"
        )


def _warn_of_fall(problem: Problem, restart: int, iteration: int, last: float, now: float) -> None:
    warnings.warn(
        f"EM on {type(problem.model).__name__}: the objective fell from {last:.10g} to {now:.10g} "
        f"at iteration {iteration} of restart {restart}; its m_step does not maximise what e_step "
        "and log_prior measure",
        ConvergenceWarning,
        stacklevel=5,
    )


def _warn_of_failure(problem: Problem, restart: int, iteration: int) -> None:
    warnings.warn(
        f"EM on {type(problem.model).__name__}: restart {restart} was dropped, its objective is "
        f"NaN or infinite at iteration {iteration} (an empty component, a zero variance)",
        NumericsWarning,
        stacklevel=5,
    )
