"""What the controller of a particle filter costs for each particle and step.

Language model and scores are toys that cost next to nothing, the same on both sides: one random
number as text, which is also the score. 32 steps, resampling at each of them.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import (
    Agreement,
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Goal,
    Task,
    Workload,
)

__all__: list[str] = []

_STEPS = 32


def _lengths(steps: list[int]) -> Fingerprint:
    """Fewest and most steps of an answer."""
    return {"steps": [min(steps), max(steps)], "answers": [len(steps)]}


def _probkit(workload: Workload, device: str) -> Task:
    import torch

    from probkit import infer
    from probkit.inference import ParticleFilter
    from probkit.models.language import Capabilities, Continuation, GuidedGeneration, Prefix, Steps
    from probkit.models.language import Usage as Spent

    class Toy:
        capabilities, usage, vocabulary = Capabilities(), Spent(), ()

        def start(self, prompt: str) -> Prefix:
            return Prefix(prompt)

        def generate(self, prefixes: Any, *, rng: Any, **options: Any) -> list[Continuation]:
            drawn = torch.rand(len(prefixes), generator=rng).tolist()
            return [Continuation((), f"{x:.3f}", 0.0, 0.0, "length", 1) for x in drawn]

    class Score:
        def log_value(self, prefixes: Any, finished: Any) -> torch.Tensor:
            scores = [min(max(float(p.text[-5:]), 0.05), 0.95) for p in prefixes]
            return torch.tensor(scores, dtype=torch.float64).log()

    n = int(workload["n"])
    steps = Steps(stop=(), max_tokens=1, max_steps=_STEPS)
    model = GuidedGeneration(Toy(), Score(), steps=steps)
    sampler = ParticleFilter(n, resampler="multinomial", ess_threshold=1.0)

    def run() -> list[int]:
        post = infer(model, "go", sampler, rng=0)
        return [p.steps for p in post.particles.particles[0]]  # type: ignore[union-attr]

    return Task(run, _lengths, units=lambda result: float(n * _STEPS))


def _its_hub(workload: Workload, device: str) -> Task:
    import asyncio
    import random

    from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
    from its_hub.core.lms.step_generation import StepGeneration

    class Toy:
        async def agenerate(self, messages: Any, stop: Any = None, **options: Any) -> Any:
            return [{"role": "assistant", "content": f"{random.random():.3f}"} for _ in messages]

    class Score:
        async def ascore(self, prompt: str, answers: list[str]) -> list[float]:
            return [min(max(float(answer[-5:]), 0.05), 0.95) for answer in answers]

    n = int(workload["n"])
    # It takes one step more than max_steps says.
    generation = StepGeneration(max_steps=_STEPS - 1, tokens_per_step=1)
    filter_ = ParticleFiltering(generation, Score())

    def run() -> list[int]:
        found = asyncio.run(filter_.ainfer(Toy(), "go", n, return_response_only=False))
        steps: list[int] = found.steps_used_lst
        return steps

    return Task(run, _lengths, units=lambda result: float(n * _STEPS))


BENCHMARK = Benchmark(
    title="Controller overhead of guided generation",
    question=(
        "How long does a particle filter itself take for each particle and step (32 steps, "
        "resampling at each, toy language model and scores), against its-hub?"
    ),
    workloads=({"n": 16}, {"n": 128}, {"n": 1024}),
    contenders=(
        Contender("probkit", _probkit, ("probkit", "torch")),
        Contender("its-hub", _its_hub, ("its_hub", "numpy"), env="its_hub"),
    ),
    comparisons=(
        Comparison(
            ours="probkit",
            peer="its-hub",
            agreement=Agreement(("steps", "answers")),
            goal=Goal("at most the CPU time of its-hub", 1.0),
        ),
    ),
    repeats=7,
    min_seconds=0.3,
    unit="particle-step",
    notes=(
        "probkit also keeps the ancestry, traces and costs of every step, and can resume a run.",
        "Profile at n = 16, 0.65 ms a step: some forty operations on tiny tensors, whose cost does "
        "not depend on n, are most of it (resampling 17 %, weights 10 %, statistics and checkpoint "
        "book-keeping 10 %).",
    ),
)
