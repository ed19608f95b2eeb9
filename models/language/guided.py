"""Guided generation: an answer as the path of a Feynman-Kac model.

An answer is a row of steps x_1, ..., x_T after a prompt c. The target is

    pi(x_1:T | c)  =  (1 / Z)  prod_t  p_LM(x_t | c, x_<t)  G_t(x_1:t),

with Z = E_LM[prod_t G_t] (Puri et al. 2025, equation 2, for accepted steps; Del Moral 2004 for the
general form). A potential per step gives the G_t as they stand; a value V gives
G_t = V_t / V_{t-1} with V_0 = 1, so that only the last value counts (twisted sequential Monte
Carlo). A finished answer stays as it is: G_t = 1 from then on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import storable
from probkit.model import Model, Site
from probkit.models.language.grafting import Grafting
from probkit.models.language.partial import Partial, step_between
from probkit.models.language.potentials.base import kind_of
from probkit.models.language.protocol import (
    Budget,
    Continuation,
    LanguageModel,
    Law,
    Prefix,
    Prompt,
    Usage,
    extended,
    require_capability,
)
from probkit.models.language.scoring import require_scores, score_under
from probkit.models.language.steps import Steps
from probkit.rng import Rng, stream

__all__ = ["GuidedGeneration"]

_COSTS = tuple(field.name for field in fields(Usage) if field.name != "seconds")
_NEVER = -math.inf
_REDRAWS = 3
_CLIP = 1e-7  # scores are kept this far from 0 and 1 before odds are taken, as its-hub does


@storable
@dataclass(frozen=True, eq=False)
class GuidedGeneration(Model):
    """Text from a language model, weighted by a potential: a ``Sequential`` model.

    Its data is the prompt: text, or the messages of a chat. Its particles are lists of
    :class:`~probkit.models.language.Partial`, one of them an answer so far. Particle filter,
    particle Gibbs and parallel tempering sample the target above exactly; the evidence that the
    filter estimates without bias is Z.

    Args:
        lm: The language model.
        potential: Rates each step, or each prefix; the two kinds are never mixed.
        steps: Where steps and answers end.
        law: The base law p_LM: a temperature other than 1 is another base model, and is recorded.
        proposal: What draws the steps in place of ``law``: another :class:`Law` (temperature,
            nucleus, mask) of the same model, or another language model with the same vocabulary.
            The weights carry p_LM / q. What a proposal never draws, the target loses: a mask should
            forbid only what the potential forbids too.
        budget: Limits for each chain of a run. A step is begun while there is room, so a limit is
            passed by one step at most; the run then stops with the particles as they are,
            validly weighted, and says so in ``attrs["stopped"]``. Chains that run on threads of
            one process share the back end's counters: each is charged for all of them.
        on_failure: What becomes of a request that the back end gave up: "redraw" asks three times
            more, then drops; "drop" gives the particle weight zero. Neither ends the run.
        power: The potential's exponent beta, G_t^beta.
        compat: "its_hub" weighs as that package does, for comparison only: biased. At every step
            every answer, finished or not, gets the odds of its whole score again. Needs a value
            potential with values in [0, 1].

    Raises:
        CapabilityError: The potential is of no kind or both, or the back end cannot do what the
            proposal needs.
        DataError: An option out of range.

    Example:
        >>> from probkit import infer
        >>> from probkit.inference import ParticleFilter
        >>> from probkit.models.language.markov import MarkovLM
        >>> class FewB:
        ...     def log_step(self, prefixes, steps):
        ...         return torch.tensor([-1.0 * step.text.count("b") for step in steps]).double()
        >>> lm = MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], end=0.2)
        >>> model = GuidedGeneration(lm, FewB(), steps=Steps(stop=(), max_tokens=1, max_steps=6))
        >>> post = infer(model, "go", ParticleFilter(64), rng=0)
        >>> len(post.particles.particles[0]), post.log_evidence.kind
        (64, 'estimate')
    """

    lm: Any
    potential: Any
    steps: Steps = Steps()
    law: Law = Law()
    proposal: Any = None
    budget: Budget | None = None
    on_failure: Literal["redraw", "drop"] = "redraw"
    power: float = 1.0
    compat: Literal["its_hub"] | None = None

    reports_extinction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.on_failure not in ("redraw", "drop"):
            raise DataError(
                f"GuidedGeneration: expected on_failure 'redraw' or 'drop', got {self.on_failure!r}"
            )
        if not (isinstance(self.power, int | float) and 0.0 < self.power < math.inf):
            raise DataError(
                f"GuidedGeneration: expected a finite power above 0, got {self.power!r}"
            )
        for name, kind in (("steps", Steps), ("law", Law)):
            if not isinstance(getattr(self, name), kind):
                raise DataError(
                    f"GuidedGeneration: expected {name} as {kind.__name__}, got "
                    f"{getattr(self, name)!r}"
                )
        kind_of(self.potential)
        _check_compat(self)
        _check_proposal(self)

    @functools.cached_property
    def kind(self) -> Literal["per_step", "value"]:
        """Which kind of potential it has."""
        return kind_of(self.potential)

    # ---------------------------------------------------------------- a Sequential model

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return no sites: the unknown is a text."""
        return {}

    def prepare(self, data: Any) -> Any:
        """Check the prompt.

        Raises:
            DataError: It is neither text nor messages, or empty.
        """
        if isinstance(data, str):
            if not data:
                raise DataError("GuidedGeneration: expected a prompt, got an empty string")
            return data
        listed = isinstance(data, list | tuple) and len(data) > 0
        if not listed or not all(isinstance(message, Mapping) for message in data):
            raise DataError(
                "GuidedGeneration: expected a prompt as text, or as messages [{'role': ..., "
                f"'content': ...}}, ...], got {data!r}"
            )
        return data

    def start(self, n: int, data: Prompt, *, rng: Rng) -> list[Partial]:
        """Return ``n`` times the prompt."""
        return [Partial(self.lm.start(data))] * n

    def extend(
        self, t: int, particles: Sequence[Partial], data: Prompt, *, rng: Rng
    ) -> list[Partial]:
        """Return the particles after step ``t``: those that go on get one more step.

        Raises:
            DataError: A log potential is NaN, plus infinity or above its bound.
        """
        idle = [p.idle for p in particles]
        if t >= self.steps.max_steps or all(idle):
            return [_at_rest(p) if rests else p for p, rests in zip(particles, idle, strict=True)]
        going = [k for k, rests in enumerate(idle) if not rests]
        before = [particles[k] for k in going]
        drawn = self._draw([p.prefix for p in before], _generator(rng))
        if "budget" in [step.reason for step in drawn]:
            return [_at_rest(p) if p.idle else _stopped(p) for p in particles]
        new = self.rated(t, before, drawn, self._log_ratios(before, drawn), going)
        if len(new) == len(idle):
            return new
        rest = iter(new)
        return [
            _at_rest(p) if rests else next(rest) for p, rests in zip(particles, idle, strict=True)
        ]

    def log_weight(
        self, t: int, old: Sequence[Partial], new: Sequence[Partial], data: Prompt
    ) -> Tensor:
        """Return the log weight increments [n] of step ``t``: log G_t^power + log p - log q."""
        if self.compat == "its_hub":
            return _log_odds(new)
        if self.power == 1.0:
            return torch.tensor([p.log_increment for p in new], dtype=torch.float64)
        return torch.tensor([_powered(p, self.power) for p in new], dtype=torch.float64)

    def log_potential(
        self, t: int, old: Sequence[Partial], new: Sequence[Partial], data: Prompt
    ) -> Tensor:
        """Return log G_t [n], to the power 1 and without the proposal's ratio."""
        plain = [_powered(p, 1.0) - (p.log_ratio if not p.dead else 0.0) for p in new]
        return torch.tensor(plain, dtype=torch.float64)

    def log_transition(
        self, t: int, old: Sequence[Partial], new: Sequence[Partial], data: Prompt
    ) -> Tensor:
        """Return log p_LM [n] of step ``t`` for pairs of partial answers.

        Minus infinity where the second does not continue the first by one step.
        """
        found = torch.full((len(old),), _NEVER, dtype=torch.float64)
        scored = []
        for k, (a, b) in enumerate(zip(old, new, strict=True)):
            if a.idle and a.prefix == b.prefix:
                found[k] = 0.0
            elif not a.idle and b.steps == a.steps + 1 and _continues(a.prefix, b.prefix):
                scored.append(k)
        if scored:
            steps = [step_between(old[k], new[k]) for k in scored]
            prefixes = [old[k].prefix for k in scored]
            found[scored] = score_under(self.lm, self.law, prefixes, steps)
        return found

    # ---------------------------------------------------------------- what samplers also ask

    def finished(self, particles: Sequence[Partial]) -> list[bool]:
        """Tell of each particle whether no further step can change it."""
        return [p.idle for p in particles]

    def reward(self, particles: Sequence[Partial]) -> Tensor:
        """Return the log potential of answers, [n]: what they are selected by."""
        return torch.tensor([p.log_potential for p in particles], dtype=torch.float64)

    def meter(self) -> dict[str, float]:
        """Return what the language models have cost since they were made.

        Seconds are counted only where the budget limits them: they differ between equal runs.
        """
        usage = self.lm.usage
        if self._other:
            usage = usage + self.proposal.usage
        found = {name: getattr(usage, name) for name in _COSTS}
        if self.budget is not None and self.budget.seconds is not None:
            found["seconds"] = usage.seconds
        return found

    def exhausted(self, spent: Mapping[str, float]) -> str | None:
        """Return which limit of the budget is reached, in words; None while there is room."""
        if self.budget is None:
            return None
        whole = {"seconds", "money"}
        known = {k: v if k in whole else int(v) for k, v in spent.items()}
        return self.budget.spent(Usage(**known))  # type: ignore[arg-type]

    def interrupted(self, particles: Sequence[Partial]) -> str:
        """Return why a step was not taken; empty where it was."""
        refused = any(p.reason == "budget" for p in particles)
        return "budget: the back end refused to go on" if refused else ""

    def state_of(self, particles: Sequence[Partial]) -> str:
        """Say how a run that left these particles ended; empty where all answers are finished."""
        if stop := self.interrupted(particles):
            return stop
        failed = sum(p.reason == "failed" for p in particles)
        open_ = sum(not p.finished and not p.dead for p in particles)
        parts = []
        if open_:
            parts.append(f"max_steps: {open_} of {len(particles)} answers are not finished")
        if failed:
            parts.append(f"failed: {failed} of {len(particles)} answers were dropped")
        return "; ".join(parts)

    def describe(self, particles: Sequence[Partial]) -> dict[str, list[Any]]:
        """Return numbers and texts that describe each particle, for the export."""
        return {
            "log_potential": [p.log_potential for p in particles],
            "n_steps": [p.steps for p in particles],
            "n_tokens": [len(p.prefix.generated) for p in particles],
            "finished": [p.finished for p in particles],
            "text": [p.prefix.text for p in particles],
        }

    def reported(self) -> Mapping[str, Any]:
        """Return choices that belong on record with every result."""
        record: dict[str, Any] = {"potential_kind": self.kind, "law": _law_text(self.law)}
        if self.proposal is not None:
            other = type(self.proposal).__name__ if self._other else _law_text(self.proposal)
            record["proposal"] = other
        if self.power != 1.0:
            record["power"] = float(self.power)
        if self.compat is not None:
            record["compat"] = f"{self.compat}: biased, for comparison only"
        return record

    def tempered(self, power: float) -> GuidedGeneration:
        """Return the model with its potential to a further power."""
        return replace(self, power=self.power * power)

    def greedy(self) -> GuidedGeneration:
        """Return the model that takes the most probable token, without a proposal."""
        return replace(self, law=replace(self.law, temperature=0.0), proposal=None)

    def sampler(self) -> Any:
        """Return a particle filter of 32 particles."""
        from probkit.inference import ParticleFilter

        return ParticleFilter(32)

    def predict(self, post: Any, x: Any, **options: Any) -> Any:
        """Refuse: the particles are the answers.

        Raises:
            CapabilityError: Always.
        """
        raise CapabilityError(
            "GuidedGeneration has nothing to predict: the answers are post.particles; "
            "answer_posterior(post, parse) gives the law of what they say"
        )

    # ---------------------------------------------------------------- ancestor sampling

    def require_future(self, who: str) -> None:
        """Check that the remaining text of an answer can be scored after another prefix.

        Raises:
            CapabilityError: The back end cannot.
        """
        remedy = "Use ancestor_sampling=False"
        require_scores(self.lm, self.law, who, remedy)
        if self._other:
            require_scores(self.proposal, Law(), who, remedy)
        elif self.proposal is not None:
            require_scores(self.lm, self.proposal, who, remedy)
        if self.compat is not None:
            raise CapabilityError(f"{who} has no meaning with compat={self.compat!r}. {remedy}")

    def log_future(
        self, t: int, particles: Sequence[Partial], path: Sequence[Partial], data: Prompt
    ) -> Tensor:
        """Return log of p_LM and potentials [n] of a path's steps after ``t``, put on particles.

        See :class:`~probkit.models.language.grafting.Grafting`.
        """
        return Grafting(self, path, t).log_future(particles)

    def graft(
        self, t: int, particle: Partial, path: Sequence[Partial], data: Prompt
    ) -> list[Partial]:
        """Return ``path`` with its first ``t + 1`` partial answers replaced by ``particle``'s."""
        return Grafting(self, path, t).onto(particle)

    # ---------------------------------------------------------------- parts

    @functools.cached_property
    def _other(self) -> bool:
        """Whether another language model proposes."""
        return self.proposal is not None and not isinstance(self.proposal, Law)

    def _draw(self, prefixes: list[Prefix], rng: torch.Generator) -> list[Continuation]:
        """Draw one step each; failed requests are drawn again where that is asked for."""
        drawn = self._generate(prefixes, rng)
        for _ in range(_REDRAWS if self.on_failure == "redraw" else 0):
            failed = [k for k, s in enumerate(drawn) if s.reason == "failed" and s.log_q != _NEVER]
            if not failed:
                break
            again = self._generate([prefixes[k] for k in failed], rng)
            for k, step in zip(failed, again, strict=True):
                drawn[k] = step
        return drawn

    def _generate(self, prefixes: list[Prefix], rng: torch.Generator) -> list[Continuation]:
        steps = self.steps
        if self._other:
            drawn = self.proposal.generate(
                prefixes, stop=steps.stops, max_tokens=steps.limit, rng=rng
            )
        elif self.proposal is None:
            drawn = self.lm.generate(
                prefixes, stop=steps.stops, max_tokens=steps.limit, law=self.law, rng=rng
            )
        else:
            drawn = self.lm.generate(
                prefixes,
                stop=steps.stops,
                max_tokens=steps.limit,
                law=self.proposal,
                base=self.law,
                rng=rng,
            )
        return list(drawn)

    def _log_ratios(
        self, before: Sequence[Partial], drawn: Sequence[Continuation]
    ) -> list[float] | None:
        """Log p / q of drawn steps; None without a proposal."""
        if self.proposal is None:
            return None
        log_p = [step.log_p for step in drawn]
        if self._other:
            kept = [k for k, step in enumerate(drawn) if step.reason != "failed"]
            prefixes = [before[k].prefix for k in kept]
            scores = score_under(self.lm, self.law, prefixes, [drawn[k] for k in kept])
            log_p = [_NEVER] * len(drawn)
            for k, value in zip(kept, scores.tolist(), strict=True):
                log_p[k] = value
        ratios = [
            _NEVER if p == _NEVER else p - step.log_q for p, step in zip(log_p, drawn, strict=True)
        ]
        if any(math.isnan(r) for r, s in zip(ratios, drawn, strict=True) if s.reason != "failed"):
            raise CapabilityError(
                f"a proposal needs log p and log q of every step; {type(self.lm).__name__} did not "
                "tell them for this law (a server may report log probabilities of its own law "
                "only). Use proposal=None, or a back end in this process"
            )
        return ratios

    def log_ratio_of(self, prefix: Prefix, step: Continuation) -> float:
        """Return log p / q of a given step."""
        if self.proposal is None:
            return 0.0
        lm, law = (self.proposal, Law()) if self._other else (self.lm, self.proposal)
        log_q = float(score_under(lm, law, [prefix], [step]))
        log_p = float(score_under(self.lm, self.law, [prefix], [step]))
        return _NEVER if log_p == _NEVER else log_p - log_q

    def rated(
        self,
        t: int,
        before: Sequence[Partial],
        drawn: Sequence[Continuation],
        ratios: Sequence[float] | None,
        numbers: Sequence[int],
    ) -> list[Partial]:
        """Return partial answers extended by given steps, with their potentials.

        Args:
            t: The step, for errors.
            before: n partial answers.
            drawn: Their n steps.
            ratios: Log p / q of the steps; None for zeros.
            numbers: What errors call each of them.
        """
        ratios = [0.0] * len(drawn) if ratios is None else ratios
        alive = [
            k for k, step in enumerate(drawn) if step.reason != "failed" and ratios[k] != _NEVER
        ]
        if len(alive) == len(drawn):
            return self._rated_alive(t, before, drawn, ratios, numbers)
        kept = self._rated_alive(
            t,
            [before[k] for k in alive],
            [drawn[k] for k in alive],
            [ratios[k] for k in alive],
            [numbers[k] for k in alive],
        )
        after = [_killed(p, step) for p, step in zip(before, drawn, strict=True)]
        for k, new in zip(alive, kept, strict=True):
            after[k] = new
        return after

    def _rated_alive(
        self,
        t: int,
        before: Sequence[Partial],
        drawn: Sequence[Continuation],
        ratios: Sequence[float],
        numbers: Sequence[int],
    ) -> list[Partial]:
        if not drawn:
            return []
        ends = self.steps.ends_answer
        ended = [ends(step) for step in drawn]
        prefixes = [p.prefix for p in before]
        grown = [extended(prefix, step) for prefix, step in zip(prefixes, drawn, strict=True)]
        if self.kind == "per_step":
            gains = self._checked(self.potential.log_step(prefixes, drawn), t, numbers)
            totals = [p.log_potential + g for p, g in zip(before, gains, strict=True)]
        else:
            totals = self._checked(self.potential.log_value(grown, ended), t, numbers)
            gains = [v - p.log_potential for v, p in zip(totals, before, strict=True)]
        return [
            Partial(prefix, end, total, gain + ratio, p.steps + 1, step.reason, ratio)
            for prefix, end, total, gain, ratio, p, step in zip(
                grown, ended, totals, gains, ratios, before, drawn, strict=True
            )
        ]

    def _checked(self, values: Any, t: int, numbers: Sequence[int]) -> list[float]:
        """Check log potentials and return them as numbers."""
        found = values.tolist() if isinstance(values, Tensor) else list(values)
        who = type(self.potential).__name__
        if not isinstance(found, list) or len(found) != len(numbers):
            shape = list(values.shape) if isinstance(values, Tensor) else [len(found)]
            raise ShapeError(
                f"{who}: expected log potentials [n={len(numbers)}], one for each step, got {shape}"
            )
        bound = getattr(self.potential, "log_bound", None)
        top = math.inf if bound is None else bound + 1e-9
        for value, number in zip(found, numbers, strict=True):
            if not value <= top or value == math.inf:
                limit = "" if bound is None else f" and at most its bound {bound:g}"
                raise DataError(
                    f"{who}: log potential of particle {number} at step {t} is {value}; expected a "
                    f"finite number or -inf{limit}"
                )
        return found


