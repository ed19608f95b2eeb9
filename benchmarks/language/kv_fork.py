"""Particles in SmolLM2: forked keys and values, plain batched decoding, reading again."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.harness.spec import (
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Goal,
    Task,
    Unavailable,
    Workload,
)

_PROMPT_TOKENS, _ROUNDS, _STEP = 256, 3, 12


@functools.cache
def _loaded(device: str) -> Any:
    from probkit.models.language import load_smollm2, smollm2_path

    if smollm2_path() is None:
        raise Unavailable("the weights of SmolLM2 are not installed: probkit fetch smollm2")
    return load_smollm2(device=device)


def _prompt(lm: Any) -> Any:
    """A prompt of a fixed number of tokens."""
    text = " ".join(f"{a} plus {b} is {a + b}." for a in range(1, 9) for b in range(1, 9))
    return lm.start(lm.tokenizer.decode(lm.start(text).tokens[:_PROMPT_TOKENS]))


def _ancestors(n: int) -> list[int]:
    """Who is continued after a round: half of the particles, each twice."""
    return [2 * (k // 2) % n for k in range(n)]


def _forked(workload: Workload, device: str) -> Task:
    import torch

    from probkit.models.language.protocol import extended

    lm, n = _loaded(device), int(workload["particles"])
    lm.end_ids = ()  # Every step is of full length, so that all sides do the same work.
    prompt = _prompt(lm)

    def run() -> int:
        lm.forget()
        rng = torch.Generator().manual_seed(0)
        prefixes, made = [prompt] * n, 0
        for _ in range(_ROUNDS):
            steps = lm.generate(prefixes, max_tokens=_STEP, rng=rng)
            made += sum(step.n_tokens for step in steps)
            moved = [extended(p, s) for p, s in zip(prefixes, steps, strict=True)]
            prefixes = [moved[k] for k in _ancestors(n)]
        return made

    return Task(run, _fingerprint, units=float)


def _fingerprint(made: int) -> Fingerprint:
    return {"tokens": [float(made)]}


def _decode(model: Any, logits: Any, cache: Any, steps: int, generator: Any) -> Any:
    """Draw tokens for a batch whose keys and values are at hand; [row, steps]."""
    import torch

    drawn = []
    for _ in range(steps):
        probs = torch.softmax(logits.float(), -1)
        token = torch.multinomial(probs, 1, generator=generator)
        drawn.append(token)
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1]
    return torch.cat(drawn, -1)


def _plain(workload: Workload, device: str) -> Task:
    """One batch from end to end, the prompt read once: nothing is resampled."""
    import torch
    from transformers import DynamicCache

    lm, n = _loaded(device), int(workload["particles"])
    model = lm.model
    ids = torch.tensor([_prompt(lm).tokens], device=device)

    def run() -> int:
        generator = torch.Generator(device=device).manual_seed(0)
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(n)
            logits = out.logits[:, -1].expand(n, -1)
            drawn = _decode(model, logits, cache, _ROUNDS * _STEP, generator)
        return int(drawn.numel())

    return Task(run, _fingerprint, units=float)


def _reread(workload: Workload, device: str) -> Task:
    """Every round reads the prompt and all that was generated again, for every particle."""
    import torch
    from transformers import DynamicCache

    lm, n = _loaded(device), int(workload["particles"])
    model = lm.model
    prompt = torch.tensor([_prompt(lm).tokens] * n, device=device)

    def run() -> int:
        generator = torch.Generator(device=device).manual_seed(0)
        ids, made = prompt, 0
        with torch.no_grad():
            for _ in range(_ROUNDS):
                cache = DynamicCache(config=model.config)
                out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                drawn = _decode(model, out.logits[:, -1], cache, _STEP, generator)
                made += int(drawn.numel())
                ids = torch.cat([ids, drawn], -1)[_ancestors(n)]
        return made

    return Task(run, _fingerprint, units=float)


_PACKAGES = ("probkit", "torch", "transformers", "gguf")
_SAME = "all draw at random from one model; that their logits are equal is a test"

BENCHMARK = Benchmark(
    title="SmolLM2-135M with forked keys and values",
    question=(
        f"What does a generated token cost ({_ROUNDS} rounds of {_STEP} tokens after a prompt of "
        f"{_PROMPT_TOKENS}, resampled in between, float32, one thread), against plain batched "
        "decoding of the same model without resampling, and against reading everything again?"
    ),
    workloads=({"particles": 1}, {"particles": 4}, {"particles": 16}),
    gpu_workloads=({"particles": 16}, {"particles": 64}),
    contenders=(
        Contender("probkit", _forked, _PACKAGES, devices=("cpu", "cuda")),
        Contender("plain decoding", _plain, _PACKAGES, devices=("cpu", "cuda")),
        Contender("reading again", _reread, _PACKAGES, devices=("cpu", "cuda")),
    ),
    comparisons=(
        Comparison(
            ours="probkit",
            peer="plain decoding",
            agreement=_SAME,
            goal=Goal("at most 1/0.85 times plain batched decoding", 1 / 0.85),
        ),
        Comparison(ours="probkit", peer="reading again", agreement=_SAME),
    ),
    repeats=3,
    unit="token",
)
