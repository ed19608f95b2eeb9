"""Beam search over steps, and diverse verifier tree search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.search.rollout import (
    NEEDS,
    complete,
    concluded,
    grow,
    ready,
    select,
    weighted,
)
from probkit.inference.smc.filters import check_count
from probkit.posterior import Posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.tree import Tree

__all__ = ["DVTS", "BeamSearch"]


def _branch(
    model: Any,
    particles: Sequence[Any],
    groups: Sequence[int],
    keep: int,
    width: int,
    *,
    distinct: bool,
) -> tuple[list[Any], list[int]]:
    """Keep the best of every group and branch those that go on.

    Args:
        model: The model.
        particles: Candidates.
        groups: Group of each.
        keep: Candidates kept of a group, by reward, the first of equals.
        width: Branches for each place; a finished candidate stays single.
        distinct: Whether equal candidates count once. Where fewer than ``keep`` differ, those kept
            branch more often, so that as many steps are drawn.

    Returns:
        The branches and their groups.
    """
    rewards = model.reward(particles).tolist()
    finished = list(model.finished(particles))
    new: list[Any] = []
    belongs: list[int] = []
    for group in sorted(set(groups)):
        own = sorted((k for k, g in enumerate(groups) if g == group), key=lambda k: -rewards[k])
        kept: list[int] = []
        for k in own:
            new_one = not distinct or all(particles[k] != particles[j] for j in kept)
            if len(kept) < keep and new_one:
                kept.append(k)
        going = [k for k in kept if not finished[k]]
        places = width * (keep - (len(kept) - len(going)))
        for k in kept:
            copies = 1
            if not finished[k]:
                copies = places // len(going) + (going.index(k) < places % len(going))
            new += [particles[k]] * copies
            belongs += [group] * copies
    return new, belongs


class _Branching(Sampler):
    """What the two searches share; they differ in how candidates compete."""

    n: int
    width: int
    weighted: bool
    distinct: bool

    needs = NEEDS

    def _groups(self) -> int:
        """Number of groups whose candidates compete with one another only."""
        raise TypeError(f"{type(self).__name__} must say how many groups it has")

    def _check(self) -> None:
        who = type(self).__name__
        check_count(who, n=self.n, width=self.width)
        if self.n % self.width:
            raise DataError(
                f"{who}: expected n to be a multiple of width, got n={self.n!r}, "
                f"width={self.width!r}"
            )

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Start n candidates."""
        each = self.n // self._groups()
        rollout = ready(problem.model, self.n, problem.data, rngs[0])
        return {"rollout": rollout, "groups": [k // each for k in range(self.n)]}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Keep, branch, and take one step with every branch."""
        model, data = problem.model, problem.data
        rollout, groups = state["rollout"], list(state["groups"])
        if rollout["t"] > 0:
            keep = self.n // self.width // self._groups()
            branches, groups = _branch(
                model, rollout["particles"], groups, keep, self.width, distinct=self.distinct
            )
            rollout = {**rollout, "particles": branches}
        rollout = grow(model, rollout, data, rngs[0])
        info = {"best": float(model.reward(rollout["particles"]).max())}
        state = {"rollout": rollout, "groups": groups}
        return Step(state, complete(model, rollout, data), info=info)

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Candidates on the way can be returned, too."""
        return state["rollout"]["t"] > 0

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Choose among the best of each group."""
        rollout, groups = state["rollout"], list(state["groups"])
        particles = rollout["particles"]
        finished = torch.tensor(list(problem.model.finished(particles)), dtype=torch.bool)
        rewards = problem.model.reward(particles).double()
        eligible = rewards
        if self._groups() > 1:
            eligible = torch.full_like(rewards, -torch.inf)
            for group in sorted(set(groups)):
                own = torch.tensor([k for k, g in enumerate(groups) if g == group])
                best = select(rewards[own], finished[own], weighted=False)
                eligible[own] = torch.where(best == 0.0, rewards[own], eligible[own])
        log_weights = select(eligible, finished, weighted=self.weighted)
        return weighted(problem, rollout, log_weights, self.n)

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Warn where every reward is zero."""
        return concluded(posterior)


@storable
@dataclass(frozen=True)
class BeamSearch(_Branching):
    """Keep the best partial answers at every step, and branch each of them.

    Every step draws ``n`` candidates; the ``n / width`` of largest reward are kept and branched
    ``width`` times. Finished answers compete with the others by their reward and are not drawn
    again. With a potential per step, whose product falls, long answers compete at a disadvantage:
    a value suits beam search better.

    Args:
        n: Candidates of a step.
        width: Branches of a kept one; a divisor of n.
        weighted: False puts all weight on the best candidate; True weighs by reward, for a vote.
        distinct: Whether equal candidates count once: the beam is then more diverse, and the good
            ones have fewer branches. Those kept branch more often where fewer differ than are kept.

    Returns (through ``infer``):
        As :class:`BestOfN`. A finished answer stands in one place of the n; free places repeat the
        first with weight zero.

    Raises:
        DataError: ``n`` is not a multiple of ``width``.
    """

    n: int = 16
    width: int = 4
    weighted: bool = False
    distinct: bool = False

    def __post_init__(self) -> None:
        self._check()

    def _groups(self) -> int:
        return 1


@storable
@dataclass(frozen=True)
class DVTS(_Branching):
    """Diverse verifier tree search: ``n / width`` beams that never compete with one another.

    Each subtree draws ``width`` candidates a step and keeps its best one, so that one lucky start
    cannot crowd out all others. At the end the best answer of each subtree stands for election.

    Args:
        n: Candidates of a step, over all subtrees.
        width: Candidates of a subtree; a divisor of n. 1 is best-of-N.
        weighted: False puts all weight on the best subtree; True weighs the subtrees' best by
            reward, for a vote.

    Returns (through ``infer``):
        As :class:`BeamSearch`.

    Raises:
        DataError: ``n`` is not a multiple of ``width``.
    """

    n: int = 16
    width: int = 4
    weighted: bool = False

    distinct = False

    def __post_init__(self) -> None:
        self._check()

    def _groups(self) -> int:
        return self.n // self.width
