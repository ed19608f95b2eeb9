"""One cell: twelve tokens without the letter e, by three ways of drawing them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.language._cells import path_of, save

__all__ = ["PARTICLES", "PROMPT", "SEEDS", "TABLE", "TOKENS", "cell", "fill"]

TABLE = "constrained"
SEEDS, PARTICLES, TOKENS = 10, 16, 12
PROMPT = "On a sunny morning in May, my dog and I"


def _without_e(text: str) -> bool:
    return "e" not in text.lower()


def _models(lm: Any) -> dict[str, tuple[Any, Any]]:
    """Model and filter of each way."""
    from probkit.inference import ParticleFilter
    from probkit.models.language import GuidedGeneration, Law, Steps
    from probkit.models.language.potentials import VerifierPotential, tokens_where

    rule = VerifierPotential(_without_e, kind="value")
    tokens = Steps(stop=(), max_tokens=1, max_steps=TOKENS)
    plain = GuidedGeneration(lm, rule, steps=tokens)
    mask = Law(allowed=tokens_where(_without_e, lm.vocabulary))
    masked = GuidedGeneration(lm, rule, steps=tokens, proposal=mask)
    return {
        "independent": (plain, ParticleFilter(PARTICLES, ess_threshold=0.0)),
        "bootstrap": (plain, ParticleFilter(PARTICLES)),
        "masked": (masked, ParticleFilter(PARTICLES)),
    }


def cell(lm: Any, seed: int) -> dict[str, Any]:
    """Return what became of the particles of each way."""
    import probkit as pk

    found: dict[str, Any] = {"seed": seed}
    for way, (model, sampler) in _models(lm).items():
        before = lm.usage
        post = pk.infer(model, PROMPT, sampler, rng=seed)
        log_z = float(post.log_evidence.value)
        extinct = int(post.sample_stats["extinct_at"])
        kept = [
            particle.text
            for particle, weight in zip(
                post.particles.particles[0], post.log_weights[0].tolist(), strict=True
            )
            if weight > -float("inf") and extinct < 0
        ]
        assert all(_without_e(text) for text in kept)
        found[way] = {
            "alive": len(kept),
            "distinct": len(set(kept)),
            "extinct_at_token": extinct + 1 if extinct >= 0 else None,
            "log_z": None if extinct >= 0 else round(log_z, 4),
            "tokens": (lm.usage - before).completion_tokens,
            "texts": sorted(set(kept))[:3],
        }
    return found


def fill(load: Callable[[], Any], room: Callable[[], bool]) -> None:
    """Compute the missing cells while there is room; ``load`` returns the language model."""
    todo = [seed for seed in range(SEEDS) if not path_of(TABLE, f"{seed:02d}").exists()]
    for seed in todo:
        if not room():
            break
        begun = time.perf_counter()
        save(TABLE, f"{seed:02d}", cell(load(), seed))
        print(f"{TABLE} {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
