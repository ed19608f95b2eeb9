"""Every method at N = 1 to 64 on a Markov language model whose right answer is known.

A row of five symbols is right where every one is; the model hits each with probability 0.3, as a
small language model does with the lines of a sum. The potential says of each symbol 0.98 or 0.02.
"""

from __future__ import annotations

import itertools
import random

from benchmarks.harness.spec import Quality, Value
from benchmarks.language._methods import Outcome, independent, run
from benchmarks.language._tables import by_method

__all__: list[str] = []

_SIZES = (1, 4, 16, 64)
_GUIDED = ("PF", "PG", "beam", "DVTS")
_SYMBOLS, _LENGTH, _PROBLEMS = "abcd", 5, 60
_PROBS = (0.3, 0.3, 0.25, 0.15)


def _outcomes(key: str, seed: int) -> list[Outcome]:
    from probkit.models.language import GuidedGeneration, MarkovLM, Steps
    from probkit.models.language.potentials import VerifierPotential

    lm = MarkovLM(_PROBS, [_PROBS] * len(_SYMBOLS), symbols=list(_SYMBOLS))
    rule = VerifierPotential(lambda text: text[-1] == key[len(text) - 1], high=0.98, low=0.02)
    steps = Steps(stop=(), max_tokens=1, max_steps=_LENGTH)
    model = GuidedGeneration(lm, rule, steps=steps)
    return [
        *independent(model, "go", str, key, _SIZES, seed),
        *(
            run(model, "go", str, key, method, n, seed)
            for n, method in itertools.product(_SIZES[1:], _GUIDED)
        ),
    ]


def _evaluate(quick: bool) -> list[Value]:
    rng = random.Random(0)
    cells = []
    for seed in range(20 if quick else _PROBLEMS):
        key = "".join(rng.choice(_SYMBOLS[:2]) for _ in range(_LENGTH))
        cells.append({"outcomes": [outcome._asdict() for outcome in _outcomes(key, seed)]})
    return by_method(cells)


BENCHMARK = Quality(
    title="Token budgets, Markov language model",
    question=(
        "How often is the mode of the answers right, by method and number of answers N, where each "
        "of five steps is right with probability 0.3 and a verifier says 0.98 or 0.02?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
