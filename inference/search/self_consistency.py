"""Self-consistency: a vote among independent answers, with an early stop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.search.rollout import NEEDS, complete, grow, ready, select, weighted
from probkit.inference.smc.filters import check_count
from probkit.posterior import Posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.tree import Tree

__all__ = ["SelfConsistency", "leader_probability"]


def leader_probability(first: int, second: int) -> float:
    """Return the probability that the leading answer of a vote is the more frequent of the two.

    With a uniform prior on the leader's share among the two leading answers, after ``first`` and
    ``second`` votes: 1 - I_0.5(first + 1, second + 1), the share's probability to exceed one half
    (the Beta rule of adaptive consistency).

    Args:
        first: Votes of the leader.
        second: Votes of the runner-up.

    Example:
        >>> leader_probability(4, 0)
        0.96875
    """
    # For whole numbers, I_0.5(a, b) is the upper tail of a binomial law of a + b - 1 fair coins.
    n = first + second + 1
    return sum(math.comb(n, k) for k in range(first + 1)) / 2**n


@storable
@dataclass(frozen=True)
class SelfConsistency(Sampler):
    """Draw whole answers, independently, and let them vote; the potential has no say.

    Args:
        n: Answers at most.
        parse: Text -> answer, None where there is none; see
            :mod:`probkit.models.language.answers`. None takes the stripped text itself.
        stop: None draws all n. "beta" stops as soon as the leading answer is, with probability
            above ``threshold``, more frequent than the runner-up (:func:`leader_probability`).
        threshold: Of the early stop.
        batch: Answers drawn between two looks at the votes.

    Returns (through ``infer``):
        A ``Population`` of n answers, the finished ones with equal weights: the shares of votes
        are ``answer_posterior(post, parse)``. Unfinished answers have a vote only where none is
        finished. Answers never drawn repeat the first with weight zero.
        ``sample_stats``: ``drawn`` and ``leader_probability`` [chain], besides those of
        :class:`BestOfN`. ``log_evidence`` is None.

    Raises:
        DataError: An option out of range.
    """

    n: int = 16
    parse: Callable[[str], Hashable | None] | None = None
    stop: Literal["beta"] | None = None
    threshold: float = 0.95
    batch: int = 1

    needs = NEEDS

    def __post_init__(self) -> None:
        check_count("SelfConsistency", n=self.n, batch=self.batch)
        if self.stop not in (None, "beta"):
            raise DataError(f"SelfConsistency: expected stop None or 'beta', got {self.stop!r}")
        if not 0.5 <= self.threshold < 1.0:
            raise DataError(
                f"SelfConsistency: expected 0.5 <= threshold < 1, got {self.threshold!r}"
            )

    def _batch(self, drawn: int) -> int:
        return self.n if self.stop is None else min(self.batch, self.n - drawn)

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Start the first answers."""
        first = ready(problem.model, self._batch(0), problem.data, rngs[0])
        return {"rollout": first, "drawn": []}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one step with the answers of the batch; count votes where they are complete."""
        model, data = problem.model, problem.data
        rollout = grow(model, state["rollout"], data, rngs[0])
        drawn, done = state["drawn"], False
        if complete(model, rollout, data):
            drawn = [*drawn, *rollout["particles"]]
            enough = self.stop == "beta" and self._leader(model, drawn) > self.threshold
            done = enough or len(drawn) >= self.n or bool(rollout["stopped"])
            if not done:
                fresh = ready(model, self._batch(len(drawn)), data, rngs[0])
                rollout = {**rollout, "t": 0, "particles": fresh["particles"]}
        info = {"drawn": float(len(drawn))}
        return Step({"rollout": rollout, "drawn": drawn}, done, info=info)

    def _leader(self, model: Any, drawn: Sequence[Any]) -> float:
        counts = [count for _, count in self._votes(model, drawn).most_common(2)]
        first, second, *_ = [*counts, 0, 0]
        return leader_probability(first, second)

    def _votes(self, model: Any, drawn: Sequence[Any]) -> Counter[Hashable]:
        voters = [p for p, done in zip(drawn, model.finished(drawn), strict=True) if done]
        texts = [getattr(particle, "text", particle) for particle in voters]
        answers = [text.strip() if self.parse is None else self.parse(text) for text in texts]
        return Counter(answer for answer in answers if answer is not None)

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Complete answers can be returned."""
        return bool(state["drawn"])

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Give every complete answer the same weight."""
        drawn = state["drawn"]
        finished = torch.tensor(list(problem.model.finished(drawn)), dtype=torch.bool)
        equal = torch.zeros(len(drawn), dtype=torch.float64)
        log_weights = select(equal, finished, weighted=True)
        return weighted(
            problem,
            {**state["rollout"], "particles": drawn},
            log_weights,
            self.n,
            drawn=torch.tensor([len(drawn)]),
            leader_probability=torch.tensor(
                [self._leader(problem.model, drawn)], dtype=torch.float64
            ),
        )