def _at_rest(p: Partial) -> Partial:
    """A particle that takes no further part: its weight changes no more."""
    if p.dead or (p.log_increment == 0.0 and p.log_ratio == 0.0):
        return p
    return p._replace(log_increment=0.0, log_ratio=0.0)


def _stopped(p: Partial) -> Partial:
    """A particle that a budget of the back end stopped before its step."""
    return p._replace(log_increment=0.0, log_ratio=0.0, reason="budget")


def _killed(p: Partial, step: Continuation) -> Partial:
    """A particle whose step failed, or that the target excludes."""
    dead_end = step.reason == "failed" and step.log_q == _NEVER
    reason = "dead end" if dead_end else step.reason
    return p._replace(log_potential=_NEVER, log_increment=_NEVER, log_ratio=0.0, reason=reason)


def _powered(p: Partial, power: float) -> float:
    if p.log_increment == _NEVER:
        return _NEVER
    return power * (p.log_increment - p.log_ratio) + p.log_ratio


def _log_odds(particles: Sequence[Partial]) -> Tensor:
    """Log odds of the value of whole answers, clipped, [n]."""
    value = torch.tensor([p.log_potential for p in particles], dtype=torch.float64).exp()
    value = value.clamp(_CLIP, 1.0 - _CLIP)
    return value.log() - (-value).log1p()


