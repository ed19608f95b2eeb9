"""The posterior of answers: whole texts summed by what they say."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import storable
from probkit.models.language.answers.parsers import texts_of
from probkit.numerics import ess_from_log_weights
from probkit.posterior import Posterior
from probkit.sources import Population

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AnswerPosterior", "answer_posterior", "vote"]

Answer = Hashable
Parser = Callable[[str], Answer | None]


@storable
@dataclass(frozen=True, eq=False)
class AnswerPosterior:
    """Answers with their probabilities, the most probable first.

    Attributes:
        answers: Distinct answers.
        probs: [answer]; they and ``unparsed`` sum to one.
        unparsed: Weight of the texts without an answer.
        ess: Effective number of texts behind all of it.
        counts: Texts with that answer, [answer].
        errors: Standard errors of ``probs`` from the spread of independent chains, [answer]; None
            for one chain.
    """

    answers: Sequence[Answer]
    probs: Tensor
    unparsed: float
    ess: float
    counts: Tensor
    errors: Tensor | None = None

    @property
    def mode(self) -> Answer | None:
        """The most probable answer, the first met of equals; None where there is none."""
        return self.answers[0] if self.answers else None

    @property
    def confidence(self) -> float:
        """Probability of the mode, texts without an answer counting against it."""
        return float(self.probs[0]) if self.answers else 0.0

    def prob(self, answer: Answer) -> float:
        """Return the probability of an answer; 0 where it was not met."""
        for known, p in zip(self.answers, self.probs.tolist(), strict=True):
            if known == answer:
                return float(p)
        return 0.0

    def table(self) -> pd.DataFrame:
        """Tabulate the answers: probability, its standard error where known, number of texts."""
        import pandas as pd

        columns: dict[str, Any] = {"probability": self.probs.tolist()}
        if self.errors is not None:
            columns["error"] = self.errors.tolist()
        columns["texts"] = self.counts.tolist()
        index = pd.Index([str(answer) for answer in self.answers], name="answer")
        return pd.DataFrame(columns, index=index)

    def __repr__(self) -> str:
        """Say the first few answers in one line."""
        shown = ", ".join(
            f"{answer!r}: {p:.3f}"
            for answer, p in zip(self.answers[:4], self.probs.tolist(), strict=False)
        )
        more = ", ..." if len(self.answers) > 4 else ""
        return (
            f"AnswerPosterior({{{shown}{more}}}, unparsed={self.unparsed:.3f}, ess={self.ess:.1f})"
        )


def vote(answers: Sequence[Answer | None], log_weights: Tensor | None = None) -> AnswerPosterior:
    """Sum weights by answer.

    Args:
        answers: One a text; None for a text without an answer.
        log_weights: [text], or [chain, text] for ``answers`` of all chains in a row; need not be
            normalised over all. None for one vote each.

    Raises:
        ShapeError: Not one weight for each answer.
        DataError: No answers, no weight above zero, NaN, or an answer that is not hashable.

    Example:
        >>> vote([7, 8, 7, None])
        AnswerPosterior({7: 0.500, 8: 0.250}, unparsed=0.250, ess=4.0)
    """
    if not len(answers):
        raise DataError("vote: expected at least one answer, got none")
    if log_weights is None:
        log_weights = torch.zeros(len(answers), dtype=torch.float64)
    if log_weights.numel() != len(answers):
        raise ShapeError(
            f"vote: expected one weight for each of {len(answers)} answers, got "
            f"{tuple(log_weights.shape)}"
        )
    chains = log_weights.detach().cpu().double().reshape(-1, log_weights.shape[-1])
    if bool(torch.isnan(chains).any()) or not bool((chains > -torch.inf).any()):
        raise DataError("vote: expected log weights with one above -inf and no NaN")
    shares = torch.softmax(chains.flatten(), 0).reshape(chains.shape)
    places = _places(answers)
    index = torch.tensor([places[a] if a is not None else len(places) for a in answers])
    flat = shares.flatten()
    sums = torch.zeros(len(places) + 1, dtype=torch.float64).index_add(0, index, flat)
    counts = torch.bincount(index[flat > 0], minlength=len(places) + 1)
    order = torch.argsort(-sums[:-1], stable=True)
    order = order[sums[order] > 0]
    named = list(places)
    return AnswerPosterior(
        answers=tuple(named[k] for k in order.tolist()),
        probs=sums[order],
        unparsed=float(sums[-1]),
        ess=float(ess_from_log_weights(chains.flatten(), dim=0)),
        counts=counts[order],
        errors=None if len(chains) < 2 else _errors(shares, index.view_as(chains), sums)[order],
    )


def _places(answers: Sequence[Answer | None]) -> dict[Answer, int]:
    """Number of each distinct answer, in the order met."""
    places: dict[Answer, int] = {}
    for answer in answers:
        try:
            if answer is not None:
                places.setdefault(answer, len(places))
        except TypeError:
            raise DataError(
                f"answers: expected hashable answers (numbers, strings, tuples), got {answer!r}; "
                "let the parser return one of these"
            ) from None
    return places


def _errors(shares: Tensor, index: Tensor, sums: Tensor) -> Tensor:
    """Standard errors of the pooled shares from the spread of chains (a ratio estimate)."""
    chains = len(shares)
    each = torch.zeros(chains, len(sums), dtype=torch.float64).scatter_add(1, index, shares)
    residual = chains * (each - shares.sum(1, keepdim=True) * sums)
    return (residual.square().sum(0) / (chains * (chains - 1))).sqrt()


def answer_posterior(
    post: Posterior,
    parse: Parser,
    *,
    normalise: Callable[[Any], Answer | None] | None = None,
    aliases: Mapping[Any, Answer] | None = None,
) -> AnswerPosterior:
    """Return the posterior over what the texts of a run say.

    Texts count by their weights. Chains with an evidence estimate are pooled by their evidence, as
    independent groups of particles should be; chains of other samplers count alike.

    Args:
        post: Of a particle sampler or a search over :class:`~probkit.models.language.Partial`
            answers (or over plain strings).
        parse: Text -> answer, or None; see :mod:`probkit.models.language.answers.parsers`.
        normalise: Answer -> the form in which equal answers are equal; None drops it.
        aliases: Answer -> the answer it stands for, looked up after ``normalise``.

    Raises:
        CapabilityError: The posterior has no particles.
        DataError: Every chain died out, so that there is no posterior.

    Example:
        >>> from probkit import infer
        >>> from probkit.inference import SelfConsistency
        >>> from probkit.models.language import GuidedGeneration, MarkovLM, Steps
        >>> from probkit.models.language.potentials import VerifierPotential
        >>> lm = MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], symbols=["0", "1"])
        >>> free = VerifierPotential(lambda text: True)
        >>> model = GuidedGeneration(lm, free, steps=Steps(stop=(), max_tokens=3, max_steps=1))
        >>> post = infer(model, "bits: ", SelfConsistency(200), rng=0)
        >>> answers = answer_posterior(post, lambda text: text.count("1"))
        >>> sorted(answers.answers)
        [0, 1, 2, 3]
    """
    source = post.source
    if not isinstance(source, Population):
        raise CapabilityError(
            "answer_posterior: expected the posterior of a particle sampler or a search (a "
            f"Population of answers), got {type(source).__name__}"
        )
    log_weights = torch.log_softmax(source.log_weights.double(), -1)
    evidence = post.log_evidence
    if evidence is not None and evidence.kind == "estimate":
        log_chain = evidence.value.double().to(log_weights)
        if not bool((log_chain > -torch.inf).any()):
            raise DataError(
                "answer_posterior: every chain died out (evidence zero), so that no answer has a "
                "probability; use more particles, a masked proposal or a softer potential"
            )
        log_weights = log_weights + log_chain.unsqueeze(-1)
    texts = [text for chain in source.particles for text in texts_of(chain)]
    known: dict[str, Answer | None] = {}
    for text in texts:
        if text not in known:
            known[text] = _canonical(parse(text), normalise, aliases or {})
    return vote([known[text] for text in texts], log_weights)


def _canonical(
    answer: Any, normalise: Callable[[Any], Answer | None] | None, aliases: Mapping[Any, Answer]
) -> Answer | None:
    if answer is not None and normalise is not None:
        answer = normalise(answer)
    return aliases.get(answer, answer) if isinstance(answer, Hashable) else answer
