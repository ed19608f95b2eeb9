"""Evidence of guided generation on a Markov language model, against enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

from benchmarks.harness.spec import Quality, Value

__all__: list[str] = []

_RESAMPLERS = ("systematic", "stratified", "residual", "multinomial")
_THRESHOLDS = (0.0, 0.5, 1.0)
_SIZES = (4, 16, 64)
_MODES = ("ess", "entropy", "base")
_RUNS = 200


class _Alternating:
    """Likes a symbol that differs from the one before, and a first symbol that comes back."""

    def log_step(self, prefixes: Any, steps: Any) -> Any:
        import torch

        pairs = zip(prefixes, steps, strict=True)
        return torch.tensor([self.one(p.text, s.text) for p, s in pairs], dtype=torch.float64)

    @staticmethod
    def one(before: str, new: str) -> float:
        """Log potential of one step."""
        if not before or not new:
            return 0.0
        return (0.3 if new != before[-1] else -1.2) + (0.6 if new == before[0] else -0.2)


def _model() -> Any:
    from probkit.models.language import GuidedGeneration, MarkovLM, Steps

    rows = [[0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.2, 0.6, 0.1], [0.25] * 4]
    lm = MarkovLM([0.4, 0.3, 0.2, 0.1], rows, end=0.1)
    return GuidedGeneration(lm, _Alternating(), steps=Steps(stop=(), max_tokens=1, max_steps=5))


def _exact(model: Any) -> float:
    """Return Z, the sum of p(answer) times its potentials over all answers."""
    from probkit.models.language import Prefix

    def rest(text: str, tokens: tuple[int, ...], left: int) -> float:
        if left == 0:
            return 1.0
        total = 0.0
        for step in model.lm.outcomes(1, prefix=Prefix("go", tokens, 0, text)):
            weight = math.exp(step.log_p + _Alternating.one(text, step.text))
            ends = step.reason == "end"
            after = 1.0 if ends else rest(text + step.text, tokens + step.tokens, left - 1)
            total += weight * after
        return total

    return rest("", (), model.steps.max_steps)


def _ratio(name: str, model: Any, sampler: Any, exact: float, runs: int) -> Value:
    from probkit import infer

    post = infer(model, "go", sampler, rng=0, chains=runs)
    ratio = post.log_evidence.value.exp() / exact  # type: ignore[union-attr]
    error = float(ratio.std()) / runs**0.5
    note = f"mean of {runs} runs; standard error {error:.4f}, held within three of them"
    return Value(name, float(ratio.mean()), 1.0, 3.0 * error, note=note)


def _evaluate(quick: bool) -> list[Value]:
    from probkit.inference import Entropic, ParticleFilter

    model = _model()
    exact = _exact(model)
    runs = 40 if quick else _RUNS
    values = []
    for n, tau, scheme in itertools.product(_SIZES, _THRESHOLDS, _RESAMPLERS):
        if tau == 0.0 and scheme != _RESAMPLERS[0]:
            continue  # nothing is resampled
        name = f"N = {n}, {scheme}, threshold {tau:g}: estimate / exact"
        sampler = ParticleFilter(n, resampler=scheme, ess_threshold=tau)
        values.append(_ratio(name, model, sampler, exact, runs))
    for n, mode in itertools.product(_SIZES[1:], _MODES):
        tempering = Entropic(mode, ess_threshold=0.9, until=0.8)
        name = f"N = {n}, entropic ({mode}): estimate / exact"
        values.append(_ratio(name, model, ParticleFilter(n, tempering=tempering), exact, runs))
    return values


BENCHMARK = Quality(
    title="Evidence of guided generation, Markov language model",
    question=(
        "Is the mean of the evidence estimates over the exact evidence 1 within three standard "
        "errors, for every resampler, threshold and entropic mode?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
