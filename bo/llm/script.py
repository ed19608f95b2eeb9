"""A script that answers this package's prompts from a Gaussian process, or from the truth.

With it :class:`~probkit.models.language.oracle.OracleLM` stands in for a language model that
knows exactly as much as a Gaussian process, or more, or is wrong on purpose; so every part of a
search can be tested against numbers that are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.bo.llm.formats import DELIMITER
from probkit.bo.llm.prompts import (
    CLASSIFICATION,
    CONFIGURATION,
    JSON_LIST,
    PERFORMANCE,
    PROPOSAL,
)
from probkit.bo.llm.scores import print_score
from probkit.bo.llm.serialise import Serialiser
from probkit.bo.space import Params, Space
from probkit.errors import DataError
from probkit.numerics import safe_cholesky
from probkit.rng import scope

__all__ = ["GPScript"]

_LINE = re.compile(
    rf"^{CONFIGURATION}(?P<row>.*)\n(?:{PERFORMANCE}|{CLASSIFICATION}){DELIMITER}"
    rf"(?P<score> \S+ {DELIMITER})?",
    re.MULTILINE,
)
_PROPOSED = re.compile(
    rf"^{PERFORMANCE}(?P<score>\S+)\n{PROPOSAL}{DELIMITER}(?P<row>.*)", re.MULTILINE
)
_WANTED = re.compile(r"Recommend ([0-9]+) configurations")

#: Random points among which a script chooses.
_POOL = 64
#: Values of a law; more are refused.
_MOST_VALUES = 50_000


class GPScript:
    r"""Answers every kind of prompt that the parts of :mod:`probkit.bo.llm` write.

    A score is a draw from the posterior of a Gaussian process given the examples in the prompt:
    their mean as prior mean, their variance times a squared-exponential kernel on the features of
    the space, and a little noise. Labels follow the same process on the labels; candidates are
    those of 64 random points whose prediction is nearest the target.

    Args:
        space: The space.
        direction: Whether scores are to be ``"min"`` or ``"max"``; used for first configurations.
        truth: The function itself, of params: answers are then its values with the error ``sd``.
        sd: Error of answers under ``truth``.
        adversarial: Answer as if good were bad: predictions are mirrored at the mean of the
            examples, candidates and first configurations are chosen to miss.
        lengthscale: Of the kernel, where features lie in [0, 1].
        noise: Noise variance in units of the variance of the examples.
        warp: As in the prompts.
        anonymous: As in the prompts.

    Example:
        >>> from probkit.bo import Float
        >>> script = GPScript(Space(x=Float(0, 1)))
        >>> prompt = (
        ...     "Configuration: x is 0.100\nPerformance: ## 1.00 ##\n\n"
        ...     "Configuration: x is 0.900\nPerformance: ## 3.00 ##\n\n"
        ...     "Configuration: x is 0.500\nPerformance: ##"
        ... )
        >>> mean, sd = script.prediction(prompt)
        >>> round(mean, 6)
        2.0
    """

    def __init__(
        self,
        space: Space,
        *,
        direction: Literal["min", "max"] = "min",
        truth: Callable[[Params], float] | None = None,
        sd: float = 0.1,
        adversarial: bool = False,
        lengthscale: float = 0.3,
        noise: float = 1e-4,
        warp: bool = False,
        anonymous: bool = False,
    ) -> None:
        if direction not in ("min", "max"):
            raise DataError(f"direction: expected 'min' or 'max', got {direction!r}")
        if not (lengthscale > 0 and noise > 0 and sd > 0):
            raise DataError(
                f"GPScript: expected lengthscale, noise and sd > 0, got {lengthscale!r}, {noise!r} "
                f"and {sd!r}"
            )
        self.space, self.direction, self.truth, self.sd = space, direction, truth, sd
        self.adversarial, self.lengthscale, self.noise = adversarial, lengthscale, noise
        self._serialiser = Serialiser(space, warp=warp, anonymous=anonymous)
        self._fitted = lru_cache(maxsize=64)(self._fit)
        self._predicted = lru_cache(maxsize=1024)(self._prediction)
        self._chances = lru_cache(maxsize=1024)(self._chance)

    # ------------------------------------------------------------------ answers

    def answer(self, prompt: str, rng: torch.Generator) -> str:
        """Return an answer to a prompt, after the delimiter that opens it."""
        question = prompt.rstrip()
        if question.endswith(PERFORMANCE + DELIMITER):
            mean, sd = self.prediction(prompt)
            draw = mean + sd * float(torch.randn((), generator=rng, dtype=torch.float64))
            return f" {print_score(draw, self._decimals(prompt))} {DELIMITER}"
        if question.endswith(CLASSIFICATION + DELIMITER):
            one = float(torch.rand((), generator=rng, dtype=torch.float64)) < self.chance(prompt)
            return f" {int(one)} {DELIMITER}"
        if question.endswith(PROPOSAL + DELIMITER):
            chosen = self._proposal(prompt, rng)
            return self._serialiser.answer(chosen).removeprefix(DELIMITER)
        if question.endswith(JSON_LIST):
            return self._first(prompt, rng)
        return " I do not know."

    def law(self, prompt: str) -> dict[str, float]:
        """Return the law of the answers to a question for a score or a label.

        Raises:
            DataError: Another question, or more than 50,000 values.
        """
        if prompt.rstrip().endswith(CLASSIFICATION + DELIMITER):
            one = self.chance(prompt)
            return {f" 1 {DELIMITER}": one, f" 0 {DELIMITER}": 1.0 - one}
        if not prompt.rstrip().endswith(PERFORMANCE + DELIMITER):
            raise DataError("law: expected a question for a score or a label")
        mean, sd = self.prediction(prompt)
        decimals = self._decimals(prompt)
        step = 10.0**-decimals
        first, last = math.floor((mean - 8 * sd) / step), math.ceil((mean + 8 * sd) / step)
        if last - first > _MOST_VALUES:
            raise DataError(
                f"law: {last - first} values of {decimals} decimals; print fewer decimals"
            )
        grid = torch.arange(first, last + 1, dtype=torch.float64)
        upper = torch.special.ndtr(((grid + 0.5) * step - mean) / sd)
        mass = torch.diff(upper, prepend=upper.new_zeros(1))
        mass[-1] += 1 - upper[-1]
        law: dict[str, float] = {}
        for k, p in zip(grid.tolist(), mass.tolist(), strict=True):
            text = f" {print_score(k * step, decimals)} {DELIMITER}"
            law[text] = law.get(text, 0.0) + p
        return law

    def prediction(self, prompt: str) -> tuple[float, float]:
        """Return mean and standard deviation of the score that a prompt asks for."""
        return self._predicted(prompt)

    def chance(self, prompt: str) -> float:
        """Return the probability of label 1 that a prompt asks for."""
        return self._chances(prompt)

    def _prediction(self, prompt: str) -> tuple[float, float]:
        rows, scores, query = self._examples(prompt)
        mean, sd = self._predict(rows, scores, [query])
        return float(mean[0]), float(sd[0])

    def _chance(self, prompt: str) -> float:
        rows, labels, query = self._examples(prompt)
        if self.truth is None:
            mean, _ = self._predict(rows, labels, [query])
            return min(max(float(mean[0]), 0.01), 0.99)
        sign = 1.0 if self.direction == "max" else -1.0
        good = [sign * self.truth(r) for r, one in zip(rows, labels, strict=True) if one]
        gain = (sign * self.truth(query) - min(good)) / self.sd if good else 0.0
        p = float(
            torch.special.ndtr(
                torch.tensor(-gain if self.adversarial else gain, dtype=torch.float64)
            )
        )
        return min(max(p, 0.01), 0.99)

    # ------------------------------------------------------------------ reading prompts

    def _examples(self, prompt: str) -> tuple[list[dict[str, Any]], list[float], dict[str, Any]]:
        rows, scores = [], []
        query: dict[str, Any] | None = None
        for found in _LINE.finditer(prompt):
            params = self._serialiser.parse_row(found["row"]).params
            if params is None:
                raise DataError(f"GPScript: cannot read the configuration {found['row']!r}")
            if found["score"] is None:
                query = params
            else:
                rows.append(params)
                scores.append(float(found["score"].removesuffix(DELIMITER)))
        if query is None or not rows:
            raise DataError("GPScript: expected a prompt with examples and a question")
        return rows, scores, query

    def _decimals(self, prompt: str) -> int:
        """Decimals of the first score of a prompt."""
        first = next(f["score"] for f in _LINE.finditer(prompt) if f["score"])
        number = first.removesuffix(DELIMITER).strip()
        return len(number.partition(".")[2])

    # ------------------------------------------------------------------ predictions

    def _predict(
        self, rows: list[dict[str, Any]], scores: list[float], queries: list[dict[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of queries [query], whatever the order of the rows."""
        center = math.fsum(scores) / len(scores)
        if self.truth is not None:
            mean = torch.tensor([float(self.truth(q)) for q in queries], dtype=torch.float64)
            sd = torch.full_like(mean, self.sd)
        else:
            seen = sorted(zip([tuple(r.items()) for r in rows], scores, strict=True), key=repr)
            x, root, weights, scale = self._fitted(tuple(seen))
            cross = self._kernel(x, self.space.features(self.space.codes(queries)))
            white = torch.linalg.solve_triangular(root, cross, upper=False)
            mean = center + scale * (cross.mT @ weights)[:, 0]
            left = 1 + self.noise - white.square().sum(0)
            sd = scale * left.clamp_min(self.noise).sqrt()
        return (2 * center - mean if self.adversarial else mean), sd

    def _fit(self, seen: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, float]:
        """Features, Cholesky factor, weights, and standard deviation of the examples."""
        y = torch.tensor([score for _, score in seen], dtype=torch.float64)
        scale = float(y.std(correction=0)) or 1.0
        x = self.space.features(self.space.codes([dict(row) for row, _ in seen]))
        gram = self._kernel(x, x) + self.noise * torch.eye(len(x), dtype=torch.float64)
        with scope(quiet=True):
            root, _ = safe_cholesky(gram)
        weights = torch.cholesky_solve(((y - y.mean()) / scale)[:, None], root)
        return x, root, weights, scale

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.5 * torch.cdist(a, b).square() / self.lengthscale**2)

    # ------------------------------------------------------------------ configurations

    def _pool(self, n: int, rng: torch.Generator) -> list[dict[str, Any]]:
        codes = self.space.random_codes(n, rng=rng)
        return [self._serialiser.rounded(p) for p in self.space.from_codes(codes)]

    def _proposal(self, prompt: str, rng: torch.Generator) -> dict[str, Any]:
        """The point of a random pool whose prediction is nearest the target."""
        rows, scores, target = [], [], 0.0
        for found in _PROPOSED.finditer(prompt):
            if not found["row"].strip():
                target = float(found["score"])
                continue
            params = self._serialiser.parse(found["row"]).params
            if params is not None:
                rows.append(params)
                scores.append(float(found["score"]))
        pool = self._pool(_POOL, rng)
        if not rows:
            return pool[0]
        mean, _ = self._predict(rows, scores, pool)
        return pool[int((mean - target).abs().argmin())]

    def _first(self, prompt: str, rng: torch.Generator) -> str:
        """A JSON list of configurations, chosen by the truth where it is known."""
        wanted = _WANTED.search(prompt)
        n = int(wanted[1]) if wanted else 1
        if self.truth is None:
            chosen = self._pool(n, rng)
        else:
            truth, sign = self.truth, 1.0 if self.direction == "min" else -1.0
            sign = -sign if self.adversarial else sign
            chosen = sorted(self._pool(8 * n, rng), key=lambda p: sign * truth(p))[:n]
        return " [" + ", ".join(self._serialiser.to_json(p) for p in chosen) + "]"
