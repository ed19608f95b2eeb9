"""Greedy decoding and best-of-N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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

__all__ = ["BestOfN", "Greedy"]


@storable
@dataclass(frozen=True)
class BestOfN(Sampler):
    """Draw N whole answers, independently, and choose by their reward.

    The reward of an answer is its whole potential, as for the particle filter.

    Args:
        n: Answers.
        weighted: False puts all weight on the best answer. True weighs every answer by its reward,
            so that :func:`~probkit.models.language.answers.answer_posterior` is the reward-weighted
            vote; these are also the weights of importance sampling, which
            ``ParticleFilter(n, ess_threshold=0)`` does with an evidence estimate.

    Returns (through ``infer``):
        A ``Population`` of N answers. The weights are a choice, not draws from the target
        (``log_evidence`` is None). Unfinished answers are chosen only where no finished one has a
        reward above zero. ``sample_stats``: ``log_reward`` and ``finished`` [chain, particle],
        ``completion_tokens`` [chain].

    Example:
        >>> from probkit import infer
        >>> from probkit.models.language import GuidedGeneration, MarkovLM, Steps
        >>> from probkit.models.language.potentials import VerifierPotential
        >>> lm = MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], end=0.2)
        >>> many_b = VerifierPotential(lambda text: 1 - 0.5 ** text.count("b"), kind="value")
        >>> model = GuidedGeneration(lm, many_b, steps=Steps(stop=(), max_tokens=1, max_steps=9))
        >>> post = infer(model, "go", BestOfN(16), rng=0)
        >>> best = post.particles.best()
        >>> best.finished, best.text.count("b") > 0
        (True, True)
    """

    n: int = 16
    weighted: bool = False

    needs = NEEDS

    def __post_init__(self) -> None:
        check_count("BestOfN", n=self.n)

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Start all answers."""
        return ready(problem.model, self.n, problem.data, rngs[0])

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one step with every answer."""
        state = grow(problem.model, state, problem.data, rngs[0])
        done = sum(problem.model.finished(state["particles"]))
        info = {"finished": float(done)}
        return Step(state, complete(problem.model, state, problem.data), info=info)

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Answers on the way can be returned, too."""
        return state["t"] > 0

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Choose."""
        particles = state["particles"]
        finished = torch.tensor(list(problem.model.finished(particles)), dtype=torch.bool)
        rewards = problem.model.reward(particles).double()
        log_weights = select(rewards, finished, weighted=self.weighted)
        return weighted(problem, state, log_weights, self.n)

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Warn where every reward is zero."""
        return concluded(posterior)


@storable
@dataclass(frozen=True)
class Greedy(Sampler):
    """The most probable next token, again and again: one answer of weight one.

    The model says what greedy means for it: ``greedy()`` returns the model that takes the most
    probable token.

    Example:
        >>> from probkit import infer
        >>> from probkit.models.language import GuidedGeneration, MarkovLM, Steps
        >>> from probkit.models.language.potentials import VerifierPotential
        >>> lm = MarkovLM([0.4, 0.6], [[0.9, 0.1], [0.8, 0.2]])
        >>> even = VerifierPotential(lambda text: True)
        >>> model = GuidedGeneration(lm, even, steps=Steps(stop=(), max_tokens=4, max_steps=1))
        >>> infer(model, "go", Greedy(), rng=0).particles.best().text
        'baaa'
    """

    needs = (*NEEDS, "greedy")

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Start the answer."""
        return ready(problem.model.greedy(), 1, problem.data, rngs[0])

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one step."""
        model = problem.model.greedy()
        state = grow(model, state, problem.data, rngs[0])
        return Step(state, complete(model, state, problem.data))

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """The answer on the way can be returned, too."""
        return state["t"] > 0

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the answer."""
        return weighted(problem, state, torch.zeros(1, dtype=torch.float64), 1)
