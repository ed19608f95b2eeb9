"""A language model as a surrogate: it is shown the history and predicts the score of a candidate.

Three ways to a prediction (Liu et al., "Large Language Models to Enhance Bayesian Optimization",
ICLR 2024, sections 5.1 and 5.2, and exact ones in place of sampling):

* ``"mc"``: sampled answers, their mean and standard deviation over all orders of the examples.
* ``"logprob"``: the law of the answer, read from token probabilities digit by digit.
* ``"classify"``: the probability of label 1, "among the best gamma", to which the expected
  improvement is proportional.

Answers depend on the order of the examples. All modes average over random orders, or over all of
them where they are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from probkit.bo.llm.cards import Context, ProblemCard, check_context
from probkit.bo.llm.checks import check_parts
from probkit.bo.llm.digits import DigitTree
from probkit.bo.llm.history import Evaluations, Truncate
from probkit.bo.llm.model import LLMModel
from probkit.bo.llm.serialise import Serialiser
from probkit.bo.space import Space
from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.errors import DataError
from probkit.models.language.protocol import LanguageModel, Law, require_capability
from probkit.rng import Rng, seed_of

__all__ = ["LLMSurrogate", "Mode"]

Mode = Literal["mc", "logprob", "classify"]
"""Sampled answers, their exact law, or the probability of being among the best."""


@dataclass(frozen=True)
class LLMSurrogate(Surrogate):
    """Options of a language-model surrogate; ``fit`` and ``condition`` give a BoTorch model.

    Args:
        lm: The language model.
        space: The space; points are its codes.
        card: What the model is told of the problem. Its direction says what is good.
        context: How much of the card it is told.
        n_perm: Orders of the examples to average over; all of them where they are not more; None
            for all (at most six rows).
        k: Answers for each order, in mode ``"mc"``.
        mode: ``"mc"``, ``"logprob"`` or ``"classify"``.
        gamma: Part of the scores that counts as best, in mode ``"classify"``.
        temperature: Of the answers; None for 0.7 in mode ``"mc"`` (as published) and 1 otherwise.
        top_p: Nucleus of the answers.
        anonymous: Call the parameters X1, X2, ...
        warp: Print the logarithm of parameters on a logarithmic scale.
        decimals: Decimals of scores; None for 6, or as many as the scores need; in mode
            ``"logprob"`` those that resolve a thousandth of their range.
        truncate: Which rows to keep where the context cannot hold all: ``"recent"`` or ``"best"``;
            None refuses.
        chat: Prompt with the messages of a chat.
        prune: Branches of the digit tree below this probability count as a whole. For laws near a
            normal one 0.01 moves mean and standard deviation by less than 0.5 % of the latter.
        most: Largest number of points in one question.
        outcome: ``"utility"``: outcomes are larger-is-better, as a study and BoTorch have them, and
            a metric to be minimised is told with its sign turned back. ``"score"``: outcomes are
            the metric itself, and so are predictions.

    Raises:
        DataError: An option out of range.
        CapabilityError: Mode ``"logprob"`` with a model that tells no next-token distributions.

    Example:
        >>> import torch
        >>> from probkit.bo import Float, Space
        >>> from probkit.bo.llm import GPScript
        >>> from probkit.models.language.oracle import OracleLM
        >>> space = Space(x=Float(0, 1))
        >>> spec = LLMSurrogate(OracleLM(GPScript(space)), space, outcome="score")
        >>> X = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
        >>> model = spec.condition(X, (X[:, 0] - 0.4) ** 2, rng=0)
        >>> model.posterior(X[:, None]).mean.shape, model.report
        (torch.Size([3, 1, 1]), AnswerReport(150 asked, 150 parsed, 150 accepted))
    """

    lm: LanguageModel
    space: Space
    card: ProblemCard = field(default_factory=ProblemCard)
    context: Context = "full"
    n_perm: int | None = 5
    k: int = 10
    mode: Mode = "mc"
    gamma: float = 0.25
    temperature: float | None = None
    top_p: float = 1.0
    anonymous: bool = False
    warp: bool = False
    decimals: int | None = None
    truncate: Truncate | None = None
    chat: bool = False
    prune: float = 1e-2
    most: int = 256
    outcome: Literal["utility", "score"] = "utility"

    def __post_init__(self) -> None:
        """Check the options, before anything is asked."""
        check_parts("LLMSurrogate", self.lm, self.space, self.card)
        check_context(self.context)
        if self.mode not in ("mc", "logprob", "classify"):
            raise DataError(f"mode: expected 'mc', 'logprob' or 'classify', got {self.mode!r}")
        if self.outcome not in ("utility", "score"):
            raise DataError(f"outcome: expected 'utility' or 'score', got {self.outcome!r}")
        if self.truncate not in (None, "recent", "best"):
            raise DataError(f"truncate: expected None, 'recent' or 'best', got {self.truncate!r}")
        for name in ("n_perm", "k", "most"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "n_perm" and value is None):
                raise DataError(f"LLMSurrogate: expected a whole {name} >= 1, got {value!r}")
        if not 0.0 < self.gamma < 1.0:
            raise DataError(f"gamma: expected a number in (0, 1), got {self.gamma!r}")
        Serialiser(self.space, warp=self.warp, anonymous=self.anonymous)
        DigitTree(0 if self.decimals is None else self.decimals, self.prune)
        self.law  # noqa: B018 (checks temperature and top_p)
        if self.mode == "logprob":
            require_capability(
                self.lm,
                "logits",
                "LLMSurrogate(mode='logprob')",
                "Use mode='mc', or TransformersLM, LlamaCppLM or MarkovLM.",
            )

    @property
    def law(self) -> Law:
        """Law of the answers' tokens."""
        usual = 0.7 if self.mode == "mc" else 1.0
        return Law(usual if self.temperature is None else self.temperature, self.top_p)

    def in_study(self, space: Space, outcomes: Any) -> Any:
        """Return the hybrid that a study asks in its place; see ``LLMHybrid.in_study``."""
        from probkit.bo.llm.tuning import LLMHybrid  # it builds on this module

        return LLMHybrid(surrogate=self).in_study(space, outcomes)

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> LLMModel:
        """Show the model a history; nothing is asked before the first prediction.

        Args:
            data: Codes of the space, and outcomes as ``outcome`` says. Variances of the outcomes
                and their transform are not used.
            previous: Nothing is carried over from the last round.
            rng: Seed or generator.

        Raises:
            DataError: Several outputs.
        """
        if data.outputs != 1:
            raise DataError(f"LLMSurrogate.fit: expected one output, got {data.outputs}")
        return self.condition(data.X, data.Y, rng=rng)

    def condition(self, X: Any, Y: Any, *, rng: Rng) -> LLMModel:
        """Return the model given observations.

        Args:
            X: Codes [row, parameter].
            Y: Outcomes [row] or [row, 1], as ``outcome`` says.
            rng: Seed or generator.

        Raises:
            ShapeError: Shapes that do not match.
            DataError: No rows, values that are not finite, or rows that do not fit into the context
                while ``truncate`` is None.
        """
        return LLMModel(self, Evaluations.of(self.space, X, Y, "LLMSurrogate"), seed_of(rng))
