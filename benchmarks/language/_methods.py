"""The methods at one token budget: N answers' worth of steps, spent in different ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["Outcome", "independent", "run"]

Parser = Callable[[str], Any]


class Outcome(NamedTuple):
    """How a method did on one problem.

    Attributes:
        method: Its name.
        n: Answers that it may spend.
        right: Share of its tries that were right.
        confidence: Mean probability that it gave its answers.
        tokens: Generated tokens of a try.
    """

    method: str
    n: int
    right: float
    confidence: float
    tokens: float


def _sampler(method: str, n: int) -> Any:
    from probkit.inference import DVTS, BeamSearch, Greedy, ParticleFilter, ParticleGibbs

    side = max(2, round(n**0.5))
    return {
        "greedy": Greedy,
        "PF": lambda: ParticleFilter(n),
        # the filter that it begins with counts as the first of n / side sweeps
        "PG": lambda: ParticleGibbs(
            side, draws=max(1, n // side - 1), warmup=0, ancestor_sampling=False
        ),
        "beam": lambda: BeamSearch(n, side),
        "DVTS": lambda: DVTS(n, side),
    }[method]()


def _infer(model: Any, prompt: str, sampler: Any, seed: int) -> tuple[Any, int]:
    """The posterior, and the tokens generated for it."""
    import warnings

    import probkit as pk
    from probkit.errors import NumericsWarning

    before = model.lm.usage
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericsWarning)
        post = pk.infer(model, prompt, sampler, rng=seed)
    return post, (model.lm.usage - before).completion_tokens


def run(
    model: Any, prompt: str, parse: Parser, truth: Any, method: str, n: int, seed: int
) -> Outcome:
    """Run one method that looks at the potential on the way; it answers its posterior's mode."""
    import probkit as pk
    from probkit.models.language.answers import answer_posterior

    post, tokens = _infer(model, prompt, _sampler(method, n), seed)
    try:
        answers = answer_posterior(post, parse)
    except pk.DataError:  # every particle died
        return Outcome(method, n, 0.0, 0.0, tokens)
    return Outcome(method, n, float(answers.mode == truth), answers.confidence, tokens)


def independent(
    model: Any, prompt: str, parse: Parser, truth: Any, sizes: Sequence[int], seed: int
) -> list[Outcome]:
    """Draw the largest number of answers once, and let every size choose among its share of them.

    Of 16 answers, N = 4 makes four tries, N = 1 sixteen.
    """
    import torch

    from probkit.inference import BestOfN
    from probkit.inference.search.rollout import select
    from probkit.models.language.answers import vote

    total = max(sizes)
    post, tokens = _infer(model, prompt, BestOfN(total), seed)
    parsed = [parse(particle.text) for particle in post.particles.particles[0]]
    rewards = post.sample_stats["log_reward"][0]
    finished = post.sample_stats["finished"][0]
    found = []
    for n in sizes:
        chosen = {
            "single" if n == 1 else "BoN": lambda r, f: select(r, f, weighted=False),
            **({"WBoN": lambda r, f: select(r, f, weighted=True)} if n > 1 else {}),
            **({"SC": lambda r, f: torch.zeros_like(r)} if n > 1 else {}),
        }
        for method, weigh in chosen.items():
            tries = []
            for at in range(0, total, n):
                part = slice(at, at + n)
                tries.append(vote(parsed[part], weigh(rewards[part], finished[part])))
            right = [float(answers.mode == truth) for answers in tries]
            sure = [answers.confidence for answers in tries]
            count = len(tries)
            found.append(
                Outcome(
                    method,
                    n,
                    math.fsum(right) / count,
                    math.fsum(sure) / count,
                    tokens / count,
                )
            )
    return found
