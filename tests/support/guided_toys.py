"""Small guided generations whose targets can be written down by enumeration."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from probkit.models.language.guided import GuidedGeneration
from probkit.models.language.markov import MarkovLM
from probkit.models.language.partial import Partial
from probkit.models.language.protocol import Continuation, Prefix, extended
from probkit.models.language.steps import Steps

PROMPT = "go"


def chain(end: float = 0.15) -> MarkovLM:
    """Three symbols that follow each other unevenly."""
    return MarkovLM([0.5, 0.3, 0.2], [[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4]], end=end)


class Local:
    """Rates the symbol of a step, whatever precedes it."""

    local = True
    table = {"a": 0.3, "b": 1.2, "c": 0.5}

    def log_step(self, prefixes, steps):
        weights = [math.prod(self.table[s] for s in step.text) for step in steps]
        return torch.tensor(weights, dtype=torch.float64).log()


class Prefixed:
    """Rates a step by the first symbol of the answer and by its length; forbids some."""

    def log_step(self, prefixes, steps):
        return torch.tensor(
            [self.one(p.text, s.text) for p, s in zip(prefixes, steps, strict=True)],
            dtype=torch.float64,
        )

    @staticmethod
    def one(before: str, new: str) -> float:
        whole = before + new
        if whole.startswith("ba") and new == "c":
            return -math.inf
        likes = {"a": "c", "b": "b", "c": "a"}
        strength = 1.5 if before[:1] and new[:1] == likes[before[0]] else -0.7
        return strength - 0.1 * len(before)


class Value:
    """The value of a whole prefix; ``early`` changes the values of unfinished ones only."""

    def __init__(self, early: float = 1.0, steps: int = 3) -> None:
        self.early, self.steps = early, steps

    def log_value(self, prefixes, finished):
        return torch.tensor(
            [self.one(p.text, done) for p, done in zip(prefixes, finished, strict=True)],
            dtype=torch.float64,
        )

    def one(self, text: str, finished: bool) -> float:
        score = 0.8 * text.count("b") - 0.5 * text.count("c") + (0.9 if text[:1] == "c" else 0.0)
        last = finished or len(text) >= self.steps
        return score if last else self.early * score


def model_of(potential, **options) -> GuidedGeneration:
    """One symbol a step, three steps."""
    settings = {"steps": Steps(stop=(), max_tokens=1, max_steps=3), "lm": chain(), **options}
    return GuidedGeneration(settings.pop("lm"), potential, **settings)


def enumerate_target(model: GuidedGeneration) -> SimpleNamespace:
    """All answers, their exact probabilities, Z, and a path of partial answers for each.

    Written from the definition of the target, without the model's own bookkeeping.
    """
    found = []

    def walk(path: list[Partial], log_p: float) -> None:
        now = path[-1]
        if now.finished or now.steps == model.steps.max_steps:
            rest = [now._replace(log_increment=0.0)] * (model.steps.max_steps + 1 - len(path))
            found.append(([*path, *rest], log_p + model.power * now.log_potential))
            return
        law = {"law": model.law}
        for step in model.lm.outcomes(
            model.steps.limit, prefix=now.prefix, stop=model.steps.stops, **law
        ):
            prefix = extended(now.prefix, step)
            done = model.steps.ends_answer(step)
            if model.kind == "per_step":
                gain = float(model.potential.log_step([now.prefix], [step]))
                total = now.log_potential + gain
            else:
                total = float(model.potential.log_value([prefix], [done]))
                gain = total - now.log_potential
            if total > -math.inf:
                new = Partial(prefix, done, total, gain, now.steps + 1, step.reason)
                walk([*path, new], log_p + step.log_q)

    walk([Partial(Prefix(PROMPT))], 0.0)
    logs = torch.tensor([log for _, log in found], dtype=torch.float64)
    log_z = logs.logsumexp(0)
    weights = (logs - log_z).exp()
    keys = [key_of(path[-1]) for path, _ in found]
    return SimpleNamespace(
        paths=[path for path, _ in found],
        weights=weights,
        log_evidence=float(log_z),
        law=dict(zip(keys, weights.tolist(), strict=True)),
        keys=keys,
    )


def key_of(partial: Partial) -> tuple[str, bool]:
    """What tells answers apart."""
    return partial.prefix.text, partial.finished


def evidence_z(post, log_evidence: float) -> float:
    """(mean of the evidence estimates - truth) / its standard error."""
    ratio = (post.log_evidence.value - log_evidence).exp()
    return float((ratio.mean() - 1.0) / (ratio.std() / len(ratio) ** 0.5))


def posterior_z(post, truth, least: float = 0.1) -> float:
    """Largest |z| of the unbiased estimates Zhat sum_i w_i 1{answer} / Z of probable answers."""
    ratio = (post.log_evidence.value - truth.log_evidence).exp()
    worst = 0.0
    for key, expected in truth.law.items():
        if expected < least:
            continue
        here = torch.tensor(
            [[key_of(p) == key for p in row] for row in post.particles.particles]
        ).double()
        each = ratio * (here * post.log_weights.exp()).sum(1)
        worst = max(worst, abs(float((each.mean() - expected) / (each.std() / len(each) ** 0.5))))
    return worst


class Flaky:
    """A language model whose requests fail, by chance or for good, with a given reason."""

    def __init__(self, lm, share: float = 0.3, reason: str = "failed", after: int = 0) -> None:
        self.lm, self.share, self.reason, self.after = lm, share, reason, after
        self.calls = 0

    capabilities = property(lambda self: self.lm.capabilities)
    usage = property(lambda self: self.lm.usage)
    vocabulary = property(lambda self: self.lm.vocabulary)

    def start(self, prompt):
        return self.lm.start(prompt)

    def score(self, prefixes, steps):
        return self.lm.score(prefixes, steps)

    def next_log_probs(self, prefixes):
        return self.lm.next_log_probs(prefixes)

    def generate(self, prefixes, *, rng, **options):
        drawn = self.lm.generate(prefixes, rng=rng, **options)
        self.calls += 1
        u = torch.rand(len(drawn), generator=rng).tolist()
        gone = Continuation((), "", math.nan, math.nan, self.reason, 0)
        late = self.calls > self.after
        return [gone if late and x < self.share else step for x, step in zip(u, drawn, strict=True)]
