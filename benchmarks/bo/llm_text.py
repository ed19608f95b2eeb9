"""Configurations and scores as text: round trips, recorded scores, and the law of a number."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import Quality, Value

__all__: list[str] = []

_N = 1000
#: The first scores of the recorded run (breast, RandomForest, seed 0).
_SCORES = (0.909890, 0.637363, 0.912088, 0.637363)


def _evaluate(quick: bool) -> list[Value]:
    from benchmarks.bo._llm_recorded import MODELS

    values = [_round_trips(model) for model in MODELS]
    values.append(_recorded_configurations())
    values += _scores()
    for prune in (1e-1, 1e-2, 1e-3) if quick else (1e-1, 1e-2, 1e-3, 1e-4):
        values += _tree(prune)
    return values


def _round_trips(model: str) -> Value:
    """Configurations that do not come back from their text, over the three ways to print them."""
    import torch

    from benchmarks.bo._llm_recorded import space_of
    from probkit.bo.llm import Serialiser

    space, wrong = space_of(model), 0
    options: tuple[dict[str, Any], ...] = ({}, {"warp": True}, {"decimals": "bound"})
    for chosen in options:
        text = Serialiser(space, **chosen)
        codes = space.random_codes(_N, rng=torch.Generator().manual_seed(0))
        for params in space.from_codes(codes):
            read = (
                text.parse(text.answer(params)),
                text.parse_json(text.to_json(params)),
                text.parse_row(text.row(params)),
            )
            wrong += any(found.params != text.rounded(params) for found in read)
    note = f"of {_N * len(options)}: plain, logarithms, decimals of the lower bound"
    return Value(f"{model}: configurations that do not come back", wrong, 0, note=note)


def _recorded_configurations() -> Value:
    from benchmarks.bo._llm_recorded import recorded, space_of
    from probkit.bo.llm import Serialiser

    runs = recorded()
    wrong = total = 0
    for (_, model, _), run in runs.items():
        text = Serialiser(space_of(model))
        for params in run.params:
            total += 1
            wrong += text.parse(text.answer(params)).params != text.rounded(params)
    return Value("recorded configurations that do not come back", wrong, 0, note=f"of {total}")


def _scores() -> list[Value]:
    from benchmarks.bo._llm_recorded import recorded, score

    params = recorded()["breast", "RandomForest", 0].params
    return [
        Value(
            f"breast, RandomForest, seed 0, row {k + 1}: score",
            score("breast", "RandomForest", params[k]),
            known,
            5e-7,
            note="reference: the recorded score",
        )
        for k, known in enumerate(_SCORES)
    ]


def _tree(prune: float) -> list[Value]:
    """Mean and spread of a normal law that is read from token probabilities."""
    import torch

    from probkit.bo.llm import DigitTree
    from probkit.models import FiniteLM

    decimals, mean, sd = 4, 0.3663, 0.1109
    grid = torch.arange(-5000, 13_000, dtype=torch.float64) / 10**decimals
    mass = torch.exp(-0.5 * ((grid - mean) / sd) ** 2)
    law = dict(
        zip(
            (f" {v:.4f} ##" for v in grid.tolist()), (mass / mass.sum()).tolist(), strict=True
        )
    )  # fmt: skip
    negative_zero = law.pop(" -0.0000 ##", 0.0)
    law[" 0.0000 ##"] = law.get(" 0.0000 ##", 0.0) + negative_zero
    lm = FiniteLM(lambda prompt: law)
    before = lm.usage
    density = DigitTree(decimals, prune).walk(lm, [lm.start("a number: ##")])[0]
    note = f"{(lm.usage - before).calls} forward passes; tail {density.tail:.1e}"
    return [
        Value(
            f"digit tree pruned at {prune:g}: error of the mean, in standard deviations",
            abs(density.mean - mean) / sd,
            note=note,
        ),
        Value(
            f"digit tree pruned at {prune:g}: relative error of the standard deviation",
            abs(density.variance**0.5 / sd - 1),
            note=note,
        ),
    ]


BENCHMARK = Quality(
    title="Configurations and scores as text",
    question=(
        "Do configurations of the recorded spaces come back from their text, do recorded scores "
        "come back from their configurations, and what does pruning the digit tree cost?"
    ),
    evaluate=_evaluate,
    packages=("scikit-learn", "torch"),
)
