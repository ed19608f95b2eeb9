"""Tokens and CPU seconds of a language-model surrogate, from the stored cells."""

from __future__ import annotations

from benchmarks.harness.spec import Quality, Unavailable, Value

__all__: list[str] = []


def _evaluate(quick: bool) -> list[Value]:
    from benchmarks.bo._llm_cells import stored

    values = []
    for plan, found in sorted(stored("cost"), key=lambda item: int(item[0].model)):
        for cost in found["costs"]:
            computed = cost["prompt_tokens"] - cost["cached_tokens"]
            values.append(
                Value(
                    f"{plan.method}, n = {plan.model}, M = {cost['queries']}: CPU seconds",
                    cost["seconds"],
                    note=f"prompt tokens {cost['prompt_tokens']}, computed {computed}, generated "
                    f"{cost['completion_tokens']}",
                )
            )
    if not values:
        raise Unavailable("no cells are stored: python -m benchmarks.bo._llm_run cost")
    return values


BENCHMARK = Quality(
    title="Language models as surrogates, cost",
    question=(
        "What does it cost to predict M points from n rows with SmolLM2-135M (one order, one "
        "answer each, one thread), where questions about one history share its computation and "
        "where not?"
    ),
    evaluate=_evaluate,
    packages=("torch", "transformers"),
)
