"""A language model inside a study: first points, candidates and a prior mean, behind a guard.

Each ask goes through the same steps. Rows of the history that the language model has not been asked
about are predicted from the others; the hybrid of :mod:`probkit.bo.llm.hybrid` is fitted; where the
language model has earned trust, its candidates, the maximiser of the plain process, that of the
hybrid and points around the best ones form a pool, the language model predicts the pool, and the
acquisition function of the hybrid chooses. Where it has not, the plain process chooses, as if there
were no language model, and that is asked about the one chosen point only: so that it can earn trust
later. A prediction that was made before a point was evaluated is evidence once its outcome is told,
so evidence costs no further question; all rows are asked about again when the history has doubled.

Nothing that a language model does, or fails to do, makes an ask fail: what cannot be used is
counted in the report, and the plain process goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.models.model import Model
from torch import Tensor

from probkit.bo.llm.calibration import leave_one_out
from probkit.bo.llm.candidates import LLMCandidates, Proposal
from probkit.bo.llm.cards import Context, ProblemCard
from probkit.bo.llm.history import Truncate
from probkit.bo.llm.hybrid import Hybrid, Method, Said, fit_hybrid, places
from probkit.bo.llm.reports import AnswerReport
from probkit.bo.llm.surrogate import LLMSurrogate
from probkit.bo.llm.warm_start import LLMWarmStart
from probkit.bo.outcomes import Outcomes
from probkit.bo.space import Space
from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.errors import CapabilityError, DataError
from probkit.models.language.protocol import Budget, LanguageModel, Usage
from probkit.rng import Rng, seed_of, stream

__all__ = ["Adviser", "Chosen", "LLMHybrid"]

_log = logging.getLogger("probkit.bo")

#: What goes wrong in a back end, or between it and the prompts, without being our bug.
_FAULTS = (DataError, CapabilityError, OSError, RuntimeError)
_NEAR = (0.2, 0.05, 0.01)
_COPIES = 24
_FAR = 128
#: Answers about points that were not evaluated, kept from round to round.
_KEPT = 64


@dataclass(frozen=True)
class LLMHybrid(Surrogate):
    """A Gaussian process that a language model may advise; what ``Study(surrogate="llm")`` uses.

    Args:
        lm: The language model.
        space: What is searched; a study fills it in.
        card: What the language model is told; by default the name and direction of the objective.
        context: How much of the card it is told.
        mode: ``"mc"`` or ``"logprob"``, as for :class:`LLMSurrogate`.
        n_perm: Orders of the examples.
        k: Answers for each order.
        temperature: Of the answers; None for the default of the mode.
        truncate: Rows to keep where the context cannot hold all.
        chat: Prompt with the messages of a chat.
        surrogate: An :class:`LLMSurrogate` to use in place of the one made from the above.
        candidates: Points to ask for in a round where it is trusted.
        alpha: How far beyond the best score they are to reach, in units of the range of scores.
        pool: Further points of the pool: the best of many by the hybrid.
        warm_start: Initial points to ask for; None for half of them, so that points from elsewhere
            can tell whether words mislead.
        trust: ``"learned"``, or ``"off"``: the language model is never asked, and the search is
            that of the plain Gaussian process.
        method: ``"trust"`` or ``"stack"``, see :func:`~probkit.bo.llm.hybrid.fit_hybrid`.
        prior: Prior probability that it is of no use.
        probe: Whether it is asked about chosen points while it is not trusted.
        noise: ``"learned"`` or ``"none"``; a study fills it in.
        budget: What a study may spend on it in all; then the plain process goes on.

    Raises:
        DataError: Options out of range.
        CapabilityError: No language model, or one that cannot do what ``mode`` needs.
    """

    lm: LanguageModel | None = None
    space: Space | None = None
    card: ProblemCard | None = None
    context: Context = "full"
    mode: Literal["mc", "logprob"] = "mc"
    n_perm: int | None = 5
    k: int = 4
    temperature: float | None = None
    truncate: Truncate | None = "best"
    chat: bool = False
    surrogate: LLMSurrogate | None = None
    candidates: int = 8
    alpha: float = -0.1
    pool: int = 4
    warm_start: int | None = None
    trust: Literal["learned", "off"] = "learned"
    method: Method = "trust"
    prior: float = 0.9
    probe: bool = True
    noise: str = "learned"
    budget: Budget | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before the first question."""
        lm = self.model
        if lm is None:
            raise DataError(
                'surrogate "llm": expected a language model, got none; pass '
                'options={"lm": OpenAILM(...)}'
            )
        if not isinstance(lm, LanguageModel):
            raise CapabilityError(
                f'surrogate "llm": expected a language model, got {type(lm).__name__}; see '
                "probkit.models.language for those there are"
            )
        if self.trust not in ("learned", "off"):
            raise DataError(f"trust: expected 'learned' or 'off', got {self.trust!r}")
        if self.method not in ("trust", "stack"):
            raise DataError(f"method: expected 'trust' or 'stack', got {self.method!r}")
        if self.mode not in ("mc", "logprob"):
            raise DataError(
                f"mode: expected 'mc' or 'logprob', which predict scores, got {self.mode!r}"
            )
        if not 0 < self.prior < 1:
            raise DataError(f"prior: expected a probability in (0, 1), got {self.prior!r}")
        for name in ("candidates", "pool", "warm_start"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not whole and not (name == "warm_start" and value is None):
                raise DataError(f"{name}: expected a whole number >= 0, got {value!r}")
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise DataError(f"budget: expected a Budget, got {self.budget!r}")
        if self.space is not None:
            self.speaker()

    @property
    def model(self) -> LanguageModel | None:
        """The language model."""
        return self.lm if self.surrogate is None else self.surrogate.lm

    def in_study(self, space: Space, outcomes: Outcomes) -> LLMHybrid:
        """Return it with the names that a study knows.

        Raises:
            CapabilityError: Several objectives, or constraints.
        """
        if len(outcomes.names) != 1:
            raise CapabilityError(
                'surrogate "llm": expected one objective and no constraints, got '
                f"{', '.join(outcomes.names)}; use another surrogate, or LLMSurrogate for each "
                "outcome in a loop of your own"
            )
        name = outcomes.only
        direction: Any = outcomes.objectives[name]
        card = self.card if self.surrogate is None else self.surrogate.card
        card = ProblemCard(metric=name, direction=direction) if card is None else card
        if card.direction != direction:
            raise DataError(
                f"card: its direction is {card.direction!r}, but the study has "
                f"{{{name!r}: {direction!r}}}; make them equal"
            )
        given = None if self.surrogate is None else replace(self.surrogate, outcome="utility")
        if given is not None and given.space != space:
            raise DataError(
                "LLMSurrogate: its space is not that of the study: expected "
                f"{', '.join(space.names)}, got {', '.join(given.space.names)}"
            )
        return replace(self, space=space, card=card, surrogate=given)

    def speaker(self) -> LLMSurrogate:
        """Return the language model as a surrogate of its own.

        Raises:
            DataError: The space is not known yet.
        """
        if self.surrogate is not None:
            return self.surrogate
        if self.space is None:
            raise DataError('surrogate "llm": expected space=, which a study fills in, got None')
        assert self.lm is not None
        return LLMSurrogate(
            self.lm,
            self.space,
            ProblemCard() if self.card is None else self.card,
            context=self.context,
            mode=self.mode,
            n_perm=self.n_perm,
            k=self.k,
            temperature=self.temperature,
            truncate=self.truncate,
            chat=self.chat,
        )

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> Model:
        """Ask about rows that it has not been asked about, and fit the hybrid.

        The model that comes back has an attribute ``adviser``, which chooses points, and in
        ``diagnostics`` the weights of its members.
        """
        adviser = Adviser(self, data, previous, seed_of(rng))
        model = adviser.hybrid.model
        model.adviser = adviser
        model.diagnostics = dict(adviser.hybrid.weights)
        model.warm_state = adviser.state
        return model

    def start(self, initial: int, first: int, n: int, *, state: Any, rng: Rng) -> Start:
        """Return initial points that the language model recommends.

        Args:
            initial: Number of initial points of the study.
            first: Number of the first trial wanted.
            n: How many are wanted.
            state: What the last request handed on.
            rng: Seed or generator, the same for all initial points of a study.

        Returns:
            Codes by trial number, and what to hand on. Trials that it has no point for are left to
            the caller.
        """
        wanted = initial // 2 if self.warm_start is None else min(self.warm_start, initial)
        known = dict(state or {})
        if self.trust == "off" or not wanted or first >= wanted:
            return Start({}, known or None)
        if "start" not in known:
            ledger = _Ledger(self, known)
            codes = self._recommended(wanted, ledger, rng)
            known = {**known, "start": codes, **ledger.tree()}
        codes = known["start"]
        points = {k: codes[k] for k in range(first, min(first + n, len(codes)))}
        return Start(points, known)

    def _recommended(self, n: int, ledger: _Ledger, rng: Rng) -> Tensor:
        speaker = self.speaker()
        empty = torch.empty(0, len(speaker.space), dtype=torch.float64)

        def ask() -> Tensor:
            made = LLMWarmStart(
                speaker.lm, speaker.space, speaker.card, context=speaker.context,
                anonymous=speaker.anonymous, warp=speaker.warp, chat=speaker.chat,
            )  # fmt: skip
            return ledger.heard(made.propose(n, rng=rng))

        found = ledger.call("warm start", n, ask)
        return empty if found is None else found


class Start(NamedTuple):
    """Initial points that a language model recommends.

    Attributes:
        points: Codes [parameter] by trial number.
        state: What to hand on to the next request; None for nothing.
    """

    points: dict[int, Tensor]
    state: dict[str, Any] | None


class Chosen(NamedTuple):
    """Points chosen to be evaluated next.

    Attributes:
        points: Codes [point, parameter].
        origins: "model" or, of points that the language model proposed, "llm".
    """

    points: Tensor
    origins: list[str]


class _Ledger:
    """What a study has spent on a language model, and what became of its answers."""

    def __init__(self, spec: LLMHybrid, state: Mapping[str, Any] | None) -> None:
        known = dict(state or {})
        self.spec = spec
        self._before = Usage(**known.get("usage", {}))
        lm = spec.model
        assert lm is not None
        self._lm, self._offset = lm, lm.usage
        self.points = int(known.get("points", 0))
        report = known.get("report", {})
        self.asked = int(report.get("asked", 0))
        self.accepted = int(report.get("accepted", 0))
        self.reasons: dict[str, int] = dict(report.get("reasons", {}))
        self.note = ""

    @property
    def usage(self) -> Usage:
        """Spent by the study so far."""
        return self._before + (self._lm.usage - self._offset)

    def spent(self, points: int) -> str | None:
        """Tell which limit a request about so many points would pass; None for none."""
        if self.spec.budget is None:
            return None
        used = self.usage
        share = points / self.points if self.points else 0.0
        planned = Usage(
            prompt_tokens=int(used.prompt_tokens * share),
            completion_tokens=int(used.completion_tokens * share),
            calls=int(used.calls * share),
            seconds=used.seconds * share,
            money=used.money * share,
        )
        return self.spec.budget.spent(used) or self.spec.budget.spent(used, planned)

    def call(self, what: str, points: int, ask: Callable[[], Any]) -> Any:
        """Ask, unless the budget forbids it; None where nothing came of it."""
        limit = self.spent(points)
        if limit is not None:
            self.note = f"budget: {limit}"
            return None
        try:
            found = ask()
        except _FAULTS as error:
            _log.warning("the language model failed (%s): %s", what, error)
            self.note = f"{what}: {error}"
            return None
        self.points += points
        return found

    def heard(self, proposal: Proposal) -> Tensor:
        """Count the answers of a proposal, and return the points that came from them."""
        self.count(proposal.report)
        return proposal.X[[k for k, origin in enumerate(proposal.origins) if origin == "llm"]]

    def count(self, report: AnswerReport) -> None:
        """Count answers."""
        self.asked += report.asked
        self.accepted += report.accepted
        for reason, number in report.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + number

    def tree(self) -> dict[str, Any]:
        """Return it as a tree that a study can keep."""
        return {
            "usage": asdict(self.usage),
            "points": self.points,
            "report": {
                "asked": self.asked,
                "accepted": self.accepted,
                "reasons": self.reasons,
                "note": self.note,
            },
        }


class Adviser:
    """A language model and the hybrid that listens to it, in one round of a study.

    Args:
        spec: Options.
        data: The history.
        previous: State of the last round.
        seed: Seed of everything random.

    Attributes:
        hybrid: The fitted hybrid.
        state: What the next round starts from.
    """

    def __init__(
        self, spec: LLMHybrid, data: TrainingData, previous: Mapping[str, Any] | None, seed: int
    ) -> None:
        self.spec, self.data, self.seed = spec, data, seed
        known = dict(previous or {})
        self.ledger = _Ledger(spec, known)
        self._kept = {"start": known["start"]} if "start" in known else {}
        said = _said_of(known, data.X.shape[1])
        self._rows = int(known.get("rows", len(data.X)))
        if spec.trust == "learned":
            said = self._completed(said)
        self.said = said
        self.hybrid: Hybrid = fit_hybrid(
            data,
            said if spec.trust == "learned" else None,
            method=spec.method,
            prior=spec.prior,
            noise=spec.noise,
            previous=known.get("members"),
        )
        self._heard = Said.nothing(data.X.shape[1])
        self.state: dict[str, Any] = {}
        self._note_state()

    def _note_state(self) -> None:
        heard = self.said | self._heard
        recent = torch.arange(len(heard.X)) >= len(heard.X) - _KEPT
        rows = (places(heard.X, self.data.X) >= 0) | recent
        kept = Said(*(part[rows] for part in heard))
        report = self.ledger.tree()
        report["report"]["weights"] = dict(self.hybrid.weights)
        report["report"]["trusted"] = self.hybrid.trusted
        if self.hybrid.calibration is not None:
            report["report"]["sigma scale"] = self.hybrid.calibration.scale
        self.state.update(
            {
                "members": self.hybrid.warm_state,
                "said": kept._asdict(),
                "rows": self._rows,
                **self._kept,
                **report,
            }
        )

    def _completed(self, said: Said) -> Said:
        """Ask about rows that nothing was said about yet, each without its own outcome.

        Once the history has doubled all rows are asked about again: a longer history may have
        taught the language model better, or it may be another one by now.
        """
        missing = (places(self.data.X, said.X) < 0).nonzero()[:, 0].tolist()
        if len(self.data.X) >= 2 * self._rows:
            missing = list(range(len(self.data.X)))
        if not missing or len(self.data.X) < 3:
            return said
        speaker = self.spec.speaker()
        valid: list[Tensor] = []

        def predict(
            X: Tensor, Y: Tensor, at: Tensor, *, rng: torch.Generator
        ) -> tuple[Tensor, Tensor]:
            model = speaker.condition(X, Y, rng=rng)
            found = model.predictions(speaker.space.from_codes(at))
            self.ledger.count(model.report)
            valid.append(found.valid)
            return found.mean, found.sd

        def ask() -> Said:
            left = leave_one_out(
                predict, self.data.X, self.data.Y[:, 0], rows=missing,
                rng=stream(self.seed, "left out"),
            )  # fmt: skip
            good = torch.cat(valid) > 0
            X = self.data.X[torch.tensor(missing)]
            return Said(X[good], left.mean[good], left.sd[good])

        new = self.ledger.call("predictions of the history", len(missing), ask)
        if new is None:
            return said
        if len(missing) == len(self.data.X):
            self._rows = len(self.data.X)
        return said | new

    def ask_about(self, X: Tensor) -> Said:
        """Ask the language model about points [point, feature], given the whole history.

        Returns:
            What it said about those points for which a valid answer came; nothing where the budget
            is spent.
        """
        nothing = Said.nothing(X.shape[1])
        speaker = self.spec.speaker()

        def ask() -> Said:
            model = speaker.condition(
                self.data.X, self.data.Y[:, 0], rng=stream(self.seed, "whole history")
            )
            found = model.predictions(speaker.space.from_codes(X))
            self.ledger.count(model.report)
            good = found.valid > 0
            return Said(X[good], found.mean[good], found.sd[good])

        new = self.ledger.call("predictions", len(X), ask) if len(X) else None
        return nothing if new is None else new

    def choose(
        self,
        n: int,
        *,
        maximise: Callable[..., Tensor],
        value: Callable[[Model, Tensor], AcquisitionFunction],
        incumbents: Tensor,
        taken: Tensor,
    ) -> Chosen:
        """Choose the next points.

        Args:
            n: How many.
            maximise: Returns the n points [point, feature] that are best by a model, each pending
                for the next; further keywords say how hard to search.
            value: Returns the acquisition function of a model given further pending points.
            incumbents: The best points seen [point, feature].
            taken: Points not to propose again [point, feature].
        """
        plain = maximise(self.hybrid.base)
        if self.spec.trust == "off":
            return Chosen(plain, ["model"] * n)
        if not self.hybrid.trusted:
            if self.spec.probe:
                self._heard = self.ask_about(plain)
            self._note_state()
            return Chosen(plain, ["model"] * n)
        pool, proposed = self._pool(plain, maximise, value, incumbents, taken)
        self._heard = self.ask_about(pool)
        self.hybrid.hear(self._heard)
        chosen = self._best(n, pool, value)
        self._note_state()
        return Chosen(pool[chosen], ["llm" if bool(proposed[k]) else "model" for k in chosen])

    def _pool(
        self,
        plain: Tensor,
        maximise: Callable[..., Tensor],
        value: Callable[[Model, Tensor], AcquisitionFunction],
        incumbents: Tensor,
        taken: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Points to choose among, the maximisers of the plain process first.

        Returns:
            Points [point, feature], and which of them the language model proposed [point].
        """
        nothing = plain[:0]
        own = self._candidates() if self.spec.candidates else nothing
        mixed = maximise(self.hybrid.model, restarts=3, raw_samples=64, iterations=40)
        near = self._around(incumbents, value) if self.spec.pool else nothing
        parts = torch.cat([plain, mixed, own, near])
        mark = torch.zeros(len(parts), dtype=torch.bool)
        mark[len(plain) + len(mixed) : len(parts) - len(near)] = True
        keep: list[int] = []
        for k, point in enumerate(parts):
            old = torch.cat([taken, parts[keep]])
            if int(places(point[None], old)[0]) < 0:
                keep.append(k)
        if not keep:  # a space that is used up: the caller puts other points in their place
            keep = list(range(len(plain)))
        return parts[keep], mark[keep]

    def _candidates(self) -> Tensor:
        """Ask for points that would be good."""
        speaker = self.spec.speaker()

        def ask() -> Tensor:
            sampler = LLMCandidates(
                speaker.lm, speaker.space, speaker.card, context=speaker.context,
                anonymous=speaker.anonymous, warp=speaker.warp, chat=speaker.chat,
                truncate=speaker.truncate, fill="none",
            )  # fmt: skip
            found = sampler.propose(
                (self.data.X, self.data.Y[:, 0] * speaker.card.sign),
                self.spec.candidates,
                alpha=self.spec.alpha,
                rng=stream(self.seed, "candidates"),
            )
            return self.ledger.heard(found)

        points = self.ledger.call("candidates", self.spec.candidates, ask)
        return self.data.X[:0] if points is None else points

    def _around(
        self, incumbents: Tensor, value: Callable[[Model, Tensor], AcquisitionFunction]
    ) -> Tensor:
        """The best of many points around the incumbents and all over the space, by the hybrid."""
        domain = self.data.domain
        low, high = domain.bounds
        rng = stream(self.seed, "around")
        parts = [domain.sample(_FAR, seed=seed_of(rng) % 2**31)]
        for scale in _NEAR:
            centres = incumbents.repeat(_COPIES, 1)
            noise = torch.randn(centres.shape, generator=rng, dtype=centres.dtype)
            moved = centres + scale * (high - low) * noise
            for k in domain.categorical:
                moved[:, k] = centres[:, k]
            parts.append(moved)
        space = self.spec.speaker().space
        points = space.codes(space.from_codes(domain.rounded(torch.cat(parts))))
        with torch.no_grad():
            heights = value(self.hybrid.model, points[:0])(points[:, None])
        order = heights.nan_to_num(-torch.inf).argsort(descending=True)
        return points[order[: self.spec.pool]]

    def _best(
        self, n: int, pool: Tensor, value: Callable[[Model, Tensor], AcquisitionFunction]
    ) -> list[int]:
        """Rows of the pool with the largest values, each pending for the next."""
        chosen: list[int] = []
        for _ in range(min(n, len(pool))):
            with torch.no_grad():
                heights = value(self.hybrid.model, pool[chosen])(pool[:, None])
            heights = heights.nan_to_num(-torch.inf, torch.inf, -torch.inf)
            heights[chosen] = -torch.inf
            left = [k for k in range(len(pool)) if k not in chosen]
            chosen.append(max(left, key=lambda k: (float(heights[k]), -k)))
        return chosen + chosen[:1] * (n - len(chosen))


def _said_of(state: Mapping[str, Any], features: int) -> Said:
    said = state.get("said")
    if said is None or said["X"].shape[1] != features:
        return Said.nothing(features)
    return Said(said["X"], said["mean"], said["sd"])
