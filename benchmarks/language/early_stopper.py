"""The early stopper: how much weight an answer gets for ending soon.

The first token is S with probability one half and ends the answer, with score 0.8; else four steps
follow, each of score 0.7. With scores per step the exact P(S) is 0.769, with a score of the whole
answer 0.533. its-hub weighs every answer anew at every step, the finished ones too.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from benchmarks import envs
from benchmarks.harness.spec import Quality, Value

__all__: list[str] = []

_STEP = 0.4 / (0.4 + 0.5 * 0.7**4)
_WHOLE = 0.8 / 1.5
_LIMIT = 1.0 / (1.0 + ((0.7 / 0.3) / (0.8 / 0.2)) ** 4)

_PEER = """
import asyncio, json, random, sys
from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
from its_hub.core.lms.step_generation import StepGeneration

class Language:
    async def agenerate(self, messages, stop=None, **options):
        return [{"role": "assistant", "content": self.next(m)} for m in messages]
    def next(self, messages):
        first = len(messages) == 1
        return random.choice("Sx") if first else "x"

class Score:
    async def ascore(self, prompt, answers):
        return [0.8 if answer[:1] in ("", "S") else 0.7 for answer in answers]

class Keep(StepGeneration):
    def _post_process(self, steps, stopped=False):
        return "".join(steps)

random.seed(0)
generation = Keep(max_steps=3, tokens_per_step=1, stop_token="S")
filter_ = ParticleFiltering(generation, Score())
shares = []
for _ in range(int(sys.argv[1])):
    found = asyncio.run(filter_.ainfer(Language(), "go", 64, return_response_only=False))
    assert set(found.steps_used_lst) <= {1, 4}, found.steps_used_lst
    shares.append(sum(r["content"] == "S" for r in found.responses) / 64)
print(json.dumps(shares))
"""


class _StepScore:
    """0.8 for S, 0.7 for every other step."""

    def log_step(self, prefixes: Any, steps: Any) -> Any:
        import torch

        scores = [0.8 if "S" in step.text else 0.7 for step in steps]
        return torch.tensor(scores, dtype=torch.float64).log()


class _WholeScore:
    """0.8 for the answer S, 0.7 for every other prefix."""

    def log_value(self, prefixes: Any, finished: Any) -> Any:
        import torch

        scores = [0.8 if "S" in prefix.text else 0.7 for prefix in prefixes]
        return torch.tensor(scores, dtype=torch.float64).log()


def _shares(potential: Any, n: int, runs: int, **options: Any) -> list[float]:
    """Weight of S in each of many runs."""
    import torch

    from probkit import infer
    from probkit.inference import ParticleFilter
    from probkit.models.language import GuidedGeneration, MarkovLM, Steps

    lm = MarkovLM([0.5, 0.5], [[0.0, 1.0], [0.0, 1.0]], symbols=["S", "x"])
    steps = Steps(stop=(), max_tokens=1, max_steps=4, final=("S",))
    model = GuidedGeneration(lm, potential, steps=steps, **options)
    sampler = ParticleFilter(n, resampler="multinomial", ess_threshold=1.0)
    post = infer(model, "go", sampler, rng=0, chains=runs)
    chains = post.particles.particles  # type: ignore[union-attr]
    here = torch.tensor([[p.text == "S" for p in row] for row in chains])
    found: list[float] = (here * post.log_weights.exp()).sum(1).tolist()  # type: ignore[union-attr]
    return found


def _summary(name: str, shares: list[float], reference: float, slack: float, note: str) -> Value:
    """Mean share with three standard errors, and what the reference itself may be off."""
    import statistics

    error = statistics.stdev(shares) / len(shares) ** 0.5
    note = f"{note}; mean of {len(shares)} runs, standard error {error:.4f}"
    return Value(name, statistics.mean(shares), reference, 3.0 * error + slack, note=note)


def _peer(runs: int) -> list[float]:
    python = envs.python_of("its_hub")
    done = subprocess.run(
        [python, "-c", _PEER, str(runs)], check=True, capture_output=True, text=True
    )
    shares: list[float] = json.loads(done.stdout)
    return shares


def _evaluate(quick: bool) -> list[Value]:
    runs = 30 if quick else 400
    measured = "0.893 +- 0.005 was measured with its-hub 1.2.0 elsewhere"
    limit = f"its rule tends to {_LIMIT:.3f} as N grows"
    large = _shares(_WholeScore(), 4096, max(4, runs // 50), compat="its_hub")
    return [
        _summary(
            "P(S), per step, N = 1024", _shares(_StepScore(), 1024, runs // 10), _STEP, 0.0, "exact"
        ),
        _summary(
            "P(S), value, N = 1024", _shares(_WholeScore(), 1024, runs // 10), _WHOLE, 0.0, "exact"
        ),
        _summary(
            'P(S), compat="its_hub", N = 64',
            _shares(_WholeScore(), 64, runs, compat="its_hub"),
            0.893,
            0.015,
            measured,
        ),
        _summary('P(S), compat="its_hub", N = 4096', large, _LIMIT, 0.001, limit),
        _summary("P(S), its-hub 1.2.0, N = 64", _peer(runs), 0.893, 0.015, measured),
    ]


BENCHMARK = Quality(
    title="The early stopper",
    question=(
        "How much weight does an answer get that ends after its first step (scores 0.8 against "
        "four steps of 0.7)?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
