"""A language model that has been shown a history, as a BoTorch model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import LogExpectedImprovement, PosteriorMean
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from probkit.bo.llm.acquisition import DiscreteExpectedImprovement
from probkit.bo.llm.digits import DigitDensity, DigitTree, label_probability, read_label
from probkit.bo.llm.formats import DELIMITER
from probkit.bo.llm.history import Evaluations, kept_rows, orders
from probkit.bo.llm.posterior import DiscretePosterior
from probkit.bo.llm.prompts import PromptWriter, fitting_rows, start_all
from probkit.bo.llm.reports import AnswerReport, report_of
from probkit.bo.llm.scores import Scale, plausible, print_score, read_score, score_decimals
from probkit.bo.llm.serialise import Serialiser
from probkit.bo.space import Params
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.language.protocol import Prefix, Prompt
from probkit.rng import stream

if TYPE_CHECKING:
    from probkit.bo.llm.surrogate import LLMSurrogate

__all__ = ["LLMModel", "Predictions"]

#: The standard deviation is at least this part of the range of scores.
_FLOOR = 1e-3
#: Answers further beyond the scores seen than so many ranges are slips.
_REACH = 10.0
#: Steps between the extreme scores that the digit tree resolves.
_TREE_STEPS = 1000


class Predictions(NamedTuple):
    """Predictions of candidates one by one.

    Attributes:
        mean: Means, [candidate]; probabilities of label 1 in mode ``"classify"``.
        sd: Standard deviations, [candidate].
        valid: Share of the answers (of the mass, in mode ``"logprob"``) that could be used; where
            it is 0 the prediction is a stand-in, [candidate].
    """

    mean: Tensor
    sd: Tensor
    valid: Tensor


class LLMModel(Model):
    """A language model that has been shown a history, as a BoTorch model of one output.

    Predictions are for finite sets of candidates: use ``optimize_acqf_discrete``. Candidates are
    predicted one by one, so a joint posterior has independent parts. What was asked once is
    remembered: the same printed configuration always has the same prediction.

    Args:
        spec: Options.
        history: Observations, outcomes as ``spec.outcome`` says.
        seed: Seed of orders and answers.

    Attributes:
        report: What became of the answers so far.
        rows: Which rows of the history stand in prompts.
    """

    def __init__(self, spec: LLMSurrogate, history: Evaluations, seed: int) -> None:
        super().__init__()
        self.spec, self.history, self.seed = spec, history, seed
        self.warm_state = None
        self.report = AnswerReport()
        self._sign = spec.card.sign if spec.outcome == "utility" else 1.0
        metric = Evaluations(history.X, history.params, self._sign * history.scores)
        self._serialiser = Serialiser(spec.space, warp=spec.warp, anonymous=spec.anonymous)
        self._writer = PromptWriter(self._serialiser, spec.card, spec.context, spec.chat)
        self._scale = Scale.of(metric.scores)
        least, steps = (0, _TREE_STEPS) if spec.mode == "logprob" else (6, 10_000)
        self.decimals = (
            score_decimals(metric.scores, least, steps) if spec.decimals is None else spec.decimals
        )
        self._labels = _labels(spec.card.sign * metric.scores, spec.gamma)
        self.rows = self._fitting(metric)
        self._shown = metric.take(self.rows)
        self._orders = orders(len(self.rows), spec.n_perm, stream(seed, "orders"))
        self._known: dict[str, _Answer] = {}
        self.eval()

    # ------------------------------------------------------------------ as BoTorch has it

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        """No batch."""
        return torch.Size([])

    def subset_output(self, idcs: Sequence[int]) -> LLMModel:
        """Return the model: there is only one output."""
        if list(idcs) not in ([0], [-1]):
            raise DataError(f"subset_output: expected [0], the only output, got {list(idcs)}")
        return self

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **_: Any,
    ) -> Posterior:
        """Predict at points ``X`` [*batch, q, parameter], each on its own.

        Args:
            X: Codes.
            output_indices: [0], or None.
            observation_noise: Not used: a predicted score is an observation.
            posterior_transform: Applied to the result.

        Returns:
            A normal posterior with a diagonal covariance; in mode ``"logprob"`` a
            :class:`DiscretePosterior`.

        Raises:
            CapabilityError: Gradients are wanted, or more points than ``most``.
            ShapeError: Another number of columns.
        """
        if output_indices is not None:
            self.subset_output(output_indices)
        if X.ndim < 2 or X.shape[-1] != len(self.spec.space):
            raise ShapeError(
                f"posterior: expected X [*batch, q, parameter={len(self.spec.space)}], got "
                f"{tuple(X.shape)}"
            )
        if X.requires_grad:
            raise CapabilityError(
                "a language model has no gradients: choose among given points with "
                "optimize_acqf_discrete(acquisition, q, choices=candidates)"
            )
        points = X.detach().reshape(-1, X.shape[-1]).double().cpu()
        answers = self._answers(self.spec.space.from_codes(points))
        if self.spec.mode == "logprob":
            result: Posterior = self._discrete(answers, X)
        else:
            mean = torch.tensor([a.mean for a in answers], dtype=torch.float64).reshape(
                X.shape[:-1]
            )
            sd = torch.tensor([a.sd for a in answers], dtype=torch.float64).reshape(X.shape[:-1])
            covariance = DiagLinearOperator(sd.square().to(X.device))
            result = GPyTorchPosterior(MultivariateNormal(mean.to(X.device), covariance))
        return result if posterior_transform is None else posterior_transform(result, X=X)

    def acquisition(self, best_f: float | None = None) -> AcquisitionFunction:
        """Return the acquisition function that fits the mode, to be maximised over candidates.

        Args:
            best_f: Best outcome so far; None for the best of the history. Not used in mode
                ``"classify"``.

        Returns:
            Log expected improvement; the exact one of the discrete density (not its logarithm) in
            mode ``"logprob"``; the probability of label 1 in mode ``"classify"``.
        """
        if self.spec.mode == "classify":
            return PosteriorMean(self)
        larger = self.spec.outcome == "utility" or self.spec.card.direction == "max"
        seen = self.history.scores
        best = float(seen.max() if larger else seen.min()) if best_f is None else best_f
        if self.spec.mode == "logprob":
            return DiscreteExpectedImprovement(self, best, maximize=larger)
        # As a tensor: BoTorch reads a number in single precision.
        exact = torch.tensor(best, dtype=torch.float64)
        return LogExpectedImprovement(self, exact, maximize=larger)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> LLMModel:
        """Return the model shown further observations.

        Args:
            X: Codes [new, parameter].
            Y: Outcomes [new, 1].
            **kwargs: None are supported.

        Raises:
            CapabilityError: ``X`` has batch dims, or options are given.
        """
        if kwargs or X.ndim != 2 or Y.ndim != 2:
            raise CapabilityError(
                "condition_on_observations: expected X [new, parameter] and Y [new, 1] without "
                f"options, got {tuple(X.shape)}, {tuple(Y.shape)} and {sorted(kwargs)}"
            )
        new = Evaluations.of(self.spec.space, X, Y, "condition_on_observations")
        together = Evaluations(
            torch.cat([self.history.X, new.X]),
            self.history.params + new.params,
            torch.cat([self.history.scores, new.scores]),
        )
        return LLMModel(self.spec, together, self.seed)

    # ------------------------------------------------------------------ predictions

    def predictions(self, params: Sequence[Params]) -> Predictions:
        """Predict configurations, on the scale of the outcomes.

        Args:
            params: The configurations.
        """
        answers = self._answers(params)
        columns = [(a.mean, a.sd, a.valid) for a in answers]
        table = torch.tensor(columns, dtype=torch.float64).reshape(len(answers), 3)
        return Predictions(*table.unbind(-1))

    def density(self, params: Params) -> DigitDensity:
        """Return the law of the score of a configuration, as the metric has it.

        Raises:
            CapabilityError: The mode is not ``"logprob"``.
        """
        found = self._answers([params])[0].density
        if found is None:
            raise CapabilityError(f"density: expected mode='logprob', got {self.spec.mode!r}")
        return found

    def prompts(self, params: Params) -> list[Prompt]:
        """Return what the model would be asked about a configuration, one prompt for each order."""
        return [self._prompt(order, self._serialiser.row(params)) for order in self._orders]

    def _answers(self, params: Sequence[Params]) -> list[_Answer]:
        rows = [self._serialiser.row(p) for p in params]
        new = [row for row in dict.fromkeys(rows) if row not in self._known]
        if len(new) > self.spec.most:
            raise CapabilityError(
                f"a language model predicts a few candidates at a time: got {len(new)} points and "
                f"most={self.spec.most}; choose among given points with "
                "optimize_acqf_discrete(acquisition, q, choices=candidates), or raise most="
            )
        if new:
            before = self.spec.lm.usage
            found, reasons = self._ask(new)
            self._known |= dict(zip(new, self._completed(found), strict=True))
            self.report += report_of(reasons, self.spec.lm.usage - before)
        return [self._known[row] for row in rows]

    def _ask(self, rows: Sequence[str]) -> tuple[list[_Answer | None], list[str]]:
        """Answers for printed configurations, None without a valid one; and reasons."""
        prompts = [self._prompt(order, row) for row in rows for order in self._orders]
        prefixes = start_all(self.spec.lm, prompts)
        if self.spec.mode == "logprob":
            return self._ask_tree(prefixes, len(rows))
        if self.spec.mode == "classify":
            return self._ask_labels(prefixes, rows)
        return self._ask_samples(prefixes, rows)

    def _ask_samples(
        self, prefixes: Sequence[Prefix], rows: Sequence[str]
    ) -> tuple[list[_Answer | None], list[str]]:
        longest = max(len(print_score(s, self.decimals)) for s in self._scale[:2]) + 8
        texts = self._generate(prefixes, rows, longest)
        between = plausible(self._scale, _REACH)
        read = [
            read_score(text, self.decimals, cut=cut, between=between)
            if not reason
            else (math.nan, reason)
            for text, reason, cut in texts
        ]
        values = torch.tensor([r[0] for r in read], dtype=torch.float64).reshape(len(rows), -1)
        found: list[_Answer | None] = []
        for row in values:
            known = row[~row.isnan()]
            sd = float(known.std()) if len(known) > 1 else math.nan
            mean = self._sign * float(known.mean()) if len(known) else math.nan
            found.append(_Answer(mean, sd, len(known) / len(row)) if len(known) else None)
        return found, [r[1] for r in read]

    def _ask_tree(
        self, prefixes: Sequence[Prefix], n: int
    ) -> tuple[list[_Answer | None], list[str]]:
        tree = DigitTree(self.decimals, self.spec.prune, between=plausible(self._scale, _REACH))
        laws = tree.walk(self.spec.lm, prefixes, self.spec.law)
        each = len(laws) // n
        found: list[_Answer | None] = []
        for begin in range(0, len(laws), each):
            law = DigitDensity.mixture(laws[begin : begin + each])
            if law.total > 0:
                sd = math.sqrt(law.variance)
                found.append(_Answer(self._sign * law.mean, sd, law.total, law))
            else:
                found.append(None)
        return found, ["" if law.total > 0 else "not a number" for law in laws]

    def _ask_labels(
        self, prefixes: Sequence[Prefix], rows: Sequence[str]
    ) -> tuple[list[_Answer | None], list[str]]:
        """Probabilities of label 1: from token probabilities, else from sampled labels."""
        if self.spec.lm.capabilities.logits:
            ones = label_probability(self.spec.lm, prefixes, self.spec.law)
            reasons = ["not a label" if nan else "" for nan in ones.isnan().tolist()]
        else:
            texts = self._generate(prefixes, rows, 8)
            labels = [None if reason else read_label(text) for text, reason, _ in texts]
            reasons = [
                reason or ("not a label" if label is None else "")
                for (_, reason, _), label in zip(texts, labels, strict=True)
            ]
            ones = torch.tensor([math.nan if label is None else float(label) for label in labels])
        values = ones.double().reshape(len(rows), -1)
        found: list[_Answer | None] = []
        for row in values:
            known = row[~row.isnan()]
            n = len(known)
            if not n:
                found.append(None)
                continue
            # Counts are drawn in toward one half (Jeffreys); probabilities are averaged.
            extra = 0.0 if self.spec.lm.capabilities.logits else 0.5
            p = (float(known.sum()) + extra) / (n + 2 * extra)
            found.append(_Answer(p, math.sqrt(max(p * (1 - p), 1e-12)), n / len(row)))
        return found, reasons

    def _generate(
        self, prefixes: Sequence[Prefix], rows: Sequence[str], longest: int
    ) -> list[tuple[str, str, bool]]:
        """Sampled answers: text, reason it failed or nothing, and whether it was cut off."""
        spec = self.spec
        several = [prefix for prefix in prefixes for _ in range(spec.k)]
        # A chat opens its answer with the delimiter, which must not end it.
        stop = () if spec.chat else (DELIMITER, "\n")
        key = hashlib.blake2b("\n".join(rows).encode(), digest_size=8).hexdigest()
        steps = spec.lm.generate(
            several,
            stop=stop,
            max_tokens=longest,
            law=spec.law,
            rng=stream(self.seed, "answers", key),
        )
        return [
            (s.text, s.reason if s.reason in ("failed", "budget") else "", s.reason == "length")
            for s in steps
        ]

    def _completed(self, found: Sequence[_Answer | None]) -> list[_Answer]:
        """Stand-ins for candidates without an answer: what the others say on average."""
        floor = _FLOOR * self._scale.unit if self.spec.mode == "mc" else 0.0
        others = [a for a in (*found, *self._known.values()) if a is not None and a.valid > 0]
        spreads = [a.sd for a in others if math.isfinite(a.sd)]
        scores = self.history.scores
        usual = float(scores.std()) if len(scores) > 1 else self._scale.unit
        sd = math.fsum(spreads) / len(spreads) if spreads else usual
        blank = self._blank(others, sd)
        done = [blank if a is None else a for a in found]
        return [a._replace(sd=max(a.sd if math.isfinite(a.sd) else sd, floor)) for a in done]

    def _blank(self, others: Sequence[_Answer], sd: float) -> _Answer:
        if self.spec.mode == "classify":
            p = math.fsum(a.mean for a in others) / len(others) if others else self.spec.gamma
            return _Answer(p, math.sqrt(p * (1 - p)), 0.0)
        if self.spec.mode == "logprob":
            laws = [a.density for a in others if a.density is not None] or [
                DigitDensity(
                    self._shown.scores,
                    torch.full_like(self._shown.scores, 1 / len(self._shown)),
                )
            ]
            law = DigitDensity.mixture(laws)
            return _Answer(self._sign * law.mean, math.sqrt(law.variance), 0.0, law)
        seen = [a.mean for a in others] or self.history.scores.tolist()
        return _Answer(math.fsum(seen) / len(seen), sd, 0.0)

    def _discrete(self, answers: Sequence[_Answer], X: Tensor) -> DiscretePosterior:
        laws = [a.density for a in answers if a.density is not None]
        size = max(len(law.values) for law in laws)
        values = torch.stack([_padded(self._sign * law.values, size, law.mean) for law in laws])
        probs = torch.stack([_padded(law.probs, size, 0.0) for law in laws])
        shape = (*X.shape[:-1], 1, size)
        return DiscretePosterior(
            values.reshape(shape).to(X.device), probs.reshape(shape).to(X.device)
        )

    # ------------------------------------------------------------------ prompts

    def _prompt(
        self, order: Sequence[int], query: str, history: Evaluations | None = None
    ) -> Prompt:
        shown = self._shown if history is None else history
        rows = [self._serialiser.row(shown.params[k]) for k in order]
        if self.spec.mode == "classify":
            labels = [self._labels[self.rows[k]] for k in order]
            return self._writer.label(rows, labels, query)
        scores = [print_score(float(shown.scores[k]), self.decimals) for k in order]
        return self._writer.score(rows, scores, query, self.decimals)

    def _fitting(self, metric: Evaluations) -> list[int]:
        """Rows of the history that stand in prompts."""
        spec, n = self.spec, len(metric)
        # The longest row stands for any candidate, with room for the answer behind it.
        longest = self._serialiser.longest()
        score = print_score(max(metric.scores.tolist(), key=abs), self.decimals)
        self.rows = list(range(n))
        by_length = sorted(
            range(n), key=lambda k: len(self._serialiser.row(metric.params[k])), reverse=True
        )
        room = fitting_rows(
            spec.lm,
            lambda rows: self._prompt(by_length[:rows], f"{longest} {score}{score}", metric),
            n,
            "LLMSurrogate",
        )
        return kept_rows(spec.card.sign * metric.scores, room, spec.truncate, "LLMSurrogate")


class _Answer(NamedTuple):
    """What the model says of one configuration, on the scale of the outcomes."""

    mean: float
    sd: float
    valid: float
    density: DigitDensity | None = None


def _labels(utility: Tensor, gamma: float) -> list[int]:
    """1 for rows whose utility reaches the upper gamma quantile, [row]."""
    threshold = torch.quantile(utility, 1.0 - gamma)
    return [int(u >= threshold) for u in utility]


def _padded(values: Tensor, size: int, fill: float) -> Tensor:
    return torch.cat([values, values.new_full((size - len(values),), fill)])
