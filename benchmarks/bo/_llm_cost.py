"""What one question to SmolLM2 as a surrogate costs, by rows of history and number of queries."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.bo._llm_cells import Plan
from benchmarks.bo._llm_recorded import recorded, space_of
from benchmarks.harness.spec import Unavailable

__all__ = ["MOST", "run"]

MOST = (5, 20, 80)
_cache: dict[str, Any] = {}


def run(plan: Plan) -> dict[str, Any]:
    """Predict 5, 20 and 80 points from n rows: all at once, or every prompt by itself."""
    import torch

    from probkit.bo.llm import LLMSurrogate, ProblemCard
    from probkit.models.language import load_smollm2, smollm2_path

    if smollm2_path() is None:
        raise Unavailable("SmolLM2 is not here: probkit fetch smollm2")
    if "lm" not in _cache:
        _cache["lm"] = load_smollm2()
    lm = _cache["lm"]
    n, reuse = int(plan.model), plan.method == "reuse"
    space = space_of(plan.data)
    rows = recorded()["breast", plan.data, 0], recorded()["breast", plan.data, 1]
    params = [p for r in rows for p in r.params][:n]
    scores = torch.tensor([s for r in rows for s in r.scores][:n], dtype=torch.float64)
    card = ProblemCard(plan.data, "accuracy", "max")
    spec = LLMSurrogate(lm, space, card, n_perm=1, k=1, outcome="score")
    costs = []
    for m in MOST if reuse else MOST[:2]:  # prompts by themselves take too long for 80
        queries = space.sobol(m, rng=0)
        lm.forget()
        before, begin = lm.usage, time.process_time()
        if reuse:
            spec.condition(space.codes(params), scores, rng=0).predictions(queries)
        else:
            for query in queries:
                one = spec.condition(space.codes(params), scores, rng=0)
                one.predictions([query])
                lm.forget()
        spent = lm.usage - before
        costs.append(
            {
                "queries": m,
                "seconds": time.process_time() - begin,
                "prompt_tokens": spent.prompt_tokens,
                "cached_tokens": spent.cached_tokens,
                "completion_tokens": spent.completion_tokens,
            }
        )
    return {"costs": costs}
