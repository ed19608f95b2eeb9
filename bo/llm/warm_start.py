"""First configurations from what a language model knows, before anything is evaluated.

Zero-shot warm start of Liu et al., "Large Language Models to Enhance Bayesian Optimization" (ICLR
2024), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from probkit.bo.llm.candidates import Pool, Proposal
from probkit.bo.llm.cards import Context, ProblemCard, check_context
from probkit.bo.llm.checks import check_parts
from probkit.bo.llm.prompts import PromptWriter, start_all
from probkit.bo.llm.reports import AnswerReport, report_of
from probkit.bo.llm.serialise import Serialiser
from probkit.bo.space import Space
from probkit.errors import DataError
from probkit.models.language.protocol import LanguageModel, Law
from probkit.rng import Rng, seed_of, stream

__all__ = ["LLMWarmStart"]


@dataclass(frozen=True)
class LLMWarmStart:
    """Options of a warm start.

    Args:
        lm: The language model.
        space: The space; points are its codes.
        card: What the model is told of the problem, for example by
            :func:`~probkit.bo.llm.card_from_frame`.
        context: How much of the card it is told.
        temperature: Of the answers.
        top_p: Nucleus of the answers.
        rounds: How often missing configurations are asked for.
        anonymous: Call the parameters X1, X2, ...
        warp: Ask for the logarithm of parameters on a logarithmic scale.
        chat: Prompt with the messages of a chat.

    Raises:
        DataError: An option out of range.

    Example:
        >>> from probkit.bo import Float
        >>> from probkit.bo.llm import GPScript
        >>> from probkit.models.language.oracle import OracleLM
        >>> space = Space(x=Float(0, 1), y=Float(1e-3, 1, log=True))
        >>> found = LLMWarmStart(OracleLM(GPScript(space)), space).propose(5, rng=0)
        >>> found.X.shape, found.report
        (torch.Size([5, 2]), AnswerReport(5 asked, 5 parsed, 5 accepted))
    """

    lm: LanguageModel
    space: Space
    card: ProblemCard = field(default_factory=ProblemCard)
    context: Context = "full"
    temperature: float = 0.7
    top_p: float = 0.95
    rounds: int = 3
    anonymous: bool = False
    warp: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        """Check the options, before anything is asked."""
        check_parts("LLMWarmStart", self.lm, self.space, self.card)
        check_context(self.context)
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise DataError(f"LLMWarmStart: expected a whole rounds >= 1, got {self.rounds!r}")
        Law(self.temperature, self.top_p)
        Serialiser(self.space, warp=self.warp, anonymous=self.anonymous)

    def propose(self, n: int, *, rng: Rng) -> Proposal:
        """Ask for ``n`` different configurations; Sobol points stand in for what is missing.

        Args:
            n: Number of points.
            rng: Seed or generator.

        Returns:
            ``n`` points; fewer only where the space holds no more. What the model writes raises
            nothing.

        Raises:
            DataError: ``n`` below 1, or a prompt that does not fit into the context.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise DataError(f"propose: expected a whole number of points n >= 1, got {n!r}")
        seed = seed_of(rng)
        serialiser = Serialiser(self.space, warp=self.warp, anonymous=self.anonymous)
        writer = PromptWriter(serialiser, self.card, self.context, self.chat)
        pool, report = Pool(self.space, serialiser), AnswerReport()
        longest = len(serialiser.longest()) + 2 * len(self.space) + 8  # quotation marks
        stop = () if _holds_bracket(self.space) else ("]",)
        for turn in range(self.rounds):
            missing = n - len(pool)
            if missing <= 0:
                break
            before = self.lm.usage
            step = self.lm.generate(
                start_all(self.lm, [writer.warm_start(missing)]),
                stop=stop,
                max_tokens=missing * longest + 8,
                law=Law(self.temperature, self.top_p),
                rng=stream(seed, "warm start", turn),
            )[0]
            if step.reason in ("failed", "budget"):
                reasons: list[str] = [step.reason] * missing
            else:
                read = serialiser.parse_json_list(step.text)[:missing]
                reasons = [
                    r.reason if r.params is None else pool.add(r.params, "llm") for r in read
                ]
                reasons += ["not given"] * (missing - len(read))
            report += report_of(reasons, self.lm.usage - before)
            if step.reason == "budget":
                break
        nothing = torch.zeros(0, len(self.space), dtype=torch.float64)
        pool.fill(n, "sobol", nothing, seed)
        return pool.proposal(report)


def _holds_bracket(space: Space) -> bool:
    """Whether a name or a choice holds the sign that ends a list."""
    choices = (c for p in space.parameters.values() for c in getattr(p, "choices", ()))
    return any("]" in str(text) for text in (*space.names, *choices))
