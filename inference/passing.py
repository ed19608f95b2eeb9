"""Message passing: sweeps over a model's factors until the evidence bound stands still."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from probkit.errors import ConvergenceWarning, DataError
from probkit.files import storable
from probkit.posterior import Evidence, Posterior, make_posterior
from probkit.rng import seed_of, stream
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Fitted
from probkit.tree import Tree, map_tensors

__all__ = ["HasSweeps", "MessagePassing"]


@runtime_checkable
class HasSweeps(Protocol):
    """A model whose posterior is approximated by sweeps of message passing.

    The state of ``n`` independent fits is one tree; every tensor in it has a leading [copy] dim.
    """

    def start_messages(self, data: Any, *, rngs: list[torch.Generator]) -> Tree:
        """Return the state of one fit for each stream."""
        ...

    def pass_messages(self, state: Tree, data: Any, *, damping: float) -> tuple[Tree, Tensor]:
        """Sweep once over all factors; return the new state and the evidence bound [copy]."""
        ...

    def messages_guide(self, data: Any) -> Any:
        """Return the guide whose parameters are the state of one fit, without [copy] dims."""
        ...


@storable
@dataclass(frozen=True)
class MessagePassing(Sampler):
    """Update one factor of the approximate posterior after the other, sweep by sweep.

    For conjugate factors a sweep is coordinate ascent on the evidence bound, which then never falls
    (without damping, and once the model's own warm-up is over). Restarts, and the chains of a
    block, are advanced side by side as one batch.

    Args:
        sweeps: Largest number of sweeps.
        tolerance: Stop when the bound of every restart changes by less than
            ``tolerance * max(1, |bound|)`` in a sweep, three times in a row.
        damping: Share of the old message that each new one keeps, in [0, 1).
        restarts: Starting points of each chain; the one with the largest bound is returned.
        block: Chains advanced together.

    Returns (through ``infer``):
        A fit for each chain. ``log_evidence`` is a bound; ``sample_stats`` hold ``bound``,
        ``sweeps`` and ``converged``, all [chain, restart], and ``bound_trace`` [chain, restart,
        sweep]. Predictions average over chains.

    Raises:
        DataError: An option outside its range, or no restart with a finite bound.

    Warns:
        ConvergenceWarning: No restart of a chain converged.

    Example:
        >>> MessagePassing(restarts=5).sweeps
        200
    """

    sweeps: int = 200
    tolerance: float = 1e-5
    damping: float = 0.0
    restarts: int = 1
    block: int | None = 1

    needs = ("sites", "start_messages", "pass_messages", "messages_guide")

    def __post_init__(self) -> None:
        counts = {"sweeps": self.sweeps, "restarts": self.restarts}
        if self.block is not None:
            counts["block"] = self.block
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise DataError(f"MessagePassing: expected a whole {name} >= 1, got {count!r}")
        if not 0 <= self.tolerance < math.inf:
            raise DataError(
                f"MessagePassing: expected 0 <= tolerance < inf, got {self.tolerance!r}"
            )
        if not 0 <= self.damping < 1:
            raise DataError(f"MessagePassing: expected 0 <= damping < 1, got {self.damping!r}")

    def total(self) -> int | None:
        """The number of sweeps, unless it may stop before."""
        return self.sweeps if self.tolerance == 0 else None

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Make the starting points, each from its own stream."""
        streams = [
            stream(seed_of(rng), "restart", k, device=rng.device)
            for rng in rngs
            for k in range(self.restarts)
        ]
        with torch.no_grad():
            fit = problem.model.start_messages(problem.data, rngs=streams)
        return {"fit": fit, "trace": torch.zeros(len(streams), 0, dtype=torch.float64), "calm": 0}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Sweep once."""
        # Fresh, dense memory: sums may be ordered by layout and alignment, and a run that is
        # resumed from a file must find the same of both.
        fit = map_tensors(lambda t: t.clone(memory_format=torch.contiguous_format), state["fit"])
        with torch.no_grad():
            fit, bound = problem.model.pass_messages(fit, problem.data, damping=self.damping)
        trace = torch.cat((state["trace"], bound.detach().double().cpu().unsqueeze(1)), 1)
        calm = state["calm"] + 1 if bool(self._is_calm(trace).all()) else 0
        done = calm >= 3 or trace.shape[1] >= self.sweeps
        best = bound[torch.isfinite(bound)]
        info = {"bound": float(best.max()) if len(best) else -math.inf}
        return Step({"fit": fit, "trace": trace, "calm": calm}, done, info=info)

    def _is_calm(self, trace: Tensor) -> Tensor:
        """Whether the last sweep changed little [copy]; a fit that failed counts as calm."""
        if trace.shape[1] < 2:
            return torch.zeros(len(trace), dtype=torch.bool)
        last, now = trace[:, -2], trace[:, -1]
        change = (now - last).abs()
        calm = change <= self.tolerance * now.abs().clamp_min(1.0)
        return calm | ~torch.isfinite(now)

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Every sweep leaves an approximation."""
        return int(state["trace"].shape[1]) > 0

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the best restart of each chain."""
        trace = state["trace"].reshape(len(rngs), self.restarts, -1)
        bound = torch.where(trace[..., -1].isfinite(), trace[..., -1], -math.inf)
        value, best = bound.max(1)
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                f"MessagePassing on {type(problem.model).__name__}: no finite bound from "
                f"{self.restarts} starts; use damping=0.5, or check the scale of the data"
            )
        chosen = [chain * self.restarts + int(k) for chain, k in enumerate(best)]
        guide = problem.model.messages_guide(problem.data)
        params = [select_copy(state["fit"], k) for k in chosen]
        done = torch.full_like(bound, trace.shape[-1], dtype=torch.long)
        padded = torch.full((*bound.shape, self.sweeps), math.nan, dtype=torch.float64)
        padded[..., : trace.shape[-1]] = trace
        calm = self._is_calm(state["trace"]).reshape(bound.shape)
        source = Fitted(guide, params)
        name = getattr(problem.model, "data_coords", None)
        coords = {**(name(problem.data) if callable(name) else {}), **problem.coords}
        return make_posterior(
            replace(problem, coords=coords),
            source,
            marginals=source.marginals(problem.model, problem.data),
            log_evidence=Evidence(value, "bound"),
            sample_stats={
                "bound": bound,
                "sweeps": done,
                "converged": calm & (state["calm"] > 0),
                "bound_trace": padded,
            },
            stat_dims={
                "bound": ("restart",),
                "sweeps": ("restart",),
                "converged": ("restart",),
                "bound_trace": ("restart", "sweep"),
            },
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Cut the traces to the longest; warn of chains in which nothing converged."""
        stats = dict(posterior.sample_stats)
        failed = (~stats["converged"].any(1)).nonzero().flatten().tolist()
        if failed and self.tolerance > 0:
            warnings.warn(
                f"MessagePassing on {type(problem.model).__name__}: no restart of chain "
                f"{', '.join(map(str, failed))} converged within sweeps={self.sweeps}; raise "
                "sweeps or tolerance",
                ConvergenceWarning,
                stacklevel=4,
            )
        longest = int(stats["sweeps"].max())
        stats["bound_trace"] = stats["bound_trace"][..., :longest]
        return replace(posterior, sample_stats=stats)


def select_copy(tree: Tree, k: int) -> Tree:
    """Take fit number ``k`` out of a state."""
    return map_tensors(lambda t: t[k].clone(), tree)


def stack_copies(trees: list[Tree]) -> Tree:
    """Put fits of one structure side by side, with a new leading [copy] dim."""
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.stack(trees)
    if isinstance(first, Mapping):
        return {key: stack_copies([tree[key] for tree in trees]) for key in first}
    if isinstance(first, list | tuple):
        columns = [stack_copies(list(column)) for column in zip(*trees, strict=True)]
        return type(first)(columns)
    return first
