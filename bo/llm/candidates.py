"""Candidates from a language model that is asked for configurations reaching a target score.

The sampler p(configuration | target) of Liu et al., "Large Language Models to Enhance Bayesian
Optimization" (ICLR 2024), section 5.3. Proposals that cannot be used are asked for again, and what
is still missing is filled with Sobol points and neighbours of the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.bo.llm.cards import Context, ProblemCard, check_context
from probkit.bo.llm.checks import check_parts
from probkit.bo.llm.formats import DELIMITER
from probkit.bo.llm.history import Evaluations, Truncate, kept_rows, orders
from probkit.bo.llm.prompts import PromptWriter, fitting_rows, start_all
from probkit.bo.llm.reports import AnswerReport, report_of
from probkit.bo.llm.scores import print_score, score_decimals
from probkit.bo.llm.serialise import Serialiser
from probkit.bo.parameters import Categorical
from probkit.bo.space import Space
from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.models.language.protocol import LanguageModel, Law, Prompt
from probkit.numerics import check_finite
from probkit.rng import Rng, seed_of, stream

__all__ = ["LLMCandidates", "Proposal", "target_score"]

Origin = Literal["llm", "sobol", "local"]

#: Neighbours are so far away, in units of the range of a parameter.
_STEP = 0.1
#: Tries for one point to fill with.
_TRIES = 20


def target_score(
    scores: Any, direction: Literal["min", "max"] = "min", alpha: float = -0.1
) -> float:
    """Return the score to ask for: best - alpha (worst - best).

    Args:
        scores: Scores seen, of any sign, [row].
        direction: Whether they are to be ``"min"`` or ``"max"``.
        alpha: Above 0 asks for more than the best; in [-1, 0) for something inside the range seen.

    Raises:
        DataError: No scores, scores or ``alpha`` that are not finite, alpha below -1.

    Example:
        >>> round(target_score([0.2, 0.5], "min"), 10), round(target_score([0.2, 0.5], "max"), 10)
        (0.23, 0.47)
        >>> target_score([-3.0, -3.0], "min", alpha=0.1)
        -3.0
    """
    if direction not in ("min", "max"):
        raise DataError(f"direction: expected 'min' or 'max', got {direction!r}")
    if not (math.isfinite(alpha) and alpha >= -1.0):
        raise DataError(f"alpha: expected a finite number >= -1, got {alpha!r}")
    seen = as_tensor(scores, name="scores").double().flatten()
    if not len(seen):
        raise DataError("target_score: expected at least one score, got none")
    check_finite(seen, "scores", ("row",))
    low, high = float(seen.min()), float(seen.max())
    best, worst = (low, high) if direction == "min" else (high, low)
    return best - alpha * (worst - best)


@dataclass(frozen=True, eq=False)
class Proposal:
    """Points to evaluate or to choose from.

    Attributes:
        X: Codes [point, parameter].
        params: The configurations.
        origins: Where each came from: ``"llm"``, ``"sobol"`` or ``"local"``.
        log_q: Log probability of the answer under the prompt that it was drawn from, [point]; NaN
            for other points, and for models that do not tell it.
        report: What became of the answers.
        target: Score that was asked for; None where none was.
    """

    X: Tensor
    params: list[dict[str, Any]]
    origins: list[Origin]
    log_q: Tensor
    report: AnswerReport
    target: float | None = None

    def __len__(self) -> int:
        return len(self.params)

    def log_weights(self, log_target: Tensor | None = None) -> Tensor:
        """Return importance weights of the points with known ``log_q``, normalised, [point].

        Weights p / q turn the pool from one of the model's taste into one from the target law, up
        to what the model never proposes. Points without ``log_q`` have weight zero.

        Args:
            log_target: Log density of the law wanted, [point], such as a log acquisition value;
                None for the uniform law over configurations.

        Raises:
            ShapeError: ``log_target`` has another length.
            DataError: No point has a known ``log_q``.
        """
        wanted = torch.zeros_like(self.log_q) if log_target is None else log_target.to(self.log_q)
        if wanted.shape != self.log_q.shape:
            raise ShapeError(f"log_target: expected [point={len(self)}], got {tuple(wanted.shape)}")
        raw = torch.where(self.log_q.isnan(), -torch.inf, wanted - self.log_q)
        if not bool((raw > -torch.inf).any()):
            raise DataError(
                "log_weights: no point has a known log_q; the model tells no log probabilities"
            )
        return torch.log_softmax(raw, -1)


@dataclass(frozen=True)
class LLMCandidates:
    """Options of a candidate sampler.

    Args:
        lm: The language model.
        space: The space; points are its codes.
        card: What the model is told of the problem; its direction says what is good.
        context: How much of the card it is told.
        n_perm: Orders of the examples; the answers asked for are shared among them.
        temperature: Of the answers.
        top_p: Nucleus of the answers.
        rounds: How often missing candidates are asked for.
        anonymous: Call the parameters X1, X2, ...
        warp: Print the logarithm of parameters on a logarithmic scale.
        truncate: Which rows to keep where the context cannot hold all: ``"recent"`` or ``"best"``;
            None refuses.
        chat: Prompt with the messages of a chat.
        fill: What stands in for candidates that the model does not give: Sobol points, neighbours
            of the best, both in turn (``"mixed"``), or nothing (``"none"``).

    Raises:
        DataError: An option out of range.

    Example:
        >>> from probkit.bo import Float
        >>> from probkit.bo.llm import GPScript
        >>> from probkit.models.language.oracle import OracleLM
        >>> space = Space(x=Float(0, 1))
        >>> sampler = LLMCandidates(OracleLM(GPScript(space)), space)
        >>> X = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
        >>> found = sampler.propose((X, (X[:, 0] - 0.4) ** 2), 4, rng=0)
        >>> found.X.shape, found.origins
        (torch.Size([4, 1]), ['llm', 'llm', 'llm', 'llm'])
    """

    lm: LanguageModel
    space: Space
    card: ProblemCard = field(default_factory=ProblemCard)
    context: Context = "full"
    n_perm: int = 2
    temperature: float = 0.8
    top_p: float = 0.95
    rounds: int = 3
    anonymous: bool = False
    warp: bool = False
    truncate: Truncate | None = None
    chat: bool = False
    fill: Literal["mixed", "sobol", "local", "none"] = "mixed"

    def __post_init__(self) -> None:
        """Check the options, before anything is asked."""
        check_parts("LLMCandidates", self.lm, self.space, self.card)
        check_context(self.context)
        for name in ("n_perm", "rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"LLMCandidates: expected a whole {name} >= 1, got {value!r}")
        if self.truncate not in (None, "recent", "best"):
            raise DataError(f"truncate: expected None, 'recent' or 'best', got {self.truncate!r}")
        if self.fill not in ("mixed", "sobol", "local", "none"):
            raise DataError(
                f"fill: expected 'mixed', 'sobol', 'local' or 'none', got {self.fill!r}"
            )
        Law(self.temperature, self.top_p)
        Serialiser(self.space, warp=self.warp, anonymous=self.anonymous)

    def propose(
        self,
        history: tuple[Any, Any],
        m: int,
        target: float | None = None,
        alpha: float = -0.1,
        *,
        rng: Rng,
    ) -> Proposal:
        """Ask for ``m`` new points.

        Args:
            history: Codes [row, parameter], and scores [row] as the metric has them.
            m: Number of points.
            target: Score to ask for; None for that of :func:`target_score`.
            alpha: Of :func:`target_score`.
            rng: Seed or generator.

        Returns:
            Points that are inside the space, new, and different from each other in print: ``m`` of
            them, fewer only where the space holds no more or ``fill`` is ``"none"``.

        Raises:
            ShapeError: Shapes that do not match.
            DataError: An empty history, values that are not finite, or rows that do not fit into
                the context while ``truncate`` is None. What the model writes raises nothing.
        """
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise DataError(f"propose: expected a whole number of points m >= 1, got {m!r}")
        if not isinstance(history, tuple | list) or len(history) != 2:
            raise DataError(
                "propose: expected the history as a pair (codes, scores), got "
                f"{type(history).__name__}"
            )
        seen = Evaluations.of(self.space, *history, "LLMCandidates.propose")
        if target is None:
            target = target_score(seen.scores, self.card.direction, alpha)
        elif not math.isfinite(target):
            raise DataError(f"target: expected a finite score, got {target!r}")
        serialiser = Serialiser(self.space, warp=self.warp, anonymous=self.anonymous)
        seed = seed_of(rng)
        prompts = self._prompts(serialiser, seen, target, seed)
        pool = Pool(self.space, serialiser, seen.params)
        report = self._ask(prompts, m, pool, serialiser, seed)
        best = torch.argsort(self.card.sign * seen.scores, descending=True, stable=True)
        pool.fill(m, self.fill, seen.X[best], seed)
        return pool.proposal(report, target)

    def _prompts(
        self, serialiser: Serialiser, seen: Evaluations, target: float, seed: int
    ) -> list[Prompt]:
        """One prompt for each order of the examples."""
        writer = PromptWriter(serialiser, self.card, self.context, self.chat)
        decimals = score_decimals(seen.scores)
        answers = [serialiser.answer(p) for p in seen.params]
        scores = [print_score(float(s), decimals) for s in seen.scores]
        goal = print_score(target, decimals)
        by_length = sorted(range(len(seen)), key=lambda k: len(answers[k]), reverse=True)

        def probe(rows: int) -> Prompt:
            first = by_length[:rows]
            padded = f"{goal}\n{serialiser.longest()}"  # room for the answer
            return writer.candidate([answers[k] for k in first], [scores[k] for k in first], padded)

        what = "LLMCandidates.propose"
        room = fitting_rows(self.lm, probe, len(seen), what)
        rows = kept_rows(self.card.sign * seen.scores, room, self.truncate, what)
        return [
            writer.candidate([answers[rows[k]] for k in o], [scores[rows[k]] for k in o], goal)
            for o in orders(len(rows), self.n_perm, stream(seed, "orders"))[: self.n_perm]
        ]

    def _ask(
        self, prompts: Sequence[Prompt], m: int, pool: Pool, serialiser: Serialiser, seed: int
    ) -> AnswerReport:
        """Ask until ``m`` points are found, at most ``rounds`` times."""
        starts = start_all(self.lm, prompts)
        longest = len(serialiser.longest()) + 16
        report = AnswerReport()
        for turn in range(self.rounds):
            missing = m - len(pool)
            if missing <= 0:
                break
            before = self.lm.usage
            steps = self.lm.generate(
                [starts[k % len(starts)] for k in range(missing)],
                stop=() if self.chat else (DELIMITER, "\n"),
                max_tokens=longest,
                law=Law(self.temperature, self.top_p),
                rng=stream(seed, "candidates", turn),
            )
            reasons: list[str] = []
            for step in steps:
                if step.reason in ("failed", "budget"):
                    reasons.append(step.reason)
                    continue
                read = serialiser.parse(step.text)
                if read.params is None:
                    reasons.append(read.reason)
                else:
                    reasons.append(pool.add(read.params, "llm", step.log_q))
            report += report_of(reasons, self.lm.usage - before)
            if set(reasons) == {"budget"}:
                break
        return report


class Pool:
    """Points that differ in print from each other and from those known.

    Args:
        space: The space.
        serialiser: Prints points.
        known: Points that are not to be proposed.
    """

    def __init__(
        self, space: Space, serialiser: Serialiser, known: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.space, self.serialiser = space, serialiser
        self._seen = {serialiser.row(p) for p in known}
        self._params: list[dict[str, Any]] = []
        self._origins: list[Origin] = []
        self._log_q: list[float] = []

    def __len__(self) -> int:
        return len(self._params)

    def add(self, params: dict[str, Any], origin: Origin, log_q: float = math.nan) -> str:
        """Add a point; return the reason why not, empty where it was added."""
        row = self.serialiser.row(params)
        if row in self._seen:
            return "duplicate"
        self._seen.add(row)
        self._params.append(params)
        self._origins.append(origin)
        self._log_q.append(log_q)
        return ""

    def fill(self, m: int, how: str, best: Tensor, seed: int) -> None:
        """Fill up to ``m`` points.

        Args:
            m: Number of points.
            how: ``"mixed"``, ``"sobol"``, ``"local"`` or ``"none"``.
            best: Codes of known points, the best first, [row, parameter]; may be empty.
            seed: Seed.
        """
        if how == "none" or len(self) >= m:
            return
        missing = m - len(self)
        rng = stream(seed, "local")
        far = iter(self.space.sobol(missing * _TRIES, rng=seed % 2**31))
        for turn in range(missing * _TRIES):
            if len(self) >= m:
                return
            near = len(best) > 0 and (how == "local" or (how == "mixed" and turn % 2 == 1))
            if near:
                self.add(self._neighbour(best, rng), "local")
            else:
                self.add(next(far), "sobol")

    def _neighbour(self, best: Tensor, rng: torch.Generator) -> dict[str, Any]:
        """A point near one of the best quarter."""
        quarter = max(1, len(best) // 4)
        code = best[int(torch.randint(quarter, (), generator=rng))].clone()
        elsewhere = self.space.random_codes(1, rng=rng)[0]
        noise = torch.randn(len(code), generator=rng, dtype=torch.float64)
        flips = torch.rand(len(code), generator=rng, dtype=torch.float64) < 1 / len(code)
        for k, parameter in enumerate(self.space.parameters.values()):
            if isinstance(parameter, Categorical) and not parameter.ordered:
                code[k] = elsewhere[k] if flips[k] else code[k]
            else:
                step = max(_STEP * parameter.top, 0.5 if parameter.stepped else 0.0)
                code[k] = (code[k] + step * noise[k]).clamp(0.0, parameter.top)
        return self.space.from_codes(code[None])[0]

    def proposal(self, report: AnswerReport, target: float | None = None) -> Proposal:
        """Return the points."""
        return Proposal(
            self.space.codes(self._params),
            self._params,
            self._origins,
            torch.tensor(self._log_q, dtype=torch.float64),
            report,
            target,
        )