def _continues(old: Prefix, new: Prefix) -> bool:
    return (
        new.text.startswith(old.text)
        and new.tokens[: len(old.tokens)] == old.tokens
        and new.prompt == old.prompt
    )


def _generator(rng: Rng) -> torch.Generator:
    return rng if isinstance(rng, torch.Generator) else stream(rng, "guided")


def _law_text(law: Law) -> str:
    text = f"temperature={law.temperature:g}, top_p={law.top_p:g}"
    return text if law.allowed is None else f"{text}, masked"


def _check_compat(model: GuidedGeneration) -> None:
    if model.compat not in (None, "its_hub"):
        raise DataError(
            f"GuidedGeneration: expected compat None or 'its_hub', got {model.compat!r}"
        )
    if model.compat is None:
        return
    if model.kind != "value":
        raise CapabilityError(
            "GuidedGeneration(compat='its_hub') takes the odds of a score of the whole prefix; "
            "expected a value potential, got one per step"
        )
    if model.proposal is not None or model.power != 1.0:
        raise DataError(
            "GuidedGeneration(compat='its_hub') knows neither proposal nor power; leave them out"
        )


def _check_proposal(model: GuidedGeneration) -> None:
    """Check that p / q can be had."""
    proposal, lm = model.proposal, model.lm
    if proposal is None:
        return
    if isinstance(proposal, Law):
        if proposal.temperature == 0.0:
            raise DataError(
                "GuidedGeneration: a proposal of temperature 0 draws one text only; expected a "
                "temperature above 0"
            )
        require_capability(lm, "logprobs", "a proposal", "Use proposal=None")
        if proposal.allowed is not None or model.law.allowed is not None:
            require_capability(lm, "logits", "a mask", "Use a law without allowed")
        return
    if not isinstance(proposal, LanguageModel):
        raise DataError(
            f"GuidedGeneration: expected proposal as a Law or a language model, got {proposal!r}"
        )
    remedy = "Use a Law of the same model as proposal, or none"
    require_capability(proposal, "logprobs", "another model as proposal", remedy)
    require_scores(lm, model.law, "another model as proposal", remedy)
    if _vocabulary(lm) is None or _vocabulary(lm) != _vocabulary(proposal):
        raise CapabilityError(
            "another model as proposal needs the same vocabulary, so that a row of tokens has a "
            f"probability under both; {type(lm).__name__} and {type(proposal).__name__} do not "
            f"show one. {remedy}"
        )


def _vocabulary(lm: Any) -> tuple[str, ...] | None:
    if not lm.capabilities.logits:
        return None
    return tuple(lm.vocabulary)
